"""Distillation on the tiny model: it helps, stays on the grid, resumes, and keeps nothing that got worse."""

from dataclasses import replace

import pytest
import torch

import compressor.recovery.distill
from compressor.bank import Bank
from compressor.executor import Reference
from compressor.plan import DROP, Action, Plan
from compressor.recovery.distill import Imitation, Settings, distill, loaded, visited
from compressor.recovery.trained import RANK, Trained
from compressor.student import Student, full_plan

WEIGHTS = Settings(steps=12, train="weights", learning_rate=3e-3, warmup=2, check_every=4)
SCALES = replace(WEIGHTS, train="scales", learning_rate=0.3)
LORA = replace(WEIGHTS, train="lora", learning_rate=1e-2)
all_three = pytest.mark.parametrize("settings", [WEIGHTS, SCALES, LORA], ids=["weights", "scales", "lora"])


@pytest.fixture
def student(tiny, windows, tmp_path) -> Student:
    """Quantized, pruned, with a sub-layer gone and one on dynamic int8."""
    changes = {
        "layers.0.ffn": Action(64, "w4"),
        "layers.1.ffn": DROP,
        "layers.2.ffn": Action(96, "int8"),
        "layers.1.attention": Action(1, "fp16"),
    }
    plan = Plan(tuple((n, changes.get(n, a)) for n, a in full_plan(tiny.decoder, "w2", "w8").items()))
    return Bank(tmp_path / "bank", tiny, windows[:8], windows[:4]).realize(plan)


def train(teacher, student, windows, settings, checkpoint, progress=lambda done, total, message: None):
    """Imitation on some windows; others decide."""

    def imitation(network):
        return Imitation(teacher, network, windows[4:16], windows=2, hidden_weight=0.1)

    return distill(teacher, student, imitation, windows[20:], settings, checkpoint, progress)


def kl(teacher, student, tokens):
    return Reference(teacher, tokens).kl(loaded(teacher, student))


@all_three
def test_the_student_comes_closer_on_text_it_never_saw(tiny, windows, student, tmp_path, settings):
    better, curve = train(tiny, student, windows, settings, tmp_path / "part")
    before, after = kl(tiny, student, windows[20:]), kl(tiny, better, windows[20:])
    assert after < 0.8 * before
    assert curve.held_out[0][1]["kl"] == pytest.approx(before, rel=1e-4)
    assert curve.kl == pytest.approx(after, rel=1e-3)
    assert len(curve.training) == 12 and not (tmp_path / "part").exists()


@pytest.mark.parametrize("settings", [WEIGHTS, LORA], ids=["weights", "lora"])
def test_trained_weights_lie_on_the_same_grid(tiny, windows, student, tmp_path, settings):
    better, _ = train(tiny, student, windows, settings, tmp_path / "part")
    assert better.plan == student.plan and better.matrices.keys() == student.matrices.keys()
    moved = 0
    for name, weight in better.matrices.items():
        given = student.matrices[name]
        assert weight.format == given.format and weight.shape == given.shape
        if given.scales is not None:
            assert torch.equal(weight.scales, given.scales)
            assert weight.codes.dtype == given.codes.dtype
            moved += int((weight.codes != given.codes).sum())
    assert moved > 0


def test_trained_scales_keep_the_codes(tiny, windows, student, tmp_path):
    better, _ = train(tiny, student, windows, SCALES, tmp_path / "part")
    for name, weight in better.matrices.items():
        given = student.matrices[name]
        if given.scales is None or name == "embedding":
            assert torch.equal(weight.dequantize(), given.dequantize()) and weight.format == given.format
        else:
            assert torch.equal(weight.codes, given.codes) and not torch.equal(weight.scales, given.scales)
    assert not torch.equal(better.vectors["norm"], student.vectors["norm"])


def test_a_student_that_got_worse_is_not_kept(tiny, windows, student, tmp_path):
    settings = replace(WEIGHTS, steps=4, learning_rate=10.0, warmup=0)
    kept, curve = train(tiny, student, windows, settings, tmp_path / "part")
    assert kept is student and curve.kept_step == 0
    assert dict(curve.held_out)[4]["kl"] > dict(curve.held_out)[0]["kl"]


