"""A decoder as data: its shape, and the weights of one student. Knows nothing of transformers or ONNX.

Names of a student's tensors, `{i}` being the block; those of an encoder begin with `encoder.`:

    embedding                      [vocabulary, hidden]       head (only when untied)  [vocabulary, hidden]
    layers.{i}.attention.q/k/v     [heads * head_dim, hidden]  (k, v: kv_heads * head_dim)
    layers.{i}.attention.o         [hidden, heads * head_dim]
    layers.{i}.attention.distances [heads, distance_buckets]   (only with biases by distance)
    layers.{i}.cross.q/k/v/o       as of the attention         (only with an encoder)
    layers.{i}.ffn.gate/up         [channels, hidden]          layers.{i}.ffn.down      [hidden, channels]
    layers.{i}.attention.norm, layers.{i}.ffn.norm, norm       [hidden]

and whatever else `Decoder.vectors` names. A dropped sub-layer has none of its tensors; a matrix may come with a bias. Where
the feed-forward is a mixture, its matrices are those of `layers.{i}.ffn.experts.{e}` and `layers.{i}.ffn.shared`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from math import log
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from compressor.plan import Action, Matrix, Plan, Site
from compressor.quantize import STORED_PARTS, Weight

Precision = Literal["float32", "float16"]
"""Of what a deployed student computes, and of all floats that lie beside its codes."""

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "tanh"]
Pooling = Literal["first", "mean"]


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of the feed-forward of some blocks, `layers` (Shazeer et al. 2017).

    count: experts of a mixture, each a feed-forward of so many channels. A router, softmax(W x), says which `active` ones a
    token runs through; what they give is added up, in the measure of their probabilities, which `normalized` makes sum to 1.
    shared: channels of one more expert, through which all tokens run, in the measure of sigmoid(w x); 0 is none.
    """

    layers: tuple[int, ...]
    count: int
    active: int
    channels: int
    normalized: bool
    shared: int = 0


