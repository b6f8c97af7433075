"""What all stages of one run share: the recipe, the teacher, the texts, the bank; and how a run starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from compressor import actions
from compressor.bank import MEMORY_BYTES, Bank
from compressor.checks import checked
from compressor.errors import ModelError, RecipeError
from compressor.estimate import layer_by_layer
from compressor.executor import Executor
from compressor.measure import Target, available_bytes, return_memory_at_once
from compressor.model import Teacher, load_teacher
from compressor.network import Network
from compressor.plan import PARTS, ActionMenu, menu_json
from compressor.recipe import Recipe
from compressor.recovery.reward import Reward
from compressor.recovery.rollouts import of_its_own, rows_at_once
from compressor.stages import Stages, key_of
from compressor.text import Beginning, Labelling, Marking, Masking, Spans, around, load_tokens, plain, tokens_digest


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
    def read(
        cls,
        recipe: Recipe,
        tokenizer,
        marking: Marking | None = None,
        anchors: int = 0,
        generated: Sequence[list[int]] = (),
    ) -> Texts:
        """The calibration text gives `anchors`, scoring and held-out windows first, then the rest. Scoring windows are cut
        where it takes that for every part to have one. generated: the windows of a source that the teacher generates."""
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
        more = partial(load, data.calibration, generated=generated)
        to_lower = f"data.calibration_tokens = {data.calibration_tokens} or search.tokens = {tokens}"
        counted = f"{to_lower} (these count twice: plans are scored, and recovery is judged, on other text)"
        windows_NL = more(tokens=total, asked=counted)
        paired = any(source.target for source in data.calibration)
        goes_on = not paired and (marking is None or isinstance(marking, Beginning))
        length = tokens // count if goes_on else data.sequence_length  # a part of other windows may predict nothing
        anchors_NL, found_NL = windows_NL[:anchors], windows_NL[anchors:]
        score_NL, rest_NL = found_NL[:count, :length], found_NL[count:]
        fitted_NL = rest_NL[held_out:]
        if recipe.distill.tokens:
            fitted_NL = more(tokens=recipe.distill.tokens, spared_NL=windows_NL[: anchors + count + held_out])
        trained_NL = fitted_NL
        if training := recipe.distill.steps * recipe.batch_windows:
            fresh_NL = more(tokens=training * data.sequence_length, spared_NL=torch.cat([windows_NL, fitted_NL]))
            trained_NL = fresh_NL if len(fresh_NL) >= training else torch.cat([fresh_NL, fitted_NL])
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


def start(
    recipe: Recipe,
    out: Path,
    trust_remote_code: bool,
    stages: Stages,
    rewards: Mapping[str, Reward] = MappingProxyType({}),
) -> Run:
    """Load the teacher and the texts.

    Raises:
        RuntimeTargetError: ONNX Runtime does not run on the target, or not in every format of the recipe.
        BudgetError: the smallest plan has more bytes than are budgeted.
    """
    if (reuse := recipe.search.reuse) and Path(reuse).resolve() == out.resolve():
        raise RecipeError(f"search.reuse = {reuse}: expected the folder of another run, it is this one's; name another")
    with stages.timed("teacher"):
        recipe, target, decoder = checked(recipe, trust_remote_code)
        model = recipe.model
        # memory may be shorter, or not, when a run goes on
        layerwise = stages.kept("layerwise", key_of(recipe.to_dict()), lambda: layer_by_layer(recipe, decoder))
        out.mkdir(parents=True, exist_ok=True)
        if layerwise:
            return_memory_at_once()
        teacher = load_teacher(
            model.path,
            **model.weights,
            trust_remote_code=trust_remote_code,
            precision=target.precision,
            layerwise=out if layerwise else None,
        )
        if torch.cuda.is_available() and not layerwise:  # wherever the student will run
            teacher.network.to("cuda")
    if reuse:  # what doesn't depend on a budget; all of it is known by keys of what it was made from
        for pattern in ("generated-*.json", "sensitivity-*.json"):
            stages.take_over(Path(reuse) / "stages", pattern)
    texts = _texts(recipe, teacher, stages)
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
    if reuse:
        bank.take_over(Path(reuse) / "bank")
    menu = actions.menu(recipe.search, teacher.network.decoder.sites())
    return Run(recipe, out, stages, target, teacher, texts, bank, menu, rewards)


def _texts(recipe: Recipe, teacher: Teacher, stages: Stages) -> Texts:
    """The texts of a run. What is wrong with those that are given is found before the teacher generates any."""
    network, data = teacher.network, recipe.data
    anchors = data.anchors if network.decoder.pooling else 0
    read = partial(Texts.read, recipe, teacher.tokenizer, _marking(recipe, teacher), anchors)
    with stages.timed("texts"):
        texts = read([[0] * data.sequence_length] * data.generated_windows)
        highest = max(int(plain(network.seen(x)).max()) for x in (texts.score_NL, texts.evaluation_NL))
        if highest >= (vocabulary := network.decoder.vocabulary):
            raise ModelError(
                f"model.path = {recipe.model.path}: expected token ids below {vocabulary}, vocab_size of config.json, the "
                f"tokenizer gives {highest}; give the tokenizer that belongs to the model"
            )
        if anchors:
            texts = texts.answered(network)
    if not data.generated_windows:
        return texts
    return read(_generated(teacher, data.generated_windows, data.sequence_length, stages))


def _generated(teacher: Teacher, count: int, length: int, stages: Stages) -> list[list[int]]:
    """`count` windows that the teacher generates; those that it has generated already are taken as they are."""
    key, windows = key_of(teacher.network.digest(), length), []
    at_once = rows_at_once(teacher.network.decoder, length)

    with stages.timed("generate", key) as report_progress:

        def batch(start: int, rows: int) -> list[list[int]]:
            def report(tokens: int) -> None:
                report_progress(start + rows * tokens // length, count)

            return of_its_own(teacher.network, teacher.tokenizer, rows, length, seed=start, report=report).tolist()

        for start in range(0, count, at_once):
            rows = min(at_once, count - start)
            windows += stages.kept(f"generated-{start}-{rows}", key, partial(batch, start, rows))
    return windows


def _marking(recipe: Recipe, teacher: Teacher) -> Marking | None:
    """What makes windows out of texts, where they are not the text itself."""
    network, data = teacher.network, recipe.data
    if network.decoder.classes:
        classes = None if network.decoder.pooling else network.configuration[0].label2id
        return Labelling.of(teacher.tokenizer, classes)
    if not network.decoder.causal:
        return Masking.of(teacher.tokenizer)
    if not network.decoder.encoder:
        before, _ = around(teacher.tokenizer)
        return Beginning(before) if before else None
    if not all(source.target for source in (*data.calibration, *data.evaluation)):
        return Spans.of(teacher.tokenizer, data.sequence_length)
    return None
