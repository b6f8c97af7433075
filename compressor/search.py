"""Runs policies against the executor: builds the problem that they see, and keeps the ledger of what they were told."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from compressor.ledger import Ledger
from compressor.plan import ActionMenu, Plan, Score, Site
from eval.latency import LatencyModel
from policies import POLICIES, Problem

Trials = list[tuple[Plan, Score]]
"""What a policy asked and was told, in order."""


def build_problem(
    sites: tuple[Site, ...],
    menu: ActionMenu,
    sensitivity: Mapping[str, np.ndarray],
    fixed_bytes: int,
    latency: LatencyModel,
    limits: Mapping[str, float],
) -> Problem:
    """The search as numbers.

    Args:
        sensitivity: predicted KL of every action, by site name.
        fixed_bytes: what an exported model takes beside its sites.
        latency: gives every action its milliseconds.
        limits: of `bytes`, `prefill_ms`, `decode_ms`, those that are budgeted.

    Raises:
        BudgetError: no plan fits.
    """
    times = [[latency.site_ms(site, action) for action in menu[site.name]] for site in sites]
    costs = {
        "bytes": tuple(np.array([float(site.size_bytes(a)) for a in menu[site.name]]) for site in sites),
        "prefill_ms": tuple(np.array([t.prefill for t in row]) for row in times),
        "decode_ms": tuple(np.array([t.decode for t in row]) for row in times),
    }
    fixed = {"bytes": float(fixed_bytes), "prefill_ms": latency.rest.prefill, "decode_ms": latency.rest.decode}
    return Problem(
        sites=sites,
        actions=tuple(menu[site.name] for site in sites),
        sensitivity=tuple(np.maximum(sensitivity[site.name], 0) for site in sites),
        costs=costs,
        fixed=fixed,
        limits=limits,
    )


def run_policy(
    name: str,
    problem: Problem,
    seed: int,
    evaluations: int,
    score: Callable[[Plan], Score],
    ledger: Ledger,
    progress: Callable[[int, int, str], None],
) -> Trials:
    """Let a policy ask `evaluations` times; what the ledger holds already is told, not scored again."""
    policy = POLICIES[name](problem, seed)
    trials: Trials = []
    for plan, known in ledger.entries()[:evaluations]:
        policy.tell(plan, known)
        trials.append((plan, known))
    while len(trials) < evaluations:
        plan = policy.ask()
        result = score(plan)
        ledger.add(plan, result)
        policy.tell(plan, result)
        trials.append((plan, result))
        progress(len(trials), evaluations, f"{name}: best KL {best(trials)[1].kl:.4f}")
    return trials


def best(trials: Trials) -> tuple[Plan, Score]:
    """The trial of least KL; the first of equals."""
    return min(trials, key=lambda trial: trial[1].kl)
