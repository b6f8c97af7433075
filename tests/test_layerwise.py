"""Layer by layer: the same numbers as with the whole model in memory, of weights that stay on the disk."""

import re
import shutil
from pathlib import Path

import pytest
import torch

from compressor import measure, pipeline
from compressor.bank import Bank
from compressor.errors import RecipeError
from compressor.estimate import dry_run, layer_by_layer
from compressor.executor import Executor
from compressor.model import load_teacher, read_decoder
from compressor.network import loaded
from compressor.plan import DROP, Action, Plan
from compressor.progress import silent
from compressor.run import start
from compressor.stages import Stages
from compressor.student import full_plan
from tests.test_pipeline import recipe

WHOLE = {"distill": {"steps": 0}}


@pytest.fixture
def layerwise(tiny_folder, tmp_path):
    return load_teacher(tiny_folder, layerwise=tmp_path).network


@pytest.fixture
def plan(tiny) -> Plan:
    changes = {"layers.0.ffn": Action(64, "w4"), "layers.1.attention": DROP, "layers.2.attention": Action(1, "int8")}
    return Plan(tuple((n, changes.get(n, a)) for n, a in full_plan(tiny.decoder, "w8", "w4").items()))


def test_a_teacher_on_the_disk_is_the_teacher(tiny, layerwise, tmp_path, windows):
    assert layerwise.digest() == tiny.digest()
    assert torch.equal(layerwise.hidden(windows[:2]), tiny.hidden(windows[:2]))
    assert not list(tmp_path.iterdir())  # its files have no name any more


def test_what_a_kill_left_of_the_files_is_cleared_away(tiny_folder, tmp_path):
    (tmp_path / ".teacher-killed").mkdir()
    (tmp_path / ".teacher-killed" / "0.safetensors").write_bytes(b"0" * 99)
    load_teacher(tiny_folder, layerwise=tmp_path)
    assert not list(tmp_path.iterdir())


def test_its_weights_are_mapped_from_files(layerwise):
    """Whatever type the checkpoint has: not a page of them is the process's own."""
    own = {
        (int(low, 16), int(high, 16))
        for low, high, rest in re.findall(r"^(\w+)-(\w+) (.*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
        if ".safetensors (deleted)" in rest
    }
    for name, parameter in layerwise.model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in own), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_of_half_precision(tiny_folder, tmp_path, windows, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=dtype).save_pretrained(
        tmp_path / "half", max_shard_size="50KB"
    )
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "half")
    half, whole = (load_teacher(tmp_path / "half", layerwise=kept).network for kept in (tmp_path, None))
    assert half.matrix("layers.1.ffn.up").dtype == torch.float32
    assert torch.equal(half.hidden(windows[:2]), whole.hidden(windows[:2]))


