"""The ONNX graphs of a student: one for prefill (empty past) and decode; of an encoder-decoder three on the same weights, for
the source, the first step and those behind it; and the stacks of one site that the latency table times. What they are made of
is `compressor.export.layers`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cache, partial
from itertools import count
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from compressor.export.layers import (
    GraphBuilder,
    Matrices,
    Past,
    Positions,
    Source,
    Store,
    Stream,
    attention,
    cross,
    embedding,
    feed_forward,
    key_mask,
    last,
    linear,
    mixture,
    norm,
    past_inputs,
    pooled,
    product,
    transform,
    whole_mask,
)
from compressor.export.layout import Stored
from compressor.plan import Action, Site
from compressor.student import Decoder

GRAPH_FILE = "model.onnx"
SEQUENCE_FILES = ENCODER_FILE, FIRST_FILE, NEXT_FILE = (
    "encoder_model.onnx",
    "decoder_model.onnx",
    "decoder_with_past_model.onnx",
)

START, PAD = "decoder_start_token_id", "pad_token_id"
"""Names of the metadata of an encoder-decoder's decoder graphs."""

CACHES = {None: "", "decoder": ".decoder", "cross": ".encoder"}
"""What stands behind a cache's number, by the part that the attention belongs to."""

HIDDEN, EMBEDDING = "last_hidden_state", "sentence_embedding"
"""Outputs of an encoder and of an embedder, under optimum's and sentence-transformers' names."""

KEEP = "num_logits_to_keep"
"""Input with a default (an initializer that may be overridden), int64 scalar: logits of so many last positions; 0 is all."""


def graph_files(decoder: Decoder) -> tuple[str, ...]:
    """Names of the files of a student's graphs, in the order in which they run."""
    return SEQUENCE_FILES if decoder.encoder else (GRAPH_FILE,)


def student_models(
    decoder: Decoder, plan: Mapping[str, Action], matrices: Matrices, vectors: Mapping[str, np.ndarray], store: Store
) -> dict[str, ir.Model]:
    """The graphs of a whole student by the names of their files. What several of them read is stored once."""
    stored: dict[str, ir.TensorProtocol] = {}

    def once(name: str, array: np.ndarray) -> ir.TensorProtocol:
        if name not in stored:
            stored[name] = store(name, array)
        return stored[name]

    makers = (encoder_model, partial(decoder_model, first=True), decoder_model) if decoder.encoder else (decoder_model,)
    made = (make(decoder, plan, matrices, vectors, once) for make in makers)
    return dict(zip(graph_files(decoder), made, strict=True))


def decoder_model(
    decoder: Decoder,
    plan: Mapping[str, Action],
    matrices: Matrices,
    vectors: Mapping[str, np.ndarray],
    store: Store,
    first: bool = False,
) -> ir.Model:
    """The graph of a whole student, or of an encoder-decoder without its encoder.

    Inputs, of which only the first two where it is not causal: input_ids [B, S] int64; attention_mask [B, past + S] int64;
    past_key_values.{i}.key and .value [B, kv_heads_i, past, head_dim] floats, i numbers the attentions that are left: the
    names that ONNX Runtime GenAI, optimum and transformers.js expect, which know no gaps; `KEEP`, which need not be fed.
    Outputs: logits [B, S, V] floats, or of the last positions only (`KEEP`), [B, classes] of a classifier; present.{i}.key
    and .value. Of an embedder `HIDDEN` [B, S, D], behind the last norm, and `EMBEDDING` [B, D].
    Floats are `decoder.floats`, as vectors have to be.

    With an encoder these caches are past_key_values.{i}.decoder.key and so on, all tokens that are fed count, and in the
    place of attention_mask there are, as optimum feeds them, encoder_attention_mask [B, source] int64 and
    past_key_values.{i}.encoder.key and .value [B, heads_i, source, head_dim], i numbering the attentions across that are
    left. first: the graph of the first step has no past; it reads encoder_hidden_states [B, source, D] floats, and what the
    attentions across take of them is present.{i}.encoder.key and .value, which stay what they are. Where no attention to
    itself is left, nothing says how long the past is but cache_position [S] int64, an input then.
    """
    b = GraphBuilder(store, decoder.floats)
    ids = b.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence"])
    mask = None if decoder.encoder else b.input("attention_mask", ir.DataType.INT64, ["batch_size", "total"])
    source = source_inputs(b, decoder, first) if decoder.encoder else None
    caches = {} if first else cache_names(decoder, plan)
    past = {name: past_inputs(b, cache, plan[name].keep, decoder.head_dim) for name, cache in caches.items()}
    mask = mask or whole_mask(b, ids, None if first else past_length(b, past.values()))
    table = matrices(("embedding",))
    x = blocks(b, ids, mask, decoder, table, plan, matrices, vectors, past, source)
    if decoder.pooling:
        b.output(x, HIDDEN, ["batch_size", "sequence", decoder.hidden])
        b.output(pooled(b, x, mask, decoder), EMBEDDING, ["batch_size", decoder.hidden])
        return b.model()
    if decoder.causal:
        x = last(b, x, b.default(KEEP, np.array(0, np.int64)))
    if decoder.classes:
        x = b.op("Gather", [x, b.small("first", np.array(0, np.int64))], "first.out", axis=1)
    if decoder.transform:
        x = transform(b, x, decoder, vectors)
    if decoder.classes:
        b.output(product(b, x, "head", vectors), "logits", ["batch_size", decoder.classes])
        return b.model()
    name = "embedding" if decoder.tied else "head"
    biased, end = "head.bias" in vectors, "scores" if decoder.logit_cap else "logits"
    output = "products" if biased else end
    logits = linear(b, x, name, table if decoder.tied else matrices((name,)), output)
    if biased:
        bias = b.tensor("head.bias", vectors["head.bias"])
        logits = b.op("Add", [logits, bias], end)
    if decoder.logit_cap:
        cap = b.number("logit_cap", decoder.logit_cap)
        logits = b.op("Mul", [b.op("Tanh", [b.op("Div", [logits, cap], "scores.share")], "scores.tanh"), cap], "logits")
    b.output(logits, "logits", ["batch_size", "kept", decoder.vocabulary])
    facts = {START: str(decoder.start), PAD: str(decoder.pad)} if decoder.encoder else {}
    return b.model(facts)


