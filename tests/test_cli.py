"""The command line: what goes to the pipeline, what is printed where, and the exit codes."""

import errno
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

import compressor
from compressor import Recipe, estimate
from compressor.cli import app
from compressor.errors import BudgetError, RegressionError
from compressor.export import OnnxDecoder, export_onnx
from compressor.families import decoder_of
from compressor.plan import Action, Format, Plan
from compressor.progress import Progress
from compressor.quantize import Weight
from compressor.report import DryRun, SiteLine, StageEstimate
from compressor.student import Student
from tests.test_report import example

RECIPE = {
    "model": {"path": "."},
    "data": {"calibration": ["a.txt"], "evaluation": ["b.txt"]},
    "budget": {"bytes": "25%"},
}


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    for name in ("a.txt", "b.txt", "config.json"):
        (tmp_path / name).write_text("{}")
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE))
    return str(path)


@pytest.fixture
def pipeline(monkeypatch):
    """Stands for the pipeline, and keeps what it was called with."""
    fake = types.ModuleType("compressor.pipeline")
    fake.calls = []
    fake.raises = None

    def compress(recipe, out, *, trust_remote_code=False, progress):
        fake.calls.append((recipe, out, trust_remote_code))
        progress(Progress("search", 1, 2, "half"))
        if fake.raises:
            raise fake.raises
        return example()

    def dry_run(recipe, trust_remote_code):
        sites = (SiteLine("embedding", "embedding", 1, 1000, 3, 500, 4000), SiteLine("x", "ffn", 64, 10, 8, 0, 90000))
        return DryRun("teacher", sites, 94000, 500, 60e6, (StageEstimate("bank", 75, 10**9), StageEstimate("b", 5, 2)))

    fake.compress = compress
    monkeypatch.setitem(sys.modules, "compressor.pipeline", fake)
    monkeypatch.setattr(estimate, "dry_run", dry_run)
    monkeypatch.setattr(compressor, "pipeline", fake, raising=False)
    return fake


def invoke(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_run_is_the_default_command(recipe, pipeline, tmp_path):
    out = str(tmp_path / "out")
    for arguments in ((recipe, "--out", out), ("run", recipe, "--out", out), ("--out", out, recipe)):
        result = invoke(*arguments, "--set", "search.evaluations=8", "--set", "search.seed=3", "--trust-remote-code")
        assert result.exit_code == 0, result.output
    for loaded, folder, trusted in pipeline.calls:
        assert (loaded.search.evaluations, loaded.search.seed, folder, trusted) == (8, 3, Path(out), True)
    assert len(pipeline.calls) == 3


def test_result_on_stdout_and_progress_on_stderr(recipe, pipeline):
    result = invoke(recipe)
    assert result.stdout.startswith("The student is 10.00× smaller")
    assert result.stdout.endswith("runs/small/report.md\n")
    assert "search  1/2" in result.stderr and "search" not in result.stdout
    assert pipeline.calls[0][2] is False, "remote code is run only when asked for"
    assert invoke(recipe, "--quiet").stderr == ""


def test_a_recipe_to_begin_with(tmp_path):
    for given in ([], ["--calibration", "a.txt", "--calibration", "b.txt", "--evaluation", "c.txt"]):
        (tmp_path / "recipe.yaml").write_text(invoke("init", "./teacher: mine", *given).stdout)
        found = Recipe.load(tmp_path / "recipe.yaml")
        assert found.model.path == str(tmp_path / "teacher: mine") and found.search.evaluations == 16
        assert len(found.data.calibration) == (2 if given else 1)
        assert (found.data.evaluation[0].dataset is None) == bool(given)


def test_options_of_its_own_are_not_taken_for_a_run():
    assert invoke("--version").stdout.strip() == compressor.__version__
    assert "No such option" not in invoke("--show-completion").output


def test_dry_run(recipe, pipeline):
    result = invoke(recipe, "--dry-run")
    assert result.exit_code == 0 and not pipeline.calls
    for said in ("2 sites, 11 actions", "500 B to 94.0 kB; budget: 60.0 MB", "1m15s", "1m20s", "1.00 GB"):
        assert said in result.stdout


def test_recipe_errors_end_with_2_before_any_work(recipe, pipeline, tmp_path):
    result = invoke(recipe, "--set", "serach.seed=1")
    assert result.exit_code == 2 and "did you mean search?" in result.stderr and "Traceback" not in result.output
    (tmp_path / "a.txt").unlink()
    result = invoke(recipe)
    assert result.exit_code == 2 and "a.txt: expected a text file" in result.stderr
    assert not pipeline.calls


@pytest.mark.parametrize(("error", "code"), [(BudgetError("no plan fits"), 1), (RegressionError("missed"), 3)])
def test_exit_codes(recipe, pipeline, error, code):
    pipeline.raises = error
    result = invoke(recipe)
    assert result.exit_code == code and result.stderr.endswith(f"error: {error}\n")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            "runs/a cannot be written: No space left on device. What is",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), "with --out"),
        (MemoryError(), "out of memory. What is finished is kept; lower distill.batch_tokens"),
        (torch.OutOfMemoryError("CUDA"), "gradient_checkpointing"),
    ],
)
def test_a_full_disk_and_a_full_memory_are_one_message(recipe, pipeline, error, said):
    pipeline.raises = error
    result = invoke(recipe)
    assert result.exit_code == 1 and said in result.stderr and "Traceback" not in result.output


