"""A recipe under several seeds: mean and range of every row of the report and of the best KL of every policy, and
how many sites the plans agree on.

The runs share one folder, so that what no seed changes (bank, sensitivities, latency table) is made once; the report of
every seed is kept as `report-seed-N.json`.

    python benchmarks/seeds.py recipes/benchmark-25.yaml runs/benchmark-25 --seeds 3
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

from compressor.pipeline import compress
from compressor.plan import Plan
from compressor.progress import LineProgress
from compressor.recipe import Recipe
from compressor.report import Report, Row, best_so_far, median_of

FIGURES: dict[str, Callable[[Row], float | None]] = {
    "perplexity": lambda row: row.perplexity,
    "KL": lambda row: row.kl,
    "MB": lambda row: row.size_bytes / 1e6 if row.size_bytes else None,
    "prefill ms": lambda row: median_of(row.prefill_ms),
    "decode ms": lambda row: median_of(row.decode_ms),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    reports = []
    for seed in range(options.seeds):
        kept = options.out / f"report-seed-{seed}.json"
        if not kept.exists():
            compress(
                Recipe.load(options.recipe, [f"search.seed={seed}"]), options.out, progress=LineProgress(sys.stderr)
            )
            shutil.copy(options.out / "report.json", kept)
        reports.append(Report.load(kept))
    rows: dict[str, list[Row]] = defaultdict(list)
    searches: dict[str, list[float]] = defaultdict(list)
    for report in reports:
        for row in report.rows:
            rows[row.name].append(row)
        for policy, curve in best_so_far(report.trials).items():
            searches[policy].append(curve[-1])
    print(f"| {options.seeds} seeds: mean (lowest to highest) |", " | ".join(FIGURES), "|")
    print("| --- |" + " --- |" * len(FIGURES))
    for name, found in rows.items():
        print("|", name, "|", " | ".join(spread([figure(row) for row in found]) for figure in FIGURES.values()), "|")
    print(f"\nSites with the same action in two plans: {agreement([report.chosen for report in reports]):.0%}")
    print("\n| best KL of the search | calibration text |\n| --- | --- |")
    for policy, kls in sorted(searches.items()):
        print("|", policy, "|", spread(kls), "|")


def spread(values: Sequence[float | None]) -> str:
    numbers = [value for value in values if value is not None]
    if not numbers:
        return "–"
    mean, low, high = sum(numbers) / len(numbers), min(numbers), max(numbers)
    return f"{mean:.4g}" if low == high else f"{mean:.4g} ({low:.4g} to {high:.4g})"


def agreement(plans: Sequence[Plan]) -> float:
    """Share of the sites that have the same action, mean over all pairs of plans; 1 for a single plan."""
    pairs = list(combinations(plans, 2))
    return 1 - sum(len(a.diff(b)) / len(a) for a, b in pairs) / len(pairs) if pairs else 1.0


if __name__ == "__main__":
    main()
