"""Relations of a self-attention: how alike its queries are to one another, its keys, its values. They compare attentions of
other numbers of heads, which a pruned student has.

    R = softmax(A A^T / sqrt(d))        A [L, d]: what one relation head has of the queries, keys or values of a text

The loss is KL(R_T || R_S), the mean over tokens, relation heads and queries, keys, values.

Source: Wang et al. 2021, "MiniLMv2", section 3: vectors of all heads one behind the other, split into as many relation heads
for both. Departures: the mean of the three relations in place of a sum; vectors as the matrices give them, before they are
rotated and normalized; in causal models, too, a token is related to all of its text, since nothing is predicted from a
relation; teacher and student are compared in the same block, the last whose attention the student has.

Shape letters: B batch, L tokens, I a matrix's outputs, R relation heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.network import Network

RELATION_HEADS = 8
"""Of an attention, if that divides its widths; else one."""

HIDDEN = -1e4
"""A score that leaves nothing of a token, and yet is a number."""


def related(student: Network) -> tuple[str, ...]:
    """The matrices whose outputs are compared; none where the student has no attention left."""
    kept = [n for n in range(student.decoder.layers) if not student.module(f"layers.{n}.attention").dropped]
    return tuple(f"layers.{kept[-1]}.attention.{matrix}" for matrix in "qkv") if kept else ()


def relation_kl(given_BLI: Tensor, wanted_BLI: Tensor, blank_BL: Tensor | None = None) -> Tensor:
    """KL from the relations of `wanted_BLI` to those of `given_BLI`, in nats per token; blank_BL: tokens that are none."""
    sides = given_BLI, wanted_BLI
    heads = 1 if any(side.shape[-1] % RELATION_HEADS for side in sides) else RELATION_HEADS
    log_q_BRLL, log_p_BRLL = (_relations(side, heads, blank_BL) for side in sides)
    kl_BLR = (log_p_BRLL.exp() * (log_p_BRLL - log_q_BRLL)).sum(-1).mT
    return kl_BLR.mean() if blank_BL is None else kl_BLR[~blank_BL].mean()


def _relations(x_BLI: Tensor, heads: int, blank_BL: Tensor | None) -> Tensor:
    x_BRLd = x_BLI.unflatten(-1, (heads, -1)).transpose(1, 2)
    scores_BRLL = x_BRLd @ x_BRLd.mT / x_BRLd.shape[-1] ** 0.5
    if blank_BL is not None:
        scores_BRLL = scores_BRLL.masked_fill(blank_BL[:, None, None], HIDDEN)
    return torch.log_softmax(scores_BRLL, -1)
