"""Reinforcement learning towards a reward: the equations, the leash, the rewards, and a reward that is learned."""

import json
from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from compressor import pipeline
from compressor.errors import DataError, RecipeError
from compressor.model import load_teacher
from compressor.plan import Format
from compressor.quantize import quantize
from compressor.recovery.distill import Settings, distill
from compressor.recovery.reinforce import Reinforce, clipped_gain
from compressor.recovery.reinforce import Settings as Rl
from compressor.recovery.reward import Judge, Written, check_rewards, fluency, informativeness, relevance
from compressor.recovery.rollouts import ROWS, Rollouts, Writer, write
from compressor.student import Student, full_plan
from compressor.text import load_prompts
from tests.test_pipeline import recipe

SETTINGS = Settings(steps=18, train="weights", learning_rate=1e-2, warmup=0, check_every=6)


@pytest.fixture
def teacher(tiny_folder):
    return load_teacher(tiny_folder)


@pytest.fixture
def student(teacher) -> Student:
    network, plan = teacher.network, full_plan(teacher.network.decoder, "w4", "w8")
    matrices = {
        matrix.name: quantize(network.matrix(matrix.name), Format.parse(plan[site.name].format))
        for site in network.sites.values()
        for matrix in site.matrices
    }
    return Student(network.decoder, plan, matrices, network.vectors())


def reinforce(teacher, windows, judge, **changes):
    settings = Rl(**{"prompts": 2, "group": 8, **changes})

    def make(network) -> Reinforce:
        writer = Writer(teacher.network, network, list(windows[:8, :6]), list(windows[8:, :6]), new_tokens=8)
        return Reinforce(writer, judge, settings)

    return make


def vowels(prompt: str, text: str) -> float:
    """Share of the letters a to m, of which a text of random bytes has few."""
    return sum("a" <= letter <= "m" for letter in text) / max(len(text), 1)


def test_a_reward_of_the_users_own_is_learned_and_a_leash_holds_it_back(teacher, student, windows, tmp_path):
    judge = Judge(teacher, {"vowels": 1.0}, {"vowels": vowels})
    found = {}
    for name, leash in {"free": 0.0, "held": 3.0}.items():
        make = reinforce(teacher, windows, judge, leash=leash, target_kl=0.05)
        _, curve = distill(teacher.network, student, make, windows[20:], SETTINGS, tmp_path / name)
        found[name] = [curve.held_out[0][1], curve.held_out[-1][1]]
        assert curve.decides == "cost" and {"reward_vowels", "likelihood", "repetition_4"} < curve.held_out[0][1].keys()
    (before, free), (_, held) = found["free"], found["held"]
    assert free["reward"] > before["reward"] + 0.1
    assert held["reverse_kl"] < 0.5 * free["reverse_kl"] and held["kl"] < free["kl"]
    assert free["cost"] == pytest.approx(-free["reward"]) and held["cost"] == pytest.approx(
        3 * held["reverse_kl"] - held["reward"]
    )


def test_the_leash_is_tightened_above_its_target_and_loosened_below(teacher, windows):
    judge = Judge(teacher, {"fluency": 1.0}, {})
    for target, factor in ((1e-9, 1.1), (1e9, 0.9)):
        objective = reinforce(teacher, windows, judge, leash=0.5, target_kl=target)(deepcopy(teacher.network))
        objective.writer.network.model.requires_grad_(True)
        with torch.no_grad():
            objective.writer.network.matrix("layers.0.ffn.down").mul_(0.5)
        told = list(objective.updates(0))
        assert [t["leash"] for t in told] == [0.5, 0.5] and objective.state["leash"] == pytest.approx(0.5 * factor)
    free = reinforce(teacher, windows, judge)(objective.writer.network)
    told = list(free.updates(0))
    assert free.state["target_kl"] == told[0]["reverse_kl"] and free.state["leash"] == pytest.approx(0.1)


