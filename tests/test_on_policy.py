"""Distillation on the student's own text: right on a toy whose optimum is known, helpful on the tiny model, resumable."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import compressor.recovery.distill
from compressor.network import Network, loaded
from compressor.plan import DROP, Format, Plan
from compressor.quantize import quantize
from compressor.recovery.distill import Imitation, Settings, distill
from compressor.recovery.on_policy import OnPolicy, ValueHead
from compressor.recovery.on_policy import Settings as Own
from compressor.recovery.rollouts import (
    Rollouts,
    Writer,
    distinct,
    entropy,
    judged,
    of_its_own,
    repetition,
    reverse_kl,
    sampled,
    write,
)
from compressor.student import Student, full_plan

TOKENS, LENGTH = 3, 3
PREFIXES = [prefix for n in range(LENGTH + 1) for prefix in product(range(TOKENS), repeat=n)]


class Toy:
    """Texts of three tokens out of three, behind an empty prompt (token 0). The hidden state is the whole prefix, one-hot;
    `logits_PV` gives every prefix its logits."""

    device = torch.device("cpu")
    decoder = SimpleNamespace(hidden=len(PREFIXES))

    def logits_PV(self) -> torch.Tensor:
        raise NotImplementedError

    def hidden(self, ids_BL: torch.Tensor) -> torch.Tensor:
        rows = [[PREFIXES.index(tuple(ids[1 : i + 1])) for i in range(len(ids))] for ids in ids_BL.tolist()]
        return torch.eye(len(PREFIXES))[torch.tensor(rows)]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden @ self.logits_PV()

    def generate(self, ids_BL, new_tokens, pick, ends=()):
        with torch.no_grad():
            for _ in range(new_tokens):
                ids_BL = torch.cat([ids_BL, pick(self.logits(self.hidden(ids_BL))[:, -1])[:, None]], 1)
        return ids_BL


class Teacher(Toy):
    def __init__(self, seed: int):
        self.table_PV = 2 * torch.randn(len(PREFIXES), TOKENS, generator=torch.Generator().manual_seed(seed))

    def logits_PV(self):
        return self.table_PV


class Bigram(Toy):
    """Knows the last token alone, so that no choice of it follows the teacher everywhere."""

    def __init__(self):
        self.table_VV = nn.Parameter(torch.zeros(TOKENS + 1, TOKENS))
        self.last_P = torch.tensor([prefix[-1] + 1 if prefix else 0 for prefix in PREFIXES])

    def logits_PV(self):
        return self.table_VV[self.last_P]


def of_texts(teacher: Toy, student: Toy) -> torch.Tensor:
    """KL(student || teacher) of whole texts, over all of them."""
    log_p_PV, log_q_PV = (torch.log_softmax(toy.logits_PV(), -1) for toy in (teacher, student))
    total = torch.zeros(())
    for text in product(range(TOKENS), repeat=LENGTH):
        places = [(PREFIXES.index(text[:i]), text[i]) for i in range(LENGTH)]
        log_p, log_q = (sum(table[place] for place in places) for table in (log_p_PV, log_q_PV))
        total = total + log_q.exp() * (log_q - log_p)
    return total


def optimum(teacher: Toy) -> float:
    student = Bigram()
    optimizer = torch.optim.Adam([student.table_VV], lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        (found := of_texts(teacher, student)).backward()
        optimizer.step()
    return float(found.detach())


def trained(teacher: Toy, discount: float) -> float:
    student = Bigram()
    writer = Writer(teacher, student, [torch.tensor([0])], [], LENGTH)
    objective = OnPolicy(writer, None, Own(rollouts=32, share=1.0, discount=discount))
    actor = torch.optim.Adam([student.table_VV], lr=0.03)
    critic = torch.optim.Adam(objective.parameters.values(), lr=0.05)
    for step in range(300):
        for told in objective.updates(step):
            assert told.keys() == {"loss", "reverse_kl", "value_error", "entropy"}
            for optimizer in (actor, critic):
                optimizer.step()
                optimizer.zero_grad()
    return float(of_texts(teacher, student).detach())


@pytest.mark.parametrize("seed", [1, 2])
def test_a_tabular_student_finds_the_best_distribution_over_texts(seed):
    """With what a token leads to it ends at the optimum of the reverse KL of texts; without it, above."""
    teacher = Teacher(seed)
    best = optimum(teacher)
    far, near = trained(teacher, discount=1.0), trained(teacher, discount=0.0)
    assert best <= far < best + 0.02
    assert near > far + 0.02


def test_the_advantage_is_the_error_of_the_value_one_step_on(tiny):
    """Against the same formulas token by token, in a text that ends and in one that is cut off."""
    student, end = tiny.copy(), 7
    with torch.no_grad():
        student.matrix("layers.1.ffn.down").mul_(0.5)
    ids_BL = torch.tensor([[1, 2, 3, end, 5], [1, 2, 4, 6, 8]])
    rollouts = Rollouts(ids_BL, 2, torch.tensor([[True, True, False], [True, True, True]]))
    objective = OnPolicy(Writer(tiny, student, [], [], ends=(end,)), None, Own(discount=0.8))
    with torch.no_grad():
        objective.value.weight.normal_()
        loss, told = objective.losses(rollouts)
        log_p, log_q = (torch.log_softmax(n.logits(n.hidden(ids_BL)), -1) for n in (tiny, student))
        value = objective.value(student.hidden(ids_BL))
    kls, advantages, picked = [], [], []
    for row, place in [(0, 1), (0, 2), (1, 1), (1, 2), (1, 3)]:
        kls.append(float((log_q[row, place].exp() * (log_q[row, place] - log_p[row, place])).sum()))
        ended = ids_BL[row, place + 1] == end
        ahead = 0.0 if ended else 0.8 * float(value[row, place + 1])
        advantages.append(-kls[-1] + ahead - float(value[row, place]))
        picked.append(float(log_q[row, place, ids_BL[row, place + 1]]))
    squared = np.mean(np.square(advantages))
    centred = np.array(advantages) - np.mean(advantages)
    assert float(loss) == pytest.approx(np.mean(kls) - np.mean(picked * centred) + squared, rel=1e-4)
    assert float(told["value_error"]) == pytest.approx(squared, rel=1e-4)
    assert float(told["reverse_kl"]) == pytest.approx(np.mean(kls), rel=1e-4)


@pytest.fixture
def student(tiny) -> Student:
    """Coarse, and the attention of the first block is gone."""
    changes = {"layers.0.attention": DROP}
    plan = Plan(tuple((n, changes.get(n, a)) for n, a in full_plan(tiny.decoder, "w2b64", "w8").items()))
    matrices = {
        matrix.name: quantize(tiny.matrix(matrix.name), Format.parse(plan[site.name].format))
        for site in tiny.sites.values()
        for matrix in site.matrices
        if plan[site.name].keep
    }
    gone = "layers.0.attention.norm"
    return Student(tiny.decoder, plan, matrices, {n: v for n, v in tiny.vectors().items() if n != gone})


def test_a_cache_changes_no_token(tiny, student, windows):
    """Not with the first attention gone, from which a cache takes its length, nor in batches, nor in training."""
    for network in (
        tiny,
        loaded(tiny, student),
        compressor.recovery.distill.Trained(loaded(tiny, student), student, "scales").network,
    ):
        ids_BL = windows[:3, :9]
        for _ in range(12):
            with torch.no_grad():
                last_BV = network.logits(network.hidden(ids_BL)[:, -1])
            ids_BL = torch.cat([ids_BL, last_BV.argmax(-1)[:, None]], 1)
        assert torch.equal(network.generate(windows[:3, :9], 12, lambda z_BV: z_BV.argmax(-1)), ids_BL)
        assert network.greedy(windows[1, :9], 12) == ids_BL[1, 9:].tolist()
        third = int(ids_BL[1, 11])
        first = ids_BL[1, 9:].tolist().index(third)
        assert network.greedy(windows[1, :9], 12, ends=[third]) == ids_BL[1, 9 : 10 + first].tolist()


def test_what_is_written_is_sampled_from_the_network_and_counts_to_its_end(tiny, windows):
    prompts = [windows[0, :5], windows[1, :8], windows[2, :5]]
    again = write(tiny, prompts, 6, seed=1)
    for ours, theirs, other in zip(
        write(tiny, prompts, 6, seed=1), again, write(tiny, prompts, 6, seed=2), strict=True
    ):
        assert torch.equal(ours.ids_BL, theirs.ids_BL) and not torch.equal(ours.ids_BL, other.ids_BL)
    assert [(len(r.ids_BL), r.prompt) for r in again] == [(2, 5), (1, 8)]
    many = write(tiny, [windows[0, :8]] * 2400, 1, seed=0)
    assert max(len(r.ids_BL) for r in many) <= 16
    found_V = torch.bincount(torch.cat([r.new_BN for r in many])[:, 0], minlength=256) / 2400
    expected_V = torch.softmax(tiny.logits(tiny.hidden(windows[:1, :8])[0, -1]), -1)
    assert float((found_V - expected_V).abs().sum()) < 0.3 < float((found_V - 1 / 256).abs().sum())
    ends = set(torch.cat([r.new_BN[:, 2] for r in again]).tolist())
    for rollouts in write(tiny, prompts, 6, seed=1, ends=ends):
        for row, new_N in zip(rollouts.rows(), rollouts.new_BN.tolist(), strict=True):
            last = next((i for i, token in enumerate(new_N) if token in ends), len(new_N) - 1)
            assert row == new_N[: last + 1]


def test_draws_follow_the_probabilities_and_never_what_has_none():
    p_V = torch.tensor([0.0, 0.5, 0.0, 0.125, 0.375, 0.0])
    ids_B = sampled(p_V.expand(40_000, 6), torch.Generator().manual_seed(0))
    assert ids_B.dtype == torch.int64
    found_V = torch.bincount(ids_B, minlength=6) / 40_000
    assert (found_V - p_V).abs().max() < 0.01 and found_V[p_V == 0].sum() == 0
    sure_B = sampled(torch.eye(6), torch.Generator().manual_seed(0))
    assert sure_B.tolist() == [0, 1, 2, 3, 4, 5]


def test_prompts_of_a_step_are_each_drawn_once_a_pass(windows):
    prompts = [torch.tensor([n]) for n in range(6)]
    writer = Writer(None, None, prompts, [])
    seen = [int(p) for step in range(3) for p in writer.drawn(4, step)]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


def test_a_text_in_the_teachers_eyes(tiny, student, windows):
    network = loaded(tiny, student)
    written = write(network, [windows[0, :5], windows[1, :5]], 8, seed=0)
    told, of_itself = judged(tiny, network, written), judged(tiny, tiny, written)
    assert told["reverse_kl"] > 0.1 and of_itself["reverse_kl"] == pytest.approx(0, abs=1e-6)
    assert told["likelihood"] == of_itself["likelihood"] < 0
    assert told["distinct_2"] == np.mean([distinct(row) for row in written[0].rows()])


def test_repetition_distinct_and_entropy_by_hand():
    assert distinct([1, 2, 1, 2, 1], 2) == 2 / 4 and distinct([1], 2) == 1.0
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4], 4) == pytest.approx(1 / 5)
    assert entropy([1, 2, 3]) == pytest.approx(1.0) and entropy([1, 1, 1]) == 0.0 and entropy([5]) == 1.0
    assert entropy([1, 1, 2, 2]) == pytest.approx(0.5)


def on_policy(teacher: Network, windows: torch.Tensor, share: float = 0.5):
    def make(network: Network) -> OnPolicy:
        text = Imitation(teacher, network, windows[:12])
        writer = Writer(teacher, network, list(windows[:12, :8]), list(windows[20:, :8]), new_tokens=12)
        return OnPolicy(writer, text, Own(rollouts=6, share=share, discount=0.5))

    return make


SETTINGS = Settings(steps=24, train="scales", learning_rate=0.3, warmup=2, check_every=8)


def test_windows_that_a_network_generates(tiny, tiny_folder):
    """They begin with words of all kinds, and are likelier to the network than a random one."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    with torch.no_grad():
        tiny.model.embedding.weight *= 4  # or all tokens are alike to it
    ids_BL = of_its_own(tiny, tokenizer, rows=20, length=24, seed=1)
    assert ids_BL.shape == (20, 24) and ids_BL.dtype == torch.int64 and len(ids_BL[:, 0].unique()) > 15
    assert not set(ids_BL[:, 0].tolist()) & set(tokenizer.all_special_ids)
    assert torch.equal(ids_BL, of_its_own(tiny, tokenizer, 20, 24, seed=1))
    assert not torch.equal(ids_BL, of_its_own(tiny, tokenizer, 20, 24, seed=2))

    def likelihood(ids_BL: torch.Tensor) -> float:
        log_p_BLV = torch.log_softmax(tiny.logits(tiny.hidden(ids_BL[:, :-1])), -1)
        return float(log_p_BLV.gather(-1, ids_BL[:, 1:, None]).mean())

    with torch.no_grad():
        assert likelihood(ids_BL) > likelihood(torch.randint(tiny.decoder.vocabulary, (20, 24))) + 0.5


