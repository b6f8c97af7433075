"""The page that tells what a run found: report.md and report.html, the same words; and the card of the deployed folder."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean

import yaml  # type: ignore[import-untyped]

from compressor.files import write_bytes_atomic, write_json_atomic, write_text_atomic
from compressor.pictures import figures
from compressor.report import (
    AXES,
    CORRECTED,
    Alternative,
    Report,
    Sample,
    Task,
    Timing,
    Training,
    best_so_far,
    median_of,
    milliseconds,
    number,
    ratio,
    size,
    table,
)

DETAILS, DETAILS_END = "<details><summary>Every site</summary>", "</details>"
"""The only HTML in the Markdown."""

WRITE = """
```
compress generate FOLDER "Once upon a time"
```
"""
LOAD = """
```python
import compressor

model = compressor.load("FOLDER")  # torch: {read} [B, L] -> logits [B, L, V]
```
"""
GENAI = """
```python
import onnxruntime_genai as genai  # 0.18 or newer

model = genai.Model("FOLDER")
tokenizer, parameters = genai.Tokenizer(model), genai.GeneratorParams(model)
parameters.set_search_options(max_length=64)
generator = genai.Generator(model, parameters)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```
"""
THREE = (
    "`encoder_model.onnx` reads a text, `decoder_model.onnx` what that gives, `encoder_hidden_states`, and the token that "
    "answers begin behind, `decoder_with_past_model.onnx` every other one, behind `past_key_values`. The weights of all "
    "three lie in one file. They run in ONNX Runtime, and with optimum (`ORTModelForSeq2SeqLM`) where in the decoder no "
    "fewer attentions to itself are left than across."
)
MADE = {
    "text-generation": "Greedy continuations.",
    "text2text-generation": "Greedy answers.",
    "fill-mask": "The most likely token at every position.",
    "text-classification": "The class of each text.",
    "sentence-similarity": "The nearest of the texts that each is compared with.",
}
PLAN_HERE = "`plan.json` says what was kept of every sub-layer."

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0; display: block; overflow-x: auto }
td, th { padding: .25rem .7rem; border-bottom: 1px solid #ddd }
th { text-align: left } td { vertical-align: top } img { max-width: 100% }
pre { background: #f5f5f5; padding: 1rem; overflow: auto }
.text { white-space: pre-wrap }
"""


def write(report: Report, folder: Path) -> Path:
    """Writes report.json, the pictures, report.md and report.html into `folder`; returns the path of the page."""
    write_json_atomic(folder / "report.json", report.to_dict())
    pictures = {}
    for name, figure in figures(report).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
        pictures[name] = buffer.getvalue()
        write_bytes_atomic(folder / name, pictures[name])
    write_text_atomic(folder / "report.md", markdown(report))
    write_text_atomic(folder / "report.html", html(report, pictures))
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
        _, show, get = AXES[key]
        ours, theirs = get(student), get(base) if base else None
        if ours and theirs:
            gain = theirs / ours
            word, factor = (better, gain) if gain >= 1 else (worse, 1 / gain)
            of = "" if key == "bytes" else f" at {'prefill' if key == 'prefill' else 'decoding'}"
            facts.append(f"{factor:.2f}× {word}{of} ({show(theirs)} → {show(ours)})")
    sentence = "The student is " + ", ".join(facts) if facts else "The student was made"
    source = teacher or reference
    if report.task == "sentence-similarity" and student.accuracy is not None:
        sentence += f"; of {number(100 * student.accuracy)}% of the texts the nearest other one stays the nearest"
        sentence += f" (KL {number(student.kl)})"
    elif source and source.perplexity is not None and student.perplexity is not None:
        sentence += f"; perplexity {number(source.perplexity)} → {number(student.perplexity)}"
        if student.kl is not None:
            sentence += f" (KL {number(student.kl)})"
    return sentence + "."


def markdown(report: Report) -> str:
    """report.md. Pictures are referred to by the names that `write` gives them."""
    return "\n\n".join(part for part in _parts(report) if part) + "\n"


def html(report: Report, pictures: Mapping[str, bytes]) -> str:
    """report.html: the same page in one file that needs no network. pictures: PNG, by name; they are put inside."""
    from markdown_it import MarkdownIt

    render = MarkdownIt("commonmark", {"html": False}).enable("table").render
    samples = _samples_part(report)
    shown = _sample_table(report.samples, report.task)
    parts = [shown if part == samples else render(part) for part in _parts(report) if part]
    body = "\n".join(parts)
    for tags in (DETAILS, DETAILS_END):
        body = body.replace(f"<p>{escape(tags)}</p>", tags)
    for name, png in pictures.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(png).decode()}"')
    title = escape(f"{_model_name(report)}, compressed")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    return f"<!doctype html>\n<html lang=en><head>{head}<style>{STYLE}</style></head>\n<body>\n{body}</body></html>\n"


