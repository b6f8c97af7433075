"""The on-policy sibling of the actor-critic: proximal policy optimization on real scores (Schulman et al. 2017).

Same network, state, masks and update (`policies.actor`), but no critic of whole plans and nothing imagined: the actor
walks, its walks are scored on a part of the text, another one for every batch, and a few clipped epochs on that batch
end its use. After every batch the best of it is scored on all of the text, and only such a score can win. It starts from
dynamic programming: its prior is that surrogate, and its plan is the first one that is scored.

Departure: plans that others proposed are told like its own; an over-budget one is left out of the batch.

It is here to show what on-policy learning costs when a score is dear: the imagined walks of the actor-critic are free.
"""

from __future__ import annotations

import numpy as np

from compressor.plan import Plan, Score
from policies.actor import Actor, Training
from policies.base import History, Question, generator
from policies.dynamic_programming import solve
from policies.problem import Problem
from policies.random import random_plan


class Ppo:
    """batch: walks of an update, each scored on a part of the text. epochs: steps on a batch."""

    name = "ppo"

    def __init__(self, problem: Problem, seed: int = 0, batch: int = 16, epochs: int = 6):
        self.problem, self.seed, self.batch, self.epochs = problem, seed, batch, epochs
        self.history = History(problem)
        self.reference = solve(problem)
        x_SA = np.maximum(problem.sensitivity_SA, 1e-12)
        self.actor = Actor(problem, x_SA, Training(), None, generator(seed, 0))
        self._trained = 0
        self._proposals: tuple[int, list[np.ndarray]] = (-1, [])

    def ask(self) -> Question:
        problem, history = self.problem, self.history
        if not history.decided(self.reference):
            return Question(problem.plan(self.reference))
        begin = history.last_full() + 1
        tried = history.log_kl[begin:]
        if len(tried) >= self.batch:
            return Question(problem.plan(history.plans[begin + int(np.argmin(tried))]))
        if self._proposals[0] != begin:
            self._proposals = begin, self._walks(begin)
        untold = (indices for indices in self._proposals[1] if indices not in history)
        return Question(problem.plan(next(untold, self.reference)), history.generation_part())

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)

    def _walks(self, begin: int) -> list[np.ndarray]:
        """The plans of a batch and some to spare, after training on all batches before it."""
        ends = [n for n in self.history.full(begin) if n >= self._trained]
        for end in ends:
            plans_NS = self.history.plans[self._trained : end]
            rewards_N = -np.array(self.history.log_kl[self._trained : end])
            self._trained = end + 1
            fit = [n for n, plan_S in enumerate(plans_NS) if self.problem.fits(plan_S)]
            if len(fit) > 1:
                walks = self.actor.walk(len(fit), np.stack([plans_NS[n] for n in fit]))
                self.actor.update(walks, rewards_N[fit], self.epochs)
        rng = generator(self.seed, begin)
        self.actor.draw_from(rng)
        plans_BS = self.actor.walk(3 * self.batch).plans_BS
        return [*plans_BS, *(random_plan(self.problem, rng) for _ in range(50))]
