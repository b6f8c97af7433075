"""Distillation on the tiny model: it helps, stays on the grid, resumes, and keeps nothing that got worse; with the teacher's
predictions from disk and with relations of attentions, too."""

from dataclasses import replace

import pytest
import torch

import compressor.recovery.cache
import compressor.recovery.distill
from compressor.bank import Bank
from compressor.executor import Reference
from compressor.network import loaded
from compressor.plan import DROP, Action, Plan
from compressor.recovery.cache import TeacherCache, outcomes
from compressor.recovery.distill import Imitation, Settings, distill, visited
from compressor.recovery.relations import related, relation_kl
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


# The teacher's predictions from disk ----------------------------------------------------------------------------------


def cached(teacher, windows, folder, k, chosen=range(4), temperature=1.0) -> TeacherCache:
    cache = TeacherCache(folder, teacher.digest(), windows, list(chosen), k, temperature)
    cache.make(teacher, together=3)
    return cache


def losses(teacher, student, windows, **settings) -> tuple[float, torch.Tensor]:
    """Loss of a step over four windows, two at once, and all gradients."""
    trained = Trained(loaded(teacher, student), student, "scales")
    objective = Imitation(teacher, trained.network, windows[:4], windows=4, together=2, **settings)
    for parameter in trained.parameters.values():
        parameter.grad = None
    (told,) = objective.updates(0)
    gradients = [parameter.grad for parameter in trained.parameters.values() if parameter.grad is not None]
    return told["loss"], torch.cat([gradient.flatten() for gradient in gradients])


def check_whole_cache(teacher, student, text_NL, folder) -> None:
    """A cache of all tokens gives the loss of the teacher, whatever of the text is compared."""
    cache = TeacherCache(folder, "teacher", text_NL, range(4), teacher.decoder.outputs)
    cache.make(teacher, together=3)
    objectives = [
        Imitation(teacher, loaded(teacher, student, "none"), text_NL[:4], windows=4, together=2, cache=c)
        for c in (None, cache)
    ]
    with torch.no_grad():
        plain, ours = (float(objective._loss([2, 0])) for objective in objectives)
    assert plain > 0 and ours == pytest.approx(plain, rel=1e-2)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_cache_of_all_tokens_is_the_teacher_and_fewer_are_less(tiny, windows, student, tmp_path, temperature):
    whole, wanted = losses(tiny, student, windows, temperature=temperature)
    found = []
    for k in (1, 8, 64, 255, 256, 1000):
        cache = cached(tiny, windows, tmp_path / "cache", k, temperature=temperature)
        loss, gradient = losses(tiny, student, windows, temperature=temperature, cache=cache)
        found.append(loss)
        if k >= 255:  # all others are none, or one
            assert loss == pytest.approx(whole, rel=1e-3)
            assert (gradient - wanted).norm() < 0.01 * wanted.norm()
    assert found[:4] == sorted(found[:4]) and found[0] < 0.8 * whole and max(found) < 1.001 * whole


def test_outcomes_and_the_divergence_are_those_of_a_plain_loop(tiny, windows, tmp_path):
    cache = cached(tiny, windows, tmp_path, 5)
    logits_TV = torch.randn(128, 256, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_(
        True
    )
    cache.kl([1, 3], logits_TV).backward()
    with torch.no_grad():
        p_TV = torch.softmax(tiny.logits(tiny.hidden(windows[[1, 3]])).flatten(0, 1).double(), -1)
    again_TV = logits_TV.detach().clone().requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for p_V, q_V in zip(p_TV, torch.softmax(again_TV, -1)):
        best = p_V.argsort(descending=True)[:5]
        for p, q in [*zip(p_V[best], q_V[best]), (1 - p_V[best].sum(), 1 - q_V[best].sum())]:
            total = total + p * (p / q).log() / len(p_TV)
    total.backward()
    assert float(cache.kl([1, 3], logits_TV.detach())) == pytest.approx(float(total.detach()), rel=1e-3)
    assert (logits_TV.grad - again_TV.grad).norm() < 1e-3 * again_TV.grad.norm()
    ids_TK = p_TV.topk(5).indices
    assert torch.allclose(outcomes(p_TV.log(), ids_TK).exp().sum(-1), torch.ones(128, dtype=torch.float64))


def test_the_teacher_does_not_run_beside_a_student_that_has_its_predictions(tiny, windows, student, tmp_path):
    cache = cached(tiny, windows, tmp_path / "cache", 8)
    network = Trained(loaded(tiny, student), student, "scales").network
    tiny.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("the teacher ran"))
    for settings in ({"hidden_weight": 0.1}, {"attention_weight": 0.1}):
        with pytest.raises(AssertionError, match="take the teacher itself"):
            Imitation(tiny, network, windows[:4], cache=cache, **settings)
    objective = Imitation(tiny, network, windows[:4], windows=2, cache=cache)
    assert all(told["loss"] > 0 for step in range(3) for told in objective.updates(step))


