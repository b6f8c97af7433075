"""Random plans that use the budget: the rival that any learning has to beat.

Actions drawn evenly would mostly miss the budget on one side. So every site draws independently from
p(a) ~ exp(-lambda * share(a)), share being the action's part of the room in a random blend of the budgets, with lambda
set by bisection such that the mean plan uses a random 85 to 100 percent of the dearest budget's slack. Of 64 such plans
the fullest that fits is asked for; if none fits, a walk over the sites under the mask, from the same distribution.
"""

from __future__ import annotations

import numpy as np

from compressor.plan import Plan, Score
from policies.base import History, Question, generator
from policies.problem import Problem


class Random:
    name = "random"

    def __init__(self, problem: Problem, seed: int = 0):
        self.problem, self.seed, self.history = problem, seed, History(problem)

    def ask(self) -> Question:
        rng = generator(self.seed, len(self.history))
        for _ in range(20):
            indices = random_plan(self.problem, rng)
            if indices not in self.history:
                break
        return Question(self.problem.plan(indices))

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)


def random_plan(problem: Problem, rng: np.random.Generator, draws: int = 64) -> np.ndarray:
    """One plan [S] within the budget."""
    lowest_SD = problem.units_SAD.min(1)
    slack_D = np.maximum(problem.room_D - lowest_SD.sum(0), 1)
    over_SAD = np.where(problem.valid_SA[..., None], (problem.units_SAD - lowest_SD[:, None]) / slack_D, 0.0)
    share_SA = over_SAD @ rng.dirichlet(np.ones(over_SAD.shape[2]))
    share_SA *= len(share_SA)
    target = rng.uniform(0.85, 1.0)

    def logits(strength: float) -> np.ndarray:
        return np.where(problem.valid_SA, -strength * share_SA, -np.inf)

    low, high = -30.0, 1000.0
    for _ in range(40):
        middle = (low + high) / 2
        weights = np.exp(logits(middle) - logits(middle).max(1, keepdims=True))
        used = np.einsum("sad,sa->d", over_SAD, weights / weights.sum(1, keepdims=True)).max()
        low, high = (middle, high) if used > target else (low, middle)
    noise_BSA = rng.gumbel(size=(draws, *share_SA.shape))
    plans_BS = (logits(high) + noise_BSA).argmax(-1)
    fits_B = problem.fits(plans_BS)
    if not fits_B.any():
        return problem.walk(-(logits(high) + noise_BSA[0]))
    full_B = np.einsum("bsd->b", over_SAD[np.arange(len(share_SA)), plans_BS])
    return plans_BS[np.where(fits_B, full_B, -np.inf).argmax()]
