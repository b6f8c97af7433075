"""Encoder-decoders at a tiny size: the same numbers and texts as transformers, in torch and in ONNX, whole and compressed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import compressor
from compressor import pipeline
from compressor.bank import Bank
from compressor.errors import DataError, ModelError, RecipeError
from compressor.executor import Executor, Reference
from compressor.export import OnnxEncoderDecoder, exported_bytes, fixed_bytes, open_session
from compressor.folder import save_folder
from compressor.model import load_teacher, read_decoder
from compressor.plan import DROP, Action, Plan
from compressor.recipe import TextSource
from compressor.recovery.distill import Imitation, Settings, distill, loaded
from compressor.recovery.reconstruct import reconstruct
from compressor.student import full_plan
from compressor.text import Spans, load_tokens, plain, predictions
from tests.conftest import TEXT
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
    "init_std": 0.1,
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
    "bart": ("BartConfig", BART),
    "bart-scaled": ("BartConfig", BART | {"scale_embedding": True, "activation_function": "relu"}),
}
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
            if key.endswith(("decoder.final_layer_norm.weight", "decoder.layers.1.final_layer_norm.weight")):
                parameter.data = torch.randn_like(parameter)  # else a tied head says the same token again and again
            elif parameter.ndim == 2 and "t5" in name and "block" in key:
                parameter.data *= 2
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
    made.add_special_tokens([*special.values(), *(f"<extra_id_{i}>" for i in range(16))])
    ends = [("<s>", BEGIN), ("</s>", END)]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", None, ends)
    if "bart" not in name:
        made.post_processor = processors.TemplateProcessing("$A </s>", None, ends[1:])
        del special["mask_token"], special["bos_token"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Texts of many lengths with what is to be said of them, a JSON object a line."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [line.strip() for line in (TEXT / "wiki-calibration.txt").read_text().splitlines() if len(line) > 40]
    rows = [{"text": line[: 10 + 7 * (i % 6)], "said": line[: 3 + i % 14]} for i, line in enumerate(lines[:60])]
    path.write_text("\n".join(map(json.dumps, rows)))
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

    @torch.no_grad()
    def greedy(self, source_S: torch.Tensor, new_tokens: int) -> list[int]:
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "eos_token_id": None}
        seen = torch.ones_like(source_S[None])
        return self.model.generate(source_S[None], attention_mask=seen, do_sample=False, num_beams=1, **options)[0, 1:].tolist()


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
        "encoder.layers.0.attention": Action(3, "w4"),
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
        "layers.1.ffn": Action(decoder.channels, "w4"),
        "head": Action(1, "w4"),
    }
    return Plan(tuple((site.name, actions[site.name]) for site in decoder.sites()))


@sequences
def test_torch_and_onnx_compute_what_transformers_does(folders, name, windows, tmp_path):
    teacher, theirs, windows_NL = load_teacher(folders[name]), Theirs(folders[name]), windows[name]
    network, decoder = teacher.network, teacher.network.decoder
    assert read_decoder(folders[name]) == decoder and decoder.encoder
    assert (windows_NL[:4, :48] == PAD).any(1).tolist() == [True] * 4 and len({*map(len, map(source_of, windows_NL[:4]))}) > 1
    wanted_BTV, said_BL = theirs.logits(windows_NL[:4]), windows_NL[:4] < 0
    with torch.no_grad():
        found_BLV = network.model(windows_NL[:4])
    assert found_BLV.shape[:2] == (4, 64)
    assert error(found_BLV[said_BL].numpy(), wanted_BTV[said_BL[:, 48:]].numpy()) < 1e-5
    alone = network.window_logits(windows_NL[1].numpy())[said_BL[1]]
    assert error(alone.numpy(), found_BLV[1, said_BL[1]].numpy()) < 1e-5

    plan = full_plan(decoder, "fp32", "fp32")
    save_folder(Bank(tmp_path / "bank", network, windows_NL[:4], windows_NL[:2]).realize(plan), teacher, tmp_path / "onnx")
    said = theirs.greedy(source_of(windows_NL[0]), 16)
    assert len({*said}) > 1
    assert network.greedy(source_of(windows_NL[0]), 16) == said
    with OnnxEncoderDecoder(tmp_path / "onnx", threads=1) as model:
        assert error(model.logits(windows_NL[0].numpy())[said_BL[0]], wanted_BTV[0, said_BL[0, 48:]].numpy()) < 1e-5
        assert model.generate(source_of(windows_NL[0]).numpy(), 16) == said
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
