"""The main job, top to bottom:

recipe -> teacher, text -> bank -> sensitivities, latency -> search -> student, recovered -> ONNX -> measured report

Every stage keeps its result in the run's folder under a key of what it was made from, so the same call goes on where
the last one stopped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from compressor import actions, gate, page, report, results
from compressor.bank import MEMORY_BYTES, Bank
from compressor.errors import BudgetError, DataError, ModelError, RecipeError
from compressor.estimate import check_bytes, layer_by_layer, runnable
from compressor.executor import Executor, Reference
from compressor.files import exclusive, take_over, write_bytes_atomic, write_text_atomic
from compressor.folder import save_folder
from compressor.latency import CORRECTIONS, Latency, corrected, measure_latency
from compressor.ledger import Ledger, comparable_entries
from compressor.measure import Target, available_bytes, return_memory_at_once
from compressor.model import Teacher, load_teacher, read_decoder
from compressor.network import Network
from compressor.plan import PARTS, ActionMenu, Plan, menu_json
from compressor.progress import ProgressCallback, silent
from compressor.recipe import Recipe
from compressor.recovery import distill, on_policy, reinforce
from compressor.recovery.cache import TeacherCache
from compressor.recovery.distill import visited
from compressor.recovery.reconstruct import reconstruct
from compressor.recovery.reward import Judge, Reward, check_rewards
from compressor.recovery.rollouts import Writer
from compressor.recovery.trained import LEARNING_RATES
from compressor.runtimes import runtime
from compressor.search import Scorer, Trials, best, build_problem, complete, finalists, label, run_policy
from compressor.sensitivity import noise_coefficients, sensitivities
from compressor.stages import Stages, key_of
from compressor.student import Decoder, Student
from compressor.text import (
    Labelling,
    Marking,
    Masking,
    Spans,
    load_prompts,
    load_tokens,
    plain,
    prompts_of,
    tokens_digest,
)
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
    recipe.check_files()
    if recipe.distill.method == "rl":
        check_rewards(recipe.distill.rl.rewards, rewards)
    earlier = gate.read_report(recipe.gate.baseline) if recipe.gate.baseline else None
    with exclusive(out):
        run = start(recipe, out, trust_remote_code, Stages(out / "stages", progress), rewards)
        known, memory = reused(run)
        sensitivity = find_sensitivities(run)
        latency = measure_latency(run)
        latency = corrected(run, latency, lambda latency: obvious_plan(run, sensitivity, latency), CORRECTIONS[0])
        problem = pose(run, sensitivity, latency)
        fitting = [trial for trial in known if problem.fits(problem.indices(trial[0]))]
        trials = search(run, problem, fitting, memory if 2 * len(fitting) <= len(known) else None)
        scored = complete([*trials.values(), fitting])
        latency = corrected(run, latency, lambda latency: next(iter(within(run, latency, scored))), CORRECTIONS[1])
        chosen = choose(run, within(run, latency, scored))
        recovery = recover(run, chosen[0].plan, recipe.distill.steps)
        folders = export(run, problem, trials, recovery.student)
        result = results.collect(run, problem, latency, trials, chosen, recovery, folders)
        try:
            lines = gate.every_line(result, earlier, recipe.gate.tolerance.model_dump(), recipe.gate.times)
            result = replace(result, gate=lines)
        finally:  # what was measured is written, whether it can be compared or not
            page.write(result, out)
            write_text_atomic(out / recipe.deployed / "README.md", page.card(result))
        gate.require(result, result.gate)
        return result


# Before the search ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Windows of token ids, [N, L] each: scoring plans, deciding what recovery keeps, statistics, reconstruction, training
    (others than those that were fitted, if the text has more), and the texts that nothing sees before the end, by name and as
    many of each; then those that an embedder compares all others with."""

    score_NL: Tensor
    held_out_NL: Tensor
    calibration_NL: Tensor
    fitted_NL: Tensor
    trained_NL: Tensor
    evaluation: dict[str, Tensor]
    anchors_NL: Tensor

    @classmethod
    def read(cls, recipe: Recipe, tokenizer, marking: Marking | None = None, anchors: int = 0) -> Texts:
        """The calibration text gives `anchors`, scoring and held-out windows first, then the rest. Scoring windows are cut
        where it takes that for every part to have one."""
        data, tokens = recipe.data, recipe.search.tokens
        held_out = tokens // data.sequence_length
        count = max(held_out, PARTS)
        total = data.calibration_tokens + (anchors + count + held_out) * data.sequence_length
        load = partial(
            load_tokens,
            tokenizer=tokenizer,
            sequence_length=data.sequence_length,
            marking=marking,
            target_length=data.said_length,
        )
        more = partial(load, data.calibration)
        to_lower = f"data.calibration_tokens = {data.calibration_tokens} or search.tokens = {tokens}"
        counted = f"{to_lower} (these count twice: plans are scored, and recovery is judged, on other text)"
        windows_NL = more(tokens=total, asked=counted)
        paired = any(source.target for source in data.calibration)
        # a part of such a window may predict nothing
        length = data.sequence_length if marking or paired else tokens // count
        anchors_NL, found_NL = windows_NL[:anchors], windows_NL[anchors:]
        score_NL, rest_NL = found_NL[:count, :length], found_NL[count:]
        fitted_NL = rest_NL[held_out:]
        if recipe.distill.tokens:
            fitted_NL = more(tokens=recipe.distill.tokens, spared_NL=windows_NL[: anchors + count + held_out])
        trained_NL = fitted_NL
        if training := recipe.distill.steps * recipe.batch_windows:
            fresh_NL = more(tokens=training * data.sequence_length, spared_NL=torch.cat([windows_NL, fitted_NL]))
            trained_NL = fresh_NL if len(fresh_NL) else fitted_NL
        each = data.evaluation_tokens // len(data.evaluation)
        every = f"data.evaluation_tokens = {data.evaluation_tokens}, of which every text gives as many"
        evaluation = {source.name: load([source], tokens=each, asked=every) for source in data.evaluation}
        return cls(score_NL, rest_NL[:held_out], rest_NL[held_out:], fitted_NL, trained_NL, evaluation, anchors_NL)

    def answered(self, embedder: Network) -> Texts:
        """The same, a text's class being the anchor that an embedder, which is told of them, finds the nearest."""

        def told(texts_NL: Tensor) -> Tensor:
            nearest_N = [embedder.window_logits(ids_L.numpy()).argmax().cpu() for ids_L in texts_NL]
            return torch.cat([~torch.stack(nearest_N)[:, None], texts_NL[:, 1:]], 1)

        embedder.compare_with(self.anchors_NL)
        return replace(
            self,
            score_NL=told(self.score_NL),
            held_out_NL=told(self.held_out_NL),
            evaluation={name: told(texts_NL) for name, texts_NL in self.evaluation.items()},
        )

    @property
    def evaluation_NL(self) -> Tensor:
        """All evaluation texts, one behind the other."""
        return torch.cat(list(self.evaluation.values()))


