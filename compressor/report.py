"""What a run found, as data, and the page that tells it: report.md, report.json and the pictures.

Knows numbers only: no model, no ONNX. Every time is in milliseconds, every KL in nats per token.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

import yaml  # type: ignore[import-untyped]

from compressor.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from compressor.plan import Format

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


# What a run found ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Environment:
    """Where it was measured: `cpu` is the processor's name, `provider` the execution provider that really ran."""

    machine: str
    cpu: str
    threads: int
    provider: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median and the range of the repetitions' medians."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class TextQuality:
    """Perplexity and KL on one evaluation text."""

    perplexity: float
    kl: float


@dataclass(frozen=True)
class Row:
    """One model as it was measured at the end, on the evaluation texts. None: not measured.

    role: `teacher` in torch, `reference` the fp32 ONNX export that ratios refer to, `rival`, or `student`, the result.
    kl: KL(teacher || model), nats per token. perplexity and kl are over all texts; `texts` has those of each.
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


@dataclass(frozen=True)
class BudgetLine:
    """One limit of the budget, in bytes or ms, and what the tables predicted and the machine measured."""

    name: Literal["bytes", "prefill", "decode"]
    limit: float
    predicted: float
    measured: float | None
    fits: bool


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
    """An action that was not chosen: its label, bytes more than the chosen one, and the KL expected from it alone."""

    action: str
    extra_bytes: int
    sensitivity: float


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
    prompt: str
    teacher: str
    student: str


@dataclass(frozen=True)
class GateLine:
    """One limit of the gate. The unit follows from the name: bytes, ms, or none for `perplexity_ratio`."""

    name: Literal["perplexity_ratio", "bytes", "prefill", "decode"]
    limit: float
    measured: float
    passed: bool


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

    def row(self, role: str) -> Row | None:
        """The first row in that role."""
        return next((row for row in self.rows if row.role == role), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinity and NaN, which JSON lacks, as strings."""
        return _finite(asdict(self))

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
    and the budget's limit on it, if there is one."""

    model: str
    sites: tuple[SiteLine, ...]
    bytes_largest: int
    bytes_smallest: int
    bytes_budget: float | None
    stages: tuple[StageEstimate, ...]

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
    return f"{value / 1e6:.1f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


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


def _ratio(ours: float | None, reference: float | None) -> str:
    return f" ({ours / reference:.2f}×)" if ours is not None and reference else ""


def _median(timing: Timing | None) -> float | None:
    return timing.median if timing else None