def _sample_table(samples: Sequence[Sample], task: Task) -> str:
    """Teacher and student side by side, as HTML."""
    rows = [("prompt", "teacher", "student"), *((s.prompt, s.teacher or "–", s.student) for s in samples)]
    cells = ["".join(f"<td class=text>{escape(text)}</td>" for text in row) for row in rows]
    return f"<h2>Samples</h2><p>{MADE[task]}</p><table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def card(report: Report) -> str:
    """README.md of the deployed folder, as model hubs read it: what it was made from, how large, fast and good it is, how to
    run it."""
    base = str(report.recipe.get("model", {}).get("path", ""))
    torch = _in_torch(report)
    library = "transformers" if torch else "onnxruntime"
    front = {
        "library_name": library,
        "pipeline_tag": report.task,
        "tags": ["compressed", "bitsandbytes" if torch else "onnx"],
    }
    front |= {"base_model": base} if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base) else {}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_model_name(report)}, compressed",
        headline(report),
        _asked(report),
        _rows_table(report),
        re.sub(r"!\[.*?\]\(.*?\)\n\n", "", _plan_part(report)),
        _run_part(report),
        "Licence and terms of use are those of the model that it was made from.",
        _measured_part(report),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _in_torch(report: Report) -> bool:
    return report.recipe.get("target", {}).get("runtime") == "torch"


def _writes(report: Report) -> bool:
    return report.task in ("text-generation", "text2text-generation")


def _run_part(report: Report) -> str:
    encoder = report.task == "text2text-generation"
    load = LOAD.format(read="token ids of texts and, as ~id, of targets" if encoder else "token ids")
    load = load.replace("[B, L, V]", "[B, classes]") if report.task == "text-classification" else load
    load = load.replace("logits [B, L, V]", "embeddings [B, D]") if report.task == "sentence-similarity" else load
    parts = ["## How to run", *([WRITE] if _writes(report) else []), load]
    if report.task == "text-generation" and not _in_torch(report):
        parts.append(GENAI)
    if encoder:
        parts.append(THREE)
    elif not _in_torch(report):
        others = "optimum"
        if _writes(report):
            others = "ONNX Runtime GenAI, transformers.js and, if no attention was pruned, optimum"
        if report.task == "sentence-similarity":
            others = (
                'sentence-transformers (`SentenceTransformer("FOLDER", backend="onnx")`), transformers.js and optimum'
            )
        parts.append(f"`model.onnx` runs in ONNX Runtime, and with {others}.")
    return "\n".join([*parts, PLAN_HERE])


def summary(report: Report) -> str:
    """The beginning of the page: what was asked for and what came out; Markdown without pictures."""
    return "\n\n".join(part for part in _first_parts(report) if part)


def _first_parts(report: Report) -> list[str]:
    return [
        f"# {_model_name(report)}, compressed",
        f"**{headline(report)}**{verdict(report)}",
        _asked(report),
        "## What came out",
        _rows_table(report),
        _budget_part(report),
        _gate_part(report),
    ]


def _parts(report: Report) -> list[str]:
    return [
        *_first_parts(report),
        _plan_part(report),
        _sites_part(report),
        _search_part(report),
        _finalists_part(report),
        _recovery_part(report),
        _samples_part(report),
        _measured_part(report),
        _stages_part(report),
        _reproduce_part(report),
    ]


def _model_name(report: Report) -> str:
    path = str(report.recipe.get("model", {}).get("path", "model"))
    return path if path.count("/") == 1 else path.rstrip("/").rsplit("/", 1)[-1]


def verdict(report: Report) -> str:
    """Whether the budget was kept and the gate passed, as sentences behind the headline."""
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
    limits = [f"{AXES[line.name][0]} at most {AXES[line.name][1](line.limit)}" for line in report.budget]
    search, environment = report.recipe.get("search", {}), report.environment
    workload = report.recipe.get("target", {}).get("workload", {})
    threads = f"{environment.cpu} with {environment.threads} thread{'s' if environment.threads != 1 else ''}"
    sentence = (
        f"Asked for: {' and '.join(limits) or 'no limit'}, on {environment.gpu or threads} ({environment.provider})"
    )
    if workload:
        sentence += f", for a prompt of {workload['prefill']} tokens"
        sentence += f" and decoding after {workload['context']}" if _writes(report) else ""
    if search:
        sentence += f". Searched by `{search['policy']}`, {search['evaluations']} evaluations a policy"
    return sentence + "."


