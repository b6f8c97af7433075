"""Is a result good enough? A report against limits, and against an earlier report of the same thing; told to people and CI.

Perplexity, KL, accuracy, bytes and memory are compared as they are. Times are noisy: against a limit the lower end of where
the true median lies counts, against a baseline the ratio to the fp32 export that was timed beside it, and what may be lost
grows by what the times are uncertain by.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

from pydantic import ValidationError

from compressor.errors import ComparisonError, DataError, RecipeError, RegressionError
from compressor.recipe import GateSection, ToleranceSection
from compressor.report import AXES, GateLine, Parity, Report, Row, Timing, number, table

TOLERANCE: dict[str, float] = ToleranceSection().model_dump()
"""What may be lost against a baseline, as a share of it, where nothing else is said."""

OF_DEVICE = ("prefill", "decode", "memory")
"""Names of the lines of which another device may tell otherwise."""

OF_TIMES = ("Prefill:", "Decode:", "Times:", "Peak memory:")
"""How sentences of a protocol begin that are about times and memory."""

SAME_TEACHER = 1e-3
"""Relative difference up to which two teachers' perplexities are those of one."""


def read_report(path: str | Path) -> Report:
    """The report of a run: its folder, or the report.json in it.

    Raises:
        DataError: there is none, or it is of another version.
    """
    path = Path(path)
    path = path / "report.json" if path.is_dir() else path
    try:
        return Report.from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: expected the report of a run, {error.strerror}; name its folder or report.json"
        ) from None
    except (ValidationError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: expected a report that this version writes, {reason}; run the recipe again") from None


# -- lines --


def _perplexity_ratio(rows: Sequence[Row]) -> float:
    return _measured(_row(rows, "student").perplexity) / _measured(_row(rows, "teacher").perplexity)


def _accuracy_ratio(rows: Sequence[Row]) -> float:
    right = _measured(_row(rows, "student").accuracy)
    return _measured(_row(rows, "teacher").accuracy) / right if right else inf


RATIOS: dict[Literal["perplexity_ratio", "accuracy_ratio"], Callable[[Sequence[Row]], float]] = {
    "perplexity_ratio": _perplexity_ratio,
    "accuracy_ratio": _accuracy_ratio,
}
"""What a student may have lost of its teacher's quality."""


def against_limits(rows: Sequence[Row], gate: GateSection) -> tuple[GateLine, ...]:
    """The lines of a recipe's gate, those that it has."""
    reference, student = (_row(rows, role) for role in ("reference", "student"))
    lines = []
    for kind, find in RATIOS.items():
        if (most := getattr(gate, kind)) is not None:
            lines.append(GateLine(kind, most, ratio := find(rows), ratio <= most))
    if gate.kl is not None:
        lines.append(GateLine("kl", gate.kl, kl := _measured(student.kl), kl <= gate.kl))
    for name, limit in (("bytes", gate.bytes), ("memory", gate.memory)):
        if limit is not None:
            _, _, get = AXES[name]
            most = limit.resolve(_measured(get(reference)) if limit.relative else 0.0)
            lines.append(GateLine(name, most, size := _measured(get(student)), size <= most))  # type: ignore[arg-type]
    for name, limit in (("prefill", gate.prefill), ("decode", gate.decode)):
        if limit is not None:
            time = _timed(getattr(student, f"{name}_ms"))
            most = limit.resolve(_timed(getattr(reference, f"{name}_ms")).median if limit.relative else 0.0)
            lines.append(GateLine(name, most, time.median, time.low <= most))  # type: ignore[arg-type]
    return tuple(lines)


def against_baseline(
    report: Report, baseline: Report, tolerance: Mapping[str, float] = TOLERANCE, times: bool = True
) -> tuple[GateLine, ...]:
    """Perplexity, bytes and times of a report's student against those of an earlier report.

    Args:
        tolerance: what may be lost, as a share, by the names of `TOLERANCE`, which stands in for those that are left out.
        times: whether times are compared, which takes the same device.

    Raises:
        ComparisonError: the two measured different things; all of them are named.
    """
    allowed = {**TOLERANCE, **tolerance}
    if differences := _differences(report, baseline, times):
        without = times and not _differences(report, baseline, times=False)
        raise ComparisonError(
            f"these reports cannot be compared: {'; '.join(differences)}. Run both recipes with the same texts, workload and "
            f"device{', or leave the times out (--no-times, times=False)' if without else ''}"
        )
    ours, theirs = report.rows, baseline.rows
    student, old = _row(ours, "student"), _row(theirs, "student")
    lines = []
    for kind, find in RATIOS.items():
        if kind == "perplexity_ratio" or student.accuracy is not None:
            found, earlier = find(ours), find(theirs)
            most = earlier * (1 + allowed[kind])
            lines.append(GateLine(kind, most, found, found <= most, earlier))
    size, before = _measured(student.size_bytes), _measured(old.size_bytes)
    most = before * (1 + allowed["bytes"])
    lines.append(GateLine("bytes", most, size, size <= most, before))
    if times:
        for name in ("prefill", "decode"):
            if not (getattr(student, f"{name}_ms") or getattr(old, f"{name}_ms")):
                continue  # masked language models do not decode
            here, fp32, there, old_fp32 = (
                _timed(getattr(_row(rows, role), f"{name}_ms"), "leave the times out (--no-times, times=False)")
                for rows in (ours, theirs)
                for role in ("student", "reference")
            )
            carried = there.median / old_fp32.median * fp32.median
            spread = sum((timing.high - timing.low) / 2 / timing.median for timing in (here, fp32, there, old_fp32))
            most = carried * (1 + allowed[name] + spread)
            lines.append(GateLine(name, most, here.median, here.median <= most, carried))  # type: ignore[arg-type]
    return tuple(lines)


def every_line(
    report: Report,
    baseline: str | Path | Report | None = None,
    tolerance: Mapping[str, float] = TOLERANCE,
    times: bool = True,
    limits: Mapping[str, Any] | None = None,
) -> tuple[GateLine, ...]:
    """The lines of the run's own recipe, of further limits, as a recipe's `gate` has them, and those against a baseline, if
    there is one: a report, or where it lies. What is given here takes the place of what the recipe has of the same kind.
    Without `times` the recipe's lines of what depends on the device are left out, too.

    Raises:
        RecipeError: a limit or a tolerance is none, or there is a tolerance and no baseline.
    """
    for name, share in tolerance.items():
        if name not in TOLERANCE or not share >= 0:
            raise RecipeError(
                f"tolerance {name} = {share}: expected a share of at least 0 of one of {', '.join(TOLERANCE)}"
            )
        if baseline is None and tolerance is not TOLERANCE:
            raise RecipeError(f"tolerance {name} = {share}: expected a baseline, to which it belongs; give one")
    lines = tuple(line for line in report.gate if times or line.name not in OF_DEVICE)
    lines = tuple(line for line in lines if line.name not in (limits or {}) or line.baseline is not None)
    if limits:
        lines += against_limits(report.rows, GateSection.of_limits(limits))
    if baseline is not None:
        lines = tuple(line for line in lines if line.baseline is None)
        earlier = baseline if isinstance(baseline, Report) else read_report(baseline)
        lines += against_baseline(report, earlier, tolerance, times)
    return lines


def _differences(report: Report, baseline: Report, times: bool) -> list[str]:
    found = []
    here, there = (re.split(r"(?<=\.) ", r.protocol) for r in (report, baseline))
    for ours, theirs in zip_longest(here, there, fillvalue="nothing"):
        if ours != theirs and (times or not ours.startswith(OF_TIMES)):
            found.append(f"protocol: {ours!r} against {theirs!r}")
    teachers = [_measured(_row(r.rows, "teacher").perplexity) for r in (report, baseline)]
    if abs(teachers[0] / teachers[1] - 1) > SAME_TEACHER:
        found.append(f"the teacher's perplexity: {number(teachers[0])} against {number(teachers[1])}")
    if times:
        for key in ("cpu", "gpu", "threads", "provider"):
            ours, theirs = getattr(report.environment, key), getattr(baseline.environment, key)
            if ours != theirs:
                found.append(f"{key}: {ours} against {theirs}")
    return found


def _row(rows: Sequence[Row], role: str) -> Row:
    found = next((row for row in rows if row.role == role), None)
    if found is None:
        raise ComparisonError(f"expected a {role} among the report's models, found none; run the recipe to its end")
    return found


def _measured(value: float | None, remedy: str = "leave that limit out, or give it in bytes or ms") -> float:
    if value is None:
        raise ComparisonError(
            "expected a figure that the report does not have: of a run layer by layer the fp32 export has none, and a model "
            f"that only reads has no time of a token; {remedy}"
        )
    return value


def _timed(timing: Timing | None, *remedy: str) -> Timing:
    _measured(timing.median if timing else None, *remedy)
    assert timing is not None
    return timing


# -- the verdict --


def require(report: Report, lines: Sequence[GateLine]) -> None:
    """Raise RegressionError, with a table of what missed and by how much, unless all lines and the export's parity passed."""
    missed = [line for line in lines if not line.passed]
    told = []
    if missed:
        told.append(f"{len(missed)} of {len(lines)} checks missed\n\n{gate_table(missed)}")
    if (parity := report.parity) and not parity.passed:
        told.append(f"export parity: {_parity_missed(parity)}")
    if told:
        raise RegressionError("\n\n".join(told), tuple(missed), report)


def _parity_missed(parity: Parity) -> str:
    return (
        f"expected a relative error of at most {parity.tolerance:g} and the same greedy text as torch, got "
        f"{parity.relative_error:.2g} and {'the same' if parity.greedy_equal else 'another'} text"
    )


def gate_table(lines: Sequence[GateLine]) -> str:
    """The lines as a Markdown table."""
    rows = []
    for line in lines:
        what, show, _ = AXES[line.name]
        over = f"{100 * (line.measured / line.limit - 1):+.1f}%"
        before = "–" if line.baseline is None else show(line.baseline)
        rows.append(
            (what, before, show(line.limit), show(line.measured), over, "passed" if line.passed else "**missed**")
        )
    return table(("check", "baseline", "limit", "measured", "against the limit", "result"), rows)


def compare(ours: str | Path | Report, theirs: str | Path | Report) -> str:
    """Two runs side by side as a Markdown table, ours over theirs in parentheses; a run is its folder, report.json or report.

    Raises:
        DataError: one is no report.
    """
    reports = [found if isinstance(found, Report) else read_report(found) for found in (ours, theirs)]
    rows = []
    for role in ("teacher", "reference", "student"):
        here, there = (report.row(role) for report in reports)  # type: ignore[arg-type]
        if here is None or there is None:
            continue
        quality = [("perplexity", number, lambda row: row.perplexity), ("accuracy", number, lambda row: row.accuracy)]
        for name, show, get in [*quality, *AXES.values()]:
            pair = [get(here), get(there)]
            if None not in pair:
                rows.append((f"{here.name}: {name}", *map(show, pair), f"{pair[0] / pair[1]:.3f}×" if pair[1] else "–"))
    differences = _differences(reports[0], reports[1], times=True)
    text = table(("figure", "ours", "theirs", "ratio"), rows)
    return text + (f"\n\nNot the same measurement: {'; '.join(differences)}." if differences else "")


# -- for CI --


def as_json(lines: Sequence[GateLine], report: Report) -> str:
    """{"passed": ..., "parity": ..., "checks": [{"name", "limit", "measured", "passed", "baseline"}]}; parity: whether the
    export's was within its tolerance, null without any. A figure that is not finite is null."""
    checks = [
        {key: None if isinstance(value, float) and not isfinite(value) else value for key, value in vars(line).items()}
        for line in lines
    ]
    parity = report.parity.passed if report.parity else None
    passed = all(line.passed for line in lines) and parity is not False
    return json.dumps({"passed": passed, "parity": parity, "checks": checks}, indent=2, allow_nan=False) + "\n"


def as_junit(lines: Sequence[GateLine], report: Report) -> str:
    """A test suite of one case a check, as Jenkins, GitLab and GitHub show it."""
    suite = ElementTree.Element("testsuite", name="compress check")
    for line in lines:
        what, show, _ = AXES[line.name]
        against = "limit" if line.baseline is None else "baseline"  # one name may stand in both
        case = ElementTree.SubElement(suite, "testcase", classname=f"compress.{against}", name=line.name)
        if not line.passed:
            text = f"{what}: expected at most {show(line.limit)}, measured {show(line.measured)}"
            ElementTree.SubElement(case, "failure", message=text)
    if report.parity:
        case = ElementTree.SubElement(suite, "testcase", classname="compress.export", name="parity")
        if not report.parity.passed:
            ElementTree.SubElement(case, "failure", message=_parity_missed(report.parity))
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(sum(case.find("failure") is not None for case in suite)))
    return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"


def as_benchmark(report: Report) -> str:
    """The student's figures as github-action-benchmark reads them (`customSmallerIsBetter`)."""
    student = _row(report.rows, "student")
    entries: list[dict[str, Any]] = [
        {"name": "perplexity", "unit": "1", "value": student.perplexity},
        {"name": "KL to the teacher", "unit": "nats per token", "value": student.kl},
        {"name": "size", "unit": "bytes", "value": student.size_bytes},
        {"name": "peak memory", "unit": "bytes", "value": student.peak_memory_bytes},
    ]
    for name, timing in (("prefill", student.prefill_ms), ("decode", student.decode_ms)):
        if timing is not None:
            half = (timing.high - timing.low) / 2
            entries.append({"name": name, "unit": "ms", "value": timing.median, "range": f"± {half:.3g}"})
    return json.dumps([entry for entry in entries if entry["value"] is not None], indent=2) + "\n"
