"""What a network writes behind prompts, and what the teacher says of it.

Shape letters: B rows, P tokens of a prompt, N new tokens, L = P + N, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from compressor.distill import visited
from compressor.model import Network
from eval.generation import distinct, repetition

ROWS = 16
"""Rows that run together at most: their logits over the vocabulary lie in memory several times."""


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
    network: Network, prompts: Sequence[Tensor], new_tokens: int, seed: int, ends: Collection[int] = ()
) -> list[Rollouts]:
    """Continue every prompt [P] by sampling at temperature 1; prompts of one length run together, at most `ROWS`.

    ends: ids of tokens that end a text.
    """
    generator = torch.Generator(network.device).manual_seed(seed)

    def pick(logits_BV: Tensor) -> Tensor:
        return torch.multinomial(torch.softmax(logits_BV, -1), 1, generator=generator)[:, 0]

    by_length: dict[int, list[Tensor]] = {}
    for prompt_P in prompts:
        by_length.setdefault(len(prompt_P), []).append(prompt_P)
    written = []
    for length, alike in by_length.items():
        for prompts_BP in torch.stack(alike).split(ROWS):
            ids_BL = network.generate(prompts_BP, new_tokens, pick, ends)
            ended_BN = torch.isin(ids_BL[:, length:], torch.tensor(list(ends), device=ids_BL.device))
            live_BN = ended_BN.cumsum(1) - ended_BN.long() == 0
            written.append(Rollouts(ids_BL, length, live_BN))
    return written


def drawn(prompts: Sequence[Tensor], count: int, step: int, seed: int) -> list[Tensor]:
    """The prompts of one step: every pass over them has an order of its own."""
    return [prompts[visited(len(prompts), step * count + i, seed)] for i in range(count)]


@torch.no_grad()
def judged(teacher: Network, network: Network, written: Sequence[Rollouts]) -> dict[str, float]:
    """What a network wrote, in the teacher's eyes and in itself; means over tokens or rows.

    reverse_kl: KL(network || teacher) of the next token, in nats; likelihood: the teacher's log-probability of what was
    written, in nats a token; distinct_2, repetition_4: `eval.generation`.
    """
    kl, likelihood, rows = [], [], []
    for rollouts in written:
        log_p_BNV, log_q_BNV = rollouts.log_probabilities(teacher), rollouts.log_probabilities(network)
        kl.append(reverse_kl(log_q_BNV, log_p_BNV)[rollouts.live_BN])
        likelihood.append(rollouts.picked(log_p_BNV)[rollouts.live_BN])
        rows += rollouts.rows()
    return {
        "reverse_kl": float(torch.cat(kl).mean()),
        "likelihood": float(torch.cat(likelihood).mean()),
        "distinct_2": float(np.mean([distinct(row) for row in rows])),
        "repetition_4": float(np.mean([repetition(row) for row in rows])),
    }


def reverse_kl(log_q_BNV: Tensor, log_p_BNV: Tensor) -> Tensor:
    """KL(q || p) over the vocabulary, nats, [B, N]."""
    return (log_q_BNV.exp() * (log_q_BNV - log_p_BNV)).sum(-1)
