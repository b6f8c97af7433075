"""The actor: one network that scores every site's menu on a walk in depth order, and a value of the state.

    p(a | state) ~ exp(prior[s, a] + f(state, action))     prior = -(x + price * cost) / tau
    V(state)                                               a second output: the baseline of the policy gradient

An update is that of proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347): the clipped ratio to the
probabilities before it, an entropy bonus, and the squared error of V. With one epoch the ratio is 1 and it is the plain
advantage actor-critic (Mnih et al. 2016). Departure: a walk is short and pays at its end only, so the return of every
step is the walk's reward, without discount or bootstrap.

Letters: B walks, S sites, A actions, P features of a state, Q of an action, H hidden units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.plan import Formats
from policies.dynamic_programming import prices
from policies.problem import UNITS, Problem


@dataclass(frozen=True)
class Training:
    """hidden: units of the network. entropy: weight of the bonus. clip: how far a ratio may go from 1."""

    hidden: int = 32
    learning_rate: float = 0.01
    entropy: float = 0.003
    clip: float = 0.2


@dataclass(frozen=True)
class Walks:
    """plans_BS: what was chosen; state_BSP: what the network saw of each state; mask_BSA: what was allowed."""

    plans_BS: np.ndarray
    state_BSP: Tensor
    mask_BSA: Tensor


class Actor:
    """Policy and value over walks; scores every menu with one network."""

    def __init__(
        self,
        problem: Problem,
        x_SA: np.ndarray,
        training: Training,
        start: dict[str, Tensor] | None,
        rng: np.random.Generator,
    ):
        """x_SA: sensitivities > 0 for the prior; start: weights of another search, None for fresh ones."""
        self.problem, self.training = problem, training
        self.draw_from(rng)
        self.valid_SA = torch.tensor(problem.valid_SA)
        self.prior_SA = torch.tensor(prior_logits(problem, x_SA), dtype=torch.float32)
        self.x_SA = torch.tensor(x_SA / x_SA[problem.valid_SA].mean(), dtype=torch.float32)
        self.site_SP, self.action_SAQ = features(problem, x_SA)
        state = self.site_SP.shape[1] + 2 * self.action_SAQ.shape[2] + len(UNITS) + 1
        self.parameters = start or fresh_weights(state, self.action_SAQ.shape[2], training.hidden, self.random)
        self.parameters = {name: w.clone().requires_grad_() for name, w in self.parameters.items()}
        self.optimizer = torch.optim.Adam(self.parameters.values(), training.learning_rate)

    def draw_from(self, rng: np.random.Generator) -> None:
        """Take the randomness of the next walks from `rng`."""
        self.random = torch.Generator().manual_seed(int(rng.integers(2**62)))

    def weights(self) -> dict[str, Tensor]:
        return {name: w.detach().clone() for name, w in self.parameters.items()}

    def __call__(self, state_BP: Tensor, action_BAQ: Tensor) -> tuple[Tensor, Tensor]:
        """(additions to the prior's logits [..., A], values [...])."""
        w = self.parameters
        hidden_BH = state_BP @ w["state"] + w["bias"]
        both_BAH = torch.tanh(hidden_BH[..., None, :] + action_BAQ @ w["action"])
        value_B = (torch.tanh(state_BP @ w["value_in"]) @ w["value_out"])[..., 0] + w["value_bias"]
        return (both_BAH @ w["out"])[..., 0], value_B

    @torch.no_grad()
    def walk(self, count: int, given_BS: np.ndarray | None = None) -> Walks:
        """Samples `count` plans, or walks along given ones that fit."""
        problem, width = self.problem, self.action_SAQ.shape[2]
        left_BD = np.repeat(problem.room_D[None], count, 0)
        before_BQ, same = torch.zeros(count, width), {kind: torch.zeros(count, width) for kind in KINDS}
        sum_B, rows = torch.zeros(count), np.arange(count)
        axes = [list(UNITS).index(name) for name in problem.budgets]
        chosen, states, masks = [], [], []
        for s, site in enumerate(problem.sites):
            slack_B3 = torch.ones(count, len(UNITS))
            slack_B3[:, axes] = torch.tensor(problem.slack(s, left_BD), dtype=torch.float32)
            summed_B1 = torch.log1p(sum_B)[:, None]
            static_BP = self.site_SP[s].expand(count, -1)
            state_BP = torch.cat([static_BP, before_BQ, same[site.kind], slack_B3, summed_B1], 1)
            mask_BA = torch.tensor(problem.allowed(s, left_BD))
            if given_BS is not None:  # with several budgets the mask may refuse what fits
                mask_BA[rows, given_BS[:, s]] = True
            logits_BA, _ = self(state_BP, self.action_SAQ[s].expand(count, -1, -1))
            logits_BA = (logits_BA + self.prior_SA[s]).masked_fill(~mask_BA, -torch.inf)
            noise_BA = -torch.log(torch.empty(logits_BA.shape).exponential_(generator=self.random))
            choice_B = (logits_BA + noise_BA).argmax(1).numpy() if given_BS is None else given_BS[:, s]
            left_BD = left_BD - problem.units_SAD[s, choice_B]
            before_BQ = self.action_SAQ[s, choice_B]
            same = {**same, site.kind: before_BQ}
            sum_B = sum_B + self.x_SA[s, choice_B]
            chosen.append(choice_B)
            states.append(state_BP)
            masks.append(mask_BA)
        assert (problem.used(np.stack(chosen, 1))[rows] <= problem.room_D).all()
        return Walks(np.stack(chosen, 1), torch.stack(states, 1), torch.stack(masks, 1))

    def update(self, walks: Walks, reward_B: np.ndarray, epochs: int = 1) -> dict[str, float]:
        """One or more steps on walks and what they paid. Returns the entropy before the last step (mean of a site, nats)
        and the share of the rewards' variance that V left unexplained."""
        training = self.training
        scaled_B = (reward_B - reward_B.mean()) / (reward_B.std() + 1e-6)
        returns_B = torch.tensor(scaled_B, dtype=torch.float32)
        choice_BS1 = torch.tensor(walks.plans_BS)[..., None]
        old_BS: Tensor | None = None
        for _ in range(epochs):
            logits_BSA, value_BS = self(walks.state_BSP, self.action_SAQ)
            logits_BSA = (logits_BSA + self.prior_SA).masked_fill(~walks.mask_BSA, -torch.inf)
            log_p_BSA = torch.log_softmax(logits_BSA, -1)
            log_p_BS = log_p_BSA.gather(2, choice_BS1)[..., 0]
            old_BS = log_p_BS.detach() if old_BS is None else old_BS
            error_BS = returns_B[:, None] - value_BS
            advantage_BS = error_BS.detach()
            ratio_BS = (log_p_BS - old_BS).exp()
            clipped_BS = ratio_BS.clamp(1 - training.clip, 1 + training.clip)
            entropy = -(log_p_BSA.exp() * log_p_BSA.masked_fill(~walks.mask_BSA, 0.0)).sum(-1).mean()
            actor_loss = -torch.minimum(ratio_BS * advantage_BS, clipped_BS * advantage_BS).mean()
            value_loss = error_BS.pow(2).mean()
            self.optimizer.zero_grad()
            (actor_loss - training.entropy * entropy + 0.5 * value_loss).backward()
            self.optimizer.step()
        return {"entropy": float(entropy.detach()), "value_error": float(value_loss.detach())}


KINDS = ("attention", "ffn", "embedding", "head")


def fresh_weights(state: int, action: int, hidden: int, random: torch.Generator) -> dict[str, Tensor]:
    """Weights of the actor's network; the outputs start at 0, so that it starts as its prior."""
    return {
        "state": torch.randn(state, hidden, generator=random) / state**0.5,
        "action": torch.randn(action, hidden, generator=random) / action**0.5,
        "bias": torch.zeros(hidden),
        "out": torch.zeros(hidden, 1),
        "value_in": torch.randn(state, hidden, generator=random) / state**0.5,
        "value_out": torch.zeros(hidden, 1),
        "value_bias": torch.zeros(()),
    }


def features(problem: Problem, x_SA: np.ndarray) -> tuple[Tensor, Tensor]:
    """What the network sees of sites [S, P] and actions [S, A, Q]; relative, and always three cost columns."""
    valid_SA, count = problem.valid_SA, len(problem.sites)
    log_x_SA = np.log(x_SA)
    log_x_SA = np.where(valid_SA, (log_x_SA - log_x_SA[valid_SA].mean()) / (log_x_SA[valid_SA].std() + 1e-6), 0.0)
    cost_SA3 = np.zeros((*valid_SA.shape, len(UNITS)))
    for d, name in enumerate(problem.budgets):
        units_SA = np.where(valid_SA, problem.units_SAD[..., d], 0)
        cost_SA3[..., list(UNITS).index(name)] = units_SA / max(np.abs(units_SA).max(), 1)
    action_SAQ = np.zeros((*valid_SA.shape, 4 + len(UNITS)))
    for s, (site, menu) in enumerate(zip(problem.sites, problem.actions)):
        for a, action in enumerate(menu):
            bits = Formats.parse(action.format).bits
            action_SAQ[s, a, :3] = action.keep / site.units, np.log2(1 + bits) / 4, action.keep == 0
    action_SAQ[..., 3], action_SAQ[..., 4:] = log_x_SA, cost_SA3
    parameters_S = np.log([site.parameters + 1 for site in problem.sites])
    site_SP = np.concatenate(
        [
            np.array([[site.kind == kind for kind in KINDS] for site in problem.sites], float),
            np.linspace(-1, 1, count)[:, None],
            (parameters_S - parameters_S.mean())[:, None],
            log_x_SA.sum(1, keepdims=True) / valid_SA.sum(1, keepdims=True),
            cost_SA3.max(1),
        ],
        axis=1,
    )
    return torch.tensor(site_SP, dtype=torch.float32), torch.tensor(action_SAQ, dtype=torch.float32)


def prior_logits(problem: Problem, x_SA: np.ndarray, entropy: float = 0.3) -> np.ndarray:
    """-(x + price * cost) / tau, [S, A]; tau such that the mean entropy of a site is `entropy` nats."""
    priced_SA = np.where(problem.valid_SA, x_SA + problem.units_SAD @ prices(problem, x_SA), np.inf)
    priced_SA = priced_SA - priced_SA.min(1, keepdims=True)
    low, high = np.log(1e-6 * x_SA.max()), np.log(10 * x_SA.max())
    for _ in range(30):
        middle = (low + high) / 2
        p_SA = np.exp(-priced_SA / np.exp(middle))
        p_SA /= p_SA.sum(1, keepdims=True)
        mean = -(p_SA * np.log(np.maximum(p_SA, 1e-30))).sum(1).mean()
        low, high = (low, middle) if mean > entropy else (middle, high)
    return np.where(problem.valid_SA, -priced_SA / np.exp(low), -1e9)
