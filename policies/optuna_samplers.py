"""Optuna's samplers as rivals, one categorical parameter a site: TPE (Bergstra et al. 2011), NSGA-II (Deb et al. 2002).

A sampler knows no budget: what it suggests is made to fit by `greedy.descend`, and the plan that fits is what it is told.
Both start from the largest uniform plan and the plan of dynamic programming, then random plans that use the budget.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, NSGAIISampler, TPESampler

from compressor.plan import Plan, Score
from policies.base import History, Question, generator
from policies.dynamic_programming import solve
from policies.greedy import descend
from policies.problem import Problem
from policies.random import random_plan
from policies.uniform import uniform_plans


class _Sampled:
    """A policy around a sampler, which is made anew for every ask and told the whole history."""

    directions: tuple[Literal["minimize"], ...] = ("minimize",)
    first_plans = 8
    """Plans that don't come from the sampler."""

    def __init__(self, problem: Problem, seed: int = 0):
        self.problem, self.seed, self.history = problem, seed, History(problem)
        self.starts = [uniform_plans(problem)[0], solve(problem)]
        self._distributions: dict[str, BaseDistribution] = {
            site.name: CategoricalDistribution(range(len(menu))) for site, menu in zip(problem.sites, problem.actions)
        }

    def sampler(self, seed: int) -> BaseSampler:
        raise NotImplementedError

    def values(self, number: int) -> list[float]:
        """What the sampler minimises, of the plan that was told as number `number`."""
        return [self.history.log_kl[number]]

    def attributes(self, number: int) -> dict[str, int]:
        """What the sampler would have noted of that trial."""
        return {}

    def ask(self) -> Question:
        for indices in self.starts:
            if indices not in self.history:
                return Question(self.problem.plan(indices))
        rng = generator(self.seed, len(self.history))
        if len(self.history) >= self.first_plans:
            study = self._study(int(rng.integers(2**31)))
            for _ in range(12):
                suggested = study.ask(self._distributions).params
                indices = np.array([suggested[site.name] for site in self.problem.sites])
                indices = descend(self.problem, indices, self.problem.sensitivity_SA)
                if indices not in self.history:
                    return Question(self.problem.plan(indices))
        return Question(self.problem.plan(random_plan(self.problem, rng)))

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)

    def _study(self, seed: int) -> optuna.Study:
        """A study in memory that was told the history."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=self.sampler(seed), directions=self.directions)
        names = [site.name for site in self.problem.sites]
        for number, indices in enumerate(self.history.plans):
            trial = optuna.trial.create_trial(
                params={name: int(index) for name, index in zip(names, indices)},
                distributions=self._distributions,
                values=self.values(number),
                system_attrs=self.attributes(number),
            )
            study.add_trial(trial)
        return study


class Tpe(_Sampled):
    name = "tpe"

    def sampler(self, seed: int) -> BaseSampler:
        return TPESampler(n_startup_trials=0, seed=seed)


class Nsga2(_Sampled):
    """Minimises KL and the fullest budget's share together; generations of `first_plans`, in the order of the ledger."""

    name = "nsga2"
    directions = ("minimize", "minimize")

    def sampler(self, seed: int) -> BaseSampler:
        return NSGAIISampler(population_size=self.first_plans, seed=seed)

    def values(self, number: int) -> list[float]:
        shares_SD = self.problem.share_SAD[np.arange(len(self.problem.sites)), self.history.plans[number]]
        return [self.history.log_kl[number], float(shares_SD.sum(0).max())]

    def attributes(self, number: int) -> dict[str, int]:
        return {NSGAIISampler._get_generation_key(): number // self.first_plans}
