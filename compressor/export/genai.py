"""What ONNX Runtime GenAI has to know of an exported graph: the content of genai_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compressor.export.graph import GRAPH_FILE
from compressor.plan import Action
from compressor.student import Decoder


def genai_config(
    decoder: Decoder, plan: Mapping[str, Action], kind: str, special_tokens: Mapping[str, Any]
) -> dict[str, Any]:
    """For GenAI 0.18 or newer, which takes the numbers of key/value heads from the graph, layer by layer; those given here
    are the full ones. Its cache is one buffer of `search.max_length` positions, which decoding writes in place.

    kind: of the model, as GenAI calls it (`compressor.families.genai_type`). special_tokens: ids by name, `eos_token_id`
    and so on.
    """
    caches = sum(site.kind == "attention" and plan[site.name].keep > 0 for site in decoder.sites())
    return {
        "model": {
            "type": kind,
            **special_tokens,
            "context_length": decoder.max_positions,
            "vocab_size": decoder.vocabulary,
            "decoder": {
                "session_options": {"provider_options": []},
                "filename": GRAPH_FILE,
                "head_size": decoder.head_dim,
                "hidden_size": decoder.hidden,
                "num_attention_heads": decoder.heads,
                "num_hidden_layers": caches,
                "num_key_value_heads": decoder.kv_heads,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(decoder.max_positions, 2048),
            "past_present_share_buffer": True,
        },
    }
