"""The main job, top to bottom:

recipe -> teacher, text -> bank -> sensitivities, latency -> search -> student, recovered -> ONNX -> measured report

Every stage keeps its result in the run's folder under a key of what it was made from, so the same call goes on where
the last one stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from types import MappingProxyType

import numpy as np
from safetensors import SafetensorError

from compressor import gate, page, report, results
from compressor.checks import named
from compressor.errors import BudgetError, RecipeError
from compressor.files import exclusive, write_bytes_atomic, write_text_atomic
from compressor.folder import save_folder
from compressor.latency import CORRECTIONS, Latency, corrected, measure_latency
from compressor.ledger import Ledger, comparable_entries
from compressor.plan import Plan, menu_json
from compressor.progress import ProgressCallback, silent
from compressor.recipe import Recipe
from compressor.recover import choose, recover
from compressor.recovery.reward import Reward
from compressor.run import Run, start
from compressor.runtimes import runtime
from compressor.search import Scorer, Searches, Trials, best, build_problem, complete, label, run_policy
from compressor.sensitivity import noise_coefficients, sensitivities
from compressor.stages import Stages, key_of
from compressor.student import Student
from compressor.text import tokens_digest
from eval.latency import PHASES
from policies import POLICIES, Problem
from policies.actor_critic import ActorCritic, Memory


def compress(
    recipe: Recipe | str | Path,
    out: str | Path,
    *,
    trust_remote_code: bool = False,
    progress: ProgressCallback = silent,
    rewards: Mapping[str, Reward] = MappingProxyType({}),
) -> report.Report:
    """Run a recipe, or the one in a YAML file, into the folder `out`; the exported student lies in `out/onnx`, the report in
    `out/report.md`.

    rewards: functions (prompt, what was written) -> number, which `distill.rl.rewards` of the recipe may name. A finished
    training is known by their names: change the name with the function.

    Raises:
        RecipeError: the recipe is wrong, or names files that are not there.
        CompressorError: a stage could not go on; what was finished is kept.
        ComparisonError: the gate's baseline measured something else; everything is written nevertheless.
        RegressionError: the result misses the recipe's gate; everything is written nevertheless.
    """
    out = Path(out)
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    baseline = named(recipe, rewards)
    with exclusive(out):
        run = start(recipe, out, trust_remote_code, Stages(out / "stages", progress), rewards)
        known, memory = reused(run)
        sensitivity = find_sensitivities(run)
        latency = measure_latency(run)
        latency = corrected(run, latency, lambda latency: obvious_plan(run, sensitivity, latency), CORRECTIONS[0])
        problem = pose(run, sensitivity, latency)
        fitting = [trial for trial in known if problem.fits(problem.indices(trial[0]))]
        trials = search(run, problem, fitting, memory if 2 * len(fitting) <= len(known) else None)
        latency, plans = settle(run, latency, sensitivity, trials, fitting)
        chosen = choose(run, plans)
        recovery = recover(run, chosen[0].plan, recipe.distill.steps)
        folders = export(run, problem, trials, recovery.student)
        result = results.collect(run, problem, latency, trials, chosen, recovery, folders)
        try:
            if baseline:
                tolerance, times = recipe.gate.tolerance.model_dump(), recipe.gate.times
                lines = gate.against_baseline(result, baseline, tolerance, times)
                result = replace(result, gate=(*result.gate, *lines))
        finally:  # what was measured is written, whether it can be compared or not
            page.write(result, out)
            write_text_atomic(out / recipe.deployed / "README.md", page.card(result))
        gate.require(result, result.gate)
        return result


# Before the search ----------------------------------------------------------------------------------------------------


def find_sensitivities(run: Run, way: str = "") -> dict[str, np.ndarray]:
    """Predicted KL of every action, by site name: float64 [actions], out of the teacher's statistics, which are taken first;
    the way is the recipe's if none is given."""
    way = way or run.recipe.search.sensitivity
    with run.stages.timed("statistics", run.bank.key) as report_statistics:
        run.bank.statistics(report_statistics)
    made_of = [run.bank.key, menu_json(run.menu)]
    if way == "noise":
        made_of.append(tokens_digest(run.texts.score_NL))

    def make(report_progress) -> dict[str, list[float]]:
        alphas = noise_coefficients(run.executor, progress=report_progress) if way == "noise" else None
        found = sensitivities(run.bank, run.menu, report_progress, alphas)
        return {name: values.tolist() for name, values in found.items()}

    stored = run.stages.value(f"sensitivity-{way}", key_of(*made_of), make)
    return {name: np.array(values) for name, values in stored.items()}


