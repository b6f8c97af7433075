"""The recipe: everything that a run is asked for, as a YAML file, checked before any work begins.

Only values are checked here. What the keys mean is written under each of them; `recipe_schema()` and the documentation
are made from those words. Turning a recipe into the actions of each site is `compressor.actions`.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml  # type: ignore[import-untyped]
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_serializer,
    model_validator,
)

from compressor.errors import RecipeError
from compressor.plan import PARTS, Formats

PolicyName = Literal[
    "uniform", "random", "greedy", "dynamic_programming", "evolution", "tpe", "nsga2", "ppo", "actor_critic"
]


@dataclass(frozen=True)
class Limit:
    """An upper limit: `value` in bytes or milliseconds, or, when `relative`, as a fraction of a reference."""

    value: float
    relative: bool

    def resolve(self, reference: float) -> float:
        """The limit in the unit of `reference`: what the teacher costs when it is exported in fp32."""
        return self.value * reference if self.relative else self.value


SIZE_UNITS = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
TIME_UNITS = {"us": 1e-3, "ms": 1, "s": 1e3}
SIZE_WANTED = "expected a size such as 60MB, 60MiB or 60000000, or a fraction of the fp32 teacher such as 25% or 0.25x"
TIME_WANTED = "expected a time such as 120ms or 1.5s, or a fraction of the fp32 teacher such as 25% or 0.25x"


def parse_limit(text: object, units: Mapping[str, float], wanted: str) -> Limit:
    """`25%` or `0.25x` -> a relative limit; `60 MB` -> an absolute one, in units of the unit whose factor is 1.

    Raises:
        ValueError: it is neither, or not above 0, or a bare number where a unit is needed.
    """
    if isinstance(text, Limit):
        return text
    match = re.fullmatch(r"([0-9_]*\.?[0-9]+(?:e[+-]?\d+)?)\s*([a-z%]*)", str(text).strip().lower())
    if isinstance(text, bool) or not match:
        raise ValueError(wanted)
    value, unit = float(match[1]), match[2]
    if not 0 < value < math.inf:
        raise ValueError(f"{wanted}, above 0")
    if unit in ("%", "x"):
        return Limit(value / 100 if unit == "%" else value, relative=True)
    if not unit:
        if value <= 1:
            raise ValueError(f"{wanted}; for a fraction write {value:.10g}x")
        if "b" not in units:
            raise ValueError(f"{wanted}; write the unit, {value:.10g}ms")
        unit = "b"
    if unit not in units:
        raise ValueError(f"{wanted}; choose the unit among {', '.join(units)}")
    return Limit(value * units[unit], relative=False)


def _written(unit: str, factor: float) -> PlainSerializer:
    def write(limit: Limit) -> str:
        return f"{limit.value!r}x" if limit.relative else f"{limit.value / factor:.15g}{unit}"

    return PlainSerializer(write)


_LIMIT_SCHEMA = WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}]})
SizeLimit = Annotated[
    Limit, BeforeValidator(lambda text: parse_limit(text, SIZE_UNITS, SIZE_WANTED)), _written("MB", 1e6), _LIMIT_SCHEMA
]
TimeLimit = Annotated[
    Limit, BeforeValidator(lambda text: parse_limit(text, TIME_UNITS, TIME_WANTED)), _written("ms", 1), _LIMIT_SCHEMA
]


def _format_name(name: str) -> str:
    try:
        found = Formats.parse(name)
    except RecipeError as error:
        raise ValueError(str(error)) from None
    if found.most.kind == "dropped":
        raise ValueError("a sub-layer is dropped by the fraction 0 in attention_keep or ffn_keep, not by a format")
    return found.name


def _distinct(values: tuple) -> tuple:
    return tuple(dict.fromkeys(values))


def _not_the_runs(name: str | None) -> str | None:
    if name in ("stages", "bank"):
        raise ValueError("expected another name, a run has a folder of this one")
    return name


FormatName = Annotated[str, AfterValidator(_format_name)]
Fraction = Annotated[float, Field(ge=0, le=1)]
FormatNames = Annotated[tuple[FormatName, ...], Field(min_length=1), AfterValidator(_distinct)]
Fractions = Annotated[tuple[Fraction, ...], Field(min_length=1), AfterValidator(_distinct)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A part of the recipe: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _beside_recipe(path: str, info: ValidationInfo) -> str:
    """A path relative to the recipe's folder, or, as on a command line, to where one is, if there is something only there."""
    folder, given = (info.context or {}).get("folder"), Path(path).expanduser()
    if not folder:
        return path
    return str(given.absolute() if given.exists() and not Path(folder, given).exists() else Path(folder, given))


