"""The whole job on the tiny model: every stage real, resumed, killed, deployed, loaded back."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import compressor
from compressor import Recipe, export, pipeline
from compressor.bank import Bank
from compressor.errors import (
    BudgetError,
    CompressorError,
    DataError,
    ModelError,
    RecipeError,
    RegressionError,
    RuntimeTargetError,
)
from compressor.estimate import dry_run
from compressor.export import OnnxDecoder, exported_bytes
from compressor.files import exclusive
from compressor.folder import save_folder
from compressor.latency import Latency, measure_latency, mixed_plan
from compressor.model import load_teacher
from compressor.plan import Action, Plan, Score
from compressor.progress import silent
from compressor.recover import _prompts, _teacher_cache, recover
from compressor.recovery.cache import TeacherCache
from compressor.recovery.distill import Imitation, visited
from compressor.recovery.rollouts import of_its_own
from compressor.run import Texts, start
from compressor.search import complete, spent
from compressor.stages import Stages
from eval.latency import Milliseconds
from policies.actor_critic import ActorCritic, Memory
from tests.conftest import TEXT


def recipe(tiny_folder: Path, **changes) -> Recipe:
    data = {
        "model": {"path": str(tiny_folder)},
        "data": {
            "calibration": [str(TEXT / "wiki-calibration.txt")],
            "evaluation": [str(TEXT / "wiki-evaluation.txt"), str(TEXT / "novel-evaluation.txt")],
            "calibration_tokens": 512,
            "evaluation_tokens": 256,
            "sequence_length": 64,
        },
        "target": {"device": "cpu", "threads": 1, "workload": {"prefill": 16, "context": 16}},
        "budget": {"bytes": "45%"},
        "search": {
            "evaluations": 6,
            "tokens": 128,
            "formats": ["fp32", "w8", "w4"],
            "ffn_keep": [1.0, 0.5, 0.0],
            "ffn_multiple": 32,
        },
        "distill": {"steps": 4, "batch_tokens": 128, "learning_rate": 1e-3, "warmup": 1},
    }
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value}
    return Recipe.from_dict(data)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """One run of the recipe: (folder, report, progress that was shown)."""
    out, shown = tmp_path_factory.mktemp("run"), []
    return out, pipeline.compress(recipe(tiny_folder), out, progress=shown.append), shown


def test_the_result_fits_the_budget_as_predicted(finished):
    out, report, _ = finished
    (line,) = report.budget
    assert line.name == "bytes" and line.fits
    assert line.measured == exported_bytes(out / "onnx") <= line.predicted <= line.limit
    assert line.measured > 0.7 * line.limit  # and uses it


def test_rows_are_measured(finished):
    out, report, _ = finished
    assert [row.role for row in report.rows] == ["teacher", "reference", "rival", "student"]
    for row in report.rows:
        assert row.perplexity > 1 and row.prefill_ms.median > 0 and row.decode_ms.median > 0
        assert list(row.texts) == ["wiki-evaluation", "novel-evaluation"]
        wiki, novel = (math.log(q.perplexity) for q in row.texts.values())
        # a token of the tiny model is a byte; one that begins or ends inside a letter is read as three
        assert row.texts["novel-evaluation"].bits_per_byte == pytest.approx(novel / math.log(2), rel=0.05)
        assert wiki != novel and math.log(row.perplexity) == pytest.approx((wiki + novel) / 2)
    teacher, fp32, uniform, student = report.rows
    assert fp32.perplexity == pytest.approx(teacher.perplexity, rel=1e-3) and fp32.kl < 1e-4
    assert student.size_bytes < 0.45 * fp32.size_bytes and uniform.size_bytes < 0.45 * fp32.size_bytes
    assert student.peak_memory_bytes > student.size_bytes
    assert json.loads((out / "report.json").read_text())["rows"][3]["kl"] == student.kl


def test_policies_had_the_same_budget_and_evaluations(finished):
    _, report, _ = finished
    by_policy: dict[str, list] = {}
    for trial in report.trials:
        by_policy.setdefault(trial.policy, []).append(trial)
    assert set(by_policy) == {"uniform", "dynamic_programming", "actor_critic"}
    assert all(trials[-1].index == 6 for trials in by_policy.values())
    assert all(trial.size_bytes <= report.budget[0].limit for trial in report.trials)
    assert {t.share for t in by_policy["actor_critic"]} == {0.125, 1.0}
    best = min((t for t in report.trials if t.share == 1.0), key=lambda t: t.kl)
    chosen = Plan(tuple((entry.site, Action(entry.keep, entry.format)) for entry in report.plan))
    assert chosen.digest == best.digest


def test_torch_and_onnx_runtime_agree(finished, tiny_folder):
    out, report, _ = finished
    assert report.parity.passed and report.parity.greedy_equal
    model = compressor.load(out / "onnx")
    ids = np.frombuffer((TEXT / "wiki-evaluation.txt").read_bytes()[:48], np.uint8).astype(np.int64)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)[None])[0].numpy()
    with OnnxDecoder(out / "onnx") as decoder:
        found = decoder.logits(ids)
    teacher = load_teacher(tiny_folder).network
    with torch.no_grad():
        plain = teacher.logits(teacher.hidden(torch.from_numpy(ids)[None]))[0].numpy()
    # a last bit may turn over a code of an activation, which moves all that is behind it
    missed, changed = (np.linalg.norm(logits - expected) / np.linalg.norm(expected) for logits in (found, plain))
    assert missed < 0.03 < changed  # it is the student, not the teacher


def test_half_precision(tiny_folder, tmp_path):
    """What a GPU takes, on the CPU: the default formats but int8, and everything measured in the same floats."""
    formats = {"formats": ["fp32", "int8", "w4"]}
    wanted = recipe(tiny_folder, target={"precision": "float16"}, search=formats, distill={"steps": 0})
    with pytest.raises(
        RuntimeTargetError, match=r"cannot run int8 \(ffn\) on cpu in float16: take them out of search.form"
    ):
        pipeline.compress(wanted, tmp_path)
    assert not (tmp_path / "bank").exists()
    del formats["formats"]
    data = wanted.to_dict()
    del data["search"]["formats"]
    report = pipeline.compress(Recipe.from_dict(data), tmp_path)
    assert report.recipe["search"]["formats"] == [
        *("fp32", "w8", "w4+w8", "w4b64+w8", "w4", "w4b64", "w2b64+w4b64", "w2", "w2b64"),
    ]
    assert report.parity.passed and report.budget[0].fits
    assert report.budget[0].measured == exported_bytes(tmp_path / "onnx") <= report.budget[0].predicted
    fp32 = report.rows[1]
    assert 0 < fp32.kl < 1e-4
    assert {v.dtype for v in compressor.load(tmp_path / "onnx").parameters()} == {torch.float32}


@pytest.mark.parametrize(("tokens", "shape"), [(128, (8, 16)), (512, (8, 64)), (512 + 128, (10, 64))])
def test_every_part_of_the_scoring_text_has_a_window(tiny_folder, tokens, shape):
    """Cut, where the tokens are few; held-out windows are whole, and nothing is taken twice."""
    wanted = recipe(tiny_folder, search={"tokens": tokens}, data={"calibration_tokens": 640})
    texts = Texts.read(wanted, load_teacher(tiny_folder).tokenizer)
    assert texts.score_NL.shape == shape and texts.held_out_NL.shape == (tokens // 64, 64)
    starts = [
        tuple(ids[:16].tolist()) for text in (texts.score_NL, texts.held_out_NL, texts.calibration_NL) for ids in text
    ]
    assert len(set(starts)) == len(starts) == shape[0] + tokens // 64 + 10
    assert torch.equal(texts.fitted_NL, texts.calibration_NL)


def test_recovery_may_see_more_text_and_never_what_decides(tiny_folder):
    wanted = recipe(tiny_folder, distill={"tokens": 64 * 40})
    texts = Texts.read(wanted, load_teacher(tiny_folder).tokenizer)
    assert texts.fitted_NL.shape == (40, 64) and texts.trained_NL.shape == (4 * 2, 64)
    deciding, fitted, trained = (
        {tuple(ids[:16].tolist()) for ids in windows}
        for windows in (torch.cat([texts.score_NL, texts.held_out_NL[:, :16]]), texts.fitted_NL, texts.trained_NL)
    )
    assert not deciding & (fitted | trained) and not fitted & trained


def test_a_batch_shorter_than_a_window_is_one_window(tiny_folder):
    wanted = recipe(tiny_folder, distill={"steps": 3, "batch_tokens": 16})
    texts = Texts.read(wanted, load_teacher(tiny_folder).tokenizer)
    assert wanted.batch_windows == 1 and texts.trained_NL.shape == (3, 64)


def test_the_same_call_again_computes_nothing(finished, tiny_folder, monkeypatch):
    out, report, _ = finished
    for name in (
        "compressor.pipeline.sensitivities",
        "compressor.run.Executor",
        "compressor.latency.time_models",
        "compressor.results.time_models",
        "compressor.recovery.reconstruct._fit",
        "compressor.recovery.distill.distill",
    ):
        monkeypatch.setattr(name, None)  # calling it would fail
    monkeypatch.setattr(export, "site_stack", pytest.fail)
    again = pipeline.compress(recipe(tiny_folder), out)
    assert again.to_dict() | {"stage_seconds": 0} == report.to_dict() | {"stage_seconds": 0}


def test_the_same_recipe_makes_the_same_bytes(finished, tiny_folder, tmp_path):
    """What is deployed, what is kept on the way, and what the agent learned; only times may differ."""
    out = finished[0]
    report = pipeline.compress(recipe(tiny_folder), tmp_path)
    assert [(t.digest, t.kl) for t in report.trials] == [(t.digest, t.kl) for t in finished[1].trials]
    ours, theirs = (
        {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path, out)
    )
    assert ours.keys() == theirs.keys()
    told = ("README.md", "agent.jsonl", "latency.json", "ledger.log", "report", "search.png", "quality.png", "stages/")
    same = [name for name in ours if not any(part in name for part in told)]
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "onnx/plan.json", "policy.safetensors"} <= set(same)
    assert sum(name.startswith("bank/") for name in same) > 20
    for name in same:
        assert ours[name].read_bytes() == theirs[name].read_bytes(), name


def test_rounds_of_the_agent_are_kept_over_a_kill_and_not_over_searches(tmp_path):
    def kept():
        return [(row["search"], row["seed"], row["scored"], row["best"]) for row in map(json.loads, path.open())]

    path = tmp_path / "agent.jsonl"
    pipeline.keep_rounds(path, "a", 0, [{"scored": 10, "best": -1.0}])
    pipeline.keep_rounds(path, "a", 1, [{"scored": 10, "best": -1.5}])
    pipeline.keep_rounds(path, "a", 0, [{"scored": 14, "best": -2.0}])
    assert kept() == [("a", 0, 10, -1.0), ("a", 1, 10, -1.5), ("a", 0, 14, -2.0)]
    pipeline.keep_rounds(path, "b", 0, [{"scored": 10, "best": -3.0}])
    assert kept() == [("b", 0, 10, -3.0)]


def test_a_longer_search_goes_on_from_the_ledger(finished, tiny_folder, tmp_path):
    out, report, _ = finished
    longer = recipe(tiny_folder, search={**recipe(tiny_folder).to_dict()["search"], "evaluations": 8})
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    again = pipeline.compress(longer, copy)
    ours, before = ([(t.digest, t.share) for t in r.trials if t.policy == "actor_critic"] for r in (again, report))
    assert ours[: len(before)] == before and len(ours) > len(before)


def test_an_earlier_run_at_another_budget_is_told_and_costs_nothing(finished, tiny_folder, tmp_path, monkeypatch):
    """And what it made is not made again: neither variants, nor sensitivities, nor the latency table."""
    out, _, _ = finished
    monkeypatch.setattr("policies.actor_critic.tempered", None)  # the warm-up's tries are known: calling it would fail
    for name in ("compressor.bank.collect", "compressor.pipeline.sensitivities", "eval.latency.measure_entry"):
        monkeypatch.setattr(name, None)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    search = {**recipe(tiny_folder).to_dict()["search"], "reuse": str(out), "rivals": ["dynamic_programming"]}
    again = pipeline.compress(recipe(tiny_folder, search=search, budget={"bytes": "50%"}), tmp_path / "again")
    assert all(trial.size_bytes <= again.budget[0].limit for trial in again.trials)
    ours = [trial for trial in again.trials if trial.policy == "actor_critic"]
    assert ours[-1].index == 6
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_scores_that_no_longer_fit_leave_what_was_learned_of_them(finished, tiny_folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(pipeline, "search", lambda run, problem, *brought: given.append(brought) or 1 / 0)
    search = {**recipe(tiny_folder).to_dict()["search"], "reuse": str(finished[0])}
    for budget in ("60%", "20%"):
        with pytest.raises(ZeroDivisionError):
            pipeline.compress(recipe(tiny_folder, search=search, budget={"bytes": budget}), tmp_path / budget)
    (larger, no_memory), (smaller, memory) = given
    assert len(larger) > 2 * len(smaller) and no_memory is None
    assert memory.families == Memory.read(finished[0] / "policy.safetensors").families


def test_what_an_earlier_run_found_comes_into_question(finished, tiny_folder, tmp_path):
    """Even where the search itself has no evaluation left for it."""
    out, report, _ = finished
    search = {**recipe(tiny_folder).to_dict()["search"], "reuse": str(out), "rivals": [], "evaluations": 1}
    again = pipeline.compress(recipe(tiny_folder, search=search), tmp_path / "again")
    assert [(e.keep, e.format) for e in again.plan] == [(e.keep, e.format) for e in report.plan]


def test_an_earlier_run_with_another_menu_leaves_its_memory(finished, tiny_folder, tmp_path, monkeypatch):
    out, _, _ = finished
    search = {"formats": ["fp32", "w8"], "reuse": str(out), "rivals": ["dynamic_programming"]}
    other, given = recipe(tiny_folder, search=search, budget={"bytes": "70%"}), []

    class Spy(ActorCritic):
        def __init__(self, problem, seed, memory):
            given.append(memory)
            super().__init__(problem, seed, memory=memory)

    monkeypatch.setattr(pipeline, "ActorCritic", Spy)
    run = start(other, tmp_path / "other", False, Stages(tmp_path / "stages", silent))
    problem = pipeline.pose(run, pipeline.find_sensitivities(run), measure_latency(run))
    pipeline.search(run, problem, *pipeline.reused(run))
    assert given[0].families == Memory.read(out / "policy.safetensors").families
    with pytest.raises(RecipeError, match="expected the folder of another run"):
        start(other, out, False, Stages(tmp_path / "stages", silent))
    (empty := tmp_path / "empty").mkdir()
    shutil.copy(out / "ledger.log", empty)
    with pytest.raises(RecipeError, match="search.reuse = .*expected a run of the same model, texts and menu"):
        pipeline.reused(replace(run, recipe=recipe(tiny_folder, search={**search, "reuse": str(empty)})))


def test_the_teacher_generates_calibration_text(tiny_folder, tmp_path, monkeypatch):
    """In turns with a file, only once, also where it was cut off, and not again for a run that reuses this one."""
    sources = [str(TEXT / "wiki-calibration.txt"), {"generated": 24 * 64}]
    data = {**recipe(tiny_folder).to_dict()["data"], "calibration": sources}
    asked, made, shown = [], [], []

    def begun(out: Path, **changes):
        return start(recipe(tiny_folder, data=data, **changes), out, False, Stages(out / "stages", shown.append)).texts

    def cut_off(*arguments, seed, report):
        asked.append(seed)
        if len(asked) == 2:
            raise KeyboardInterrupt
        made.append(of_its_own(*arguments, seed=seed, report=report))
        return made[-1]

    monkeypatch.setattr("compressor.recovery.rollouts.MOST_ROWS", 16)
    monkeypatch.setattr("compressor.run.of_its_own", cut_off)
    with pytest.raises(KeyboardInterrupt):
        begun(tmp_path / "a")
    texts = begun(tmp_path / "a")
    assert asked == [0, 16, 16]
    told = [progress.done for progress in shown if progress.stage == "generate" and progress.total == 24]
    assert set(range(16, 25)) < set(told) and told[-1] == 24
    generated = {tuple(window) for batch in made for window in batch.tolist()}
    for windows_NL, share in ((texts.calibration_NL, 0.5), (texts.held_out_NL, 0.5)):
        assert sum(tuple(window) in generated for window in windows_NL.tolist()) == share * len(windows_NL)
    reused = begun(tmp_path / "b", search={"reuse": str(tmp_path / "a")})
    assert len(asked) == 3 and torch.equal(reused.calibration_NL, texts.calibration_NL)
    data |= {"calibration": sources[1:], "calibration_tokens": 95 * 64}
    with pytest.raises(DataError, match="expected 10. windows .*found 24"):  # before it generates anything
        begun(tmp_path / "c")
    assert len(asked) == 3


def test_windows_begin_as_the_tokenizer_begins_texts(tiny_folder, tmp_path):
    """With its BOS token, say: that is how the student will be asked."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    written = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "!", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    begin = {"id": "!", "ids": [written["model"]["vocab"]["!"]], "tokens": ["!"]}
    written["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {"!": begin},
    }
    (folder / "tokenizer.json").write_text(json.dumps(written))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "once"}\n{"prompt": "twice"}\n')

    sources = [str(TEXT / "wiki-calibration.txt"), {"generated": 16 * 64}]
    asked = recipe(
        folder,
        data={"calibration": sources},
        distill={"rollouts": {"prompts": str(tmp_path / "prompts.jsonl"), "held_out": 1, "prompt_tokens": 3}},
    )
    run = start(asked, tmp_path / "run", False, Stages(tmp_path / "stages", silent))
    texts, (first,) = run.texts, begin["ids"]
    others = (texts.score_NL, texts.held_out_NL, texts.calibration_NL, texts.trained_NL, *texts.evaluation.values())
    assert all((windows_NL[:, 0] == first).all() for windows_NL in others)
    assert texts.score_NL.shape == (8, 16)
    tokenizer, file = run.teacher.tokenizer, Path(sources[0]).read_text()
    shown = [tokenizer.decode(window[1:]).strip("\ufffd") for window in texts.calibration_NL]
    assert 0 < sum(text in file for text in shown) < len(shown)  # the others are generated
    ((prompt,), _) = _prompts(run)
    assert prompt.tolist() == tokenizer("twice")["input_ids"][:1] + tokenizer("twice")["input_ids"][-3:]


