"""The one file that knows architectures: from transformers' configurations and weights to a `Decoder` and modules.

A family is a row of `FAMILIES`: where its modules lie in a checkpoint, what its configuration says beside the common keys,
and what of it is not supported. What differs only in how weights are written is undone here: fused matrices are taken apart,
transposed ones turned, gains that are stored less one are made whole, factors of the scores go into the queries, heads that
rotate in part become such that rotate as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError
from compressor.student import Decoder, Experts

Part = Callable[..., Tensor]
"""(the checkpoint's tensor, decoder) -> a module's weight [O, I] or bias [O]; of an expert also its number, `expert`."""

_KINDS = ("weight", "bias")

Places = dict[str, "str | tuple[str, Part] | list[str]"]
"""Our modules -> theirs, {i} being the block, {before} the one before it, {last} the last of all, {e} the expert; with a
`Part` where ours is not all of theirs, or is written otherwise; two places where the first block's is another. A block need
not have all of them; theirs may be a parameter, too."""


@dataclass(frozen=True)
class Family:
    """places: of the modules, which may depend on the shape. shape: what its configuration says beside the common keys, as
    changes of the `Decoder`. problems: what of a configuration is not supported. gain_offset: is added to every stored norm
    gain. positions_too: a table, the first row of which is added to every position's. head_bias: a tensor that is the head's.
    classifier: places of the modules at the end of a classifier; transforms: its transform's own changes of the `Decoder`.
    genai: whether ONNX Runtime GenAI knows it, and expects the inputs that our graphs have."""

    places: Places | Callable[[Decoder], Places]
    shape: Callable[[Any, Decoder], Decoder] = lambda config, decoder: decoder
    problems: Callable[[Any], list[str]] = lambda config: []
    gain_offset: float = 0.0
    positions_too: str | None = None
    classifier: Places = field(default_factory=dict)
    transforms: dict[str, Any] = field(default_factory=dict)
    head_bias: str | None = None
    genai: bool = True


# -- parts of tensors --


def _rows(which: str, tensor: Tensor, decoder: Decoder) -> Tensor:
    """q, k, v or gate, up out of one matrix, one behind the other."""
    heads, groups = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim
    sizes = (
        {"q": heads, "k": groups, "v": groups} if which in "qkv" else dict.fromkeys(("gate", "up"), decoder.channels)
    )
    return dict(zip(sizes, tensor.split(list(sizes.values())), strict=True))[which]


def _by_head(which: str, tensor: Tensor, decoder: Decoder) -> Tensor:
    """q, k or v out of one matrix in which every head has its three beside one another."""
    heads = tensor.unflatten(0, (decoder.heads, 3, decoder.head_dim))
    return heads[:, "qkv".index(which)].flatten(0, 1)


def _turned(tensor: Tensor, decoder: Decoder) -> Tensor:
    """A matrix [I, O]."""
    return tensor.mT if tensor.ndim == 2 else tensor


def _turned_rows(which: str, tensor: Tensor, decoder: Decoder) -> Tensor:
    return _rows(which, _turned(tensor, decoder), decoder)


def _behind(count: int, tensor: Tensor, decoder: Decoder) -> Tensor:
    """Without the first `count` rows."""
    return tensor[count:]


def _of_expert(which: str, tensor: Tensor, decoder: Decoder, expert: int) -> Tensor:
    """gate, up or down of an expert out of the matrices of all, [experts, O, I]; gate and up are one behind the other."""
    w_OI = tensor[expert]
    return w_OI if which == "down" else dict(zip(("gate", "up"), w_OI.chunk(2), strict=True))[which]


def _scaled(tensor: Tensor, decoder: Decoder) -> Tensor:
    """A query's matrix whose scores are not divided by the root of a head's width."""
    return tensor * decoder.head_dim**0.5


def _behind_scale(tensor: Tensor, decoder: Decoder) -> Tensor:
    """The gain of a last norm behind which a tied head has a scale."""
    return tensor * decoder.hidden**-0.5 if decoder.tied else tensor


# -- the families --

_LLAMA: Places = {
    "embedding": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attention.norm": "model.layers.{i}.input_layernorm",
    **{f"attention.{part}": f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkvo"},
    "ffn.norm": "model.layers.{i}.post_attention_layernorm",
    **{f"ffn.{part}": f"model.layers.{{i}}.mlp.{part}_proj" for part in ("gate", "up", "down")},
}
_QWEN3: Places = _LLAMA | {f"attention.{part}_norm": f"model.layers.{{i}}.self_attn.{part}_norm" for part in "qk"}
_MIXTURE: Places = {
    "ffn.router": "model.layers.{i}.mlp.gate",
    **{
        f"ffn.experts.{{e}}.{part}": (f"model.layers.{{i}}.mlp.experts.{place}", partial(_of_expert, part))
        for part, place in (("gate", "gate_up_proj"), ("up", "gate_up_proj"), ("down", "down_proj"))
    },
}
_SHARED: Places = {
    "ffn.shared.router": "model.layers.{i}.mlp.shared_expert_gate",
    **{f"ffn.shared.{part}": f"model.layers.{{i}}.mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}
_PHI3: Places = _LLAMA | {
    **{f"attention.{part}": ("model.layers.{i}.self_attn.qkv_proj", partial(_rows, part)) for part in "qkv"},
    **{f"ffn.{part}": ("model.layers.{i}.mlp.gate_up_proj", partial(_rows, part)) for part in ("gate", "up")},
}
_GEMMA2: Places = _LLAMA | {
    "attention.post_norm": "model.layers.{i}.post_attention_layernorm",
    "ffn.norm": "model.layers.{i}.pre_feedforward_layernorm",
    "ffn.post_norm": "model.layers.{i}.post_feedforward_layernorm",
}
_GPT2: Places = {
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
    "attention.norm": "transformer.h.{i}.ln_1",
    **{f"attention.{part}": ("transformer.h.{i}.attn.c_attn", partial(_turned_rows, part)) for part in "qkv"},
    "attention.o": ("transformer.h.{i}.attn.c_proj", _turned),
    "ffn.norm": "transformer.h.{i}.ln_2",
    "ffn.up": ("transformer.h.{i}.mlp.c_fc", _turned),
    "ffn.down": ("transformer.h.{i}.mlp.c_proj", _turned),
}
_NEOX: Places = {
    "embedding": "gpt_neox.embed_in",
    "norm": "gpt_neox.final_layer_norm",
    "head": "lm_head",
    "attention.norm": "gpt_neox.layers.{i}.input_layernorm",
    **{
        f"attention.{part}": ("gpt_neox.layers.{i}.attention.query_key_value", partial(_by_head, part))
        for part in "qkv"
    },
    "attention.o": "gpt_neox.layers.{i}.attention.dense",
    "ffn.norm": "gpt_neox.layers.{i}.post_attention_layernorm",
    "ffn.up": "gpt_neox.layers.{i}.mlp.dense_h_to_4h",
    "ffn.down": "gpt_neox.layers.{i}.mlp.dense_4h_to_h",
}
_PHI: Places = {
    "embedding": "model.embed_tokens",
    "norm": "model.final_layernorm",
    "head": "lm_head",
    "attention.norm": "model.layers.{i}.input_layernorm",
    **{f"attention.{part}": f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"},
    "attention.o": "model.layers.{i}.self_attn.dense",
    "ffn.norm": "model.layers.{i}.input_layernorm",  # one norm for both: each gets a copy
    "ffn.up": "model.layers.{i}.mlp.fc1",
    "ffn.down": "model.layers.{i}.mlp.fc2",
}


def _bert_type(names: str, embedding: str, block: str, head: Places) -> Places:
    """An encoder whose norms are of the stream: the norm in front of a sub-layer is the one behind the last.

    names: of the embedding's norm, a block's q, k, v, o, the norm behind, up, down, and the norm behind, in a line.
    """
    of_embedding, q, k, v, o, behind_attention, up, down, behind_ffn = names.split()
    return {
        "embedding": f"{embedding}.word_embeddings",
        "positions": f"{embedding}.position_embeddings",
        "attention.norm": [f"{embedding}.{of_embedding}", f"{block}.{{before}}.{behind_ffn}"],
        **{f"attention.{part}": f"{block}.{{i}}.{place}" for part, place in zip("qkvo", (q, k, v, o), strict=True)},
        "ffn.norm": f"{block}.{{i}}.{behind_attention}",
        "ffn.up": f"{block}.{{i}}.{up}",
        "ffn.down": f"{block}.{{i}}.{down}",
        "norm": f"{block}.{{last}}.{behind_ffn}",
        **head,
    }


_BERT_NAMES = (
    "LayerNorm attention.self.query attention.self.key attention.self.value attention.output.dense "
    "attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm"
)
_BERT = _bert_type(
    _BERT_NAMES,
    "bert.embeddings",
    "bert.encoder.layer",
    {
        "transform": "cls.predictions.transform.dense",
        "transform_norm": "cls.predictions.transform.LayerNorm",
        "head": "cls.predictions.decoder",
    },
)
_ROBERTA = _bert_type(
    _BERT_NAMES,
    "roberta.embeddings",
    "roberta.encoder.layer",
    {"transform": "lm_head.dense", "transform_norm": "lm_head.layer_norm", "head": "lm_head.decoder"},
) | {"positions": ("roberta.embeddings.position_embeddings", partial(_behind, 2))}
_DISTILBERT = _bert_type(
    "LayerNorm attention.q_lin attention.k_lin attention.v_lin attention.out_lin sa_layer_norm ffn.lin1 ffn.lin2 "
    "output_layer_norm",
    "distilbert.embeddings",
    "distilbert.transformer.layer",
    {"transform": "vocab_transform", "transform_norm": "vocab_layer_norm", "head": "vocab_projector"},
)
_MODERNBERT: Places = {
    "embedding": "model.embeddings.tok_embeddings",
    "attention.norm": ["model.embeddings.norm", "model.layers.{i}.attn_norm"],
    **{f"attention.{part}": ("model.layers.{i}.attn.Wqkv", partial(_rows, part)) for part in "qkv"},
    "attention.o": "model.layers.{i}.attn.Wo",
    "ffn.norm": "model.layers.{i}.mlp_norm",
    **{f"ffn.{part}": ("model.layers.{i}.mlp.Wi", partial(_rows, part)) for part in ("gate", "up")},
    "ffn.down": "model.layers.{i}.mlp.Wo",
    "norm": "model.final_norm",
    "transform": "head.dense",
    "transform_norm": "head.norm",
    "head": "decoder",
}


def _t5(decoder: Decoder, table: str = "0") -> Places:
    """table: the block whose table of distances a block has; if it is one for all, each gets a copy."""
    gated = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if decoder.gated else {"up": "wi", "down": "wo"}

    def side(ours: str, theirs: str, ffn: int) -> Places:
        block = f"{theirs}.block.{{i}}.layer"
        distances = f"{theirs}.block.{table}.layer.0.SelfAttention.relative_attention_bias"
        return {
            **_t5_attention(f"{ours}attention", f"{block}.0", "SelfAttention"),
            f"{ours}attention.distances": (distances, _turned),
            f"{ours}ffn.norm": f"{block}.{ffn}.layer_norm",
            **{f"{ours}ffn.{part}": f"{block}.{ffn}.DenseReluDense.{place}" for part, place in gated.items()},
        }

    return {
        "embedding": "shared",
        **side("encoder.", "encoder", 1),
        "encoder.norm": "encoder.final_layer_norm",
        **side("", "decoder", 2),
        **_t5_attention("cross", "decoder.block.{i}.layer.1", "EncDecAttention"),
        "norm": ("decoder.final_layer_norm", _behind_scale),
        "head": "lm_head",
    }


def _t5_attention(ours: str, block: str, name: str) -> Places:
    return {
        f"{ours}.norm": f"{block}.layer_norm",
        f"{ours}.q": (f"{block}.{name}.q", _scaled),
        **{f"{ours}.{part}": f"{block}.{name}.{part}" for part in "kvo"},
    }


def _bart(decoder: Decoder) -> Places:
    def side(ours: str, theirs: str, parts: dict[str, str]) -> Places:
        """parts: a block's attentions -> theirs."""
        block = f"{theirs}.layers.{{i}}"
        places: Places = {f"{ours}ffn.up": f"{block}.fc1", f"{ours}ffn.down": f"{block}.fc2"}
        for part, place in parts.items():
            for matrix, name in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True):
                places[f"{ours}{part}.{matrix}"] = f"{block}.{place}.{name}"
        norms: list[str | list[str]] = [f"{block}.{place}_layer_norm" for place in (*parts.values(), "final")]
        end, offset = f"{theirs}.layer_norm", 0
        if (
            not decoder.norm_first
        ):  # of the stream, as of BERT: the one in front of a sub-layer is the one behind the last
            before = [f"{theirs}.layernorm_embedding", f"{theirs}.layers.{{before}}.final_layer_norm"]
            norms, end, offset = [before, *norms[:-1]], f"{theirs}.layers.{{last}}.final_layer_norm", 2
        places |= {f"{ours}{part}.norm": norm for part, norm in zip((*parts, "ffn"), norms, strict=True)}
        return places | {
            f"{ours}norm": end,
            f"{ours}positions": (f"{theirs}.embed_positions", partial(_behind, offset)),
        }

    return {
        "embedding": "model.shared",
        **side("encoder.", "model.encoder", {"attention": "self_attn"}),
        **side("", "model.decoder", {"attention": "self_attn", "cross": "encoder_attn"}),
        "head": "lm_head",
    }


