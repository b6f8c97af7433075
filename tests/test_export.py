"""The exported graph against a plain decoder in torch, written here; files against what they promise."""

from __future__ import annotations

import gc
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import transformers

from compressor.errors import BankError, RuntimeTargetError
from compressor.export import (
    OnnxDecoder,
    export_onnx,
    export_random,
    exported_bytes,
    fixed_bytes,
    fp32_bytes,
    layout,
    open_session,
    read_student,
    refused_formats,
    runtime,
    site_stack,
)
from compressor.export.graph import KEEP
from compressor.export.runtime import check_placement, check_provider
from compressor.folder import save_folder
from compressor.model import load_teacher
from compressor.plan import ALIGNMENT, DROP, Action, Format, Formats, Plan
from compressor.quantize import Weight, fake_dynamic_int8, round_to_nearest, store_float
from compressor.student import Decoder, Student
from eval.memory import peak_growth_bytes

TABLES = ("fp32", "fp16", "w8", "w6", "w4", "w4b64", "w4b128", "w3", "w2")
ROUNDED = ("int8", "w4a8", "w4a8b64+int8")
FORMATS = (*TABLES, *ROUNDED, "w4b64+w8", "w2+w4", "w3+w5", "fp32+w8")
SPLIT = ("w4a8+w6", "w3+int8")
"""Of feed-forwards alone."""


def tiny(tied: bool = True, layers: int = 3, hidden: int = 96) -> Decoder:
    frequencies = tuple(float(10000.0 ** (-i / 8)) for i in range(8))
    return Decoder(layers, hidden, 6, 2, 16, 80, 130, 64, 1e-5, frequencies, 1.2, tied)


def uniform(decoder: Decoder, name: str, table: str | None = None) -> Plan:
    """One format everywhere, int8 in attentions that cannot have it."""
    table = table or (name if name in TABLES else "w8")
    formats = {"embedding": table, "head": table, "attention": "int8" if name in SPLIT else name, "ffn": name}
    return Plan(tuple((s.name, Action(s.units, formats[s.kind])) for s in decoder.sites()))


def drawn(decoder: Decoder, seed: int, formats: tuple[str, ...] = FORMATS) -> Plan:
    rng, actions = random.Random(seed), []
    for site in decoder.sites():
        if site.layer is None:
            actions.append((site.name, Action(1, rng.choice([name for name in formats if name in TABLES]))))
        elif rng.random() < 0.2:
            actions.append((site.name, DROP))
        else:
            possible = (*formats, *SPLIT) if formats is FORMATS and site.kind == "ffn" else formats
            actions.append((site.name, Action(rng.randint(1, site.units), rng.choice(possible))))
    return Plan(tuple(actions))


def student(decoder: Decoder, plan: Plan, seed: int = 0) -> Student:
    generator = torch.Generator().manual_seed(seed)
    matrices: dict[str, Weight] = {}
    vectors = {"norm": 1 + 0.1 * torch.randn(decoder.hidden, generator=generator)}
    for site in decoder.sites():
        action = plan[site.name]
        if action.keep == 0:
            continue
        if site.layer is not None:
            vectors[f"{site.name}.norm"] = 1 + 0.1 * torch.randn(decoder.hidden, generator=generator)
        for matrix, format in site.stored(action):
            rows, columns = matrix.shape(action.keep, site.units)
            w_OI = torch.randn(rows, columns, generator=generator) / columns**0.5
            store = store_float if format.kind == "float" else round_to_nearest
            matrices[matrix.name] = store(w_OI, format)
    return Student(decoder, plan, matrices, vectors)


