"""Models and texts that are broken, hostile or not what they seem: one message that says what to do, before any long work."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import compressor
from compressor import Recipe
from compressor.bank import Bank
from compressor.cli import app
from compressor.errors import CompressorError
from compressor.export import export_onnx, read_student
from compressor.folder import save_folder
from compressor.model import load_teacher
from compressor.student import full_plan
from tests.conftest import TEXT
from tests.test_export import student, tiny, uniform
from tests.test_pipeline import recipe


def config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def weights(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def header(folder: Path, length: int, text: bytes = b"{}") -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + text)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def spoil(tensors: dict, value: float) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value


NORM, DOWN = "model.layers.0.input_layernorm.weight", "model.layers.2.mlp.down_proj.weight"
MODELS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "model.path"),
    "a file": (lambda f: (shutil.rmtree(f), f.write_text("hello")), "model.path"),
    "an empty folder": (lambda f: (shutil.rmtree(f), f.mkdir()), "model.path"),
    "no config": (lambda f: (f / "config.json").unlink(), "model.path"),
    "an empty config": (lambda f: (f / "config.json").write_text(""), "model.path"),
    "a config that is no JSON": (lambda f: (f / "config.json").write_text("{model_type: llama}"), "model.path"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[]"), "model.path"),
    "a binary config": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "model.path"),
    "no model type": (lambda f: config(f, model_type=...), "model.path"),
    "an unknown model type": (lambda f: config(f, model_type="gpt5"), "model.path"),
    "an unsupported model type": (lambda f: config(f, model_type="opt"), "not supported"),
    "code of its own": (lambda f: config(f, auto_map={"AutoConfig": "x.Y"}, model_type="mine"), "model.path"),
    "an activation of its own": (lambda f: config(f, hidden_act="mish"), "activation 'mish'"),
    "a rotation of its own": (
        lambda f: config(f, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}),
        "rope_type 'yarn'",
    ),
    "heads that do not divide": (lambda f: config(f, num_attention_heads=5, head_dim=...), "model.path"),
    "a negative size": (lambda f: config(f, hidden_size=-64), "hidden_size = -64 (expected: at least 1)"),
    "a size that is a word": (lambda f: config(f, hidden_size="large"), "model.path"),
    "no layers": (lambda f: config(f, num_hidden_layers=0), "num_hidden_layers = 0 (expected: at least 1)"),
    "more layers than weights": (lambda f: config(f, num_hidden_layers=5), "model.path"),
    "fewer layers than weights": (lambda f: config(f, num_hidden_layers=2), "model.path"),
    "another width than the weights": (lambda f: config(f, intermediate_size=96), "model.path"),
    "another vocabulary than the weights": (lambda f: config(f, vocab_size=300), "model.path"),
    "a vocabulary that is too small for the tokenizer": (
        lambda f: (
            config(f, vocab_size=100),
            weights(f, lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:100].clone()})),
        ),
        "vocab",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "model.path"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.path"),
    "truncated weights": (
        lambda f: os.truncate(f / "model.safetensors", (f / "model.safetensors").stat().st_size - 100),
        "model.path",
    ),
    "a header that is cut off": (lambda f: header(f, 1000), "model.path"),
    "a header of exabytes": (lambda f: header(f, 2**60), "model.path"),
    "a negative header": (lambda f: header(f, 2**64 - 1), "model.path"),
    "a header that is no JSON": (lambda f: header(f, 5, b"hello"), "model.path"),
    "offsets outside the file": (
        lambda f: header(f, 62, b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,999999999]}}'),
        "model.path",
    ),
    "pickled weights": (pickled, "safetensors"),
    "a pickle by another name": (
        lambda f: (pickled(f), (f / "pytorch_model.bin").rename(f / "model.safetensors")),
        "model.path",
    ),
    "a missing matrix": (lambda f: weights(f, lambda t: t.pop(DOWN)), "down_proj"),
    "a missing norm": (lambda f: weights(f, lambda t: t.pop(NORM)), "input_layernorm"),
    "a matrix of another shape": (lambda f: weights(f, lambda t: t.update({DOWN: torch.ones(64, 99)})), "model.path"),
    "weights that are not numbers": (lambda f: weights(f, lambda t: spoil(t, torch.nan)), "finite"),
    "weights without end": (lambda f: weights(f, lambda t: spoil(t, torch.inf)), "finite"),
    "no tokenizer": (lambda f: [path.unlink() for path in f.glob("token*")], "model.path"),
    "a tokenizer that is no JSON": (lambda f: (f / "tokenizer.json").write_text("hello"), "model.path"),
    "a tokenizer without a model": (lambda f: (f / "tokenizer.json").write_text("{}"), "model.path"),
}
"""How a good folder is spoiled, and a part of what is said."""

TEXTS: dict[str, tuple[bytes | None, str, str]] = {
    "no file": (None, "a.txt", "expected a text file"),
    "a folder": (b"<folder>", "a.txt", "expected a text file"),
    "nothing": (b"", "a.txt", "windows of 64 tokens"),
    "a few words": (b"hello world", "a.txt", "give more text"),
    "white space": (b" \n" * 20, "a.txt", "give more text"),
    "another encoding": ("é".encode("latin-1") * 9000, "a.txt", "expected UTF-8"),
    "a picture": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 99, "a.txt", "expected UTF-8"),
    "lines that are no JSON": (b"hello\n" * 99, "a.jsonl", "expected JSON"),
    "lines of another kind": (b"[1, 2]\n" * 99, "a.jsonl", "expected an object with a text"),
    "lines with another key": (b'{"body": "hello"}\n' * 99, "a.jsonl", "found body"),
    "a text that is a number": (b'{"text": 5}\n' * 99, "a.jsonl", "expected a text, or messages"),
    "no lines": (b"\n\n", "a.jsonl", "give more text"),
}


def run(tmp_path: Path, model: Path, text: str) -> str:
    """What `compress` says of a recipe; it must end with one message and have made nothing of the model."""
    data = recipe(model).to_dict()
    data["data"] |= {"calibration": [text]}
    path, out = tmp_path / "recipe.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(data))
    result = CliRunner().invoke(app, ["run", str(path), "--out", str(out), "--quiet"])
    assert result.exit_code in (1, 2), result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output and result.stderr.count("error: ") == 1
    made = {path.name for path in out.glob("bank/**/*.safetensors")}
    assert "outputs.safetensors" not in made and not any(
        "-" in name for name in made
    )  # no statistics to the end, no variant
    assert not (out / "onnx").exists()
    return result.stderr


@pytest.mark.parametrize("name", MODELS)
def test_models(tiny_folder, tmp_path, name):
    spoil_it, said = MODELS[name]
    folder = tmp_path / "models" / "tiny"
    shutil.copytree(tiny_folder, folder)
    spoil_it(folder)
    found = run(tmp_path, folder, str(TEXT / "wiki-calibration.txt"))
    assert said in found, found


@pytest.mark.parametrize("name", TEXTS)
def test_texts(tiny_folder, tmp_path, name):
    data, file, said = TEXTS[name]
    path = tmp_path / file
    if data == b"<folder>":
        path.mkdir()
    elif data is not None:
        path.write_bytes(data)
    found = run(tmp_path, tiny_folder, str(path))
    assert said in found and str(path) in found, found


RECIPES: dict[str, tuple[dict, str]] = {
    "windows longer than the model's positions": (
        {"data.sequence_length": 300},
        "data.sequence_length = 300: expected at most 256",
    ),
    "a prefill longer than them": ({"target.workload.prefill": 300}, "prefill = 300: expected at most 256"),
    "a context longer than them": ({"target.workload.context": 256}, "context + 1 = 257: expected at most 256"),
    "a reward that there is not": (
        {
            "distill.method": "rl",
            "distill.steps": 1,
            "distill.batch_tokens": 512,
            "distill.rl.rewards": {"fluancy": 1.0},
        },
        "fluancy",
    ),
    "a baseline that is no report": ({"gate.baseline": str(TEXT / "wiki-calibration.txt")}, "expected a report"),
}


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_model_does_not_do_is_refused_by_run_and_dry_run_alike(tiny_folder, tmp_path, name):
    changes, said = RECIPES[name]
    data = recipe(tiny_folder).to_dict()
    for key, value in changes.items():
        *sections, last = key.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    if "data.sequence_length" in changes:
        data["data"] |= {"calibration_tokens": 3000, "evaluation_tokens": 3000}
        data["search"] |= {"tokens": 600}
    wrong = Recipe.from_dict(data)
    for attempt in (lambda: compressor.dry_run(wrong), lambda: compressor.compress(wrong, tmp_path / "out")):
        with pytest.raises(CompressorError, match=re.escape(said)):
            attempt()
    assert not (tmp_path / "out" / "bank").exists()


def test_enough_of_them():
    assert len(MODELS) + len(TEXTS) >= 50


def linked(folder: Path) -> None:
    data = folder / "model.onnx_data"
    data.rename(folder.parent / "elsewhere")
    data.symlink_to(folder.parent / "elsewhere")


EXPORTS: dict[str, Callable[[Path], object]] = {
    "no graph": lambda f: (f / "model.onnx").unlink(),
    "a graph that is text": lambda f: (f / "model.onnx").write_text("hello"),
    "an empty graph": lambda f: (f / "model.onnx").write_bytes(b""),
    "a graph that is cut off": lambda f: os.truncate(f / "model.onnx", 999),
    "no weights": lambda f: (f / "model.onnx_data").unlink(),
    "weights that are cut off": lambda f: os.truncate(f / "model.onnx_data", 99),
    "weights behind a link": linked,
    "no plan": lambda f: (f / "plan.json").unlink(),
    "a plan that is no JSON": lambda f: (f / "plan.json").write_text("{"),
    "a plan of another kind": lambda f: (f / "plan.json").write_text("[]"),
    "a plan for another model": lambda f: (f / "plan.json").write_text('{"embedding": {"keep": 1, "format": "fp32"}}'),
    "a plan with formats that there are not": lambda f: (f / "plan.json").write_text(
        (f / "plan.json").read_text().replace("w8", "w3")
    ),
    "no configuration": lambda f: (f / "config.json").unlink(),
}


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory) -> Path:
    teacher, folder = load_teacher(tiny_folder), tmp_path_factory.mktemp("exported")
    window = torch.arange(64)[None]
    bank = Bank(tmp_path_factory.mktemp("bank"), teacher.network, window, window, "nearest")
    save_folder(bank.realize(full_plan(teacher.network.decoder, "w8", "w8")), teacher, folder)
    return folder


@pytest.mark.parametrize("name", EXPORTS)
def test_exported_folders(exported, tmp_path, name):
    folder = tmp_path / "onnx"
    shutil.copytree(exported, folder)
    compressor.load(folder)
    EXPORTS[name](folder)
    with pytest.raises(CompressorError) as caught:
        compressor.load(folder)
    assert str(folder) in str(caught.value)


def test_weights_that_a_graph_looks_for_elsewhere(tmp_path):
    """`..` and absolute paths in a graph lead nowhere."""
    decoder = tiny()
    export_onnx(student(decoder, uniform(decoder, "fp32")), tmp_path)
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    for place in ("../secret", "/etc/passwd", "nowhere/../../secret"):
        for tensor in graph.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = place
        onnx.save(graph, tmp_path / "model.onnx")
        with pytest.raises(CompressorError, match="expected all weights in model.onnx_data"):
            read_student(tmp_path, decoder, uniform(decoder, "fp32"))
