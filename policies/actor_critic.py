"""An off-policy actor-critic over plans: it starts from dynamic programming and learns what isn't additive.

The decision process: state = a site, what was decided before it, what is left of each budget; action = the site's
action, masked such that the budget stays reachable (AMC's action wall, He et al. 2018); transitions are deterministic;
reward -log KL at the end.

    actor    p(a | state) ~ exp(prior[s, a] + f(state, action))     prior = -(x + price * cost) / tau, x from the critic
    critic   log KL of the whole plan, an ensemble (`policies.critic`): fitted to every plan that was ever scored
    value    V(state), a second output of the actor's network: the baseline of the policy gradient

A round: fit the critic to the ledger; improve the actor on walks that the critic scores (advantage = return - V,
entropy bonus); let the actor, dynamic programming and level switches around the best plans (EvoPress, Sieberling et al.
2024) propose in imagination; ask for the plans of least predicted log KL, none of them run before. Rounds alternate: one
tries some plans on a small share of the text, each half by the mean and half by a posterior sample of its own (Thompson
1933, tempered); the next one asks for the plan of least mean on all of it, and only such a score can win.

Never worse: the first plan on all of the text is that of dynamic programming; the uniform plan of least sensitivity is
compared with it on a small share, and scored on all of it if it is ahead.

Departures: no bootstrapped targets (walks are short and imagined, so the return is known); networks are trained anew
every round from the ledger alone, so that an interrupted search resumes exactly; the features are relative
(shares, fractions, slacks), so that what was learned at another budget or of another model may start them (`Memory`).

Letters: B walks, S sites, A actions, P features of a state, Q of an action, H hidden units.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from compressor.plan import Plan, Score
from policies.actor import Actor, Training
from policies.base import History, Question, generator
from policies.critic import Critic
from policies.dynamic_programming import solve, tempered
from policies.problem import Problem
from policies.random import random_plan
from policies.uniform import uniform_plans

METRICS = {
    "scored": "scores in the ledger when the round began",
    "share": "share of the text on which the round's plans are scored",
    "critic_error": "root mean square error of the critic's fit to the scores on all of the text, in log KL",
    "critic_scale": "the most probable common scale of the critic's corrections; 1 is the prior's own",
    "spread": "mean standard deviation over the ensemble of the proposals' predictions, in log KL",
    "predicted": "least mean prediction among the proposals, in log KL",
    "best": "least log KL told so far on all of the text",
    "entropy": "mean entropy of the actor at a site after its training, in nats",
    "gain": "mean predicted log KL of the actor's walks after its training less before; below 0 it learned",
    "value_error": "variance of the returns that V leaves unexplained, as a share of their variance",
    "from_actor": "proposals of the round that the actor's walks led to; the others: exchanges and programming",
}
"""What the dicts in `ActorCritic.log` hold."""


@dataclass(frozen=True)
class Memory:
    """What a search leaves to one at another budget or of another model.

    families: what the critic learned about whole families of actions and about its form (`Critic.families`).
    actor: weights of the actor's network, whose features are relative.
    """

    families: dict[str, float]
    actor: dict[str, Tensor]

    def to_bytes(self) -> bytes:
        """A safetensors file: the weights, and the families among its metadata."""
        return save(self.actor, {"families": json.dumps(self.families)})

    @classmethod
    def read(cls, path: Path) -> Memory:
        """The inverse, from a file.

        Raises:
            SafetensorError, KeyError, ValueError: it is no such file.
        """
        with safe_open(path, "pt") as stored:
            families = json.loads(stored.metadata()["families"])
        return cls(families, load_file(path))


@dataclass(frozen=True)
class Settings:
    """share: part of the text on which plans are tried. tempered: plans of dynamic programming on perturbed sensitivities
    that the warm-up tries. tries: plans tried in a round. boldness: weight of a posterior sample against the mean in
    such a try. steps, walks: of the actor's training.
    rounds, children: of the search in imagination. members: of the critic's ensemble.
    """

    share: float = 0.125
    tempered: int = 8
    tries: int = 4
    boldness: float = 0.5
    steps: int = 12
    walks: int = 48
    rounds: int = 40
    children: int = 256
    members: int = 9
    training: Training = field(default_factory=Training)


class ActorCritic:
    """log: one dict a generation; its keys are explained in `METRICS`.

    memory: what another search left; None starts at the prior.
    """

    name = "actor_critic"

    def __init__(
        self,
        problem: Problem,
        seed: int = 0,
        settings: Settings = Settings(),
        memory: Memory | None = None,
    ):
        self.problem, self.seed, self.settings = problem, seed, settings
        self.start = memory or Memory({}, {})
        self.history = History(problem)
        self.reference = solve(problem)
        sites = np.arange(len(problem.sites))
        self.uniform = min(uniform_plans(problem), key=lambda plan_S: problem.sensitivity_SA[sites, plan_S].sum())
        self.log: list[dict[str, float]] = []
        self._proposals: tuple[int, list[np.ndarray]] = (-1, [])

    def ask(self) -> Question:
        question = self._warm_up()
        if question is not None:
            return question
        begin, share = self._round()
        if self._proposals[0] != begin:
            self._proposals = begin, self._propose(begin, share)
        untold = (indices for indices in self._proposals[1] if self.history.share(indices) < share)
        return Question(self.problem.plan(next(untold, self.history.best())), share)

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)

    def memory(self) -> Memory:
        """What everything told so far leaves to another search."""
        told = len(self.history)
        rng = generator(self.seed, told)
        critic = self._critic(told, rng)
        actor, _ = self._actor(critic, rng)
        return Memory(critic.families(), actor.weights())

    def _warm_up(self) -> Question | None:
        """What every search scores first: dynamic programming, the best uniform plan beside it, tempered plans; None
        when that is done."""
        problem, history, share = self.problem, self.history, self.settings.share
        if history.share(self.reference) < 1.0:
            return Question(problem.plan(self.reference))
        programmed, uniform = history.partial(self.reference), history.partial(self.uniform)
        if programmed is None:
            return Question(problem.plan(self.reference), share)
        if uniform is None:
            return Question(problem.plan(self.uniform), share)
        if uniform < programmed and history.share(self.uniform) < 1.0:
            return Question(problem.plan(self.uniform))
        if history.tried < 2 + self.settings.tempered:
            return Question(problem.plan(tempered(problem, self.seed, history)), share)
        return None

    def _round(self) -> tuple[int, float]:
        """Number of scores told before the current round began, and the share of the text that it is scored on."""
        told, begin = len(self.history), self.history.last_full() + 1
        return (told, 1.0) if told - begin >= self.settings.tries else (begin, self.settings.share)

    def _propose(self, begin: int, share: float) -> list[np.ndarray]:
        """The plans of a round, in the order in which they are asked for, and some to spare."""
        settings, problem, history = self.settings, self.problem, self.history
        plans_NS, log_kl_N, shares_N = self._told(begin)
        seen = {plan_S.tobytes() for plan_S, told in zip(plans_NS, shares_N) if told >= share}
        rng = generator(self.seed, begin)

        critic = self._critic(begin, rng)
        predicted_N = critic.predict(plans_NS).mean(0)
        actor, metrics = self._actor(critic, rng)
        walks_BS = actor.walk(256).plans_BS

        proposals: list[np.ndarray] = []
        from_actor = 0
        ranked_N = predicted_N.argsort()
        elite_PS = plans_NS[ranked_N[problem.fits(plans_NS[ranked_N])][:6]]
        members = (
            [0] if share == 1.0 else [1 + (begin + slot) % (settings.members - 1) for slot in range(settings.tries)]
        )
        for member in members:
            acquire = acquisition(critic, member, settings.boldness)
            programmed_S = solve(problem, critic.terms_ESA[member], width=300)
            pool_PS = np.concatenate([elite_PS, programmed_S[None], walks_BS])
            origin_P = np.arange(len(pool_PS)) > len(elite_PS)
            ranked_PS, origin_P = exchange(problem, pool_PS, origin_P, acquire, settings, rng)
            fresh = [(p, o) for p, o in zip(ranked_PS, origin_P) if p.tobytes() not in seen]
            proposals += [p for p, _ in fresh[:1]]
            seen |= {p.tobytes() for p, _ in fresh[:1]}
            from_actor += sum(int(o) for _, o in fresh[:1])
        spare = [p for p, _ in fresh[1:]] + [random_plan(problem, rng) for _ in range(50)]
        predicted_EB = critic.predict(np.stack(proposals or [history.best()]))
        self.log.append(
            {
                "scored": begin,
                "share": share,
                "critic_error": float(np.sqrt(np.mean((predicted_N - log_kl_N)[shares_N == 1.0] ** 2))),
                "critic_scale": critic.scale,
                "spread": float(predicted_EB.std(0).mean()),
                "predicted": float(predicted_EB.mean(0).min()),
                "best": float(log_kl_N[shares_N == 1.0].min()),
                **metrics,
                "from_actor": from_actor,
            }
        )
        return proposals + [p for p in spare if p.tobytes() not in seen]

    def _told(self, begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first `begin` plans [N, S] that were told, their log KL and shares [N]."""
        history = self.history
        return np.stack(history.plans[:begin]), np.array(history.log_kl[:begin]), np.array(history.shares[:begin])

    def _critic(self, begin: int, rng: np.random.Generator) -> Critic:
        """A critic that is fitted to the first `begin` scores."""
        plans_NS, log_kl_N, shares_N = self._told(begin)
        shares = sorted(set(shares_N[shares_N < 1.0]))
        critic = Critic(self.problem, self.reference, self.settings.members, shares, self.start.families)
        critic.fit(plans_NS, log_kl_N, shares_N, rng)
        return critic

    def _actor(self, critic: Critic, rng: np.random.Generator) -> tuple[Actor, dict[str, float]]:
        """An actor after a policy gradient on walks that the critic scores, and its part of `METRICS`."""
        actor = Actor(self.problem, critic.terms_ESA[0], self.settings.training, self.start.actor or None, rng)
        means: list[float] = []
        for _ in range(self.settings.steps):
            walks = actor.walk(self.settings.walks)
            predicted_B = critic.predict(walks.plans_BS).mean(0)
            means.append(float(predicted_B.mean()))
            found = actor.update(walks, -predicted_B)
        return actor, {**found, "gain": means[-1] - means[0]}