def _beside_recipe_or_on_hub(name: str, info: ValidationInfo) -> str:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    beside = Path((info.context or {}).get("folder") or ".", name)
    return _beside_recipe(name, info) if looks_local or beside.is_dir() else name


class ModelSection(Section):
    """The teacher."""

    path: Annotated[str, Field(min_length=1)]
    """Hugging Face hub id (`org/name`), or a local folder, which is relative to the recipe's own."""
    gguf: str | None = None
    """Name of a GGUF file in that folder or repository, when the weights are to be read from one."""
    revision: str | None = None
    """Branch, tag or commit on the hub; the default branch when absent."""
    layerwise: Literal["auto"] | bool = "auto"
    """Whether the model is compressed layer by layer, its weights staying on the disk of the run's folder: for models larger
    than memory. `auto`: where it would not fit. No distillation but `reconstruct`, and no times of the fp32 export."""

    @model_validator(mode="after")
    def _mapped(self) -> ModelSection:
        if self.gguf and self.layerwise is True:
            raise ValueError(
                "layerwise: expected safetensors, a GGUF file is read whole; convert it, or leave layerwise out"
            )
        return self

    @field_validator("path")
    @classmethod
    def _local(cls, path: str, info: ValidationInfo) -> str:
        return _beside_recipe_or_on_hub(path, info)

    @property
    def weights(self) -> dict[str, str | None]:
        """Which ones there: arguments of `model.load_teacher` and `model.read_decoder`."""
        return {"gguf": self.gguf, "revision": self.revision}

    @property
    def is_local(self) -> bool:
        """Whether `path` is a folder rather than a hub id."""
        return not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", self.path) or Path(self.path).is_dir()


def _string_too(schema: dict[str, Any]) -> None:
    described = {key: schema.pop(key) for key in ("title", "description")}
    mapping = dict(schema)
    schema.clear()
    schema |= {**described, "anyOf": [{"type": "string"}, mapping]}


