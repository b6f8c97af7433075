"""Perplexity and KL of a model on text. Knows logits only; whoever calls brings them.

Protocol: windows of L tokens that do not overlap; every token but a window's first is predicted from the window's
tokens before it; natural logarithm, mean over all predictions. KL(teacher || model) is over the same predictions.
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


def compare(
    teacher: Logits,
    models: Mapping[str, Logits],
    windows_NL: np.ndarray,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Quality]:
    """Perplexity of the teacher (under the name `teacher`) and of every model, and their KL from it; computed where the
    teacher's logits lie.

    Args:
        windows_NL: int64 token ids.
    """
    nll = dict.fromkeys(["teacher", *models], 0.0)
    kl = dict.fromkeys(["teacher", *models], 0.0)
    for done, ids_L in enumerate(windows_NL):
        log_p_LV = torch.log_softmax(torch.as_tensor(teacher(ids_L))[:-1], -1)
        targets_L = torch.as_tensor(ids_L[1:], device=log_p_LV.device)
        nll["teacher"] -= _picked(log_p_LV, targets_L)
        p_LV = log_p_LV.exp()
        for name, logits in models.items():
            log_q_LV = torch.log_softmax(torch.as_tensor(logits(ids_L), device=log_p_LV.device)[:-1], -1)
            nll[name] -= _picked(log_q_LV, targets_L)
            # by position first: their sums are exact enough in float32
            kl[name] += float((p_LV * (log_p_LV - log_q_LV)).sum(-1).sum(dtype=torch.float64))
        progress(done + 1, len(windows_NL))
    count = windows_NL.shape[0] * (windows_NL.shape[1] - 1)
    return {name: Quality(math.exp(min(nll[name] / count, 700)), max(kl[name], 0.0) / count) for name in nll}


def _picked(log_p_LV: Tensor, targets_L: Tensor) -> float:
    """Sum of the log-probabilities that the text's own tokens got."""
    return float(log_p_LV.gather(1, targets_L[:, None]).sum(dtype=torch.float64))
