"""What plans take in time on the target: the latency table, and whole models that correct it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial
from math import nan
from pathlib import Path
from shutil import rmtree
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from compressor.files import write_text_atomic
from compressor.folder import save_folder, save_random
from compressor.measure import cache_flusher, opened, time_models
from compressor.plan import ActionMenu, Plan, Site, menu_json
from compressor.runtimes import runtime
from compressor.stages import key_of
from compressor.student import full_plan
from eval.latency import NO_TIME, PHASES, LatencyTable, Milliseconds
from eval.prediction import LatencyModel

if TYPE_CHECKING:
    from compressor.run import Run  # which looks at the estimates that need this

ANCHORS = 4
"""Random plans among the whole models that correct the table."""

CORRECTIONS = 2, 3
"""Searched plans among them: before the search, and behind it, at most."""


@dataclass(frozen=True)
class Latency:
    """What plans take in time.

    fp32_bytes, fp32_ms: of the fp32 export, on disk and when the table was made; no numbers layer by layer, where there is
    none, and no recipe takes a share of them.
    wholes: plans of the whole models that correct the table, by name; measured: what they took, and the fp32 export.
    folders: where the fp32 export and the first of them, the anchors, lie, to be timed once more.
    margin: standard error of a searched plan's prediction.
    """

    table: LatencyTable
    sites: tuple[Site, ...]
    fp32_bytes: int
    wholes: Mapping[str, Plan]
    measured: Mapping[str, Milliseconds]
    folders: Mapping[str, Path]
    margin: Milliseconds = NO_TIME

    @property
    def fp32_ms(self) -> Milliseconds:
        return self.measured.get("fp32", Milliseconds(nan, nan))

    @cached_property
    def model(self) -> LatencyModel:
        """What predicts."""
        measured = [(plan, self.measured[name]) for name, plan in self.wholes.items()]
        return LatencyModel.fit(self.table, self.sites, measured)

    def expected(self, plan: Plan) -> Milliseconds:
        """What is predicted of a plan, and no less than what it took where it was timed as a whole."""
        known = [
            self.model.predict(plan),
            *(self.measured[name] for name, whole in self.wholes.items() if whole == plan),
        ]
        return Milliseconds(*(max(getattr(ms, phase) for ms in known) for phase in PHASES))

    def at(self, now: Mapping[str, Milliseconds]) -> Latency:
        """The same on a machine that is as fast as it is now; now: what the models in `folders` take."""
        pace = {p: median(getattr(now[n], p) / getattr(self.measured[n], p) for n in self.folders) for p in PHASES}
        moved = {n: Milliseconds(*(pace[p] * getattr(ms, p) for p in PHASES)) for n, ms in self.measured.items()}
        return replace(self, measured={**moved, **now})


def measure_latency(run: Run) -> Latency:
    """Measure the table's missing entries, whole models, and the teacher in fp32, unless it is too large for memory. The
    whole models are like students: random plans of the menu, with random weights."""
    decoder, target, stages = run.teacher.network.decoder, run.target, run.stages
    sites = decoder.sites()
    anchors = {
        f"anchor-{n}": mixed_plan(run.menu, sites, np.random.default_rng([n, len(sites)]))
        for n in range(1, ANCHORS + 1)
    }
    teacher = {} if run.teacher.network.layerwise else {"fp32": full_plan(decoder, "fp32", "fp32")}
    folders = {name: run.out / "stages" / name for name in (*teacher, *anchors)}
    wanted = [(site, action) for site in sites for action in run.menu[site.name]]
    table = LatencyTable(run.out / "latency.json", target.environment)
    if run.recipe.search.reuse:
        table.take_over(Path(run.recipe.search.reuse) / "latency.json")
    key = key_of(run.bank.key, target.environment, menu_json(run.menu), list(folders))
    with stages.timed("latency", key) as report_progress:
        stack = partial(
            runtime(target.runtime).site_stack,
            decoder,
            prefill_tokens=target.prefill_tokens,
            context=target.context,
            device=target.device,
            threads=target.threads,
        )
        table.measure(wanted, stack, flush=cache_flusher(target.device), progress=report_progress)
        for name, plan in teacher.items():
            _once(folders[name], key, partial(save_folder, run.bank.realize(plan), run.teacher, where=target.runtime))
        for name, plan in anchors.items():
            _once(folders[name], key, partial(save_random, plan, run.teacher, where=target.runtime))

    def make(report_progress) -> dict[str, tuple[float, ...]]:
        models = {name: partial(opened, folder, target) for name, folder in folders.items()}
        return {name: astuple(t.medians) for name, t in time_models(models, progress=report_progress).items()}

    times = stages.value("whole-models", key, make)
    measured = {name: Milliseconds(*ms) for name, ms in times.items()}
    where = runtime(target.runtime)
    size = where.exported_bytes(folders["fp32"]) if teacher else where.fp32_bytes(decoder)
    return Latency(table, tuple(sites), size, anchors, measured, folders)


def _once(folder: Path, key: str, save: Callable[[Path], None]) -> None:
    """Have a folder saved, unless it was under the same key."""
    made = folder / "key.txt"
    if made.is_file() and made.read_text() == key:
        return
    made.unlink(missing_ok=True)
    save(folder)
    write_text_atomic(made, key)


def corrected(run: Run, latency: Latency, propose: Callable[[Latency], Plan], most: int) -> Latency:
    """Measure the plan that is proposed with what is known of times as a whole, learn from it, and so on, until one is
    proposed that was measured, at most so often: what a search takes was measured too fast (`eval.prediction`). Where the
    recipe budgets no time there is nothing to do.
    """
    if not (run.recipe.budget.prefill or run.recipe.budget.decode):
        return latency
    for _ in range(most):
        plan = propose(latency)
        if plan in latency.wholes.values():
            break
        name = f"searched-{len(latency.wholes) - ANCHORS + 1}"
        measured = {**latency.measured, name: _measured(run, latency, plan, name)}
        latency = replace(latency, wholes={**latency.wholes, name: plan}, measured=measured)
        latency = replace(latency, margin=latency.model.error(plan))
    return latency


def _measured(run: Run, latency: Latency, plan: Plan, name: str) -> Milliseconds:
    """Times of a plan as a whole. A machine is not always as fast: it is timed in turns with a model that was measured with
    the others, and its times are ratios to that one's."""
    beside, folder = next(iter(latency.folders)), run.out / "stages" / name
    folders = {beside: latency.folders[beside], name: folder}

    def make(report_progress) -> list[float]:
        save_random(plan, run.teacher, folder, run.target.runtime)
        models = {key: partial(opened, path, run.target) for key, path in folders.items()}
        times = {key: t.medians for key, t in time_models(models, progress=report_progress).items()}
        rmtree(folder)
        then = latency.measured[beside]
        return [getattr(times[name], phase) / getattr(times[beside], phase) * getattr(then, phase) for phase in PHASES]

    before = {key: astuple(ms) for key, ms in latency.measured.items()}
    key = key_of(run.bank.key, run.target.environment, plan.digest, before)
    return Milliseconds(*run.stages.value(name, key, make))


def mixed_plan(menu: ActionMenu, sites: Sequence[Site], rng: np.random.Generator) -> Plan:
    """Every site's action by a weight of its format and of its width, which are drawn once a plan: so plans differ in what
    they are made of, and not only in order."""
    formats = sorted({action.format for actions in menu.values() for action in actions})
    by_format = dict(zip(formats, rng.dirichlet(np.full(len(formats), 0.5)), strict=True))
    narrowness = rng.exponential(2.0)
    chosen = []
    for site in sites:
        weights_A = np.array([by_format[a.format] * np.exp(narrowness * a.keep / site.units) for a in menu[site.name]])
        chosen.append((site.name, menu[site.name][rng.choice(len(weights_A), p=weights_A / weights_A.sum())]))
    return Plan(tuple(chosen))
