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
tries some plans on a part of the text each, chosen half by the mean and half by a posterior sample of its own (Thompson
1933, tempered); the next one asks for the plan of least mean on all of it, and only such a score can win.

Never worse: the first plan on all of the text is that of dynamic programming; the uniform plan of least sensitivity is
compared with it on a part, and scored on all of it if it is ahead.

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
from policies.critic import PART_NOISE, Critic
from policies.dynamic_programming import solve, tempered
from policies.problem import Problem
from policies.random import random_plan
from policies.uniform import uniform_plans

METRICS = {
    "scored": "scores in the ledger when the round began",
    "radius": "sites on which the round's plans may differ from the best plan",
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


MISFIT = 0.02
"""Standard deviation of what the critic's form cannot say of a plan, in log KL."""


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
    """tempered: plans of dynamic programming on perturbed sensitivities
    that the warm-up tries. tries: plans tried in a round. boldness: weight of a posterior sample against the mean in
    such a try. steps, walks: of the actor's training.
    rounds, children: of the search in imagination. members: of the critic's ensemble.
    """

    tempered: int = 8
    tries: int = 4
    boldness: float = 0.5
    nearest: int = 6
    radius: int = 61
    retries: int = 2
    enough: int = 3
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
        problem, history, settings = self.problem, self.history, self.settings
        told = len(history)
        slot = (history.tried - 1 - settings.tempered) % (settings.tries + settings.retries)
        if slot == 0 and (sure := self._believed(told, sure=True)) is not None:
            return Question(problem.plan(sure))
        if slot >= settings.tries and (likely := self._believed(told)) is not None:
            return Question(problem.plan(likely), history.untried(likely)[0])
        begin = told - min(slot, settings.tries)
        if self._proposals[0] != begin:
            self._proposals = begin, self._propose(begin)
        untold = (plan_S for plan_S in self._proposals[1] if plan_S not in history)
        return Question(problem.plan(next(untold, history.best())), history.part())

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
        problem, history = self.problem, self.history
        if not history.decided(self.reference):
            return Question(problem.plan(self.reference))
        if self.uniform not in history:
            return Question(problem.plan(self.uniform), history.part())
        if not history.decided(self.uniform) and self._uniform_is_ahead():
            return Question(problem.plan(self.uniform))
        if history.tried < 1 + self.settings.tempered:
            return Question(problem.plan(tempered(problem, self.seed, history)), history.part())
        return None

    def _uniform_is_ahead(self) -> bool:
        """Of dynamic programming's plan, by its first score, which is one on a part."""
        plans = self.history.plans
        programmed, uniform = (
            next(n for n, plan_S in enumerate(plans) if (plan_S == wanted_S).all())
            for wanted_S in (self.reference, self.uniform)
        )
        log_kl_N = self.history.levelled(max(programmed, uniform) + 1)
        return bool(log_kl_N[uniform] < log_kl_N[programmed])

    def _believed(self, told: int, sure: bool = False) -> np.ndarray | None:
        """Of the plans that were only tried, the one of which most is hoped; or, if it has to be `sure`, the one of least
        expected log KL, provided that this is below the best plan's and was seen on enough parts. None if there is none.

        The expectation is the critic's, moved to the mean of the plan's scores as far as `MISFIT` against their noise says.
        """
        history = self.history
        plans_NS, log_kl_N, partial_N = self._told(told)
        open_N = np.array([not history.decided(p) and len(history.untried(p)) > 0 for p in plans_NS])
        open_N &= self.problem.fits(plans_NS)
        if not open_N.any():
            return None
        plans_PS, place_N = np.unique(plans_NS[open_N], axis=0, return_inverse=True)
        count_P = np.bincount(place_N.ravel())
        seen_P = np.bincount(place_N.ravel(), log_kl_N[open_N]) / count_P
        predicted_P = self._critic(told, generator(self.seed, told)).predict(plans_PS).mean(0)
        precision_P = count_P / PART_NOISE**2
        deviation_P = (1 / MISFIT**2 + precision_P) ** -0.5
        expected_P = predicted_P + (seen_P - predicted_P) * precision_P * deviation_P**2
        if not sure:
            return plans_PS[(expected_P - deviation_P).argmin()]
        best = log_kl_N[~partial_N & self.problem.fits(plans_NS)].min(initial=np.inf)
        expected_P[count_P < self.settings.enough] = np.inf
        return plans_PS[expected_P.argmin()] if expected_P.min() < best else None

    def _propose(self, begin: int) -> list[np.ndarray]:
        """The fresh plans of a round, in the order in which they are asked for, and some to spare."""
        settings, problem, history = self.settings, self.problem, self.history
        plans_NS, log_kl_N, partial_N = self._told(begin)
        seen = {plan_S.tobytes() for plan_S in plans_NS}
        rng = generator(self.seed, begin)

        critic = self._critic(begin, rng)
        predicted_N = critic.predict(plans_NS).mean(0)
        actor, metrics = self._actor(critic, rng)
        walks_BS = actor.walk(256).plans_BS

        proposals: list[np.ndarray] = []
        from_actor = 0
        ranked_N = predicted_N.argsort()
        elite_PS = plans_NS[ranked_N[problem.fits(plans_NS[ranked_N])][:6]]
        best_S = history.best()
        radius = self._radius(begin)
        for slot in range(settings.tries):
            acquire = acquisition(critic, 1 + (begin + slot) % (settings.members - 1), settings.boldness)
            programmed_S = solve(problem, critic.terms_ESA[1 + (begin + slot) % (settings.members - 1)], width=300)
            pool_PS = np.concatenate([best_S[None], elite_PS, programmed_S[None], walks_BS])
            origin_P = np.arange(len(pool_PS)) > len(elite_PS) + 1
            near_P = (pool_PS != best_S).sum(1) <= radius
            pool_PS, origin_P = pool_PS[near_P], origin_P[near_P]
            ranked_PS, origin_P = exchange(problem, pool_PS, origin_P, acquire, settings, rng, best_S, radius)
            unseen = [(p, o) for p, o in zip(ranked_PS, origin_P) if p.tobytes() not in seen]
            proposals += [p for p, _ in unseen[:1]]
            seen |= {p.tobytes() for p, _ in unseen[:1]}
            from_actor += sum(int(o) for _, o in unseen[:1])
        spare = [p for p, _ in unseen[1:]] + [random_plan(problem, rng) for _ in range(50)]
        predicted_EB = critic.predict(np.stack(proposals or [history.best()]))
        self.log.append(
            {
                "scored": begin,
                "radius": radius,
                "critic_error": float(np.sqrt(np.mean((predicted_N - log_kl_N)[~partial_N] ** 2))),
                "critic_scale": critic.scale,
                "spread": float(predicted_EB.std(0).mean()),
                "predicted": float(predicted_EB.mean(0).min()),
                "best": float(log_kl_N[~partial_N].min()),
                **metrics,
                "from_actor": from_actor,
            }
        )
        return proposals + [p for p in spare if p.tobytes() not in seen]

    def _radius(self, begin: int) -> int:
        """On how many sites a proposal of the round may differ from the best plan: half as many after every full score
        that was no better, twice as many after one that was."""
        radius, least = self.settings.radius, np.inf
        for number in self.history.full(begin):
            log_kl = self.history.log_kl[number]
            if np.isfinite(least):
                radius = radius * 2 if log_kl < least else radius // 2
            radius = min(max(radius, self.settings.nearest), len(self.problem.sites))
            least = min(least, log_kl)
        return radius

    def _told(self, begin: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The first `begin` plans [N, S] that were told, their levelled log KL, and which are of a part of the text [N]."""
        history = self.history
        partial_N = np.array([part is not None for part in history.parts[:begin]])
        return np.stack(history.plans[:begin]), history.levelled(begin), partial_N

    def _critic(self, begin: int, rng: np.random.Generator) -> Critic:
        """A critic that is fitted to the first `begin` scores."""
        critic = Critic(self.problem, self.reference, self.settings.members, self.start.families)
        critic.fit(*self._told(begin), rng)
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
    """Plans [B, S] -> mean + boldness * (posterior sample - mean) of log KL [B]."""

    def acquire(plans_BS: np.ndarray) -> np.ndarray:
        mean_B = critic.predict(plans_BS).mean(0)
        return mean_B + boldness * (critic.predict(plans_BS, member) - mean_B)

    return acquire


def exchange(
    problem: Problem,
    plans_PS: np.ndarray,
    origin_P: np.ndarray,
    acquire: Callable[[np.ndarray], np.ndarray],
    settings: Settings,
    rng: np.random.Generator,
    centre_S: np.ndarray,
    radius: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Evolution in imagination: children change one to three sites of a parent, must fit, and differ from `centre_S` on at
    most `radius` sites.

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
        fits = problem.fits(children_BS) & ((children_BS != centre_S).sum(1) <= radius)
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
