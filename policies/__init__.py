"""Policies propose plans. They see numbers about sites, never a model.

problem.py              what they are given: menus, sensitivities, costs, budgets; masks that keep walks within
base.py                 ask/tell, the history, the rule that makes a search resumable
uniform.py              one action for all sites, as done by hand
random.py               random plans that use the budget
dynamic_programming.py  the best plans of an additive surrogate; `solve`
greedy.py               what costs least quality per unit of budget goes first
evolution.py            level switches from the best plan so far
optuna_samplers.py      Optuna's TPE and NSGA-II
environment.py          the search as a Gymnasium environment
critic.py               log KL of whole plans, learned from the scores
actor.py                the network that walks over the sites, and how it learns
actor_critic.py         the agent
ppo.py                  its on-policy sibling
"""

from __future__ import annotations

from collections.abc import Callable

from policies.actor_critic import ActorCritic
from policies.base import Meter, Policy, Question
from policies.dynamic_programming import DynamicProgramming
from policies.evolution import Evolution
from policies.greedy import Greedy
from policies.optuna_samplers import Nsga2, Tpe
from policies.ppo import Ppo
from policies.problem import Problem
from policies.random import Random
from policies.uniform import Uniform

POLICIES: dict[str, Callable[[Problem, int], Policy]] = {
    "uniform": Uniform,
    "random": Random,
    "greedy": Greedy,
    "dynamic_programming": DynamicProgramming,
    "evolution": Evolution,
    "tpe": Tpe,
    "nsga2": Nsga2,
    "ppo": Ppo,
    "actor_critic": ActorCritic,
}
"""Name -> (problem, seed) -> policy."""

__all__ = ["POLICIES", "Meter", "Policy", "Problem", "Question"]