def encoder_model(
    decoder: Decoder, plan: Mapping[str, Action], matrices: Matrices, vectors: Mapping[str, np.ndarray], store: Store
) -> ir.Model:
    """The graph of a student's encoder.

    Inputs: input_ids and attention_mask [B, source] int64. Output: last_hidden_state [B, source, D] floats.
    """
    assert decoder.encoder
    b = GraphBuilder(store, decoder.floats)
    ids = b.input("input_ids", ir.DataType.INT64, ["batch_size", "source"])
    mask = b.input("attention_mask", ir.DataType.INT64, ["batch_size", "source"])
    x = blocks(b, ids, mask, decoder.encoder, matrices(("embedding",)), plan, matrices, vectors)
    b.output(x, HIDDEN, ["batch_size", "source", decoder.hidden])
    return b.model()


def source_inputs(b: GraphBuilder, decoder: Decoder, first: bool) -> Source:
    """What attentions across read of the source: its mask, and in the first step what the encoder gave."""
    mask = b.input("encoder_attention_mask", ir.DataType.INT64, ["batch_size", "source"])
    hidden = None
    if first:
        hidden = b.input("encoder_hidden_states", b.float_type, ["batch_size", "source", decoder.hidden])
    return Source(key_mask(b, mask, "source_padding_mask"), hidden)


def cache_names(decoder: Decoder, plan: Mapping[str, Action]) -> dict[str, str]:
    """Names of the caches of a decoder's attentions, by sub-layer, in the order that optimum feeds them in: without gaps, and
    with an encoder those of each number together."""
    attentions = [site for site in decoder.block_sites() if site.kind == "attention" and decoder.causal]
    numbers = {part: count() for part in CACHES}
    found = {site.name: (next(numbers[site.part]), CACHES[site.part]) for site in attentions if plan[site.name].keep}
    return {name: f"{number}{kind}" for name, (number, kind) in sorted(found.items(), key=lambda item: item[1])}


def past_length(b: GraphBuilder, past: Iterable[Past]) -> ir.Value:
    """Tokens of an answer that were fed before, int64 [1]: as many as have a key, or as the place of the first one says."""
    keys = [key for key, _ in past if str(key.name).endswith(".decoder.key")]
    if keys:
        return b.op("Shape", [keys[0]], "past_length", start=2, end=3)
    return b.op("Gather", [b.input("cache_position", ir.DataType.INT64, ["sequence"]), b.integers(0)], "past_length")


def layer_of(site: Site) -> int:
    """The block of an attention or a feed-forward."""
    assert site.layer is not None
    return site.layer