@dataclass(frozen=True)
class Run:
    """What all stages of one run share."""

    recipe: Recipe
    out: Path
    stages: Stages
    target: Target
    teacher: Teacher
    texts: Texts
    bank: Bank
    menu: ActionMenu
    rewards: Mapping[str, Reward]

    @property
    def comparable(self) -> str:
        """A key of what a plan's score depends on: runs that share it may use each other's scores."""
        return key_of(self.bank.key, tokens_digest(self.texts.score_NL), PARTS, menu_json(self.menu))

    @cached_property
    def executor(self) -> Executor:
        """Made when the first plan has to be scored: it holds a copy of the teacher."""
        return Executor(self.bank, self.texts.score_NL)


KEPT = ("bank/**/*", "latency.json", "stages/sensitivity-*.json")
"""What `search.reuse` takes over, since it doesn't depend on a budget; all of it is known by keys of what it was made from."""


def start(
    recipe: Recipe,
    out: Path,
    trust_remote_code: bool,
    stages: Stages,
    rewards: Mapping[str, Reward] = MappingProxyType({}),
) -> Run:
    """Load the teacher and the texts, and take the teacher's statistics.

    Raises:
        RuntimeTargetError: ONNX Runtime does not run on the target, or not in every format of the recipe.
        BudgetError: the smallest plan has more bytes than are budgeted.
    """
    target = Target.of(recipe.target)
    recipe, model = runnable(recipe, target), recipe.model
    if reuse := recipe.search.reuse:
        if Path(reuse).resolve() == out.resolve():
            raise RecipeError(
                f"search.reuse = {reuse}: expected the folder of another run, it is this one's; name another"
            )
        take_over(Path(reuse), out, KEPT)
    with stages.timed("teacher"):
        given: dict[str, Any] = {"gguf": model.gguf, "revision": model.revision, "trust_remote_code": trust_remote_code}
        decoder = replace(read_decoder(model.path, **given), precision=target.precision)
        check_bytes(recipe, decoder)
        layerwise = layer_by_layer(recipe, decoder)
        out.mkdir(parents=True, exist_ok=True)
        if layerwise:
            return_memory_at_once()
        teacher = load_teacher(model.path, **given, precision=target.precision, layerwise=out if layerwise else None)
        _check_asked(recipe, teacher.network.decoder)
        anchors = recipe.data.anchors if teacher.network.decoder.pooling else 0
        texts = Texts.read(recipe, teacher.tokenizer, _marking(recipe, teacher), anchors)
        highest = max(int(plain(teacher.network.seen(x)).max()) for x in (texts.score_NL, texts.evaluation_NL))
        if highest >= (vocabulary := teacher.network.decoder.vocabulary):
            raise ModelError(
                f"model.path = {model.path}: expected token ids below {vocabulary}, vocab_size of config.json, the tokenizer "
                f"gives {highest}; give the tokenizer that belongs to the model"
            )
        if torch.cuda.is_available() and not layerwise:  # wherever the student will run
            teacher.network.to("cuda")
        if anchors:
            texts = texts.answered(teacher.network)
    fisher_NL = texts.calibration_NL[: len(texts.held_out_NL)]
    kept = min(MEMORY_BYTES, available_bytes() // 16)
    bank = Bank(
        out / "bank",
        teacher.network,
        texts.calibration_NL,
        fisher_NL,
        recipe.search.quantizer,
        memory_bytes=kept,
    )
    with stages.timed("statistics", bank.key) as report_progress:
        bank.statistics(report_progress)
    menu = actions.menu(recipe.search, teacher.network.decoder.sites())
    return Run(recipe, out, stages, target, teacher, texts, bank, menu, rewards)


def _check_asked(recipe: Recipe, decoder: Decoder) -> None:
    """Raise RecipeError where a recipe asks of a model what only another kind does."""
    method, own_text = f"distill.method = {recipe.distill.method}", recipe.distill.own_text
    targets = [source.target for source in (*recipe.data.calibration, *recipe.data.evaluation) if source.target]
    kinds: dict[str, tuple[bool, dict[str, object]]] = {
        "a decoder alone, this one is an encoder-decoder": (
            bool(decoder.encoder),
            {
                method: own_text,
                f"distill.attention_weight = {recipe.distill.attention_weight}": recipe.distill.attention_weight,
                "target.runtime = torch": recipe.target.runtime == "torch",
            },
        ),
        "a model that writes, this one only reads": (
            not decoder.causal,
            {method: own_text, "budget.decode": recipe.budget.decode, "gate.decode": recipe.gate.decode},
        ),
        "a model with a head, this one is an embedder": (
            bool(decoder.pooling),
            {"target.runtime = torch": recipe.target.runtime == "torch"},
        ),
        "a classifier, this one is none": (not decoder.classes, {"gate.accuracy_ratio": recipe.gate.accuracy_ratio}),
        "an encoder-decoder, which answers a text": (
            not decoder.encoder,
            {f"data: target = {target}": True for target in targets},
        ),
    }
    for expected, (other, asked) in kinds.items():
        for key, value in asked.items() if other else ():
            if value:
                raise RecipeError(f"{key}: expected {expected}; leave it out")


def _marking(recipe: Recipe, teacher: Teacher) -> Marking | None:
    """What makes windows out of texts, where they are not the text itself."""
    network, data = teacher.network, recipe.data
    if network.decoder.classes:
        classes = None if network.decoder.pooling else network.configuration[0].label2id
        return Labelling.of(teacher.tokenizer, classes)
    if not network.decoder.causal:
        return Masking.of(teacher.tokenizer)
    if network.decoder.encoder and not all(source.target for source in (*data.calibration, *data.evaluation)):
        return Spans.of(teacher.tokenizer, data.sequence_length)
    return None


def find_sensitivities(run: Run, way: str = "") -> dict[str, np.ndarray]:
    """Predicted KL of every action, by site name: float64 [actions]; the way is the recipe's if none is given."""
    way = way or run.recipe.search.sensitivity
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


Searches = dict[tuple[str, int], Trials]
"""Trials by (policy, seed)."""


def search(run: Run, problem: Problem, earlier: Trials = (), memory: Memory | None = None) -> Searches:
    """All searches, the rivals' first. A plan that one had scored costs the next nothing. earlier, memory: see `reused`."""
    settings = run.recipe.search
    numbers = [[a.tolist() for a in arrays] for arrays in (problem.sensitivity, *problem.costs.values())]
    limits = [dict(problem.fixed), dict(problem.limits)]
    told = [[plan.digest, score.part, score.kl] for plan, score in earlier]
    key = key_of(run.comparable, numbers, limits, told, memory and memory.families)
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
                write_bytes_atomic(run.out / MEMORY_FILE, policy.memory().to_bytes())
    return trials


MEMORY_FILE = "policy.safetensors"
"""What the agent leaves to the searches of other runs, in the run's folder."""


def reused(run: Run) -> tuple[Trials, Memory | None]:
    """What `search.reuse` brings: scores that were made of the same model, texts and menu, and the agent's memory."""
    folder = run.recipe.search.reuse
    if not folder:
        return [], None
    scores = comparable_entries(Path(folder) / "ledger.log", run.menu, run.comparable)
    try:
        return scores, Memory.read(Path(folder) / MEMORY_FILE)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        if scores:
            return scores, None
        raise RecipeError(
            f"search.reuse = {folder}: expected a run of the same model, texts and menu, or of the actor-critic; "
            f"found no such score in its ledger, and no {MEMORY_FILE} to read; name another folder, or leave the key out"
        ) from None


# After the search -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finalist:
    """A plan of the search; its KL there, and on held-out text after a short recovery (nats per token), if it had one."""

    plan: Plan
    kl: float
    recovered_kl: float | None = None


def within(run: Run, latency: Latency, scored: Mapping[Plan, float]) -> dict[Plan, float]:
    """The scored plans that are expected to be fast enough, with what is known of times by now, and their KL, the best first;
    if none is, the one that misses by least."""
    limits, over = limits_of(run, latency), {}
    for plan in scored:
        expected = latency.model.predict(plan)
        over[plan] = max(getattr(expected, phase) / limits.get(f"{phase}_ms", inf) for phase in PHASES)
    most = max(1.0, min(over.values()))
    return {plan: kl for plan, kl in sorted(scored.items(), key=lambda item: item[1]) if over[plan] <= most}


def choose(run: Run, kls: dict[Plan, float]) -> list[Finalist]:
    """The plans that came into question, the student's first: ranks change in recovery, so it is tried, if the recipe asks
    for more than one. kls: of the search, the best first."""
    vars(run).pop("executor", None)  # its copy of the teacher makes room for the training
    wanted = run.recipe.distill
    plans = finalists(kls, wanted.compared)
    if len(plans) < 2:
        return [Finalist(plans[0], kls[plans[0]])]
    found = [
        Finalist(plan, kls[plan], recover(run, plan, min(wanted.finalist_steps, wanted.steps), f"finalist-{number}").kl)
        for number, plan in enumerate(plans, 1)
    ]
    return sorted(found, key=lambda finalist: finalist.recovered_kl or 0.0)


@dataclass(frozen=True)
class Recovery:
    """A plan's student after its recovery, and the KL on held-out text (nats per token) of its variants as they come from the
    bank, after reconstruction, and along the training; None where there was none."""

    student: Student
    kl_before: float | None
    kl_reconstructed: float | None
    curve: distill.Curve | None

    @property
    def kl(self) -> float | None:
        """Of the student."""
        if self.curve:
            return self.curve.kl
        return min((kl for kl in (self.kl_before, self.kl_reconstructed) if kl is not None), default=None)


def recover(run: Run, plan: Plan, steps: int, name: str = "distill") -> Recovery:
    """Reconstruct a plan's student and train it, as far as the recipe wants it; name: of the training as a stage."""
    wanted, decoder = run.recipe.distill, run.teacher.network.decoder
    fitted_NL, trained_NL, held_out_NL = run.texts.fitted_NL, run.texts.trained_NL, run.texts.held_out_NL
    made_of = [run.bank.key, plan.digest, tokens_digest(fitted_NL), tokens_digest(held_out_NL)]

    def rebuild(report_progress) -> list[float]:
        students = [run.bank.realize(plan), reconstruct(run.bank, plan, fitted_NL, report_progress)]
        held_out = Reference(run.teacher.network, held_out_NL)
        return [held_out.kl(distill.loaded(run.teacher.network, student)) for student in students]

    student, before, rebuilt = run.bank.realize(plan), None, None
    if wanted.reconstruct:
        stage = f"reconstruct-{plan.digest[:6]}"  # a finalist that becomes the student has it already
        before, rebuilt = run.stages.value(stage, key_of(*made_of), rebuild)
        if rebuilt < before:
            student = reconstruct(run.bank, plan, fitted_NL)
    if not steps:
        return Recovery(student, before, rebuilt, None)
    settings = distill.Settings(
        steps=steps,
        train=wanted.train,
        learning_rate=wanted.learning_rate or LEARNING_RATES[wanted.train],
        warmup=wanted.warmup,
        seed=wanted.seed,
        precision=wanted.precision,
        checkpointing=wanted.gradient_checkpointing,
    )
    aim = wanted.model_dump(exclude={"tokens", "finalists", "finalist_steps", "steps"})
    prompts = _prompts(run) if wanted.own_text else ([], [])
    asked = [prompt_P.tolist() for some in prompts for prompt_P in some]
    cache = _teacher_cache(run, steps)
    key = key_of(*made_of, tokens_digest(trained_NL), settings.to_dict(), aim, run.recipe.batch_windows, asked)

    def train(report_progress) -> tuple[Student, dict]:
        checkpoint = run.out / "stages" / f"distill-{key}.part"
        trained, curve = distill.distill(
            run.teacher.network,
            student,
            lambda network: _objective(run, network, cache, *prompts),
            held_out_NL,
            settings,
            checkpoint,
            report_progress,
        )
        return trained, curve.to_dict()

    student, told = run.stages.student(name, key, decoder, train)
    curve = distill.Curve.from_dict(told)
    return Recovery(student, curve.held_out[0][1]["kl"] if before is None else before, rebuilt, curve)


def _teacher_cache(run: Run, steps: int) -> TeacherCache | None:
    """What `distill.top_k` asks for: of all windows that a training of so many steps visits, or the recipe's, which is longer
    than a finalist's."""
    wanted, trained_NL = run.recipe.distill, run.texts.trained_NL
    if not wanted.top_k:
        return None
    visits = max(steps, wanted.steps) * run.recipe.batch_windows
    windows = {visited(len(trained_NL), n, wanted.seed) for n in range(min(visits, len(trained_NL)))}
    folder = run.out / "stages" / "teacher-cache"
    cache = TeacherCache(folder, run.bank.key, trained_NL, sorted(windows), wanted.top_k, wanted.temperature)
    with run.stages.timed("teacher-cache", cache.key) as report_progress:
        cache.make(run.teacher.network, run.recipe.micro_batch_windows, report_progress)
    return cache


def _objective(
    run: Run, network: Network, cache: TeacherCache | None, prompts: list[Tensor], held_out: list[Tensor]
) -> distill.Objective:
    """What `distill.method` aims at."""
    wanted, teacher = run.recipe.distill, run.teacher.network
    writer = Writer(teacher, network, prompts, held_out, wanted.rollouts.new_tokens, teacher.ends(), wanted.seed)
    if wanted.method == "rl":
        rl = wanted.rl
        settings = reinforce.Settings(wanted.rows // rl.group, rl.group, rl.clip, rl.epochs, rl.leash, rl.target_kl)
        return reinforce.Reinforce(writer, Judge(run.teacher, rl.rewards, run.rewards), settings)
    text = distill.Imitation(
        teacher,
        network,
        run.texts.trained_NL,
        windows=run.recipe.batch_windows,
        together=run.recipe.micro_batch_windows,
        kl_weight=wanted.kl_weight,
        hidden_weight=wanted.hidden_weight,
        attention_weight=wanted.attention_weight,
        temperature=wanted.temperature,
        seed=wanted.seed,
        cache=cache,
    )
    if wanted.method == "kd":
        return text
    own = on_policy.Settings(wanted.rows, wanted.on_policy.share, wanted.on_policy.discount)
    return on_policy.OnPolicy(writer, text, own)


def _prompts(run: Run) -> tuple[list[Tensor], list[Tensor]]:
    """(prompts of the training, held-out prompts), token ids [P] each.

    Raises:
        DataError: there are too few.
    """
    wanted = run.recipe.distill.rollouts
    if wanted.prompts:
        every = load_prompts(wanted.prompts, run.teacher.tokenizer, wanted.prompt_tokens)
        if len(every) <= wanted.held_out:
            raise DataError(
                f"{wanted.prompts}: expected more than distill.rollouts.held_out = {wanted.held_out} prompts, "
                f"found {len(every)}; give more, or lower it"
            )
        return every[wanted.held_out :], every[: wanted.held_out]
    length = wanted.prompt_tokens, wanted.new_tokens
    held_out = prompts_of(run.texts.held_out_NL, *length)
    return prompts_of(run.texts.trained_NL, *length), held_out[:: max(1, len(held_out) // wanted.held_out)][
        : wanted.held_out
    ]


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
