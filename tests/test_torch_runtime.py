"""Students in torch with bitsandbytes: the same numbers as plain arithmetic, the same folder back, a whole run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers

import compressor
from compressor import actions, pipeline
from compressor.bank import Bank
from compressor.errors import BankError, RecipeError, RuntimeTargetError
from compressor.folder import save_folder
from compressor.model import load_teacher
from compressor.network import loaded
from compressor.plan import DROP, Action, Format, Plan
from compressor.quantize import CODEBOOKS, Hessian, damped, fake_row_int8, quantize
from compressor.runtimes import runtime, runtime_of
from compressor.student import full_plan
from compressor.torch_runtime import TorchDecoder, linear
from tests.test_encoders import folders as encoder_folders  # noqa: F401
from tests.test_families import error, families, folders, spread  # noqa: F401
from tests.test_pipeline import recipe

pytest.importorskip("bitsandbytes")
both = pytest.mark.parametrize("name", CODEBOOKS)


@both
def test_the_values_are_those_of_bitsandbytes(name):
    from bitsandbytes.functional import quantize_4bit

    w_OI = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(w_OI, blocksize=64, quant_type=name)
    assert torch.equal(torch.tensor(CODEBOOKS[name]), state.code)
    # with its scales, which are the largest of a block, every weight has the code that it gives, or one as near
    ours = quantize(w_OI, Format.parse(name))
    grid = replace(ours.grid, scales=state.absmax.view(96, 2))
    assert (grid.codes(w_OI).view(-1, 2) == torch.cat([codes >> 4, codes & 15], 1)).float().mean() > 0.999
    x_TI = torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
    made = linear(ours, "float32", "cpu")
    assert error(made(x_TI).numpy(), (x_TI @ ours.dequantize().T).numpy()) < 5e-3  # it multiplies in lower precision
    assert error(grid.nearest(w_OI).numpy(), w_OI.numpy()) > error(ours.dequantize().numpy(), w_OI.numpy())


@both
def test_gptq_serves_codebooks(name):
    random = torch.Generator().manual_seed(0)
    x_TI = torch.randn(512, 128, generator=random) @ torch.randn(128, 128, generator=random)
    w_OI, hessian = torch.randn(96, 128, generator=random), Hessian(damped(x_TI.T @ x_TI / 512, 0.01))
    losses = []
    for made in (quantize(w_OI, Format.parse(name)), quantize(w_OI, Format.parse(name), hessian)):
        delta = made.dequantize() - w_OI
        losses.append(float((delta @ hessian.moment_II * delta).sum()))
        assert torch.equal(made.grid.nearest(made.dequantize()), made.dequantize())
    assert losses[1] < 0.7 * losses[0]


def test_rows_are_rounded_as_bitsandbytes_does():
    random = torch.Generator().manual_seed(0)
    w_OI, x_TI = torch.randn(96, 80, generator=random), torch.randn(7, 80, generator=random)
    x_TI[3] *= 50  # a row of its own scale
    ours = quantize(w_OI, Format.parse("int8row"))
    found_TO = linear(ours, "float32", "cpu")(x_TI)
    assert error(found_TO.numpy(), (fake_row_int8(x_TI) @ ours.dequantize().T).numpy()) < 1e-6
    assert 4e-3 < error(found_TO.numpy(), (x_TI @ ours.dequantize().T).numpy()) < 2e-2
    x_TI.requires_grad_()
    fake_row_int8(x_TI).sum().backward()
    assert torch.equal(x_TI.grad, torch.ones_like(x_TI))


def mixed(decoder) -> Plan:
    actions = {
        "embedding": Action(1, "fp16"),
        "layers.0.attention": Action(max(1, decoder.kv_heads // 2), "fp32"),
        "layers.0.ffn": Action(64, "nf4"),
        "layers.1.attention": DROP,
        "layers.1.ffn": Action(decoder.channels, "int8row"),
        "layers.2.attention": Action(decoder.kv_heads, "nf4+fp16"),
        "layers.2.ffn": DROP,
        "head": Action(1, "fp32"),
    }
    return spread(
        decoder, actions, [DROP, Action(64, "nf4"), Action(32, "fp32"), Action(64, "fp4"), Action(80, "fp16")]
    )


def saved(folder, teacher, student):
    save_folder(student, teacher, folder, "torch")
    back = runtime_of(folder).read_student(folder, teacher.network.decoder, student.plan)
    assert back.decoder == student.decoder and back.vectors.keys() == student.vectors.keys()
    for name, weight in student.matrices.items():
        torch.testing.assert_close(back.matrices[name].dequantize(), weight.dequantize(), rtol=1e-6, atol=0, msg=name)
    assert all(torch.equal(vector, back.vectors[name]) for name, vector in student.vectors.items())
    sites = student.decoder.sites()
    promised = runtime("torch").fixed_bytes(student.decoder) + sum(s.size_bytes(student.plan[s.name]) for s in sites)
    assert runtime("torch").exported_bytes(folder) <= promised


@families
def test_every_family(folders, name, windows, tmp_path):  # noqa: F811
    precision = "float16" if name in ("llama-biased", "gpt2") else "float32"
    teacher = load_teacher(folders[name], precision=precision)
    student = Bank(tmp_path / "bank", teacher.network, windows[:8], windows[:2]).realize(mixed(teacher.network.decoder))
    saved(tmp_path / "out", teacher, student)
    ids_L = windows[20, :40]
    plain = loaded(teacher.network, student, "none")
    wanted = plain.window_logits(ids_L.numpy()).numpy()
    with TorchDecoder(tmp_path / "out", exact=True) as model:
        assert error(model.logits(ids_L.numpy()), wanted) < (1e-5 if precision == "float32" else 1e-3)  # rounded biases
        assert model.generate(ids_L[:12].numpy(), 8) == plain.greedy(ids_L[:12], 8)
    rounded = loaded(teacher.network, student).window_logits(ids_L.numpy()).numpy()
    with TorchDecoder(tmp_path / "out") as model:
        assert error(model.logits(ids_L.numpy()), rounded) < 0.02 and model.writes
    with torch.no_grad():
        # biases that are rounded to float16 flip some codes
        limit = 1e-5 if precision == "float32" else 0.01
        assert error(compressor.load(tmp_path / "out")(ids_L[None])[0].numpy(), rounded) < limit


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_masked_language_models(encoder_folders, name, tmp_path):  # noqa: F811
    teacher = load_teacher(encoder_folders[name])
    window = torch.arange(64)[None]
    student = Bank(tmp_path / "bank", teacher.network, window, window).realize(mixed(teacher.network.decoder))
    saved(tmp_path / "out", teacher, student)
    with TorchDecoder(tmp_path / "out") as model:
        wanted = loaded(teacher.network, student).window_logits(window[0].numpy()).numpy()
        assert error(model.logits(window[0].numpy()), wanted) < 0.02 and not model.writes


@pytest.mark.parametrize("name", [*CODEBOOKS, "int8row"])
def test_transformers_reads_a_folder_without_pruning(tiny_folder, name, windows, tmp_path):
    teacher = load_teacher(tiny_folder)
    plan = full_plan(teacher.network.decoder, name, "fp32")
    student = Bank(tmp_path / "bank", teacher.network, windows[:8], windows[:2]).realize(plan)
    saved(tmp_path / "out", teacher, student)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(model.model.layers[0].mlp.up_proj).__name__ == ("Linear8bitLt" if name == "int8row" else "Linear4bit")
    with torch.no_grad():
        theirs = model(windows[20:21, :40]).logits[0].float().numpy()
    with TorchDecoder(tmp_path / "out") as ours:
        # Linear8bitLt reads float16, in which codes at the edge flip; with AVX512-BF16 Linear4bit computes in bfloat16
        assert error(ours.logits(windows[20, :40].numpy()), theirs) < (0.1 if name == "int8row" else 0.03)


def test_a_whole_run(tiny_folder, tmp_path):
    data = recipe(
        tiny_folder, target={"runtime": "torch"}, budget={"bytes": "35%"}, search={"embedding_formats": ["fp16"]}
    ).to_dict()
    del data["search"]["formats"]
    report = pipeline.compress(compressor.Recipe.from_dict(data), tmp_path)
    assert report.recipe["search"]["formats"] == ["fp32", "nf4", "fp4", "int8row"]
    assert report.environment.provider == "torch on cpu" and report.parity.passed and report.budget[0].fits
    assert report.budget[0].measured == (tmp_path / "torch" / "model.safetensors").stat().st_size
    teacher, fp32, _, student = report.rows
    assert fp32.kl < 1e-6 < student.kl and fp32.perplexity == pytest.approx(teacher.perplexity, rel=1e-4)
    assert all(row.decode_ms.median > 0 and row.peak_memory_bytes != 0 for row in report.rows)
    ids = np.arange(40)
    with torch.no_grad():
        loaded_again = compressor.load(tmp_path / "torch")(torch.from_numpy(ids)[None])[0].numpy()
    with TorchDecoder(tmp_path / "torch") as model:
        assert error(model.logits(ids), loaded_again) < 0.02


def test_formats_of_the_other_runtime_are_refused(tiny_folder, tmp_path):
    for name, formats, said in (
        ("torch", ["w4"], "w4 .ffn. on cpu.*fp32, fp16, nf4, fp4 and int8row"),
        ("onnx", ["nf4"], "no kernel"),
        ("onnx", ["int8row"], "no kernel"),
    ):
        wanted = recipe(tiny_folder, target={"runtime": name}, search={"formats": ["fp32", *formats]})
        with pytest.raises(RuntimeTargetError, match=said):
            pipeline.compress(wanted, tmp_path)
    wanted = recipe(tiny_folder, target={"runtime": "torch"}, search={"formats": ["nf4"], "embedding_formats": ["nf4"]})
    with pytest.raises(RuntimeTargetError, match="no kernel that looks up rows"):
        pipeline.compress(wanted, tmp_path)


def test_widths_that_blocks_do_not_divide_are_not_offered(tiny_folder):
    search = recipe(tiny_folder, search={"formats": ["fp32", "nf4"], "ffn_keep": [1.0, 0.75, 0.5]}).search
    sites = load_teacher(tiny_folder).network.decoder.sites()
    menu = actions.menu(search, sites)
    assert {str(a) for a in menu["layers.0.ffn"]} == {"128:fp32", "96:fp32", "64:fp32", "128:nf4", "64:nf4"}
    alone = recipe(tiny_folder, search={"formats": ["nf4"], "ffn_keep": [0.75], "ffn_multiple": 32}).search
    with pytest.raises(RecipeError, match="search.formats = nf4: none suits layers.0.ffn, whose matrices are"):
        actions.menu(alone, sites)
    assert {str(a) for a in menu["layers.0.attention"]} == {"2:fp32", "1:fp32", "2:nf4", "dropped"}
    with pytest.raises(RuntimeTargetError, match="in blocks of 64, a matrix reads 96 channels"):
        linear(quantize(torch.ones(8, 96), Format.parse("nf4")), "float32", "cpu")


def test_damaged_folders_are_refused(tiny_folder, windows, tmp_path):
    teacher = load_teacher(tiny_folder)
    plan = full_plan(teacher.network.decoder, "nf4", "fp32")
    save_folder(
        Bank(tmp_path / "bank", teacher.network, windows[:8], windows[:2]).realize(plan), teacher, tmp_path, "torch"
    )
    data = (tmp_path / "model.safetensors").read_bytes()
    for damage in (data[:-50], b"", data[:8] + b"x" + data[9:]):
        (tmp_path / "model.safetensors").write_bytes(damage)
        with pytest.raises(BankError, match=r"model.safetensors cannot be read"):
            compressor.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    other = full_plan(teacher.network.decoder, "fp32", "fp32")
    with pytest.raises(BankError, match="does not hold what its plan says"):
        runtime_of(tmp_path).read_student(tmp_path, teacher.network.decoder, other)