_AXES: dict[str, tuple[str, Callable[[float | None], str], Callable[[Row], float | None]]] = {
    "bytes": ("size", size, lambda row: row.size_bytes),
    "prefill": ("prefill", milliseconds, lambda row: _median(row.prefill_ms)),
    "decode": ("decode per token", milliseconds, lambda row: _median(row.decode_ms)),
    "perplexity_ratio": ("perplexity, student / teacher", number, lambda row: None),
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


def _whole(report: Report, policy: str) -> list[Trial]:
    """A policy's trials on all of the text, of finite KL."""
    return [t for t in report.trials if t.policy == policy and t.share == 1.0 and math.isfinite(t.kl)]


# The page -----------------------------------------------------------------------------------------------------------


def write(report: Report, folder: Path) -> Path:
    """Writes report.json, the pictures and report.md into `folder`; returns the path of the page."""
    write_json_atomic(folder / "report.json", report.to_dict())
    for name, figure in figures(report).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        write_bytes_atomic(folder / name, buffer.getvalue())
    write_text_atomic(folder / "report.md", markdown(report))
    return folder / "report.md"


def headline(report: Report) -> str:
    """One sentence: how much smaller and faster than the fp32 export, and at what perplexity."""
    student, reference, teacher = report.row("student"), report.row("reference"), report.row("teacher")
    if student is None:
        return "The run ended without a student."
    facts = []
    base = reference or teacher
    for key, better, worse in (
        ("bytes", "smaller", "larger"),
        ("prefill", "faster", "slower"),
        ("decode", "faster", "slower"),
    ):
        _, show, get = _AXES[key]
        ours, theirs = get(student), get(base) if base else None
        if ours and theirs:
            gain = theirs / ours
            word, factor = (better, gain) if gain >= 1 else (worse, 1 / gain)
            of = "" if key == "bytes" else f" at {'prefill' if key == 'prefill' else 'decoding'}"
            facts.append(f"{factor:.2f}× {word}{of} ({show(theirs)} → {show(ours)})")
    sentence = "The student is " + ", ".join(facts) if facts else "The student was made"
    source = teacher or reference
    if source and source.perplexity is not None and student.perplexity is not None:
        sentence += f"; perplexity {number(source.perplexity)} → {number(student.perplexity)}"
        if student.kl is not None:
            sentence += f" (KL {number(student.kl)})"
    return sentence + "."


def markdown(report: Report) -> str:
    """report.md. Pictures are referred to by the names that `write` gives them."""
    parts = [
        f"# {_model_name(report)}, compressed",
        f"**{headline(report)}**{_verdict(report)}",
        _asked(report),
        "## What came out",
        _rows_table(report),
        _budget_part(report),
        _gate_part(report),
        _plan_part(report),
        _search_part(report),
        _finalists_part(report),
        _recovery_part(report),
        _samples_part(report),
        _measured_part(report),
        _reproduce_part(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _model_name(report: Report) -> str:
    path = str(report.recipe.get("model", {}).get("path", "model"))
    return path if path.count("/") == 1 else path.rstrip("/").rsplit("/", 1)[-1]


def _verdict(report: Report) -> str:
    missed = [line.name for line in report.budget if not line.fits]
    failed: list[str] = [line.name for line in report.gate if not line.passed]
    if report.parity and not report.parity.passed:
        failed.append("parity")
    said = ""
    if report.budget:
        said += f" The budget is **missed** in {', '.join(missed)}." if missed else " It is within the budget."
    if report.gate or (report.parity and not report.parity.passed):
        said += f" The gate **failed**: {', '.join(failed)}." if failed else " The gate passed."
    return said


def _asked(report: Report) -> str:
    limits = [f"{_AXES[line.name][0]} at most {_AXES[line.name][1](line.limit)}" for line in report.budget]
    search, environment = report.recipe.get("search", {}), report.environment
    workload = report.recipe.get("target", {}).get("workload", {})
    sentence = f"Asked for: {' and '.join(limits) or 'no limit'}, on {environment.cpu} with "
    sentence += f"{environment.threads} thread{'s' if environment.threads != 1 else ''} ({environment.provider})"
    if workload:
        sentence += f", for a prompt of {workload['prefill']} tokens and decoding after {workload['context']}"
    if search:
        sentence += f". Searched by `{search['policy']}`, {search['evaluations']} evaluations a policy"
    return sentence + "."


def _rows_table(report: Report) -> str:
    base = report.row("reference")

    def timing(value: Timing | None, reference: Timing | None) -> str:
        if value is None:
            return "–"
        return f"{milliseconds(value.median)}{_ratio(value.median, _median(reference))}"

    rows = []
    for row in report.rows:
        name = f"**{row.name}**" if row.role == "student" else row.name
        compared = base if base is not None and row is not base and row.role != "teacher" else None
        rows.append(
            (
                name,
                number(row.perplexity),
                number(row.kl),
                size(row.size_bytes) + _ratio(row.size_bytes, compared.size_bytes if compared else None),
                timing(row.prefill_ms, compared.prefill_ms if compared else None),
                timing(row.decode_ms, compared.decode_ms if compared else None),
                size(row.peak_memory_bytes),
            )
        )
    head = ("model", "perplexity", "KL to teacher", "size", "prefill", "decode, a token", "peak memory")
    note = f"Ratios in parentheses refer to {base.name}. " if base else ""
    text = table(head, rows) + f"\n\n{note}Perplexity and KL (nats per token) are on text that nothing saw before."
    names = list(report.rows[0].texts) if report.rows else []
    if len(names) > 1:
        by_text = [
            (row.name, *(f"{number(row.texts[n].perplexity)}, {number(row.texts[n].kl)}" for n in names))
            for row in report.rows
        ]
        text += "\n\nPerplexity and KL by text:\n\n" + table(("model", *names), by_text)
    return text


def _budget_part(report: Report) -> str:
    if not report.budget:
        return ""
    rows = []
    for line in report.budget:
        what, show, _ = _AXES[line.name]
        error = "–"
        if line.measured is not None and line.predicted:
            error = f"{100 * (line.measured / line.predicted - 1):+.1f}%"
        kept = "yes" if line.fits else "**no**"
        rows.append((what, show(line.limit), show(line.predicted), show(line.measured), error, kept))
    head = ("budget", "limit", "predicted", "measured", "measured against predicted", "kept")
    return "### Budget: predicted and measured\n\n" + table(head, rows)


def _gate_part(report: Report) -> str:
    rows: list[tuple[str, ...]] = []
    for line in report.gate:
        what, show, _ = _AXES[line.name]
        rows.append((what, show(line.limit), show(line.measured), "passed" if line.passed else "**failed**"))
    if report.parity:
        parity = report.parity
        result = "passed" if parity.passed else "**failed**"
        rows.append(("export parity, relative error", number(parity.tolerance), number(parity.relative_error), result))
    if not rows:
        return ""
    text = "### Gate\n\n" + table(("gate", "limit", "measured", "result"), rows)
    if report.parity:
        same = "the same" if report.parity.greedy_equal else "other"
        text += (
            f"\n\nGreedy decoding gives {same} tokens from the ONNX folder as from torch. Both compute without rounding "
            "activations here; the deployed kernels round what they read to int8, which changes the logits by "
            f"{report.parity.rounding:.2%} (part of every other figure)."
        )
    return text


def _plan_part(report: Report) -> str:
    if not report.plan:
        return ""
    dropped = [entry.site for entry in report.plan if entry.keep == 0]
    formats: dict[str, tuple[int, int]] = {}
    for entry in report.plan:
        if entry.keep:
            count, total = formats.get(entry.format, (0, 0))
            formats[entry.format] = (count + 1, total + entry.size_bytes)
    rows: list[tuple[object, ...]] = [
        (name, count, size(total)) for name, (count, total) in sorted(formats.items(), key=lambda item: -item[1][1])
    ]
    detail = [
        (
            entry.site,
            "dropped" if entry.keep == 0 else f"{entry.keep} / {entry.units}",
            "–" if entry.keep == 0 else entry.format,
            size(entry.size_bytes),
            number(entry.sensitivity),
            _alternative(entry.next_better),
            *([f"{entry.same:.0%}"] if entry.same is not None else []),
        )
        for entry in report.plan
    ]
    same = [entry.same for entry in report.plan if entry.same is not None]
    text = "## The plan\n\n![Kept fraction and format of every block](plan.png)\n\n"
    text += table(("format", "sites", "stored"), rows) + "\n\n"
    text += f"Dropped sub-layers: {', '.join(dropped)}." if dropped else "No sub-layer is dropped."
    text += (
        "\n\nSensitivity: KL that this action alone was expected to cost before any plan was scored. Next better: the action "
        "of less expected KL that takes the least more of the budget, and what it would have cost."
    )
    if same:
        text += (
            f" Same: share of the policy's searches, one a seed, whose best plan decides so too; {fmean(same):.0%} "
            "in the mean. Where it is low, the action hardly matters, or the search was too short."
        )
    head = ["site", "kept", "format", "stored", "sensitivity", "next better", *(["same"] if same else [])]
    return text + f"\n\n<details><summary>Every site</summary>\n\n{table(head, detail)}\n\n</details>"


def _alternative(found: Alternative | None) -> str:
    """`384:w8: +1.3 MB, sensitivity 0.0004`."""
    if found is None:
        return "–"
    sign = "+" if found.extra_bytes >= 0 else "−"
    return f"{found.action}: {sign}{size(abs(found.extra_bytes))}, sensitivity {number(found.sensitivity)}"


def _search_part(report: Report) -> str:
    best = best_so_far(report.trials)
    if not best:
        return ""
    most = max(len(curve) for curve in best.values())
    marks = sorted({max(1, most // 4), max(1, most // 2), most})
    order = sorted(best, key=lambda policy: best[policy][-1])
    winner = best[order[0]][-1]
    rows = [
        (
            policy,
            len(best[policy]),
            *(number(best[policy][min(mark, len(best[policy])) - 1]) for mark in marks),
            f"{best[policy][-1] / winner:.2f}×" if winner > 0 else "–",
            best[policy].index(best[policy][-1]) + 1,
        )
        for policy in order
    ]
    head = ("policy", "evaluations", *(f"best KL of {mark}" for mark in marks), "KL to the best", "found at")
    return (
        "## The search\n\nThe policies at the same budget and the same number of evaluations; KL on the calibration "
        "tokens of the search. A plan that was tried on an eighth of them cost an eighth of an evaluation and cannot win.\n\n"
        "![Best KL so far against evaluations](search.png)\n\n"
        + table(head, rows)
        + "\n\nA policy that has fewer plans to offer than it may evaluate keeps its best.\n\n"
        + "![KL against size and latency](quality.png)"
    )


def _finalists_part(report: Report) -> str:
    if not report.finalists:
        return ""
    rows = [(f.digest, f.other_sites, number(f.kl), number(f.recovered_kl)) for f in report.finalists]
    head = ("plan", "sites unlike the student's", "KL in the search", "KL on held-out text, recovered")
    note = "Ranks change in recovery: these plans had a short one, and the first became the student's."
    return f"### Finalists\n\n{note}\n\n{table(head, rows)}"


def _recovery_part(report: Report) -> str:
    recovery = report.recovery
    if recovery is None:
        return ""
    stages = [(f"the plan's variants have {number(recovery.kl_before)}", recovery.kl_before)]
    if recovery.kl_reconstructed is not None:
        stages.append((f"reconstruction gives {number(recovery.kl_reconstructed)}", recovery.kl_reconstructed))
    training = recovery.training
    if training and training.decides == "kl":
        trained = min(p.held_out["kl"] for p in training.points[1:] if p.held_out)
        stages.append((f"{training.points[-1].step} steps of distillation {number(trained)}", trained))
    best, told = math.inf, []
    for text, kl in stages:
        told.append(text if kl < best else f"{text}, which is no gain and was **not kept**")
        best = min(best, kl)
    change = 100 * (recovery.kl_after / recovery.kl_before - 1) if recovery.kl_before else 0.0
    text = f"## Recovery\n\nKL on held-out calibration tokens: {'; '.join(told)} ({change:+.0f}% in all)."
    if training and training.decides != "kl":
        text += "\n\n" + _own_text_part(training)
    return text + ("\n\n![The training, step by step](distillation.png)" if training else "")


def _own_text_part(training: Training) -> str:
    """What a training on the student's own text did to it, measure by measure."""
    looks = {point.step: point.held_out for point in training.points if point.held_out}
    steps = sorted({0, training.kept_step, max(looks)})
    rows = [(name.replace("_", " "), *(number(looks[step][name]) for step in steps)) for name in looks[0]]
    head = ("behind held-out prompts", *(f"step {step}" for step in steps))
    kept = f"The student of step {training.kept_step} was kept" if training.kept_step else "It was **not kept**"
    note = (
        f"Trained by `{training.method}`, on its own text. {kept}: least {training.decides.replace('_', ' ')}. `kl` is on "
        "given text, the rest on what the student writes itself."
    )
    return f"{note}\n\n{table(head, rows)}"


def _samples_part(report: Report) -> str:
    if not report.samples:
        return ""

    def quoted(text: str) -> str:
        plain = re.sub(r"([\\`*_#<>\[\]|~=+-])", r"\\\1", text.strip() or "(nothing)")  # text, not Markdown
        return "\n".join(f"> {line}  ".rstrip("\n") if line else ">" for line in plain.splitlines())

    parts = ["## Samples", "Greedy continuations."]
    for sample in report.samples:
        parts.append(f"### {' '.join(sample.prompt.split())} …")
        parts.append(f"*teacher*\n{quoted(sample.teacher)}")
        parts.append(f"*student*\n{quoted(sample.student)}")
    return "\n\n".join(parts)


def _measured_part(report: Report) -> str:
    environment = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    where = (
        f"{environment.cpu}, {environment.machine}; {environment.threads} threads, {environment.provider}; {versions}."
    )
    text = f"## How it was measured\n\n{report.protocol.strip()}\n\n{where}"
    spreads = [
        (
            row.name,
            *(
                f"{milliseconds(t.low)} to {milliseconds(t.high)}" if t else "–"
                for t in (row.prefill_ms, row.decode_ms)
            ),
        )
        for row in report.rows
        if row.prefill_ms or row.decode_ms
    ]
    if spreads:
        text += "\n\nRanges of the timings:\n\n" + table(("model", "prefill", "decode, a token"), spreads)
    if report.stage_seconds:
        total = sum(report.stage_seconds.values())
        rows = [(name, f"{seconds:.1f} s") for name, seconds in report.stage_seconds.items()]
        text += "\n\n" + table(("stage", "time"), [*rows, ("**all**", f"**{total:.1f} s**")])
    return text


def _reproduce_part(report: Report) -> str:
    recipe = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
    return (
        "## How to reproduce\n\nSave this as `recipe.yaml` and run `compress recipe.yaml`. Every number of this page is "
        f"in `report.json`.\n\n```yaml\n{recipe.strip()}\n```"
    )


# The pictures -------------------------------------------------------------------------------------------------------

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, which is told apart by colour-blind readers too."""

_FORMAT_COLOURS = {
    ("float", 32): "#1d2b53",
    ("float", 16): "#3b4f8a",
    ("dynamic", 8): "#e69f00",
    ("blockwise", 8): "#2c7fb8",
    ("blockwise", 4): "#41b6a6",
    ("blockwise", 2): "#b5de9b",
}


def figures(report: Report) -> dict[str, Figure]:
    """The pictures that this report has data for, by file name."""
    made: dict[str, Figure] = {}
    if report.trials:
        made["search.png"] = _search_figure(report)
        made["quality.png"] = _quality_figure(report)
    if report.plan:
        made["plan.png"] = _plan_figure(report)
    if report.recovery and report.recovery.training:
        made["distillation.png"] = _distillation_figure(report.recovery)
    return made


def _figure(width: float, height: float) -> Figure:
    """An empty figure, without pyplot and so without any global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _plain_log(axes: Axes) -> None:
    """A logarithmic y axis that is labelled with plain numbers, also when it spans less than a decade."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1.0,) if high / low > 1e3 else (1.0, 2.0, 5.0) if high / low > 5 else tuple(float(i) for i in range(1, 10))
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _shown(kl: float) -> float:
    """A KL as it is drawn on a logarithmic axis, which has no zero."""
    return max(kl, 1e-6)


def _policy_colours(report: Report) -> dict[str, str]:
    names = list(dict.fromkeys(trial.policy for trial in report.trials))
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(sorted(names))}


def _search_figure(report: Report) -> Figure:
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7.5, 4.2)
    axes = figure.add_subplot()
    colours = _policy_colours(report)
    curves = best_so_far(report.trials)
    most = max(len(curve) for curve in curves.values())
    for policy, best in curves.items():
        curve = [_shown(kl) for kl in best]
        trials = _whole(report, policy)
        axes.scatter(
            [t.index for t in trials], [_shown(t.kl) for t in trials], s=14, alpha=0.35, color=colours[policy], lw=0
        )
        axes.plot(range(1, len(curve) + 1), curve, drawstyle="steps-post", color=colours[policy], lw=2, label=policy)
        if len(curve) < most:
            axes.plot([len(curve), most], [curve[-1]] * 2, color=colours[policy], lw=1.5, ls=(0, (1, 1.5)))
        axes.plot(len(curve), curve[-1], "o", color=colours[policy], ms=5)
    _plain_log(axes)
    _clean(axes)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(
        xlabel="evaluations",
        ylabel="KL to the teacher, nats per token",
        title="Best plan so far (line), all plans (dots)",
    )
    axes.legend(frameon=False)
    return figure


def _quality_figure(report: Report) -> Figure:
    axes_of: list[tuple[str, str, Callable[[Trial], float | None], Callable[[Row], float | None]]] = [
        ("bytes", "size, MB", lambda t: t.size_bytes / 1e6, lambda r: r.size_bytes / 1e6 if r.size_bytes else None),
        ("prefill", "prefill, ms", lambda t: t.prefill_ms, lambda r: _median(r.prefill_ms)),
        ("decode", "decode, ms per token", lambda t: t.decode_ms, lambda r: _median(r.decode_ms)),
    ]
    shown = [axis for axis in axes_of if any(axis[2](trial) is not None for trial in report.trials)]
    figure = _figure(3.9 * len(shown) + 0.6, 4.6)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    colours = _policy_colours(report)
    limits = {line.name: line.limit / (1e6 if line.name == "bytes" else 1) for line in report.budget}
    for axes, (key, label, of_trial, of_row) in zip(panels, shown, strict=True):
        for policy, colour in colours.items():
            points = [(of_trial(t), _shown(t.kl)) for t in _whole(report, policy)]
            xs, ys = zip(*[point for point in points if point[0] is not None], strict=True) if points else ((), ())
            axes.scatter(xs, ys, s=16, alpha=0.5, color=colour, lw=0, label=policy)
        for row in report.rows:
            x = of_row(row)
            if x is not None and row.kl is not None and row.kl > 1e-3 and math.isfinite(row.kl):
                marker, face = ("*", "#000000") if row.role == "student" else ("D", "none")
                area = 150 if row.role == "student" else 45
                axes.scatter(
                    [x], [row.kl], s=area, marker=marker, color="black", facecolor=face, label=f"{row.name}, measured"
                )
        if key in limits:
            axes.axvline(limits[key], color="#888888", lw=1, ls="--", label="budget")
        axes.set_xlabel(label)
        _clean(axes)
    _plain_log(panels[0])
    panels[0].set_ylabel("KL to the teacher, nats per token")
    figure.suptitle(
        "Dots: plans of the search, on calibration text. Black: measured at the end, on evaluation text", fontsize=10
    )
    handles = {
        label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), frameon=False
    )
    return figure


def _colour(name: str) -> str:
    fmt = Format.parse(name)
    return _FORMAT_COLOURS.get((fmt.kind, fmt.bits), "#999999")


def _plan_figure(report: Report) -> Figure:
    from matplotlib.patches import Patch

    layers = 1 + max((entry.layer for entry in report.plan if entry.layer is not None), default=0)
    ends = [entry for entry in report.plan if entry.layer is None]
    figure = _figure(7.5, 1.6 + 0.2 * (layers + len(ends)))
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"wspace": 0.08})
    for axes, kind in ((left, "attention"), (right, "ffn")):
        for entry in report.plan:
            if entry.kind == kind and entry.layer is not None:
                _bar(axes, entry.layer, entry)
        axes.set_xlim(0, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "all"])
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    for entry in ends:
        # the embedding stands above the first block, the head below the last, each over both columns
        place = -1.5 if entry.kind == "embedding" else layers + 0.5
        for axes in (left, right):
            _bar(axes, place, entry)
    ticks: dict[float, str] = {-1.5 if entry.kind == "embedding" else layers + 0.5: entry.kind for entry in ends}
    ticks |= {layer: str(layer) for layer in range(0, layers, 1 if layers <= 40 else 5)}
    left.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    left.set_ylim(layers + (1.2 if any(entry.kind == "head" for entry in ends) else -0.3), -2.2 if ends else -0.7)
    left.set(title="attention: groups kept", ylabel="block")
    right.set(title="feed-forward: channels kept")
    used = {entry.format for entry in report.plan if entry.keep}
    names = sorted(used, key=lambda name: (-Format.parse(name).bits, Format.parse(name).kind, name))
    patches = [Patch(color=_colour(name), label=name) for name in names]
    if any(entry.keep == 0 for entry in report.plan):
        patches.append(Patch(facecolor="white", edgecolor="#b22222", label="dropped"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    return figure


def _bar(axes: Axes, place: float, entry: PlanEntry) -> None:
    """The kept part in the format's colour over a pale bar for the whole; a dropped sub-layer is a red outline."""
    if entry.keep == 0:
        axes.barh(place, 1, height=0.7, color="white", edgecolor="#b22222", linewidth=0.8)
        return
    axes.barh(place, 1, height=0.8, color="#eeeeee")
    axes.barh(place, entry.keep / entry.units, height=0.8, color=_colour(entry.format))


def _distillation_figure(recovery: Recovery) -> Figure:
    figure, training = _figure(7.5, 3.6), recovery.training
    assert training is not None
    axes = figure.add_subplot()
    seen = training.decides if any(training.decides in p.told for p in training.points) else "loss"
    trained = [(p.step, p.told[seen]) for p in training.points if seen in p.told]
    axes.plot(*zip(*trained, strict=True), color="#bbbbbb", lw=1, label=f"{seen.replace('_', ' ')}, training")
    held = [(p.step, p.held_out[training.decides]) for p in training.points if p.held_out]
    label = f"{training.decides.replace('_', ' ')}, held-out text"
    axes.plot(*zip(*held, strict=True), "o-", color=_COLOURS[0], lw=2, ms=4, label=label)
    if training.decides == "kl":
        axes.axhline(recovery.kl_before, color=_COLOURS[1], lw=1, ls="--", label="KL before")
    if min(value for _, value in trained + held) > 0:
        _plain_log(axes)
    _clean(axes)
    axes.set(xlabel="step", ylabel="nats per token" if training.decides != "cost" else "cost", title="Distillation")
    axes.legend(frameon=False)
    return figure
