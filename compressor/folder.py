"""The folder that is deployed: graph and weights, tokenizer, configuration, plan. Written whole, and read back into torch.

model.onnx, model.onnx.data    see `compressor.export`
plan.json                      an action for every site
config.json, tokenizer files   the teacher's
genai_config.json              what ONNX Runtime GenAI reads beside the tokenizer files
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from compressor.distill import load_student
from compressor.errors import BankError, ModelError
from compressor.export import export_onnx, read_student
from compressor.export.files import GRAPH_FILE
from compressor.files import write_text_atomic
from compressor.model import Teacher, network_from_config
from compressor.plan import Plan
from compressor.student import Student

PLAN_FILE = "plan.json"
GENAI_FILE = "genai_config.json"


def save_folder(student: Student, teacher: Teacher, folder: Path) -> None:
    """Export `student` into `folder`, with the teacher's configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher.network.save_configuration(folder)
    teacher.tokenizer.save_pretrained(folder)
    export_onnx(student, folder)
    write_text_atomic(folder / GENAI_FILE, json.dumps(genai_config(student, teacher), indent=1))
    write_text_atomic(folder / PLAN_FILE, student.plan.to_json())


def genai_config(student: Student, teacher: Teacher) -> dict:
    """What ONNX Runtime GenAI (0.18 or newer) has to know of a folder.

    It takes the numbers of key/value heads from the graph, layer by layer; those given here are the full ones. Its cache
    is one buffer of `search.max_length` positions, which decoding writes in place.
    """
    decoder, plan = student.decoder, student.plan
    config, ends = teacher.network.model.config, teacher.network.model.generation_config.eos_token_id
    caches = sum(site.kind == "attention" and plan[site.name].keep > 0 for site in decoder.sites())
    ends = config.eos_token_id if ends is None else ends
    tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": ends, "pad_token_id": config.pad_token_id}
    names = {
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
    }
    return {
        "model": {
            "type": config.model_type,
            **{name: token for name, token in tokens.items() if token is not None},
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
                **names,
            },
        },
        "search": {
            "do_sample": False,
            "max_length": min(decoder.max_positions, 2048),
            "past_present_share_buffer": True,
        },
    }


def load(folder: str | Path) -> nn.Module:
    """The torch student of an exported folder: a transformers model that computes what ONNX Runtime computes, the
    rounding of what quantized layers read included.

    Sub-layers may be narrower than the configuration says, or gone; call it with `use_cache=False`.

    Raises:
        ModelError, BankError: the folder is not one that `compress` wrote, or a file is damaged.
    """
    folder = Path(folder)
    plan_path = folder / PLAN_FILE
    if not plan_path.is_file():
        raise ModelError(f"expected a folder that `compress` exported; {plan_path} is missing")
    network = network_from_config(folder)
    try:
        plan = Plan.from_json(plan_path.read_text())
    except (ValueError, KeyError, TypeError) as error:
        raise BankError(f"{plan_path} cannot be read ({error}); export the model again") from None
    load_student(read_student(folder, network.decoder, plan), network, "all")
    return network.model
