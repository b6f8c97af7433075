"""What a network writes behind prompts, what it looks like, and what the teacher says of it.

Sources: distinct-n, Li et al. 2016, "A Diversity-Promoting Objective Function"; repetition (seq-rep-n), Welleck et al. 2020,
"Neural Text Generation with Unlikelihood Training".

Shape letters: B rows, P tokens of a prompt, N new tokens, L = P + N, V vocabulary, D hidden.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.network import Network
from compressor.recovery.distill import visited
from compressor.student import Decoder
from compressor.text import around

ROWS = 16
"""Rows that run together at most: their logits over the vocabulary lie in memory several times."""
CACHES, MOST_ROWS = 2_000_000_000, 64
"""Bytes of the caches of rows that are written together and not judged, and how many there are at most."""


@dataclass(frozen=True)
class Rollouts:
    """Rows that were written behind prompts of one length.

    ids_BL: int64; prompt: P; live_BN: whether a new token counts, which those behind a row's end token do not.
    """

    ids_BL: Tensor
    prompt: int
    live_BN: Tensor

    @property
    def new_BN(self) -> Tensor:
        return self.ids_BL[:, self.prompt :]

    def states(self, network: Network) -> Tensor:
        """The final hidden states in which the new tokens were chosen, and the one behind the last, [B, N + 1, D]."""
        return network.hidden(self.ids_BL)[:, self.prompt - 1 :]

    def log_probabilities(self, network: Network) -> Tensor:
        """Of every token at every choice: [B, N, V]."""
        return torch.log_softmax(network.logits(self.states(network)[:, :-1]), -1)

    def picked(self, log_p_BNV: Tensor) -> Tensor:
        """Those of the new tokens: [B, N]."""
        return log_p_BNV.gather(-1, self.new_BN[..., None])[..., 0]

    def mean(self, x_BN: Tensor) -> Tensor:
        """Over the tokens that count."""
        return x_BN[self.live_BN].mean()

    def rows(self) -> list[list[int]]:
        """The new tokens that count, row by row."""
        return [new_N[live_N].tolist() for new_N, live_N in zip(self.new_BN, self.live_BN, strict=True)]


def write(
    network: Network,
    prompts: Sequence[Tensor],
    new_tokens: int,
    seed: int,
    ends: Collection[int] = (),
    together: int = ROWS,
    report: Callable[[], None] = lambda: None,
) -> list[Rollouts]:
    """Continue every prompt [P] by sampling at temperature 1.

    ends: ids of tokens that end a text. together: prompts of one length that run at once, at most. report: called behind
    every token of these.
    """
    generator = torch.Generator(network.device).manual_seed(seed)

    def pick(logits_BV: Tensor) -> Tensor:
        ids_B = sampled(torch.softmax(logits_BV, -1), generator)
        report()
        return ids_B

    by_length: dict[int, list[Tensor]] = {}
    for prompt_P in prompts:
        by_length.setdefault(len(prompt_P), []).append(prompt_P)
    written = []
    for length, alike in by_length.items():
        for prompts_BP in torch.stack(alike).split(together):
            ids_BL = network.generate(prompts_BP, new_tokens, pick, ends)
            ended_BN = torch.isin(ids_BL[:, length:], torch.tensor(list(ends), device=ids_BL.device))
            live_BN = ended_BN.cumsum(1) - ended_BN.long() == 0
            written.append(Rollouts(ids_BL, length, live_BN))
    return written


def sampled(p_BV: Tensor, generator: torch.Generator) -> Tensor:
    """A token id for every row of probabilities, int64 [B]. By the inverse of the distribution: one random number a row,
    where `torch.multinomial` draws one for every token of the vocabulary, a third of the time of a forward pass."""
    below_BV = p_BV.cumsum(-1, dtype=torch.float64)
    drawn_B1 = torch.rand(len(p_BV), 1, generator=generator, device=p_BV.device, dtype=torch.float64)
    return torch.searchsorted(below_BV, drawn_B1 * below_BV[:, -1:], right=True)[:, 0]


def cache_bytes(decoder: Decoder, length: int) -> int:
    """Of one row of so many tokens, in float32."""
    return 4 * length * 2 * decoder.kv_heads * decoder.head_dim * decoder.layers


def rows_at_once(decoder: Decoder, length: int) -> int:
    """How many windows `of_its_own` may be asked for: a token of many takes hardly longer than one of a few."""
    return max(1, min(MOST_ROWS, CACHES // cache_bytes(decoder, length)))


def of_its_own(
    network: Network,
    tokenizer: Any,
    rows: int,
    length: int,
    seed: int,
    report: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Windows [rows, length] that a network writes from nothing, all at once: what its tokenizer puts in front of a text, a
    random token, and what is sampled at temperature 1.

    As Liu et al. 2023, "LLM-QAT", and Williams et al. 2024, "Self-calibration for Language Model Quantization and Pruning",
    have it, but with no token chosen greedily and none that ends a text: behind one the next text begins.

    report: told how long they are, again and again.
    """
    words = {*range(network.decoder.vocabulary)} & {*tokenizer.get_vocab().values()} - {*tokenizer.all_special_ids}
    before, _ = around(tokenizer)
    firsts = np.random.default_rng(seed).choice(sorted(words), rows).tolist()
    prompts = [torch.tensor([*before, word]) for word in firsts]
    lengths = itertools.count(len(prompts[0]) + 1)
    new_tokens = length - len(prompts[0])
    (written,) = write(network, prompts, new_tokens, seed, together=rows, report=lambda: report(next(lengths)))
    return written.ids_BL.cpu()


