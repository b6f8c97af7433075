"""The protocol between a policy, which proposes plans, and whoever scores them.

A policy is a function of (problem, seed, history) and nothing else: `ask` doesn't change it, so asking twice without a
`tell` in between gives the same plan, and a new policy that is told the ledger of an interrupted search goes on as
the old one would have. Randomness for ask number n (n plans were told) comes from `generator(seed, n)`. A policy that
proposes in generations derives a generation from the history as it was when that generation began.
"""

from __future__ import annotations

from math import inf, log
from typing import Protocol

import numpy as np

from compressor.plan import Plan, Score
from policies.problem import Problem


class Policy(Protocol):
    """Proposes plans within the budget; any plan over the problem's menus may be told, its own or another's."""

    name: str

    def ask(self) -> Plan: ...

    def tell(self, plan: Plan, score: Score) -> None: ...


class History:
    """What a policy was told, in order: `plans` as index arrays [S] and `log_kl` in nats, and which plans were seen."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.plans: list[np.ndarray] = []
        self.log_kl: list[float] = []
        self._seen: set[bytes] = set()

    def add(self, plan: Plan, score: Score) -> None:
        self.plans.append(self.problem.indices(plan))
        self.log_kl.append(log_kl(score))
        self._seen.add(_key(self.plans[-1]))

    def __len__(self) -> int:
        return len(self.plans)

    def __contains__(self, indices: np.ndarray) -> bool:
        return _key(indices) in self._seen

    def best(self) -> np.ndarray:
        """The plan [S] of least KL."""
        return self.plans[int(np.argmin(self.log_kl))]


def log_kl(score: Score) -> float:
    """log(KL in nats/token), held within 1e-6 and 100 nats; not-a-number, as an unbounded KL, counts as 100."""
    kl = score.kl if score.kl == score.kl else inf
    return log(min(max(kl, 1e-6), 100.0))


def generator(seed: int, number: int) -> np.random.Generator:
    """The randomness of one ask, or of one generation."""
    return np.random.default_rng((seed, number))


def _key(indices: np.ndarray) -> bytes:
    return np.asarray(indices, np.int16).tobytes()
