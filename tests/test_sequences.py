"""Encoder-decoders at a tiny size: the same numbers and texts as transformers, in torch and in ONNX, whole and compressed."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from typer.testing import CliRunner

import compressor
from compressor import pipeline
from compressor.bank import Bank
from compressor.cli import app
from compressor.errors import DataError, ModelError, RecipeError, RuntimeTargetError
from compressor.executor import Executor, Reference
from compressor.export import OnnxEncoderDecoder, export_onnx, exported_bytes, fixed_bytes, open_session
from compressor.export.graph import graph_files
from compressor.folder import save_folder
from compressor.model import load_teacher, read_decoder
from compressor.network import loaded
from compressor.plan import DROP, Action, Plan
from compressor.recipe import TextSource
from compressor.recovery.distill import Imitation, Settings, distill
from compressor.recovery.reconstruct import reconstruct
from compressor.student import full_plan
from compressor.text import Spans, load_tokens, plain, predictions
from tests.conftest import TEXT, check_golden
from tests.test_distill import check_whole_cache
from tests.test_families import error, write_model
from tests.test_pipeline import recipe

PAD, END, BEGIN, MASK = range(256, 260)
SENTINELS = list(range(260, 276))
T5 = {
    "vocab_size": 276,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "decoder_start_token_id": PAD,
}
GATED = T5 | {"feed_forward_proj": "gated-gelu"}
BART = {
    "vocab_size": 276,
    "d_model": 64,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 80,
    "max_position_embeddings": 128,
    "init_std": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": BEGIN,
    "eos_token_id": END,
    "decoder_start_token_id": END,
    "forced_eos_token_id": None,
}
CONFIGS = {
    "t5": ("T5Config", T5),
    "t5-gated": ("T5Config", GATED | {"tie_word_embeddings": False}),
    "mt5": ("MT5Config", GATED),
    "umt5": ("UMT5Config", GATED),
    "bart": ("BartConfig", BART),
    "bart-scaled": ("BartConfig", BART | {"scale_embedding": True, "activation_function": "relu"}),
    "pegasus": ("PegasusConfig", BART | {"scale_embedding": True}),
}
LAST_NORMS = tuple(f"decoder.{name}.weight" for name in ("final_layer_norm", "layers.1.final_layer_norm", "layer_norm"))
sequences = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model folder of every configuration."""
    made = {}
    for name, (config, changes) in CONFIGS.items():
        made[name] = tmp_path_factory.mktemp(name)
        write_model(transformers.AutoModelForSeq2SeqLM, getattr(transformers, config)(**changes), made[name])
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(made[name])
        for key, parameter in model.named_parameters():
            if key.endswith(LAST_NORMS):
                parameter.data = torch.randn_like(parameter)  # else a tied head says the same token again and again
            elif parameter.ndim == 2 and "t5" in name and "block" in key:
                parameter.data *= 2
        if name == "t5-gated":  # as of T5 1.1 and FLAN
            model.lm_head.weight = torch.nn.Parameter(torch.randn(276, 64))
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
        model.save_pretrained(made[name])
        tokenizer(name).save_pretrained(made[name])
    return made


def tokenizer(name: str) -> transformers.PreTrainedTokenizerFast:
    """A byte a token; with T5's sentinels, or with BART's mask."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "mask_token": "<mask>"}
    made.add_special_tokens(list(special.values()))
    ends = [("<s>", BEGIN), ("</s>", END)]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", None, ends)
    if "t5" in name:
        made.add_special_tokens([f"<extra_id_{i}>" for i in range(16)])
        made.post_processor = processors.TemplateProcessing("$A </s>", None, ends[1:])
        del special["mask_token"], special["bos_token"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Texts of many lengths with what is to be said of them, a JSON object a line; more of them in `others.jsonl` beside."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [line.strip() for line in (TEXT / "wiki-calibration.txt").read_text().splitlines() if len(line) > 40]
    rows = [{"text": line[: 10 + 7 * (i % 6)], "said": line[: 3 + i % 14]} for i, line in enumerate(lines[:80])]
    path.write_text("\n".join(map(json.dumps, rows[:60])))
    path.with_name("others.jsonl").write_text("\n".join(map(json.dumps, rows[60:])))
    return path


@pytest.fixture(scope="module")
def windows(folders, pairs) -> dict[str, torch.Tensor]:
    """Windows [24, 64] of pairs, padded on both sides, by configuration."""
    source = TextSource(file=str(pairs), target="said")
    return {
        name: load_tokens([source], transformers.AutoTokenizer.from_pretrained(folder), 24 * 64, 64, target_length=16)
        for name, folder in folders.items()
    }


class Theirs:
    """transformers' model of a folder."""

    def __init__(self, folder: Path):
        self.model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, attn_implementation="eager").eval()
        self.pad, self.start = self.model.config.pad_token_id, self.model.config.decoder_start_token_id

    @torch.no_grad()
    def logits(self, windows_BL: torch.Tensor) -> torch.Tensor:
        """Windows of a source of 48 tokens -> logits [B, 16, V]."""
        source_BS, said_BT = windows_BL[:, :48], plain(windows_BL[:, 48:])
        read_BT = torch.cat([torch.full_like(said_BT[:, :1], self.start), said_BT[:, :-1]], 1)
        seen_BS = (source_BS != self.pad).long()
        return self.model(input_ids=source_BS, attention_mask=seen_BS, decoder_input_ids=read_BT).logits

    def greedy(self, source_S: torch.Tensor, new_tokens: int) -> list[int]:
        return greedy(self.model, source_S, new_tokens)