def test_plans_that_turn_out_too_slow_are_passed_over(tiny_folder):
    """Among what was scored on all of the text, and by what is known of times when the search has ended."""
    plans = [Plan((("layers.0.ffn", Action(keep, "w4")),)) for keep in (8, 16, 32, 64)]
    kls = dict(zip(plans, (0.4, 0.3, 0.2, 0.1), strict=True))
    trials = {("random", 0): [(plan, Score(kl, 1.0, 8)) for plan, kl in kls.items()]}
    trials["random", 0].append((Plan((("layers.0.ffn", Action(4, "w4")),)), Score(0.05, 1.0, 8, part=0)))
    model = SimpleNamespace(predict=lambda plan: Milliseconds(float(plan["layers.0.ffn"].keep), 5.0))
    known = Latency(None, (), 0, {}, {"fp32": Milliseconds(40.0, 10.0)}, {})
    vars(known)["model"] = model
    for budget, fitting in (
        ({"prefill": "50%"}, [16, 8]),
        ({"prefill": "50%", "decode": "6 ms"}, [16, 8]),
        ({"prefill": "7 ms"}, [8]),
        ({"bytes": "50%"}, [64, 32, 16, 8]),
    ):
        run = SimpleNamespace(recipe=recipe(tiny_folder, budget={"bytes": None, **budget}))
        found = pipeline.within(run, known, complete(trials.values()))
        assert [plan["layers.0.ffn"].keep for plan in found] == fitting
        assert all(found[plan] == kls[plan] for plan in found)
    timed = replace(
        known, wholes={"searched-1": plans[1]}, measured={**known.measured, "searched-1": Milliseconds(21.0, 5.0)}
    )
    vars(timed)["model"] = model
    run = SimpleNamespace(recipe=recipe(tiny_folder, budget={"bytes": None, "prefill": "50%"}))
    assert list(pipeline.within(run, timed, complete(trials.values()))) == [plans[0]]  # it took more than was predicted