@pytest.mark.parametrize("group", [8, 17])
def test_a_first_update_follows_the_advantages_of_the_group(teacher, windows, group):
    """At weight 1 the gradient is that of - mean log pi(a | s) A; a group of equal rewards teaches nothing. One of more rows
    than run together is still one group."""
    judge = Judge(teacher, {"vowels": 1.0}, {"vowels": vowels})
    settings = {"leash": 0.0, "prompts": 1, "group": group, "epochs": 1}
    objective = reinforce(teacher, windows, judge, **settings)(deepcopy(teacher.network))
    weight = objective.writer.network.matrix("layers.1.ffn.down").requires_grad_(True)
    next(objective.updates(0))
    found, weight.grad = weight.grad, None
    matches = []
    for prompt in objective.writer.prompts:
        ours = write(objective.writer.network, [prompt] * group, 8, seed=0)
        assert len(ours) == 1 + group // ROWS
        rewards = torch.cat([judge(some, some.picked(some.log_probabilities(teacher.network)))[0] for some in ours])
        advantage = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        picked = torch.cat([some.picked(some.log_probabilities(objective.writer.network)) for some in ours])
        (-picked * advantage[:, None]).mean().backward()
        matches.append(torch.allclose(weight.grad, found, rtol=1e-3, atol=1e-6))
        weight.grad = None
    assert sum(matches) == 1
    equal = Judge(teacher, {"same": 1.0}, {"same": lambda prompt, text: 0.5})
    objective.judge = equal
    next(objective.updates(1))
    assert float(weight.grad.abs().max()) < 1e-6


def test_what_goes_beyond_the_clip_gains_nothing_more():
    ratio, advantage = torch.tensor([0.5, 1.0, 1.5, 0.5, 1.5]), torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    expected = torch.tensor([0.5, 1.0, 1.2, -0.8, -1.5])
    assert torch.allclose(clipped_gain(ratio, advantage, 0.2), expected)


def test_rewards_by_hand():
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    written = Written([0], [0, 1, 0, 1], torch.tensor([-1.0, -2.0, -3.0, -4.0]), embedding)
    assert fluency(written) == -2.5
    assert informativeness(written) == pytest.approx((2 / 4 + 2 / 3 + 0.5) / 3)
    assert relevance(written) == pytest.approx(0.5**0.5)
    assert relevance(replace(written, ids=[2])) == pytest.approx(-1.0)


def test_a_judge_weighs_its_rewards(teacher, windows):
    own = {"length": lambda prompt, text: float(len(text))}
    rollouts = Rollouts(windows[:2, :10], 6, torch.tensor([[True] * 4, [True, True, False, False]]))
    picked = rollouts.picked(rollouts.log_probabilities(teacher.network))
    total, parts = Judge(teacher, {"fluency": 0.5, "length": 2.0}, own)(rollouts, picked)
    expected = [0.5 * float(picked[0].mean()) + 2 * 4, 0.5 * float(picked[1, :2].mean()) + 2 * 2]
    assert total.tolist() == pytest.approx(expected)
    assert parts["reward_length"] == 3.0 and parts.keys() == {"reward_fluency", "reward_length"}


def test_rewards_without_a_function_are_refused_before_any_work(tiny_folder, tmp_path):
    for names, own, match in [
        (["wit"], {}, r"rewards\.wit: expected one of fluency, informativeness, relevance"),
        (["fluency"], {"fluency": vowels}, "rename"),
    ]:
        with pytest.raises(RecipeError, match=match):
            check_rewards(names, own)
    check_rewards(["fluency", "wit"], {"wit": vowels})
    wanted = recipe(tiny_folder, distill={"method": "rl", "batch_tokens": 256, "rl": {"rewards": {"wit": 1.0}}})
    with pytest.raises(RecipeError, match="wit"):
        pipeline.compress(wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_prompts_from_a_file(teacher, tmp_path):
    path = tmp_path / "prompts.jsonl"
    teacher.tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    lines = [{"prompt": "Once upon a time"}, {"messages": [{"role": "user", "content": "Hi"}]}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    plain, chat = load_prompts(str(path), teacher.tokenizer, 40)
    assert teacher.tokenizer.decode(plain) == "Once upon a time"
    assert teacher.tokenizer.decode(chat) == "<user>Hi<assistant>"
    assert teacher.tokenizer.decode(load_prompts(str(path), teacher.tokenizer, 4)[0]) == "time"


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 1: expected JSON"),
        ('{"text": "a"}', "line 1: expected .*prompt"),
        ('{"prompt": ""}', "at least one token"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "give a text instead"),
    ],
)
def test_lines_that_are_no_prompts(teacher, tmp_path, line, match):
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(DataError, match=match):
        load_prompts(str(path), teacher.tokenizer, 40)