def greedy(model, source_S: torch.Tensor, new_tokens: int) -> list[int]:
    """By `generate` of transformers' mixin."""
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "eos_token_id": None}
    seen = torch.ones_like(source_S[None])
    return model.generate(source_S[None], attention_mask=seen, do_sample=False, num_beams=1, **options)[0, 1:].tolist()


def source_of(window_L: torch.Tensor) -> torch.Tensor:
    """What an encoder reads of a window."""
    source_S = window_L[:48]
    return source_S[source_S != PAD]


def limit(decoder, plan: Plan) -> int:
    return fixed_bytes(decoder) + sum(site.size_bytes(plan[site.name]) for site in decoder.sites())


def mixed_plan(decoder) -> Plan:
    """Every kind of action in three blocks of an encoder and two of a decoder."""
    heads = decoder.heads
    actions = {
        "embedding": Action(1, "w8"),
        "encoder.layers.0.attention": Action(3, "w4+w8"),
        "encoder.layers.0.ffn": Action(64, "int8"),
        "encoder.layers.1.attention": DROP,
        "encoder.layers.1.ffn": Action(96, "w2"),
        "encoder.layers.2.attention": Action(4, "int8"),
        "encoder.layers.2.ffn": DROP,
        "layers.0.attention": Action(heads // 2, "int8"),
        "layers.0.cross": DROP,
        "layers.0.ffn": Action(64, "w8"),
        "layers.1.attention": Action(heads, "w4"),
        "layers.1.cross": Action(heads - 1, "int8"),
        "layers.1.ffn": Action(decoder.channels, "w4+w8"),
        "head": Action(1, "w4"),
    }
    return Plan(tuple((site.name, actions[site.name]) for site in decoder.sites()))


@sequences
def test_torch_and_onnx_compute_what_transformers_does(folders, name, windows, tmp_path):
    teacher, theirs, windows_NL = load_teacher(folders[name]), Theirs(folders[name]), windows[name]
    network, decoder = teacher.network, teacher.network.decoder
    assert read_decoder(folders[name]) == decoder and decoder.encoder
    assert (windows_NL[:4, :48] == PAD).any(1).tolist() == [True] * 4 and len(
        {*map(len, map(source_of, windows_NL[:4]))}
    ) > 1
    wanted_BTV, said_BL = theirs.logits(windows_NL[:4]), windows_NL[:4] < 0
    with torch.no_grad():
        found_BLV = network.model(windows_NL[:4])
    assert found_BLV.shape[:2] == (4, 64)
    assert error(found_BLV[said_BL].numpy(), wanted_BTV[said_BL[:, 48:]].numpy()) < 1e-5
    alone = network.window_logits(windows_NL[1].numpy())[said_BL[1]]
    assert error(alone.numpy(), found_BLV[1, said_BL[1]].numpy()) < 1e-5

    plan = full_plan(decoder, "fp32", "fp32")
    save_folder(
        Bank(tmp_path / "bank", network, windows_NL[:4], windows_NL[:2]).realize(plan), teacher, tmp_path / "onnx"
    )
    sources = [source_of(window_L) for window_L in windows_NL[:3]]
    said = [theirs.greedy(source_S, 16) for source_S in sources]
    assert len({token for tokens in said for token in tokens}) > 1
    assert [network.greedy(source_S, 16) for source_S in sources] == said
    with OnnxEncoderDecoder(tmp_path / "onnx", threads=1) as model:
        assert error(model.logits(windows_NL[0].numpy())[said_BL[0]], wanted_BTV[0, said_BL[0, 48:]].numpy()) < 1e-5
        assert [model.generate(source_S.numpy(), 16) for source_S in sources] == said
    assert exported_bytes(tmp_path / "onnx") <= limit(decoder, plan)
    assert not (tmp_path / "onnx" / "genai_config.json").exists()


@sequences
def test_a_compressed_student_is_scored_recovered_exported_and_loaded(folders, name, windows, tmp_path):
    teacher, windows_NL = load_teacher(folders[name]), windows[name]
    network, plan = teacher.network, mixed_plan(teacher.network.decoder)
    bank = Bank(tmp_path / "bank", network, windows_NL[:8], windows_NL[:2])
    before = Executor(bank, windows_NL[8:16]).score(plan).kl
    rebuilt = reconstruct(bank, plan, windows_NL[:8])
    settings = Settings(steps=2, warmup=0, check_every=1, checkpointing=True)
    student, curve = distill(
        network,
        rebuilt,
        lambda copy: Imitation(network, copy, windows_NL[16:20], windows=2, together=2, hidden_weight=0.1),
        windows_NL[20:],
        settings,
        tmp_path / "part",
    )
    assert 0 < before < 20 and len(curve.training) == 2
    check_whole_cache(network, student, windows_NL[16:20], tmp_path / "cache")

    save_folder(student, teacher, tmp_path / "onnx")
    window_L, said_L = windows_NL[20], windows_NL[20] < 0
    exact = loaded(network, student, "none")
    wanted = exact.window_logits(window_L.numpy())[said_L].numpy()
    source = source_of(window_L)
    with OnnxEncoderDecoder(tmp_path / "onnx", threads=1, exact=True) as model:
        assert error(model.logits(window_L.numpy())[said_L], wanted) < 1e-4
        assert model.generate(source.numpy(), 12) == exact.greedy(source, 12)
    with OnnxEncoderDecoder(tmp_path / "onnx", threads=1) as model:
        deployed = model.logits(window_L.numpy())[said_L]
    again = compressor.load(tmp_path / "onnx")
    with torch.no_grad():
        assert error(again(window_L[None])[0, said_L].numpy(), deployed) < 0.05
    assert exported_bytes(tmp_path / "onnx") <= limit(network.decoder, plan)
    check_golden(f"sequence: {name}", before, tmp_path / "onnx")


@sequences
def test_half_precision(folders, name, windows, tmp_path):
    network, windows_NL = load_teacher(folders[name]).network, windows[name]
    plan = full_plan(network.decoder, "fp16", "w8")
    made = Bank(tmp_path / "bank", network, windows_NL[:8], windows_NL[:2]).realize(plan)
    half = replace(made.decoder, precision="float16")
    export_onnx(replace(made, decoder=half), tmp_path)
    window_L, said_L = windows_NL[20], windows_NL[20] < 0
    wanted = loaded(network, made, "none").window_logits(window_L.numpy())[said_L].numpy()
    for exact, most in ((True, 1e-2), (False, 0.05)):
        with OnnxEncoderDecoder(tmp_path, threads=1, exact=exact) as model:
            assert error(model.logits(window_L.numpy())[said_L], wanted) < most
    assert exported_bytes(tmp_path) <= limit(half, plan)


@pytest.mark.parametrize("kept", ["across", "self", "nothing"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_attentions_that_are_all_dropped(folders, name, kept, windows, tmp_path):
    """No cache of the target, none of the source, or neither."""
    network, windows_NL = load_teacher(folders[name]).network, windows[name]
    gone = {"across": ("decoder", "encoder"), "self": ("cross",), "nothing": ("decoder", "encoder", "cross")}[kept]
    sites = network.decoder.sites()
    dropped = {site.name for site in sites if site.kind == "attention" and site.part in gone}
    plan = Plan(tuple((s.name, DROP if s.name in dropped else Action(s.units, "fp32")) for s in sites))
    student = Bank(tmp_path / "bank", network, windows_NL[:4], windows_NL[:2]).realize(plan)
    export_onnx(student, tmp_path)
    torch_student, source = loaded(network, student, "none"), source_of(windows_NL[0])
    with OnnxEncoderDecoder(tmp_path, threads=1) as model:
        said_L = windows_NL[0] < 0
        wanted = torch_student.window_logits(windows_NL[0].numpy())[said_L]
        assert error(model.logits(windows_NL[0].numpy())[said_L], wanted.numpy()) < 1e-5
        assert model.generate(source.numpy(), 8) == torch_student.greedy(source, 8)
        calls = model.bench_callables(12, 5)
        calls.prefill(), calls.decode()
    assert exported_bytes(tmp_path) <= limit(network.decoder, plan)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_padded_texts_give_what_they_give_alone(folders, name, windows, tmp_path):
    """Together in the graphs as anyone else would run them."""
    teacher, windows_NL = load_teacher(folders[name]), windows[name]
    plan = full_plan(teacher.network.decoder, "fp32", "fp32")
    save_folder(
        Bank(tmp_path / "bank", teacher.network, windows_NL[:4], windows_NL[:2]).realize(plan), teacher, tmp_path
    )
    encoder, first, later = (open_session(tmp_path / file, threads=1) for file in graph_files(teacher.network.decoder))
    seen = (windows_NL[:3, :48] != PAD).long().numpy()
    (hidden,) = encoder.run(None, {"input_ids": windows_NL[:3, :48].numpy(), "attention_mask": seen})
    start = np.full((3, 1), teacher.network.decoder.start)
    feeds = {"input_ids": start, "encoder_attention_mask": seen, "encoder_hidden_states": hidden}
    found = dict(zip(names(first.get_outputs()), first.run(None, feeds), strict=True))
    together, said = found.pop("logits"), np.full((3, 1), 7)
    past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
    (behind,) = later.run(["logits"], {"input_ids": said, "encoder_attention_mask": seen, **past})
    with OnnxEncoderDecoder(tmp_path, threads=1) as model:
        for window_L, logits_1V, behind_1V in zip(windows_NL[:3], together, behind, strict=True):
            alone_1V, cache = model.prefill(source_of(window_L).numpy())
            assert error(logits_1V, alone_1V) < 1e-5
            assert error(behind_1V[0], model.step(7, cache)[0]) < 1e-5


def names(values) -> list[str]:
    """Of inputs or outputs of a session."""
    return [value.name for value in values]


def keys(side: str, part: str, count: int = 2) -> list[str]:
    return [f"{side}.{i}.{part}.{kind}" for i in range(count) for kind in ("key", "value")]


@sequences
def test_graphs_have_the_names_that_optimum_expects(folders, name, windows, tmp_path):
    """And caches stand in its order, those of a number together, where sub-layers are gone, too."""
    network = load_teacher(folders[name]).network
    bank = Bank(tmp_path / "bank", network, windows[name][:4], windows[name][:2])
    inputs = ["input_ids", "encoder_attention_mask"]
    for plan, across in ((full_plan(network.decoder, "fp32", "fp32"), 2), (mixed_plan(network.decoder), 1)):
        export_onnx(bank.realize(plan), tmp_path)
        files = graph_files(network.decoder)
        assert files == ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")
        assert {path.name for path in tmp_path.iterdir() if path.is_file()} == {*files, "model.onnx_data"}
        encoder, first, later = (open_session(tmp_path / file, threads=1) for file in files)
        assert names(encoder.get_inputs()) == ["input_ids", "attention_mask"]
        assert names(encoder.get_outputs()) == ["last_hidden_state"]
        assert names(first.get_inputs()) == [*inputs, "encoder_hidden_states"]
        fresh, kept = keys("present", "decoder"), keys("present", "encoder", across)
        assert sorted(names(first.get_outputs())) == sorted(["logits", *fresh, *kept])
        past = keys("past_key_values", "decoder") + keys("past_key_values", "encoder", across)
        assert names(later.get_inputs()) == [*inputs, *sorted(past)]
        assert sorted(names(later.get_outputs())) == sorted(["logits", *fresh])
        shapes = {value.name: value.shape for value in (*first.get_outputs(), *later.get_inputs())}
        assert all(
            isinstance(shapes[key][0], str) and isinstance(shapes[key][2], str) for key in (*fresh, *kept, *past)
        )


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_a_configuration_forces_is_said(folders, name, windows, tmp_path):
    """The first token of an answer, and the last one where there is no more room; of several ends one."""
    teacher, theirs = load_teacher(folders[name]), Theirs(folders[name])
    for generation in (teacher.network.configuration[1], theirs.model.generation_config):
        generation.forced_bos_token_id, generation.forced_eos_token_id = 65, [END, 67]
    plan = full_plan(teacher.network.decoder, "fp32", "fp32")
    bank = Bank(tmp_path / "bank", teacher.network, windows[name][:4], windows[name][:2])
    save_folder(bank.realize(plan), teacher, tmp_path / "onnx")
    source_S = source_of(windows[name][0])
    with OnnxEncoderDecoder(tmp_path / "onnx", threads=1) as model:
        for length in (1, 2, 6):
            said = theirs.greedy(source_S, length)
            assert said[-1] == 67 and (said[0] == 65) == (length > 1)
            assert teacher.network.greedy(source_S, length) == model.generate(source_S.numpy(), length) == said
    (tmp_path / "onnx" / "generation_config.json").write_text("[]")
    with pytest.raises(RuntimeTargetError, match="generation_config.json cannot be read"):
        OnnxEncoderDecoder(tmp_path / "onnx", threads=1)


@pytest.mark.parametrize("plan", ["whole", "mixed"])
@sequences
def test_optimum_says_the_same(folders, name, plan, windows, tmp_path):
    runtime = pytest.importorskip("optimum.onnxruntime")
    teacher, sources = load_teacher(folders[name]), [source_of(window_L) for window_L in windows[name][:3]]
    decoder = teacher.network.decoder
    plan = mixed_plan(decoder) if plan == "mixed" else full_plan(decoder, "fp32", "fp32")
    bank = Bank(tmp_path / "bank", teacher.network, windows[name][:4], windows[name][:2])
    save_folder(bank.realize(plan), teacher, tmp_path / "onnx")
    theirs = runtime.ORTModelForSeq2SeqLM.from_pretrained(tmp_path / "onnx")
    with OnnxEncoderDecoder(tmp_path / "onnx", threads=1) as model:
        assert [greedy(theirs, source_S, 16) for source_S in sources] == [
            model.generate(s.numpy(), 16) for s in sources
        ]


@pytest.mark.parametrize(
    ("name", "fitted", "others"),
    [("t5-gated", 0.5, 1.1), ("bart", 0.7, 0.9)],  # of T5's saturated answers, so few windows tell nothing of others
)
def test_reconstruction_helps(folders, name, fitted, others, windows, tmp_path):
    network, windows_NL = load_teacher(folders[name]).network, windows[name]
    bank = Bank(tmp_path, network, windows_NL[:16], windows_NL[:2])
    plan = full_plan(network.decoder, "w2", "w8")
    students = (bank.realize(plan), reconstruct(bank, plan, windows_NL[:16]))
    for share, texts_NL in ((fitted, windows_NL[:16]), (others, windows_NL[16:])):
        before, behind = (Reference(network, texts_NL).kl(loaded(network, student)) for student in students)
        assert behind < share * before


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_window_gives_the_same_alone_and_beside_longer_ones(folders, name, windows, tmp_path):
    """Rounded activations included, whose grid a kernel takes from one text; but a last bit may turn a code over."""
    network, windows_NL = load_teacher(folders[name]).network, windows[name][:6]
    bank = Bank(tmp_path, network, windows_NL, windows_NL[:2])
    student = loaded(network, bank.realize(full_plan(network.decoder, "int8", "w8")))
    with torch.no_grad():
        together_NLV = student.model(windows_NL)
    errors = []
    for window_L, together_LV in zip(windows_NL, together_NLV, strict=True):
        said_L, alone_LV = window_L < 0, student.window_logits(window_L.numpy())
        errors.append(error(together_LV[said_L].numpy(), alone_LV[said_L].numpy()))
    assert np.median(errors) < 1e-5


def test_padding_changes_no_statistics(folders, windows, tmp_path):
    """Windows with more padding give the same second moments, scores and fits."""
    network, windows_NL = load_teacher(folders["t5"]).network, windows["t5"][:4]
    wider_NL = torch.nn.functional.pad(windows_NL, (0, 7), value=PAD)
    wider_NL = torch.cat([wider_NL[:, :48], torch.full((4, 9), PAD), wider_NL[:, 48:]], 1)
    narrow, wide = (Bank(tmp_path, network, x_NL, x_NL[:2]) for x_NL in (windows_NL, wider_NL))
    plan = full_plan(network.decoder, "w2", "w8")
    for site in network.sites.values():
        for name in site.inputs if site.layer is not None else ():
            moments = [bank.statistics().second_moment(name) for bank in (narrow, wide)]
            assert torch.allclose(*moments, rtol=1e-3, atol=1e-6), name
        for matrix in site.matrices:
            fishers = [bank.statistics().fisher(matrix.name) for bank in (narrow, wide)]
            assert torch.allclose(*fishers, rtol=1e-3, atol=1e-6), matrix.name
    students = [reconstruct(bank, plan, x_NL) for bank, x_NL in ((narrow, windows_NL), (wide, wider_NL))]
    (ours, theirs) = (loaded(network, student).window_logits(windows_NL[0].numpy()) for student in students)
    assert error(ours.numpy(), theirs.numpy()) < 1e-3


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_spans_of_plain_text_are_masked_and_said(folders, name):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[name])
    text = (TEXT / "wiki-calibration.txt").read_text()[:400]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    for length in (12, 40, 64, 100, 301):
        spans = Spans.of(tokenizer, length)
        given = ids[: length - spans.added]
        window = spans(given)
        assert window == spans(given) and len(window) == length and window.count(PAD) <= 3
        first = next(i for i, token in enumerate(window) if token < 0)
        source, target = window[:first], [~token for token in window[first:] if token < 0]
        assert source[-1] == target[-1] == END
        where_P, targets_P = predictions(torch.tensor(window))
        assert where_P[0] == first and targets_P.tolist() == target
        if name == "t5":
            marks = [token for token in target if token in SENTINELS]
            assert marks == [token for token in source if token in SENTINELS] == SENTINELS[: len(marks)]
            hidden = dict(zip(marks, _split(target[:-1], marks), strict=True))
            restored = [token for shown in source[:-1] for token in hidden.get(shown, [shown])]
            share = sum(map(len, hidden.values())) / len(given)
        else:
            assert source[0] == target[0] == BEGIN and MASK in source
            restored, share = target[1:-1], 1 - sum(token < 256 for token in source) / len(given)
        assert restored == given and share == pytest.approx(0.15, abs=0.5 / len(given) + 1e-9)


def _split(tokens: list[int], marks: list[int]) -> list[list[int]]:
    """What stands behind each of the marks."""
    places = [tokens.index(mark) for mark in marks] + [len(tokens)]
    return [tokens[start + 1 : end] for start, end in pairwise(places)]


def test_pairs_are_padded_and_cut(folders, pairs):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bart"])
    first = json.loads(pairs.read_text().splitlines()[0])
    source = TextSource(file=str(pairs), target="said")
    windows_NL = load_tokens([source], tokenizer, 60 * 20, 20, target_length=6)
    row = next(row for row in windows_NL.tolist() if row[1:4] == tokenizer(first["text"])["input_ids"][1:4])
    read, said = tokenizer(first["text"])["input_ids"], tokenizer(first["said"])["input_ids"]
    assert row[:14] == (read if len(read) <= 14 else [*read[:13], END]) + [PAD] * (14 - len(read))
    assert [~token for token in row[14:] if token < 0] == (said if len(said) <= 6 else [*said[:5], END])
    with pytest.raises(DataError, match="expected a target of all texts or of none"):
        load_tokens([source, TextSource(file=str(TEXT / "wiki-calibration.txt"))], tokenizer, 40, 20, target_length=6)
    with pytest.raises(DataError, match="expected 'summary', found text, said; name one of these as target"):
        load_tokens([source.model_copy(update={"target": "summary"})], tokenizer, 40, 20, target_length=6)


def test_a_whole_run_on_plain_text(folders, tmp_path):
    wanted = recipe(
        folders["t5-gated"],
        budget={"bytes": "45%", "prefill": "5x", "decode": "5x"},
        search={"formats": ["int8", "w4"], "attention_keep": [1.0, 0.0], "ffn_keep": [1.0, 0.0]},
    )
    report = pipeline.compress(wanted, tmp_path)
    check(report, tmp_path)
    assert "<extra_id_0>" in report.samples[0].prompt
    out = CliRunner().invoke(app, ["generate", str(tmp_path / "onnx"), "Once upon", "--tokens", "8"])
    assert out.exit_code == 0, out.output
    assert "Once" not in out.output


def test_a_whole_run_on_pairs(folders, pairs, tmp_path):
    files = {"calibration": pairs, "evaluation": pairs.with_name("others.jsonl")}
    data = {key: [{"file": str(file), "target": "said"}] for key, file in files.items()}
    search = {"formats": ["w4"], "attention_keep": [1.0, 0.5], "ffn_keep": [1.0, 0.0]}
    wanted = recipe(folders["bart"], data={**data, "target_length": 16}, search=search)
    check(pipeline.compress(wanted, tmp_path), tmp_path)
    assert pipeline.compress(wanted, tmp_path).parity.passed  # from what the first run left

    def generate(prompt: str, tokens: int):
        return CliRunner().invoke(app, ["generate", str(tmp_path / "onnx"), prompt, "--tokens", str(tokens)])

    assert generate("a" * 126, 128).exit_code == 0  # 128 positions each; two special tokens stand around the prompt
    for prompt, tokens in (("a" * 127, 8), ("a", 129)):
        refused = generate(prompt, tokens)
        assert refused.exit_code == 1 and "expected at most 128 each" in refused.output


def check(report, out: Path) -> None:
    assert report.parity.passed and report.parity.greedy_equal and report.budget[0].fits
    teacher, fp32, _, student = report.rows
    assert fp32.kl < 1e-4 and fp32.kl < student.kl and fp32.perplexity == pytest.approx(teacher.perplexity, rel=1e-3)
    assert all(row.prefill_ms and row.decode_ms for row in report.rows)
    assert {text.bits_per_byte for row in report.rows for text in row.texts.values()} == {None}
    assert "predicted from the source" in report.protocol
    card = (out / "onnx" / "README.md").read_text()
    assert "text2text-generation" in card and "decoder_with_past_model.onnx" in card and "GenAI" not in card
    table = json.loads((out / "latency.json").read_text()).popitem()[1]["entries"]
    kinds = {tuple(key.split()[:2]) for key in table}
    assert kinds >= {(part, kind) for part in ("encoder", "decoder") for kind in ("attention", "ffn")}
    assert ("cross", "attention") in kinds
    assert {*(ms for key, entry in table.items() if key.startswith("encoder") for ms in entry["decode"])} == {0.0}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("t5", {"distill": {"method": "on_policy"}}, "distill.method = on_policy: expected a decoder alone"),
        ("t5", {"data": {"calibration": [{"generated": 64}]}}, "generated = 64: expected a decoder alone"),
        ("t5", {"distill": {"attention_weight": 1}}, "distill.attention_weight = 1.0: expected a decoder alone"),
        (
            "t5",
            {"target": {"runtime": "torch"}, "search": {"formats": ["fp32"]}},
            "target.runtime = torch: expected a decoder",
        ),
        ("t5", {"data": {"sequence_length": 4}}, "data.sequence_length = 4: expected at least 5"),
    ],
)
def test_what_only_decoders_do_is_refused(folders, tmp_path, name, changes, said):
    with pytest.raises((RecipeError, DataError), match=said):
        pipeline.compress(recipe(folders[name], **changes), tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "said"),
    [
        ("T5Config", T5 | {"is_encoder_decoder": False}, "is_encoder_decoder = False"),
        ("BartConfig", BART | {"pad_token_id": None}, "pad_token_id = None"),
        ("T5Config", T5 | {"feed_forward_proj": "tanh"}, "activation 'tanh'"),
        ("MBartConfig", BART, "model_type 'mbart' .supported: .*pegasus"),
    ],
)
def test_other_shapes_are_refused_by_name(config, changes, said, tmp_path):
    getattr(transformers, config)(**changes).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        read_decoder(tmp_path)


def test_targets_are_for_encoder_decoders(tiny_folder, pairs, tmp_path):
    source = [{"file": str(pairs), "target": "said"}]
    with pytest.raises(RecipeError, match="target = said: expected an encoder-decoder"):
        pipeline.compress(recipe(tiny_folder, data={"calibration": source}), tmp_path)
    with pytest.raises(RecipeError, match="expected a file of JSON lines"):
        recipe(tiny_folder, data={"calibration": [{"file": "text.txt", "target": "said"}]})


def test_a_tokenizer_of_another_model_is_refused(folders, tiny_folder, tmp_path):
    transformers.AutoModelForSeq2SeqLM.from_pretrained(folders["t5"]).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected one padding token, config.json has 256, the tokenizer None"):
        load_teacher(tmp_path)