def _rows_table(report: Report) -> str:
    base = report.row("reference")

    def timing(value: Timing | None, reference: Timing | None) -> str:
        if value is None:
            return "–"
        return f"{milliseconds(value.median)}{ratio(value.median, median_of(reference))}"

    rows, grades = [], _grades(report)
    for row in report.rows:
        name = f"**{row.name}**" if row.role == "student" else row.name
        compared = base if base is not None and row is not base and row.role != "teacher" else None
        rows.append(
            (
                name,
                *([] if report.task == "sentence-similarity" else [number(row.perplexity)]),
                number(row.kl),
                *(number(getattr(row, key)) for key in grades),
                size(row.size_bytes) + ratio(row.size_bytes, compared.size_bytes if compared else None),
                timing(row.prefill_ms, compared.prefill_ms if compared else None),
                timing(row.decode_ms, compared.decode_ms if compared else None),
                size(row.peak_memory_bytes),
            )
        )
    losses = ("KL to teacher",) if report.task == "sentence-similarity" else ("perplexity", "KL to teacher")
    head = ("model", *losses, *grades.values(), "size", "prefill", "decode, a token", "peak memory")
    note = f"Ratios in parentheses refer to {base.name}. " if base else ""
    text = table(head, rows) + f"\n\n{note}Perplexity and KL (nats per token) are on text that nothing saw before."
    if report.task == "sentence-similarity":
        text = text.replace("Perplexity and KL (nats per token) are", "KL (nats per text) is")
    names = list(report.rows[0].texts) if report.rows else []
    if names:
        found = [(row.name, [row.texts[name] for name in names]) for row in report.rows if row.texts]
        figures = ("perplexity", "kl", *(grades or ("bits_per_byte",)))[len(losses) == 1 :]
        by_text = [
            (name, *(", ".join(number(getattr(t, figure)) for figure in figures) for t in texts))
            for name, texts in found
        ]
        what = ", ".join(grades.values()) or "bits for every byte"
        said = "KL" if len(losses) == 1 else "perplexity, KL"
        text += f"\n\nBy text: {said}, {what}:\n\n" + table(("model", *names), by_text)
    return text


def _grades(report: Report) -> dict[str, str]:
    """What a task has beside perplexity and KL: key of a row -> its name."""
    if report.task == "sentence-similarity":
        return {"accuracy": "nearest kept"}
    return {"accuracy": "accuracy", "f1": "F1"} if report.task == "text-classification" else {}


def _budget_part(report: Report) -> str:
    if not report.budget:
        return ""
    rows = []
    for line in report.budget:
        what, show, _ = AXES[line.name]
        error = "–"
        if line.measured is not None and line.predicted:
            error = f"{100 * (line.measured / line.predicted - 1):+.1f}%"
        kept = "yes" if line.fits else "**no**"
        predicted = show(line.predicted) + (f" ± {line.error / line.predicted:.1%}" if line.error else "")
        rows.append((what, show(line.limit), predicted, show(line.measured), error, kept))
    head = ("budget", "limit", "predicted", "measured", "measured against predicted", "kept")
    text = "### Budget: predicted and measured\n\n" + table(head, rows)
    if any(line.error for line in report.budget):
        text += (
            "\n\nTimes are predicted by a table of single sites, corrected by whole models with random weights: random "
            "plans, and those that a search would take, timed before it, and what it found, timed behind it."
        )
    return text


