"""Reinforcement learning of a student towards a reward that the user composes, on a leash to the teacher.

A group of texts is written behind every prompt; a text's advantage is its reward among its group's, in standard
deviations (GRPO). Its tokens' probabilities are raised or lowered with it, as far as PPO's clipping allows, over some
epochs; the leash pulls every choice back to the teacher.

    A = (R - mean R) / (std R + eps)                       over the group
    loss = -min(w A, clip(w, 1 - c, 1 + c) A)  +  beta KL(pi || p_T)        w = pi(a | s) / pi_old(a | s)

beta follows a controller that holds the KL at a target. A student starts some way from its teacher already: the target, when
none is given, is the KL of the first step.

Sources: Shao et al. 2024, "DeepSeekMath" (GRPO, section 4.1); Schulman et al. 2017, "PPO" (equation 7); Ziegler et al. 2019,
"Fine-Tuning Language Models from Human Preferences" (the controller, section 2.2). Departures: the KL is exact over the
vocabulary and to the teacher, not to the model that the training started from.

Shape letters: G texts of a group, B those of them that run together, N new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.recovery.distill import Told
from compressor.recovery.reward import Judge
from compressor.recovery.rollouts import Rollouts, Writer, add, reverse_kl

CONTROLLER = 0.1
"""By how much of the KL's relative error beta moves in a step, at most by this."""


@dataclass(frozen=True)
class Settings:
    """prompts: in a step; group: texts behind each; clip: the c of the loss; epochs: updates with what was written in a step;
    leash: beta at first; target_kl: in nats a token, the first step's when None."""

    prompts: int = 2
    group: int = 4
    clip: float = 0.2
    epochs: int = 2
    leash: float = 0.1
    target_kl: float | None = None


@dataclass(frozen=True)
class _Judged:
    """Texts of one group with their advantages, the teacher's log-probabilities, and their share of all texts of a step."""

    rollouts: Rollouts
    advantage_B: Tensor
    log_p_BNV: Tensor
    share: float


class Reinforce:
    """An `Objective`.

    Tells of every step: `loss`, `reward` and its parts as `reward_{name}`, `reverse_kl` (student against teacher where it
    wrote), `clipped` (share of the tokens at the clip), `leash` (beta).
    Held out: `cost` = leash at first * reverse_kl - reward, which decides; `reward` and its parts; `rollouts.judged`.
    A reward that rises while `kl`, `reverse_kl`, `repetition_4` or `likelihood` get worse is being exploited.

    Args:
        judge: gives the reward.
    """

    decides = "cost"

    def __init__(self, writer: Writer, judge: Judge, settings: Settings):
        self.writer, self.judge, self.settings = writer, judge, settings
        self.parameters: dict[str, nn.Parameter] = {}
        self.state = {"leash": settings.leash}

    def updates(self, step: int) -> Iterator[Told]:
        s, writer = self.settings, self.writer
        texts: list[_Judged] = []
        rewards: dict[str, float] = {}
        prompts = writer.drawn(s.prompts, step)
        for number, prompt_P in enumerate(prompts):
            group = writer.write([prompt_P] * s.group, step * s.prompts + number)  # in pieces, where it is large
            with torch.no_grad():
                log_ps = [rollouts.log_probabilities(writer.teacher) for rollouts in group]
            judged = [
                self.judge(rollouts, rollouts.picked(log_p)) for rollouts, log_p in zip(group, log_ps, strict=True)
            ]
            reward_G = torch.cat([reward_B for reward_B, _ in judged])
            for rollouts, log_p_BNV, (reward_B, parts) in zip(group, log_ps, judged, strict=True):
                advantage_B = (reward_B - reward_G.mean()) / (reward_G.std() + 1e-6)
                share = len(reward_B) / (s.group * len(prompts))
                texts.append(_Judged(rollouts, advantage_B.to(log_p_BNV), log_p_BNV, share))
                add(rewards, {"reward": float(reward_B.mean()), **parts}, share)
        old: list[Tensor] = []
        for epoch in range(s.epochs):
            told = dict.fromkeys(("loss", "reverse_kl", "clipped"), 0.0)
            for number, judged_texts in enumerate(texts):
                rollouts, share = judged_texts.rollouts, judged_texts.share
                log_q_BNV = rollouts.log_probabilities(writer.network)
                picked_BN = rollouts.picked(log_q_BNV)
                if epoch == 0:
                    old.append(picked_BN.detach())
                ratio_BN = (picked_BN - old[number]).exp()
                gain_BN = clipped_gain(ratio_BN, judged_texts.advantage_B[:, None], s.clip)
                kl_BN = reverse_kl(log_q_BNV, judged_texts.log_p_BNV)
                loss = rollouts.mean(self.state["leash"] * kl_BN - gain_BN)
                (share * loss).backward()
                clipped_BN = ((ratio_BN - 1).abs() > s.clip).float()
                figures = {"loss": loss, "reverse_kl": rollouts.mean(kl_BN), "clipped": rollouts.mean(clipped_BN)}
                add(told, {name: float(value.detach()) for name, value in figures.items()}, share)
            if epoch == 0:
                seen = told["reverse_kl"]
            yield {**told, **rewards, "leash": self.state["leash"]}
        target = self.state.setdefault("target_kl", seen if s.target_kl is None else s.target_kl)
        self.state["leash"] *= 1 + CONTROLLER * max(-1.0, min(1.0, seen / target - 1))

    def held_out(self) -> Told:
        told, written, picked = self.writer.look()
        rewards: dict[str, float] = {}
        for rollouts, picked_BN in zip(written, picked, strict=True):
            reward_B, parts = self.judge(rollouts, picked_BN)
            share = len(rollouts.ids_BL) / len(self.writer.held_out)
            add(rewards, {"reward": float(reward_B.mean()), **parts}, share)
        return {**told, **rewards, "cost": self.settings.leash * told["reverse_kl"] - rewards["reward"]}


def clipped_gain(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's objective, elementwise: min(w A, clip(w, 1 - c, 1 + c) A)."""
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
