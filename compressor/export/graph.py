"""The ONNX graphs of a student: one for prefill (empty past) and decode; of an encoder-decoder one for either, on the same
weights; and the stacks of one site that the latency table times. What they are made of is `compressor.export.layers`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import count

import numpy as np
import onnx_ir as ir

from compressor.export.layers import (
    GraphBuilder,
    Matrices,
    Positions,
    Store,
    Stream,
    attention,
    cross,
    cross_source,
    embedding,
    feed_forward,
    key_mask,
    last,
    linear,
    mixture,
    norm,
    product,
    transform,
)
from compressor.export.layout import Stored
from compressor.plan import Action, Site
from compressor.student import Decoder

GRAPH_FILE, ENCODER_FILE, DECODER_FILE = "model.onnx", "encoder_model.onnx", "decoder_model_merged.onnx"

START, PAD = "decoder_start_token_id", "pad_token_id"
"""Names of the metadata of an encoder-decoder's last graph."""

KEEP = "num_logits_to_keep"
"""Input with a default (an initializer that may be overridden), int64 scalar: logits of so many last positions; 0 is all."""


def graph_files(decoder: Decoder) -> tuple[str, ...]:
    """Names of the files of a student's graphs; the last one gives logits."""
    return (ENCODER_FILE, DECODER_FILE) if decoder.encoder else (GRAPH_FILE,)


def student_models(
    decoder: Decoder, plan: Mapping[str, Action], matrices: Matrices, vectors: Mapping[str, np.ndarray], store: Store
) -> dict[str, ir.Model]:
    """The graphs of a whole student by the names of their files. What both read of an encoder-decoder is stored once."""
    stored: dict[str, ir.TensorProtocol] = {}

    def once(name: str, array: np.ndarray) -> ir.TensorProtocol:
        if name not in stored:
            stored[name] = store(name, array)
        return stored[name]

    makers = (encoder_model, decoder_model) if decoder.encoder else (decoder_model,)
    made = (make(decoder, plan, matrices, vectors, once) for make in makers)
    return dict(zip(graph_files(decoder), made, strict=True))


def decoder_model(
    decoder: Decoder, plan: Mapping[str, Action], matrices: Matrices, vectors: Mapping[str, np.ndarray], store: Store
) -> ir.Model:
    """The graph of a whole student, or of an encoder-decoder without its encoder.

    Inputs, of which only the first two where it is not causal: input_ids [B, S] int64; attention_mask [B, past + S] int64;
    past_key_values.{i}.key and .value [B, kv_heads_i, past, head_dim] floats, i numbers the attentions that are left: the
    names that ONNX Runtime GenAI, optimum and transformers.js expect, which know no gaps; `KEEP`, which need not be fed.
    Outputs: logits [B, S, V] floats, or of the last positions only (`KEEP`), [B, classes] of a classifier; present.{i}.key
    and .value.
    Floats are `decoder.floats`, as vectors have to be.

    With an encoder these caches are past_key_values.{i}.decoder.key and so on, and there are two kinds of inputs more:
    encoder_attention_mask [B, source] int64, and past_key_values.{i}.encoder.key and .value [B, heads_i, source, head_dim],
    which `encoder_model` gives, i numbering the attentions across that are left.
    """
    b = GraphBuilder(store, decoder.floats)
    ids = b.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence"])
    mask = b.input("attention_mask", ir.DataType.INT64, ["batch_size", "total"])
    table = matrices(("embedding",))
    x = blocks(b, ids, mask, decoder, table, plan, matrices, vectors)
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
    """The graph of a student's encoder, and of what runs once for every source: keys and values of the attentions across.

    Inputs: input_ids and attention_mask [B, source] int64. Outputs: last_hidden_state [B, source, D] floats;
    present.{i}.encoder.key and .value, which are inputs of `decoder_model`.
    """
    assert decoder.encoder
    b = GraphBuilder(store, decoder.floats)
    ids = b.input("input_ids", ir.DataType.INT64, ["batch_size", "source"])
    mask = b.input("attention_mask", ir.DataType.INT64, ["batch_size", "source"])
    x = blocks(b, ids, mask, decoder.encoder, matrices(("embedding",)), plan, matrices, vectors)
    b.output(x, "last_hidden_state", ["batch_size", "source", decoder.hidden])
    across = [site for site in decoder.block_sites() if site.part == "cross" and plan[site.name].keep]
    for number, site in enumerate(across):
        heads, _ = decoder.heads_of(plan[site.name])
        cross_source(b, x, layer_of(site), number, heads, decoder, matrices)
    return b.model()


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
) -> ir.Value:
    """Token ids [B, S] -> the stream [B, S, D] behind the last norm, of a decoder or of an encoder."""
    x = embedding(b, ids, "embedding", table)
    if decoder.embedding_scale != 1:
        x = b.op("Mul", [x, b.number("embedding_scale", decoder.embedding_scale)], "embedding.scaled")
    positions = cache(lambda: Positions(b, decoder, mask, ids))
    if decoder.learned_positions:
        x = b.op("Add", [x, positions().learned(vectors[f"{decoder.prefix}positions"])], "embedding.placed")

    @cache
    def source_mask() -> ir.Value:
        given = b.input("encoder_attention_mask", ir.DataType.INT64, ["batch_size", "source"])
        return key_mask(b, given, "source_padding_mask")

    stream = Stream(b, x, decoder, vectors)
    caches, sources = count(), count()
    for name, sites in decoder.sub_layers().items():
        kept, layer = {site.name: plan[site.name] for site in sites if plan[site.name].keep}, layer_of(sites[0])
        if not kept:
            if decoder.norms_stream(name):
                stream.enter(name)
        elif sites[0].part == "cross":
            heads = decoder.heads_of(kept[name])
            cross(b, stream, layer, next(sources), heads[0], decoder, matrices, source_mask)
        elif sites[0].kind == "attention":
            heads = decoder.heads_of(kept[name])
            attention(b, stream, layer, next(caches), heads, decoder, matrices, vectors, positions())
        else:
            beside = decoder.parallel and plan[f"layers.{layer}.attention"].keep > 0
            if decoder.experts_of(layer):
                mixture(b, stream, layer, kept, decoder, matrices, vectors, beside)
            else:
                feed_forward(b, stream, layer, decoder, matrices, beside)
    return stream.norm(f"{decoder.prefix}norm")