def test_a_cache_is_made_once_survives_a_kill_and_follows_the_text(tiny, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(compressor.recovery.cache, "WINDOWS", 2)
    asked = []
    tiny.model.layers[0].register_forward_pre_hook(lambda _module, given: asked.append(len(given[0])))

    def stop(done, total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TeacherCache(tmp_path, "tiny", windows, range(5), 8).make(tiny, progress=stop)
    assert len(list(tmp_path.iterdir())) == 1
    asked.clear()
    told = []
    cache = TeacherCache(tmp_path, "tiny", windows, range(5), 8)
    cache.make(tiny, progress=lambda *done: told.append(done))
    assert sum(asked) == 3 and told[-1] == (5, 5) and len(list(tmp_path.iterdir())) == 3
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 5 * 64 * (6 * 8 + 2) + 3 * 1000
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = TeacherCache(tmp_path, "tiny", windows.clone(), range(5), 8)
    again.make(tiny)
    assert sum(asked) == 3 and times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    z_TV = torch.zeros(64, 256)
    assert again.key == cache.key and torch.equal(again.kl([4], z_TV), cache.kl([4], z_TV))
    other = windows.clone()
    other[3, 0] += 1  # of the second of three files
    for made_of in (("tiny", other, 8, 1.0), ("else", other, 8, 1.0), ("else", other, 9, 1.0), ("else", other, 9, 2.0)):
        asked.clear()
        teacher, text, k, temperature = made_of
        TeacherCache(tmp_path, teacher, text, range(5), k, temperature).make(tiny)
        assert sum(asked) == (2 if teacher == "tiny" else 5) and len(list(tmp_path.iterdir())) == 3


# Relations of attentions ----------------------------------------------------------------------------------------------


def test_relations_are_those_of_a_plain_loop():
    torch.manual_seed(0)
    given_BLI, wanted_BLI = torch.randn(2, 7, 16), torch.randn(2, 7, 48)
    blank_BL = torch.zeros(2, 7, dtype=torch.bool)
    blank_BL[1, 4:] = True
    found = []
    for b, length in ((0, 7), (1, 4)):
        for head in range(8):
            p, q = (
                torch.softmax(a @ a.T / a.shape[1] ** 0.5, -1)
                for a in (side[b, :length].chunk(8, -1)[head] for side in (wanted_BLI, given_BLI))
            )
            found += [float((p[i] * (p[i] / q[i]).log()).sum()) for i in range(length)]
    assert float(relation_kl(given_BLI, wanted_BLI, blank_BL)) == pytest.approx(sum(found) / len(found), rel=1e-5)
    assert float(relation_kl(given_BLI, given_BLI)) == 0
    # 12 outputs are not divided by 8: one head for both
    p, q = (torch.softmax(a @ a.T / a.shape[1] ** 0.5, -1) for a in (wanted_BLI[0], given_BLI[0, :, :12]))
    plain = float((p * (p / q).log()).sum(-1).mean())
    assert float(relation_kl(given_BLI[:1, :, :12], wanted_BLI[:1])) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(("gone", "last"), [((), 2), ((2,), 1), ((1, 2), 0), ((0, 1, 2), None)])
def test_relations_of_the_last_attention_that_the_student_has(tiny, windows, tmp_path, gone, last):
    changes = {f"layers.{layer}.attention": DROP if layer in gone else Action(1, "w4") for layer in range(3)}
    plan = Plan(tuple((n, changes.get(n, a)) for n, a in full_plan(tiny.decoder, "w4", "w8").items()))
    pruned = Bank(tmp_path / "bank", tiny, windows[:8], windows[:4]).realize(plan)
    network = loaded(tiny, pruned)
    wanted = () if last is None else tuple(f"layers.{last}.attention.{matrix}" for matrix in "qkv")
    assert related(network) == wanted
    plain, _ = losses(tiny, pruned, windows)
    with torch.no_grad(), tiny.watch_outputs(wanted) as theirs, network.watch_outputs(wanted) as ours:
        tiny.hidden(windows[:4])
        network.hidden(windows[:4])
    kls = [float(relation_kl(ours[name], theirs[name])) for name in wanted]
    assert all(ours[name].shape[-1] == theirs[name].shape[-1] // 2 for name in wanted) and all(kls)
    loss, _ = losses(tiny, pruned, windows, attention_weight=3.0)
    assert loss == pytest.approx(plain + 3 * sum(kls) / 3, rel=1e-3)


def test_a_student_learns_relations_with_checkpointing_alike(tiny, windows, student, tmp_path):
    def imitation(network):
        return Imitation(tiny, network, windows[4:16], windows=2, kl_weight=0.0, attention_weight=1.0)

    curves = []
    for checkpointing in (False, True):
        settings = replace(SCALES, checkpointing=checkpointing)
        _, curve = distill(tiny, student, imitation, windows[20:], settings, tmp_path / "part")
        curves.append(curve)
    first, *_, last = (told["loss"] for told in curves[0].training)
    assert last < 0.97 * first and curves[1].training == curves[0].training