def _biased(config: Any, decoder: Decoder) -> Decoder:
    attention = "qkvo" if getattr(config, "attention_bias", False) else ""
    ffn = ("gate", "up", "down") if getattr(config, "mlp_bias", False) else ()
    return replace(decoder, biases=(*attention, *ffn))


def _qwen2(config: Any, decoder: Decoder) -> Decoder:
    return replace(decoder, biases=("q", "k", "v"))


def _qwen3(config: Any, decoder: Decoder) -> Decoder:
    return replace(_biased(config, decoder), qk_norm=True)


def _mixture(config: Any, decoder: Decoder) -> Decoder:
    dense, step = getattr(config, "mlp_only_layers", ()), getattr(config, "decoder_sparse_step", 1)
    experts = Experts(
        layers=tuple(i for i in range(decoder.layers) if i not in dense and (i + 1) % step == 0),
        count=config.num_experts,
        active=config.num_experts_per_tok,
        channels=getattr(config, "moe_intermediate_size", config.intermediate_size),
        normalized=getattr(config, "norm_topk_prob", True),
        shared=getattr(config, "shared_expert_intermediate_size", 0),
    )
    return replace(decoder, experts=experts)


def _qwen2_moe(config: Any, decoder: Decoder) -> Decoder:
    return _mixture(config, _qwen2(config, decoder) if config.qkv_bias else decoder)