@dataclass(frozen=True)
class Decoder:
    """Shape of a decoder or an encoder at full size: blocks of grouped-query attention and a feed-forward.

    causal: a token sees those before it, and the next is predicted; else all, and masked ones are predicted.
    norm: of root mean squares, or of the variance, with a bias if `norm_bias`. norm_first: the norm in front of a sub-layer
    is of what the sub-layer reads; else the stream itself is normalized. embedding_norm: it is in front of the first one.
    transform: in front of the head there are a square matrix, an activation, that of the feed-forwards if none is named, and
    a norm, unless there is none.
    classes: of whole texts, whose first token the transform and the head read; 0 is a language model. Of an embedder the
    texts that every text is compared with, one until they are known (`network.Network.compare_with`); they are not deployed.
    pooling: of an embedder, what becomes of a text's tokens: the first one's vector, or the mean of all. normalized: the
    embedding is of length 1.
    biases: which of q, k, v, o, gate, up, down, transform and head have one.
    rope_frequencies: inverse frequencies, [head_dim / 2], none without rotary positions; rope_scale multiplies cos and sin.
    local_frequencies: in their place in local attentions.
    learned_positions: a table of positions is added to the embedding. embedding_scale: factor of the embedding.
    qk_norm: every head's query and key have a root-mean-square norm in front of the rotation. post_norm: there is a norm
    behind every sub-layer, too. parallel: the feed-forward reads the stream in front of the attention.
    window: positions that a local attention sees, its own and those before it, or as many on both sides where it is not
    causal; local: the blocks whose attention is local.
    attention_cap, logit_cap: a score or logit x becomes cap tanh(x / cap).
    experts: the mixtures that there are in place of feed-forwards.
    distance_buckets: to every score of a head is added what its table says of the distance, which falls into one of so many
    buckets (see `buckets`); distance_reach: tokens from which on all distances are one.
    encoder: what reads the text that this decoder answers; every block has an attention across to it, the embedding is one.
    prefix: of the names of an encoder's tensors. start: of a decoder with an encoder, the token that every answer begins
    behind. pad: of encoder-decoders, classifiers and embedders, the token that fills up texts and is not seen.
    precision: of the students that are exported; torch computes in float32.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    vocabulary: int
    max_positions: int
    norm_epsilon: float
    rope_frequencies: tuple[float, ...]
    rope_scale: float
    tied: bool
    causal: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_bias: bool = True
    norm_first: bool = True
    embedding_norm: bool = False
    transform: bool = False
    transform_activation: Activation | None = None
    transform_norm: bool = True
    classes: int = 0
    pooling: Pooling | None = None
    normalized: bool = False
    activation: Activation = "silu"
    gated: bool = True
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    post_norm: bool = False
    parallel: bool = False
    learned_positions: bool = False
    embedding_scale: float = 1.0
    window: int | None = None
    local: tuple[int, ...] = ()
    local_frequencies: tuple[float, ...] = ()
    attention_cap: float | None = None
    logit_cap: float | None = None
    experts: Experts | None = None
    distance_buckets: int = 0
    distance_reach: int = 0
    encoder: Decoder | None = None
    prefix: str = ""
    start: int = 0
    pad: int = 0
    precision: Precision = "float32"

    def __post_init__(self) -> None:
        if self.encoder:
            object.__setattr__(self, "encoder", replace(self.encoder, precision=self.precision))

    def sites(self) -> tuple[Site, ...]:
        """Every site, in depth order: embedding, then those of each block, an encoder's first, then an untied head."""
        table = Matrix("embedding", self.vocabulary, self.hidden, "neither")
        sites = [Site("embedding", "embedding", None, 1, (table,), self.floats.itemsize)]
        sites += [*(self.encoder.block_sites() if self.encoder else ()), *self.block_sites()]
        if not self.tied and not self.classes:
            head = Matrix("head", self.vocabulary, self.hidden, "neither", "head" in self.biases)
            sites.append(Site("head", "head", None, 1, (head,), self.floats.itemsize))
        return tuple(sites)

    def block_sites(self) -> Iterator[Site]:
        """Those of its own blocks: attention, attention across where there is an encoder, feed-forward or every expert."""
        hidden, heads, groups = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        size = self.floats.itemsize

        def matrix(site: str, part: str, rows: int, columns: int) -> Matrix:
            pruned: Literal["rows", "columns"] = "columns" if part in ("o", "down") else "rows"
            return Matrix(f"{site}.{part}", rows, columns, pruned, part in self.biases)

        def attention(name: str, layer: int, across: bool) -> Site:
            readers = [matrix(name, part, rows, hidden) for part, rows in (("q", heads), ("k", groups), ("v", groups))]
            matrices = (*readers, matrix(name, "o", hidden, heads))
            if across:
                return Site(name, "attention", layer, self.kv_heads, matrices, size, part="cross")
            tables = (matrix(name, "distances", self.heads, self.distance_buckets),) if self.distance_buckets else ()
            return Site(name, "attention", layer, self.kv_heads, matrices, size, part=self.part, tables=tables)

        def feed_forward(name: str, layer: int, channels: int, share: float = 1.0) -> Site:
            readers = [matrix(name, part, channels, hidden) for part in (("gate", "up") if self.gated else ("up",))]
            matrices = (*readers, matrix(name, "down", hidden, channels))
            return Site(name, "ffn", layer, channels, matrices, size, share=share, part=self.part)

        for i in range(self.layers):
            block = f"{self.prefix}layers.{i}"
            yield attention(f"{block}.attention", i, across=False)
            if self.encoder:
                yield attention(f"{block}.cross", i, across=True)
            if experts := self.experts_of(i):
                share = experts.active / experts.count
                for e in range(experts.count):
                    yield feed_forward(f"{block}.ffn.experts.{e}", i, experts.channels, share)
                if experts.shared:
                    yield feed_forward(f"{block}.ffn.shared", i, experts.shared)
            else:
                yield feed_forward(f"{block}.ffn", i, self.channels)

    def sub_layers(self) -> dict[str, list[Site]]:
        """The sites of every sub-layer of its own blocks, by its name, in depth order: one, or the experts of a mixture."""
        found: dict[str, list[Site]] = {}
        for site in self.block_sites():
            found.setdefault(site.sub_layer, []).append(site)
        return found

    def every_sub_layer(self) -> dict[str, list[Site]]:
        """Those of its encoder, and its own."""
        return (self.encoder.sub_layers() if self.encoder else {}) | self.sub_layers()

    @property
    def part(self) -> Literal["encoder", "decoder"] | None:
        """`Site.part` of its sub-layers but those across."""
        if self.prefix:
            return "encoder"
        return "decoder" if self.encoder else None

    def stack_of(self, name: str) -> Decoder:
        """The shape of the blocks that a site or a sub-layer belongs to: the encoder's or this one."""
        return self.encoder if self.encoder and name.startswith(self.encoder.prefix) else self

    def vectors(self) -> dict[str, tuple[int, ...]]:
        """Shape of all that is stored beside the matrices, by name, which begins with that of what it belongs to."""
        norms = {f"{self.prefix}norm": self.hidden}
        norms |= {"transform_norm": self.hidden} if self.transform and self.transform_norm else {}
        for name, (site, *_) in self.sub_layers().items():
            norms |= {f"{name}.norm": self.hidden} | ({f"{name}.post_norm": self.hidden} if self.post_norm else {})
            if site.kind == "attention" and self.qk_norm:
                norms |= {f"{name}.q_norm": self.head_dim, f"{name}.k_norm": self.head_dim}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, length in norms.items():
            biased = self.norm == "layer" and self.norm_bias and not name.endswith(("q_norm", "k_norm"))
            shapes |= {name: (length,)} | ({f"{name}.bias": (length,)} if biased else {})
        if self.learned_positions:
            shapes[f"{self.prefix}positions"] = (self.max_positions, self.hidden)
        if self.transform:
            shapes["transform"] = (self.hidden, self.hidden)
            shapes |= {"transform.bias": (self.hidden,)} if "transform" in self.biases else {}
        if self.classes and not self.pooling:
            shapes["head"] = (self.classes, self.hidden)
        if (self.tied or self.classes) and "head" in self.biases:
            shapes["head.bias"] = (self.outputs,)
        for i in range(self.layers):
            if experts := self.experts_of(i):
                shapes[f"layers.{i}.ffn.router"] = (experts.count, self.hidden)
                shapes |= {f"layers.{i}.ffn.shared.router": (1, self.hidden)} if experts.shared else {}
        return shapes | (self.encoder.vectors() if self.encoder else {})

    def vectors_of(self, plan: Mapping[str, Action]) -> list[str]:
        """Names of the vectors that a plan's student has: a mixture's while there is an expert of it. Where a dropped
        sub-layer's norm is of the stream, it stays."""
        dropped = {name for name, action in plan.items() if action.keep == 0}
        sub_layers = self.every_sub_layer()
        dropped |= {name for name, sites in sub_layers.items() if all(site.name in dropped for site in sites)}
        gone = tuple(f"{name}." for name in dropped)
        kept = {f"{name}.{part}" for name in sub_layers if self.norms_stream(name) for part in ("norm", "norm.bias")}
        return [name for name in self.vectors() if name in kept or not name.startswith(gone)]

    def norms_stream(self, sub_layer: str) -> bool:
        """Whether the norm in front of a sub-layer is of the stream itself, which the sub-layer then reads and adds to."""
        stack = self.stack_of(sub_layer)
        first = f"{stack.prefix}layers.0.attention"
        return not stack.norm_first or (stack.embedding_norm and sub_layer == first)

    @property
    def outputs(self) -> int:
        """What the head chooses among: tokens or classes."""
        return self.classes or self.vocabulary

    @property
    def filler(self) -> int:
        """A token that is no padding, for texts that only take time."""
        return int(self.pad == 0)

    @property
    def floats(self) -> np.dtype:
        """Of exported students."""
        return np.dtype(self.precision)

    @property
    def longest(self) -> int | None:
        """Positions that a text may have; None without a limit."""
        limited = self.learned_positions or self.rope_frequencies or self.local_frequencies
        return self.max_positions if limited else None

    def window_of(self, layer: int) -> int | None:
        """Positions that the attention of a block sees; None is all of them."""
        return self.window if layer in self.local else None

    def experts_of(self, layer: int) -> Experts | None:
        """The mixture in place of the feed-forward of a block."""
        return self.experts if self.experts and layer in self.experts.layers else None

    def frequencies_of(self, layer: int) -> tuple[float, ...]:
        """Inverse frequencies of the rotation in the attention of a block; none without."""
        return (layer in self.local and self.local_frequencies) or self.rope_frequencies

    def heads_of(self, action: Action) -> tuple[int, int]:
        """(query heads, key/value heads) of an attention under `action`; query heads go with their group."""
        return action.keep * self.heads // self.kv_heads, action.keep

    def buckets(self) -> Tensor:
        """The bucket of every distance from -`distance_reach` to `distance_reach`, int64 [2 reach + 1]: of a key from its
        query, those beyond being as those at the ends. Half of the buckets have one distance each, the others grow
        logarithmically; where a query sees on either side, each has half of all (Raffel et al. 2020, "T5", section 2.1).
        """
        distance = torch.arange(-self.distance_reach, self.distance_reach + 1)
        count = self.distance_buckets if self.causal else self.distance_buckets // 2
        away = (-distance).clamp_min(0) if self.causal else distance.abs()
        exact = count // 2
        far = torch.log(away.clamp_min(1).float() / exact) / log(self.distance_reach / exact) * (count - exact)
        bucket = torch.where(away < exact, away, (exact + far.long()).clamp_max(count - 1))
        return bucket if self.causal else bucket + count * (distance > 0)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True)
