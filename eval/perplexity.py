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

POSITIONS = 32
"""That are compared at once: logits of a window over many tokens are large."""

Logits = Callable[[np.ndarray], np.ndarray | Tensor]
"""Token ids [L] -> logits [L, V]."""


@dataclass(frozen=True)
class Quality:
    """perplexity: exp of the mean negative log-likelihood; kl: KL(teacher || model), nats per prediction. Of classifiers also
    accuracy, the share of right answers, and f1: the mean over classes of 2 P R / (P + R), with precision P and recall R."""

    perplexity: float
    kl: float
    accuracy: float | None = None
    f1: float | None = None

    @classmethod
    def mean(cls, parts: Sequence[Quality]) -> Quality:
        """Over texts of the same number of predictions together; f1 is the texts' mean."""

        def over(values: Sequence[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return sum(known) / len(known) if known else None

        return cls(
            math.exp(sum(math.log(q.perplexity) for q in parts) / len(parts)),
            sum(q.kl for q in parts) / len(parts),
            over([q.accuracy for q in parts]),
            over([q.f1 for q in parts]),
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
    classes: int = 0,
) -> dict[str, Quality]:
    """Perplexity of the teacher (under the name `teacher`) and of every model, and their KL from it; computed where the
    teacher's logits lie.

    Args:
        windows_NL: int64 token ids.
        classes: of a classifier, which has accuracy and F1 too.
    """
    nll = dict.fromkeys(["teacher", *models], 0.0)
    kl = dict.fromkeys(["teacher", *models], 0.0)
    answers_CC = {name: torch.zeros(classes, classes) for name in nll}
    count = 0
    for done, ids_L in enumerate(windows_NL):
        given_LV = torch.as_tensor(teacher(ids_L))
        where_P, targets_P = predictions(torch.as_tensor(ids_L, device=given_LV.device))
        for name in nll:
            found_LV = given_LV if name == "teacher" else torch.as_tensor(models[name](ids_L), device=given_LV.device)
            for where_B, targets_B in zip(where_P.split(POSITIONS), targets_P.split(POSITIONS), strict=True):
                log_q_BV = torch.log_softmax(found_LV[where_B], -1)
                if name != "teacher":
                    log_p_BV = torch.log_softmax(given_LV[where_B], -1)
                    # by position first: their sums are exact enough in float32
                    kl[name] += float((log_p_BV.exp() * (log_p_BV - log_q_BV)).sum(-1).sum(dtype=torch.float64))
                nll[name] -= _picked(log_q_BV, targets_B)
                if classes:
                    answers_CC[name][targets_B, log_q_BV.argmax(-1)] += 1
        count += len(where_P)
        progress(done + 1, len(windows_NL))
    told = {name: answered(answers_CC[name]) if classes else (None, None) for name in nll}
    return {
        name: Quality(math.exp(min(nll[name] / count, 700)), max(kl[name], 0.0) / count, *told[name]) for name in nll
    }


def answered(answers_CC: Tensor) -> tuple[float, float]:
    """(accuracy, F1) from how often the text's class c was answered with d, [c, d]. F1 is the mean over the classes that the
    texts or the answers have."""
    right_C, either_C = answers_CC.diagonal(), answers_CC.sum(0) + answers_CC.sum(1)
    seen_C = either_C > 0
    return float(right_C.sum() / answers_CC.sum()), float((2 * right_C[seen_C] / either_C[seen_C]).mean())


def _picked(log_p_PV: Tensor, targets_P: Tensor) -> float:
    """Sum of the log-probabilities that the text's own tokens got."""
    return float(log_p_PV.gather(1, targets_P[:, None]).sum(dtype=torch.float64))