def _qwen3_moe(config: Any, decoder: Decoder) -> Decoder:
    return _mixture(config, _qwen3(config, decoder))


def _gemma(config: Any, decoder: Decoder) -> Decoder:
    cap, last = config.attn_logit_softcapping, config.final_logit_softcapping
    return replace(
        _biased(config, decoder),
        post_norm=True,
        qk_norm=config.model_type != "gemma2",
        embedding_scale=float(torch.tensor(config.hidden_size**0.5)),
        attention_cap=cap and float(cap),
        logit_cap=last and float(last),
    )


def _gpt2(config: Any, decoder: Decoder) -> Decoder:
    biases = ("q", "k", "v", "o", "up", "down")
    return replace(decoder, norm="layer", gated=False, biases=biases, learned_positions=True)


def _neox(config: Any, decoder: Decoder) -> Decoder:
    biases = (*("qkvo" if config.attention_bias else ""), "up", "down")
    return replace(decoder, norm="layer", gated=False, biases=biases, parallel=config.use_parallel_residual)


def _phi(config: Any, decoder: Decoder) -> Decoder:
    biases = ("q", "k", "v", "o", "up", "down", "head")
    return replace(decoder, norm="layer", gated=False, biases=biases, parallel=True)


_BERT_BIASES = ("q", "k", "v", "o", "up", "down", "transform", "head")


