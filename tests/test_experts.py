"""Mixtures of experts: routing against a loop over tokens, what statistics and costs say of an expert, a whole run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from compressor import pipeline
from compressor.bank import Bank
from compressor.estimate import dry_run
from compressor.executor import Executor, Reference
from compressor.export import OnnxDecoder, export_onnx, export_random, exported_bytes, read_student, site_stack
from compressor.model import load_teacher
from compressor.network import Network, loaded
from compressor.plan import DROP, Action, Plan
from compressor.quantize import as_floats, fake_dynamic_int8
from compressor.recovery.reconstruct import reconstruct
from compressor.sensitivity import noise_coefficients, sensitivities
from compressor.student import Decoder, Experts, full_plan
from compressor.transformer import Context, FeedForward, Mixture
from eval.latency import entry_key, measure_entry
from tests.test_families import error, folders  # noqa: F401
from tests.test_latency import stacks  # noqa: F401
from tests.test_pipeline import recipe

SHARED = "layers.0.ffn.shared"


@pytest.fixture
def mixed(folders) -> Network:  # noqa: F811
    """Blocks 0 and 1 have four experts of 64 channels, of which two are active, and a shared one of 80; block 2 has none."""
    return load_teacher(folders["qwen2_moe"]).network


@pytest.fixture
def bank(mixed, windows, tmp_path) -> Bank:
    return Bank(tmp_path / "bank", mixed, windows[:8], windows[:4])


def expert(number: int, layer: int = 0) -> str:
    return f"layers.{layer}.ffn.experts.{number}"


def changed(decoder: Decoder, changes: dict[str, Action], format: str = "fp32") -> Plan:
    return Plan(tuple((n, changes.get(n, a)) for n, a in full_plan(decoder, format, "fp32").items()))


def given(module: FeedForward, x_D: torch.Tensor) -> torch.Tensor:
    """What an expert gives for one token."""
    gate, up, down = module.gate.weight @ x_D, module.up.weight @ x_D, module.down.weight
    return down @ (gate / (1 + (-gate).exp()) * up)


def chosen(module: Mixture, x_D: torch.Tensor) -> dict[int, float]:
    """The experts that a token runs through, and their weights."""
    powers = [float((row_D @ x_D).exp()) for row_D in module.router.weight]
    best = sorted(range(len(powers)), key=lambda e: -powers[e])[: module.active]
    whole = sum(powers[e] for e in best) if module.normalized else sum(powers)
    return {e: powers[e] / whole for e in best}


def routed(network: Network, ids_NL: torch.Tensor, layer: int = 0) -> torch.Tensor:
    """What the experts of a block get, token by token, [N * L, D]."""
    seen = []
    hook = network.module(f"layers.{layer}.ffn").router.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    with torch.no_grad():
        network.hidden(ids_NL)
    hook.remove()
    return torch.cat(seen).flatten(0, 1)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("shared", [0, 24])
def test_routing_against_a_loop_over_tokens(normalized, shared):
    torch.manual_seed(0)
    experts = Experts((0,), count=5, active=2, channels=12, normalized=normalized, shared=shared)
    decoder = Decoder(1, 16, 2, 1, 8, 32, 50, 64, 1e-5, (), 1.0, True, experts=experts)
    module, x_BLD = Mixture(decoder, 0, experts), torch.randn(2, 7, 16)
    with torch.no_grad():
        found_BLD = module.inner(x_BLD, Context({}))
        for x_D, found_D in zip(x_BLD.flatten(0, 1), found_BLD.flatten(0, 1), strict=True):
            wanted_D = sum(p * given(module.experts[e], x_D) for e, p in chosen(module, x_D).items())
            if shared:
                wanted_D = wanted_D + torch.sigmoid(module.shared.router.weight[0] @ x_D) * given(module.shared, x_D)
            torch.testing.assert_close(found_D, wanted_D, rtol=1e-4, atol=1e-5)


def test_which_blocks_have_experts_is_data(folders):  # noqa: F811
    for name, layers, shared in (("mixtral", (0, 1, 2), 0), ("qwen2_moe", (0, 1), 80), ("qwen3_moe", (1,), 0)):
        decoder = load_teacher(folders[name]).network.decoder
        assert decoder.experts.layers == layers and decoder.experts.shared == shared
        for i in range(3):
            sites = decoder.sub_layers()[f"layers.{i}.ffn"]
            assert len(sites) == (4 + bool(shared) if i in layers else 1)
            assert [site.share for site in sites] == ([0.5] * 4 + [1.0] * bool(shared) if i in layers else [1.0])


def test_a_dropped_expert_gives_nothing_to_its_own_tokens_alone(mixed, windows):
    module, x_TD = mixed.module("layers.0.ffn"), routed(mixed, windows[:1])
    with torch.no_grad():
        whole_TD = module.inner(x_TD[None], Context({}))[0]
        mixed.install(mixed.sites[expert(1)], DROP, {})
        without_TD = module.inner(x_TD[None], Context({}))[0]
        for x_D, whole_D, without_D in zip(x_TD, whole_TD, without_TD, strict=True):
            weight = chosen(module, x_D).get(1, 0.0)
            torch.testing.assert_close(
                whole_D - without_D, weight * given(module.experts[1], x_D), rtol=1e-3, atol=1e-4
            )


def test_vectors_go_with_what_they_belong_to(mixed):
    decoder = mixed.decoder
    routers = {"layers.0.ffn.norm", "layers.0.ffn.router", f"{SHARED}.router"}
    shared_alone = {expert(e): DROP for e in range(4)}
    for changes, gone in (
        ({expert(0): DROP}, set()),
        ({SHARED: DROP}, {f"{SHARED}.router"}),
        (shared_alone, set()),
        ({**shared_alone, SHARED: DROP}, routers),
    ):
        assert decoder.vectors().keys() - set(decoder.vectors_of(changed(decoder, changes))) == gone


@pytest.mark.parametrize(
    "changes",
    [{}, {SHARED: DROP}, {expert(e): DROP for e in range(4)}, {expert(0): DROP, expert(2): Action(32, "int8")}],
    ids=["whole", "no shared one", "the shared one alone", "some"],
)
@pytest.mark.parametrize("format", ["fp32", "int8", "w4"])
def test_what_is_deployed_is_what_torch_computes(mixed, windows, bank, tmp_path, changes, format):
    """Without rounding sharply; with it, every expert reads the tokens that reach it with a scale of their own."""
    experts = {
        s.name: Action(s.units, format) for s in mixed.decoder.sites() if "experts" in s.name or "shared" in s.name
    }
    plan = changed(mixed.decoder, experts | changes)
    student = bank.realize(plan)
    export_onnx(student, tmp_path)
    assert read_student(tmp_path, mixed.decoder, plan).vectors.keys() == student.vectors.keys()
    for rounding, tolerance in (("none", 1e-5), ("all", 5e-3)):
        wanted = loaded(mixed, student, rounding).window_logits(windows[20].numpy()).numpy()
        with OnnxDecoder(tmp_path, threads=1, exact=rounding == "none") as model:
            found = model.logits(windows[20].numpy())
            tokens = [model.logits(windows[20, :1].numpy())[0], found[0]]
        # a rounded token may go to another expert: then it is another
        assert np.median([error(*pair) for pair in zip(found, wanted, strict=True)]) < tolerance
        assert rounding == "all" or (error(found, wanted) < tolerance and error(*tokens) < tolerance)


def test_windows_that_run_together_are_rounded_as_if_each_ran_alone(mixed, windows, bank):
    formats = {site.name: Action(site.units, "int8") for site in mixed.decoder.sub_layers()["layers.1.ffn"]}
    student = loaded(mixed, bank.realize(changed(mixed.decoder, formats)), "dynamic")
    with torch.no_grad():
        together = student.model(windows[:5])
        alone = torch.cat([student.model(ids_L[None]) for ids_L in windows[:5]])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_statistics_are_of_the_tokens_that_reach_an_expert(mixed, windows, bank):
    statistics, x_TD = bank.statistics(), routed(mixed, windows[:8])
    module = mixed.module("layers.0.ffn")
    for e in range(4):
        reached_TD = torch.stack([x_D for x_D in x_TD if e in chosen(module, x_D)])
        moment = reached_TD.T @ reached_TD / len(reached_TD)
        torch.testing.assert_close(statistics.second_moment(f"{expert(e)}.in"), moment, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        statistics.second_moment(f"{SHARED}.in"), x_TD.T @ x_TD / len(x_TD), rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(("way", "factor"), [("fisher", 3), ("noise", 6)])
def test_sensitivities_of_experts_predict_single_changes(mixed, windows, bank, way, factor):
    """Predicted against the real KL, for every expert alone: the right order of magnitude."""
    sites = [site for site in mixed.decoder.sites() if site.kind == "ffn"]
    menu = {site.name: (Action(site.units, "w2"), Action(site.units // 2, "fp32"), DROP) for site in sites}
    executor = Executor(bank, windows[:8])
    predicted = sensitivities(bank, menu, alphas=noise_coefficients(executor) if way == "noise" else None)
    real = {n: [executor.score(changed(mixed.decoder, {n: action})).kl for action in menu[n]] for n in menu}
    gaps = np.log([predicted[name] for name in menu]) - np.log([real[name] for name in menu])
    assert abs(np.median(gaps)) < np.log(factor)
    apart = [np.median(gaps[[part in name for name in menu]]) for part in ("experts", "shared", "2.ffn")]
    assert max(apart) - min(apart) < np.log(factor)  # experts are not weighed otherwise than what all tokens reach


def test_an_expert_that_no_token_reaches_is_still_a_variant(mixed, windows, tmp_path):
    for layer in range(2):
        router = mixed.module(f"layers.{layer}.ffn").router.weight
        mixed.module(f"layers.{layer}.ffn").active = 1
        router[2:] = router[:2].mean(0)  # never the greatest of all
    unused, bank = mixed.sites[expert(3)], Bank(tmp_path, mixed, windows[:4], windows[:2])
    assert float(bank.statistics().second_moment(f"{expert(3)}.in").abs().max()) == 0
    actions = (Action(64, "int8"), Action(48, "w2"), Action(32, "w4"), DROP)
    assert not sensitivities(bank, {expert(3): actions})[expert(3)].any()
    for action in actions:
        for weight in bank.variant(unused, action).values():
            assert torch.isfinite(weight.dequantize()).all() and weight.dequantize().any()
    plan = changed(mixed.decoder, {expert(3): Action(48, "w2"), expert(1): Action(32, "w4")})
    student = reconstruct(bank, plan, windows[:4])
    assert all(torch.isfinite(weight.dequantize()).all() for weight in student.matrices.values())
    for name in bank.variant(unused, plan[expert(3)]):
        assert torch.equal(student.matrices[name].dequantize(), bank.realize(plan).matrices[name].dequantize())


@pytest.mark.parametrize("changes", [{}, {expert(0): DROP, expert(1, 1): Action(32, "int8")}], ids=["bits", "dropped"])
def test_a_reconstructed_mixture_comes_closer(mixed, windows, bank, changes):
    plan, reference = changed(mixed.decoder, changes, "w2"), Reference(mixed, windows[16:])
    kls = [reference.kl(loaded(mixed, made)) for made in (bank.realize(plan), reconstruct(bank, plan, windows[:16]))]
    assert kls[1] < 0.95 * kls[0]


def test_the_stream_knows_what_an_expert_reads_and_adds(mixed, windows):
    stream, site = mixed.stream(windows[:6]), mixed.sites[expert(2)]
    dense = {matrix.name: mixed.matrix(matrix.name).data for matrix in site.matrices}
    mixed.install(site, Action(64, "int8"), as_floats(dense))
    stream.advance()
    whole_NLD, module = stream.read()["in"], mixed.module("layers.0.ffn")
    for windows_, weight_BL, x_TI in stream.inputs(site, f"{site.name}.in"):
        x_BLD = whole_NLD[windows_]
        wanted_BL = torch.tensor([[chosen(module, x_D).get(2, 0.0) for x_D in x_LD] for x_LD in x_BLD])
        torch.testing.assert_close(weight_BL, wanted_BL, rtol=1e-4, atol=1e-6)
        rounded = [fake_dynamic_int8(x_LD[w_L != 0][None])[0] for x_LD, w_L in zip(x_BLD, wanted_BL, strict=True)]
        torch.testing.assert_close(x_TI, torch.cat(rounded))
        without_BLD = stream.without(site, windows_)
        assert not module.experts[2].dropped
        with torch.no_grad():
            given_BLD = stream.hidden_NLD[windows_] + module.inner(x_BLD, Context({})) - without_BLD
        assert not given_BLD[weight_BL == 0].abs().gt(1e-5).any() and given_BLD[weight_BL != 0].any()


def test_an_expert_takes_its_share_of_the_time(stacks):  # noqa: F811
    decoder = Decoder(
        1, 32, 2, 1, 16, 64, 50, 64, 1e-5, (), 1.0, True, experts=Experts((0,), 8, 2, 64, normalized=True, shared=64)
    )
    one, shared = decoder.sites()[2], decoder.sites()[-1]
    dense = replace(decoder, experts=None).sites()[2]
    action = Action(64, "fp32")
    assert (one.share, one.reached(64), one.reached(2), shared.reached(64)) == (0.25, 16, 1, 64)
    assert entry_key(one, action) == entry_key(dense, action).replace(" fp32", " 0.25 fp32")
    assert entry_key(shared, action) == entry_key(dense, action)
    ours, theirs = (measure_entry(site, action, stacks, lambda: None) for site in (one, dense))
    assert ours["prefill"] == pytest.approx(theirs["prefill"])
    assert ours["decode"] == pytest.approx(0.25 * theirs["decode"])
    calls = site_stack(decoder, one, action, 2, prefill_tokens=64, context=5, threads=1)
    assert calls.prefill()[0].shape() == [1, 16, 32] and calls.decode()[0].shape() == [1, 1, 32]
    calls.close()


def test_a_model_with_random_weights_has_the_size_of_the_plan(mixed, bank, tmp_path):
    plan = changed(mixed.decoder, {expert(1): DROP, expert(2): Action(32, "w4"), SHARED: Action(40, "int8")})
    export_random(mixed.decoder, plan, tmp_path / "random")
    export_onnx(bank.realize(plan), tmp_path / "student")
    assert exported_bytes(tmp_path / "random") == exported_bytes(tmp_path / "student")
    with OnnxDecoder(tmp_path / "random", threads=1) as model:
        assert np.isfinite(model.logits(np.arange(20))).all()


def test_a_whole_run(folders, tmp_path):  # noqa: F811
    wanted = recipe(
        folders["qwen2_moe"],
        budget={"bytes": "40%", "decode": "5x"},
        search={
            "formats": ["int8", "w8", "w4"],
            "policy": "actor_critic",
            "rivals": ["uniform", "dynamic_programming"],
        },
    )
    assert [line.name for line in dry_run(wanted).sites][2:4] == [expert(0), expert(1)]
    report = pipeline.compress(wanted, tmp_path)
    assert report.parity.passed and report.budget[0].fits
    teacher, fp32, _, student = report.rows
    assert fp32.kl < 1e-4 < student.kl and fp32.perplexity == pytest.approx(teacher.perplexity, rel=1e-3)
    assert sum(entry.site.startswith("layers.0.ffn.experts.") for entry in report.plan) == 4
    assert expert(3) in (tmp_path / "report.md").read_text()
