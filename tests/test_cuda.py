"""On a GPU what the other tests do on the CPU: the same numbers, a whole run, every family and format; skipped without."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch

from compressor import actions, pipeline
from compressor.bank import Bank
from compressor.executor import Executor
from compressor.export import OnnxDecoder, export_onnx, refused_formats
from compressor.model import load_teacher
from compressor.network import loaded
from compressor.plan import Action
from compressor.recipe import Recipe
from compressor.recovery.distill import Imitation, Settings, distill
from compressor.recovery.reconstruct import reconstruct
from compressor.sensitivity import noise_coefficients, sensitivities
from tests.test_export import FORMATS
from tests.test_families import error, families, folders, half_plan, mixed_plan  # noqa: F401
from tests.test_pipeline import recipe

HAS_CUDA = torch.cuda.is_available() and "CUDAExecutionProvider" in ort.get_available_providers()
pytestmark = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU, a CUDA build of torch and onnxruntime-gpu")


@pytest.fixture
def banks(tiny_folder, windows, tmp_path) -> list[Bank]:
    """Of the same teacher, on the CPU and on the GPU."""
    return [
        Bank(tmp_path / device, load_teacher(tiny_folder).network.to(device), windows[:8], windows[:4])
        for device in ("cpu", "cuda")
    ]


def test_variants_are_those_of_the_cpu(banks):
    for name in ("embedding", "layers.1.attention", "layers.1.ffn"):
        site = banks[0].teacher.sites[name]
        for format in ("fp32", "int8", "w4", "w2b64"):
            for keep in {site.units, max(1, site.units // 2)}:
                ours, theirs = (bank.variant(site, Action(keep, format)) for bank in banks)
                for matrix, weight in ours.items():
                    assert theirs[matrix].dequantize().device.type == "cuda"
                    same = weight.codes == theirs[matrix].codes.cpu() if weight.codes is not None else None
                    assert same is None or same.float().mean() > 0.99, (name, format, keep)
                    distance = error(theirs[matrix].to("cpu").dequantize().numpy(), weight.dequantize().numpy())
                    assert distance < (1e-3 if format == "fp32" else 0.05), (name, format, keep, distance)


def test_sensitivities_and_scores_are_those_of_the_cpu(banks, tiny_folder, windows):
    search = recipe(tiny_folder, search={"formats": ["fp32", "int8", "w4"]}).search
    menu = actions.menu(search, banks[0].teacher.decoder.sites())
    ours, theirs = (sensitivities(bank, menu) for bank in banks)
    for name, values in ours.items():
        assert theirs[name] == pytest.approx(values, rel=0.1, abs=1e-4), name
    executors = [Executor(bank, windows[8:16]) for bank in banks]
    plan = mixed_plan(banks[0].teacher.decoder)
    assert executors[1].score(plan).kl == pytest.approx(executors[0].score(plan).kl, rel=0.05)
    ours, theirs = (noise_coefficients(executor) for executor in executors)
    assert list(theirs.values()) == pytest.approx(list(ours.values()), rel=0.05)


@pytest.mark.parametrize("train", ["scales", "weights", "lora"])
def test_recovery(banks, windows, tmp_path, train):
    network, bank = banks[1].teacher, banks[1]
    rebuilt = reconstruct(bank, mixed_plan(network.decoder), windows[:8])
    settings = Settings(steps=4, warmup=0, check_every=2, train=train, learning_rate=1e-3, precision="bf16")

    def train_in(folder):
        return distill(
            network, rebuilt, lambda copy: Imitation(network, copy, windows[16:20]), windows[20:], settings, folder
        )

    student, curve = train_in(tmp_path / "part")
    assert curve.kl <= curve.held_out[0][1]
    assert {weight.dequantize().device.type for weight in student.matrices.values()} == {"cpu"}
    again, _ = train_in(tmp_path / "part")  # finished: read back
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in student.tensors().items())


@pytest.mark.parametrize("method", ["kd", "on_policy", "rl"])
def test_a_whole_run(tiny_folder, tmp_path, method):
    data = recipe(
        tiny_folder,
        target={"device": "auto", "threads": None},
        budget={"bytes": "45%", "prefill": "1.5x"},
        distill={"method": method, "rollouts": {"prompt_tokens": 8, "new_tokens": 8}},
    ).to_dict()
    del data["search"]["formats"]
    report = pipeline.compress(Recipe.from_dict(data), tmp_path)
    assert report.environment.provider == "CUDAExecutionProvider"
    assert report.parity.passed and report.parity.rounding < 0.05
    assert report.budget[0].fits and "int8" not in report.recipe["search"]["formats"]
    teacher, fp32, _, student = report.rows
    assert fp32.kl < 1e-3 and student.kl < 5 and fp32.perplexity == pytest.approx(teacher.perplexity, rel=1e-2)
    assert all(row.prefill_ms.median > 0 and row.decode_ms.median > 0 for row in report.rows)


@pytest.mark.parametrize("kind", ["ffn", "embedding"])
def test_formats_run_or_are_refused(kind):
    refused = refused_formats(kind, FORMATS, "cuda", "float16")
    print(kind, refused)
    assert not {"fp32", "fp16", "w8", "w4", "w4b64", "w4b128"} & refused.keys() and "int8" in refused
    assert refused_formats("attention", ("fp32",), "cuda", "float32").keys() == {"fp32"}


@families
def test_families(folders, name, windows, tmp_path):  # noqa: F811
    network = load_teacher(folders[name]).network.to("cuda")
    made = Bank(tmp_path / "bank", network, windows[:8], windows[:2]).realize(half_plan(network.decoder))
    made = replace(made, decoder=replace(made.decoder, precision="float16"))
    export_onnx(made, tmp_path)
    ids_L = windows[20, :40]
    with torch.no_grad():
        wanted = loaded(network, made, "none").model(ids_L[None].cuda())[0].cpu().numpy()
    with OnnxDecoder(tmp_path, "cuda") as decoder:
        assert decoder.provider == "CUDAExecutionProvider"
        whole, (first, cache) = decoder.logits(ids_L.numpy()), decoder.prefill(ids_L[:30].numpy())
        parts = [*first]
        for token in ids_L[30:].tolist():
            logits_V, cache = decoder.step(token, cache)
            parts.append(logits_V)
    assert error(whole, wanted) < 0.02 and error(np.stack(parts), wanted) < 0.02