# The search -----------------------------------------------------------------------------------------------------------


def pose(
    run: Run, sensitivity: dict[str, np.ndarray], latency: Latency, limits: dict[str, float] | None = None
) -> Problem:
    """The search as numbers; limits: by cost, in bytes and ms, those of the recipe's budget if none are given, less what
    times are uncertain by, if any plan fits then.

    Raises:
        BudgetError: no plan fits.
    """
    decoder = run.teacher.network.decoder
    fixed = runtime(run.target.runtime).fixed_bytes(decoder)
    build = partial(build_problem, decoder.sites(), run.menu, sensitivity, fixed, latency.model)
    if limits:
        return build(limits)
    asked = limits_of(run, latency)
    spare = {"bytes": 0.0, "prefill_ms": latency.margin.prefill, "decode_ms": latency.margin.decode}
    try:
        return build({name: limit - spare[name] for name, limit in asked.items()})
    except BudgetError:
        return build(asked)


def limits_of(run: Run, latency: Latency) -> dict[str, float]:
    """The recipe's budget by cost, in bytes and ms."""
    budget = run.recipe.budget
    references = {
        "bytes": (budget.bytes, latency.fp32_bytes),
        "prefill_ms": (budget.prefill, latency.fp32_ms.prefill),
        "decode_ms": (budget.decode, latency.fp32_ms.decode),
    }
    return {name: limit.resolve(reference) for name, (limit, reference) in references.items() if limit}


def obvious_plan(run: Run, sensitivity: dict[str, np.ndarray], latency: Latency) -> Plan:
    """The plan that a search begins with, dynamic programming's."""
    return POLICIES["dynamic_programming"](pose(run, sensitivity, latency), 0).ask().plan


def search(run: Run, problem: Problem, earlier: Trials = (), memory: Memory | None = None) -> Searches:
    """All searches, the rivals' first. A plan that one had scored costs the next nothing. earlier, memory: see `reused`."""
    settings = run.recipe.search
    key = key_of(run.comparable, _numbers(problem), _told(earlier), memory and memory.families)
    scorer = Scorer(lambda *asked: run.executor.score(*asked))  # the executor is made when it is needed
    trials: Searches = {}
    with run.stages.timed("search", key_of(key, settings.searches)):
        for name, seed in settings.searches:
            ledger = Ledger(run.out / "ledger.log", f"{name}-{seed}-{key}", run.menu, run.comparable)
            report_progress = run.stages.reporter(f"search: {label(name, seed, settings.searches)}")
            policy = (
                ActorCritic(problem, seed, memory=memory) if name == "actor_critic" else POLICIES[name](problem, seed)
            )
            trials[name, seed] = run_policy(policy, settings.evaluations, scorer, ledger, report_progress, earlier)
            if isinstance(policy, ActorCritic):
                keep_rounds(run.out / ROUNDS_FILE, key, seed, policy.log)
                write_bytes_atomic(run.out / MEMORY_FILE, policy.memory().to_bytes())
    return trials


def _numbers(problem: Problem) -> list:
    """What a problem is known by."""
    arrays = [[a.tolist() for a in of_sites] for of_sites in (problem.sensitivity, *problem.costs.values())]
    return [arrays, dict(problem.fixed), dict(problem.limits)]


def _told(trials: Trials) -> list:
    """What scores are known by."""
    return [[plan.digest, score.part, score.kl] for plan, score in trials]


def search_on(run: Run, problem: Problem, searches: Searches, number: int) -> None:
    """The recipe's policy goes on, with the seed of its best search, for `GOING_ON` of the evaluations and knowing what all
    have found, on a problem whose costs have changed. Adds what it finds to `searches`. number: of the time that this is.
    """
    name = run.recipe.search.policy
    seed = min((best(trials)[1].kl, seed) for (policy, seed), trials in searches.items() if policy == name)[1]
    told = [trial for trials in searches.values() for trial in trials]
    key = key_of(run.comparable, _numbers(problem), _told(told))
    ledger = Ledger(run.out / "ledger.log", f"{name}{report.CORRECTED}-{seed}-{key}", run.menu, run.comparable)
    evaluations = max(1, round(GOING_ON * run.recipe.search.evaluations))
    scorer = Scorer(lambda *asked: run.executor.score(*asked))
    with run.stages.timed(f"search-on-{number}", key):
        report_progress = run.stages.reporter(f"search: {name}{report.CORRECTED}")
        found = run_policy(POLICIES[name](problem, seed), evaluations, scorer, ledger, report_progress, told)
    goes_on = name + report.CORRECTED, seed
    searches[goes_on] = [*searches.get(goes_on, []), *found]