@dataclass(frozen=True)
class Corrected:
    """What is known of times when one plan turned out to take a hundred times as long as it was expected to."""

    slow: Plan
    before: Latency

    def expected(self, plan):
        return Milliseconds(*((100 if plan == self.slow else 1) * ms for ms in astuple(self.before.expected(plan))))

    def __getattr__(self, name):
        return getattr(self.before, name)


def test_a_search_goes_on_where_its_best_plan_turns_out_too_slow(finished, tiny_folder, tmp_path, monkeypatch):
    """With what is known of times by then, and of all that was scored; what it finds comes into question. Once, however
    often that is asked."""
    shutil.copytree(finished[0], tmp_path / "run")
    wanted = recipe(tiny_folder, budget={"bytes": "45%", "prefill": "3x"}, distill={"steps": 0})
    run = start(wanted, tmp_path / "run", False, Stages(tmp_path / "run" / "stages", silent))
    sensitivity, latency = pipeline.find_sensitivities(run), measure_latency(run)
    problem = pipeline.pose(run, sensitivity, latency)
    searches = pipeline.search(run, problem)
    before = {name: list(found) for name, found in searches.items()}
    first = min(complete(searches.values()).items(), key=lambda item: item[1])[0]

    def corrected(run, latency, propose, most):
        assert propose(latency) == propose(latency) == first and searches == before
        slow = Corrected(first, latency)
        assert propose(slow) == propose(slow)
        return slow

    monkeypatch.setattr(pipeline, "corrected", corrected)
    _, plans = pipeline.settle(run, latency, sensitivity, searches, [])
    ((name, seed),) = searches.keys() - before.keys()
    assert name == "actor_critic, with corrected times" and seed == wanted.search.seed
    found = searches[name, seed]
    asked = {plan for trials in before.values() for plan, score in trials if score.part is None}
    assert 0 < spent(found)[-1] <= max(1, round(0.25 * wanted.search.evaluations))
    assert first not in plans and {plan for plan, score in found if score.part is None} - asked <= set(plans)
    assert min(plans.values()) == next(iter(plans.values()))


