"""An off-policy actor-critic over plans: it starts from dynamic programming and learns what isn't additive.

The decision process: state = a site, what was decided before it, what is left of each budget; action = the site's
action, masked such that the budget stays reachable (AMC's action wall, He et al. 2018); transitions are deterministic;
reward -log KL at the end.

    actor    p(a | state) ~ exp(prior[s, a] + f(state, action))     prior = -(x + price * cost) / tau, x from the critic
    critic   log KL of the whole plan, an ensemble (`policies.critic`): fitted to every plan that was ever scored
    value    V(state), a second output of the actor's network: the baseline of the policy gradient

A round: fit the critic to the ledger; improve the actor on walks that the critic scores (advantage = return - V,
entropy bonus); let the actor, dynamic programming and level switches around the best plans (EvoPress, Sieberling et al.
2024) propose in imagination, within trust regions around the best plan from half of its sites down to a few (as in TuRBO,
Eriksson et al. 2019, but all sizes at once). What is proposed minimises the mean moved half-way to a posterior sample of
its own (Thompson 1933, tempered), and is tried on a part of the text: the one on which the best plan does worst. What a plan
breaks, as the attention sink of a window (Xiao et al. 2023), it breaks on some parts only, and mending it pays most.

Then a race (Maron & Moore 1994): as long as some plan that was tried is expected to be better than the best one, by the
critic and by its own scores, it is tried on its next part. One that stays ahead on all of them is the new best.

Never worse: the first plan on all of the text is that of dynamic programming; the first in the race against it is the uniform
plan of least sensitivity.

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

from compressor.plan import PARTS, Plan, Score
from policies.actor import Actor, Training
from policies.base import History, Question, generator
from policies.critic import Critic, part_noise
from policies.dynamic_programming import solve, tempered
from policies.problem import Problem
from policies.random import random_plan
from policies.uniform import uniform_plans

METRICS = {
    "scored": "scores in the ledger when the round began",
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
            SafetensorError, KeyError, TypeError, ValueError: it is no such file.
        """
        with safe_open(path, "pt") as stored:
            families = json.loads(stored.metadata()["families"])
        return cls(families, load_file(path))


