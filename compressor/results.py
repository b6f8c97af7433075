"""The last stage: measures what was exported, checks it against torch, and gathers everything into a report."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from math import ceil, isfinite, log2
from pathlib import Path

import numpy as np
import torch

from compressor import measure, report
from compressor.errors import ModelError
from compressor.files import digest
from compressor.gate import against_limits
from compressor.latency import Latency
from compressor.measure import Times, opened, opened_torch, peak_memory_bytes, time_models
from compressor.network import Network, loaded
from compressor.plan import Plan
from compressor.recover import Finalist, Recovery
from compressor.run import Run
from compressor.runtimes import Deployed, runtime
from compressor.search import Searches, best, label, spent
from compressor.stages import key_of
from compressor.student import Decoder
from compressor.text import compared, predictions, tokens_digest
from compressor.transformer import NEARNESS, Sides
from eval.perplexity import Logits, Quality, compare
from policies import Problem

SAMPLE_TOKENS = 32
"""Greedy tokens of a sample; torch and ONNX Runtime must agree on them."""

PARITY_TOKENS = 128
"""Tokens whose logits are compared; few, since kernels without rounding are slow."""

PROMPT_TOKENS = 24
"""Tokens of the evaluation text that a sample goes on from."""

ROLES: dict[str, tuple[str, str]] = {
    "teacher": ("teacher, torch fp32", "teacher"),
    "fp32": ("teacher, deployed fp32", "reference"),
    "uniform": ("uniform plan", "rival"),
    "student": ("student", "student"),
}
"""Rows of the report: key -> (name, role)."""


def collect(
    run: Run,
    problem: Problem,
    latency: Latency,
    trials: Searches,
    chosen: Sequence[Finalist],
    recovery: Recovery,
    folders: dict[str, Path],
) -> report.Report:
    """Measure the exported folders and write down what the run found."""
    student = recovery.student
    run.bank.forget()  # models are opened now
    models = {**folders, **latency.folders}
    files = {key: _digests(run, folder) for key, folder in models.items()}  # what changed is measured again
    made_of = key_of(run.target.environment, run.bank.key, {key: files[key] for key in folders})
    quality = _quality(run, folders, made_of)
    times = _times(run, models, key_of(made_of, files))
    memory = _memory(run, folders, made_of)
    shown = key_of(made_of, tokens_digest(run.texts.evaluation_NL[:2]))
    parity = _parity(run, student.plan, folders["student"], shown)
    samples = _samples(run, folders["student"], shown)
    overall = {key: Quality.mean(list(by_text.values())) for key, by_text in quality.items()}
    rows = _rows(run, latency, folders, quality, overall, times, memory)
    policy = run.recipe.search.policy
    return report.Report(
        environment=_environment(run, folders["student"]),
        recipe=run.recipe.to_dict(),
        protocol=_protocol(run),
        rows=rows,
        budget=_budget(run, problem, latency, student.plan, times, _size(run, folders["student"])),
        trials=_trials(problem, trials, run.teacher.network.decoder.causal),
        plan=_plan(problem, student.plan, [best(told)[0] for (name, _), told in trials.items() if name == policy]),
        finalists=tuple(
            report.Finalist(f.plan.digest, f.kl, f.recovered_kl, len(f.plan.diff(student.plan)))
            for f in chosen
            if f.recovered_kl is not None
        ),
        recovery=_recovery(recovery, run.recipe.distill.method),
        parity=parity,
        samples=samples,
        stage_seconds=dict(run.stages.seconds),
        gate=against_limits(rows, run.recipe.gate),
        task=_task(run.teacher.network.decoder),
    )


# Measuring ------------------------------------------------------------------------------------------------------------


def _quality(run: Run, folders: dict[str, Path], made_of: str) -> dict[str, dict[str, Quality]]:
    """Perplexity and KL on every evaluation text, each model as it is deployed: model -> text -> quality."""
    teacher, texts = run.teacher.network.window_logits, run.texts.evaluation
    classes = run.teacher.network.decoder.classes

    def make(progress: Callable[..., None]) -> dict[str, dict[str, dict[str, float]]]:
        found: dict[str, dict[str, dict[str, float]]] = {key: {} for key in ("teacher", *folders)}
        # where memory is short one model is open at a time
        together = [[key] for key in folders] if run.teacher.network.layerwise else [list(folders)]
        windows, done = len(run.texts.evaluation_NL) * len(together), 0
        for keys in together:
            with ExitStack() as opened_now:
                decoders = {key: opened_now.enter_context(_open(run, folders[key])) for key in keys}
                models = {key: reading(run.teacher.network, decoder.logits) for key, decoder in decoders.items()}
                for name, text_NL in texts.items():
                    shown = partial(_shifted, progress, done, windows)
                    told = compare(teacher, models, text_NL.numpy(), shown, predictions, classes)
                    for key, quality in told.items():
                        found[key][name] = asdict(quality)
                    done += len(text_NL)
        for key, by_text in found.items():
            if not all(isfinite(quality["perplexity"]) for quality in by_text.values()):
                raise ModelError(
                    f"expected finite logits, those of {ROLES[key][0]} in {run.target.precision} are not; its activations "
                    "are too large for it: set target.precision: float32"
                )
        return found

    key = key_of(made_of, list(texts), tokens_digest(run.texts.evaluation_NL))
    stored = run.stages.value("quality", key, make)
    return {model: {name: Quality(**q) for name, q in by_text.items()} for model, by_text in stored.items()}


def _open(run: Run, folder: Path, exact: bool = False) -> Deployed:
    return runtime(run.target.runtime).open_model(folder, run.target.device, run.target.threads, exact=exact)


def _digests(run: Run, folder: Path) -> list[str]:
    return [digest(path) for path in runtime(run.target.runtime).exported_files(folder)]


def _size(run: Run, folder: Path) -> int:
    return runtime(run.target.runtime).exported_bytes(folder)


def reading(network: Network, logits: Callable[[np.ndarray], np.ndarray]) -> Logits:
    """Logits of a deployed model, which is given what the network reads of a window."""
    return lambda ids_L: network.told(logits(network.seen(network.written(torch.from_numpy(ids_L))).cpu().numpy()))


def _shifted(progress: Callable[..., None], before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _times(run: Run, folders: Mapping[str, Path], made_of: str) -> dict[str, Times]:
    def make(progress: Callable[..., None]) -> dict[str, dict]:
        whole = not run.teacher.network.layerwise
        models = {"teacher": partial(opened_torch, run.teacher.network, run.target)} if whole else {}
        models |= {key: partial(opened, folder, run.target) for key, folder in folders.items()}
        return {key: asdict(times) for key, times in time_models(models, progress=progress).items()}

    return {name: Times.from_dict(found) for name, found in run.stages.value("timing", made_of, make).items()}


def _memory(run: Run, folders: dict[str, Path], made_of: str) -> dict[str, int]:
    def make(progress: Callable[..., None]) -> dict[str, int]:
        return {key: peak_memory_bytes(folder, run.target) for key, folder in folders.items()}

    return run.stages.value("memory", made_of, make)


def _parity(run: Run, plan: Plan, folder: Path, made_of: str) -> report.Parity:
    """Logits and text of ONNX Runtime against the folder's weights in torch, both without the rounding of activations (see
    `compressor.export.exact`); and what that rounding does to the logits of the deployed graph."""
    teacher = run.teacher.network
    window_L = teacher.seen(teacher.written(run.texts.evaluation_NL[0])).cpu()
    window_L = window_L if teacher.decoder.encoder else window_L[:PARITY_TOKENS]
    where = compared(window_L)

    @torch.no_grad()
    def make(progress: Callable[..., None]) -> dict:
        network = loaded(teacher, runtime(run.target.runtime).read_student(folder, teacher.decoder, plan), "none")
        expected_LV = network.window_logits(window_L.numpy()).cpu().numpy()

        def error(model: Deployed) -> float:
            found_LV = teacher.told(model.logits(window_L.numpy())).numpy(force=True)
            return _relative_error(found_LV[where], expected_LV[where])

        prompts = _prompts(run)
        with _open(run, folder, exact=True) as exact:
            found = {"error": error(exact)}
            texts = [_text(run, exact, prompt) for prompt in prompts]
        progress(1, 2)
        equal = all(_agrees(run, network, prompt, text) for prompt, text in zip(prompts, texts, strict=True))
        with _open(run, folder) as deployed:
            return {**found, "equal": equal, "rounding": error(deployed)}

    found = run.stages.value("parity", made_of, make)
    return report.Parity(found["error"], found["equal"], run.recipe.export.parity_tolerance, found["rounding"])


def _samples(run: Run, folder: Path, made_of: str) -> tuple[report.Sample, ...]:
    """What the teacher and the deployed student make of some prompts."""
    teacher = run.teacher.network

    @torch.no_grad()
    def make(progress: Callable[..., None]) -> list[dict]:
        made = []
        with _open(run, folder) as deployed:
            for prompt in _prompts(run):
                # a token of a teacher that is not in memory takes as long as all of a window
                theirs = None if teacher.layerwise else _named(run, _text(run, teacher, prompt))
                ours = _named(run, _text(run, deployed, prompt))
                sample = report.Sample(run.teacher.tokenizer.decode(prompt), theirs, ours)
                made.append(asdict(sample))
        return made

    return tuple(report.Sample(**texts) for texts in run.stages.value("samples", made_of, make))


def _prompts(run: Run) -> list[torch.Tensor]:
    """What samples go on from."""
    network = run.teacher.network
    return [_prompt(network, network.written(window_L)) for window_L in run.texts.evaluation_NL[:2]]


def _prompt(network: Network, window_L: torch.Tensor) -> torch.Tensor:
    """What a sample goes on from: the beginning of a window, or all of it that an encoder or a classifier reads."""
    if network.decoder.encoder:
        return Sides.of(network.decoder, window_L[None]).source_BS[0]
    return network.seen(window_L if network.decoder.classes else window_L[:PROMPT_TOKENS]).cpu()


def _text(run: Run, model: Network | Deployed, prompt_L: torch.Tensor) -> list[int]:
    """What a model makes of a prompt: a greedy continuation or answer, the most likely token at every position, or the text's
    class."""
    if not run.teacher.network.decoder.causal:
        network = run.teacher.network
        logits = model.window_logits if isinstance(model, Network) else lambda ids_L: network.told(model.logits(ids_L))
        return logits(prompt_L.numpy()).argmax(-1).tolist()
    ends = run.teacher.network.ends()
    if isinstance(model, Network):
        return model.greedy(prompt_L, SAMPLE_TOKENS, ends)
    return model.generate(prompt_L.numpy(), SAMPLE_TOKENS, ends)


def _agrees(run: Run, network: Network, prompt_L: torch.Tensor, text: list[int]) -> bool:
    """Whether a network makes this text of a prompt; of a decoder, whether it would say every token of it behind those
    before, which takes one pass."""
    if not network.decoder.causal or network.decoder.encoder:
        return text == _text(run, network, prompt_L)
    whole_L = np.append(prompt_L.numpy(), text)
    return network.window_logits(whole_L)[len(prompt_L) - 1 : -1].argmax(-1).tolist() == text


def _named(run: Run, made: list[int]) -> str:
    """What a model made, in words."""
    network, tokenizer = run.teacher.network, run.teacher.tokenizer
    if network.decoder.pooling:
        text_L = network.written(network.seen(run.texts.anchors_NL[made[0]])).cpu()
        return tokenizer.decode(text_L, skip_special_tokens=True)
    return network.configuration[0].id2label[made[0]] if network.decoder.classes else tokenizer.decode(made)


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


# Writing down ---------------------------------------------------------------------------------------------------------


def _rows(
    run: Run,
    latency: Latency,
    folders: dict[str, Path],
    quality: dict[str, dict[str, Quality]],
    overall: dict[str, Quality],
    times: dict[str, Times],
    memory: dict[str, int],
) -> tuple[report.Row, ...]:
    sizes = {"fp32": latency.fp32_bytes} | {key: _size(run, folder) for key, folder in folders.items()}
    sizes["teacher"] = run.teacher.network.weight_bytes()
    decoder = run.teacher.network.decoder
    goes_on = decoder.causal and not decoder.encoder  # else what is predicted is not the text
    tokens_a_byte = {
        text: _tokens_a_byte(run, text_NL[:, 1:]) if goes_on else None for text, text_NL in run.texts.evaluation.items()
    }
    rows = []
    for key, (name, role) in ROLES.items():
        row = report.Row(name=name, role=role, size_bytes=sizes[key], peak_memory_bytes=memory.get(key))  # type: ignore[arg-type]
        if key in quality:
            by_text = {text: _text_quality(found, tokens_a_byte[text]) for text, found in quality[key].items()}
            perplexity, kl = overall[key].perplexity, None if key == "teacher" else overall[key].kl
            row = replace(row, perplexity=perplexity, kl=kl, texts=by_text)
            row = replace(row, accuracy=overall[key].accuracy, f1=overall[key].f1)
        if key in times:
            decode = _timing(times[key].decode) if decoder.causal else None
            row = replace(row, prefill_ms=_timing(times[key].prefill), decode_ms=decode)
        rows.append(row)
    return tuple(rows)


def _tokens_a_byte(run: Run, predicted_NL: torch.Tensor) -> float | None:
    """Tokens for every byte of their text; None where that is empty. A byte of a letter that a window cuts in two is decoded
    to U+FFFD, which has three."""
    written = "".join(run.teacher.tokenizer.batch_decode(predicted_NL))
    size = len(written.encode()) - 2 * written.count("\ufffd")
    return predicted_NL.numel() / size if size else None


def _text_quality(quality: Quality, tokens_a_byte: float | None) -> report.TextQuality:
    bits = None if tokens_a_byte is None else log2(quality.perplexity) * tokens_a_byte
    return report.TextQuality(quality.perplexity, quality.kl, bits, quality.accuracy, quality.f1)


def _timing(spread: measure.Spread) -> report.Timing:
    return report.Timing(spread.median_ms, spread.low_ms, spread.high_ms)


def _budget(
    run: Run, problem: Problem, latency: Latency, plan: Plan, times: dict[str, Times], size: int
) -> tuple[report.BudgetLine, ...]:
    """Predicted beside measured. A machine may have got faster or slower since the table was made, so relative limits are of
    the fp32 export as it is now, and predictions are at the pace at which models run now."""
    budget, student = run.recipe.budget, times["student"].medians
    fp32 = times["fp32"].medians if "fp32" in times else latency.fp32_ms
    model = latency.at({name: times[name].medians for name in latency.folders}).model
    predicted, error = model.predict(plan), model.error(plan)
    entries = [
        ("bytes", budget.bytes, latency.fp32_bytes, problem.cost(problem.indices(plan))["bytes"], size, 0.0),
        ("prefill", budget.prefill, fp32.prefill, predicted.prefill, student.prefill, error.prefill),
        ("decode", budget.decode, fp32.decode, predicted.decode, student.decode, error.decode),
    ]
    lines = []
    for name, limit, reference, expected, measured, known_to in entries:
        if limit is not None:
            most = limit.resolve(reference)
            line = report.BudgetLine(name, most, expected, measured, measured <= most, known_to)  # type: ignore[arg-type]
            lines.append(line)
    return tuple(lines)


def _trials(problem: Problem, trials: Searches, causal: bool) -> tuple[report.Trial, ...]:
    found = []
    for (name, seed), told in trials.items():
        policy = label(name, seed, trials)
        for (plan, score), after in zip(told, spent(told), strict=True):
            cost = problem.cost(problem.indices(plan))
            times = cost["prefill_ms"], cost["decode_ms"] if causal else None
            figures = (score.kl, score.perplexity, round(cost["bytes"]), *times)
            found.append(report.Trial(policy, ceil(after - 1e-9), *figures, plan.digest, score.share))
    return tuple(found)


def _plan(problem: Problem, plan: Plan, found: Sequence[Plan]) -> tuple[report.PlanEntry, ...]:
    """found: the best plan of every search of the policy, of which there may be one."""
    entries = []
    for place, (site, index) in enumerate(zip(problem.sites, problem.indices(plan), strict=True)):
        action, expected = plan[site.name], float(problem.sensitivity[place][index])
        shape = (action.keep, site.units, action.format)
        better = _next_better(problem, place, int(index))
        same = sum(other[site.name] == action for other in found) / len(found) if len(found) > 1 else None
        entries.append(
            report.PlanEntry(site.name, site.kind, site.layer, *shape, site.size_bytes(action), expected, better, same)
        )
    return tuple(entries)


def _next_better(problem: Problem, place: int, index: int) -> report.Alternative | None:
    """Of the actions from which less KL is expected, the one that takes the least more of the budgets."""
    menu, sensitivity = problem.actions[place], problem.sensitivity[place]
    (better,) = np.nonzero(sensitivity < sensitivity[index])
    if not len(better):
        return None
    share_AD = problem.share_SAD[place]
    more = (share_AD[better] - share_AD[index]).max(-1)
    found = int(better[more.argmin()])
    costs = {name: problem.costs[name][place] for name in ("bytes", *problem.budgets)}
    extra = {name.removesuffix("_ms"): float(cost_A[found] - cost_A[index]) for name, cost_A in costs.items()}
    return report.Alternative(str(menu[found]), float(sensitivity[found]), extra)


def _recovery(recovery: Recovery, method: str) -> report.Recovery | None:
    if recovery.kl is None:
        return None
    assert recovery.kl_before is not None
    training: report.Training | None = None
    if curve := recovery.curve:
        told, held_out = [{}, *curve.training], dict(curve.held_out)
        points = tuple(report.TrainingPoint(i, one, held_out.get(i)) for i, one in enumerate(told))
        training = report.Training(method, curve.decides, curve.kept_step, points)
    return report.Recovery(recovery.kl_before, recovery.kl_reconstructed, recovery.kl, training)


def _task(decoder: Decoder) -> report.Task:
    if decoder.encoder:
        return "text2text-generation"
    if decoder.pooling:
        return "sentence-similarity"
    if decoder.classes:
        return "text-classification"
    return "text-generation" if decoder.causal else "fill-mask"


def _environment(run: Run, folder: Path) -> report.Environment:
    def find() -> str:
        with _open(run, folder) as decoder:
            return decoder.provider

    provider = run.stages.kept("provider", key_of(run.target.environment), find)
    threads = run.target.threads or measure.cores()
    gpu = measure.gpu() if run.target.device == "cuda" else None
    return report.Environment(platform.platform(), measure.processor(), threads, provider, measure.versions(), gpu)


def _protocol(run: Run) -> str:
    count, length = run.texts.evaluation_NL.shape
    target, task = run.target, _task(run.teacher.network.decoder)
    causal = run.teacher.network.decoder.causal
    predicted = {
        "text-generation": "every token but a window's first predicted from those before it",
        "text2text-generation": "every token of a window's target predicted from the source and the target before it",
        "fill-mask": "some tokens of every window masked, and these predicted from all that is not (pseudo-perplexity)",
        "text-classification": "one text in each, as much of it as fits, and its class predicted",
        "sentence-similarity": "one text in each, as much of it as fits, and the nearest of "
        f"{len(run.texts.anchors_NL)} other texts predicted: logits are cosines over {NEARNESS}, and what is right is what "
        "the teacher takes for the nearest",
    }[task]
    times = f"Prefill: {target.prefill_tokens} tokens" + {
        "text-generation": " into an empty cache, to the logits of the last. ",
        "text2text-generation": " through the encoder, to the logits of an answer's first. ",
    }.get(task, ", to all that is predicted. ")
    if causal:
        times += f"Decode: one token behind {target.context} cached ones. "
    return (
        f"Perplexity and KL: {count} windows of {length} tokens that do not overlap, as many of each evaluation text "
        f"({', '.join(run.texts.evaluation)}), {predicted}; each row but the first as it is deployed, in "
        f"{target.precision}. {times}"
        "Times: median of the rounds' medians, models in alternation, and where the true median lies (93%). Peak memory: "
        f"growth of resident memory in a fresh process over loading, one prefill{' and 8 decoded tokens' if causal else ''}."
    )