class Forced:
    """Tokens that every answer of an encoder-decoder begins with, and ends with where it would be longer than it may."""

    first: int | None = None
    last: int | None = None

    @classmethod
    def of(cls, generation: Mapping[str, Any]) -> Forced:
        """Those of transformers' configuration of a generation; of several ends the smallest, as an argmax takes it."""
        tokens = (generation.get(name) for name in ("forced_bos_token_id", "forced_eos_token_id"))
        return cls(*(None if token is None else int(np.min(token)) for token in tokens))

    def at(self, place: int, length: int) -> int | None:
        """The one at a place of an answer of at most `length` tokens."""
        if place == length - 1 and self.last is not None:
            return self.last
        return self.first if place == 0 else None


@dataclass(frozen=True)
class Student:
    """Everything that is needed to run or to export one student.

    matrices: the weight matrices by name, in memory or `Lazy`; vectors: what is beside them, float32, by the names of
    `Decoder.vectors`.
    """

    decoder: Decoder
    plan: Plan
    matrices: Mapping[str, Weight]
    vectors: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All weights in their stored layout: `{matrix}:{part}` and `{vector}`."""
        return {**matrix_tensors(self.matrices), **self.vectors}

    @classmethod
    def from_tensors(cls, decoder: Decoder, plan: Plan, stored: Mapping[str, Tensor]) -> Student:
        """The inverse of `tensors`; its matrices are unpacked when they are asked for."""
        matrices = Lazy(
            decoder.sites(), plan, lambda site, action, name: matrices_from(site, action, stored, name)[name]
        )
        return cls(decoder, plan, matrices, {name: t for name, t in stored.items() if ":" not in name})


class Lazy(Mapping[str, Weight]):
    """The matrices of some sites under a plan, by name, made when they are asked for, of (site, its action, name)."""

    def __init__(self, sites: Iterable[Site], plan: Mapping[str, Action], make: Callable[[Site, Action, str], Weight]):
        self._owners = {matrix.name: site for site in sites for matrix, _ in site.stored(plan[site.name])}
        self._plan, self._make = plan, make

    def __getitem__(self, name: str) -> Weight:
        site = self._owners[name]
        return self._make(site, self._plan[site.name], name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)


def matrix_tensors(matrices: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Weights -> tensors in their stored layout, named `{matrix}:{part}`."""
    return {f"{name}:{part}": tensor for name, w in matrices.items() for part, tensor in w.tensors().items()}


def matrices_from(
    site: Site, action: Action, stored: Mapping[str, Tensor], only: str | None = None
) -> dict[str, Weight]:
    """The weights of a site under an action, or one of them, out of the tensors that `matrix_tensors` made."""
    matrices = {}
    for matrix, format in site.stored(action):
        if only not in (None, matrix.name):
            continue
        parts = {part: stored[key] for part in STORED_PARTS if (key := f"{matrix.name}:{part}") in stored}
        columns = matrix.shape(action.keep, site.units)[1]
        matrices[matrix.name] = Weight.from_tensors(format, columns, parts)
    return matrices


def full_plan(decoder: Decoder, format: str, table_format: str) -> Plan:
    """Nothing pruned: attention and feed-forward in one format, embedding and head in another."""
    return Plan(tuple((s.name, Action(s.units, table_format if s.layer is None else format)) for s in decoder.sites()))
