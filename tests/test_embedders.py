"""Embedders of texts at a tiny size: the same numbers as transformers, texts compared with others, whole and compressed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import compressor
from compressor import pipeline
from compressor.bank import Bank
from compressor.errors import DataError, ModelError, RecipeError, RegressionError
from compressor.executor import Executor
from compressor.export import OnnxDecoder, exported_bytes, fixed_bytes, open_session
from compressor.folder import save_folder
from compressor.model import load_teacher, read_decoder
from compressor.network import loaded
from compressor.plan import DROP, Plan
from compressor.recipe import TextSource
from compressor.recovery.distill import Imitation, Settings, distill
from compressor.recovery.reconstruct import reconstruct
from compressor.run import Texts
from compressor.student import full_plan
from compressor.text import Labelling, load_tokens
from compressor.transformer import NEARNESS
from tests.conftest import TEXT
from tests.test_classifiers import LENGTH, windows_of
from tests.test_distill import check_whole_cache
from tests.test_encoders import CLS, CONFIGS, PAD, SEP, encoder_tokenizer, mixed_plan
from tests.test_families import error, write_model
from tests.test_pipeline import recipe

POOLINGS = {"bert": "mean", "roberta": "first", "xlm-roberta": "mean", "distilbert": "first", "modernbert": "mean"}
embedders = pytest.mark.parametrize("name", POOLINGS)


def write_modules(folder: Path, pooling: str, *others: str, named: bool = False) -> None:
    """What sentence-transformers writes beside a model; named: as its version 5 does."""
    kinds = ["Transformer", "Pooling", *others]
    modules = [{"idx": i, "type": f"sentence_transformers.models.{kind}"} for i, kind in enumerate(kinds)]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "modules.json").write_text(json.dumps(modules))
    modes = {f"pooling_mode_{mode}": mode == pooling for mode in ("cls_token", "mean_tokens", "max_tokens")}
    modes = {"pooling_mode": pooling.partition("_")[0]} if named else modes
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **modes}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model folder of every configuration; of modernbert without sentence-transformers' files."""
    made = {}
    for name, pooling in POOLINGS.items():
        kind, changes = CONFIGS[name]
        config = getattr(transformers, kind)(**changes)
        made[name] = tmp_path_factory.mktemp(name)
        write_model(transformers.AutoModel, config, made[name])
        encoder_tokenizer(pad_token_id=config.pad_token_id).save_pretrained(made[name])
        if name != "modernbert":
            others = () if name == "distilbert" else ("Normalize",)
            tokens = {"mean": "mean_tokens", "first": "cls_token"}[pooling]
            write_modules(made[name], tokens, *others, named=name in ("roberta", "xlm-roberta"))
    return made


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> Path:
    """Texts of 5 to 70 bytes, one a line, some lines empty."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("texts") / "lines.txt"
    text = (TEXT / "wiki-calibration.txt").read_text().encode("ascii", "ignore").decode().replace("\n", " ")
    starts = rng.integers(0, len(text) - 100, 160)
    path.write_text("\n\n".join(text[start : start + int(rng.integers(5, 70))] for start in starts))
    return path


@pytest.fixture(scope="module")
def windows(folders, lines) -> dict[str, torch.Tensor]:
    """Windows [32, LENGTH] of the texts, by configuration."""
    return windows_of(folders, TextSource(file=str(lines)), 32, None)


def theirs(folder: Path, name: str, ids_NL: torch.Tensor) -> torch.Tensor:
    """Embeddings [N, D] by transformers."""
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    mask_NL = (ids_NL != transformers.AutoConfig.from_pretrained(folder).pad_token_id).long()
    with torch.no_grad():
        hidden_NLD = model(ids_NL, attention_mask=mask_NL).last_hidden_state
    if POOLINGS[name] == "first":
        pooled_ND = hidden_NLD[:, 0]
    else:
        pooled_ND = torch.stack([h_LD[m_L == 1].mean(0) for h_LD, m_L in zip(hidden_NLD, mask_NL, strict=True)])
    return pooled_ND if name == "distilbert" else pooled_ND / pooled_ND.norm(dim=1, keepdim=True)


def test_a_line_or_a_row_is_a_text(folders, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    (tmp_path / "a.txt").write_text("ab\n\n  \n c \n")
    (tmp_path / "a.jsonl").write_text('{"said": "ab"}\n{"said": "c"}\n')
    for source in (TextSource(file=str(tmp_path / "a.txt")), TextSource(file=str(tmp_path / "a.jsonl"), column="said")):
        windows_NL = load_tokens([source], tokenizer, 2 * 6, 6, marking=Labelling.of(tokenizer, None))
        a, b, c = tokenizer("abc", add_special_tokens=False)["input_ids"]
        assert sorted(windows_NL.tolist()) == sorted([[~0, a, b, SEP, PAD, PAD], [~0, c, SEP, PAD, PAD, PAD]])


@embedders
def test_torch_and_onnx_compute_what_transformers_does(folders, name, windows, tmp_path):
    teacher = load_teacher(folders[name])
    network, ids_NL = teacher.network, teacher.network.seen(windows[name][:4])
    assert network.decoder.pooling == POOLINGS[name] and network.decoder.normalized == (name != "distilbert")
    assert read_decoder(folders[name]) == network.decoder
    assert (ids_NL[:, 0] == CLS).all() and (ids_NL == network.decoder.pad).any()
    wanted_ND = theirs(folders[name], name, ids_NL)
    with torch.no_grad():
        assert error(network.model(ids_NL).numpy(), wanted_ND.numpy()) < 1e-5
    network.compare_with(windows[name][8:])
    nearness_NA = torch.nn.functional.cosine_similarity(
        wanted_ND[:, None], theirs(folders[name], name, network.seen(windows[name][8:])), dim=-1
    )
    alone = [network.window_logits(ids_L.numpy()) for ids_L in windows[name][:4]]
    assert error(torch.cat(alone).numpy(), nearness_NA.numpy() / NEARNESS) < 1e-5
    plan = full_plan(network.decoder, "fp32", "fp32")
    save_folder(Bank(tmp_path / "bank", network, windows[name][:4], windows[name][:2]).realize(plan), teacher, tmp_path)
    mask_NL = (ids_NL != network.decoder.pad).long()
    hidden_NLD, found_ND = open_session(tmp_path / "model.onnx", threads=1).run(
        ["last_hidden_state", "sentence_embedding"], {"input_ids": ids_NL.numpy(), "attention_mask": mask_NL.numpy()}
    )
    assert hidden_NLD.shape == (4, LENGTH, 64) and error(found_ND, wanted_ND.numpy()) < 1e-5
    limit = fixed_bytes(network.decoder) + sum(s.size_bytes(plan[s.name]) for s in network.decoder.sites())
    assert exported_bytes(tmp_path) <= limit
    kept = ["modules.json", "1_Pooling/config.json"] if name != "modernbert" else []
    assert all((tmp_path / file).read_bytes() == (folders[name] / file).read_bytes() for file in kept)


@embedders
def test_a_compressed_student_is_scored_recovered_exported_and_loaded(folders, name, windows, tmp_path):
    teacher, windows_NL = load_teacher(folders[name]), windows[name]
    network, plan = teacher.network, mixed_plan(teacher.network.decoder)
    network.compare_with(windows_NL[24:])
    bank = Bank(tmp_path / "bank", network, windows_NL[:8], windows_NL[:2])
    dropped = Plan(tuple((site, DROP if site == "layers.1.attention" else a) for site, a in plan.items()))
    scores = [
        Executor(bank, windows_NL[8:16]).score(tried).kl for tried in (full_plan(network.decoder, "w8", "w8"), dropped)
    ]
    assert 0 < scores[0] < scores[1] < 20
    rebuilt = reconstruct(bank, plan, windows_NL[:8])
    settings = Settings(steps=2, warmup=0, check_every=1)
    student, curve = distill(
        network,
        rebuilt,
        lambda copy: Imitation(network, copy, windows_NL[16:20], hidden_weight=1.0),
        windows_NL[20:24],
        settings,
        tmp_path / "part",
    )
    assert len(curve.training) == 2
    check_whole_cache(network, student, windows_NL[16:20], tmp_path / "cache")
    save_folder(student, teacher, tmp_path / "onnx")
    exact, ids_L = loaded(network, student, "none"), network.seen(network.written(windows_NL[20]))
    with torch.no_grad():
        wanted_1D = exact.model(ids_L[None]).numpy()
    with OnnxDecoder(tmp_path / "onnx", threads=1, exact=True) as model:
        assert error(model.logits(ids_L.numpy()), wanted_1D) < 1e-4
        assert (
            error(network.told(model.logits(ids_L.numpy())).numpy(), exact.window_logits(ids_L.numpy()).numpy()) < 1e-4
        )
    with OnnxDecoder(tmp_path / "onnx", threads=1) as model:
        deployed_1D = model.logits(ids_L.numpy())
    with torch.no_grad():
        again_1D = compressor.load(tmp_path / "onnx")(ids_L[None])
    assert again_1D.shape == (1, 64) and error(again_1D.numpy(), deployed_1D) < 0.05


def test_a_whole_run(folders, lines, tmp_path):
    data = {
        "calibration": [str(lines)],
        "evaluation": [{"file": str(TEXT / "wiki-evaluation.txt")}, str(TEXT / "novel-evaluation.txt")],
        "sequence_length": LENGTH,
        "calibration_tokens": 12 * LENGTH,
        "evaluation_tokens": 40 * LENGTH,
        "anchors": 24,
    }
    wanted = recipe(
        folders["bert"], gate={"accuracy_ratio": 9.0}, budget={"bytes": "45%"}, data=data, search={"tokens": 8 * LENGTH}
    )
    report = pipeline.compress(wanted, tmp_path)
    assert report.parity.passed and report.budget[0].fits and report.task == "sentence-similarity"
    teacher, fp32, _, student = report.rows
    assert teacher.accuracy == fp32.accuracy == 1.0 and fp32.kl < 1e-6 < student.kl and student.decode_ms is None
    # by hand: the deployed embeddings of the same texts, against transformers'
    network = load_teacher(folders["bert"]).network
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["bert"])
    texts = Texts.read(wanted, tokenizer, Labelling.of(tokenizer, None), 24)
    anchors_AD = theirs(folders["bert"], "bert", network.seen(texts.anchors_NL))
    ids_NL = network.seen(texts.evaluation_NL)
    with OnnxDecoder(tmp_path / "onnx", threads=1) as model:
        found_ND = torch.cat([torch.from_numpy(model.logits(ids_L[ids_L != PAD].numpy())) for ids_L in ids_NL])
    wanted_ND = theirs(folders["bert"], "bert", ids_NL)
    log_p_NA, log_q_NA = (torch.log_softmax(e_ND @ anchors_AD.T / NEARNESS, 1) for e_ND in (wanted_ND, found_ND))
    kept = float((log_p_NA.argmax(1) == log_q_NA.argmax(1)).float().mean())
    kl = float((log_p_NA.exp() * (log_p_NA - log_q_NA)).sum(1).mean())
    assert student.accuracy == pytest.approx(kept) and student.kl == pytest.approx(kl, rel=0.02)
    (line,) = report.gate
    assert line.name == "accuracy_ratio" and line.passed and line.measured == 1 / student.accuracy
    worse = replace(report, rows=(*report.rows[:3], replace(student, accuracy=0.8 * student.accuracy)))
    with pytest.raises(RegressionError, match="accuracy, teacher / student"):
        worse.check(baseline=report)
    page, card = ((tmp_path / name).read_text() for name in ("report.md", "onnx/README.md"))
    assert "nearest kept" in page and "perplexity" not in page.split("## Plan")[0].split("###")[0]
    assert 'backend="onnx"' in card and "embeddings [B, D]" in card and "compress generate" not in card


def test_what_an_embedder_is_not(folders, lines, tmp_path):
    data = {"calibration": [str(lines)], "evaluation": [str(TEXT / "wiki-evaluation.txt")], "sequence_length": LENGTH}
    data |= {"calibration_tokens": 12 * LENGTH, "evaluation_tokens": 4 * LENGTH}
    with pytest.raises(RecipeError, match="budget.decode: expected a model that writes"):
        pipeline.compress(recipe(folders["bert"], data=data, budget={"decode": "50%"}), tmp_path / "1")
    with pytest.raises(
        RecipeError, match="target.runtime = torch: expected a model with a head, this one is an embedder"
    ):
        wanted = recipe(folders["bert"], data=data, target={"runtime": "torch"}).to_dict()
        del wanted["search"]["formats"], wanted["search"]["embedding_formats"]
        pipeline.compress(compressor.Recipe.from_dict(wanted), tmp_path / "2")
    labelled = tmp_path / "rows.jsonl"
    labelled.write_text('{"text": "a", "class": 1}\n')
    with pytest.raises(DataError, match="expected a classifier of texts, this model is none; leave label out"):
        source = {"file": str(labelled), "label": "class"}
        pipeline.compress(recipe(folders["bert"], data=data | {"calibration": [source]}), tmp_path / "3")
    with pytest.raises(DataError, match="expected 152 windows of 48 tokens, found 80"):  # 128 others are compared with
        few = tmp_path / "few.txt"
        few.write_text("\n".join(f"text {i}" for i in range(80)))
        wanted = recipe(folders["bert"], data=data | {"calibration": [str(few)]}, search={"tokens": 4 * LENGTH})
        pipeline.compress(wanted, tmp_path / "4")


@pytest.mark.parametrize(
    ("pooling", "others", "said"),
    [
        ("max_tokens", [], "1_Pooling/config.json max_tokens"),
        ("mean_tokens", ["Dense"], "modules.json has Transformer, Pooling, Dense"),
    ],
)
def test_other_poolings_are_refused(tmp_path, pooling, others, said):
    kind, changes = CONFIGS["bert"]
    write_model(transformers.AutoModel, getattr(transformers, kind)(**changes), tmp_path)
    encoder_tokenizer().save_pretrained(tmp_path)
    write_modules(tmp_path, pooling, *others)
    with pytest.raises(ModelError, match=said):
        load_teacher(tmp_path)