def test_what_times_are_uncertain_by_is_left_free(finished, tiny_folder, tmp_path):
    """As long as any plan fits then."""
    shutil.copytree(finished[0] / "bank", tmp_path / "bank")
    wanted = recipe(tiny_folder, budget={"bytes": None, "prefill": "10x"})
    run = start(wanted, tmp_path, False, Stages(tmp_path / "stages", silent))
    sensitivity, known = pipeline.find_sensitivities(run), measure_latency(run)
    asked = 10 * known.fp32_ms.prefill
    for margin, limit in ((0.0, asked), (0.1 * asked, 0.9 * asked), (asked, asked)):
        uncertain = replace(known, margin=Milliseconds(margin, 0.0))
        assert pipeline.pose(run, sensitivity, uncertain).limits == {"prefill_ms": pytest.approx(limit)}


def test_under_a_limit_on_time_whole_models_are_measured(finished, tiny_folder, tmp_path):
    """Once before the search, and what it found; the next call measures nothing."""
    shutil.copytree(finished[0] / "bank", tmp_path / "bank")
    wanted = recipe(tiny_folder, budget={"bytes": "45%", "prefill": "10x"}, distill={"steps": 0})
    report = pipeline.compress(wanted, tmp_path)
    measured = [json.loads(path.read_text()) for path in sorted((tmp_path / "stages").glob("searched-*.json"))]
    assert 1 <= len(measured) <= 5 and all(ms > 0 for found in measured for ms in found["value"])
    line = next(line for line in report.budget if line.name == "prefill")
    assert line.fits and line.error > 0
    assert not list((tmp_path / "stages").glob("searched-*/"))
    assert pipeline.compress(wanted, tmp_path).to_dict() | {"stage_seconds": 0} == report.to_dict() | {
        "stage_seconds": 0
    }


