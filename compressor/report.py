"""What a run found, as data, and how its numbers are written; `compressor.page` tells it, `compressor.pictures` draws it.

Knows numbers only: no model, no ONNX. Every time is in milliseconds, every KL in nats per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from compressor.plan import Action, Plan

# What a run found ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """Where it was measured: names of the processor and of the GPU, if one was the target; `provider` is the execution
    provider that really ran."""

    machine: str
    cpu: str
    threads: int
    provider: str
    versions: dict[str, str]
    gpu: str | None = None


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median and the range of the repetitions' medians."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class TextQuality:
    """Perplexity and KL on one evaluation text, and its loss in bits for every byte of the text that was predicted, which
    compares models whose tokens differ, and scripts. Of classifiers accuracy and F1, of embedders as in `Row`."""

    perplexity: float
    kl: float
    bits_per_byte: float | None = None
    accuracy: float | None = None
    f1: float | None = None


@dataclass(frozen=True)
class Row:
    """One model as it was measured at the end, on the evaluation texts. None: not measured.

    role: `teacher` in torch, `reference` the fp32 ONNX export that ratios refer to, `rival`, or `student`, the result.
    kl: KL(teacher || model), nats per token. perplexity and kl are over all texts; `texts` has those of each. accuracy and f1
    are of classifiers; of embedders, whose classes are other texts, accuracy is how often the nearest stays the nearest.
    """

    name: str
    role: Literal["teacher", "reference", "rival", "student"]
    perplexity: float | None = None
    kl: float | None = None
    size_bytes: int | None = None
    prefill_ms: Timing | None = None
    decode_ms: Timing | None = None
    peak_memory_bytes: int | None = None
    texts: dict[str, TextQuality] = field(default_factory=dict)
    accuracy: float | None = None
    f1: float | None = None


@dataclass(frozen=True)
class BudgetLine:
    """One limit of the budget, in bytes or ms, and what the tables predicted and the machine measured.

    error: standard error of what was predicted.
    """

    name: Literal["bytes", "prefill", "decode"]
    limit: float
    predicted: float
    measured: float | None
    fits: bool
    error: float = 0.0


CORRECTED = ", with corrected times"
"""How a search is called that went on because the best plans were too slow as whole models, behind its policy's name."""


@dataclass(frozen=True)
class Trial:
    """One plan that a policy had scored. `index`: what the policy had spent by then in evaluations, rounded up.

    kl and perplexity are those of the search's calibration tokens, or of the given share of them; cost is predicted.
    """

    policy: str
    index: int
    kl: float
    perplexity: float
    size_bytes: int
    prefill_ms: float | None
    decode_ms: float | None
    digest: str
    share: float = 1.0


@dataclass(frozen=True)
class PlanEntry:
    """One site of the chosen plan. sensitivity: KL that the surrogate expects from this action alone; next_better: the
    action of less expected KL that would have taken the least more of the budget; same: share of the policy's searches whose
    best plan has this action too, if it searched from several seeds."""

    site: str
    kind: Literal["attention", "ffn", "embedding", "head"]
    layer: int | None
    keep: int
    units: int
    format: str
    size_bytes: int
    sensitivity: float | None = None
    next_better: Alternative | None = None
    same: float | None = None


@dataclass(frozen=True)
class Alternative:
    """An action that was not chosen: its label, the KL expected from it alone, and what it would take more than the chosen
    one of bytes and of the budgeted times (ms), by the names of budgets."""

    action: str
    sensitivity: float
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finalist:
    """A plan that was tried for the student: its KL in the search, and on held-out text after a short recovery. other_sites:
    on how many sites it differs from the student's plan."""

    digest: str
    kl: float
    recovered_kl: float
    other_sites: int


@dataclass(frozen=True)
class TrainingPoint:
    """What a step of the training told, nothing at step 0, and the measures on held-out text after it, if they were taken."""

    step: int
    told: dict[str, float]
    held_out: dict[str, float] | None = None


@dataclass(frozen=True)
class Training:
    """decides: the held-out measure of which the least was kept, that of `kept_step`; 0 is the student before."""

    method: str
    decides: str
    kept_step: int
    points: tuple[TrainingPoint, ...]


@dataclass(frozen=True)
class Recovery:
    """KL on held-out calibration tokens: of the plan's variants as they are, after reconstruction and of the student; None
    where that was not measured. What made it no better was not kept."""

    kl_before: float
    kl_reconstructed: float | None
    kl_after: float
    training: Training | None = None


@dataclass(frozen=True)
class Parity:
    """The exported student against the same student in torch: relative error of the logits, same greedy tokens, both
    without the rounding of activations that the deployed kernels do; `rounding` is the relative change which that makes."""

    relative_error: float
    greedy_equal: bool
    tolerance: float
    rounding: float

    @property
    def passed(self) -> bool:
        return self.relative_error <= self.tolerance and self.greedy_equal


@dataclass(frozen=True)
class Sample:
    """What a prompt is gone on with; teacher: None where it is too large to write."""

    prompt: str
    teacher: str | None
    student: str


@dataclass(frozen=True)
class GateLine:
    """One limit of the gate. The unit follows from the name: bytes, ms, or none for ratios.

    baseline: what an earlier report has, if the limit comes from one; a time is carried over by the fp32 exports' times.
    """

    name: Literal["perplexity_ratio", "accuracy_ratio", "kl", "bytes", "memory", "prefill", "decode"]
    limit: float
    measured: float
    passed: bool
    baseline: float | None = None


Task = Literal["text-generation", "text2text-generation", "fill-mask", "text-classification", "sentence-similarity"]
"""What a model does, as model hubs call it: only the first two decode."""