def _bert(config: Any, decoder: Decoder) -> Decoder:
    return replace(
        decoder,
        causal=False,
        norm="layer",
        norm_first=False,
        gated=False,
        transform=True,
        biases=_BERT_BIASES,
        learned_positions=True,
    )


def _roberta(config: Any, decoder: Decoder) -> Decoder:
    return replace(_bert(config, decoder), max_positions=config.max_position_embeddings - 2)


def _modernbert(config: Any, decoder: Decoder) -> Decoder:
    biases = (("transform",) if config.classifier_bias else ()) + (
        ("head",) if config.decoder_bias or decoder.classes else ()
    )
    decoder = _biased(config, decoder)
    return replace(
        decoder,
        causal=False,
        norm="layer",
        norm_bias=config.norm_bias,
        embedding_norm=True,
        transform=True,
        transform_activation=_ACTIVATIONS[config.classifier_activation],  # type: ignore[arg-type]
        biases=decoder.biases + biases,
        window=decoder.window and decoder.window + 1,  # theirs counts neighbours on a side
    )


def _t5_shape(config: Any, decoder: Decoder) -> Decoder:
    stack = replace(
        decoder,
        activation=_ACTIVATIONS[config.dense_act_fn],  # type: ignore[arg-type]
        gated=config.is_gated_act,
        distance_buckets=config.relative_attention_num_buckets,
        distance_reach=config.relative_attention_max_distance,
    )
    # configurations do not say: those without a scale behind the last norm have a head of their own, or a copy of the table
    tied = getattr(config, "scale_decoder_outputs", False)
    return _answering(config, replace(stack, layers=config.num_decoder_layers, tied=tied), stack)


