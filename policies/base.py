"""The protocol between a policy, which proposes plans, and whoever scores them.

A question is a plan, and the part of the scoring text to score it on or none for all of it: many plans on little text,
few on all. A part costs its share of an evaluation, and all of the text what the plan was not scored on before
(`Meter`). Only scores on all of the text decide which plan is best. What is best on one part is in part best by
chance, so policies go from part to part.

A policy is a function of (problem, seed, history) and nothing else: `ask` doesn't change it, so asking twice without a
`tell` in between gives the same plan, and a new policy that is told the ledger of an interrupted search goes on as
the old one would have. Randomness for ask number n (n plans were told) comes from `generator(seed, n)`. A policy that
proposes in generations derives a generation from the history as it was when that generation began.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import Protocol

import numpy as np

from compressor.plan import PARTS, Plan, Score
from policies.problem import Problem

LUCK = 0.1
"""How much better than the best plan, as a share, one part may say that a plan is on the others: one that mends what was
broken on that part, as an attention sink that was lost, gains there alone."""


@dataclass(frozen=True)
class Question:
    """A plan, and on which of the `PARTS` parts of the scoring text it shall be scored; None is all of it."""

    plan: Plan
    part: int | None = None


class Meter:
    """What questions cost, in evaluations, after those that were asked before. One that was asked costs its share again, so
    that a policy which knows of nothing else comes to an end, too.

    spent: by all questions so far.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self._parts: dict[Plan, set[int]] = {}

    def allows(self, question: Question, evaluations: float) -> bool:
        """Whether a question can be asked within so many evaluations in all."""
        return self.spent + self.cost(question) <= evaluations + 1e-9

    def cost(self, question: Question) -> float:
        return 1 / PARTS if question.part is not None else 1 - len(self._parts.get(question.plan, ())) / PARTS

    def add(self, question: Question) -> float:
        """Count a question; returns its cost."""
        cost = self.cost(question)
        if question.part is not None:
            self._parts.setdefault(question.plan, set()).add(question.part)
        else:
            self._parts.pop(question.plan, None)
        self.spent += cost
        return cost


class Policy(Protocol):
    """Proposes plans within the budget; any plan over the problem's menus may be told, its own or another's."""

    name: str

    def ask(self) -> Question: ...

    def tell(self, plan: Plan, score: Score) -> None: ...


class History:
    """What a policy was told, in order: `plans` as index arrays [S], `log_kl` in nats, `parts`.

    tried: how many plans were told on a part first.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.plans: list[np.ndarray] = []
        self.log_kl: list[float] = []
        self.parts: list[int | None] = []
        self.tried = 0
        self._told: dict[bytes, set[int | None]] = {}
        self._full: dict[int, np.ndarray] = {}

    def add(self, plan: Plan, score: Score) -> None:
        self.plans.append(self.problem.indices(plan))
        self.log_kl.append(log_kl(score))
        self.parts.append(score.part)
        told = self._told.setdefault(_key(self.plans[-1]), set())
        self.tried += score.part is not None and not told
        told.add(score.part)
        if score.part is None:
            self._full[len(self) - 1] = np.array([held(kl) for kl in score.by_part])

    def __len__(self) -> int:
        return len(self.plans)

    def __contains__(self, indices: np.ndarray) -> bool:
        """Whether a plan was told, on whatever part."""
        return _key(indices) in self._told

    def decided(self, indices: np.ndarray) -> bool:
        """Whether a plan was told on all of the text."""
        return None in self._told.get(_key(indices), ())

    def untried(self, indices: np.ndarray) -> list[int]:
        """The parts on which a plan was not told, the one on which the best plan does worst first; none after all of the
        text."""
        told = self._told.get(_key(indices), set())
        worst_first = (-self._best_by_part()).argsort(kind="stable").tolist()
        return [part for part in worst_first if part not in told] if None not in told else []

    def generation_part(self) -> int:
        """The part on which a generation is tried, all of it on the same one; a score on all of the text ends it."""
        return len(self._full) % PARTS

    def full(self, told: int | None = None) -> list[int]:
        """Positions of the scores on all of the text among the first `told`, all if None."""
        return [n for n in self._full if told is None or n < told]

    def estimates(self, told: int | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the first `told` scores say: every plan once [N, S], its log KL on all of the text [N], and on how many parts
        it was scored [N].

        Where a plan was not scored it has the best plan's KL times its ratio to the best plan on the parts where it was
        (geometric mean, each held above 1 - `LUCK`).
        """
        known: dict[bytes, np.ndarray] = {}
        for plan_S, value, part in zip(self.plans[:told], self.log_kl[:told], self.parts[:told]):
            known_P = known.setdefault(_key(plan_S), np.full(PARTS, np.nan))
            known_P[slice(None) if part is None else part] = value
        plans_NS = np.stack([np.frombuffer(key, np.int16) for key in known]).astype(int)
        known_NP, best_P = np.stack(list(known.values())), self._best_by_part(told)
        ratio_N1 = np.nanmean(np.maximum(known_NP - best_P, log(1 - LUCK)), axis=1, keepdims=True)
        assumed_NP = np.where(np.isnan(known_NP), best_P + ratio_N1, known_NP)
        return plans_NS, np.log(np.exp(assumed_NP).mean(1)), (~np.isnan(known_NP)).sum(1)

    def _best_by_part(self, told: int | None = None) -> np.ndarray:
        """log KL [P] on every part of the best plan that fits and was scored on all of them; 0 if there is none."""
        full = [n for n in self.full(told) if len(self._full[n]) and self.problem.fits(self.plans[n])]
        return self._full[min(full, key=lambda n: self.log_kl[n])] if full else np.zeros(PARTS)

    def last_full(self) -> int:
        """Position of the newest score on all of the text; -1 if there is none."""
        return max(self._full, default=-1)

    def best(self) -> np.ndarray:
        """The plan [S] of least KL among those that fit and were told on all of the text, or else among all."""
        decides_N = self.problem.fits(np.stack(self.plans)) & np.array([part is None for part in self.parts])
        return self.plans[int(np.where(decides_N if decides_N.any() else True, self.log_kl, np.inf).argmin())]


def log_kl(score: Score) -> float:
    """log(KL in nats/token), held within 1e-6 and 100 nats; not-a-number, as an unbounded KL, counts as 100."""
    return held(score.kl)


def held(kl: float) -> float:
    """log(KL), within the same bounds."""
    return log(min(max(kl if kl == kl else inf, 1e-6), 100.0))


def generator(seed: int, number: int) -> np.random.Generator:
    """The randomness of one ask, or of one generation."""
    return np.random.default_rng((seed, number))


def _key(indices: np.ndarray) -> bytes:
    return np.asarray(indices, np.int16).tobytes()