def _gate_part(report: Report) -> str:
    rows: list[tuple[str, ...]] = []
    for line in report.gate:
        what, show, _ = AXES[line.name]
        what += "" if line.baseline is None else f" (baseline {show(line.baseline)})"
        rows.append((what, show(line.limit), show(line.measured), "passed" if line.passed else "**failed**"))
    if report.parity:
        parity = report.parity
        result = "passed" if parity.passed else "**failed**"
        rows.append(("export parity, relative error", number(parity.tolerance), number(parity.relative_error), result))
    if not rows:
        return ""
    text = "### Gate\n\n" + table(("gate", "limit", "measured", "result"), rows)
    if report.parity:
        kinds = {
            "fill-mask": "The most likely tokens",
            "text-classification": "Classes",
            "sentence-similarity": "The nearest texts",
        }
        what = kinds.get(report.task, "Greedily decoded tokens")
        same = "the same" if report.parity.greedy_equal else "not the same"
        text += (
            f"\n\n{what} are {same} from the deployed folder and from torch. Both compute in float32 here, without "
            "rounding activations; the rounding of the deployed kernels changes the logits by "
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
    text = "## The plan\n\n![Kept fraction and format of every block](plan.png)\n\n"
    text += table(("format", "sites", "stored"), rows) + "\n\n"
    return text + (f"Dropped sub-layers: {', '.join(dropped)}." if dropped else "No sub-layer is dropped.")


def _sites_part(report: Report) -> str:
    if not report.plan:
        return ""
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
    text = (
        "Sensitivity: KL that this action alone was expected to cost before any plan was scored. Next better: the action "
        "of less expected KL that takes the least more of the budget, and what it would have cost."
    )
    if same:
        text += (
            f" Same: share of the policy's searches, one a seed, whose best plan decides so too; {fmean(same):.0%} "
            "in the mean. Where it is low, the action hardly matters, or the search was too short."
        )
    head = ["site", "kept", "format", "stored", "sensitivity", "next better", *(["same"] if same else [])]
    return f"{text}\n\n{DETAILS}\n\n{table(head, detail)}\n\n{DETAILS_END}"


def _alternative(found: Alternative | None) -> str:
    """`384:w8: +1.3 MB, +0.2 ms prefill, sensitivity 0.0004`."""
    if found is None:
        return "–"
    told = []
    for name, extra in found.extra.items():
        what, show, _ = AXES[name]
        told.append(f"{'+' if extra >= 0 else '−'}{show(abs(extra))}" + ("" if name == "bytes" else f" {what}"))
    return f"{found.action}: {', '.join(told)}, sensitivity {number(found.sensitivity)}"


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
        + _reused_part(report)
        + "\n\nA policy that has fewer plans to offer than it may evaluate keeps its best."
        + _corrected_part(report)
        + "\n\n"
        + "![KL against size and latency](quality.png)"
    )


def _corrected_part(report: Report) -> str:
    """What the searches are that went on behind the others."""
    if not any(trial.policy.endswith(CORRECTED) for trial in report.trials):
        return ""
    return (
        f" *{CORRECTED.strip(', ')}*: the best plans turned out too slow as whole models, so the search went on for a few "
        "evaluations, knowing that."
    )


def _reused_part(report: Report) -> str:
    """Where the student's plan comes from, if no policy of this run asked for it."""
    asked = report.chosen.digest in {trial.digest for trial in report.trials}
    if asked or not report.recipe.get("search", {}).get("reuse"):
        return ""
    return "\n\nThe student's plan is none of these: the earlier run that `search.reuse` names had found it."


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

    parts = ["## Samples", MADE[report.task]]
    for sample in report.samples:
        parts.append(f"### {' '.join(sample.prompt.split())} …")
        if sample.teacher is not None:
            parts.append(f"*teacher*\n{quoted(sample.teacher)}")
        parts.append(f"*student*\n{quoted(sample.student)}")
    return "\n\n".join(parts)


def _measured_part(report: Report) -> str:
    environment = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    devices = ", ".join(name for name in (environment.gpu, environment.cpu, environment.machine) if name)
    where = f"{devices}; {environment.threads} threads, {environment.provider}; {versions}."
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
        text += "\n\nWhere the medians lie:\n\n" + table(("model", "prefill", "decode, a token"), spreads)
    return text


def _stages_part(report: Report) -> str:
    if not report.stage_seconds:
        return ""
    total = sum(report.stage_seconds.values())
    rows = [(_stage(name), f"{seconds:.1f} s") for name, seconds in report.stage_seconds.items()]
    return table(("stage", "time"), [*rows, ("**all**", f"**{total:.1f} s**")])


STAGES = {
    "searched": "searched plan {}, timed whole",
    "search-on": "search, going on with corrected times, {}",
    "reconstruct": "reconstruction of plan {}",
}
"""Stages of which there are several, by what their names begin with."""


def _stage(name: str) -> str:
    """`searched-2` -> `searched plan 2, timed whole`; `reconstruct-ec21ba` -> `reconstruction of plan ec21ba`."""
    for kind, words in STAGES.items():
        if name.startswith(f"{kind}-"):
            return words.format(name.removeprefix(f"{kind}-"))
    return name.replace("-", " ")


def _reproduce_part(report: Report) -> str:
    recipe = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
    return (
        "## How to reproduce\n\nSave this as `recipe.yaml` and run `compress recipe.yaml`. Every number of this page is "
        f"in `report.json`.\n\n```yaml\n{recipe.strip()}\n```"
    )