def test_progress_as_json_is_an_object_a_line(recipe, pipeline):
    result = invoke(recipe, "--json")
    (line,) = map(json.loads, result.stderr.splitlines())
    assert (
        line.items() >= {"stage": "search", "done": 1, "total": 2, "message": "half"}.items() and line["seconds"] >= 0
    )


@pytest.mark.parametrize("command", ["run", "check", "compare", "generate", "schema"])
def test_help_shows_an_example(command):
    shown = " ".join(invoke(command, "--help").stdout.split())
    assert f"compress {'recipe.yaml' if command == 'run' else command}" in shown


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "Bad file descriptor"), RuntimeError("a bug")])
def test_other_system_errors_keep_their_traceback(recipe, pipeline, error):
    pipeline.raises = error
    assert invoke(recipe).exception is error


def test_an_unforeseen_error_keeps_its_traceback(recipe, pipeline):
    pipeline.raises = ZeroDivisionError()
    assert isinstance(invoke(recipe).exception, ZeroDivisionError)


def test_interrupt_says_how_to_go_on(recipe, pipeline, monkeypatch):
    pipeline.raises = KeyboardInterrupt()
    monkeypatch.setattr(sys, "argv", ["/usr/bin/compress", recipe, "--set", "search.seed=3 "])
    result = invoke(recipe)
    assert result.exit_code == 130
    assert f"compress {recipe} --set 'search.seed=3 '" in result.stderr


def test_schema():
    schema = json.loads(invoke("schema").stdout)
    assert schema["properties"]["budget"]["description"] == "What the student may cost."


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from compressor.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'pydantic', 'onnxruntime'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "schema" in result.stdout and result.stdout.endswith("[]\n")


def export_tiny(folder: Path) -> list[str]:
    """An exported decoder of one block with random weights, and a tokenizer that knows eight words."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 32, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, max_position_embeddings=64, tie_word_embeddings=True)
    config.save_pretrained(folder)
    decoder = decoder_of(config)
    plan = Plan(tuple((site.name, Action(site.units, "fp32")) for site in decoder.sites()))
    draw = torch.Generator().manual_seed(0)
    matrices = {
        matrix.name: Weight(Format.parse("fp32"), torch.randn(matrix.rows, matrix.columns, generator=draw))
        for site in decoder.sites()
        for matrix in site.matrices
    }
    norms = ("layers.0.attention.norm", "layers.0.ffn.norm", "norm")
    export_onnx(Student(decoder, plan, matrices, {name: torch.ones(64) for name in norms}), folder)
    words = [f"w{i}" for i in range(32)]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return words


def test_generate_from_a_real_export(tmp_path):
    words = export_tiny(tmp_path)
    result = invoke("generate", str(tmp_path), "w1 w2", "--tokens", "5")
    assert result.exit_code == 0, result.output
    with OnnxDecoder(tmp_path) as decoder:
        expected = [words[i] for i in decoder.generate(np.array([1, 2]), 5)]
    assert result.stdout.removeprefix("w1 w2").split() == expected

    assert "expected a chat template" in invoke("generate", str(tmp_path), "w1", "--chat").stderr
    (tmp_path / "chat_template.jinja").write_text("w1 {{ messages[0]['content'] }}")
    result = invoke("generate", str(tmp_path), "w2", "--tokens", "5", "--chat")
    assert result.exit_code == 0 and result.stdout.split() == expected  # the prompt is the same, and is not shown
    assert "expected at least one token" in invoke("generate", str(tmp_path), "").stderr
    result = invoke("generate", str(tmp_path), "w1 w2", "--tokens", "63")
    assert result.exit_code == 1 and "expected at most 64 together" in result.stderr
    for path in tmp_path.glob("token*"):
        path.unlink()
    assert "expected a tokenizer" in invoke("generate", str(tmp_path), "w1").stderr
    result = invoke("generate", str(tmp_path / "none"), "w1")
    assert result.exit_code == 1 and "expected an exported model" in result.stderr
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "model.safetensors").touch()  # any model's folder
    result = invoke("generate", str(tmp_path / "none"), "w1")
    assert result.exit_code == 1 and "it has no plan.json" in result.stderr


def test_memory_that_is_short_on_a_processor_is_told_as_that(recipe, pipeline):
    """torch has an error of its own for GPUs alone."""
    pipeline.raises = RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    )
    result = invoke(recipe)
    assert result.exit_code == 1 and "error: out of memory" in result.stderr


def test_a_run_without_a_student_has_a_headline(recipe, pipeline, monkeypatch):
    monkeypatch.setattr(pipeline, "compress", lambda *_, **__: replace(example(), rows=()))
    assert "without a student" in invoke(recipe).stdout