def stack_model(
    decoder: Decoder, site: Site, action: Action, copies: int, matrices: Matrices, store: Store
) -> ir.Model:
    """`copies` repetitions of one site, each with its own tensors; for timing.

    attention, ffn: norm, site, residual in a chain; input `x` [B, S, D], mask and caches as in the whole model.
    embedding: lookup and final norm from `input_ids`, and the head's product where the table is tied.
    head: final norm of `x` and product; of causal models at the last position.
    """
    b, kind = GraphBuilder(store, decoder.floats), site.kind
    stack = replace(decoder.stack_of(site.name), layers=copies)
    vectors = {name: np.ones(shape, decoder.floats) for name, shape in stack.vectors().items()}
    if kind == "embedding":
        source = b.input("input_ids", ir.DataType.INT64, ["batch_size", "sequence"])
    else:
        source = b.input("x", b.float_type, ["batch_size", "sequence", decoder.hidden])
    if kind in ("embedding", "head"):
        ends = [key for key in ("norm", "norm.bias") if key in vectors]
        for copy in range(copies):
            name = f"{kind}.{copy}"
            weight = matrices((kind,))
            x = embedding(b, source, name, weight) if kind == "embedding" else source
            y = norm(b, x, f"{name}.norm", decoder, {key.replace("norm", f"{name}.norm"): vectors[key] for key in ends})
            if kind == "head" or decoder.tied:
                read = last(b, y, b.small("keep", np.array(1, np.int64))) if decoder.causal else y
                y = linear(b, read, name, weight, f"{name}.logits")
            b.output(y, f"{name}.end", ["batch_size", "sequence", "width"])
        return b.model()
    stream = Stream(b, source, stack, vectors)
    if kind == "attention" and site.part != "cross":
        mask = b.input("attention_mask", ir.DataType.INT64, ["batch_size", "total"])
        positions = Positions(b, stack, mask, source)
    elif site.part == "cross":
        mask = key_mask(b, b.input("encoder_attention_mask", ir.DataType.INT64, ["batch_size", "source"]))
    for copy in range(copies):
        heads = stack.heads_of(action)
        if site.part == "cross":
            cross(b, stream, copy, copy, heads[0], stack, matrices, lambda: mask)
        elif kind == "attention":
            attention(b, stream, copy, copy, heads, stack, matrices, vectors, positions)
        else:
            feed_forward(b, stream, copy, stack, matrices)
    b.output(stream.end(), "end", ["batch_size", "sequence", decoder.hidden])
    return b.model()


def source_model(decoder: Decoder, action: Action, copies: int, matrices: Matrices, store: Store) -> ir.Model:
    """What runs of `copies` attentions across once a source; input `x` [B, source, D], outputs as of `encoder_model`."""
    b = GraphBuilder(store, decoder.floats)
    x = b.input("x", b.float_type, ["batch_size", "source", decoder.hidden])
    for copy in range(copies):
        cross_source(b, x, copy, copy, decoder.heads_of(action)[0], decoder, matrices)
    return b.model()