def test_a_student_is_the_same_and_never_whole(tiny, layerwise, windows, plan, tmp_path):
    whole, parts = (
        Bank(tmp_path / name, net, windows[:8], windows[:2]) for name, net in (("a", tiny), ("b", layerwise))
    )
    assert whole.key == parts.key
    expected, found = Executor(whole, windows[8:16]), Executor(parts, windows[8:16])
    before = {name: parameter.data_ptr() for name, parameter in found.student.model.named_parameters()}
    for tried in (full_plan(tiny.decoder, "fp32", "fp32"), plan, full_plan(tiny.decoder, "w4", "w4")):
        assert found.score(tried).kl == pytest.approx(expected.score(tried).kl, rel=1e-4, abs=1e-7)
        assert found.score(tried, part=3).kl == pytest.approx(expected.score(tried, part=3).kl, rel=1e-4, abs=1e-7)
    after = {name: parameter.data_ptr() for name, parameter in found.student.model.named_parameters()}
    assert {name for name in before if before[name] != after[name]} == {
        "embedding.weight"
    }  # and the head, which is tied
    student = parts.realize(plan)
    torch.testing.assert_close(
        loaded(layerwise, student).hidden(windows[:2]), loaded(tiny, student).hidden(windows[:2]), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(NotImplementedError):
        found.student.generate(windows[:1], 1, lambda logits: logits.argmax(-1))


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """(folder, report) of the same recipe, whole and layer by layer."""
    found = []
    for layerwise in (False, True):
        out = tmp_path_factory.mktemp("run")
        asked = recipe(tiny_folder, model={"layerwise": layerwise}, **WHOLE)
        found.append((out, pipeline.compress(asked, out)))
    return found


def test_the_same_student_comes_out(runs):
    (whole, expected), (parts, found) = runs
    for name in ("model.onnx", "model.onnx_data", "plan.json", "config.json"):
        assert (whole / "onnx" / name).read_bytes() == (parts / "onnx" / name).read_bytes(), name
    assert found.row("student").kl == pytest.approx(expected.row("student").kl, rel=1e-4)
    assert found.row("teacher").perplexity == pytest.approx(expected.row("teacher").perplexity, rel=1e-6)
    assert found.parity.passed and found.recovery is not None


def test_a_run_goes_on_in_the_other_way(runs, tiny_folder, tmp_path):
    """What was kept of one is not taken for the other's: layer by layer nothing was measured of the whole teacher."""
    parts, found = runs[1]
    out = shutil.copytree(parts, tmp_path / "run")
    report = pipeline.compress(recipe(tiny_folder, model={"layerwise": False}, **WHOLE), out)
    assert found.row("reference").prefill_ms is None and report.row("reference").prefill_ms is not None


def test_what_takes_the_whole_model_is_left_out_of_the_report(runs):
    out, report = runs[1]
    reference, teacher = report.row("reference"), report.row("teacher")
    assert reference.size_bytes == pytest.approx(runs[0][1].row("reference").size_bytes, rel=0.03)
    assert reference.prefill_ms is None and reference.perplexity is None and teacher.prefill_ms is None
    assert report.row("student").decode_ms is not None
    assert [sample.teacher for sample in report.samples] == [None, None]
    assert not (out / "stages" / "fp32").exists()
    page = (out / "report.md").read_text()
    assert "*student*" in page and "*teacher*" not in page and "nan" not in page


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"distill": {"steps": 4}}, "distill.steps = 4"),
        ({"data": {"calibration": [{"generated": 1024}]}}, "generated, in data.calibration"),
        ({"gate": {"memory": "50%"}}, "gate.memory as a share of the fp32 export's"),
        ({"budget": {"decode": "50%"}}, "budget.decode"),
        ({"gate": {"prefill": "90%"}}, "gate.prefill"),
        ({"target": {"runtime": "torch"}, "search": {"formats": ["fp32"]}}, "target.runtime"),
    ],
)
def test_what_takes_the_whole_model_is_refused(tiny_folder, tmp_path, change, said):
    wanted = recipe(tiny_folder, **{**WHOLE, **change, "model": {"layerwise": True}})
    with pytest.raises(RecipeError, match=said):
        pipeline.compress(wanted, tmp_path)
    with pytest.raises(RecipeError, match=said):
        dry_run(wanted)


def test_absolute_times_are_not(tiny_folder, tmp_path):
    asked = recipe(tiny_folder, model={"layerwise": True}, budget={"decode": "1s"}, gate={"decode": "1s"}, **WHOLE)
    report = pipeline.compress(asked, tmp_path)
    assert [line.name for line in report.gate] == ["decode"]
    assert {line.name for line in report.budget} == {"bytes", "decode"}


def test_it_is_chosen_where_memory_is_short(tiny_folder, tmp_path, monkeypatch):
    assert not begun(tiny_folder, tmp_path / "a").teacher.network.layerwise
    monkeypatch.setattr("compressor.estimate.available_bytes", lambda: 10**6)
    assert begun(tiny_folder, tmp_path / "b").teacher.network.layerwise
    assert not begun(tiny_folder, tmp_path / "a").teacher.network.layerwise  # what was begun goes on as it was
    whole, parts = (dry_run(recipe(tiny_folder, model={"layerwise": kept}, **WHOLE)) for kept in (False, True))
    assert parts.layerwise and not whole.layerwise
    assert sum(s.memory_bytes for s in parts.stages) < sum(s.memory_bytes for s in whole.stages)
    with pytest.raises(RecipeError, match=r"distill.steps = 4: .* 0.0 GB are free"):
        begun(tiny_folder, tmp_path / "c", distill={})


def test_it_is_chosen_where_a_gpu_is_too_small(tiny_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = recipe(tiny_folder, **WHOLE)
    for free, chosen in ((10**9, False), (10**8, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 10**12))
        assert layer_by_layer(asked, read_decoder(tiny_folder)) is chosen


def begun(folder, out, **changes):
    asked = recipe(folder, **{**WHOLE, **changes})
    return start(asked, out, False, Stages(out / "stages", silent))


def test_memory_that_a_control_group_allows(monkeypatch, tmp_path):
    assert 0 < measure.available_bytes() < 2**50
    monkeypatch.setattr(measure, "_limits", lambda: iter([12345, 2**62]))
    assert measure.available_bytes() == 12345


def test_a_gguf_file_is_not_read_layer_by_layer(tiny_folder):
    with pytest.raises(RecipeError, match="layerwise.*GGUF"):
        recipe(tiny_folder, model={"layerwise": True, "gguf": "model.gguf"})
