"""The folder that is deployed: graph and weights, tokenizer, configuration, plan. Written whole, and read back into torch.

model.onnx, model.onnx_data    see `compressor.export`, three graphs of an encoder-decoder; or model.safetensors, see
                               `compressor.torch_runtime`
plan.json                      an action for every site
config.json, tokenizer files   the teacher's; its licence, too, where it lies beside them, and of an embedder what
                               sentence-transformers reads
README.md                      the model card, written at the end of a run
genai_config.json              of causal models: what ONNX Runtime GenAI reads beside the tokenizer files
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from compressor.errors import BankError, ModelError, RecipeError
from compressor.files import write_bytes_atomic, write_text_atomic
from compressor.model import Teacher, network_from_config
from compressor.network import load_student
from compressor.plan import Formats, Plan
from compressor.runtimes import RuntimeName, runtime, runtime_of
from compressor.student import Student

PLAN_FILE = "plan.json"
LICENCES = ("LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY")
"""How names of files begin that go with a model."""


def save_folder(student: Student, teacher: Teacher, folder: Path, where: RuntimeName = "onnx") -> None:
    """Write `student` into `folder` for a runtime, with the teacher's configuration and tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher.network.save_configuration(folder)
    _save_tokenizer(teacher.tokenizer, folder)
    for path in sorted(Path(teacher.source).glob("*")) if Path(teacher.source).is_dir() else ():
        if path.is_file() and path.name.upper().startswith(LICENCES):
            write_bytes_atomic(folder / path.name, path.read_bytes())
    for name, data in teacher.files.items():
        write_bytes_atomic(folder / name, data)
    runtime(where).save_model(student, teacher.network, folder)
    write_text_atomic(folder / PLAN_FILE, student.plan.to_json())


def save_random(plan: Plan, teacher: Teacher, folder: Path, where: RuntimeName = "onnx") -> None:
    """Write a model of a plan's shape with random weights, that can be timed and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    teacher.network.save_configuration(folder)
    runtime(where).save_random(plan, teacher.network, folder)
    write_text_atomic(folder / PLAN_FILE, plan.to_json())


def _save_tokenizer(tokenizer, folder: Path) -> None:
    """As transformers saves it, but a class that only its version 5 knows goes by the name that it had before, which
    transformers.js knows, too."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    configuration = json.loads(path.read_text())
    if configuration.get("tokenizer_class") == "TokenizersBackend":
        configuration["tokenizer_class"] = "PreTrainedTokenizerFast"
        configuration["model_input_names"] = tokenizer.model_input_names
        write_text_atomic(path, json.dumps(configuration, indent=2))


def load(folder: str | Path) -> nn.Module:
    """The torch student of an exported folder: a module that computes what ONNX Runtime computes, the rounding of what
    quantized layers read included, and returns logits [B, L, V], of an embedder embeddings [B, D].

    Sub-layers may be narrower than the configuration says, or gone. It is called with token ids [B, L]; an encoder-decoder
    with texts and, behind them and written as ~id, what is to be said of them.

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
        formats = [Formats.parse(action.format) for action in plan.values() if action.keep]
        if list(plan) != list(network.sites) or not formats:
            raise ValueError(f"it has {len(plan)} sites, config.json describes {len(network.sites)}")
    except (ValueError, KeyError, TypeError, AttributeError, RecipeError) as error:
        raise BankError(f"{plan_path} cannot be read ({error}); export the model again") from None
    load_student(runtime_of(folder).read_student(folder, network.decoder, plan), network, "all")
    return network.model


def ends_of(folder: Path) -> tuple[int, ...]:
    """Ids of the tokens that end what the model of a folder writes."""
    for name in ("generation_config.json", "config.json"):
        said = json.loads((folder / name).read_text()).get("eos_token_id") if (folder / name).is_file() else None
        if said is not None:
            return (said,) if isinstance(said, int) else tuple(said)
    return ()