def test_the_student_writes_more_as_the_teacher_would(tiny, student, windows, tmp_path):
    make = on_policy(tiny, windows)
    better, curve = distill(tiny, student, make, windows[20:], SETTINGS, tmp_path / "part")
    before, kept = curve.held_out[0][1], dict(curve.held_out)[curve.kept_step]
    assert curve.decides == "reverse_kl" and kept["reverse_kl"] < 0.8 * before["reverse_kl"]
    again = make(loaded(tiny, better)).held_out()
    assert again == pytest.approx({name: kept[name] for name in again}, rel=1e-3)
    own = [told.keys() == {"loss", "reverse_kl", "value_error", "entropy", "gradient_norm"} for told in curve.training]
    assert own == [False, True] * 12


def test_a_run_that_was_cut_off_ends_as_if_it_had_not_been(tiny, student, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(compressor.recovery.distill, "CHECKPOINT_SECONDS", 0)
    settings = replace(SETTINGS, steps=6, check_every=2)

    def run(checkpoint, progress=lambda done, total, message: None):
        return distill(tiny, student, on_policy(tiny, windows, 1.0), windows[20:], settings, checkpoint, progress)

    def stop(done, total, message):
        if done == 5:
            raise KeyboardInterrupt

    whole, curve = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", stop)
    resumed, again = run(tmp_path / "part")
    assert again == curve
    assert all(torch.equal(tensor, resumed.tensors()[name]) for name, tensor in whole.tensors().items())


def test_the_value_head_starts_at_nothing_and_does_not_see_the_size_of_a_state():
    value, states = ValueHead(8), torch.randn(2, 3, 8)
    assert torch.equal(value(states), torch.zeros(2, 3))
    nn.init.normal_(value.weight)
    torch.testing.assert_close(value(states), value(5 * states))


def test_reverse_kl_by_hand():
    q, p = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.25, 0.75]]])
    assert float(reverse_kl(q.log(), p.log())) == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(0.5 / 0.75))
