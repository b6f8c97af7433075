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

Shape letters: G texts of a group, N new tokens, V vocabulary.
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
        groups: list[tuple[Rollouts, Tensor, Tensor]] = []
        rewards: dict[str, float] = {}
        prompts = writer.drawn(s.prompts, step)
        for number, prompt_P in enumerate(prompts):
            for rollouts in writer.write([prompt_P] * s.group, step * s.prompts + number):
                with torch.no_grad():
                    log_p_GNV = rollouts.log_probabilities(writer.teacher)
                reward_G, parts = self.judge(rollouts, rollouts.picked(log_p_GNV))
                advantage_G = (reward_G - reward_G.mean()) / (reward_G.std() + 1e-6)
                groups.append((rollouts, advantage_G.to(log_p_GNV), log_p_GNV))
                share = len(rollouts.ids_BL) / (s.group * len(prompts))
                add(rewards, {"reward": float(reward_G.mean()), **parts}, share)
        old: list[Tensor] = []
        for epoch in range(s.epochs):
            told = dict.fromkeys(("loss", "reverse_kl", "clipped"), 0.0)
            for number, (rollouts, advantage_G, log_p_GNV) in enumerate(groups):
                log_q_GNV = rollouts.log_probabilities(writer.network)
                picked_GN = rollouts.picked(log_q_GNV)
                if epoch == 0:
                    old.append(picked_GN.detach())
                ratio_GN = (picked_GN - old[number]).exp()
                gain_GN = clipped_gain(ratio_GN, advantage_G[:, None], s.clip)
                kl_GN = reverse_kl(log_q_GNV, log_p_GNV)
                loss = rollouts.mean(self.state["leash"] * kl_GN - gain_GN) / len(groups)
                loss.backward()
                told["loss"] += float(loss.detach())
                told["reverse_kl"] += float(rollouts.mean(kl_GN.detach())) / len(groups)
                told["clipped"] += float(rollouts.mean(((ratio_GN - 1).abs() > s.clip).float())) / len(groups)
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