@dataclass(frozen=True)
class Writer:
    """A student in training that writes behind prompts, and its teacher.

    prompts: token ids [P]; held_out: others, by whose continuations it is judged. new_tokens: of every text, at most. ends:
    ids of tokens that end one. seed: of the prompts' order and of what is written.
    """

    teacher: Network
    network: Network
    prompts: Sequence[Tensor]
    held_out: Sequence[Tensor]
    new_tokens: int = 32
    ends: Collection[int] = ()
    seed: int = 0

    def drawn(self, count: int, step: int) -> list[Tensor]:
        """The prompts of one step: every pass over them has an order of its own."""
        return [self.prompts[visited(len(self.prompts), step * count + i, self.seed)] for i in range(count)]

    def write(self, prompts: Sequence[Tensor], number: int) -> list[Rollouts]:
        """The number-th time that it writes in a training; see `write`."""
        return write(self.network, prompts, self.new_tokens, self.seed * 1_000_003 + number, self.ends)

    def look(self) -> tuple[dict[str, float], list[Rollouts], list[Tensor]]:
        """What is `judged` of what it writes behind the held-out prompts, always with the same random numbers; that, and
        the teacher's log-probabilities of its tokens [B, N]."""
        written = write(self.network, self.held_out, self.new_tokens, 0, self.ends)
        told, picked = _judged(self.teacher, self.network, written)
        return told, written, picked


def judged(teacher: Network, network: Network, written: Sequence[Rollouts]) -> dict[str, float]:
    """What a network wrote, in the teacher's eyes and in itself; means over tokens or rows.

    reverse_kl: KL(network || teacher) of the next token, in nats; likelihood: the teacher's log-probability of what was
    written, in nats a token; distinct_2, repetition_4: the functions of these names.
    """
    return _judged(teacher, network, written)[0]


@torch.no_grad()
def _judged(teacher: Network, network: Network, written: Sequence[Rollouts]) -> tuple[dict[str, float], list[Tensor]]:
    kl, picked, rows = [], [], []
    for rollouts in written:
        log_p_BNV, log_q_BNV = rollouts.log_probabilities(teacher), rollouts.log_probabilities(network)
        kl.append(reverse_kl(log_q_BNV, log_p_BNV)[rollouts.live_BN])
        picked.append(rollouts.picked(log_p_BNV))
        rows += rollouts.rows()
    likelihood = [picked_BN[rollouts.live_BN] for picked_BN, rollouts in zip(picked, written, strict=True)]
    told = {
        "reverse_kl": float(torch.cat(kl).mean()),
        "likelihood": float(torch.cat(likelihood).mean()),
        "distinct_2": float(np.mean([distinct(row) for row in rows])),
        "repetition_4": float(np.mean([repetition(row) for row in rows])),
    }
    return told, picked


def add(told: dict[str, float], said: Mapping[str, float], share: float) -> None:
    """Add a share of some measures to those that were told."""
    for name, value in said.items():
        told[name] = told.get(name, 0.0) + share * float(value)


def reverse_kl(log_q_BNV: Tensor, log_p_BNV: Tensor) -> Tensor:
    """KL(q || p) over the vocabulary, nats, [B, N]."""
    return (log_q_BNV.exp() * (log_q_BNV - log_p_BNV)).sum(-1)


def distinct(tokens: Sequence[int], n: int = 2) -> float:
    """Different n-grams over all n-grams, in (0, 1]; 1 for a text shorter than n."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that were there before, in [0, 1): one less distinct-n, at the n that tells loops."""
    return 1 - distinct(tokens, n)


def entropy(tokens: Sequence[int]) -> float:
    """Entropy of a text's own token frequencies over that of as many different tokens, in [0, 1]; 1 below two tokens."""
    if len(tokens) < 2:
        return 1.0
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    return -sum(share * math.log(share) for share in shares) / math.log(len(tokens))


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
