"""The pictures of a report."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from compressor.plan import Formats
from compressor.report import PlanEntry, Recovery, Report, Row, Trial, best_so_far, median_of, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RGB = tuple[float, float, float]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's palette, which is told apart by colour-blind readers too."""

_FORMAT_COLOURS = {
    ("float", 32): "#1d2b53",
    ("float", 16): "#3b4f8a",
    ("dynamic", 8): "#e69f00",
    ("a8", 6): "#edb640",  # a pair with int8
    ("a8", 4): "#f5cf80",
    ("blockwise", 8): "#2c7fb8",
    ("blockwise", 6): "#35a0b8",
    ("blockwise", 5): "#3babaf",
    ("blockwise", 4): "#41b6a6",
    ("blockwise", 3): "#7acba0",
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
        trials = whole(report, policy)
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
        ("prefill", "prefill, ms", lambda t: t.prefill_ms, lambda r: median_of(r.prefill_ms)),
        ("decode", "decode, ms per token", lambda t: t.decode_ms, lambda r: median_of(r.decode_ms)),
    ]
    shown = [axis for axis in axes_of if any(axis[2](trial) is not None for trial in report.trials)]
    figure = _figure(3.9 * len(shown) + 0.6, 4.6)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    colours = _policy_colours(report)
    limits = {line.name: line.limit / (1e6 if line.name == "bytes" else 1) for line in report.budget}
    for axes, (key, label, of_trial, of_row) in zip(panels, shown, strict=True):
        for policy, colour in colours.items():
            points = [(of_trial(t), _shown(t.kl)) for t in whole(report, policy)]
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


def _format_colours(names: Sequence[str]) -> dict[str, RGB]:
    """A colour for every format: that of its kind and bits, paler for every other one that has it already."""
    from matplotlib.colors import to_rgb

    colours: dict[str, RGB] = {}
    for name in names:
        formats = Formats.parse(name)
        kind = "a8" if formats.most.a8 else formats.most.kind
        red, green, blue = to_rgb(_FORMAT_COLOURS.get((kind, formats.bits), "#999999"))
        while (red, green, blue) in colours.values():
            red, green, blue = (1 - 0.6 * (1 - part) for part in (red, green, blue))
        colours[name] = (red, green, blue)
    return colours


COLUMNS = {"attention": "attention: groups kept", "cross": "across: groups kept", "ffn": "feed-forward: channels kept"}
"""Of the picture of a plan: the last part of a site's name -> its title."""


def _place(site: str) -> tuple[str, str]:
    """`encoder.layers.3.ffn.experts.1` -> (`encoder.layers.3`, `ffn`)."""
    found = re.match(r"(.*layers\.\d+)\.(\w+)", site)
    assert found, site
    return found[1], found[2]


def _plan_figure(report: Report) -> Figure:
    from matplotlib.patches import Patch

    ends = [entry for entry in report.plan if entry.layer is None]
    places = {entry.site: _place(entry.site) for entry in report.plan if entry.layer is not None}
    blocks = list(dict.fromkeys(block for block, _ in places.values()))
    layers = len(blocks) or 1
    columns = [name for name in COLUMNS if name in {part for _, part in places.values()}] or ["attention", "ffn"]
    figure = _figure(7.5, 1.6 + 0.2 * (layers + len(ends)))
    every = figure.subplots(1, len(columns), sharey=True, gridspec_kw={"wspace": 0.08})
    left = every[0]
    used = {entry.format for entry in report.plan if entry.keep}
    formats = sorted(used, key=lambda name: (-Formats.parse(name).bits, Formats.parse(name).most.kind, name))
    colours = _format_colours(formats)
    for axes, column in zip(every, columns, strict=True):
        for row, block in enumerate(blocks):
            parts = [entry for entry in report.plan if places.get(entry.site) == (block, column)]
            for number, entry in enumerate(parts):  # a mixture's experts lie in one row
                _bar(axes, row + 0.8 * ((number + 0.5) / len(parts) - 0.5), entry, colours, 1 / len(parts))
        axes.set_title(COLUMNS[column], fontsize=24 / len(columns))
        axes.set_xlim(0, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "all"])
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    for entry in ends:
        # the embedding stands above the first block, the head below the last, each over all columns
        place = -1.5 if entry.kind == "embedding" else layers + 0.5
        for axes in every:
            _bar(axes, place, entry, colours)
    ticks: dict[float, str] = {-1.5 if entry.kind == "embedding" else layers + 0.5: entry.kind for entry in ends}
    names = [block.removeprefix("layers.").replace("encoder.layers.", "encoder ") for block in blocks] or ["0"]
    ticks |= {place: names[place] for place in range(0, layers, 1 if layers <= 40 else 5)}
    left.set_yticks(list(ticks), list(ticks.values()), fontsize=8)
    left.set_ylim(layers + (1.2 if any(entry.kind == "head" for entry in ends) else -0.3), -2.2 if ends else -0.7)
    left.set_ylabel("block")
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    if any(entry.keep == 0 for entry in report.plan):
        patches.append(Patch(facecolor="white", edgecolor="#b22222", label="dropped"))
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False)
    return figure


def _bar(axes: Axes, place: float, entry: PlanEntry, colours: Mapping[str, RGB], row: float = 1.0) -> None:
    """The kept part in the format's colour over a pale bar for the whole; a dropped sub-layer is a red outline. row: height
    that there is for it."""
    if entry.keep == 0:
        axes.barh(place, 1, height=0.7 * row, color="white", edgecolor="#b22222", linewidth=0.8)
        return
    axes.barh(place, 1, height=0.8 * row, color="#eeeeee")
    axes.barh(place, entry.keep / entry.units, height=0.8 * row, color=colours[entry.format])


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