class TextSource(Section):
    """A text: a local file (written as a plain string), a column of a data set on the hub, or what the teacher generates."""

    model_config = ConfigDict(json_schema_extra=_string_too)

    file: str | None = None
    """Path of a UTF-8 text file, relative to the recipe's folder; one that ends in .jsonl has a JSON object a line."""
    dataset: str | None = None
    """Hub id of a data set, or its local folder, relative to the recipe's; streamed, never downloaded whole."""
    config: str | None = None
    """Configuration (subset) of the data set."""
    split: str | None = None
    """Split of the data set, such as `train`; needed with `dataset`."""
    generated: Count | None = None
    """So many tokens of calibration text, in whole windows, that the teacher generates: of all the kinds of text that it
    knows, where files are of one kind, or in place of files."""
    column: str = "text"
    """Column, or key of a JSON object, that holds the text, or the messages of a conversation, which the tokenizer's chat
    template makes a text of."""
    label: str | None = None
    """Column, or key of a JSON object, that holds the class of a classifier's text: its number or its name."""
    target: str | None = None
    """Column, or key of a JSON object, that holds what an encoder-decoder is to say of the text. When absent, spans of the
    text are masked, and it says those."""

    @model_validator(mode="before")
    @classmethod
    def _plain_string(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value

    @field_validator("file")
    @classmethod
    def _local(cls, file: str | None, info: ValidationInfo) -> str | None:
        return file and _beside_recipe(file, info)

    @field_validator("dataset")
    @classmethod
    def _local_dataset(cls, dataset: str | None, info: ValidationInfo) -> str | None:
        return dataset and _beside_recipe_or_on_hub(dataset, info)

    @model_validator(mode="after")
    def _one_kind(self) -> TextSource:
        if [self.file, self.dataset, self.generated].count(None) != 2:
            raise ValueError(
                "expected the path of a text file, {dataset: ..., split: ...} or {generated: TOKENS}, one of the three"
            )
        if self.dataset is not None and self.split is None:
            raise ValueError("expected a split beside the data set; add for example split: train")
        if (self.label or self.target or self.column != "text") and not self.rows:
            raise ValueError(
                "expected a file of JSON lines (.jsonl) or a data set beside a column, a label or a target"
            )
        if self.dataset is None and (self.config or self.split):
            raise ValueError("expected config and split beside a data set alone; leave them out")
        return self

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        if self.file and self.column == "text" and not self.label and not self.target:
            return self.file
        return {key: value for key, value in self if value is not None and (key != "column" or self.rows)}

    @property
    def rows(self) -> bool:
        """Whether it has rows with columns: it is a data set, or its file has a JSON object a line."""
        return self.dataset is not None or bool(self.file and self.file.endswith(".jsonl"))

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the text, and of its target, if it has one."""
        return (self.column, self.target) if self.target else (self.column,)

    @property
    def name(self) -> str:
        """What a report calls it: a file by its name without folder and ending."""
        return Path(self.file).stem if self.file else str(self)

    def __str__(self) -> str:
        if self.generated:
            return f"generated = {self.generated}"
        parts = (self.dataset, self.config, self.split, self.column)
        return self.file or ":".join(part for part in parts if part)


Texts = Annotated[tuple[TextSource, ...], Field(min_length=1)]


class DataSection(Section):
    """The texts."""

    calibration: Texts
    """Texts for sensitivities, quantization, the search's score and distillation."""
    evaluation: Texts
    """Other texts, seen by nothing before the final measurement."""
    calibration_tokens: Count = 16384
    """Tokens taken from the calibration texts; whole windows of `sequence_length`."""
    sequence_length: Annotated[int, Field(ge=2)] = 512
    """Tokens in a window; windows follow one another without overlap."""
    target_length: Count | None = None
    """Of a window with a target, how many of its tokens are for that; a quarter when absent."""
    evaluation_tokens: Count = 16384
    """Tokens taken from the evaluation texts, of each the same number; whole windows."""

    anchors: Annotated[int, Field(ge=2)] = 128
    """Of an embedder, how many other texts every text is compared with; they are taken from the calibration texts."""

    @property
    def generated_windows(self) -> int:
        """Windows of the calibration text that the teacher generates."""
        return sum(source.generated or 0 for source in self.calibration) // self.sequence_length

    @property
    def said_length(self) -> int:
        """Tokens of a window with a target that are for the target."""
        return self.target_length or max(1, self.sequence_length // 4)

    @model_validator(mode="after")
    def _room_for_text(self) -> DataSection:
        if self.said_length >= self.sequence_length:
            raise ValueError(
                f"target_length = {self.target_length}: expected less than sequence_length = {self.sequence_length}"
            )
        return self


class Workload(Section):
    """What is timed on the target."""

    prefill: Count = 128
    """Tokens of the prompt whose processing is `prefill`, in tokens."""
    context: Count = 128
    """Tokens in the cache when the time of one more token, `decode`, is taken."""


class TargetSection(Section):
    """Where the student runs."""

    runtime: Literal["onnx", "torch"] = "onnx"
    """Where the student runs: ONNX Runtime, or torch, with bitsandbytes for the formats nf4 and fp4."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device that the exported student runs on; `auto` takes CUDA when torch sees a GPU."""
    precision: Literal["auto", "float32", "float16"] = "auto"
    """What the exported student computes in, and the type of norms and biases; `auto` is float16 on CUDA, whose attention
    kernel knows no float32, and float32 on the CPU."""
    threads: Count | None = None
    """Threads of ONNX Runtime; the number of physical cores when absent."""
    workload: Workload = Workload()
    """What is timed."""


class BudgetSection(Section):
    """What the student may cost at most; at least one limit."""

    bytes: SizeLimit | None = None
    """Size of the exported files: 60MB, 60MiB, 60000000, or 25% or 0.25x of the fp32 export."""
    prefill: TimeLimit | None = None
    """Time of the workload's prefill: 120ms, 1.5s, or 50% or 0.5x of the fp32 export."""
    decode: TimeLimit | None = None
    """Time of one more token: 12ms, or 50% or 0.5x of the fp32 export."""

    @model_validator(mode="after")
    def _some(self) -> BudgetSection:
        if self.bytes is None and self.prefill is None and self.decode is None:
            raise ValueError("expected at least one limit among bytes, prefill, decode; add for example bytes: 25%")
        return self


class SearchSection(Section):
    """Which plans are considered, and who proposes them."""

    policy: PolicyName = "actor_critic"
    """Policy whose best plan becomes the student, unless one of a rival, or of the run in `reuse`, is better."""
    evaluations: Count = 16
    """Passes over the tokens that each policy may spend; a plan that is tried on an eighth of them costs an eighth."""
    tokens: Count = 2048
    """Calibration tokens that score a plan, the same for every plan; at least eight windows, cut if it takes that."""
    rivals: Annotated[tuple[PolicyName, ...], AfterValidator(_distinct)] = ("uniform", "dynamic_programming")
    """Policies that run beside it, at the same budget and number of evaluations."""
    formats: FormatNames = (
        *("fp32", "int8", "int8+w8", "w4a8+int8", "w4a8+w8", "w4a8", "w8", "w4+w8", "w4b64+w8", "w4", "w4b64"),
        *("w2b64+w4b64", "w2", "w2b64", "nf4", "fp4", "int8row"),
    )
    """Weight formats of attention and feed-forward; of the default, those that the target runs. A pair such as w4+w8 is
    w4, but w8 for keys, values and down projection, where errors cost most for the bytes. w4a8 takes the bytes of w4 in the
    file, and the time and the memory of int8: the fastest prefill. Both lose much where a matrix reads outliers, as down
    projections often do: w4a8+w8, of feed-forwards alone, keeps these in w8. w6, w5 and w3 save bytes of the file alone, in
    memory they are w8 and w4. With w4a8, w6, w5 or w3 a session takes seconds to open, and six or seven bytes a weight
    then."""
    embedding_formats: FormatNames = ("fp32", "w8", "w4")
    """Weight formats of the embedding and the output head; of the default, those that the target runs."""
    attention_keep: Fractions | None = None
    """Fractions of the key/value groups (with their query heads) that an attention may keep, rounded to whole groups;
    0 drops the sub-layer. Every whole number of groups when absent."""
    ffn_keep: Fractions = (1.0, 0.875, 0.75, 0.625, 0.5, 0.25, 0.0)
    """Fractions of the channels that a feed-forward, or an expert of a mixture, may keep; 0 drops it."""
    ffn_multiple: Count = 64
    """Channels that are kept are rounded to a multiple of this."""
    sensitivity: Literal["fisher", "noise"] = "fisher"
    """What policies are told about actions before any is scored: from one backward pass, or from a forward pass for every
    site with noise on its weights."""
    quantizer: Literal["gptq", "nearest"] = "gptq"
    """How weights are put on a format's grid."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of every policy."""
    seeds: Count = 1
    """Searches of `policy`, from the seeds `seed`, `seed` + 1, and so on; the report says on which sites their best plans
    agree."""
    reuse: Annotated[str, AfterValidator(_beside_recipe)] | None = None
    """Folder of an earlier run, at another budget say. Of the same model and texts: its variants, sensitivities and latency
    table are taken over. Of the same menu, too: every policy is told the plans it scored that fit, at no cost, and one of
    them may become the student. Where at most half of them fit, and of another model or menu: the agent starts from what
    that run's agent learned about families of actions."""

    @field_validator("formats")
    @classmethod
    def _attended(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if all(Formats.parse(name).splits_input for name in names):
            raise ValueError(
                f"only one format of {names[0]} quantizes what it reads, which only feed-forwards can have; add one for "
                "attentions, such as w4a8+int8"
            )
        return names

    @field_validator("embedding_formats")
    @classmethod
    def _gathered(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        found = [Formats.parse(name) for name in names]
        if quantizing := [formats.name for formats in found if formats.most.quantizes_input]:
            raise ValueError(
                f"{quantizing[0]} quantizes activations, and an embedding has none; choose among fp32, fp16, w8, w4"
            )
        if pairs := [formats.name for formats in found if not formats.alike]:
            raise ValueError(
                f"an embedding is one matrix, {pairs[0]} is for two kinds; choose among fp32, fp16, w8, w4"
            )
        return names

    @property
    def searches(self) -> tuple[tuple[PolicyName, int], ...]:
        """(policy, seed) of all that run: the rivals, then the policy itself from each of its seeds."""
        rivals = tuple((rival, self.seed) for rival in self.rivals if rival != self.policy)
        return rivals + tuple((self.policy, self.seed + i) for i in range(self.seeds))


class RolloutSection(Section):
    """What the student writes where it learns from its own text (`on_policy`, `rl`)."""

    prompts: Annotated[str, AfterValidator(_beside_recipe)] | None = None
    """File of prompts, JSON lines: {"prompt": text}, or {"messages": [...]} for the tokenizer's chat template. Pieces of
    the training text when absent."""
    prompt_tokens: Count = 32
    """Tokens of a prompt; of a longer one the last are kept."""
    new_tokens: Count = 32
    """Tokens that are written behind it."""
    held_out: Count = 16
    """Prompts that are kept from training; what is written behind them decides which step's student is kept."""


class OnPolicySection(Section):
    """Distillation on the student's own text."""

    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the steps on the student's own text; the others are those of `kd`."""
    discount: Annotated[float, Field(ge=0, le=1)] = 0.9
    """How much a token answers for those that follow; with 0 every token for itself."""


class RlSection(Section):
    """Reinforcement learning towards a composed reward."""

    rewards: Annotated[dict[str, float], Field(min_length=1)] = {
        "fluency": 1.0,
        "informativeness": 1.0,
        "relevance": 1.0,
    }
    """Weights of the rewards: fluency (the teacher's log-probability a token), informativeness (distinct-n and entropy, 0 to
    1), relevance (cosine of prompt and text, -1 to 1), and functions that are given by the library."""
    group: Annotated[int, Field(ge=2)] = 4
    """Texts behind every prompt; a text's advantage is its reward against its group's."""
    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """How far a token's probability may move from that with which it was written, relatively, and still be rewarded."""
    epochs: Count = 2
    """Updates with what was written in a step."""
    leash: Annotated[float, Field(ge=0)] = 0.1
    """Weight of KL(student || teacher) in nats a token at first; then it is moved such that the KL stays at its target."""
    target_kl: Annotated[float, Field(gt=0)] | None = None
    """That target, in nats a token; what the first step has when absent."""


class DistillSection(Section):
    """Recovery of the student on calibration text: a fit of every block in closed form, then training against the teacher."""

    reconstruct: bool = True
    """Whether every matrix is first fitted to what the student lets it read, block by block; kept where it helps."""
    tokens: Count | None = None
    """Calibration tokens that are fitted, whole windows; those of `data.calibration_tokens` when absent."""
    steps: Annotated[int, Field(ge=0)] = 0
    """Steps of the training; 0 turns it off. It sees text that was not fitted, and what was fitted, too, where that is less
    than it visits."""
    method: Literal["kd", "on_policy", "rl"] = "kd"
    """What the training aims at: the teacher's predictions on given text, or on what the student writes itself, or a
    composed reward."""
    train: Literal["scales", "weights", "lora"] = "scales"
    """What is trained beside the norm gains: the scales of quantized matrices, or all matrices on their grids, as a whole or
    by a change of low rank."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the products in the training; bf16 is for GPUs that have it."""
    gradient_checkpointing: bool = False
    """Whether blocks are computed once more in the backward pass: less memory for a third more time."""
    finalists: Count = 1
    """Plans of the search, its best and others that differ from it on a tenth of the sites, that are recovered with
    `finalist_steps`; the one of least KL on held-out text then is the student's. With 1 it is the search's best plan."""
    finalist_steps: Count = 4
    """Steps of a finalist, at most `steps`."""
    batch_tokens: Count = 2048
    """Tokens in a step, those of prompts included."""
    micro_batch_tokens: Count = 512
    """Tokens of given text that run through the models at once, whole windows, at least one; the more, the faster on a GPU,
    and the more memory."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak learning rate; when absent, 1e-2 for scales (in units of their precision, 2^-bits), 1e-4 for weights, 1e-3 for
    lora. A student of 3 bits a weight learned more at 3e-2 and 1e-3."""
    warmup: Annotated[int, Field(ge=0)] = 10
    """Steps over which the learning rate rises to its peak."""
    kl_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of KL(teacher || student) over the vocabulary, in nats per token."""
    hidden_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the relative squared error of the hidden states."""
    attention_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence of the last attention's relations: of queries among one another, of keys, of values."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of both distributions in the KL term."""
    top_k: Count | None = None
    """Tokens of the teacher's predictions that are kept on disk, the likeliest at every position, all others as one; it
    then runs once over the text of the training. When absent it runs beside the student, in every step."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the order of the windows, and of what the student writes."""
    rollouts: RolloutSection = RolloutSection()
    """What the student writes where it learns from its own text."""
    on_policy: OnPolicySection = OnPolicySection()
    """Distillation on the student's own text."""
    rl: RlSection = RlSection()
    """Reinforcement learning towards a composed reward."""

    @property
    def own_text(self) -> bool:
        """Whether the student learns from what it writes."""
        return self.steps > 0 and self.method != "kd"

    @property
    def rows(self) -> int:
        """Texts that are written in a step."""
        return max(1, self.batch_tokens // (self.rollouts.prompt_tokens + self.rollouts.new_tokens))

    @property
    def compared(self) -> int:
        """Plans that are compared after a recovery; without one there is nothing to compare."""
        return self.finalists if self.steps or self.reconstruct else 1

    @model_validator(mode="after")
    def _some_loss(self) -> DistillSection:
        if self.steps and not (self.kl_weight or self.hidden_weight or self.attention_weight):
            raise ValueError(
                "expected kl_weight, hidden_weight or attention_weight above 0; without any there is nothing to learn"
            )
        return self


class ExportSection(Section):
    """The exported student."""

    folder: Annotated[str, Field(pattern=r"^\w[\w-]*$"), AfterValidator(_not_the_runs)] | None = None
    """Name of its folder, inside the run's; `onnx` or `torch`, by the runtime, when absent."""
    parity_tolerance: Annotated[float, Field(gt=0)] = 0.001
    """Largest relative error of the exported student's logits against the same student in torch, neither of them with
    the rounding of activations that fast kernels do."""


class ToleranceSection(Section):
    """What may be lost against the baseline, as a share of it; for times what they are uncertain by is added."""

    perplexity_ratio: Annotated[float, Field(ge=0)] = 0.01
    """Of the student's perplexity over the teacher's."""
    accuracy_ratio: Annotated[float, Field(ge=0)] = 0.01
    """Of the teacher's accuracy over the student's, where they are classifiers, or embedders (see `gate.accuracy_ratio`)."""
    bytes: Annotated[float, Field(ge=0)] = 0.0
    """Of the size of the exported files."""
    prefill: Annotated[float, Field(ge=0)] = 0.1
    """Of the prefill's time over that of the fp32 export beside it."""
    decode: Annotated[float, Field(ge=0)] = 0.1
    """Of one more token's time over that of the fp32 export beside it."""


class GateSection(Section):
    """Limits on what is measured at the end. When one is missed, the run ends with exit code 3."""

    perplexity_ratio: Annotated[float, Field(gt=0)] | None = None
    """Perplexity of the student over that of the teacher, on the evaluation text."""
    kl: Annotated[float, Field(gt=0)] | None = None
    """KL of the student from the teacher, nats per token, on the evaluation text."""
    accuracy_ratio: Annotated[float, Field(gt=0)] | None = None
    """Of a classifier, accuracy of the teacher over that of the student: 1.02 lets it lose a fiftieth. An embedder is right
    where it takes the same one of `data.anchors` texts for the nearest as the teacher."""
    bytes: SizeLimit | None = None
    """Size of the exported files, as in `budget`."""
    memory: SizeLimit | None = None
    """Memory at its highest while the student is opened and runs, or a share of the fp32 export's."""
    prefill: TimeLimit | None = None
    """Time of the prefill, as in `budget`."""
    decode: TimeLimit | None = None
    """Time of one more token, as in `budget`. Of a time the lower end of where its true median lies counts."""
    baseline: Annotated[str, AfterValidator(_beside_recipe)] | None = None
    """An earlier run's folder or report.json, against which nothing may be lost."""
    tolerance: ToleranceSection = ToleranceSection()
    """What may be lost nevertheless."""
    times: bool = True
    """Whether times are compared with the baseline's, which takes the same device."""

    @classmethod
    def of_limits(cls, limits: Mapping[str, Any]) -> GateSection:
        """A gate of these limits alone.

        Raises:
            RecipeError: one message that lists every problem.
        """
        known = [name for name in cls.model_fields if name not in ("baseline", "tolerance", "times")]
        problems = [f"limit {name}: expected one of {', '.join(known)}" for name in limits if name not in known]
        section = cls()
        try:
            section = cls.model_validate({name: limit for name, limit in limits.items() if name in known})
        except ValidationError as error:
            details = error.errors(include_url=False)
            problems += [_problem({**detail, "loc": ("gate", *detail["loc"])}) for detail in details]
        if problems:
            raise RecipeError("; ".join(problems))
        return section


class Recipe(Section):
    """A run of `compress`, in full."""

    model: ModelSection
    """The teacher."""
    data: DataSection
    """The texts."""
    target: TargetSection = TargetSection()
    """Where the student runs."""
    budget: BudgetSection
    """What the student may cost."""
    search: SearchSection = SearchSection()
    """Which plans are considered, and who proposes them."""
    distill: DistillSection = DistillSection()
    """Recovery by distillation."""
    export: ExportSection = ExportSection()
    """The exported student."""
    gate: GateSection = GateSection()
    """Limits on the measured result."""

    @property
    def deployed(self) -> str:
        """Name of the folder that is deployed, inside the run's."""
        return self.export.folder or self.target.runtime

    @property
    def batch_windows(self) -> int:
        """Windows in a step of the training."""
        return max(1, self.distill.batch_tokens // self.data.sequence_length)

    @property
    def micro_batch_windows(self) -> int:
        """Windows of the training that run through the models at once."""
        return max(1, self.distill.micro_batch_tokens // self.data.sequence_length)

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Reads a recipe; each override is `section.key=value`, its value in YAML.

        Raises:
            RecipeError: one message that lists every problem.
        """
        path = Path(path)
        try:
            data = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
        except OSError as error:
            raise RecipeError(f"{path}: expected a recipe (YAML file), {error.strerror}; check the path") from None
        except (ValueError, yaml.YAMLError) as error:  # a date that is none, say
            raise RecipeError(f"{path}: expected YAML; {error}") from None
        if not isinstance(data, dict):
            raise RecipeError(f"{path}: expected a mapping with the keys {', '.join(cls.model_fields)}; got {data!r}")
        for override in overrides:
            _override(data, override)
        return cls.from_dict(data, path.parent.resolve(), str(path))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: Path | None = None, name: str = "recipe") -> Recipe:
        """Checks plain data, as YAML or `to_dict` gives it. Local paths become absolute, relative to `folder`.

        Raises:
            RecipeError: one message that lists every problem.
        """
        try:
            recipe = cls.model_validate(data, context={"folder": folder})
        except ValidationError as error:
            details = error.errors(include_url=False)
            # a list whose items are wrong is also reported as too short: once is enough
            wrong = {detail["loc"][:i] for detail in details for i in range(len(detail["loc"]))}
            problems = [
                _problem(detail) for detail in details if detail["type"] != "too_short" or detail["loc"] not in wrong
            ]
        else:
            problems = list(recipe._contradictions())
        if problems:
            raise RecipeError(f"{name}: {_count(problems)}\n" + "\n".join(f"  {problem}" for problem in problems))
        return recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain data, defaults included, that `from_dict` turns into an equal recipe."""
        return self.model_dump(mode="json", exclude_none=True)

    def _contradictions(self) -> Iterable[str]:
        data, search = self.data, self.search
        for key in ("calibration_tokens", "evaluation_tokens"):
            if getattr(data, key) < data.sequence_length:
                least = f"data.sequence_length = {data.sequence_length}"
                yield f"data.{key} = {getattr(data, key)}: expected at least {least}; raise it or shorten the windows"
        if self.distill.tokens and self.distill.tokens < data.sequence_length:
            least = f"data.sequence_length = {data.sequence_length}"
            yield f"distill.tokens = {self.distill.tokens}: expected at least {least}; raise it, or leave it out"
        if search.tokens < data.sequence_length:
            least = f"data.sequence_length = {data.sequence_length}"
            yield f"search.tokens = {search.tokens}: expected at least {least}; raise it or shorten the windows"
        if search.tokens < 2 * PARTS:
            yield f"search.tokens = {search.tokens}: expected at least {2 * PARTS}, two for each of {PARTS} parts; raise it"
        if search.tokens > data.calibration_tokens:
            most = f"data.calibration_tokens = {data.calibration_tokens}"
            yield f"search.tokens = {search.tokens}: expected at most {most}; lower it or take more calibration tokens"
        if len(data.evaluation) * data.sequence_length > data.evaluation_tokens >= data.sequence_length:
            least = f"a window of {data.sequence_length} for each of {len(data.evaluation)} texts"
            yield f"data.evaluation_tokens = {data.evaluation_tokens}: expected at least {least}; raise it"
        written = self.distill.rollouts
        if self.distill.own_text and not written.prompts:
            length = written.prompt_tokens + written.new_tokens
            if length > data.sequence_length:
                yield (
                    f"distill.rollouts: prompt_tokens + new_tokens = {length}: expected at most data.sequence_length = "
                    f"{data.sequence_length}, of which prompts are pieces; shorten them, or give a file of prompts"
                )
        if self.distill.own_text and self.distill.rows < self.distill.rl.group and self.distill.method == "rl":
            yield (
                f"distill.batch_tokens = {self.distill.batch_tokens}: expected room for distill.rl.group = "
                f"{self.distill.rl.group} texts of {written.prompt_tokens + written.new_tokens} tokens; raise it"
            )
        if top_k := self.distill.top_k:
            for key in ("hidden_weight", "attention_weight"):
                if weight := getattr(self.distill, key):
                    yield (
                        f"distill.{key} = {weight}: expected 0 beside distill.top_k = {top_k}, it takes the teacher "
                        "itself and not only its predictions; leave one of them out"
                    )
            if self.distill.own_text:
                yield (
                    f"distill.top_k = {top_k}: expected distill.method = kd, {self.distill.method} asks the teacher about "
                    "what the student writes; leave it out"
                )
        names = [source.name for source in data.evaluation]
        for i, source in enumerate(data.evaluation):
            if source.name in names[:i]:
                yield f"data.evaluation[{i}] = {source}: expected a file name that no other text has; rename it"
            if source in data.calibration:
                yield f"data.evaluation[{i}] = {source}: expected text that isn't in data.calibration; choose another"
            if source.generated:
                yield f"data.evaluation[{i}]: {source}: expected text that the teacher did not generate; give a file"
        generated = [source.generated for source in data.calibration if source.generated]
        if len(generated) > 1:
            yield f"data.calibration: generated = {generated}: expected it once; give the sum of them"
        if generated and generated[0] < data.sequence_length:
            yield (
                f"data.calibration: generated = {generated[0]}: expected at least a window of data.sequence_length = "
                f"{data.sequence_length} tokens; ask for more"
            )

    def check_files(self) -> None:
        """Whether every local file and folder that the recipe names is there; takes no time.

        Raises:
            RecipeError: one message that lists every missing one.
        """
        problems = []
        if self.model.is_local:
            folder = Path(self.model.path)
            if not folder.is_dir():
                problems.append(f"model.path = {folder}: expected a folder, found none; check it, or give a hub id")
            elif self.model.gguf and not (folder / self.model.gguf).is_file():
                found = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "no GGUF file"
                problems.append(f"model.gguf = {self.model.gguf}: expected a file in {folder}; it holds {found}")
            elif not self.model.gguf and not (folder / "config.json").is_file():
                merge = "it is an adapter's: merge that into its model first (merge_and_unload of PEFT, then save_pretrained)"
                why = merge if (folder / "adapter_config.json").is_file() else "check the path"
                problems.append(f"model.path = {folder}: expected a model folder, it has no config.json; {why}")
        for key in ("calibration", "evaluation"):
            for i, source in enumerate(getattr(self.data, key)):
                if source.file and not Path(source.file).is_file():
                    problems.append(
                        f"data.{key}[{i}] = {source.file}: expected a text file, found none; check the path"
                    )
        baseline = self.gate.baseline
        if baseline and not Path(baseline, "report.json" if Path(baseline).is_dir() else "").is_file():
            problems.append(
                f"gate.baseline = {baseline}: expected a run's folder or report.json, found none; check the path"
            )
        prompts = self.distill.rollouts.prompts
        if prompts and not Path(prompts).is_file():
            problems.append(
                f"distill.rollouts.prompts = {prompts}: expected a file of prompts, found none; check the path"
            )
        if self.search.reuse and not (Path(self.search.reuse) / "ledger.log").is_file():
            problems.append(
                f"search.reuse = {self.search.reuse}: expected the folder of an earlier run, found no ledger.log there; "
                "check the path"
            )
        if problems:
            raise RecipeError(f"recipe: {_count(problems)}\n" + "\n".join(f"  {problem}" for problem in problems))


def recipe_schema() -> dict[str, Any]:
    """The recipe's JSON schema, with every key's description."""
    return Recipe.model_json_schema()


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that is written twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if str(key) in seen:
                raise yaml.MarkedYAMLError(problem=f"key {key!r} is written twice", problem_mark=key_node.start_mark)
            seen.add(str(key))
        return super().construct_mapping(node, deep)


def _override(data: dict, override: str) -> None:
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(f"--set {override}: expected section.key=value, such as search.evaluations=8")
    try:
        value = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {override}: expected a value in YAML; {error}") from None
    for part in path[:-1]:
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            raise RecipeError(f"--set {override}: {part} holds {data!r}, no keys; set {part} as a whole")
    data[path[-1]] = value


def _count(problems: Sequence[str]) -> str:
    return "1 problem" if len(problems) == 1 else f"{len(problems)} problems"


def _problem(detail: Any) -> str:
    """One pydantic error as `key.path = value: expected ...; remedy`."""
    location = detail["loc"]
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    section, field = _schema_at(location)
    meaning = re.split(r"[.;] ", " ".join(field.split()))[0].rstrip(".") if field else ""
    if detail["type"] == "missing":
        return f"{path}: expected it, found nothing; add it: {meaning}"
    if detail["type"] == "extra_forbidden":
        known = list(section.model_fields) if section else []
        near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.6)
        remedy = f"did you mean {near[0]}?" if near else f"choose among {', '.join(known)}"
        return f"{path} = {_short(detail['input'])}: unknown key; {remedy}"
    message = detail["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    message = re.sub(r"^(\w+) should have", lambda found: f"expected a {found[1].lower()} with", message)
    message = re.sub(r"^(\w+) should match", lambda found: f"expected a {found[1].lower()} that matches", message)
    if detail["type"] == "tuple_type":
        message = f"expected a list, such as [{_short(detail['input'])}]"
    if detail["type"] in ("model_type", "dict_type"):
        message = "expected a mapping of keys"
    if detail["type"] == "too_short":
        message = "expected at least one item"
    shown = f"{path} = {_short(detail['input'])}" if path else "recipe"
    explained = detail["type"] != "value_error" and meaning
    return f"{shown}: {message[:1].lower()}{message[1:]}" + (f"; it is: {meaning}" if explained else "")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _schema_at(location: tuple) -> tuple[type[Section] | None, str | None]:
    """The section that holds the last key of `location`, and that key's description."""
    section: type[Section] | None = Recipe
    description = None
    for i, part in enumerate(location):
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        if field is None:
            return section, description if i < len(location) - 1 else None
        description = field.description
        inner = section_in(field.annotation)
        if i < len(location) - 1 and any(not isinstance(rest, int) for rest in location[i + 1 :]):
            section = inner
    return section, description


def section_in(annotation: Any) -> type[Section] | None:
    """The section that a key holds, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inner = (section_in(argument) for argument in getattr(annotation, "__args__", ()))
    return next((section for section in inner if section), None)
