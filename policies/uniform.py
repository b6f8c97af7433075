"""What is done by hand: one keep fraction and one format for the whole model, whatever the sensitivities say.

The plans are asked for in order of falling size, first the largest one that fits; when all were told, the best again.
A site whose menu lacks the format takes the next one with as many bits or more (else the most bits it has), then the
nearest keep fraction. Embedding and head, which are usually offered other formats, run over their own menus beside it.
"""

from __future__ import annotations

import numpy as np

from compressor.plan import Action, Formats, Plan, Score, Site
from policies.base import History, Question
from policies.problem import Problem


class Uniform:
    name = "uniform"

    def __init__(self, problem: Problem, seed: int = 0):
        self.problem, self.history = problem, History(problem)
        self.plans = uniform_plans(problem)

    def ask(self) -> Question:
        untold = [indices for indices in self.plans if indices not in self.history]
        return Question(self.problem.plan(untold[0] if untold else self.history.best()))

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)


def uniform_plans(problem: Problem) -> list[np.ndarray]:
    """All uniform plans [S] that fit, each once, largest first (in bytes if known, else in the first cost).

    Where none fits, one plan: the one that takes the cheapest allowed action at every site.
    """
    tables = {action for site, menu in zip(problem.sites, problem.actions) if is_table(site) for action in menu}
    blocks = {
        (action.keep / site.units, action.format)
        for site, menu in zip(problem.sites, problem.actions)
        for action in menu
        if not is_table(site)
    }
    plans: dict[tuple[int, ...], None] = {}
    for table in sorted(tables) or [Action(1, "fp32")]:
        for block in sorted(blocks) or [(1.0, "fp32")]:
            plans[tuple(_nearest(s, m, table, block) for s, m in zip(problem.sites, problem.actions))] = None
    fitting = [plan for plan in map(np.array, plans) if problem.fits(plan)]
    size = "bytes" if "bytes" in problem.costs else problem.budgets[0]
    return sorted(fitting, key=lambda plan: -problem.cost(plan)[size]) or [problem.walk(problem.share_SAD.sum(-1))]


def is_table(site: Site) -> bool:
    """Whether a site is an embedding or a head."""
    return site.kind in ("embedding", "head")


def _nearest(site: Site, menu: tuple[Action, ...], table: Action, block: tuple[float, str]) -> int:
    """Position in a menu of the action that is nearest to the uniform one."""
    fraction, name = (1.0, table.format) if is_table(site) else block

    def distance(action: Action) -> tuple[float, ...]:
        ours, theirs = Formats.parse(action.format), Formats.parse(name)
        fewer = max(0, theirs.bits - ours.bits)
        dropped = (action.keep == 0) != (fraction == 0.0)
        return (
            dropped,
            action.format != name,
            fewer,
            abs(ours.bits - theirs.bits),
            abs(action.keep / site.units - fraction),
        )

    return min(range(len(menu)), key=lambda i: distance(menu[i]))