def _bart_shape(config: Any, decoder: Decoder) -> Decoder:
    stack = replace(
        decoder,
        norm="layer",
        norm_epsilon=1e-5,
        norm_first=config.model_type == "pegasus",
        gated=False,
        learned_positions=True,  # Pegasus' are sines, and in its checkpoints, too
        embedding_scale=float(torch.tensor(config.d_model**0.5)) if config.scale_embedding else 1.0,
        biases=("q", "k", "v", "o", "up", "down", "head"),
    )

    def side(layers: int, heads: int, channels: int) -> Decoder:
        width = stack.hidden // heads
        return replace(stack, layers=layers, channels=channels, heads=heads, kv_heads=heads, head_dim=width)

    answering = side(config.decoder_layers, config.decoder_attention_heads, config.decoder_ffn_dim)
    reading = side(config.encoder_layers, config.encoder_attention_heads, config.encoder_ffn_dim)
    return _answering(config, answering, reading)


def _answering(config: Any, decoder: Decoder, encoder: Decoder) -> Decoder:
    """A decoder with the encoder of that shape."""
    start = _first(config, "decoder_start_token_id", "pad_token_id")
    encoder = replace(encoder, causal=False, prefix="encoder.")
    return replace(decoder, encoder=encoder, start=start, pad=config.pad_token_id)


def _answering_problems(config: Any) -> list[str]:
    found = [] if config.is_encoder_decoder else ["is_encoder_decoder = False (supported: True)"]
    return found + (["pad_token_id = None (supported: a token)"] if config.pad_token_id is None else [])


def _bert_problems(config: Any) -> list[str]:
    found = ["is_decoder (supported: an encoder)"] if getattr(config, "is_decoder", False) else []
    kind = getattr(config, "position_embedding_type", None)
    return found + (
        [f"position_embedding_type {kind!r} (supported: 'absolute')"] if kind not in (None, "absolute") else []
    )


def _distilbert_problems(config: Any) -> list[str]:
    return ["sinusoidal_pos_embds (supported: learned)"] if config.sinusoidal_pos_embds else []


def _modernbert_problems(config: Any) -> list[str]:
    activation, pooling = config.classifier_activation, config.classifier_pooling
    known = {"classifier_activation": (activation, activation in _ACTIVATIONS, ", ".join(_ACTIVATIONS))}
    known["classifier_pooling"] = (pooling, pooling == "cls" or not _classes(config), "cls")
    return [f"{key} {value!r} (supported: {wanted})" for key, (value, good, wanted) in known.items() if not good]


def _gpt2_problems(config: Any) -> list[str]:
    wanted = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    return [
        f"{key} = {not value} (supported: {value})" for key, value in wanted.items() if getattr(config, key) != value
    ]


def _phi_problems(config: Any) -> list[str]:
    return ["qk_layernorm (supported: none)"] if config.qk_layernorm else []


def _mixture_problems(config: Any) -> list[str]:
    count, active, step = config.num_experts, config.num_experts_per_tok, getattr(config, "decoder_sparse_step", 1)
    found = [] if 1 <= active <= count else [f"num_experts_per_tok = {active} (expected: 1 to num_experts = {count})"]
    return found + ([] if step >= 1 else [f"decoder_sparse_step = {step} (expected: at least 1)"])


def _gemma_problems(config: Any) -> list[str]:
    return ["attention in both directions"] if getattr(config, "use_bidirectional_attention", False) else []


_POOLED = {"transform_activation": "tanh", "transform_norm": False}

_ROBERTA_FAMILY = Family(
    _ROBERTA,
    _roberta,
    _bert_problems,
    positions_too="roberta.embeddings.token_type_embeddings",
    classifier={"transform": "classifier.dense", "head": "classifier.out_proj"},
    transforms=_POOLED,
)