@pytest.mark.parametrize(
    ("method", "decides", "own"),
    [("kd", "kl", set()), ("on_policy", "reverse_kl", {"value_error"}), ("rl", "cost", {"reward_vowels", "leash"})],
)
def test_every_method_recovers_a_plan(finished, tiny_folder, tmp_path, method, decides, own):
    out, report, _ = finished
    shutil.copytree(out, tmp_path / "run")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n} times"}) for n in range(6)))
    rollouts = {"prompt_tokens": 8, "new_tokens": 8, "held_out": 2, "prompts": str(tmp_path / "prompts.jsonl")}
    rl = {"rewards": {"fluency": 0.1, "vowels": 1.0}}
    wanted = recipe(tiny_folder, distill={"method": method, "rollouts": rollouts, "rl": rl})
    stages = Stages(tmp_path / "run" / "stages", lambda progress: None)
    rewards = {"vowels": lambda prompt, text: sum(letter in "aeiou" for letter in text) / max(1, len(text))}
    run = start(wanted, tmp_path / "run", False, stages, rewards)
    plan = Plan(tuple((entry.site, Action(entry.keep, entry.format)) for entry in report.plan))
    recovery = recover(run, plan, 2)
    assert recovery.curve.decides == decides and len(recovery.curve.training) == 2
    assert own <= {name for told in recovery.curve.training for name in told}
    assert recovery.kl == dict(recovery.curve.held_out)[recovery.curve.kept_step]["kl"]
    again = recover(run, plan, 2)
    assert again.curve == recovery.curve and again.student.plan == plan


