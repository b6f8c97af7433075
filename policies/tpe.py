"""Optuna's tree-structured Parzen estimator (Bergstra et al. 2011), one categorical parameter a site.

The sampler knows no budget: what it suggests is made to fit by `greedy.descend`. It starts from the largest uniform plan
and the plan of dynamic programming, then random plans that use the budget.
"""

from __future__ import annotations

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution

from compressor.plan import Plan, Score
from policies.base import History, generator
from policies.dynamic_programming import solve
from policies.greedy import descend
from policies.problem import Problem
from policies.random import random_plan
from policies.uniform import uniform_plans


class Tpe:
    name = "tpe"

    def __init__(self, problem: Problem, seed: int = 0, random_plans: int = 6):
        self.problem, self.seed, self.history = problem, seed, History(problem)
        self.starts = [uniform_plans(problem)[0], solve(problem)]
        self.random_plans = random_plans
        self._distributions: dict[str, BaseDistribution] = {
            site.name: CategoricalDistribution(range(len(menu))) for site, menu in zip(problem.sites, problem.actions)
        }

    def ask(self) -> Plan:
        for indices in self.starts:
            if indices not in self.history:
                return self.problem.plan(indices)
        rng, told = generator(self.seed, len(self.history)), len(self.history)
        if told < len(self.starts) + self.random_plans:
            return self.problem.plan(random_plan(self.problem, rng))
        study = self._study(int(rng.integers(2**31)))
        for _ in range(12):
            suggested = study.ask(self._distributions).params
            indices = np.array([suggested[site.name] for site in self.problem.sites])
            indices = descend(self.problem, indices, self.problem.sensitivity_SA)
            if indices not in self.history:
                return self.problem.plan(indices)
        return self.problem.plan(random_plan(self.problem, rng))

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)

    def _study(self, seed: int) -> optuna.Study:
        """A study in memory that was told the history."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(n_startup_trials=0, seed=seed))
        names = [site.name for site in self.problem.sites]
        for indices, value in zip(self.history.plans, self.history.log_kl):
            params = {name: int(index) for name, index in zip(names, indices)}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=self._distributions, value=value))
        return study