def reference(student: Student, ids: list[int]) -> np.ndarray:
    """Logits [S, V] of the dequantized weights, head by head; what int8's kernels read is quantized."""
    d, weights = student.decoder, {name: weight.dequantize() for name, weight in student.matrices.items()}

    def norm(x_SD, gain_D):
        return x_SD / (x_SD.square().mean(1, keepdim=True) + d.norm_epsilon).sqrt() * gain_D

    def turn(x_SD):
        """Every pair (x_i, x_i+D/2) as a complex number, turned by position times frequency."""
        real, imaginary = x_SD.double().chunk(2, 1)
        angles = torch.outer(torch.arange(len(x_SD)).double(), torch.tensor(d.rope_frequencies).double())
        turned = torch.complex(real, imaginary) * torch.polar(torch.full_like(angles, d.rope_scale), angles)
        return torch.cat([turned.real, turned.imag], 1).float()

    def attend(x_SD, name, action, see):
        q, k, v = ((x_SD @ weights[f"{name}.{part}"].T).split(d.head_dim, 1) for part in "qkv")
        heads = []
        for h in range(len(q)):
            group = h // (d.heads // d.kv_heads)
            scores = turn(q[h]) @ turn(k[group]).T / d.head_dim**0.5
            future = torch.ones_like(scores).triu(1).bool()
            heads.append(scores.masked_fill(future, -torch.inf).softmax(1) @ v[group])
        return see(torch.cat(heads, 1)) @ weights[f"{name}.o"].T

    x = weights["embedding"][ids]
    for site in d.sites():
        action = student.plan[site.name]
        if site.layer is None or action.keep == 0:
            continue
        formats = Formats.parse(action.format)
        see, see_last = (
            (lambda x: fake_dynamic_int8(x[None])[0]) if format.quantizes_input else (lambda x: x)
            for format in (formats.most, formats.finer if site.kind == "ffn" else formats.most)
        )
        y = see(norm(x, student.vectors[f"{site.name}.norm"]))
        if site.kind == "attention":
            x = x + attend(y, site.name, action, see)
        else:
            gate = y @ weights[f"{site.name}.gate"].T
            up = y @ weights[f"{site.name}.up"].T
            x = x + see_last(gate * torch.sigmoid(gate) * up) @ weights[f"{site.name}.down"].T
    return (norm(x, student.vectors["norm"]) @ weights["embedding" if d.tied else "head"].T).numpy()


def distance(got: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


IDS = [3, 129, 0, 77, 5, 5, 18, 64, 2, 101, 40]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", (*FORMATS, *SPLIT))
def test_every_format_matches_the_reference(name, tied, tmp_path):
    made = student(tiny(tied), uniform(tiny(tied), name))
    export_onnx(made, tmp_path)
    with OnnxDecoder(tmp_path, threads=1) as model:
        error = distance(model.logits(IDS), reference(made, IDS))
    # blockwise kernels quantize activations to int8 blocks; int8 activations round on either side of a tie
    assert error < (1e-5 if name in ("fp32", "fp16") else 3e-2), error


@pytest.mark.parametrize("seed", range(6))
def test_mixed_plans_match_the_reference(seed, tmp_path):
    decoder = tiny(tied=seed % 2 == 0)
    exact, rough = drawn(decoder, seed, ("fp32", "fp16")), drawn(decoder, seed + 100)
    for plan, tolerance in ((exact, 1e-5), (rough, 5e-2)):
        made = student(decoder, plan, seed)
        export_onnx(made, tmp_path)
        with OnnxDecoder(tmp_path, threads=1) as model:
            assert distance(model.logits(IDS), reference(made, IDS)) < tolerance, plan


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ROUNDED])
def test_half_precision(name, tied, tmp_path):
    """Near what float32 gives; and what is read back is, in float32, what was stored."""
    decoder, plan = tiny(tied), uniform(tiny(tied), name)
    half = replace(decoder, precision="float16")
    made = student(decoder, plan)
    export_onnx(replace(made, decoder=half), tmp_path)
    stored = read_student(tmp_path, decoder, plan)
    assert stored.decoder == half and {v.dtype for v in stored.vectors.values()} == {torch.float32}
    wanted = reference(stored, IDS)
    assert 0 < distance(wanted, reference(made, IDS)) < 2e-3  # what rounding norms and floats does
    with OnnxDecoder(tmp_path, threads=1, exact=True) as model:
        assert distance(model.logits(IDS), wanted) < 1e-5
    with OnnxDecoder(tmp_path, threads=1) as model:
        found, cache = model.prefill(IDS)
        assert found.dtype == np.float32 and distance(found, wanted) < (5e-3 if name in ("fp32", "fp16") else 3e-2)
        assert distance(model.step(7, cache)[0], model.logits([*IDS, 7])[-1]) < 3e-2
    size = exported_bytes(tmp_path)
    assert size <= fixed_bytes(half) + sum(site.size_bytes(plan[site.name]) for site in half.sites())


def test_without_attention_or_without_any_layer(tmp_path):
    decoder = tiny()
    for kinds in (("attention",), ("attention", "ffn")):
        plan = Plan(tuple((s.name, DROP if s.kind in kinds else Action(s.units, "fp32")) for s in decoder.sites()))
        made = student(decoder, plan)
        export_onnx(made, tmp_path)
        with OnnxDecoder(tmp_path, threads=1) as model:
            assert distance(model.logits(IDS), reference(made, IDS)) < 1e-5