def test_the_teacher_is_asked_once_for_finalists_and_student(finished, tiny_folder, tmp_path, monkeypatch):
    out, report, _ = finished
    shutil.copytree(out, tmp_path / "run")
    # more steps than there is text, so that all of it is visited, again and again
    settings = {"steps": 5, "batch_tokens": 192, "top_k": 16}
    plan = Plan(tuple((entry.site, Action(entry.keep, entry.format)) for entry in report.plan))
    made, beside, shown = [], [], []
    make, stages = TeacherCache.make, Stages(tmp_path / "run" / "stages", shown.append)

    def spy(cache, teacher, *rest):
        before = {path.name for path in cache._files if path.exists()}
        make(cache, teacher, *rest)
        made.append((len(cache._places), len(cache._files) - len(before)))

    monkeypatch.setattr(TeacherCache, "make", spy)
    run = start(recipe(tiny_folder, distill=settings), tmp_path / "run", False, stages)
    trained_NL = run.texts.trained_NL
    ask = Imitation.updates

    def updates(objective, step):
        with objective.teacher.watch_outputs(["head"]) as said:
            yield from ask(objective, step)
        beside.append(len(said))

    monkeypatch.setattr(Imitation, "updates", updates)
    short = recover(run, plan, 2, "finalist-1")
    long = recover(run, plan, 5)
    assert made == [(len(trained_NL), 1), (len(trained_NL), 0)] and beside == [0] * 7
    assert len(short.curve.training) == 2 and len(long.curve.training) == 5
    assert "teacher-cache" in {progress.stage for progress in shown} and stages.seconds["teacher-cache"] > 0
    texts = replace(run.texts, trained_NL=trained_NL.roll(1, 1))
    recover(replace(run, texts=texts), plan, 2)
    assert (
        made[-1] == (len(trained_NL), 1) and len(list((tmp_path / "run" / "stages" / "teacher-cache").iterdir())) == 1
    )