FAMILIES: dict[str, Family] = {
    "llama": Family(_LLAMA, _biased),
    "mistral": Family(_LLAMA),
    "qwen2": Family(_LLAMA, _qwen2),
    "qwen3": Family(_QWEN3, _qwen3),
    "mixtral": Family(_LLAMA | _MIXTURE, _mixture, _mixture_problems, genai=False),
    "qwen2_moe": Family(_LLAMA | _MIXTURE | _SHARED, _qwen2_moe, _mixture_problems, genai=False),
    "qwen3_moe": Family(_QWEN3 | _MIXTURE, _qwen3_moe, _mixture_problems, genai=False),
    "phi3": Family(_PHI3),
    "gemma2": Family(_GEMMA2, _gemma, _gemma_problems, gain_offset=1.0),
    "gemma3_text": Family(
        _GEMMA2 | {name: place for name, place in _QWEN3.items() if name.endswith(("q_norm", "k_norm"))},
        _gemma,
        _gemma_problems,
        gain_offset=1.0,
    ),
    "gpt2": Family(_GPT2, _gpt2, _gpt2_problems, genai=False),
    "gpt_neox": Family(_NEOX, _neox, genai=False),
    "phi": Family(_PHI, _phi, _phi_problems),
    "bert": Family(
        _BERT,
        _bert,
        _bert_problems,
        positions_too="bert.embeddings.token_type_embeddings",
        classifier={"transform": "bert.pooler.dense", "head": "classifier"},
        transforms=_POOLED,
    ),
    "roberta": _ROBERTA_FAMILY,
    "xlm-roberta": _ROBERTA_FAMILY,
    "distilbert": Family(
        _DISTILBERT,
        _bert,
        _distilbert_problems,
        classifier={"transform": "pre_classifier", "head": "classifier"},
        transforms={"transform_activation": "relu", "transform_norm": False},
    ),
    "modernbert": Family(_MODERNBERT, _modernbert, _modernbert_problems, classifier={"head": "classifier"}),
    "t5": Family(_t5, _t5_shape, _answering_problems),
    "mt5": Family(_t5, _t5_shape, _answering_problems),
    "umt5": Family(partial(_t5, table="{i}"), _t5_shape, _answering_problems),
    "bart": Family(_bart, _bart_shape, _answering_problems, head_bias="final_logits_bias"),
    "pegasus": Family(_bart, _bart_shape, _answering_problems, head_bias="final_logits_bias"),
}
"""By `model_type` of the configuration."""

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ROTATIONS = ("default", "linear", "llama3")

ANY_LENGTH = 4096
"""Positions of a model that has no table of them, and no limit."""


# -- from a configuration to a shape --