# blockwise kernels take another path for a single row, which rounds its activations otherwise
@pytest.mark.parametrize(("formats", "tolerance"), [(("fp32", "fp16"), 1e-5), (("w4", "w8", "fp32"), 3e-2)])
@pytest.mark.parametrize("seed", range(2))
def test_prefill_and_steps_give_the_logits_of_the_whole(seed, formats, tolerance, tmp_path):
    decoder = tiny()
    export_onnx(student(decoder, drawn(decoder, seed, formats), seed), tmp_path)
    with OnnxDecoder(tmp_path, threads=1) as model:
        whole = model.logits(IDS)
        logits, cache = model.prefill(IDS[:4])
        parts = [*logits]
        for token in IDS[4:]:
            before = cache
            logits_V, cache = model.step(token, cache)
            parts.append(logits_V)
        assert cache.length == len(IDS)
        assert distance(np.stack(parts), whole) < tolerance
        assert np.array_equal(model.step(IDS[-1], before)[0], parts[-1]), "a step changed the cache it was given"


def test_caches_are_written_in_place_and_grow(tmp_path, monkeypatch):
    decoder = tiny()
    export_onnx(student(decoder, uniform(decoder, "fp32")), tmp_path)
    monkeypatch.setattr(runtime, "ROOM", 2)
    ids = np.random.default_rng(0).integers(0, decoder.vocabulary, 24)
    with OnnxDecoder(tmp_path, threads=1) as model:
        whole = model.logits(ids)
        logits, cache = model.prefill(ids[:4])
        memory, moved = next(iter(cache.values.values())).data_ptr(), []
        for token in ids[4:12]:
            logits, cache = model.step(token, cache)
            here = next(iter(cache.values.values())).data_ptr()
            moved.append(here != memory)
            memory = here
        assert moved == [False, False, True, False, False, False, True, False]
        assert distance(logits, whole[11]) < 1e-5
        logits, cache = model.extend(ids[12:], cache)  # many at once behind a cache
        assert cache.length == len(ids) and distance(logits, whole[12:]) < 1e-5


def test_texts_that_take_turns_keep_their_own_caches_and_logits(tmp_path):
    decoder = tiny()
    export_onnx(student(decoder, uniform(decoder, "fp32")), tmp_path)
    rng = np.random.default_rng(0)
    with OnnxDecoder(tmp_path, threads=1) as model:
        texts = [rng.integers(0, decoder.vocabulary, 12) for _ in range(2)]
        whole = [model.logits(ids) for ids in texts]
        caches = [model.prefill(ids[:4], keep=1)[1] for ids in texts]
        for place in (4, 6, 8):
            for number, ids in enumerate(texts):
                logits, _ = model.extend(ids[place : place + 2], caches[number], keep=1)
                assert distance(logits[0], whole[number][place + 1]) < 1e-5
                logits, caches[number] = model.extend(ids[place : place + 2], caches[number])
                assert distance(logits, whole[number][place : place + 2]) < 1e-5


def test_the_logits_of_the_last_tokens_alone_are_those_of_the_whole(tmp_path):
    decoder = tiny()
    export_onnx(student(decoder, uniform(decoder, "fp32")), tmp_path)
    with OnnxDecoder(tmp_path, threads=1) as model:
        whole, cache = model.prefill(IDS)
        for keep in (1, 3, len(IDS)):
            logits, shorter = model.prefill(IDS, keep)
            assert logits.shape[0] == keep and distance(logits, whole[-keep:]) < 1e-6
            assert distance(model.step(1, shorter)[0], model.step(1, cache)[0]) < 1e-6
        # runtimes that do not know this input need not feed it
        assert {value.name for value in model._session.get_inputs()} >= {"input_ids", "attention_mask"}
        assert KEEP not in {value.name for value in model._session.get_inputs()}


def test_generate_is_greedy_and_ends_at_eos(tmp_path):
    decoder = tiny()
    made = student(decoder, uniform(decoder, "fp32"))
    export_onnx(made, tmp_path)
    expected, ids = [], list(IDS)
    for _ in range(5):
        expected.append(int(reference(made, ids)[-1].argmax()))
        ids.append(expected[-1])
    with OnnxDecoder(tmp_path, threads=1) as model:
        assert model.generate(IDS, 5) == expected
        assert model.generate(IDS, 5, ends=[expected[0]]) == expected[:1]
        assert model.generate(IDS, 0) == []


