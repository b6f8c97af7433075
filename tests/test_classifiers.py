"""Classifiers of texts at a tiny size: labels, padded windows, and the same numbers as transformers, whole and compressed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import compressor
from compressor import pipeline
from compressor.bank import Bank
from compressor.errors import DataError, ModelError, RecipeError, RegressionError
from compressor.executor import Executor, Reference
from compressor.export import OnnxDecoder, exported_bytes, fixed_bytes, open_session
from compressor.folder import save_folder
from compressor.measure import Target, opened_torch
from compressor.model import load_teacher
from compressor.network import loaded
from compressor.plan import Action, Plan
from compressor.recipe import TextSource
from compressor.recovery.distill import Imitation, Settings, distill
from compressor.recovery.reconstruct import reconstruct
from compressor.runtimes import runtime
from compressor.student import full_plan
from compressor.text import Labelling, load_tokens, predictions
from eval.perplexity import answered, compare
from tests.conftest import TEXT
from tests.test_distill import check_whole_cache
from tests.test_encoders import BERT, CLS, CONFIGS, MASK, PAD, SEP, encoder_tokenizer, mixed_plan
from tests.test_families import error, write_model
from tests.test_pipeline import recipe

NAMES = ["bert", "roberta", "distilbert", "modernbert-biased"]
CLASSES = {"article": 0, "novel": 1, "neither": 2}
LENGTH = 48
classifiers = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A model folder of every configuration."""
    made = {}
    for name in NAMES:
        kind, changes = CONFIGS[name]
        config = getattr(transformers, kind)(**changes, id2label={i: c for c, i in CLASSES.items()}, label2id=CLASSES)
        made[name] = tmp_path_factory.mktemp(name)
        write_model(transformers.AutoModelForSequenceClassification, config, made[name])
        encoder_tokenizer(pad_token_id=config.pad_token_id).save_pretrained(made[name])
    return made


def write_texts(path: Path, seed: int) -> Path:
    """Texts of 5 to 70 bytes with their classes, by number and by name; articles in capitals."""
    rng = np.random.default_rng(seed)
    with path.open("w") as lines:
        for label, file in (("article", "wiki-calibration.txt"), ("novel", "novel-evaluation.txt")):
            text = (TEXT / file).read_text().encode("ascii", "ignore").decode()
            for i in range(60):
                start, length = int(rng.integers(0, len(text) - 100)), int(rng.integers(5, 70))
                written = (
                    text[start : start + length].upper() if label == "article" else text[start : start + length].lower()
                )
                row = {"text": written, "class": CLASSES[label] if i % 2 else label}
                lines.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts") / "labelled.jsonl", seed=0)


@pytest.fixture(scope="module")
def windows(folders, labelled) -> dict[str, torch.Tensor]:
    """Windows [24, LENGTH] of the labelled texts, by configuration."""
    return windows_of(folders, TextSource(file=str(labelled), label="class"), 24, CLASSES)


def windows_of(
    folders: dict[str, Path], source: TextSource, count: int, classes: dict[str, int] | None
) -> dict[str, torch.Tensor]:
    """Windows [count, LENGTH] of whole texts, by configuration: their padding differs."""
    made = {}
    for name, folder in folders.items():
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        marking = Labelling.of(tokenizer, classes)
        made[name] = load_tokens([source], tokenizer, count * LENGTH, LENGTH, marking=marking)
    return made