def test_only_windows_that_are_visited_are_asked_about(tmp_path):
    text_NL = torch.arange(20).view(10, 2)
    wanted = SimpleNamespace(top_k=1, steps=3, seed=2, temperature=1.0)
    run = SimpleNamespace(
        recipe=SimpleNamespace(distill=wanted, batch_windows=2, micro_batch_windows=1),
        texts=SimpleNamespace(trained_NL=text_NL),
        out=tmp_path,
        stages=Stages(tmp_path, silent),
        bank=SimpleNamespace(key="bank"),
        teacher=SimpleNamespace(network=None),
    )
    seen = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TeacherCache, "make", lambda cache, *_: seen.append(set(cache._places)))
        _teacher_cache(run, 1)
    assert seen == [{visited(10, n, 2) for n in range(6)}] and len(seen[0]) == 6


def test_prompts_are_pieces_of_other_text_than_those_that_decide(tiny_folder):
    rollouts = {"prompt_tokens": 10, "new_tokens": 12, "held_out": 3}
    wanted = recipe(tiny_folder, distill={"method": "on_policy", "rollouts": rollouts})
    teacher = load_teacher(tiny_folder)
    texts = Texts.read(wanted, teacher.tokenizer)
    trained, held_out = _prompts(SimpleNamespace(recipe=wanted, texts=texts, teacher=teacher))
    assert len(held_out) == 3 and len(trained) == 2 * len(texts.trained_NL)
    assert torch.equal(trained[1], texts.trained_NL[0, 22:32]) and torch.equal(held_out[0], texts.held_out_NL[0, :10])
    assert not {tuple(p.tolist()) for p in trained} & {tuple(p.tolist()) for p in held_out}


def test_a_killed_run_ends_like_an_undisturbed_one(finished, tiny_folder, tmp_path):
    """SIGKILL in the middle of the search and again later; everything that does not depend on times is the same."""
    out, report, _ = finished
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(tiny_folder).to_dict()))
    script = (
        "import json, sys\nfrom pathlib import Path\nfrom compressor import Recipe, compress\n"
        "compress(Recipe.from_dict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]),"
        " progress=lambda p: print(p.stage, flush=True))"
    )
    killed = tmp_path / "killed"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    for stage in ("search: dynamic_programming", "reconstruct", "distill"):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(path), str(killed)], stdout=subprocess.PIPE, text=True, env=environment
        )
        for line in process.stdout:
            if line.startswith(stage):
                time.sleep(0.02)
                process.send_signal(signal.SIGKILL)
                break
        assert process.wait() == -signal.SIGKILL
    # the undisturbed run's latency table: a budget in bytes does not depend on it, the problem's numbers do
    again = pipeline.compress(recipe(tiny_folder), killed)
    assert [t.digest for t in again.trials if t.policy != "x"] == [t.digest for t in report.trials]
    assert [t.kl for t in again.trials] == [t.kl for t in report.trials]
    assert again.plan == report.plan and again.recovery == report.recovery
    assert (killed / "onnx" / "model.onnx_data").read_bytes() == (out / "onnx" / "model.onnx_data").read_bytes()


def test_a_folder_takes_one_run_at_a_time(finished, tiny_folder):
    out, report, _ = finished
    with exclusive(out), pytest.raises(CompressorError, match="another run is at work in it"):
        pipeline.compress(recipe(tiny_folder), out)
    assert pipeline.compress(recipe(tiny_folder), out).plan == report.plan


def test_activations_that_are_not_finite_are_named(tiny_folder, tmp_path):
    teacher = load_teacher(tiny_folder)
    with torch.no_grad():
        teacher.network.matrix("layers.1.ffn.up").mul_(float("nan"))
    bank = Bank(tmp_path, teacher.network, torch.zeros(2, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ModelError, match=r"the teacher's at layers\.1\.ffn\.out are not"):
        bank.statistics()


def test_the_gate_raises_after_everything_is_written(finished, tiny_folder):
    out, _, _ = finished
    with pytest.raises(RegressionError, match="1 of 1 checks missed(.|\n)*perplexity, student / teacher"):
        pipeline.compress(recipe(tiny_folder, gate={"perplexity_ratio": 0.5}), out)
    assert json.loads((out / "report.json").read_text())["gate"][0]["passed"] is False


def weightless(folder: Path, tmp_path: Path) -> Path:
    """A model's folder without its weights."""
    bare = tmp_path / "bare"
    return shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)


