"""Statistics, the bank on disk, sensitivities."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.bank import Bank
from compressor.errors import BankError
from compressor.executor import Executor
from compressor.plan import DROP, PARTS, Action, Plan
from compressor.sensitivity import noise_coefficients, sensitivities
from compressor.student import full_plan


@pytest.fixture
def bank(tiny, windows, tmp_path) -> Bank:
    return Bank(tmp_path, tiny, windows[:8], windows[:4])


def test_second_moments_are_those_of_the_inputs(bank, tiny, windows):
    seen = []
    with torch.no_grad(), tiny.watch_inputs(lambda name, x: seen.append(x) if name == "layers.1.ffn.out" else None):
        tiny.hidden(windows[:8])
    x = seen[0].flatten(0, 1)
    torch.testing.assert_close(
        bank.statistics().second_moment("layers.1.ffn.out"), x.T @ x / len(x), rtol=1e-3, atol=1e-4
    )


def test_fisher_weights_are_mean_squared_gradients(bank, tiny, windows):
    """Against autograd with a perturbation added by hand, for one matrix and the same sampled labels."""
    generator, total = torch.Generator().manual_seed(0), torch.zeros(64)
    down = tiny.module("layers.2.ffn.down")
    for ids in windows[:4]:
        nudge = torch.zeros(1, 64, 64, requires_grad=True)
        handle = down.register_forward_hook(lambda _m, _a, output: output + nudge)  # noqa: B023
        log_p = torch.log_softmax(tiny.logits(tiny.hidden(ids[None]))[0], -1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        (gradient,) = torch.autograd.grad(log_p.gather(1, labels).sum(), nudge)
        handle.remove()
        total += gradient[0].square().sum(0)
    torch.testing.assert_close(bank.statistics().fisher("layers.2.ffn.down"), total / (4 * 64), rtol=1e-3, atol=1e-6)


def test_variants_have_the_shape_of_their_action(bank, tiny):
    attention, ffn = tiny.sites["layers.0.attention"], tiny.sites["layers.0.ffn"]
    assert {n[-1]: w.shape for n, w in bank.variant(attention, Action(1, "w4")).items()} == {
        "q": (32, 64),
        "k": (16, 64),
        "v": (16, 64),
        "o": (64, 32),
    }
    assert bank.variant(ffn, Action(96, "int8"))["layers.0.ffn.down"].shape == (64, 96)
    assert bank.variant(ffn, DROP) == {}


def test_a_pair_of_formats_is_one_for_keys_values_and_down_and_one_for_the_others(bank, tiny):
    for site, finer in (("layers.0.attention", "kv"), ("layers.0.ffn", ["down"])):
        keep = tiny.sites[site].units // 2
        pair, *alone = (bank.variant(tiny.sites[site], Action(keep, name)) for name in ("w2+w8", "w2", "w8"))
        for name, weight in pair.items():
            expected = alone[name.rpartition(".")[2] in finer][name]
            assert weight.format == expected.format and torch.equal(weight.dequantize(), expected.dequantize())


def test_what_a_pair_is_predicted_to_cost_is_the_sum_of_its_matrices(bank, tiny):
    site = tiny.sites["layers.1.ffn"]
    names = ("fp32", "w2+fp32", "fp32+w2", "w2", "w2+w8")
    found = dict(zip(names, sensitivities(bank, {site.name: tuple(Action(96, name) for name in names)})[site.name]))
    assert 0 < found["fp32"] < min(found["w2+fp32"], found["fp32+w2"])
    assert found["w2+fp32"] + found["fp32+w2"] - found["fp32"] == pytest.approx(found["w2"])
    assert found["w2+fp32"] < found["w2+w8"] < found["w2"]


def test_a_second_bank_reads_what_the_first_made(bank, tiny, windows, tmp_path, monkeypatch):
    site, actions = (
        tiny.sites["layers.0.ffn"],
        [Action(k, f) for k in (128, 64) for f in ("fp32", "fp16", "int8", "w4", "w2")],
    )
    made = [bank.variant(site, action) for action in actions]
    for name in ("bank.collect", "bank.removal_order", "quantize.gptq", "quantize.round_to_nearest"):
        monkeypatch.setattr(f"compressor.{name}", None)  # calling it would fail
    again = Bank(tmp_path, tiny, windows[:8], windows[:4])
    for action, weights in zip(actions, made):
        for name, weight in again.variant(site, action).items():
            assert torch.equal(weight.dequantize(), weights[name].dequantize()), (action, name)


def test_other_text_is_another_bank(bank, tiny, windows, tmp_path):
    assert Bank(tmp_path, tiny, windows[8:16], windows[:4]).folder != bank.folder
    assert Bank(tmp_path, tiny, windows[:8], windows[:4], "nearest").folder != bank.folder


def test_altered_files_are_refused(bank, tiny, windows, tmp_path):
    site = tiny.sites["layers.0.ffn"]
    bank.variant(site, Action(128, "w4"))
    path = bank.folder / "layers.0.ffn" / "128-w4.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(BankError, match="delete the file"):
        Bank(tmp_path, tiny, windows[:8], windows[:4]).variant(site, Action(128, "w4"))


def test_what_the_manifest_does_not_list_is_made_again(bank, tiny, windows, tmp_path):
    site = tiny.sites["layers.0.ffn"]
    expected = bank.variant(site, Action(128, "w4"))
    manifest = bank.folder / "manifest.jsonl"
    manifest.write_text(manifest.read_text()[:-20])  # a kill while the last line was written
    again = Bank(tmp_path, tiny, windows[:8], windows[:4])
    for name, weight in again.variant(site, Action(128, "w4")).items():
        assert torch.equal(weight.dequantize(), expected[name].dequantize())
    third = Bank(tmp_path, tiny, windows[:8], windows[:4])
    assert third._listed == again._listed


def test_gptq_and_compensation_serve_the_student(tiny, windows, tmp_path):
    """On the real score: GPTQ is closer to the teacher than rounding."""
    kls = {}
    for quantizer in ("gptq", "nearest"):
        bank = Bank(tmp_path, tiny, windows[:8], windows[:4], quantizer)
        kls[quantizer] = Executor(bank, windows[8:12]).score(full_plan(tiny.decoder, "w2", "fp32")).kl
    assert kls["gptq"] < 0.9 * kls["nearest"]


def naive_kl(teacher, student, tokens):
    with torch.no_grad():
        p, q = (torch.log_softmax(n.logits(n.hidden(tokens)).double(), -1) for n in (teacher, student))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_scores_are_kl_and_perplexity(bank, tiny, windows):
    tokens = windows[8:12]
    executor = Executor(bank, tokens)
    assert executor.score(full_plan(tiny.decoder, "fp32", "fp32")).kl == pytest.approx(0, abs=1e-6)
    score = executor.score(full_plan(tiny.decoder, "w4", "w8"))
    assert score.kl == pytest.approx(naive_kl(tiny, executor.student, tokens), rel=1e-3)
    nll = 0.0
    for ids in tokens:
        with torch.no_grad():
            log_p = torch.log_softmax(executor.student.logits(executor.student.hidden(ids[None]))[0].double(), -1)
        nll -= sum(float(log_p[t, ids[t + 1]]) for t in range(len(ids) - 1))
    assert score.perplexity == pytest.approx(math.exp(nll / (4 * 63)), rel=1e-4)
    assert score.tokens == 256 and score.share == 1.0


def test_parts_of_the_text_make_up_the_whole(bank, tiny, windows):
    plan = full_plan(tiny.decoder, "w4", "w8")
    executor = Executor(bank, windows[:12])  # the first four parts have two windows
    whole, parts = executor.score(plan), [executor.score(plan, part) for part in range(PARTS)]
    assert whole.by_part == pytest.approx([score.kl for score in parts], rel=1e-4)
    assert [score.tokens for score in parts] == [128] * 4 + [64] * 4 and parts[3].share == 1 / PARTS
    alone = Executor(bank, windows[3:12:8]).score(plan)
    assert (parts[3].kl, parts[3].perplexity) == pytest.approx((alone.kl, alone.perplexity), rel=1e-4)
    for known in ({3: parts[3], 6: parts[6]}, dict(enumerate(parts))):
        completed = executor.score(plan, known=known)
        assert completed.kl == pytest.approx(whole.kl, rel=1e-4) and completed.tokens == whole.tokens
        assert completed.perplexity == pytest.approx(whole.perplexity, rel=1e-4)


def test_only_differences_are_installed_and_order_does_not_matter(bank, tiny, windows, monkeypatch):
    executor = Executor(bank, windows[8:10])
    first = full_plan(tiny.decoder, "w4", "w8")
    changes = {"layers.1.ffn": DROP, "layers.2.attention": Action(1, "int8")}
    second = Plan(tuple((name, changes.get(name, action)) for name, action in first.items()))
    score = executor.score(first)
    installed = []
    install = executor.student.install
    monkeypatch.setattr(
        executor.student, "install", lambda site, *rest: (installed.append(site.name), install(site, *rest))
    )
    assert executor.score(second).kl != score.kl
    assert installed == list(changes)
    assert executor.score(first) == score
    assert Executor(bank, windows[8:10]).score(second) == executor.score(second)


@pytest.mark.parametrize(("way", "correlation", "factor"), [("fisher", 0.9, 3), ("noise", 0.85, 5)])
def test_sensitivities_predict_single_changes(bank, tiny, windows, way, correlation, factor):
    """Each (site, action) alone, predicted against the real KL: the right order of magnitude, and the right order."""
    sites = tiny.decoder.sites()
    menu = {
        site.name: (Action(1, "fp32"), Action(1, "w4"))
        if site.layer is None
        else (*(Action(k, f) for k in (site.units, site.units // 2) for f in ("fp32", "w4", "w2")), DROP)
        for site in sites
    }
    executor, full = Executor(bank, windows[:8]), full_plan(tiny.decoder, "fp32", "fp32")
    alphas = noise_coefficients(executor) if way == "noise" else None
    assert executor.score(full).kl == pytest.approx(0, abs=1e-6)  # the noise is gone
    predicted = sensitivities(bank, menu, alphas=alphas)
    pairs = []
    for site in sites:
        assert predicted[site.name][0] == 0
        for action, value in list(zip(menu[site.name], predicted[site.name]))[1:]:
            plan = Plan(tuple((name, action if name == site.name else a) for name, a in full.items()))
            pairs.append((value, executor.score(plan).kl))
    expected, real = np.log(np.array(pairs)).T
    assert np.corrcoef(expected.argsort().argsort(), real.argsort().argsort())[0, 1] > correlation
    assert abs(np.median(expected - real)) < math.log(factor)


def test_what_another_bank_holds_is_taken_over_once(bank, tiny, windows, tmp_path):
    """As one file for both; a variant that was deleted since is made anew."""
    site, action = bank.teacher.sites["layers.0.ffn"], Action(64, "w4")
    ours = Bank(tmp_path / "ours", tiny, windows[:8], windows[:4])
    ours.statistics()
    variant = bank.variant(site, action)

    def names(of: Bank) -> set[Path]:
        return {path.relative_to(of.folder) for path in of.folder.rglob("*.safetensors")}

    own = names(ours)
    ours.take_over(tmp_path)
    linked = {name for name in names(ours) if (ours.folder / name).samefile(bank.folder / name)}
    assert own and linked and names(bank) == own | linked and not own & linked
    again = Bank(tmp_path / "ours", tiny, windows[:8], windows[:4])
    found = again.variant(site, action)
    assert all(torch.equal(found[name].dequantize(), weight.dequantize()) for name, weight in variant.items())
    (gone,) = (name for name in linked if "w4" in str(name))
    (ours.folder / gone).unlink()
    again = Bank(tmp_path / "ours", tiny, windows[:8], windows[:4])
    again.take_over(tmp_path)
    again.variant(site, action)
    assert not (ours.folder / gone).samefile(bank.folder / gone)