def assert_same(ours: Student, theirs: Student) -> None:
    assert ours.matrices.keys() == theirs.matrices.keys() and ours.vectors.keys() == theirs.vectors.keys()
    for name, weight in ours.matrices.items():
        other = theirs.matrices[name]
        assert weight.format == other.format
        for part in ("values", "codes", "scales", "zeros"):
            a, b = getattr(weight, part), getattr(other, part)
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), (name, part)
    for name, vector in ours.vectors.items():
        assert torch.equal(vector, theirs.vectors[name])


@pytest.mark.parametrize("seed", range(8))
def test_round_trip_is_exact_and_size_is_as_promised(seed, tmp_path):
    decoder = tiny(tied=seed % 2 == 0, layers=2 + seed % 3)
    plan = uniform(decoder, FORMATS[seed]) if seed % 4 == 3 else drawn(decoder, seed)
    made = student(decoder, plan, seed)
    export_onnx(made, tmp_path)
    assert_same(made, read_student(tmp_path, decoder, plan))
    promised = fixed_bytes(decoder) + sum(site.size_bytes(plan[site.name]) for site in decoder.sites())
    assert exported_bytes(tmp_path) <= promised


@pytest.mark.parametrize("tied", [True, False])
def test_the_size_in_fp32_is_known_beforehand(tied, tmp_path):
    decoder = tiny(tied=tied)
    export_onnx(student(decoder, uniform(decoder, "fp32")), tmp_path)
    assert 0 <= fp32_bytes(decoder) / exported_bytes(tmp_path) - 1 < 0.002


@pytest.mark.parametrize("name", FORMATS)
def test_size_bound_is_tight_in_the_data_file(name, tmp_path):
    decoder = tiny(layers=2)
    plan = uniform(decoder, name)
    export_onnx(student(decoder, plan), tmp_path)
    sites = sum(site.size_bytes(plan[site.name]) for site in decoder.sites())
    norms = 5 * 4 * decoder.hidden
    data = (tmp_path / "model.onnx_data").stat().st_size
    # fused matrices share their padding, exact int8 needs no zero points
    zeros = sum(m.rows for s in decoder.sites() if s.layer is not None for m in s.matrices) if name == "int8" else 0
    assert sites + norms - 12 * 5 * ALIGNMENT - 2 * zeros <= data <= sites + norms + 5 * ALIGNMENT


def test_a_tied_table_is_stored_once(tmp_path):
    for name in ("fp32", "fp16", "w4"):
        sizes = []
        for tied in (True, False):
            decoder = tiny(tied, layers=1)
            export_onnx(student(decoder, uniform(decoder, name)), tmp_path)
            sizes.append(exported_bytes(tmp_path))
        table = sum(Format.parse(name).tensor_bytes(decoder.vocabulary, decoder.hidden))
        assert sizes[1] - sizes[0] >= table


@pytest.mark.parametrize("name", ROUNDED)
def test_unsigned_int8_is_the_same_grid(name, tmp_path, monkeypatch):
    """As on processors whose int8 products saturate."""
    decoder = tiny()
    plan = uniform(decoder, name)
    made = student(decoder, plan)
    export_onnx(made, tmp_path / "signed")
    monkeypatch.setattr(layout, "int8_products_are_exact", lambda: False)
    export_onnx(made, tmp_path / "unsigned")
    assert_same(made, read_student(tmp_path / "unsigned", decoder, plan))
    with OnnxDecoder(tmp_path / "unsigned", threads=1) as model:
        unsigned = model.logits(IDS)
    assert distance(unsigned, reference(made, IDS)) < 3e-2
    monkeypatch.undo()
    if layout.int8_products_are_exact():
        with OnnxDecoder(tmp_path / "signed", threads=1) as model:
            assert distance(unsigned, model.logits(IDS)) < 1e-5


@pytest.mark.parametrize("name", ["w4a8", "w4a8b64+int8"])
def test_codes_of_w4a8_are_made_when_a_session_is(name, tmp_path):
    """Nothing of it is left to a run, whether blocks divide the columns or not."""
    decoder = tiny()
    export_onnx(student(decoder, uniform(decoder, name)), tmp_path)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"])
    kinds = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert "DynamicQuantizeLinear" in kinds and not kinds & {"DequantizeLinear", "QuantizeLinear"}