@dataclass(frozen=True)
class Settings:
    """tempered: plans of dynamic programming on perturbed sensitivities that the warm-up tries. tries: plans tried in a
    round. boldness: weight of a posterior sample against the mean in a try. nearest: sites of the smallest trust region.
    steps, walks: of the actor's training. rounds, children: of the search in imagination. members: of the critic's
    ensemble.
    """

    tempered: int = 8
    tries: int = 4
    boldness: float = 0.5
    nearest: int = 3
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
        self._fitted = 0, Critic(problem, self.reference, settings.members, self.start.families)
        self._proposals: tuple[int, list[np.ndarray]] = (-1, [])

    def ask(self) -> Question:
        question = self._warm_up()
        if question is not None:
            return question
        history = self.history
        slot = max(0, history.tried - 1 - self.settings.tempered) % self.settings.tries
        if slot == 0 and (hoped := self._hoped()) is not None:
            return self._next(hoped)
        begin = len(history) - slot
        if self._proposals[0] != begin:
            self._proposals = begin, self._propose(begin)
        untold = (plan_S for plan_S in self._proposals[1] if plan_S not in history)
        return self._next(next(untold, history.best()))

    def _next(self, plan_S: np.ndarray) -> Question:
        """A plan on its next part, or on all of the text when it was told on all parts."""
        untried = self.history.untried(plan_S)
        return Question(self.problem.plan(plan_S), untried[0] if untried else None)

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)

    def memory(self) -> Memory:
        """What everything told so far leaves to another search."""
        told = len(self.history)
        critic = self._critic(told)
        rng = generator(self.seed, told)
        actor, _ = self._actor(critic, rng)
        return Memory(critic.families(), actor.weights())

    def _warm_up(self) -> Question | None:
        """What every search scores first: dynamic programming, the best uniform plan beside it, tempered plans; None
        when that is done."""
        problem, history = self.problem, self.history
        if not history.decided(self.reference):
            return Question(problem.plan(self.reference))
        if self.uniform not in history:
            return self._next(self.uniform)
        if history.tried < 1 + self.settings.tempered:
            plan_S = tempered(problem, self.seed, history)
            return self._next(plan_S) if plan_S not in history else None  # it knows of nothing else
        return None

    def _hoped(self) -> np.ndarray | None:
        """The plan [S] of least expected log KL, if it was not yet scored on all of the text.

        The expectation is the critic's, moved to what the plan's scores say as far as `MISFIT` against their noise allows.
        """
        told = len(self.history)
        plans_PS, log_kl_P, parts_P = self.history.estimates(told)
        predicted_P = self._critic(told).predict(plans_PS).mean(0)
        trust_P = 1 / (1 + (part_noise(parts_P) / MISFIT) ** 2)
        expected_P = predicted_P + trust_P * (log_kl_P - predicted_P)
        likely = np.where(self.problem.fits(plans_PS), expected_P, np.inf).argmin()
        return plans_PS[likely] if not self.history.decided(plans_PS[likely]) else None

    def _propose(self, begin: int) -> list[np.ndarray]:
        """The fresh plans of a round, in the order in which they are asked for, and some to spare."""
        settings, problem, best_S = self.settings, self.problem, self.history.best()
        plans_NS, log_kl_N, parts_N = self.history.estimates(begin)
        seen = {plan_S.tobytes() for plan_S in plans_NS}
        rng = generator(self.seed, begin)

        critic = self._critic(begin)
        predicted_N = critic.predict(plans_NS).mean(0)
        actor, metrics = self._actor(critic, rng)
        walks_BS = actor.walk(256).plans_BS

        proposals: list[np.ndarray] = []
        from_actor = 0
        ranked_N = predicted_N.argsort()
        elite_PS = plans_NS[ranked_N[problem.fits(plans_NS[ranked_N])][:6]]
        for slot in range(settings.tries):
            member = 1 + (begin + slot) % (settings.members - 1)
            region = Region(problem, best_S, max(len(problem.sites) >> (slot + 1), settings.nearest))
            programmed_S = solve(problem, critic.terms_ESA[member], width=300)
            others_PS = np.concatenate([elite_PS, programmed_S[None]])
            pool_PS, origin_P = region.reach(np.concatenate([others_PS, walks_BS]), len(others_PS), rng)
            ranked_PS, origin_P = exchange(
                region, pool_PS, origin_P, acquisition(critic, member, settings.boldness), settings, rng
            )
            fresh = [(p, o) for p, o in zip(ranked_PS, origin_P) if p.tobytes() not in seen]
            proposals += [p for p, _ in fresh[:1]]
            seen |= {p.tobytes() for p, _ in fresh[:1]}
            from_actor += sum(int(o) for _, o in fresh[:1])
        spare = [p for p, _ in fresh[1:]] + [random_plan(problem, rng) for _ in range(50)]
        predicted_EB = critic.predict(np.stack(proposals or [best_S]))
        self.log.append(
            {
                "scored": begin,
                "critic_error": float(np.sqrt(np.mean((predicted_N - log_kl_N)[parts_N == PARTS] ** 2))),
                "critic_scale": critic.scale,
                "spread": float(predicted_EB.std(0).mean()),
                "predicted": float(predicted_EB.mean(0).min()),
                "best": float(log_kl_N[parts_N == PARTS].min()),
                **metrics,
                "from_actor": from_actor,
            }
        )
        return proposals + [p for p in spare if p.tobytes() not in seen]

    def _critic(self, told: int) -> Critic:
        """The critic, fitted to the first `told` scores."""
        fitted, critic = self._fitted
        if fitted != told:
            critic.fit(*self.history.estimates(told), generator(self.seed, told))
            self._fitted = told, critic
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


@dataclass(frozen=True)
class Region:
    """The plans within the budget that differ from a centre [S] on at most `radius` sites."""

    problem: Problem
    centre_S: np.ndarray
    radius: int

    def holds(self, plans_BS: np.ndarray) -> np.ndarray:
        """bool [B]."""
        return ((plans_BS != self.centre_S).sum(1) <= self.radius) & self.problem.fits(plans_BS)

    def reach(self, plans_BS: np.ndarray, others: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The centre, and of every plan as many random sites as the radius allows, put into the centre, as far as that is
        within the budget; and marks [B], false for the centre and for what comes from the first `others` plans."""
        order_BS = np.where(plans_BS != self.centre_S, rng.random(plans_BS.shape), 2.0).argsort(1).argsort(1)
        nearer_BS = np.where(order_BS < self.radius, plans_BS, self.centre_S)
        fits_B = self.holds(nearer_BS)
        plans_PS = np.concatenate([self.centre_S[None], nearer_BS[fits_B]])
        return plans_PS, np.append(False, np.flatnonzero(fits_B) >= others)


def exchange(
    region: Region,
    plans_PS: np.ndarray,
    origin_P: np.ndarray,
    acquire: Callable[[np.ndarray], np.ndarray],
    settings: Settings,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Evolution in imagination: children change one to three sites of a parent and must lie in the region.

    acquire: plans [B, S] -> what is minimised [B]. origin_P: a mark that children inherit.
    Returns the survivors, best first, and their marks.
    """
    sizes_S, count = region.problem.valid_SA.sum(1), len(region.problem.sites)
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
        inside = region.holds(children_BS)
        if inside.any():
            plans_PS = np.concatenate([plans_PS, children_BS[inside]])
            values_P = np.concatenate([values_P, acquire(children_BS[inside])])
            origin_P = np.concatenate([origin_P, origin_P[parents[inside]]])
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
