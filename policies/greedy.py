"""The usual heuristic: all sites at their best, then the cheapest losses of quality per unit of budget, until it fits."""

from __future__ import annotations

import numpy as np

from compressor.plan import Plan, Score
from policies.base import History, generator
from policies.dynamic_programming import perturbed
from policies.problem import Problem


class Greedy:
    """First the plan for the sensitivities as given, then for perturbed ones, as `DynamicProgramming` does."""

    name = "greedy"

    def __init__(self, problem: Problem, seed: int = 0):
        self.problem, self.seed, self.history = problem, seed, History(problem)

    def ask(self) -> Plan:
        indices = descend(self.problem, best_actions(self.problem), self.problem.sensitivity_SA)
        rng = generator(self.seed, len(self.history))
        for attempt in range(12):
            if indices not in self.history:
                break
            sensitivity_SA = perturbed(self.problem, rng, spread=0.5 + 0.25 * attempt)
            indices = descend(self.problem, best_actions(self.problem), sensitivity_SA)
        return self.problem.plan(indices)

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)


def best_actions(problem: Problem) -> np.ndarray:
    """The action of least sensitivity at every site, [S]; the budget is not looked at."""
    return np.where(problem.valid_SA, problem.sensitivity_SA, np.inf).argmin(1)


def descend(problem: Problem, indices: np.ndarray, sensitivity_SA: np.ndarray) -> np.ndarray:
    """Change a plan [S] step by step until it fits: the step of least added sensitivity per relieved share of the budgets
    that are still exceeded. A plan that fits is returned as it is.
    """
    indices, sites = indices.copy(), np.arange(len(problem.sites))
    scale_D = np.maximum(np.abs(problem.room_D), 1)
    for _ in range(problem.valid_SA.sum()):
        over_D = problem.used(indices) > problem.room_D
        if not over_D.any():
            return indices
        share_SA = np.where(problem.valid_SA, problem.units_SAD @ (over_D / scale_D), np.inf)
        relief_SA = share_SA[sites, indices][:, None] - share_SA
        harm_SA = sensitivity_SA - sensitivity_SA[sites, indices][:, None]
        # a step that relieves at no harm is taken before all others
        rate_SA = np.where(relief_SA > 0, harm_SA / np.where(relief_SA > 0, relief_SA, 1.0), np.inf)
        site, action = np.unravel_index(rate_SA.argmin(), rate_SA.shape)
        if not np.isfinite(rate_SA[site, action]):
            break
        indices[site] = action
    # several budgets can pull in a circle: the nearest plan under the mask instead
    return problem.walk(np.where(np.arange(sensitivity_SA.shape[1]) == indices[:, None], 0.0, 1.0 + sensitivity_SA))