def test_an_export_replaces_the_earlier_one_and_leaves_no_drafts(tmp_path):
    decoder = tiny()
    (tmp_path / "tokenizer.json").write_text("{}")
    for name in ("fp32", "w4"):
        export_onnx(student(decoder, uniform(decoder, name)), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx_data", "tokenizer.json"]


def test_damaged_or_foreign_files_are_refused(tmp_path):
    decoder = tiny()
    plan = uniform(decoder, "w4")
    with pytest.raises(BankError, match="missing"):
        read_student(tmp_path, decoder, plan)
    export_onnx(student(decoder, plan), tmp_path)
    with pytest.raises(BankError, match="the plan says w8"):
        read_student(tmp_path, decoder, uniform(decoder, "w8"))
    with pytest.raises(BankError, match="the plan says fp16"):
        export_onnx(student(decoder, uniform(decoder, "fp32")), tmp_path)
        read_student(tmp_path, decoder, uniform(decoder, "fp16"))
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    elsewhere = next(e for t in graph.graph.initializer for e in t.external_data if e.key == "location")
    elsewhere.value = "../secret"
    onnx.save(graph, tmp_path / "model.onnx")
    with pytest.raises(BankError, match=r"expected all weights in model.onnx_data, .* points to ../secret"):
        read_student(tmp_path, decoder, plan)
    export_onnx(student(decoder, plan), tmp_path)
    data = tmp_path / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(BankError, match="bytes, its graph says"):
        read_student(tmp_path, decoder, plan)


def test_the_wrong_provider_is_an_error(tmp_path):
    decoder = tiny()
    export_onnx(student(decoder, uniform(decoder, "fp32")), tmp_path)
    with pytest.raises(RuntimeTargetError, match="runs on CPUExecutionProvider; install"):
        check_provider(["CPUExecutionProvider"], "CUDAExecutionProvider")
    check_provider(["CUDAExecutionProvider", "CPUExecutionProvider"], "CUDAExecutionProvider")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        with pytest.raises(RuntimeTargetError, match=r"expected CUDAExecutionProvider.*set target.device: cpu"):
            OnnxDecoder(tmp_path, device="cuda")
    with pytest.raises(RuntimeTargetError, match="expected an exported model at"):
        OnnxDecoder(tmp_path / "nowhere")
    session = open_session(tmp_path / "model.onnx")
    with pytest.raises(RuntimeTargetError, match="CUDA.* has no kernel for FusedMatMul, GroupQueryAttention as this"):
        check_placement(session, "CUDAExecutionProvider")


def test_other_runtimes_find_the_names_that_they_look_for(tiny_folder, tmp_path):
    """transformers.js makes empty caches from the shapes in the graph, in which it knows only `batch_size`."""
    teacher = load_teacher(tiny_folder)
    decoder = teacher.network.decoder
    save_folder(student(decoder, uniform(decoder, "w8")), teacher, tmp_path)
    shapes = {value.name: value.shape for value in open_session(tmp_path / "model.onnx").get_inputs()}
    assert shapes.pop("input_ids")[0] == shapes.pop("attention_mask")[0] == "batch_size"
    assert shapes == {
        f"past_key_values.{i}.{part}": ["batch_size", decoder.kv_heads, "past", decoder.head_dim]
        for i in range(decoder.layers)
        for part in ("key", "value")
    }
    configuration = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert configuration["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert configuration["model_input_names"] == ["input_ids", "attention_mask"]
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("ab")["input_ids"] == teacher.tokenizer("ab")["input_ids"]


@pytest.mark.parametrize("seed", range(3))
def test_genai_reads_the_folder(seed, tiny_folder, tmp_path):
    """Caches of several widths, and none where an attention is gone."""
    genai = pytest.importorskip("onnxruntime_genai")
    teacher = load_teacher(tiny_folder)
    network = teacher.network
    plan = dict(drawn(network.decoder, seed, ("w8", "w6", "w5", "w4", "w4a8", "w3"))) | {
        "layers.0.attention": DROP,
        "layers.1.attention": Action(1, "w6"),
        "layers.2.attention": Action(2, "w3+w5"),
    }
    save_folder(student(network.decoder, Plan(tuple(plan.items())), seed), teacher, tmp_path)
    ids = [5, 90, 17, 33, 201]
    model = genai.Model(str(tmp_path))
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids) + 12)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    with OnnxDecoder(tmp_path) as decoder:
        assert list(generator.get_sequence(0)) == ids + decoder.generate(np.array(ids), 12)