@all_three
def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(tiny, windows, student, tmp_path, monkeypatch, settings):
    monkeypatch.setattr(compressor.recovery.distill, "CHECKPOINT_SECONDS", 0)
    whole, curve = train(tiny, student, windows, settings, tmp_path / "whole")

    def stop(done, total, message):
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny, student, windows, settings, tmp_path / "part", stop)
    steps = []
    resumed, again = train(tiny, student, windows, settings, tmp_path / "part", lambda done, *_: steps.append(done))
    assert steps == [9, 10, 11, 12]
    assert again == curve
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_a_change_of_low_rank_trains_a_fraction_of_the_weights(tiny, student):
    low, whole = (Trained(loaded(tiny, student), student, way) for way in ("lora", "weights"))
    assert {name.split("/")[0] for name in low.parameters} == whole.parameters.keys()
    assert all(torch.equal(a, b) for a, b in zip(low.student().tensors().values(), student.tensors().values()))
    assert all(p.shape[0] == RANK or p.shape[1] == RANK for name, p in low.parameters.items() if "/" in name)


def test_checkpointing_changes_memory_alone_and_half_precision_little(tiny, windows, student, tmp_path):
    _, plain = train(tiny, student, windows, SCALES, tmp_path / "part")
    _, again = train(tiny, student, windows, replace(SCALES, checkpointing=True), tmp_path / "part")
    assert again.held_out == plain.held_out
    _, coarse = train(tiny, student, windows, replace(SCALES, precision="bf16"), tmp_path / "part")
    assert coarse.held_out != plain.held_out and coarse.kl == pytest.approx(plain.kl, rel=0.1)


@pytest.mark.parametrize("together", [2, 3, 8])
def test_windows_that_run_together_give_the_same_gradients(tiny, windows, student, together):
    found = []
    for count in (1, together):
        trained = Trained(loaded(tiny, student), student, "scales")
        objective = Imitation(tiny, trained.network, windows[:4], windows=4, together=count, hidden_weight=0.3)
        for parameter in trained.parameters.values():
            parameter.grad = None
        (told,) = objective.updates(0)
        found.append((told["loss"], [parameter.grad for parameter in trained.parameters.values()]))
    (one, ours), (other, theirs) = found
    # other sums round otherwise, which flips some int8 activations
    assert one == pytest.approx(other, rel=1e-3)
    ours, theirs = (torch.cat([gradient.flatten() for gradient in some]) for some in (ours, theirs))
    assert (ours - theirs).norm() < 0.05 * ours.norm()


def test_blocks_run_twice_with_checkpointing(tiny, windows):
    calls = []
    tiny.model.layers[1].register_forward_pre_hook(lambda *_: calls.append(1))
    tiny.vector("norm").requires_grad_(True)
    tiny.vector("layers.1.ffn.norm").requires_grad_(True)
    for checkpointing, expected in ((False, 1), (True, 2)):
        calls.clear()
        tiny.model.checkpointing = checkpointing
        tiny.model(windows[:1]).sum().backward()
        assert len(calls) == expected


@all_three
@pytest.mark.parametrize("format", ["fp32", "w4"])
def test_the_teacher_is_left_alone(tiny, windows, tmp_path, settings, format):
    digest = tiny.digest()
    student = Bank(tmp_path / "bank", tiny, windows[:4], windows[:2]).realize(full_plan(tiny.decoder, format, "fp32"))
    train(tiny, student, windows, replace(settings, steps=2), tmp_path / "part")
    assert tiny.digest() == digest and not any(p.requires_grad for p in tiny.model.parameters())


def test_every_pass_visits_everything_once_in_an_order_of_its_own():
    passes = [[visited(7, n, seed=3) for n in range(start, start + 7)] for start in (0, 7)]
    assert all(sorted(order) == list(range(7)) for order in passes) and passes[0] != passes[1]