def blocks(
    b: GraphBuilder,
    ids: ir.Value,
    mask: ir.Value,
    decoder: Decoder,
    table: Stored,
    plan: Mapping[str, Action],
    matrices: Matrices,
    vectors: Mapping[str, np.ndarray],
    past: Mapping[str, Past] = MappingProxyType({}),
    source: Source | None = None,
) -> ir.Value:
    """Token ids [B, S] -> the stream [B, S, D] behind the last norm, of a decoder or of an encoder. past: by attention."""
    x = embedding(b, ids, "embedding", table)
    if decoder.embedding_scale != 1:
        x = b.op("Mul", [x, b.number("embedding_scale", decoder.embedding_scale)], "embedding.scaled")
    positions = cache(lambda: Positions(b, decoder, mask, ids))
    if decoder.learned_positions:
        x = b.op("Add", [x, positions().learned(vectors[f"{decoder.prefix}positions"])], "embedding.placed")
    stream = Stream(b, x, decoder, vectors)
    caches = cache_names(decoder, plan)
    for name, sites in decoder.sub_layers().items():
        kept, layer = {site.name: plan[site.name] for site in sites if plan[site.name].keep}, layer_of(sites[0])
        if not kept:
            if decoder.norms_stream(name):
                stream.enter(name)
        elif sites[0].part == "cross":
            assert source
            cross(b, stream, layer, caches[name], kept[name].keep, decoder, matrices, source, past.get(name))
        elif sites[0].kind == "attention":
            cache_name, given = caches.get(name, ""), past.get(name)
            attention(b, stream, layer, cache_name, kept[name], decoder, matrices, vectors, positions(), given)
        else:
            beside = decoder.parallel and plan[f"layers.{layer}.attention"].keep > 0
            if decoder.experts_of(layer):
                mixture(b, stream, layer, kept, decoder, matrices, vectors, beside)
            else:
                feed_forward(b, stream, layer, decoder, matrices, beside)
    return stream.norm(f"{decoder.prefix}norm")


def stack_model(
    decoder: Decoder,
    site: Site,
    action: Action,
    copies: int,
    matrices: Matrices,
    store: Store,
    first: bool = False,
) -> ir.Model:
    """`copies` repetitions of one site, each with its own tensors; for timing.

    attention, ffn: norm, site, residual in a chain; input `x` [B, S, D], mask and caches as in the whole model, or as in the
    graph of an encoder-decoder's first step.
    embedding: lookup and final norm from `input_ids`, and the head's product where the table is tied.
    head: final norm of `x` and product; of causal models at the last position.
    """
    b, kind = GraphBuilder(store, decoder.floats), site.kind
    stack = replace(decoder.stack_of(site.name), layers=copies)
    vectors = {name: np.ones(shape, decoder.floats) for name, shape in stack.vectors().items()}
    if kind == "embedding":
        fed = b.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence"])
    else:
        fed = b.input("x", b.float_type, ["batch_size", "sequence", decoder.hidden])
    if kind in ("embedding", "head"):
        ends = [key for key in ("norm", "norm.bias") if key in vectors]
        for copy in range(copies):
            name = f"{kind}.{copy}"
            weight = matrices((kind,))
            x = embedding(b, fed, name, weight) if kind == "embedding" else fed
            y = norm(b, x, f"{name}.norm", decoder, {key.replace("norm", f"{name}.norm"): vectors[key] for key in ends})
            if kind == "head" or decoder.tied:
                read = last(b, y, b.small("keep", np.array(1, np.int64))) if decoder.causal else y
                y = linear(b, read, name, weight, f"{name}.logits")
            b.output(y, f"{name}.end", ["batch_size", "sequence", "width"])
        return b.model()
    stream = Stream(b, fed, stack, vectors)
    caches = [f"{copy}{CACHES[site.part]}" for copy in range(copies)] if stack.causal else [""] * copies
    past: dict[int, Past] = {}
    if kind == "attention" and stack.causal and not first:
        past = {copy: past_inputs(b, name, action.keep, stack.head_dim) for copy, name in enumerate(caches)}
    if site.part == "cross":
        source = source_inputs(b, decoder, first)
    elif kind == "attention":
        if site.part == "decoder":
            mask = whole_mask(b, fed, None if first else past_length(b, past.values()))
        else:
            mask = b.input("attention_mask", ir.DataType.INT64, ["batch_size", "total"])
        positions = Positions(b, stack, mask, fed)
    for copy, name in enumerate(caches):
        if site.part == "cross":
            cross(b, stream, copy, name, action.keep, stack, matrices, source, past.get(copy))
        elif kind == "attention":
            attention(b, stream, copy, name, action, stack, matrices, vectors, positions, past.get(copy))
        else:
            feed_forward(b, stream, copy, stack, matrices)
    b.output(stream.end(), "end", ["batch_size", "sequence", decoder.hidden])
    return b.model()
