"""Puts plans into the student and scores them against the teacher.

A plan's score is KL(teacher || student) per token over the same tokens for every plan, so that scores compare without
noise. A score on a share of the text takes the first tokens of every window, and costs that share of a pass. The teacher's
distribution is computed once; afterwards a plan costs one forward pass of the student:

    KL = sum_v p_v log p_v  -  sum_v p_v z_v  +  logsumexp(z)          p: teacher's probabilities, z: student's logits

Shape letters: N sequences, L tokens a sequence, V vocabulary, D hidden.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compressor.bank import Bank
from compressor.model import Network
from compressor.plan import Action, Plan, Score


class Executor:
    """Scores plans on one set of tokens.

    Args:
        bank: where the variants come from.
        tokens_NL: token ids; L - 1 predictions a sequence count for perplexity, all L positions for KL.
    """

    def __init__(self, bank: Bank, tokens_NL: Tensor):
        self.bank = bank
        self.teacher = bank.teacher
        self.student = bank.teacher.copy()
        self.tokens_NL = tokens_NL
        self.plan: dict[str, Action] = {site.name: Action(site.units, "fp32") for site in self.teacher.sites.values()}
        self._reference = Reference(self.teacher, tokens_NL)

    @torch.no_grad()
    def install(self, plan: Plan) -> None:
        """Put a plan into the student; only what differs from the last plan is copied."""
        for name, action in plan.items():
            if self.plan[name] != action:
                site = self.teacher.sites[name]
                weights = self.bank.variant(site, action)
                self.student.install(site, action, {key: w.dequantize() for key, w in weights.items()})
                self.plan[name] = action

    def score(self, plan: Plan, share: float = 1.0) -> Score:
        """Install a plan and compare the student with the teacher on the first `share` of every window."""
        self.install(plan)
        return self.compare(share)

    def compare(self, share: float = 1.0) -> Score:
        """The student as it is, against the teacher."""
        count, length = self.tokens_NL.shape
        length = max(2, round(share * length))
        kl, nll = self._reference.compare(self.student, length)
        return Score(kl=kl, perplexity=math.exp(min(nll, 700)), tokens=count * length, share=share)


class Reference:
    """The teacher's next-token distributions over some tokens, kept in memory: float32 [N, L, V]."""

    @torch.no_grad()
    def __init__(self, teacher: Network, tokens_NL: Tensor):
        self.tokens_NL = tokens_NL.to(teacher.device)
        self.probabilities, self.negative_entropies_L = [], []
        for ids_L in self.tokens_NL:
            log_p_LV = torch.log_softmax(teacher.logits(teacher.hidden(ids_L[None]))[0], -1)
            p_LV = log_p_LV.exp()
            self.probabilities.append(p_LV)
            self.negative_entropies_L.append((p_LV * log_p_LV).sum(-1, dtype=torch.float64))

    @torch.no_grad()
    def compare(self, student: Network, length: int | None = None) -> tuple[float, float]:
        """(KL from the teacher in nats per token, negative log-likelihood of the text in nats per prediction), over the
        first `length` tokens of every window, or over all of them."""
        kl = nll = 0.0
        tokens_NL = self.tokens_NL[:, :length]
        hidden_NLD = student.hidden(tokens_NL)
        for ids_L, hidden_LD, p_LV, negative_entropy_L in zip(
            tokens_NL, hidden_NLD, self.probabilities, self.negative_entropies_L, strict=True
        ):
            z_LV = student.logits(hidden_LD)
            normalizer_L = torch.logsumexp(z_LV, -1)
            cross_L = normalizer_L - torch.linalg.vecdot(p_LV[:length], z_LV)
            kl += float((negative_entropy_L[:length] + cross_L).sum(dtype=torch.float64))
            picked_L = z_LV[:-1].gather(1, ids_L[1:, None])[:, 0]
            nll += float((normalizer_L[:-1] - picked_L).sum(dtype=torch.float64))
        return max(kl, 0.0) / tokens_NL.numel(), nll / (len(tokens_NL) * (tokens_NL.shape[1] - 1))