def test_a_model_with_random_weights_has_the_shape_and_size_of_the_plan(tmp_path):
    decoder = tiny()
    plan = drawn(decoder, 3)
    export_random(decoder, plan, tmp_path / "random")
    export_onnx(student(decoder, plan), tmp_path / "student")
    assert exported_bytes(tmp_path / "random") == exported_bytes(tmp_path / "student")
    read_student(tmp_path / "random", decoder, plan)
    with OnnxDecoder(tmp_path / "random", threads=1) as model:
        assert model.logits(IDS).shape == (len(IDS), decoder.vocabulary)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_formats_without_a_kernel_are_found(precision, monkeypatch):
    dynamic = set(ROUNDED) if precision == "float16" else set()
    assert refused_formats("ffn", FORMATS, "cpu", precision).keys() == dynamic
    assert not refused_formats("embedding", ("fp32", "fp16", "w8", "w4b256", "w2"), "cpu", precision)

    def without_two_bits(model, *rest):
        if b"bits" in model and any(node.i == 2 for node in _attributes(model, "bits")):
            raise RuntimeTargetError("ONNX Runtime refused a graph in memory: no kernel\nmore")
        return open_session(model, *rest)

    monkeypatch.setattr(runtime, "open_session", without_two_bits)
    said = "ONNX Runtime refused a graph in memory: no kernel"
    assert refused_formats("embedding", ("w4", "w2b64"), "cpu", precision) == {"w2b64": said}


def _attributes(model: bytes, name: str) -> list[onnx.AttributeProto]:
    nodes = onnx.load_model_from_string(model).graph.node
    return [attribute for node in nodes for attribute in node.attribute if attribute.name == name]


def test_a_closed_decoder_says_so(tmp_path):
    decoder = tiny()
    export_onnx(student(decoder, uniform(decoder, "fp32")), tmp_path)
    with OnnxDecoder(tmp_path, threads=1) as model:
        calls = model.bench_callables(prefill_tokens=8, context=5)
        assert calls.prefill()[0].shape == (1, decoder.vocabulary)
        assert calls.decode()[1].length == calls.decode()[1].length == 6
    with pytest.raises(RuntimeTargetError, match="closed"):
        model.logits(IDS)


def test_a_closed_decoder_holds_no_weights(tmp_path):
    decoder = tiny()
    export_onnx(student(decoder, uniform(decoder, "fp32")), tmp_path)
    model = OnnxDecoder(tmp_path, threads=1)
    session = model._session._sess  # what has the weights; nothing says when it is freed but who refers to it
    model.close()
    gc.collect()
    assert sys.getrefcount(session) == 2


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FORMATS)
def test_stacks_run_for_every_kind_of_site(name, tied):
    decoder = tiny(tied)
    for site in decoder.sites():
        if site.layer == 0 or (site.layer is None and name in TABLES):
            calls = site_stack(decoder, site, Action(site.units, name), 2, prefill_tokens=8, context=5, threads=1)
            for call, length in ((calls.prefill, 8), (calls.decode, 1)):
                output = call()[0].numpy()
                has_logits = site.layer is None and (tied or site.kind == "head")
                assert output.shape[:2] == (1, 1 if has_logits else length) and np.isfinite(output).all()
            calls.close()


def export_wide(folder: str) -> None:
    """Random weights above 2 GB, in float32."""
    frequencies = tuple(float(10000.0 ** (-i / 64)) for i in range(64))
    wide = Decoder(9, 2048, 16, 16, 128, 8192, 32000, 64, 1e-5, frequencies, 1.0, tied=True)
    export_random(wide, uniform(wide, "fp32"), Path(folder))


@pytest.mark.slow
def test_a_model_above_2_gb_is_written_in_little_memory_and_loaded(tmp_path):
    """Protobuf ends at 2 GB, so the weights must lie outside the graph; they stream through memory one matrix at a time."""
    grown = peak_growth_bytes(export_wide, tmp_path)
    size = exported_bytes(tmp_path)
    assert size > 2**31 and grown < 0.5 * size
    with OnnxDecoder(tmp_path) as decoder:
        logits = decoder.logits(np.arange(8))
    assert logits.shape == (8, 32000) and np.isfinite(logits).all() and logits.std() > 0
