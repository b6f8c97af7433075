"""A decoder in torch, as a `Decoder` describes it: all families run on it, so nothing here knows any.

`Transformer` are the modules, whose names are those of `compressor.student`; `Network` is what everything else sees of
them: matrices by name, inputs that can be watched, and sites that can be replaced; `Stream` walks through it sub-layer by
sub-layer.

Shape letters: B batch, N windows, L tokens, D hidden, H heads, K head width, I inputs of a matrix, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from compressor.plan import Action, Format, Site
from compressor.quantize import Weight, fake_block_int8, fake_dynamic_int8, fake_row_int8
from compressor.student import Decoder, Experts

Rounding = Literal["none", "dynamic", "all"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "tanh": torch.tanh,
}


class Cache:
    """Keys and values [B, H, L, K] of the tokens so far, by layer."""

    def __init__(self) -> None:
        self.length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a layer; returns all of it."""
        if layer in self._layers:
            key, value = (torch.cat(pair, 2) for pair in zip(self._layers[layer], (key, value), strict=True))
        self._layers[layer] = key, value
        return key, value

    def crop(self, length: int) -> None:
        """Forget what lies behind the first `length` tokens."""
        self.length = length
        self._layers = {
            layer: (key[:, :, :length], value[:, :, :length]) for layer, (key, value) in self._layers.items()
        }


@dataclass(frozen=True)
class Context:
    """What all attentions of one pass share. rotations: (cos, sin) [L, K] by `Decoder.frequencies_of` an attention. visible:
    [B, L], false for padding; None without any."""

    rotations: dict[tuple[float, ...], tuple[Tensor, Tensor]]
    cache: Cache | None = None
    visible: Tensor | None = None

    @classmethod
    def of(
        cls, decoder: Decoder, length: int, cache: Cache | None, like: Tensor, visible: Tensor | None = None
    ) -> Context:
        """For `length` tokens behind those in the cache; on the device and of the type of a tensor."""
        start = cache.length if cache else 0
        positions_L1 = torch.arange(start, start + length, device=like.device, dtype=torch.float32)[:, None]
        rotations = {}
        for frequencies in {decoder.frequencies_of(layer) for layer in range(decoder.layers)} - {()}:
            angles_LK = positions_L1 * torch.tensor(frequencies, device=like.device)
            angles_LK = torch.cat([angles_LK, angles_LK], 1)
            tables = angles_LK.cos() * decoder.rope_scale, angles_LK.sin() * decoder.rope_scale
            rotations[frequencies] = tables[0].to(like.dtype), tables[1].to(like.dtype)
        return cls(rotations, cache, visible)

    def of_windows(self, windows: slice) -> Context:
        """For some of the batch."""
        return self if self.visible is None else replace(self, visible=self.visible[windows])


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


class SubLayer(nn.Module):
    """Attention, feed-forward or mixture with the norms around it; what it gives is added to the residual stream.

    name: None is a feed-forward without norms, an expert. norms_stream: see `Decoder.norms_stream`. dropped: it gives
    nothing. rounding: what is done to all that its matrices read, to imitate a kernel; None is nothing.
    """

    def __init__(self, decoder: Decoder, name: str | None):
        super().__init__()
        self.norms_stream, self.dropped = name is not None and decoder.norms_stream(name), False
        self.rounding: Callable[[Tensor], Tensor] | None = None
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
        added_BLD = self.inner(self.seen(self.read(x_BLD)), context)
        return added_BLD if self.post_norm is None else self.post_norm(added_BLD)

    def weights(self, read_BLD: Tensor) -> Tensor:
        """The measure in which each of its sites' outputs is added, token by token, [B, L, sites]; 0 where a token does not
        reach the site."""
        return read_BLD.new_ones(*read_BLD.shape[:2], 1)

    def seen(self, x: Tensor) -> Tensor:
        return x if self.rounding is None else self.rounding(x)

    def inner(self, x_BLD: Tensor, context: Context) -> Tensor:
        raise NotImplementedError


