"""How well the latency table predicts whole models: random plans, predicted and measured.

    python benchmarks/prediction.py recipes/benchmark-controllers.yaml runs/prediction --plans 12

The plans are of the recipe's menu, each with formats and widths of its own, so that they differ in size and not only in
order; their weights are random. They are timed as reports time models: one open at a time, in turns. The table is the one of
the run in OUT, made if it isn't there; the whole models that scale it are timed once more, in turns with the plans, since
a machine is not as fast today as when the table was made. Prints a line a plan; writes OUT/prediction.json.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from compressor.files import write_json_atomic
from compressor.folder import save_random
from compressor.latency import measure_latency, mixed_plan
from compressor.measure import opened, time_models
from compressor.progress import LineProgress
from compressor.recipe import Recipe
from compressor.report import number, table
from compressor.run import start
from compressor.runtimes import runtime
from compressor.stages import Stages
from eval.latency import PHASES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--plans", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    progress = LineProgress(sys.stderr)
    run = start(Recipe.load(options.recipe), options.out, False, Stages(options.out / "stages", progress))
    latency = measure_latency(run)
    sites, folder = run.teacher.network.decoder.sites(), options.out / "prediction"
    plans = {f"plan {n}": mixed_plan(run.menu, sites, np.random.default_rng(n)) for n in range(options.plans)}
    try:
        for name, plan in plans.items():
            save_random(plan, run.teacher, folder / name, run.target.runtime)
        with run.stages.timed("timing") as report:
            models = {name: partial(opened, folder / name, run.target) for name in plans}
            models |= {name: partial(opened, latency.folders[name], run.target) for name in latency.folders}
            times = time_models(models, rounds=(options.rounds, options.rounds), progress=report)
        model, rows = latency.at({name: times[name].medians for name in latency.folders}).model, []
        for name, plan in plans.items():
            predicted, measured = model.predict(plan), times[name].medians
            row: dict[str, str | float] = {
                "plan": name,
                "MB": runtime(run.target.runtime).exported_bytes(folder / name) / 1e6,
            }
            for phase in PHASES:
                expected, found = getattr(predicted, phase), getattr(measured, phase)
                row |= {
                    f"{phase} predicted": expected,
                    f"{phase} measured": found,
                    f"{phase} error": expected / found - 1,
                }
            rows.append(row)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print_table(rows)
    write_json_atomic(options.out / "prediction.json", rows)


def print_table(rows: Sequence[Mapping[str, str | float]]) -> None:
    """Markdown, and the errors' median and largest size."""
    cells = [
        [f"{v:+.1%}" if name.endswith("error") else v if isinstance(v, str) else number(v) for name, v in row.items()]
        for row in rows
    ]
    print(table(list(rows[0]), cells))
    for phase in PHASES:
        sizes = np.abs([float(row[f"{phase} error"]) for row in rows])
        print(f"\n{phase}: size of the error, median {np.median(sizes):.1%}, largest {sizes.max():.1%}")


if __name__ == "__main__":
    main()