def acquisition(critic: Critic, member: int, boldness: float) -> Callable[[np.ndarray], np.ndarray]:
    """Plans [B, S] -> mean + boldness * (posterior sample - mean) of log KL [B]; the mean alone for member 0."""

    def acquire(plans_BS: np.ndarray) -> np.ndarray:
        mean_B = critic.predict(plans_BS).mean(0)
        return mean_B + boldness * (critic.predict(plans_BS, member) - mean_B) if member else mean_B

    return acquire


def exchange(
    problem: Problem,
    plans_PS: np.ndarray,
    origin_P: np.ndarray,
    acquire: Callable[[np.ndarray], np.ndarray],
    settings: Settings,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Evolution in imagination: children change one to three sites of a parent and must fit.

    acquire: plans [B, S] -> what is minimised [B]. origin_P: a mark that children inherit.
    Returns the survivors, best first, and their marks.
    """
    sizes_S, count = problem.valid_SA.sum(1), len(problem.sites)
    values_P = acquire(plans_PS)
    for _ in range(settings.rounds):
        keep = unique_best(plans_PS, values_P, 24)
        plans_PS, values_P, origin_P = plans_PS[keep], values_P[keep], origin_P[keep]
        parents = rng.integers(len(plans_PS), size=settings.children)
        children_BS = plans_PS[parents].copy()
        rows = np.arange(settings.children)
        for change in range(3):
            sites = rng.integers(count, size=settings.children)
            fresh = rng.integers(sizes_S[sites])
            changed = (rng.random(settings.children) < (1.0, 0.9, 0.3)[change]) & (sizes_S[sites] > 1)
            children_BS[rows[changed], sites[changed]] = fresh[changed]
        fits = problem.fits(children_BS)
        if fits.any():
            plans_PS = np.concatenate([plans_PS, children_BS[fits]])
            values_P = np.concatenate([values_P, acquire(children_BS[fits])])
            origin_P = np.concatenate([origin_P, origin_P[parents[fits]]])
    keep = unique_best(plans_PS, values_P, 24)
    return plans_PS[keep], origin_P[keep]


def unique_best(plans_PS: np.ndarray, values_P: np.ndarray, most: int) -> np.ndarray:
    """Positions of the `most` least values, each plan once, in order of value."""
    kept: dict[bytes, int] = {}
    for i in values_P.argsort(kind="stable"):
        kept.setdefault(plans_PS[i].tobytes(), int(i))
        if len(kept) == most:
            break
    return np.array(list(kept.values()))
