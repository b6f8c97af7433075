"""The modules of all models in torch: blocks of attention and feed-forward or experts, with an encoder in front or without,
as a `Decoder` describes them; nothing here knows a family.

Names of modules are those of `compressor.student`. What is done to a model as a whole is `compressor.network`.

Shape letters: B batch, L tokens, S tokens of a source, T of a target, M keys, D hidden, H heads, K head width, V vocabulary;
of mixtures T tokens of all windows, E experts, A active ones, n tokens of one expert.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from compressor.quantize import fake_block_int8
from compressor.student import Decoder, Experts
from compressor.text import plain

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "tanh": torch.tanh,
}


NEARNESS = 0.05
"""Of texts, the difference of cosines that makes one e times as likely to be the nearest: the temperature at which
sentence-transformers trains embedders (its `scale` of 20)."""


@dataclass(frozen=True)
class Source:
    """What an encoder made of some texts, and which of their tokens are padding, None where none is."""

    hidden_BSD: Tensor
    blank_BS: Tensor | None = None


class Cache:
    """Keys and values [B, H, L, K] of the tokens so far, by layer, and of the source that they answer, if there is one."""

    def __init__(self, source: Source | None = None) -> None:
        self.length = 0
        self.source = source
        self._layers: dict[int, _Room] = {}
        self._of_source: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a layer; returns all of it."""
        room = self._layers.setdefault(layer, _Room())
        return room.append(key, value)

    def of_source(self, layer: int, make: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Those of the source, which are made once."""
        if layer not in self._of_source:
            self._of_source[layer] = make()
        return self._of_source[layer]

    def crop(self, length: int) -> None:
        """Forget what lies behind the first `length` tokens."""
        self.length = length
        for room in self._layers.values():
            room.length = length


class _Room:
    """Keys and values of one layer, with room for more behind them: twice as much whenever it gets too small."""

    def __init__(self) -> None:
        self.length = 0
        self._pair: tuple[Tensor, ...] = ()

    def append(self, *fresh: Tensor) -> tuple[Tensor, Tensor]:
        start, end = self.length, self.length + fresh[0].shape[2]
        if not self._pair or self._pair[0].shape[2] < end:
            grown = tuple(one.new_empty(*one.shape[:2], max(end, 2 * start), one.shape[3]) for one in fresh)
            for new, old in zip(grown, self._pair):
                new[:, :, :start] = old[:, :, :start]
            self._pair = grown
        for whole, one in zip(self._pair, fresh):
            whole[:, :, start:end] = one
        self.length = end
        key, value = (whole[:, :, :end] for whole in self._pair)
        return key, value


@dataclass(frozen=True)
class Context:
    """What all attentions of one pass share. rotations: (cos, sin) [L, K] by `Decoder.frequencies_of` an attention;
    buckets_LM: of the distances (`Decoder.buckets`); blank_BM: which tokens are padding, None where none is; source: what
    attentions across read."""

    rotations: dict[tuple[float, ...], tuple[Tensor, Tensor]]
    cache: Cache | None = None
    buckets_LM: Tensor | None = None
    blank_BM: Tensor | None = None
    source: Source | None = None

    @classmethod
    def of(cls, decoder: Decoder, length: int, cache: Cache | None, like: Tensor) -> Context:
        """For `length` tokens behind those in the cache; on the device and of the type of a tensor."""
        start = cache.length if cache else 0
        positions_L = torch.arange(start, start + length, device=like.device)
        rotations, buckets_LM = {}, None
        for frequencies in {decoder.frequencies_of(layer) for layer in range(decoder.layers)} - {()}:
            angles_LK = positions_L.float()[:, None] * torch.tensor(frequencies, device=like.device)
            angles_LK = torch.cat([angles_LK, angles_LK], 1)
            tables = angles_LK.cos() * decoder.rope_scale, angles_LK.sin() * decoder.rope_scale
            rotations[frequencies] = tables[0].to(like.dtype), tables[1].to(like.dtype)
        if decoder.distance_buckets:
            reach = decoder.distance_reach
            distance_LM = torch.arange(start + length, device=like.device) - positions_L[:, None]
            buckets_LM = decoder.buckets().to(like.device)[distance_LM.clamp(-reach, reach) + reach]
        return cls(rotations, cache, buckets_LM, source=cache.source if cache else None)

    def of_windows(self, windows: slice) -> Context:
        """The same for some rows of the batch."""
        blank_BM, source = self.blank_BM, self.source
        if source is not None:
            source = Source(source.hidden_BSD[windows], _rows(source.blank_BS, windows))
        return replace(self, blank_BM=_rows(blank_BM, windows), source=source)


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


class Norm(nn.Module):
    """A norm over the last axis: of root mean squares, or of the variance, with a bias."""

    def __init__(self, size: int, kind: str, epsilon: float, bias: bool = True):
        super().__init__()
        self.kind, self.epsilon = kind, epsilon
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" and bias else None

    @classmethod
    def of(cls, decoder: Decoder) -> Norm:
        """Of the stream."""
        return cls(decoder.hidden, decoder.norm, decoder.norm_epsilon, decoder.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rms":
            return functional.rms_norm(x, self.weight.shape, self.weight, self.epsilon)
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)


class Linear(nn.Linear):
    """block: columns of what it reads whose int8 codes share a scale, as weight-only kernels round it; 0 rounds nothing."""

    block = 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(fake_block_int8(x, self.block) if self.block else x)


Rounder = Callable[[Tensor], Tensor] | None


def seen(x: Tensor, rounding: Rounder, blank_BM: Tensor | None) -> Tensor:
    """What a kernel leaves of x [B, M, I]; padding is nothing to it."""
    if rounding is None:
        return x
    return rounding(x if blank_BM is None else x.masked_fill(blank_BM[..., None], 0.0))


class SubLayer(nn.Module):
    """Attention, feed-forward or mixture with the norms around it; what it gives is added to the residual stream.

    name: None is a feed-forward without norms, an expert. norms_stream: see `Decoder.norms_stream`. dropped: it gives
    nothing. rounding, last_rounding: what is done to what its matrices read, and to what the last one reads, to imitate a
    kernel of int8; None is nothing.
    """

    def __init__(self, decoder: Decoder, name: str | None):
        super().__init__()
        self.norms_stream, self.dropped = name is not None and decoder.norms_stream(name), False
        self.rounding: Rounder = None
        self.last_rounding: Rounder = None
        self.norm = Norm.of(decoder) if name else None
        self.post_norm = Norm.of(decoder) if name and decoder.post_norm else None

    def front(self, x_BLD: Tensor) -> Tensor:
        """The stream behind the last sub-layer -> in front of this one."""
        return self.norm(x_BLD) if self.norm is not None and self.norms_stream else x_BLD

    def read(self, x_BLD: Tensor) -> Tensor:
        """The stream in front of it -> what it reads."""
        return x_BLD if self.norm is None or self.norms_stream else self.norm(x_BLD)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        """x: the stream in front of it."""
        if self.dropped:
            return torch.zeros_like(x_BLD)
        added_BLD = self.inner(seen(self.read(x_BLD), self.rounding, context.blank_BM), context)
        return added_BLD if self.post_norm is None else self.post_norm(added_BLD)

    def weights(self, read_BLD: Tensor) -> Tensor:
        """The measure in which each of its sites' outputs is added, token by token, [B, L, sites]; 0 where a token does not
        reach the site."""
        return read_BLD.new_ones(*read_BLD.shape[:2], 1)

    def inner(self, x_BLD: Tensor, context: Context) -> Tensor:
        raise NotImplementedError


class Attention(SubLayer):
    """Grouped-query attention of block `layer`."""

    part = "attention"

    def __init__(self, decoder: Decoder, layer: int):
        super().__init__(decoder, f"{decoder.prefix}layers.{layer}.{self.part}")
        self.layer, self.width, self.cap, self.causal = layer, decoder.head_dim, decoder.attention_cap, decoder.causal
        self.window, self.frequencies = decoder.window_of(layer), decoder.frequencies_of(layer)
        heads, groups, hidden = decoder.heads * self.width, decoder.kv_heads * self.width, decoder.hidden
        self.q = Linear(hidden, heads, "q" in decoder.biases)
        self.k = Linear(hidden, groups, "k" in decoder.biases)
        self.v = Linear(hidden, groups, "v" in decoder.biases)
        self.o = Linear(heads, hidden, "o" in decoder.biases)
        self.q_norm = Norm(self.width, "rms", decoder.norm_epsilon) if decoder.qk_norm else None
        self.k_norm = Norm(self.width, "rms", decoder.norm_epsilon) if decoder.qk_norm else None
        buckets = decoder.distance_buckets if self.part == "attention" else 0
        self.distances = nn.Linear(buckets, decoder.heads, bias=False) if buckets else None

    def inner(self, x_BLD: Tensor, context: Context) -> Tensor:
        q, k, v = (self._heads(matrix, x_BLD) for matrix in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.frequencies:
            cos_LK, sin_LK = context.rotations[self.frequencies]
            q, k = rotated(q, cos_LK, sin_LK), rotated(k, cos_LK, sin_LK)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)
        near_HLM = None if self.distances is None else self.distances.weight[:, context.buckets_LM]
        bias = _hiding(context.blank_BM, near_HLM)
        return self._written(attend(q, k, v, self.window, self.cap, self.causal, bias), context)

    def _heads(self, matrix: Linear, x_BLD: Tensor) -> Tensor:
        """What a matrix gives, head by head: [B, H, L, K]."""
        return matrix(x_BLD).unflatten(-1, (-1, self.width)).transpose(1, 2)

    def _written(self, mixed_BHLK: Tensor, context: Context) -> Tensor:
        return self.o(seen(mixed_BHLK.transpose(1, 2).flatten(2), self.last_rounding, context.blank_BM))


class Cross(Attention):
    """Attention across, to what the encoder gave."""

    part = "cross"

    def inner(self, x_BLD: Tensor, context: Context) -> Tensor:
        source = context.source
        assert source is not None, "attention across without a source"

        def make() -> tuple[Tensor, Tensor]:
            read_BSD = seen(source.hidden_BSD, self.rounding, source.blank_BS)
            return self._heads(self.k, read_BSD), self._heads(self.v, read_BSD)

        k, v = make() if context.cache is None else context.cache.of_source(self.layer, make)
        bias = _hiding(source.blank_BS, None)
        return self._written(attend(self._heads(self.q, x_BLD), k, v, None, self.cap, False, bias), context)


def _hiding(blank_BM: Tensor | None, bias_HLM: Tensor | None) -> Tensor | None:
    """What is added to scores, [H, L, M] or [B, H or 1, L or 1, M]: this, and no attention to padding."""
    if blank_BM is None:
        return bias_HLM
    zeros = torch.zeros((), device=blank_BM.device) if bias_HLM is None else bias_HLM
    return zeros.masked_fill(blank_BM[:, None, None], -torch.inf)


class FeedForward(SubLayer):
    """down(activation(gate x) * up x), or without a gate down(activation(up x))."""

    def __init__(self, decoder: Decoder, name: str | None, channels: int):
        super().__init__(decoder, name)
        self.activation, hidden = decoder.activation, decoder.hidden
        self.gate = Linear(hidden, channels, "gate" in decoder.biases) if decoder.gated else None
        self.up = Linear(hidden, channels, "up" in decoder.biases)
        self.down = Linear(channels, hidden, "down" in decoder.biases)

    def inner(self, x_BLD: Tensor, context: Context) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        inner = activate(self.up(x_BLD)) if self.gate is None else activate(self.gate(x_BLD)) * self.up(x_BLD)
        return self.down(seen(inner, self.last_rounding, context.blank_BM))


class SharedExpert(FeedForward):
    """An expert that all tokens run through; its router says in which measure."""

    def __init__(self, decoder: Decoder, channels: int):
        super().__init__(decoder, None, channels)
        self.router = nn.Linear(decoder.hidden, 1, bias=False)


class Mixture(SubLayer):
    """The experts of block `layer` (see `compressor.student.Experts`), which are sites; a token runs through those alone that
    it is routed to, and through the shared one."""

    def __init__(self, decoder: Decoder, layer: int, experts: Experts):
        super().__init__(decoder, f"layers.{layer}.ffn")
        self.active, self.normalized = experts.active, experts.normalized
        self.router = nn.Linear(decoder.hidden, experts.count, bias=False)
        self.experts = nn.ModuleList(FeedForward(decoder, None, experts.channels) for _ in range(experts.count))
        self.shared = SharedExpert(decoder, experts.shared) if experts.shared else None

    def weights(self, read_BLD: Tensor) -> Tensor:
        p_BLE = self.router(read_BLD).float().softmax(-1)
        best = p_BLE.topk(self.active)
        taken_BLA = best.values / best.values.sum(-1, keepdim=True) if self.normalized else best.values
        weight_BLE = torch.zeros_like(p_BLE).scatter(-1, best.indices, taken_BLA)
        if self.shared is not None:
            weight_BLE = torch.cat([weight_BLE, self.shared.router(read_BLD).float().sigmoid()], -1)
        return weight_BLE.to(read_BLD.dtype)

    def inner(self, x_BLD: Tensor, context: Context) -> Tensor:
        x_TD, weight_ET = x_BLD.flatten(0, 1), self.weights(x_BLD).flatten(0, 1).T
        sites = [*self.experts, *([] if self.shared is None else [self.shared])]
        site_R, token_R = weight_ET.nonzero(as_tuple=True)  # all R routes, sorted by expert
        tokens = token_R.split(site_R.bincount(minlength=len(sites)).tolist())
        added_TD = torch.zeros_like(x_TD)
        for site, weight_T, token_n in zip(sites, weight_ET, tokens, strict=True):
            if len(token_n) and not site.dropped:
                given_nD = self._given(site, x_TD[token_n], token_n // x_BLD.shape[1], context)
                added_TD.index_add_(0, token_n, (weight_T[token_n, None] * given_nD).to(added_TD.dtype))
        return added_TD.view_as(x_BLD)

    @staticmethod
    def _given(expert: SubLayer, x_nD: Tensor, window_n: Tensor, context: Context) -> Tensor:
        """What an expert gives for tokens of some windows; where it rounds, as if every window ran alone."""
        rounds = expert.rounding or expert.last_rounding
        counts = window_n.unique_consecutive(return_counts=True)[1].tolist() if rounds else [len(x_nD)]
        return torch.cat([expert(x_pD[None], context)[0] for x_pD in x_nD.split(counts)])


class Block(nn.Module):
    def __init__(self, decoder: Decoder, layer: int):
        super().__init__()
        self.parallel = decoder.parallel
        self.attention = Attention(decoder, layer)
        self.cross = Cross(decoder, layer) if decoder.encoder else None
        experts, name = decoder.experts_of(layer), f"{decoder.prefix}layers.{layer}.ffn"
        self.ffn = Mixture(decoder, layer, experts) if experts else FeedForward(decoder, name, decoder.channels)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        front_BLD = self.attention.front(x_BLD)
        behind_BLD = front_BLD + self.attention(front_BLD, context)
        if self.cross is not None:
            across_BLD = self.cross.front(behind_BLD)
            behind_BLD = across_BLD + self.cross(across_BLD, context)
        behind_BLD = self.ffn.front(behind_BLD)
        return behind_BLD + self.ffn(front_BLD if self.parallel else behind_BLD, context)


class Stack(nn.Module):
    """Blocks between rows of an embedding and a last norm: an encoder, or the better part of a `Transformer`."""

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.positions = nn.Embedding(decoder.max_positions, decoder.hidden) if decoder.learned_positions else None
        self.layers = nn.ModuleList(Block(decoder, layer) for layer in range(decoder.layers))
        self.norm = Norm.of(decoder)

    def front(self, rows_BLD: Tensor, start: int = 0) -> Tensor:
        """Rows of the embedding -> the stream in front of the first block. start: position of the first token."""
        x_BLD = rows_BLD
        if self.decoder.embedding_scale != 1:
            x_BLD = x_BLD * self.decoder.embedding_scale
        if self.positions is not None:
            x_BLD = x_BLD + self.positions(torch.arange(start, start + x_BLD.shape[1], device=x_BLD.device))
        return x_BLD

    def states(self, x_BLD: Tensor, context: Context, again: bool = False) -> Iterator[Tensor]:
        """The stream in front of the first block and behind every block. again: see `Transformer.checkpointing`."""
        yield x_BLD
        for block in self.layers:
            x_BLD = checkpoint(block, x_BLD, context, use_reentrant=False) if again else block(x_BLD, context)
            yield x_BLD

    def context(self, length: int, cache: Cache | None = None) -> Context:
        """For `length` tokens behind those in the cache."""
        return Context.of(self.decoder, length, cache, self.norm.weight)


@dataclass(frozen=True)
class Sides:
    """Windows of an encoder-decoder (see `text.Spans`) as its two halves read them.

    source_BS: without columns of padding alone; target_BT: at every place the token in front of the one that is to be said
    there; said_BT: whether there is one; first: place of the target in the window.
    """

    source_BS: Tensor
    target_BT: Tensor
    said_BT: Tensor
    first: int

    @classmethod
    def of(cls, decoder: Decoder, ids_BL: Tensor) -> Sides:
        said_BL = ids_BL < 0
        (marked,) = said_BL.any(0).nonzero(as_tuple=True)
        if not len(marked):
            raise ValueError("expected windows of a source and a target, whose tokens are written ~id; found no target")
        first, end = int(marked[0]), int(marked[-1]) + 1
        longest = int((ids_BL[:, :first] != decoder.pad).sum(1).max())
        before_BT = plain(ids_BL)[:, first : end - 1]
        target_BT = torch.cat([torch.full_like(ids_BL[:, :1], decoder.start), before_BT], 1)
        return cls(ids_BL[:, :longest], target_BT, said_BL[:, first:end], first)

    def widened(self, hidden_BTD: Tensor, length: int) -> Tensor:
        """[B, `length`, D], with zeros for places that are not the target's."""
        behind = length - self.first - hidden_BTD.shape[1]
        return functional.pad(hidden_BTD, (0, 0, self.first, behind))


class Transformer(Stack):
    """A language model: token ids [B, L] -> logits [B, L, V]; with an encoder, windows of source and target (`Sides`). Or a
    classifier: -> [B, classes]; or an embedder: -> [B, D].

    What the head of an embedder has are embeddings of other texts, so that its logits say which of them a text is near:
    cosines over `NEARNESS`. So what is distilled and scored is how near a text is to others, as in Fang et al. 2021 ("SEED",
    section 3.2).

    checkpointing: a backward pass computes every block once more instead of keeping what is inside it (Chen et al. 2016).
    """

    def __init__(self, decoder: Decoder):
        super().__init__(decoder)
        self.checkpointing = False
        self.embedding = nn.Embedding(decoder.vocabulary, decoder.hidden)
        self.encoder = Stack(decoder.encoder) if decoder.encoder else None
        self.transform, self.transform_norm = None, None
        if decoder.transform:
            self.transform = nn.Linear(decoder.hidden, decoder.hidden, "transform" in decoder.biases)
            self.transform_norm = Norm.of(decoder) if decoder.transform_norm else None
        self.head = Linear(decoder.hidden, decoder.outputs, "head" in decoder.biases)
        if decoder.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids_BL: Tensor) -> Tensor:
        hidden_BLD = self.hidden(ids_BL)
        if self.decoder.pooling:
            return hidden_BLD[:, 0]
        logits_BLV = self.logits(hidden_BLD)
        return logits_BLV[:, 0] if self.decoder.classes else logits_BLV

    def hidden(self, ids_BL: Tensor, cache: Cache | None = None) -> Tensor:
        """What the head reads, [B, L, D], behind the last norm. cache: of the tokens before, to which these are added; with
        an encoder, of its source, see `begin`. Without, windows are read, and what is not their target has zeros."""
        sides = self._sides(ids_BL) if cache is None else None
        (last_BLD,) = deque(self._states(ids_BL, sides, cache), maxlen=1)  # the others need not lie in memory
        return self.end(last_BLD, sides, ids_BL.shape[1], self.blank(ids_BL))

    def every_hidden(self, ids_BL: Tensor) -> list[Tensor]:
        """Hidden states [B, L, D] of the embedding and behind every block, an encoder's first; the last one is what the
        head reads."""
        sides = self._sides(ids_BL)
        *states, last_BLD = self._states(ids_BL, sides)
        return [*states, self.end(last_BLD, sides, ids_BL.shape[1], self.blank(ids_BL))]

    def begin(self, ids_BL: Tensor) -> tuple[Tensor, Cache]:
        """What the text that follows these is begun with: (tokens to be read first, the cache behind which they are)."""
        if self.encoder is None:
            return ids_BL, Cache()
        front_BSD, context = self.read(ids_BL)
        (last_BSD,) = deque(self.encoder.states(front_BSD, context), maxlen=1)
        start_B1 = torch.full_like(ids_BL[:, :1], self.decoder.start)
        return start_B1, Cache(self.source(last_BSD, context))

    def _sides(self, ids_BL: Tensor) -> Sides | None:
        return None if self.encoder is None else Sides.of(self.decoder, ids_BL)

    def end(self, x_BLD: Tensor, sides: Sides | None, length: int, blank_BL: Tensor | None) -> Tensor:
        """The stream behind the last block -> what the head reads; of windows of two sides, for all of their `length`; of an
        embedder, in the first place. blank_BL: which tokens are padding, None where none is."""
        x_BLD = self.norm(x_BLD)
        if self.decoder.pooling:
            return torch.cat([self._embedding_of(x_BLD, blank_BL)[:, None], x_BLD[:, 1:]], 1)
        if sides is not None:
            x_BLD = sides.widened(x_BLD, length)
        if self.transform is None:
            return x_BLD
        x_BLD = ACTIVATIONS[self.decoder.transform_activation or self.decoder.activation](self.transform(x_BLD))
        return x_BLD if self.transform_norm is None else self.transform_norm(x_BLD)

    def _embedding_of(self, x_BLD: Tensor, blank_BL: Tensor | None) -> Tensor:
        """Last hidden states of texts -> their embeddings [B, D]."""
        pooled_BD = x_BLD[:, 0]
        if self.decoder.pooling == "mean":
            weight_BL = x_BLD.new_ones(x_BLD.shape[:2]) if blank_BL is None else (~blank_BL).to(x_BLD.dtype)
            pooled_BD = (weight_BL[:, None] @ x_BLD)[:, 0] / weight_BL.sum(1, keepdim=True)
        return functional.normalize(pooled_BD, dim=-1) if self.decoder.normalized else pooled_BD

    def _states(self, ids_BL: Tensor, sides: Sides | None, cache: Cache | None = None) -> Iterator[Tensor]:
        """The stream in front of the first block and behind every block, an encoder's first."""
        again = self.checkpointing and torch.is_grad_enabled()
        if sides is not None:
            assert self.encoder is not None
            x_BLD, context = self.read(sides.source_BS)
            for behind_BSD in self.encoder.states(x_BLD, context, again):
                yield behind_BSD
            x_BLD, context = self.answer(sides, self.source(behind_BSD, context))
        else:
            x_BLD, context = self.placed(ids_BL, cache)
        yield from self.states(x_BLD, context, again)
        if cache is not None:
            cache.length += ids_BL.shape[1]

    def read(self, source_BS: Tensor) -> tuple[Tensor, Context]:
        """A source in front of the encoder's first block."""
        assert self.encoder is not None
        blank_BS = _some(source_BS == self.decoder.pad)
        context = replace(self.encoder.context(source_BS.shape[1]), blank_BM=blank_BS)
        return self.encoder.front(self.embedding(source_BS)), context

    def source(self, behind_BSD: Tensor, context: Context) -> Source:
        """The stream behind the encoder's last block -> what the decoder reads of it."""
        assert self.encoder is not None
        return Source(self.encoder.norm(behind_BSD), context.blank_BM)

    def answer(self, sides: Sides, source: Source) -> tuple[Tensor, Context]:
        """A target in front of the first block."""
        context = replace(self.context(sides.target_BT.shape[1]), blank_BM=_some(~sides.said_BT), source=source)
        return self.embedded(sides.target_BT), context

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Hidden states -> logits [B, L, V]."""
        if self.decoder.pooling:
            return self.head(functional.normalize(hidden_BLD, dim=-1)) / NEARNESS
        logits_BLV, cap = self.head(hidden_BLD), self.decoder.logit_cap
        return logits_BLV if cap is None else cap * torch.tanh(logits_BLV / cap)

    def embedded(self, ids_BL: Tensor, start: int = 0) -> Tensor:
        """The stream in front of the first block. start: position of the first token."""
        return self.front(self.embedding(ids_BL), start)

    def placed(self, ids_BL: Tensor, cache: Cache | None = None) -> tuple[Tensor, Context]:
        """Tokens behind those in the cache, in front of the first block."""
        context = replace(self.context(ids_BL.shape[1], cache), blank_BM=self.blank(ids_BL))
        return self.embedded(ids_BL, cache.length if cache else 0), context

    def blank(self, ids: Tensor) -> Tensor | None:
        """Which tokens of a classifier's or an embedder's texts are padding; None where none is."""
        return _some(ids == self.decoder.pad) if self.decoder.classes else None


def _some(blank_BM: Tensor) -> Tensor | None:
    return blank_BM if blank_BM.any() else None


def rotated(x_BHLK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Heads turned by position (Su et al. 2021, "RoFormer"), their halves being the pairs, as in GPT-NeoX."""
    first, second = x_BHLK.chunk(2, -1)
    return x_BHLK * cos_LK + torch.cat([-second, first], -1) * sin_LK


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    cap: float | None,
    causal: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention of queries [B, H, L, K] at the last L positions of keys and values [B, G, M, K].

    window: positions that a query sees, see `Decoder`. cap: scores x become cap tanh(x / cap). bias: is added to them.
    """
    product = partial(functional.scaled_dot_product_attention, q, k, v, enable_gqa=True)
    length, total = q.shape[2], k.shape[2]
    plain = window is None or total <= window
    if cap is None and plain and (not causal or (bias is None and length in (1, total))):
        return product(attn_mask=bias, is_causal=causal and length > 1)
    distance_LM = torch.arange(total - length, total, device=q.device)[:, None] - torch.arange(total, device=q.device)
    distance_LM = distance_LM if causal else distance_LM.abs()
    visible_LM = (distance_LM >= 0) if window is None else (distance_LM >= 0) & (distance_LM < window)
    if cap is None:
        if bias is None:
            return product(attn_mask=visible_LM)
        mask = bias.masked_fill(~visible_LM, -torch.inf)
        # padding far from all text sees nothing, and a softmax over nothing is no number
        mask = mask.masked_fill(mask.isneginf().all(-1, keepdim=True), 0.0)
        return product(attn_mask=mask)
    k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], 1) for side in (k, v))
    scores = cap * torch.tanh(q @ k.transpose(2, 3) / q.shape[3] ** 0.5 / cap)
    scores = scores if bias is None else scores + bias
    return scores.masked_fill(~visible_LM, -torch.inf).softmax(-1) @ v
