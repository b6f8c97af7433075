"""Runs policies against the executor: builds the problem that they see, and keeps the ledger of what they were told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from compressor.ledger import Ledger
from compressor.plan import PARTS, ActionMenu, Plan, Score, Site
from eval.prediction import LatencyModel
from policies import Meter, Policy, Problem, Question

Trials = Sequence[tuple[Plan, Score]]
"""What a policy asked and was told, in order."""

Searches = dict[tuple[str, int], Trials]
"""Trials by (policy, seed)."""


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


class Scorer:
    """Scores questions, none of them twice.

    Args:
        score: (plan, part of the text or None for all of it, its scores on parts that are known) -> score.
    """

    def __init__(self, score: Callable[[Plan, int | None, Mapping[int, Score]], Score]):
        self._score = score
        self.known: dict[Question, Score] = {}

    def __call__(self, question: Question) -> Score:
        if question not in self.known:
            asked = {part: Question(question.plan, part) for part in range(PARTS)}
            parts = {part: self.known[other] for part, other in asked.items() if other in self.known}
            self.known[question] = self._score(question.plan, question.part, parts)
        return self.known[question]


def run_policy(
    policy: Policy,
    evaluations: int,
    scorer: Scorer,
    ledger: Ledger,
    progress: Callable[[int, int, str], None],
    earlier: Trials = (),
) -> Trials:
    """Let a policy ask until its questions have cost `evaluations` passes over the scoring text.

    The first question that would cost more than is left (`Meter`) ends the search. What the ledger holds already is told,
    not scored again. earlier: scores of other searches, told first; they are not in the result.
    """
    for plan, result in earlier:
        policy.tell(plan, result)
    trials: list[tuple[Plan, Score]] = []
    meter = Meter()
    entries = ledger.entries()
    while True:
        resumed = len(trials) < len(entries)
        if resumed:
            plan, result = entries[len(trials)]
            question = Question(plan, result.part)
            scorer.known[question] = result
        else:
            question = policy.ask()
        if not meter.allows(question, evaluations):
            return trials
        result = scorer(question)
        if not resumed:
            ledger.add(question.plan, result)
        meter.add(question)
        policy.tell(question.plan, result)
        trials.append((question.plan, result))
        progress(int(meter.spent), evaluations, f"{policy.name}: best KL {best(trials)[1].kl:.4f}")


def spent(trials: Trials) -> list[float]:
    """Evaluations that a search had spent after each of its trials."""
    meter, after = Meter(), []
    for plan, score in trials:
        meter.add(Question(plan, score.part))
        after.append(meter.spent)
    return after


def complete(searches: Iterable[Trials]) -> dict[Plan, float]:
    """The plans that were scored on all of the text, and their KL."""
    return {plan: score.kl for trials in searches for plan, score in trials if score.part is None}


def best(trials: Trials) -> tuple[Plan, Score]:
    """The trial of least KL among those on the largest share of the text; the first of equals."""
    return min(trials, key=lambda trial: (-trial[1].share, trial[1].kl))


def label(policy: str, seed: int, searches: Iterable[tuple[str, int]]) -> str:
    """How a search is called: by its policy, and by its seed if others of `searches` have the same policy."""
    return policy if [name for name, _ in searches].count(policy) == 1 else f"{policy}, seed {seed}"


def finalists(plans: Iterable[Plan], most: int) -> list[Plan]:
    """Of plans, best first: the best, and the next ones that differ from those before on at least a tenth of the sites."""
    found: list[Plan] = []
    for plan in plans:
        if all(len(plan.diff(other)) * 10 >= len(plan) for other in found) and len(found) < most:
            found.append(plan)
    return found
