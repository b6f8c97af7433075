"""The usual heuristic: all sites at their best, then the cheapest losses of quality per unit of budget, until it fits."""

from __future__ import annotations

import numpy as np

from compressor.plan import Plan, Score
from policies.base import History, Question
from policies.dynamic_programming import tempered
from policies.problem import Problem


class Greedy:
    """First the plan for the sensitivities as given, then for perturbed ones, as `DynamicProgramming` does."""

    name = "greedy"

    def __init__(self, problem: Problem, seed: int = 0):
        self.problem, self.seed, self.history = problem, seed, History(problem)
        self.reference = solve(problem)

    def ask(self) -> Question:
        first = self.reference not in self.history
        indices = self.reference if first else tempered(self.problem, self.seed, self.history, solve)
        return Question(self.problem.plan(indices))

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)


def solve(problem: Problem, sensitivity_SA: np.ndarray | None = None) -> np.ndarray:
    """The plan [S] that `descend` reaches from the best actions as the problem predicts them."""
    given = problem.sensitivity_SA if sensitivity_SA is None else sensitivity_SA
    return descend(problem, best_actions(problem), given)


def best_actions(problem: Problem) -> np.ndarray:
    """The action of least sensitivity at every site, [S]; the budget is not looked at."""
    return np.where(problem.valid_SA, problem.sensitivity_SA, np.inf).argmin(1)


def descend(problem: Problem, indices: np.ndarray, sensitivity_SA: np.ndarray) -> np.ndarray:
    """Change a plan [S] step by step until it fits: the step of least added sensitivity per relieved share of the budgets
    that are still exceeded. A plan that fits is returned as it is.
    """
    indices, sites = indices.copy(), np.arange(len(problem.sites))
    for _ in range(problem.valid_SA.sum()):
        over_D = problem.used(indices) > problem.room_D
        if not over_D.any():
            return indices
        share_SA = np.where(problem.valid_SA, problem.share_SAD @ over_D, np.inf)
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