@dataclass(frozen=True)
class Report:
    """Everything that a finished run has to say."""

    environment: Environment
    recipe: dict[str, Any]
    protocol: str
    rows: tuple[Row, ...]
    budget: tuple[BudgetLine, ...]
    trials: tuple[Trial, ...]
    plan: tuple[PlanEntry, ...]
    recovery: Recovery | None = None
    parity: Parity | None = None
    samples: tuple[Sample, ...] = ()
    stage_seconds: dict[str, float] = field(default_factory=dict)
    gate: tuple[GateLine, ...] = ()
    finalists: tuple[Finalist, ...] = ()
    task: Task = "text-generation"

    def check(
        self,
        baseline: str | Path | Report | None = None,
        tolerance: Mapping[str, float] | None = None,
        times: bool = True,
        limits: Mapping[str, Any] | None = None,
    ) -> tuple[GateLine, ...]:
        """The gate, for pipelines: the limits of the run's own recipe, and nothing lost against an earlier report.

        Args:
            limits: further ones, by the names and with the units of a recipe's `gate`: {"bytes": "60MB", "kl": 0.1}.
            baseline: a run's folder, its report.json, or a report; None is the recipe's limits alone.
            tolerance: what may be lost against it, as a share, by the names of lines;
                `compressor.gate.TOLERANCE` where it is left out.
            times: whether times are compared, which takes the same device.

        Raises:
            RegressionError: a check missed; it has a table of them.
            ComparisonError: the two reports measured different things.
            DataError: the baseline is no report.
            RecipeError: a limit or a tolerance is none.
        """
        from compressor import gate

        lines = gate.every_line(self, baseline, tolerance or {}, times, limits)
        gate.require(self, lines)
        return lines

    def _repr_markdown_(self) -> str:
        """What a notebook shows of a report."""
        from compressor import page

        return page.summary(self)

    @property
    def chosen(self) -> Plan:
        """The student's plan."""
        return Plan(tuple((entry.site, Action(entry.keep, entry.format)) for entry in self.plan))

    def row(self, role: str) -> Row | None:
        """The first row in that role."""
        return next((row for row in self.rows if row.role == role), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinity and NaN, which JSON lacks, as strings."""
        return _finite(asdict(self))

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """The report of a finished run: its folder, or the report.json in it.

        Raises:
            DataError: there is none, or it is of another version.
        """
        from compressor import gate

        return gate.read_report(path)

    @classmethod
    def from_json(cls, text: str) -> Report:
        from pydantic import TypeAdapter

        return TypeAdapter(cls).validate_json(text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class SiteLine:
    """A site as a dry run lists it: `actions` is how many it may take, size in bytes from the smallest to the largest."""

    name: str
    kind: str
    units: int
    parameters: int
    actions: int
    smallest_bytes: int
    largest_bytes: int


@dataclass(frozen=True)
class StageEstimate:
    name: str
    seconds: float
    memory_bytes: int


@dataclass(frozen=True)
class DryRun:
    """What a run would do. `bytes_*`: predicted size of the exported files of the largest and of the smallest plan,
    and the budget's limit on it, if there is one. layerwise: whether the model stays on the disk."""

    model: str
    sites: tuple[SiteLine, ...]
    bytes_largest: int
    bytes_smallest: int
    bytes_budget: float | None
    stages: tuple[StageEstimate, ...]
    layerwise: bool = False

    @property
    def actions(self) -> int:
        """Actions over all sites."""
        return sum(site.actions for site in self.sites)


# Numbers as a reader wants them -------------------------------------------------------------------------------------


def size(value: float | None) -> str:
    """Bytes in decimal units: 60000000 -> `60.0 MB`."""
    if not value:
        return "–" if value is None else "0"
    if value >= 1e9:
        return f"{value / 1e9:.2f} GB"
    if value >= 1e3:
        return f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"
    return f"{value:.0f} B"


def milliseconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.2f} s"


def number(value: float | None) -> str:
    """Three figures, without an exponent for everyday numbers."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return (
        f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:#.3g}" if 1e-3 <= abs(value) < 100 else f"{value:.2g}"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table: the first column to the left, the others to the right."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def ratio(ours: float | None, reference: float | None) -> str:
    return f" ({ours / reference:.2f}×)" if ours is not None and reference else ""


def median_of(timing: Timing | None) -> float | None:
    return timing.median if timing else None


AXES: dict[str, tuple[str, Callable[[float | None], str], Callable[[Row], float | None]]] = {
    "kl": ("KL to the teacher", number, lambda row: row.kl if row.role == "student" else None),
    "bytes": ("size", size, lambda row: row.size_bytes),
    "memory": ("peak memory", size, lambda row: row.peak_memory_bytes),
    "prefill": ("prefill", milliseconds, lambda row: median_of(row.prefill_ms)),
    "decode": ("decode per token", milliseconds, lambda row: median_of(row.decode_ms)),
    "perplexity_ratio": ("perplexity, student / teacher", number, lambda row: None),
    "accuracy_ratio": ("accuracy, teacher / student", number, lambda row: None),
}


def best_so_far(trials: Iterable[Trial]) -> dict[str, list[float]]:
    """Per policy, in order of appearance: the lowest KL on all of the text after 1, 2, ... evaluations."""
    best: dict[str, list[float]] = {}
    for trial in sorted(trials, key=lambda trial: trial.index):
        curve = best.setdefault(trial.policy, [])
        curve += [curve[-1] if curve else math.inf] * (trial.index - len(curve))
        if trial.share == 1.0 and not math.isnan(trial.kl):
            curve[-1] = min(trial.kl, curve[-1])
    return best


def whole(report: Report, policy: str) -> list[Trial]:
    """A policy's trials on all of the text, of finite KL."""
    return [t for t in report.trials if t.policy == policy and t.share == 1.0 and math.isfinite(t.kl)]
