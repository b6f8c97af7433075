"""The protocol between a policy, which proposes plans, and whoever scores them.

A question is a plan and the share of the scoring text to score it on: many plans on little text, few on all of it. It
costs that share of an evaluation. Only scores on all of the text decide which plan is best.

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

from compressor.plan import Plan, Score
from policies.problem import Problem


@dataclass(frozen=True)
class Question:
    """A plan, and on which share of the scoring text it shall be scored."""

    plan: Plan
    share: float = 1.0


class Policy(Protocol):
    """Proposes plans within the budget; any plan over the problem's menus may be told, its own or another's."""

    name: str

    def ask(self) -> Question: ...

    def tell(self, plan: Plan, score: Score) -> None: ...


class History:
    """What a policy was told, in order: `plans` as index arrays [S], `log_kl` in nats, `shares`.

    tried: how many scores were on a share below 1.
    """

    def __init__(self, problem: Problem):
        self.problem = problem
        self.plans: list[np.ndarray] = []
        self.log_kl: list[float] = []
        self.shares: list[float] = []
        self.tried = 0
        self._seen: dict[bytes, float] = {}
        self._partial: dict[bytes, float] = {}

    def add(self, plan: Plan, score: Score) -> None:
        self.plans.append(self.problem.indices(plan))
        self.log_kl.append(log_kl(score))
        self.shares.append(score.share)
        key = _key(self.plans[-1])
        self._seen[key] = max(score.share, self._seen.get(key, 0.0))
        if score.share < 1.0:
            self.tried += 1
            self._partial[key] = self.log_kl[-1]

    def __len__(self) -> int:
        return len(self.plans)

    def __contains__(self, indices: np.ndarray) -> bool:
        """Whether a plan was told, on whatever share."""
        return _key(indices) in self._seen

    def share(self, indices: np.ndarray) -> float:
        """The largest share on which a plan was told; 0 if it never was."""
        return self._seen.get(_key(indices), 0.0)

    def partial(self, indices: np.ndarray) -> float | None:
        """The log KL of a plan on a share below 1; None if it was never told."""
        return self._partial.get(_key(indices))

    def last_full(self) -> int:
        """Position of the newest score on all of the text; -1 if there is none."""
        return max((n for n, share in enumerate(self.shares) if share == 1.0), default=-1)

    def best(self) -> np.ndarray:
        """The plan [S] of least KL among those that fit and were told on all of the text, or else among all."""
        decides_N = self.problem.fits(np.stack(self.plans)) & (np.array(self.shares) == 1.0)
        return self.plans[int(np.where(decides_N if decides_N.any() else True, self.log_kl, np.inf).argmin())]


def log_kl(score: Score) -> float:
    """log(KL in nats/token), held within 1e-6 and 100 nats; not-a-number, as an unbounded KL, counts as 100."""
    kl = score.kl if score.kl == score.kl else inf
    return log(min(max(kl, 1e-6), 100.0))


def generator(seed: int, number: int) -> np.random.Generator:
    """The randomness of one ask, or of one generation."""
    return np.random.default_rng((seed, number))


def _key(indices: np.ndarray) -> bytes:
    return np.asarray(indices, np.int16).tobytes()
