"""Evolution by level switches: EvoPress (Sieberling et al. 2024, arXiv 2410.14649, algorithm 1).

The best plan so far is the parent; a child lowers some sites and raises as many, so that the cost stays the same. The
children of a generation are tried on a part of the text, another one for every generation, and the best of them is
scored on all of it (their successive halving).

Departures: costs of a step differ between our sites, so of `draws` children the fullest that fits is taken; two stages
of halving, since a score on all of the text is only some thousand tokens here. The start is the largest uniform plan
(theirs) and the plan of dynamic programming (which they lack, and which every informed policy here is given).
"""

from __future__ import annotations

import numpy as np

from compressor.plan import Plan, Score
from policies.base import History, Question, generator
from policies.dynamic_programming import solve
from policies.problem import Problem
from policies.random import random_plan
from policies.uniform import uniform_plans


class Evolution:
    """children: tried in a generation, each on a part of the text, and each the fullest of `draws`."""

    name = "evolution"
    children = 8
    draws = 8

    def __init__(self, problem: Problem, seed: int = 0):
        self.problem, self.seed, self.history = problem, seed, History(problem)
        self.starts = [uniform_plans(problem)[0], solve(problem)]
        self.share_SA = np.where(problem.valid_SA, problem.share_SAD.sum(-1), np.nan)

    def ask(self) -> Question:
        history = self.history
        for indices in self.starts:
            if not history.decided(indices):
                return Question(self.problem.plan(indices))
        begin = history.last_full() + 1
        tried = history.log_kl[begin:]
        if len(tried) < self.children:
            return Question(self.problem.plan(self._child(history.best())), history.generation_part())
        return Question(self.problem.plan(history.plans[begin + int(np.argmin(tried))]))

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)

    def _child(self, parent: np.ndarray) -> np.ndarray:
        """The fullest of some children [S] that fit and were not told; a random plan if there is none."""
        problem, rng = self.problem, generator(self.seed, len(self.history))
        if not problem.fits(parent):
            return random_plan(problem, rng)
        children: list[np.ndarray] = []
        for _ in range(64 * self.draws):
            child = self._switched(parent, rng)
            if problem.fits(child) and child not in self.history:
                children.append(child)
                if len(children) == self.draws:
                    break
        if not children:
            return random_plan(problem, rng)
        sites = np.arange(len(problem.sites))
        return max(children, key=lambda c: self.share_SA[sites, c].sum())

    def _switched(self, parent: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One to three switches, one most often (their min of two draws)."""
        child = parent.copy()
        for _ in range(min(rng.integers(1, 4, size=2))):
            for sign in (-1, 1):
                site = int(rng.integers(len(child)))
                change_A = sign * (self.share_SA[site] - self.share_SA[site, child[site]])
                (choices,) = np.nonzero(change_A > 0)
                if len(choices):
                    nearest = choices[change_A[choices].argsort()[:3]]  # a level or a few, not the whole menu
                    child[site] = int(rng.choice(nearest))
        return child