def check_supported(config: Any) -> None:
    """Raise ModelError unless `decoder_of` knows the configuration."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        problems = [f"model_type {config.model_type!r} (supported: {', '.join(FAMILIES)})"]
    else:
        problems = family.problems(config)
        if _activation(config) not in _ACTIVATIONS:
            problems.append(f"activation {_activation(config)!r} (supported: {', '.join(_ACTIVATIONS)})")
        kinds = {rotation["rope_type"] for rotation in _rotations(config).values()}
        problems += [f"rope_type {kind!r} (supported: {', '.join(_ROTATIONS)})" for kind in kinds - {*_ROTATIONS}]
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings")
        problems += [
            f"{size} = {value} (expected: at least 1)" for size in sizes if (value := getattr(config, size, 1)) < 1
        ]
        problems += _text_problems(family, config) if _classes(config) or embeds(config) else []
    if problems:
        raise ModelError(
            f"this architecture is not supported: {'; '.join(problems)}. Another one is a row of compressor.families.FAMILIES"
        )


def _classes(config: Any) -> int:
    """Of a classifier of texts; 0 is none."""
    kinds = config.architectures or ()
    return config.num_labels if any(kind.endswith("ForSequenceClassification") for kind in kinds) else 0


def embeds(config: Any) -> bool:
    """Whether it is of an encoder without a head, an embedder of texts."""
    family, kinds = FAMILIES.get(config.model_type), config.architectures or ()
    return bool(family and family.classifier) and any(kind.endswith("Model") for kind in kinds)


POOLING = "sentence_embedding"
"""Key of an embedder's configuration, written beside transformers': {"pooling": ..., "normalized": ...} of its `Decoder`."""


def _text_problems(family: Family, config: Any) -> list[str]:
    """Of a classifier or an embedder."""
    problems = []
    if not family.classifier:
        known = ", ".join(name for name, other in FAMILIES.items() if other.classifier)
        problems.append(f"a classifier of model_type {config.model_type!r} (supported: {known})")
    if config.problem_type not in (None, "single_label_classification"):
        problems.append(f"problem_type {config.problem_type!r} (supported: 'single_label_classification')")
    if config.num_labels < 2 and not embeds(config):
        problems.append(f"num_labels = {config.num_labels} (expected: at least 2)")
    if config.pad_token_id is None:
        problems.append("no pad_token_id (expected: that of the tokenizer)")
    return problems


def genai_type(model_type: str) -> str:
    """Of a family of decoders, the name by which ONNX Runtime GenAI runs it: its own, or the general one."""
    return model_type if FAMILIES[model_type].genai else "decoder"


def decoder_of(config: Any) -> Decoder:
    """The shape that a supported configuration describes."""
    heads = config.num_attention_heads
    rotations = _rotations(config)
    frequencies = {kind: _frequencies(config, kind, rotation) for kind, rotation in rotations.items()}
    (whole, scale), (local, _) = (frequencies.get(kind, ((), 1.0)) for kind in ("full_attention", "sliding_attention"))
    window, blocks = _windows(config)
    family, pools = FAMILIES[config.model_type], embeds(config)
    classes = 1 if pools else _classes(config)
    decoder = Decoder(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        channels=getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or _first(config, "hidden_dim", "d_ff")
        or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        max_positions=_first(config, "max_position_embeddings", "n_positions") or ANY_LENGTH,
        norm_epsilon=_first(config, "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps") or 1e-12,
        rope_frequencies=whole,
        rope_scale=scale,
        tied=config.tie_word_embeddings and not classes,
        classes=classes,
        pad=config.pad_token_id if classes else 0,
        activation=_ACTIVATIONS[_activation(config)],  # type: ignore[arg-type]
        window=window,
        local=blocks,
        local_frequencies=local,
    )
    decoder = family.shape(config, decoder)
    if pools:
        biases = tuple(name for name in decoder.biases if name not in ("transform", "head"))
        said = getattr(config, POOLING, {"pooling": "mean", "normalized": True})
        return replace(decoder, transform=False, biases=biases, **said)
    return replace(decoder, **(family.transforms if classes else {}))


def _first(config: Any, *keys: str) -> Any:
    return next((value for key in keys if (value := getattr(config, key, None)) is not None), None)


def _activation(config: Any) -> str:
    return _first(config, "hidden_activation", "hidden_act", "activation_function", "activation", "dense_act_fn")


def _windows(config: Any) -> tuple[int | None, tuple[int, ...]]:
    """(positions that a local attention sees, the blocks with one)."""
    window, blocks = getattr(config, "sliding_window", None), range(config.num_hidden_layers)
    if not window or window >= config.max_position_embeddings:
        return None, ()
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(blocks)
    local = tuple(i for i in blocks if kinds[i] == "sliding_attention")
    return (window, local) if local else (None, ())


def _rotations(config: Any) -> dict[str, dict]:
    """The parameters of the rotation by kind of attention; one for both where they don't differ, none without."""
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return {}
    return {"full_attention": parameters} if "rope_type" in parameters else parameters


