"""Masked language models at a tiny size: the same numbers as transformers, in torch and in ONNX, whole and compressed."""

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
from compressor.errors import ModelError, RecipeError
from compressor.executor import Executor, Reference
from compressor.export import OnnxDecoder, exported_bytes, fixed_bytes, open_session
from compressor.families import FAMILIES
from compressor.folder import save_folder
from compressor.model import load_teacher, read_decoder
from compressor.network import loaded
from compressor.plan import DROP, Action, Plan
from compressor.recipe import TextSource
from compressor.recovery.distill import Imitation, Settings, distill
from compressor.recovery.reconstruct import reconstruct
from compressor.student import full_plan
from compressor.text import Masking, load_tokens, predictions
from eval.perplexity import compare
from tests import test_families, test_sequences
from tests.conftest import TEXT, check_golden
from tests.test_distill import check_whole_cache
from tests.test_families import error, write_model
from tests.test_pipeline import recipe

SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", "pad_token": "[PAD]"}
CLS, SEP, MASK, PAD = range(256, 260)
BERT = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "initializer_range": 0.15,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODERN = BERT | {"local_attention": 20, "cls_token_id": CLS, "sep_token_id": SEP, "global_attn_every_n_layers": 2}
DISTIL = {"vocab_size": 260, "dim": 64, "hidden_dim": 96, "n_layers": 3, "n_heads": 4, "pad_token_id": PAD}
CONFIGS = {
    "bert": ("BertConfig", BERT),
    "bert-untied": ("BertConfig", BERT | {"tie_word_embeddings": False, "hidden_act": "gelu_new"}),
    "roberta": ("RobertaConfig", BERT | {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRobertaConfig", BERT | {"pad_token_id": 1}),
    "distilbert": ("DistilBertConfig", DISTIL | {"max_position_embeddings": 130, "initializer_range": 0.15}),
    "modernbert": ("ModernBertConfig", MODERN),
    "modernbert-biased": (
        "ModernBertConfig",
        MODERN | {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True},
    ),
}
encoders = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model folder of every configuration."""
    made = {}
    for name, (config, changes) in CONFIGS.items():
        made[name] = tmp_path_factory.mktemp(name)
        write_model(transformers.AutoModelForMaskedLM, getattr(transformers, config)(**changes), made[name])
        encoder_tokenizer().save_pretrained(made[name])
    return made


def encoder_tokenizer(pad_token_id: int = PAD) -> transformers.PreTrainedTokenizerFast:
    """A token a byte, in [CLS] and [SEP]."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", CLS), ("[SEP]", SEP)])
    special = SPECIAL | {"pad_token": tokenizer.id_to_token(pad_token_id)}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def masked(folders) -> torch.Tensor:
    """Windows [24, 64] of the calibration text, some tokens masked."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    sources = [TextSource(file=str(TEXT / "wiki-calibration.txt"))]
    return load_tokens(sources, tokenizer, 24 * 64, 64, marking=Masking.of(tokenizer))


def theirs(folder: Path, ids_BL: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(ids_BL).logits


def mixed_plan(decoder) -> Plan:
    """Every kind of action in three blocks."""
    actions = {
        "embedding": Action(1, "w8"),
        "layers.0.attention": DROP,
        "layers.0.ffn": Action(64, "int8"),
        "layers.1.attention": Action(2, "w4+w8"),
        "layers.1.ffn": DROP,
        "layers.2.attention": Action(4, "int8"),
        "layers.2.ffn": Action(96, "w2+w4b64"),
        "head": Action(1, "w4"),
    }
    return Plan(tuple((site.name, actions[site.name]) for site in decoder.sites()))


def test_masks_are_the_same_every_time_and_hide_what_is_predicted(folders, masked):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    masking = Masking.of(tokenizer)
    assert masking == Masking((CLS,), (SEP,)) and masking.added == 2
    text = (TEXT / "wiki-calibration.txt").read_bytes()[:62]
    window = masking(list(text))
    assert window == masking(list(text)) and len(window) == 64 and window[0] == CLS and window[-1] == SEP
    assert [~token if token < 0 else token for token in window[1:-1]] == list(text)
    assert sum(token < 0 for token in window) == round(0.15 * 62) and masking([7])[1] == ~7
    network = load_teacher(folders["bert"]).network
    seen_NL = network.seen(masked)
    assert torch.equal(seen_NL == MASK, masked < 0) and torch.equal(seen_NL[masked >= 0], masked[masked >= 0])
    where_P, targets_P = predictions(masked[0])
    assert torch.equal(masked[0][where_P], ~targets_P) and (targets_P >= 0).all()


@encoders
def test_torch_and_onnx_compute_what_transformers_does(folders, name, masked, tmp_path):
    teacher = load_teacher(folders[name])
    network = teacher.network
    ids_BL = network.seen(masked[:2])
    wanted = theirs(folders[name], ids_BL)
    assert read_decoder(folders[name]) == network.decoder and not network.decoder.causal
    with torch.no_grad():
        assert error(network.model(ids_BL).numpy(), wanted.numpy()) < 1e-5
    plan = full_plan(network.decoder, "fp32", "fp32")
    save_folder(Bank(tmp_path / "bank", network, masked[:4], masked[:2]).realize(plan), teacher, tmp_path / "onnx")
    with OnnxDecoder(tmp_path / "onnx", threads=1) as model:
        assert error(model.logits(ids_BL[0].numpy()), wanted[0].numpy()) < 1e-5 and not model.writes
    assert not (tmp_path / "onnx" / "genai_config.json").exists()
    limit = fixed_bytes(network.decoder) + sum(s.size_bytes(plan[s.name]) for s in network.decoder.sites())
    assert exported_bytes(tmp_path / "onnx") <= limit

    # perplexity and KL are over what is masked, here and in the search
    reference = Reference(network, masked[:4])
    other = load_teacher(folders[name]).network
    other.matrix("layers.1.ffn.down").data.mul_(0.5)
    kl_N, nll_N = reference.compare(other)
    losses, divergences = [], []
    for ids_L in masked[:4]:
        log_p, log_q = (torch.log_softmax(n.window_logits(ids_L.numpy()), -1) for n in (network, other))
        at = ids_L < 0
        losses.append(float(-log_q[at].gather(1, ~ids_L[at, None]).mean()))
        divergences.append(float((log_p.exp() * (log_p - log_q)).sum(-1)[at].mean()))
    assert kl_N == pytest.approx(divergences, rel=1e-4) and nll_N == pytest.approx(losses, rel=1e-4)
    models = {"other": other.window_logits}
    found = compare(network.window_logits, models, masked[:4].numpy(), predictions=predictions)["other"]
    assert found.kl == pytest.approx(kl_N.mean(), rel=0.01) and np.log(found.perplexity) == pytest.approx(
        nll_N.mean(), rel=0.01
    )


@encoders
def test_a_padded_text_gives_what_it_gives_alone(folders, name, masked, tmp_path):
    teacher = load_teacher(folders[name])
    plan = full_plan(teacher.network.decoder, "fp32", "fp32")
    save_folder(Bank(tmp_path / "bank", teacher.network, masked[:4], masked[:2]).realize(plan), teacher, tmp_path)
    session = open_session(tmp_path / "model.onnx", threads=1)
    ids = teacher.network.seen(masked[:1, :40]).numpy()
    padded = np.concatenate([ids, np.full((1, 9), PAD)], 1)
    mask = np.ones_like(padded)
    mask[:, 40:] = 0
    alone = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    assert error(session.run(None, {"input_ids": padded, "attention_mask": mask})[0][:, :40], alone) < 1e-5


@encoders
def test_a_compressed_student_is_scored_recovered_exported_and_loaded(folders, name, masked, tmp_path):
    teacher = load_teacher(folders[name])
    network, plan = teacher.network, mixed_plan(teacher.network.decoder)
    bank = Bank(tmp_path / "bank", network, masked[:8], masked[:2])
    before = Executor(bank, masked[8:16]).score(plan).kl
    rebuilt = reconstruct(bank, plan, masked[:8])
    settings = Settings(steps=2, warmup=0, check_every=1)
    student, curve = distill(
        network, rebuilt, lambda copy: Imitation(network, copy, masked[16:20]), masked[20:], settings, tmp_path / "part"
    )
    assert 0 < before < 20 and len(curve.training) == 2
    check_whole_cache(network, student, masked[16:20], tmp_path / "cache")
    save_folder(student, teacher, tmp_path / "onnx")
    ids_L = network.seen(masked[20])
    exact = loaded(network, student, "none")
    with torch.no_grad():
        wanted = exact.model(ids_L[None])[0].numpy()
    with OnnxDecoder(tmp_path / "onnx", threads=1, exact=True) as model:
        assert error(model.logits(ids_L.numpy()), wanted) < 1e-4
    with OnnxDecoder(tmp_path / "onnx", threads=1) as model:
        deployed = model.logits(ids_L.numpy())
    again = compressor.load(tmp_path / "onnx")
    with torch.no_grad():
        assert error(again(ids_L[None])[0].numpy(), deployed) < 0.05
    limit = fixed_bytes(network.decoder) + sum(s.size_bytes(plan[s.name]) for s in network.decoder.sites())
    assert exported_bytes(tmp_path / "onnx") <= limit
    check_golden(f"encoder: {name}", before, tmp_path / "onnx")


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_reconstruction_helps(folders, name, masked, tmp_path):
    network = load_teacher(folders[name]).network
    bank = Bank(tmp_path, network, masked[:16], masked[:2])
    plan = full_plan(network.decoder, "w2", "w8")
    reference = Reference(network, masked[16:])
    before, behind = (
        reference.kl(loaded(network, student)) for student in (bank.realize(plan), reconstruct(bank, plan, masked[:16]))
    )
    assert behind < 0.9 * before


def test_a_whole_run(folders, tmp_path):
    wanted = recipe(folders["bert"], budget={"bytes": "45%", "prefill": "5x"}, search={"formats": ["int8", "w8", "w4"]})
    report = pipeline.compress(wanted, tmp_path)
    assert report.parity.passed and report.budget[0].fits and "pseudo-perplexity" in report.protocol
    teacher, fp32, _, student = report.rows
    assert fp32.kl < 1e-4 < student.kl and fp32.perplexity == pytest.approx(teacher.perplexity, rel=1e-3)
    assert {row.decode_ms for row in report.rows} == {None} and all(row.prefill_ms for row in report.rows)
    assert student.texts["wiki-evaluation"].bits_per_byte is None
    assert "[MASK]" in report.samples[0].prompt
    page = (tmp_path / "report.md").read_text()
    assert "decoding" not in page.split("##")[0].split("Asked")[0]
    json.loads((tmp_path / "report.json").read_text())
    lines = report.check(baseline=report)
    assert {line.name for line in lines} == {"perplexity_ratio", "bytes", "prefill"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"budget": {"decode": "50%"}}, "budget.decode: expected a model that writes"),
        ({"distill": {"method": "on_policy"}}, "distill.method = on_policy: expected a model that writes"),
        ({"data": {"calibration": [{"generated": 64}]}}, "generated = 64: expected a model that writes"),
    ],
)
def test_what_only_causal_models_do_is_refused(folders, tmp_path, changes, said):
    with pytest.raises(RecipeError, match=said):
        pipeline.compress(recipe(folders["bert"], **changes), tmp_path)


def test_a_tokenizer_without_a_mask_is_refused(folders, tiny_folder, tmp_path):
    transformers.AutoModelForMaskedLM.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="expected a mask token"):
        load_teacher(tmp_path)


def test_every_family_is_tried():
    tried = [*test_families.CONFIGS.values(), *CONFIGS.values(), *test_sequences.CONFIGS.values()]
    assert {getattr(transformers, config)(**changes).model_type for config, changes in tried} == set(FAMILIES)
