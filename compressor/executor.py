"""Puts plans into the student and scores them against the teacher.

A plan's score is KL(teacher || student) per token over the same tokens for every plan, so that scores compare without
noise. The windows fall into `PARTS` parts, and a score on one of them costs that share of a pass. The teacher's
distribution is computed once; afterwards a plan costs one forward pass of the student:

    KL = sum_v p_v log p_v  -  sum_v p_v z_v  +  logsumexp(z)          p: teacher's probabilities, z: student's logits

Shape letters: N sequences, L tokens a sequence, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from compressor.bank import Bank
from compressor.network import POSITIONS, Network
from compressor.plan import PARTS, Action, Plan, Score
from compressor.student import Lazy
from compressor.text import compared, predictions


class Executor:
    """Scores plans on one set of tokens.

    Args:
        bank: where the variants come from.
        tokens_NL: token ids; perplexity is over the `predictions` of `compressor.text`, KL over all positions or the
            masked ones.
    """

    def __init__(self, bank: Bank, tokens_NL: Tensor):
        self.bank = bank
        self.teacher = bank.teacher
        self.student = bank.teacher.student()
        self.tokens_NL = tokens_NL
        self.plan: dict[str, Action] = {site.name: Action(site.units, "fp32") for site in self.teacher.sites.values()}
        self._reference = Reference(self.teacher, tokens_NL)

    @torch.no_grad()
    def install(self, plan: Plan) -> None:
        """Put a plan into the student; only what differs from the last plan is copied."""
        for name, action in plan.items():
            if self.plan[name] != action:
                site = self.teacher.sites[name]
                self.student.install(site, action, Lazy([site], plan, self.bank.matrix))
                self.plan[name] = action

    def score(self, plan: Plan, part: int | None = None, known: Mapping[int, Score] = MappingProxyType({})) -> Score:
        """Install a plan and compare the student with the teacher, on a part of the tokens or on all of them.

        known: the plan's scores on parts, which are not computed again for a score on all of them.
        """
        self.install(plan)
        return self.compare(part, known)

    def compare(self, part: int | None = None, known: Mapping[int, Score] = MappingProxyType({})) -> Score:
        """The student as it is, against the teacher; arguments as in `score`."""
        count, length = self.tokens_NL.shape
        wanted = [n for n in range(count) if part in (None, n % PARTS)]
        fresh = [n for n in wanted if n % PARTS not in known]
        kl_N, nll_N = np.zeros(count), np.zeros(count)
        for tried, score in known.items():
            kl_N[tried::PARTS], nll_N[tried::PARTS] = score.kl, math.log(score.perplexity)
        if fresh:
            kl_N[fresh], nll_N[fresh] = self._reference.compare(self.student, fresh)
        by_part = tuple(float(kl_N[p::PARTS].mean()) for p in range(PARTS)) if part is None and count >= PARTS else ()
        perplexity = math.exp(min(nll_N[wanted].mean(), 700))
        return Score(max(float(kl_N[wanted].mean()), 0.0), perplexity, len(wanted) * length, part, by_part)


class Reference:
    """The teacher's distributions over some tokens, kept in memory: float32 [N, P, V] at P positions of a window, all of them
    where none are masked. Layer by layer, what its head reads, [N, P, D]: they are made of it when they are needed."""

    @torch.no_grad()
    def __init__(self, teacher: Network, tokens_NL: Tensor):
        self._teacher, self.tokens_NL = teacher, tokens_NL.to(teacher.device)
        self._kept, self._negative_entropies_P = [], []
        for ids_L in map(teacher.written, self.tokens_NL):
            hidden_PD, kept, entropies = teacher.hidden(ids_L[None])[0, compared(ids_L)], [], []
            for hidden_BD in hidden_PD.split(POSITIONS):
                log_p_BV = torch.log_softmax(teacher.logits(hidden_BD), -1)
                p_BV = log_p_BV.exp()
                kept.append(hidden_BD if teacher.layerwise else p_BV)
                entropies.append((p_BV * log_p_BV).sum(-1, dtype=torch.float64))
            self._kept.append(torch.cat(kept))
            self._negative_entropies_P.append(torch.cat(entropies))

    def _probabilities(self, window: int, here: slice) -> Tensor:
        kept = self._kept[window][here]
        return torch.softmax(self._teacher.logits(kept), -1) if self._teacher.layerwise else kept

    def kl(self, student: Network) -> float:
        """KL from the teacher in nats per token, over all windows."""
        return max(float(self.compare(student)[0].mean()), 0.0)

    @torch.no_grad()
    def compare(self, student: Network, windows: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(KL from the teacher in nats per token [W], negative log-likelihood of the text in nats per prediction [W]) of
        every one of these W windows, or of all of them."""
        windows = range(len(self.tokens_NL)) if windows is None else windows
        hidden_NLD = student.hidden(self.tokens_NL[list(windows)])
        found = [self._window(student, *pair) for pair in zip(windows, hidden_NLD, strict=True)]
        kl_W, nll_W = zip(*found, strict=True)
        return np.array(kl_W), np.array(nll_W)

    def _window(self, student: Network, window: int, hidden_LD: Tensor) -> tuple[float, float]:
        """(KL, negative log-likelihood) of one of the windows."""
        ids_L, kl_P, nll_T = self.tokens_NL[window], [], []
        targets_T = predictions(ids_L)[1]  # the last of all positions predicts nothing
        hidden_PD = hidden_LD[compared(ids_L)]
        for start in range(0, len(hidden_PD), POSITIONS):
            here = slice(start, start + POSITIONS)
            z_BV, targets_B = student.logits(hidden_PD[here]), targets_T[here]
            normalizer_B = torch.logsumexp(z_BV, -1)
            cross_B = normalizer_B - torch.linalg.vecdot(self._probabilities(window, here), z_BV)
            kl_P.append(self._negative_entropies_P[window][here] + cross_B)
            said_B = z_BV[: len(targets_B)].gather(1, targets_B[:, None])[:, 0]
            nll_T.append(normalizer_B[: len(targets_B)] - said_B)
        return tuple(float(torch.cat(found).mean(dtype=torch.float64)) for found in (kl_P, nll_T))  # type: ignore[return-value]