def _frequencies(config: Any, kind: str, rotation: dict) -> tuple[tuple[float, ...], float]:
    """(inverse frequencies, factor of cos and sin)."""
    if rotation["rope_type"] == "default":
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        turned = int(width * rotation.get("partial_rotary_factor", 1.0))
        found = 1.0 / rotation["rope_theta"] ** (torch.arange(0, turned, 2).float() / turned)
        return (*found.tolist(), *[0.0] * ((width - turned) // 2)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    named = {} if "rope_type" in config.rope_parameters else {"layer_type": kind}
    found, scale = ROPE_INIT_FUNCTIONS[rotation["rope_type"]](config, torch.device("cpu"), **named)
    return tuple(found.tolist()), float(scale)


# -- from a checkpoint to modules --


def weights_of(state: Mapping[str, Tensor], config: Any, decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Weights of a transformers model -> those of a `Transformer` and their names, float32, one after the other; a tied head
    is left out."""
    family = FAMILIES[config.model_type]
    turned = 2 * sum(map(bool, decoder.rope_frequencies)) % decoder.head_dim
    order = _whole_rotation(turned, decoder.head_dim) if turned else None
    scalar = getattr(config, "query_pre_attn_scalar", None)
    scaled = ".attention.q_norm" if decoder.qk_norm else ".attention.q"
    for ours, theirs, part in modules_of(family, decoder):
        for kind in _KINDS:
            given = state.get(f"{theirs}.{kind}", state.get(theirs) if kind == "weight" else None)
            if given is None or (decoder.tied and (ours, kind) == ("head", "weight")):
                continue
            weight = (given if part is None else part(given, decoder)).float().contiguous()
            if family.gain_offset and ours.endswith("norm") and kind == "weight":
                weight = weight + family.gain_offset
            if family.positions_too and ours == "positions":
                weight = weight + state[f"{family.positions_too}.weight"][0].float()
            if order is not None and ours.endswith((".attention.q", ".attention.k")):
                weight = weight.unflatten(0, (-1, decoder.head_dim))[:, order].flatten(0, 1)
            if scalar and ours.endswith(scaled):
                weight = weight * (decoder.head_dim / scalar) ** 0.5
            yield f"{ours}.{kind}", weight
    if family.head_bias:
        yield "head.bias", state[family.head_bias].flatten().float()


def _whole_rotation(turned: int, width: int) -> Tensor:
    """Order of a head's components, of which the first `turned` rotate, for a kernel that rotates all: the others, at
    frequency 0, lie behind either half. Products of queries and keys don't depend on it."""
    half, rest = turned // 2, (width - turned) // 2
    first, second, other = torch.arange(width).split([half, half, width - turned])
    return torch.cat([first, other[:rest], second, other[rest:]])


def checkpoint_of(weights: Mapping[str, Tensor], config: Any, decoder: Decoder) -> dict[str, Tensor]:
    """The inverse, for families whose modules are written as ours are.

    Raises:
        ModelError: the family's are not.
    """
    names = module_names(config, decoder)
    if names is None:
        raise ModelError(
            f"a checkpoint of {config.model_type!r} cannot be written: there its weights are written otherwise"
        )
    state: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        state |= {f"{theirs}.{kind}": weights[f"{ours}.{kind}"] for kind in _KINDS if f"{ours}.{kind}" in weights}
    return state


def module_names(config: Any, decoder: Decoder) -> dict[str, str] | None:
    """Our modules -> theirs, for families whose modules are written as ours are."""
    family = FAMILIES[config.model_type]
    modules = modules_of(family, decoder)
    rewritten = any(part is not None for _, _, part in modules)
    if rewritten or family.gain_offset or family.positions_too or 0.0 in decoder.rope_frequencies:
        return None
    return {ours: theirs for ours, theirs, _ in modules}


def blocks_beyond(decoder: Decoder, config: Any, names: Iterable[str]) -> str | None:
    """One of these names of weights that belongs to a block behind the last, if there is any."""
    encoder = decoder.encoder and replace(decoder.encoder, layers=decoder.encoder.layers + 1)
    more = modules_of(FAMILIES[config.model_type], replace(decoder, layers=decoder.layers + 1, encoder=encoder))
    expected = {f"{theirs}.{kind}" for _, theirs, _ in more for kind in _KINDS}
    return min(expected & set(names), default=None)


def _places(family: Family, decoder: Decoder) -> Places:
    places = family.places(decoder) if callable(family.places) else family.places
    if not decoder.classes:
        return places
    if decoder.pooling:
        return {ours: place for ours, place in places.items() if ours not in ("transform", "transform_norm", "head")}
    places = places | family.classifier
    return {ours: place for ours, place in places.items() if ours != "transform_norm" or decoder.transform_norm}


def modules_of(family: Family, decoder: Decoder) -> list[tuple[str, str, Part | None]]:
    """(our module, theirs, the part that it is), block by block."""
    found: list[tuple[str, str, Part | None]] = []
    for ours, place in _places(family, decoder).items():
        stack = decoder.stack_of(ours)
        theirs, part = place if isinstance(place, tuple) else (place, None)
        first, rest = theirs if isinstance(theirs, list) else (theirs, theirs)
        inner = ours.removeprefix(stack.prefix)
        if not inner.startswith(("attention.", "cross.", "ffn.")):
            found.append((ours, first.format(last=stack.layers - 1), part))
            continue
        experts = stack.experts.count if stack.experts and "{e}" in ours else 1
        for i, e in product(range(stack.layers), range(experts)):
            name = f"{stack.prefix}layers.{i}.{inner.format(e=e)}"
            where = (first if i == 0 else rest).format(i=i, before=i - 1)
            found.append((name, where, partial(part, expert=e) if part and "{e}" in ours else part))
    return found