def theirs(folder: Path, network, windows_NL: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    ids_NL = network.seen(windows_NL)
    with torch.no_grad():
        return model.eval()(ids_NL, attention_mask=(ids_NL != network.decoder.pad).long()).logits


def test_a_window_is_a_text_with_its_class(folders):
    marking = Labelling.of(transformers.AutoTokenizer.from_pretrained(folders["bert"]), CLASSES)
    assert marking == Labelling((CLS,), (SEP,), PAD, CLASSES)
    assert marking([7, 8], 2, 6) == [~2, 7, 8, SEP, PAD, PAD] and marking([7, 8, 9, 10], 0, 4) == [~0, 7, 8, SEP]
    assert [marking.number(label, "here") for label in (1, "novel")] == [1, 1]
    where_P, labels_P = predictions(torch.tensor(marking([7], 1, 5)))
    assert where_P.tolist() == [0] and labels_P.tolist() == [1]
    for label in (3, -1, "Novel", None, True, 1.0):
        with pytest.raises(DataError, match="expected the class of the text, its number or one of article, novel, nei"):
            marking.number(label, "here")


@classifiers
def test_torch_and_onnx_compute_what_transformers_does(folders, name, windows, tmp_path):
    teacher, windows_NL = load_teacher(folders[name]), windows[name]
    network = teacher.network
    assert network.decoder.classes == 3 and {site.kind for site in network.sites.values()} == {
        "embedding",
        "attention",
        "ffn",
    }
    assert 0 < int((windows_NL[:4] == network.decoder.pad).sum()) < 4 * LENGTH - 8
    wanted_NC = theirs(folders[name], network, windows_NL[:4])
    with torch.no_grad():
        assert error(network.model(network.seen(windows_NL[:4])).numpy(), wanted_NC.numpy()) < 1e-5
    alone = [network.window_logits(ids_L.numpy()) for ids_L in windows_NL[:4]]
    assert error(torch.cat(alone).numpy(), wanted_NC.numpy()) < 1e-5
    plan = full_plan(network.decoder, "fp32", "fp32")
    save_folder(Bank(tmp_path / "bank", network, windows_NL[:4], windows_NL[:2]).realize(plan), teacher, tmp_path)
    session, ids_NL = open_session(tmp_path / "model.onnx", threads=1), network.seen(windows_NL[:4])
    mask_NL = (ids_NL != network.decoder.pad).long()
    found_NC = session.run(None, {"input_ids": ids_NL.numpy(), "attention_mask": mask_NL.numpy()})[0]
    assert found_NC.shape == (4, 3) and error(found_NC, wanted_NC.numpy()) < 1e-5
    limit = fixed_bytes(network.decoder) + sum(s.size_bytes(plan[s.name]) for s in network.decoder.sites())
    assert exported_bytes(tmp_path) <= limit


@classifiers
def test_padding_changes_nothing(folders, name, windows, tmp_path):
    """Statistics, reconstruction and training on windows with and without twice the padding."""
    teacher, short_NL = load_teacher(folders[name]), windows[name][:8]
    network = teacher.network
    # nothing rounded: codes would flip at the last bit of a sum
    plan = Plan(tuple((site, Action(a.keep, "fp32")) for site, a in mixed_plan(network.decoder).items()))
    long_NL = torch.cat([short_NL, torch.full_like(short_NL, network.decoder.pad)], 1)
    found = []
    for place, given_NL in enumerate((short_NL, long_NL)):
        bank = Bank(tmp_path / str(place), network, given_NL, given_NL[:2])
        student = reconstruct(bank, plan, given_NL)
        settings = Settings(steps=2, warmup=0, check_every=1)
        imitation = partial(Imitation, network, tokens_NL=given_NL, windows=2, together=2)
        imitation = partial(imitation, hidden_weight=1.0, attention_weight=1.0)
        _, curve = distill(network, student, imitation, given_NL[4:], settings, tmp_path / "part")
        sites = [site for site in network.sites.values() if site.layer is not None]
        told = bank.statistics()
        moments = {name: told.second_moment(name) for name in ["head.in", *(read for s in sites for read in s.inputs)]}
        moments |= {matrix.name: told.fisher(matrix.name) for site in sites for matrix in site.matrices}
        found.append((moments, Reference(network, given_NL).kl(loaded(network, student)), curve.training))
    (moments, kl, training), (others, other_kl, other_training) = found
    for key, tensor in moments.items():
        torch.testing.assert_close(others[key], tensor, rtol=1e-3, atol=1e-6, msg=key)
    assert other_kl == pytest.approx(kl, rel=0.01)
    assert other_training[0]["loss"] == pytest.approx(training[0]["loss"], rel=0.01)


@classifiers
def test_a_compressed_student_is_scored_recovered_exported_and_loaded(folders, name, windows, tmp_path):
    teacher, windows_NL = load_teacher(folders[name]), windows[name]
    network, plan = teacher.network, mixed_plan(teacher.network.decoder)
    bank = Bank(tmp_path / "bank", network, windows_NL[:8], windows_NL[:2])
    score = Executor(bank, windows_NL[8:16]).score(plan)
    assert 0 < score.kl < 20
    rebuilt = reconstruct(bank, plan, windows_NL[:8])
    settings = Settings(steps=2, warmup=0, check_every=1)
    student, curve = distill(
        network,
        rebuilt,
        lambda copy: Imitation(network, copy, windows_NL[16:20]),
        windows_NL[20:],
        settings,
        tmp_path / "part",
    )
    assert len(curve.training) == 2
    check_whole_cache(network, student, windows_NL[16:20], tmp_path / "cache")
    save_folder(student, teacher, tmp_path / "onnx")
    exact, ids_L = loaded(network, student, "none"), network.seen(network.written(windows_NL[20]))
    wanted_1C = exact.window_logits(ids_L.numpy()).numpy()
    with OnnxDecoder(tmp_path / "onnx", threads=1, exact=True) as model:
        assert error(model.logits(ids_L.numpy()), wanted_1C) < 1e-4
    with OnnxDecoder(tmp_path / "onnx", threads=1) as model:
        deployed_1C = model.logits(ids_L.numpy())
    again = compressor.load(tmp_path / "onnx")
    with torch.no_grad():
        assert again(ids_L[None]).shape == (1, 3) and error(again(ids_L[None]).numpy(), deployed_1C) < 0.05
    limit = fixed_bytes(network.decoder) + sum(s.size_bytes(plan[s.name]) for s in network.decoder.sites())
    assert exported_bytes(tmp_path / "onnx") <= limit


def test_in_torch_where_padding_is_token_0(tmp_path):
    """As BERT's is: texts that only take time are not made of it."""
    config = transformers.BertConfig(**BERT | {"pad_token_id": 0}, num_labels=3)
    write_model(transformers.AutoModelForSequenceClassification, config, tmp_path / "model")
    encoder_tokenizer(pad_token_id=0).save_pretrained(tmp_path / "model")
    teacher, ids_NL = load_teacher(tmp_path / "model"), torch.randint(1, 250, (4, 24))
    plan = full_plan(teacher.network.decoder, "int8row", "fp16")
    student = Bank(tmp_path / "bank", teacher.network, ids_NL, ids_NL[:2]).realize(plan)
    save_folder(student, teacher, tmp_path / "torch", "torch")
    target = Target("torch", "cpu", "float32", 1, 16, 16)
    with runtime("torch").open_model(tmp_path / "torch") as model, opened_torch(teacher.network, target) as whole:
        assert model.logits(ids_NL[0].numpy()).shape == (1, 3)
        model.rehearse(16)
        for calls in (model.bench_callables(16, 16), whole):
            assert torch.isfinite(calls.prefill()).all() and torch.isfinite(calls.decode()).all()


def test_accuracy_and_f1():
    """Against their definitions, class by class; a class that neither texts nor answers have does not count."""
    rng = np.random.default_rng(0)
    texts, answers = rng.integers(0, 3, 50), rng.integers(0, 4, 50)
    table = torch.zeros(5, 5)
    for text, answer in zip(texts, answers, strict=True):
        table[text, answer] += 1
    scores = []
    for c in range(4):
        right = ((texts == c) & (answers == c)).sum()
        precision, recall = right / (answers == c).sum(), right / max((texts == c).sum(), 1)
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert answered(table) == pytest.approx(((texts == answers).mean(), np.mean(scores)))


def trained(folder: Path, labelled: Path, out: Path) -> Path:
    """A classifier that has learned to tell the texts apart."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    source = TextSource(file=str(labelled), label="class")
    windows_NL = load_tokens([source], tokenizer, 96 * LENGTH, LENGTH, marking=Labelling.of(tokenizer, CLASSES))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for ids_NL in windows_NL.split(16) * 4:
        seen_NL = ids_NL.where(ids_NL >= 0, CLS)
        model(seen_NL, attention_mask=(seen_NL != PAD).long(), labels=~ids_NL[:, 0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_a_whole_run(folders, labelled, tmp_path):
    folder = trained(folders["bert"], labelled, tmp_path / "trained")
    source = {"file": str(write_texts(tmp_path / "others.jsonl", seed=1)), "label": "class"}
    data = {
        "calibration": [{"file": str(labelled), "label": "class"}],
        "evaluation": [source],
        "sequence_length": LENGTH,
    }
    data |= {"calibration_tokens": 12 * LENGTH, "evaluation_tokens": 40 * LENGTH}
    wanted = recipe(
        folder, gate={"accuracy_ratio": 1.2}, budget={"bytes": "45%"}, data=data, search={"tokens": 8 * LENGTH}
    )
    report = pipeline.compress(wanted, tmp_path)
    assert report.parity.passed and report.budget[0].fits and report.task == "text-classification"
    teacher, fp32, _, student = report.rows
    assert fp32.kl < student.kl and fp32.accuracy == teacher.accuracy and fp32.f1 == teacher.f1
    network = load_teacher(folder).network
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    windows_NL = load_tokens(
        [TextSource(**source)], tokenizer, 40 * LENGTH, LENGTH, marking=Labelling.of(tokenizer, CLASSES)
    )
    answers_N = theirs(folder, network, windows_NL).argmax(-1)
    assert teacher.accuracy == pytest.approx(float((answers_N == ~windows_NL[:, 0]).float().mean()))
    with OnnxDecoder(tmp_path / "onnx", threads=1) as model:
        models = {"student": lambda ids_L: model.logits(network.seen(network.written(torch.from_numpy(ids_L))).numpy())}
        again = compare(network.window_logits, models, windows_NL.numpy(), predictions=predictions, classes=3)[
            "student"
        ]
    assert (student.accuracy, student.f1, student.kl) == (again.accuracy, again.f1, pytest.approx(again.kl))
    assert teacher.accuracy > 0.9 < student.accuracy
    (line,) = report.gate
    assert line.name == "accuracy_ratio" and line.passed and line.measured == teacher.accuracy / student.accuracy
    worse = replace(report, rows=(*report.rows[:3], replace(student, accuracy=0.8 * student.accuracy)))
    with pytest.raises(RegressionError, match="accuracy, teacher / student"):
        worse.check(baseline=report)
    assert {found.name for found in report.check(baseline=report)} >= {"accuracy_ratio", "perplexity_ratio", "prefill"}
    assert {sample.student for sample in report.samples} <= CLASSES.keys() and "[SEP]" in report.samples[0].prompt
    page, card = ((tmp_path / name).read_text() for name in ("report.md", "onnx/README.md"))
    assert (
        "The class of each text." in page
        and "accuracy | F1" in page
        and "text-classification" in card
        and "compress generate" not in card
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"text": "a", "class": "poem"},
            "line 1: expected the class of the text, its number or one of article, neither",
        ),
        ({"text": "a"}, "line 1: expected 'class', found text; name one of these as label"),
        ({"class": 1}, "line 1: expected 'text', found class; name one of these as column"),
    ],
)
def test_rows_without_a_text_or_class_are_refused(folders, tmp_path, row, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    source = {"file": str(path), "label": "class"}
    with pytest.raises(DataError, match=said):
        pipeline.compress(recipe(folders["bert"], data={"calibration": [source]}), tmp_path)


def test_labels_and_classifiers_belong_together(folders, tiny_folder, labelled, tmp_path):
    with pytest.raises(DataError, match="expected the classes of its texts; name the column that holds them as label"):
        pipeline.compress(recipe(folders["bert"]), tmp_path / "1")
    data = {"calibration": [{"file": str(labelled), "label": "class"}]}
    with pytest.raises(DataError, match="expected a classifier of texts, this model is none; leave label out"):
        pipeline.compress(recipe(tiny_folder, data=data), tmp_path / "2")
    with pytest.raises(RecipeError, match="expected a file of JSON lines"):
        recipe(tiny_folder, data={"calibration": [{"file": "a.txt", "label": "class"}]})


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("LlamaConfig", {"architectures": ["LlamaForSequenceClassification"]}, "a classifier of model_type 'llama'"),
        ("BertConfig", {"problem_type": "multi_label_classification"}, "problem_type 'multi_label_classification'"),
        ("BertConfig", {"num_labels": 1}, "num_labels = 1 .expected: at least 2"),
        ("BertConfig", {"pad_token_id": None}, "no pad_token_id"),
        ("ModernBertConfig", {"classifier_pooling": "mean"}, "classifier_pooling 'mean' .supported: cls"),
    ],
)
def test_classifiers_of_other_kinds_are_refused(tmp_path, kind, changes, said):
    config = getattr(transformers, kind)(**BERT | {"architectures": ["BertForSequenceClassification"]} | changes)
    config.save_pretrained(tmp_path)
    encoder_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=said):
        load_teacher(tmp_path)


def test_paddings_that_differ_are_refused(folders, tmp_path):
    transformers.AutoModelForSequenceClassification.from_pretrained(folders["bert"]).save_pretrained(tmp_path)
    encoder_tokenizer(pad_token_id=MASK).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"expected one padding token, config.json has {PAD}, the tokenizer {MASK}"):
        load_teacher(tmp_path)


def test_accuracy_is_asked_of_classifiers_alone(tiny_folder, tmp_path):
    with pytest.raises(RecipeError, match="gate.accuracy_ratio: expected a classifier, this one is none; leave it out"):
        pipeline.compress(recipe(tiny_folder, gate={"accuracy_ratio": 1.02}), tmp_path)