class Attention(SubLayer):
    """Grouped-query attention of block `layer`."""

    def __init__(self, decoder: Decoder, layer: int):
        super().__init__(decoder, f"layers.{layer}.attention")
        self.layer, self.width, self.cap, self.causal = layer, decoder.head_dim, decoder.attention_cap, decoder.causal
        self.window, self.frequencies = decoder.window_of(layer), decoder.frequencies_of(layer)
        heads, groups, hidden = decoder.heads * self.width, decoder.kv_heads * self.width, decoder.hidden
        self.q = nn.Linear(hidden, heads, "q" in decoder.biases)
        self.k = nn.Linear(hidden, groups, "k" in decoder.biases)
        self.v = nn.Linear(hidden, groups, "v" in decoder.biases)
        self.o = nn.Linear(heads, hidden, "o" in decoder.biases)
        self.q_norm = Norm(self.width, "rms", decoder.norm_epsilon) if decoder.qk_norm else None
        self.k_norm = Norm(self.width, "rms", decoder.norm_epsilon) if decoder.qk_norm else None

    def inner(self, x_BLD: Tensor, context: Context) -> Tensor:
        q, k, v = (matrix(x_BLD).unflatten(-1, (-1, self.width)).transpose(1, 2) for matrix in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.frequencies:
            cos_LK, sin_LK = context.rotations[self.frequencies]
            q, k = rotated(q, cos_LK, sin_LK), rotated(k, cos_LK, sin_LK)
        if context.cache is not None:
            k, v = context.cache.update(self.layer, k, v)
        mixed_BHLK = attend(q, k, v, self.window, self.cap, self.causal, context.visible)
        return self.o(self.seen(mixed_BHLK.transpose(1, 2).flatten(2)))


class FeedForward(SubLayer):
    """down(activation(gate x) * up x), or without a gate down(activation(up x))."""

    def __init__(self, decoder: Decoder, name: str | None, channels: int):
        super().__init__(decoder, name)
        self.activation, hidden = decoder.activation, decoder.hidden
        self.gate = nn.Linear(hidden, channels, "gate" in decoder.biases) if decoder.gated else None
        self.up = nn.Linear(hidden, channels, "up" in decoder.biases)
        self.down = nn.Linear(channels, hidden, "down" in decoder.biases)

    def inner(self, x_BLD: Tensor, context: Context) -> Tensor:
        activate = ACTIVATIONS[self.activation]
        inner = activate(self.up(x_BLD)) if self.gate is None else activate(self.gate(x_BLD)) * self.up(x_BLD)
        return self.down(self.seen(inner))


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
        site_N, token_N = weight_ET.nonzero(as_tuple=True)
        added_TD = torch.zeros_like(x_TD)
        for site, weight_T, token_n in zip(
            sites, weight_ET, token_N.split(site_N.bincount(minlength=len(sites)).tolist())
        ):
            if len(token_n) and not site.dropped:
                given_nD = self._given(site, x_TD[token_n], token_n // x_BLD.shape[1], context)
                added_TD.index_add_(0, token_n, (weight_T[token_n, None] * given_nD).to(added_TD.dtype))
        return added_TD.view_as(x_BLD)

    @staticmethod
    def _given(expert: SubLayer, x_nD: Tensor, window_n: Tensor, context: Context) -> Tensor:
        """What an expert gives for tokens of some windows; apart where it rounds, as if every window ran alone."""
        parts = x_nD.split(window_n.unique_consecutive(return_counts=True)[1].tolist()) if expert.rounding else [x_nD]
        return torch.cat([expert(x_pD[None], context)[0] for x_pD in parts])


class Block(nn.Module):
    def __init__(self, decoder: Decoder, layer: int):
        super().__init__()
        self.parallel = decoder.parallel
        self.attention = Attention(decoder, layer)
        experts, name = decoder.experts_of(layer), f"layers.{layer}.ffn"
        self.ffn = Mixture(decoder, layer, experts) if experts else FeedForward(decoder, name, decoder.channels)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        front_BLD = self.attention.front(x_BLD)
        behind_BLD = self.ffn.front(front_BLD + self.attention(front_BLD, context))
        return behind_BLD + self.ffn(front_BLD if self.parallel else behind_BLD, context)


class Transformer(nn.Module):
    """A language model: token ids [B, L] -> logits [B, L, V]; or a classifier: -> [B, classes].

    checkpointing: a backward pass computes every block once more instead of keeping what is inside it (Chen et al. 2016).
    """

    def __init__(self, decoder: Decoder):
        super().__init__()
        self.decoder = decoder
        self.rounding: Callable[[Tensor], Tensor] | None = None
        self.checkpointing = False
        self.embedding = nn.Embedding(decoder.vocabulary, decoder.hidden)
        self.positions = nn.Embedding(decoder.max_positions, decoder.hidden) if decoder.learned_positions else None
        self.layers = nn.ModuleList(Block(decoder, layer) for layer in range(decoder.layers))
        self.norm = Norm.of(decoder)
        self.transform, self.transform_norm = None, None
        if decoder.transform:
            self.transform = nn.Linear(decoder.hidden, decoder.hidden, "transform" in decoder.biases)
            self.transform_norm = Norm.of(decoder) if decoder.transform_norm else None
        self.head = nn.Linear(decoder.hidden, decoder.outputs, "head" in decoder.biases)
        if decoder.tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids_BL: Tensor) -> Tensor:
        logits_BLV = self.logits(self.hidden(ids_BL))
        return logits_BLV[:, 0] if self.decoder.classes else logits_BLV

    def hidden(self, ids_BL: Tensor, cache: Cache | None = None) -> Tensor:
        """What the head reads, [B, L, D], behind the last norm. cache: of the tokens before, to which these are added."""
        (last_BLD,) = deque(self._states(ids_BL, cache), maxlen=1)  # the others need not lie in memory
        return self._end(last_BLD)

    def every_hidden(self, ids_BL: Tensor) -> list[Tensor]:
        """Hidden states [B, L, D] of the embedding and behind every block; the last one is what the head reads."""
        *states, last_BLD = self._states(ids_BL)
        return [*states, self._end(last_BLD)]

    def _end(self, x_BLD: Tensor) -> Tensor:
        """The stream behind the last block -> what the head reads."""
        x_BLD = self.norm(x_BLD)
        if self.transform is None:
            return x_BLD
        x_BLD = ACTIVATIONS[self.decoder.transform_activation or self.decoder.activation](self.transform(x_BLD))
        return x_BLD if self.transform_norm is None else self.transform_norm(x_BLD)

    def _states(self, ids_BL: Tensor, cache: Cache | None = None) -> Iterator[Tensor]:
        """The stream in front of the first block and behind every block."""
        context = self.context(ids_BL, cache)
        x_BLD = self.embedded(ids_BL, cache.length if cache else 0)
        yield x_BLD
        again = self.checkpointing and torch.is_grad_enabled()
        for block in self.layers:
            x_BLD = checkpoint(block, x_BLD, context, use_reentrant=False) if again else block(x_BLD, context)
            yield x_BLD
        if cache is not None:
            cache.length += ids_BL.shape[1]

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Hidden states -> logits [B, L, V]."""
        seen_BLD = hidden_BLD if self.rounding is None else self.rounding(hidden_BLD)
        logits_BLV, cap = self.head(seen_BLD), self.decoder.logit_cap
        return logits_BLV if cap is None else cap * torch.tanh(logits_BLV / cap)

    def embedded(self, ids_BL: Tensor, start: int = 0) -> Tensor:
        """The stream in front of the first block. start: position of the first token."""
        x_BLD = self.embedding(ids_BL)
        if self.decoder.embedding_scale != 1:
            x_BLD = x_BLD * self.decoder.embedding_scale
        if self.positions is not None:
            x_BLD = x_BLD + self.positions(torch.arange(start, start + ids_BL.shape[1], device=ids_BL.device))
        return x_BLD

    def context(self, ids_BL: Tensor, cache: Cache | None = None) -> Context:
        """For these tokens behind those in the cache."""
        return Context.of(self.decoder, ids_BL.shape[1], cache, self.embedding.weight, self.visible(ids_BL))

    def visible(self, ids: Tensor) -> Tensor | None:
        """Bool of the shape of token ids, false for padding; None if there is none."""
        if self.decoder.padding is None or not (padding := ids == self.decoder.padding).any():
            return None
        return ~padding


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
    visible_BM: Tensor | None = None,
) -> Tensor:
    """Attention of queries [B, H, L, K] at the last L positions of keys and values [B, G, M, K].

    window: positions that a query sees, see `Decoder`. cap: scores x become cap tanh(x / cap). visible: which keys are.
    """
    k, v = (side.repeat_interleave(q.shape[1] // k.shape[1], 1) for side in (k, v))
    length, total = q.shape[2], k.shape[2]
    plain = window is None or total <= window
    if cap is None and plain and length in (1, total) and visible_BM is None:
        return functional.scaled_dot_product_attention(q, k, v, is_causal=causal and length > 1)
    distance_LM = torch.arange(total - length, total, device=q.device)[:, None] - torch.arange(total, device=q.device)
    distance_LM = distance_LM if causal else distance_LM.abs()
    seen = (distance_LM >= 0) if window is None else (distance_LM >= 0) & (distance_LM < window)
    if visible_BM is not None:  # what is not visible sees itself: a softmax over nothing would be no number
        seen = (seen & visible_BM[:, None, None]) | (distance_LM == 0)
    if cap is None:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    scores = cap * torch.tanh(q @ k.transpose(2, 3) / q.shape[3] ** 0.5 / cap)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def _rounder(fmt: Format, rounding: Rounding) -> Callable[[Tensor], Tensor] | None:
    """What the format's kernel does to all that it reads, as far as it is imitated."""
    if fmt.kind == "dynamic" and rounding != "none":
        return fake_row_int8 if fmt.rowwise else fake_dynamic_int8
    if fmt.kind == "blockwise" and rounding == "all":
        return lambda x: fake_block_int8(x, fmt.block)
    return None


class Network:
    """A decoder whose sites can be replaced one by one.

    Args:
        model: its modules; taken over, not copied.
        configuration: transformers' configuration of the whole and of its generation, which are deployed with it.
        mask_token: what a model that is not causal reads where a token, or the text's class, is to be predicted.
    """

    def __init__(self, model: Transformer, configuration: tuple[Any, Any], mask_token: int | None = None):
        self.model, self.configuration = model.eval().requires_grad_(False), configuration
        self.mask_token = mask_token
        self.decoder = model.decoder
        self.sites = {site.name: site for site in self.decoder.sites()}

    def copy(self) -> Network:
        """An independent network with the same weights."""
        return Network(copy.deepcopy(self.model), self.configuration, self.mask_token)

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def to(self, device: torch.device | str) -> Network:
        self.model.to(device)
        return self

    # -- running --

    def hidden(self, ids_BL: Tensor) -> Tensor:
        """Final hidden states [B, L, D], which the head reads."""
        return self.model.hidden(self.seen(ids_BL))

    def every_hidden(self, ids_BL: Tensor) -> list[Tensor]:
        """Hidden states [B, L, D] of the embedding and behind every block; the last one is what the head reads."""
        return self.model.every_hidden(self.seen(ids_BL))

    def seen(self, ids: Tensor) -> Tensor:
        """Token ids as the model reads them, on its device: the mask token in place of masked ones (`text.Masking`)."""
        ids = ids.to(self.device)
        return ids if self.mask_token is None else ids.where(ids >= 0, self.mask_token)

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Hidden states -> logits [B, L, V]."""
        return self.model.logits(hidden_BLD)

    def written(self, ids_L: Tensor) -> Tensor:
        """A window without the padding behind its text."""
        visible_L = self.model.visible(ids_L)
        return ids_L if visible_L is None else ids_L[visible_L]

    @torch.no_grad()
    def window_logits(self, ids_L: np.ndarray) -> Tensor:
        """Token ids [L] -> logits [L, V], or [1, classes], on the network's device, for `eval.perplexity`."""
        logits_LV = self.logits(self.hidden(self.written(torch.from_numpy(ids_L))[None]))[0]
        return logits_LV[:1] if self.decoder.classes else logits_LV

    @torch.no_grad()
    def generate(
        self, ids_BL: Tensor, new_tokens: int, pick: Callable[[Tensor], Tensor], ends: Collection[int] = ()
    ) -> Tensor:
        """Prompts with at most `new_tokens` more, [B, L + N], on the network's device; ends when every row had an end token.

        Args:
            pick: logits [B, V] -> token ids [B].
            ends: what a row has behind an end token means nothing.
        """
        ids_BL = ids_BL.to(self.device)
        ended_B = torch.zeros(len(ids_BL), dtype=torch.bool, device=self.device)
        fresh_BL, cache = ids_BL, Cache()
        with parametrize.cached():  # weights in training are computed once, not for every token
            for _ in range(new_tokens):
                last_BD = self.model.hidden(fresh_BL, cache)[:, -1]
                fresh_BL = pick(self.logits(last_BD))[:, None]
                ids_BL = torch.cat([ids_BL, fresh_BL], 1)
                ended_B |= torch.isin(fresh_BL[:, 0], torch.tensor(list(ends), device=self.device))
                if ended_B.all():
                    break
        return ids_BL

    def greedy(self, ids_L: Tensor, new_tokens: int, eos: int | None = None) -> list[int]:
        """At most `new_tokens` greedy tokens behind `ids_L`; ends behind `eos`."""
        ends = () if eos is None else (eos,)
        whole_BL = self.generate(ids_L[None], new_tokens, lambda logits_BV: logits_BV.argmax(-1), ends)
        return whole_BL[0, len(ids_L) :].tolist()

    def cached_step(self, context_BL: Tensor) -> Callable[[], Tensor]:
        """A call that decodes one token behind `context_BL`, every time from the same cache."""
        cache, token_BL = Cache(), context_BL[:, -1:].to(self.device)
        with torch.no_grad():
            self.model.hidden(context_BL.to(self.device), cache)

        @torch.no_grad()
        def step() -> Tensor:
            logits = self.logits(self.model.hidden(token_BL, cache))
            cache.crop(context_BL.shape[1])
            return logits

        return step

    def stream(self, ids_NL: Tensor) -> Stream:
        """These windows in front of the first block."""
        return Stream(self, ids_NL)

    # -- weights --

    def matrix(self, name: str) -> nn.Parameter:
        """The weight [output, input] of one matrix; the embedding's is [vocabulary, hidden]."""
        return self.module(name).weight

    def module(self, name: str) -> Any:
        """The module that holds a matrix or a norm gain."""
        return self.model.get_submodule(name)

    def vector(self, name: str) -> nn.Parameter:
        """What is stored beside the matrices, by the names of `Decoder.vectors`."""
        return self.model.get_parameter(name if name.endswith(".bias") else f"{name}.weight")

    def vectors(self) -> dict[str, Tensor]:
        """All that is stored beside the matrices: norm gains and their biases, a table of positions."""
        return {name: self.vector(name) for name in self.decoder.vectors()}

    def inputs(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(name of an input, matrices that read it), over the pruned and quantized linear layers.

        `layers.{i}.attention.in` -> q, k, v; `.attention.out` -> o; `layers.{i}.ffn.in` -> gate, up; `.ffn.out` -> down; of
        an expert, `layers.{i}.ffn.experts.{e}.in` and so on.
        """
        for site in self.sites.values():
            if site.layer is not None:
                yield f"{site.name}.in", tuple(m.name for m in site.matrices if m.pruned == "rows")
                yield f"{site.name}.out", tuple(m.name for m in site.matrices if m.pruned == "columns")

    @contextmanager
    def watch_inputs(self, see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """While open, `see(input name, x_BLI)` is called for every input of `inputs()` during a forward pass; of an expert,
        those of the tokens that reach it, [1, T, I]."""

        def hook(name: str):
            return lambda _module, arguments: see(name, arguments[0].detach())

        with _watching({self.module(matrices[0]): hook(name) for name, matrices in self.inputs()}):
            yield

    def install(
        self, site: Site, action: Action, weights: Mapping[str, Weight], rounding: Rounding = "dynamic"
    ) -> None:
        """Replace a site.

        Args:
            weights: its matrices under `action`; none where it is dropped.
            rounding: which kernels' rounding of activations is imitated. `dynamic`: that of dynamic int8, which moves
                a model much; `all`: also the blocks of int8 inside weight-only kernels, which move it little and cost
                some 8% of a forward pass, so that scoring leaves them out; `none`.
        """
        rounder = _rounder(Format.parse(action.format), rounding)
        if site.layer is None:
            module = self.module(site.name)
            module.weight = self._parameter(weights[site.name].dequantize())
            if (bias := weights[site.name].bias) is not None:
                module.bias = self._parameter(bias)
            if site.name == "embedding" and self.decoder.tied:
                self.model.head.weight = module.weight
            if site.name == "head" or self.decoder.tied:
                self.model.rounding = rounder
            return
        sub_layer = self.module(site.name)
        sub_layer.dropped, sub_layer.rounding = action.keep == 0, rounder
        for matrix in site.matrices if action.keep else ():
            given, linear = weights[matrix.name], self.module(matrix.name)
            wanted = matrix.shape(action.keep, site.units)
            assert given.shape == wanted, f"{matrix.name}: {given.shape} where {action} is {wanted}"
            linear.weight = self._parameter(given.dequantize())
            linear.bias = None if given.bias is None else self._parameter(given.bias)
            linear.out_features, linear.in_features = given.shape

    def _parameter(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(self.device), requires_grad=False)

    def weight_bytes(self) -> int:
        """Bytes of all weights as they lie in memory; a tied table counts once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def save_configuration(self, folder: Path) -> None:
        """Write config.json and generation_config.json, as transformers reads them."""
        for configuration in self.configuration:
            configuration.save_pretrained(folder)

    @property
    def family(self) -> str:
        """transformers' name of the architecture, `model_type`."""
        return self.configuration[0].model_type

    def special_tokens(self) -> dict[str, int | list[int]]:
        """Ids of the tokens that begin, end and pad a text, under transformers' names, those that there are; what
        ends a generation counts before what ends a text."""
        config, generation = self.configuration
        ends = config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
        found = {"bos_token_id": config.bos_token_id, "eos_token_id": ends, "pad_token_id": config.pad_token_id}
        return {name: token for name, token in found.items() if token is not None}

    def ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end a text."""
        ends = self.special_tokens().get("eos_token_id", ())
        return (ends,) if isinstance(ends, int) else tuple(ends)

    def digest(self) -> str:
        """A hash of shape and weights, for cache keys, in which the precision of students does not count, nor what a
        `Decoder` says by default."""
        defaults = {field.name: field.default for field in fields(self.decoder)}
        shape = {name: value for name, value in self.decoder.to_dict().items() if value != defaults[name]}
        shape.pop("precision", None)
        digest = hashlib.sha256(json.dumps(shape).encode())
        for name, parameter in self.model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]


class _Seen(Exception):
    """Ends a forward pass that has shown what it was run for."""


class Stream:
    """The residual stream of some windows on their way through a network, sub-layer by sub-layer.

    hidden_NLD: behind the sub-layer that was passed last; on the network's device.
    """

    BATCH = 4
    """Windows that run together."""

    @torch.no_grad()
    def __init__(self, network: Network, ids_NL: Tensor):
        self._network = network
        self._sub_layers = list(network.decoder.sub_layers().items())
        seen_NL = network.seen(ids_NL)
        self._context = network.model.context(seen_NL)
        self.hidden_NLD = network.model.embedded(seen_NL)
        self._block_NLD = self.hidden_NLD

    @property
    def sites(self) -> list[Site]:
        """Those of the sub-layer that comes next."""
        return self._sub_layers[0][1]

    def read(self) -> Tensor:
        """What the next sub-layer reads, [N, L, D]."""
        return torch.cat([self._module.read(self._source(windows)) for windows in self._batches()])

    def inputs(self, site: Site, matrix: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """What a matrix of the next sub-layer reads, batch by batch: (windows, weight_BL, x_TI), x being the inputs of those
        tokens that reach its site, whose weights are not 0 (see `SubLayer.weights`); padding's are."""
        place = self.sites.index(site)
        for windows in self._batches():
            weight_BL = self._module.weights(self._module.read(self._source(windows)))[..., place]
            reached = int(weight_BL.count_nonzero())
            seen: list[Tensor] = []

            def see(_module: nn.Module, given: tuple, seen: list[Tensor] = seen, reached: int = reached) -> None:
                seen.append(given[0].flatten(0, 1))
                if sum(map(len, seen)) == reached:
                    raise _Seen

            if reached:
                with _watching({self._network.module(matrix): see}), suppress(_Seen):
                    self._added(windows)
                x_TI, visible_BL = torch.cat(seen), self._context.of_windows(windows).visible
                if visible_BL is not None:
                    x_TI, weight_BL = x_TI[visible_BL[weight_BL != 0]], weight_BL * visible_BL
                yield windows, weight_BL, x_TI

    def without(self, site: Site, windows: slice) -> Tensor:
        """The stream [B, L, D] behind the next sub-layer, if this site of it gave nothing."""
        module = self._network.module(site.name)
        module.dropped = True
        behind_BLD = self._behind(windows)
        module.dropped = False
        return behind_BLD

    def advance(self) -> None:
        """Pass the next sub-layer."""
        self.hidden_NLD = torch.cat([self._behind(windows) for windows in self._batches()])
        if self.sites[0].kind == "ffn":
            self._block_NLD = self.hidden_NLD
        self._sub_layers.pop(0)

    @property
    def _module(self) -> Any:
        return self._network.module(self._sub_layers[0][0])

    def _batches(self) -> Iterator[slice]:
        return (slice(start, start + self.BATCH) for start in range(0, len(self.hidden_NLD), self.BATCH))

    def _source(self, windows: slice) -> Tensor:
        """The stream of which the next sub-layer reads the norm."""
        return self._block_NLD[windows] if self._network.decoder.parallel else self._front(windows)

    def _front(self, windows: slice) -> Tensor:
        """The stream to which the next sub-layer is added."""
        return self._module.front(self.hidden_NLD[windows])

    def _added(self, windows: slice) -> Tensor:
        """What the next sub-layer adds to the stream."""
        return self._module(self._source(windows), self._context.of_windows(windows))

    def _behind(self, windows: slice) -> Tensor:
        return self._front(windows) + self._added(windows)


@contextmanager
def _watching(hooks: Mapping[nn.Module, Callable]) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
