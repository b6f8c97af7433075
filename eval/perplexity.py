"""Perplexity and KL of a model on text. Knows arrays only; whoever calls brings the logits.

Protocol: windows of L tokens that do not overlap; every token but a window's first is predicted from the window's
tokens before it; natural logarithm, mean over all predictions. KL(teacher || model) is over the same predictions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Logits = Callable[[np.ndarray], np.ndarray]
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
    """Perplexity of the teacher (under the name `teacher`) and of every model, and their KL from it.

    Args:
        windows_NL: int64 token ids.
    """
    nll = dict.fromkeys(["teacher", *models], 0.0)
    kl = dict.fromkeys(["teacher", *models], 0.0)
    for done, ids_L in enumerate(windows_NL):
        log_p_LV = log_softmax(teacher(ids_L)[:-1])
        nll["teacher"] -= _picked(log_p_LV, ids_L)
        p_LV = np.exp(log_p_LV)
        for name, logits in models.items():
            log_q_LV = log_softmax(logits(ids_L)[:-1])
            nll[name] -= _picked(log_q_LV, ids_L)
            kl[name] += float(np.einsum("lv,lv->", p_LV, log_p_LV - log_q_LV, dtype=np.float64))
        progress(done + 1, len(windows_NL))
    count = windows_NL.shape[0] * (windows_NL.shape[1] - 1)
    return {name: Quality(math.exp(min(nll[name] / count, 700)), max(kl[name], 0.0) / count) for name in nll}


def log_softmax(logits_LV: np.ndarray) -> np.ndarray:
    """Logits -> log-probabilities, float32 [L, V]."""
    shifted = logits_LV - logits_LV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _picked(log_p_LV: np.ndarray, ids_L: Iterable[int]) -> float:
    """Sum of the log-probabilities that the text's own tokens got."""
    targets = np.asarray(ids_L)[1:]
    return float(log_p_LV[np.arange(len(targets)), targets].sum(dtype=np.float64))