def test_an_impossible_budget_is_refused(finished, tiny_folder, tmp_path):
    """Of bytes before anything is loaded, by a dry run as well; of time when times are known."""
    for begin in (lambda asked: pipeline.compress(asked, tmp_path), dry_run):
        with pytest.raises(BudgetError, match="budget.bytes = .*: expected at least .*, what the smallest plan"):
            begin(recipe(tiny_folder, model={"path": str(weightless(tiny_folder, tmp_path))}, budget={"bytes": "1%"}))
    with pytest.raises(BudgetError, match="prefill_ms: limit .*, smallest reachable"):
        pipeline.compress(recipe(tiny_folder, budget={"prefill": "0.1us"}), finished[0])


def test_a_menu_without_the_whole_site(tiny_folder, tmp_path):
    search = {**recipe(tiny_folder).to_dict()["search"], "ffn_keep": [0.5]}
    found = pipeline.compress(recipe(tiny_folder, search=search), tmp_path)
    assert {2 * entry.keep for entry in found.plan if entry.kind == "ffn"} == {128}


def test_progress_is_shown_for_every_stage(finished):
    _, report, shown = finished
    stages = list(dict.fromkeys(progress.stage for progress in shown))
    for name in (
        "statistics",
        "sensitivity-fisher",
        "latency",
        "search: actor_critic",
        "distill",
        "export",
        "quality",
        "timing",
    ):
        assert name in stages
    assert any(stage.startswith("reconstruct-") for stage in stages)
    assert set(report.stage_seconds) <= {*stages, "search"}


def test_a_dry_run_reads_no_weights_and_tells_the_sizes(tiny_folder, finished, tmp_path):
    told = dry_run(recipe(weightless(tiny_folder, tmp_path)))
    assert len(told.sites) == 7 and told.bytes_smallest < told.bytes_budget < told.bytes_largest
    _, report, _ = finished
    assert told.bytes_budget == pytest.approx(report.budget[0].limit, rel=0.03)
    assert all(stage.seconds >= 0 for stage in told.stages)


def test_finalists_are_compared_after_a_recovery_and_seeds_by_their_plans(finished, tiny_folder, tmp_path):
    """Two searches of one policy; three of their plans are trained, the one that recovered best is the student's."""
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    found = pipeline.compress(
        recipe(tiny_folder, search={"rivals": ["uniform"], "seeds": 2}, distill={"finalists": 3, "finalist_steps": 2}),
        out,
    )
    first, *others = found.finalists
    assert len(others) == 2 and first.recovered_kl == min(f.recovered_kl for f in found.finalists)
    student = Plan.from_json((out / "onnx" / "plan.json").read_text())
    assert first.digest == student.digest and first.other_sites == 0
    assert all(10 * f.other_sites >= len(student) for f in others)
    kls = {trial.digest: trial.kl for trial in found.trials if trial.share == 1.0}
    assert all(f.kl == kls[f.digest] and f.recovered_kl != f.kl for f in found.finalists)
    assert {trial.policy for trial in found.trials} == {"uniform", "actor_critic, seed 0", "actor_critic, seed 1"}
    assert {entry.same for entry in found.plan} <= {0.0, 0.5, 1.0}
    page = (out / "report.md").read_text()
    assert "### Finalists" in page and "| next better | same |" in page


def test_another_uniform_plan_is_measured_anew(finished, tiny_folder, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)

    def other(run, problem, trials, student):
        folders = export(run, problem, trials, student)
        drawn = mixed_plan(run.menu, problem.sites, np.random.default_rng(0))
        save_folder(run.bank.realize(drawn), run.teacher, folders["uniform"])
        return folders

    export = pipeline.export
    monkeypatch.setattr(pipeline, "export", other)
    before, after = finished[1].rows, pipeline.compress(recipe(tiny_folder), out).rows
    assert after[2].size_bytes != before[2].size_bytes and after[2].kl != before[2].kl
    assert after[3].kl == before[3].kl


def test_the_report_says_what_the_next_better_action_would_have_cost(finished):
    _, report, _ = finished
    best = [entry for entry in report.plan if entry.next_better is None]
    others = [entry for entry in report.plan if entry.next_better]
    assert others and len(best) < len(report.plan)
    for entry in others:
        assert entry.next_better.sensitivity < entry.sensitivity
        assert entry.next_better.extra["bytes"] > -entry.size_bytes and entry.next_better.action


def test_the_plan_beside_the_weights_is_the_reports(finished):
    out, report, _ = finished
    plan = Plan.from_json((out / "onnx" / "plan.json").read_text())
    assert [(e.site, e.keep, e.format) for e in report.plan] == [(n, a.keep, a.format) for n, a in plan.items()]
