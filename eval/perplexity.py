"""Perplexity and KL of a model on text. Knows logits only; whoever calls brings them.

Protocol: windows of L tokens that do not overlap; every token but a window's first is predicted from the window's
tokens before it, unless the caller says what is predicted; natural logarithm, mean over all predictions.
KL(teacher || model) is over the same predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Logits = Callable[[np.ndarray], np.ndarray | Tensor]
"""Token ids [L] -> logits [L, V]."""


@dataclass(frozen=True)
class Quality:
    """perplexity: exp of the mean negative log-likelihood; kl: KL(teacher || model), nats per prediction."""

    perplexity: float
    kl: float

    @classmethod
    def mean(cls, parts: Sequence[Quality]) -> Quality:
        """Over texts of the same number of predictions together."""
        return cls(
            math.exp(sum(math.log(q.perplexity) for q in parts) / len(parts)), sum(q.kl for q in parts) / len(parts)
        )


Predictions = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A window of token ids [L] -> (positions at which something is predicted, token ids that are), [P] each."""


def next_tokens(ids_L: Tensor) -> tuple[Tensor, Tensor]:
    """Every token but the first, at the position in front of it."""
    return torch.arange(len(ids_L) - 1, device=ids_L.device), ids_L[1:]


def compare(
    teacher: Logits,
    models: Mapping[str, Logits],
    windows_NL: np.ndarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
    predictions: Predictions = next_tokens,
) -> dict[str, Quality]:
    """Perplexity of the teacher (under the name `teacher`) and of every model, and their KL from it; computed where the
    teacher's logits lie.

    Args:
        windows_NL: int64 token ids.
    """
    nll = dict.fromkeys(["teacher", *models], 0.0)
    kl = dict.fromkeys(["teacher", *models], 0.0)
    count = 0
    for done, ids_L in enumerate(windows_NL):
        given_LV = torch.as_tensor(teacher(ids_L))
        where_P, targets_P = predictions(torch.as_tensor(ids_L, device=given_LV.device))
        log_p_PV = torch.log_softmax(given_LV[where_P], -1)
        nll["teacher"] -= _picked(log_p_PV, targets_P)
        p_PV = log_p_PV.exp()
        for name, logits in models.items():
            log_q_PV = torch.log_softmax(torch.as_tensor(logits(ids_L), device=given_LV.device)[where_P], -1)
            nll[name] -= _picked(log_q_PV, targets_P)
            # by position first: their sums are exact enough in float32
            kl[name] += float((p_PV * (log_p_PV - log_q_PV)).sum(-1).sum(dtype=torch.float64))
        count += len(where_P)
        progress(done + 1, len(windows_NL))
    return {name: Quality(math.exp(min(nll[name] / count, 700)), max(kl[name], 0.0) / count) for name in nll}


def _picked(log_p_PV: Tensor, targets_P: Tensor) -> float:
    """Sum of the log-probabilities that the text's own tokens got."""
    return float(log_p_PV.gather(1, targets_P[:, None]).sum(dtype=torch.float64))