GOING_ON = 0.25
"""Share of a search's evaluations that it has again whenever its best plans turn out to be too slow."""

MEMORY_FILE = "policy.safetensors"
"""What the agent leaves to the searches of other runs, in the run's folder."""

ROUNDS_FILE = "agent.jsonl"
"""What it logged of its rounds."""


def keep_rounds(path: Path, search: str, seed: int, rounds: Iterable[Mapping[str, float]]) -> None:
    """Write what the agent logged, a line a round (`policies.actor_critic.METRICS`). A search that went on after a kill adds
    the rounds that it saw; those of another one are gone."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    known = {(row["seed"], row["scored"]): row for row in map(json.loads, lines) if row["search"] == search}
    known |= {(seed, row["scored"]): {"search": search, "seed": seed, **row} for row in rounds}
    write_text_atomic(path, "".join(json.dumps(row) + "\n" for row in known.values()))


def reused(run: Run) -> tuple[Trials, Memory | None]:
    """What `search.reuse` brings: scores that were made of the same model, texts and menu, and the agent's memory."""
    folder = run.recipe.search.reuse
    if not folder:
        return [], None
    scores = comparable_entries(Path(folder) / "ledger.log", run.menu, run.comparable)
    try:
        return scores, Memory.read(Path(folder) / MEMORY_FILE)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        if scores or (Path(folder) / "bank" / run.bank.key).is_dir():
            return scores, None
        raise RecipeError(
            f"search.reuse = {folder}: expected a run of the same model, texts and menu, or of the actor-critic; "
            f"found no such score in its ledger, and no {MEMORY_FILE} to read; name another folder, or leave the key out"
        ) from None


# After the search -----------------------------------------------------------------------------------------------------


def settle(
    run: Run, latency: Latency, sensitivity: dict[str, np.ndarray], searches: Searches, known: Trials
) -> tuple[Latency, dict[Plan, float]]:
    """Time the best plans as whole models, until one is within the limits. Where the best of all turns out too slow, search
    on with what is now known of times: what was scored beside it may be far worse.

    Returns what is known of times, and the plans that come into question, as `within` has them. Adds to `searches`.
    """
    searched_with = [latency]

    def plans(now: Latency) -> dict[Plan, float]:
        return within(run, now, complete([*searches.values(), known]))

    def propose(now: Latency) -> Plan:
        scored = complete([*searches.values(), known])
        if now is not searched_with[-1] and min(scored, key=lambda plan: scored[plan]) not in plans(now):
            searched_with.append(now)
            with suppress(BudgetError):  # then it is the plan that misses by least
                search_on(run, pose(run, sensitivity, now), searches, len(searched_with) - 1)
        return next(iter(plans(now)))

    latency = corrected(run, latency, propose, CORRECTIONS[1])
    propose(latency)
    return latency, plans(latency)


def within(run: Run, latency: Latency, scored: Mapping[Plan, float]) -> dict[Plan, float]:
    """The scored plans that are expected to be fast enough, with what is known of times by now, and their KL, the best first;
    if none is, the one that misses by least."""
    limits, over = limits_of(run, latency), {}
    for plan in scored:
        expected = latency.expected(plan)
        over[plan] = max(getattr(expected, phase) / limits.get(f"{phase}_ms", inf) for phase in PHASES)
    most = max(1.0, min(over.values()))
    return {plan: kl for plan, kl in sorted(scored.items(), key=lambda item: item[1]) if over[plan] <= most}


def export(run: Run, problem: Problem, trials: Searches, student: Student) -> dict[str, Path]:
    """Write the student where it is deployed from, and what it is compared with beside; folders by row of the report."""
    uniform = next((best(told)[0] for (name, _), told in trials.items() if name == "uniform"), None)
    uniform = uniform or POLICIES["uniform"](problem, 0).ask().plan
    folders = {} if run.teacher.network.layerwise else {"fp32": run.out / "stages" / "fp32"}
    folders |= {"uniform": run.out / "stages" / "uniform", "student": run.out / run.recipe.deployed}
    students = {"uniform": run.bank.realize(uniform), "student": student}
    with run.stages.timed("export") as report_progress:
        for done, (name, weights) in enumerate(students.items()):
            save_folder(weights, run.teacher, folders[name], run.target.runtime)
            report_progress(done + 1, len(students))
    return folders
