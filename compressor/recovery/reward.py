"""Rewards for what a student writes, which a recipe weighs against one another, and the user's own.

Every reward is a number a text: the higher, the better.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import RecipeError
from compressor.model import Teacher
from compressor.recovery.rollouts import Rollouts, distinct, entropy

Reward = Callable[[str, str], float]
"""A reward of the user's own: (prompt, what was written behind it) -> number."""


@dataclass(frozen=True)
class Written:
    """One text. ids, prompt_ids: its tokens and its prompt's; log_p_N: the teacher's log-probability of every token;
    embedding_VD: the teacher's."""

    prompt_ids: list[int]
    ids: list[int]
    log_p_N: Tensor
    embedding_VD: Tensor


def fluency(written: Written) -> float:
    """The teacher's log-probability, mean over the tokens, in nats."""
    return float(written.log_p_N.mean())


def informativeness(written: Written) -> float:
    """Mean of distinct-1, distinct-2 and the entropy of the tokens, each in [0, 1]."""
    return (distinct(written.ids, 1) + distinct(written.ids, 2) + entropy(written.ids)) / 3


def relevance(written: Written) -> float:
    """Cosine of the mean embeddings of prompt and text, less the whole vocabulary's, in [-1, 1]."""
    centre_D = written.embedding_VD.mean(0)
    means = [written.embedding_VD[ids].mean(0) - centre_D for ids in (written.prompt_ids, written.ids)]
    return float(torch.cosine_similarity(means[0], means[1], dim=0))


REWARDS: dict[str, Callable[[Written], float]] = {
    "fluency": fluency,
    "informativeness": informativeness,
    "relevance": relevance,
}


class Judge:
    """The weighted sum of some rewards.

    Args:
        weights: by name, of `REWARDS` or of `own`.
        own: the user's.
    """

    def __init__(self, teacher: Teacher, weights: Mapping[str, float], own: Mapping[str, Reward]):
        self._teacher, self._weights, self._own = teacher, weights, own

    @torch.no_grad()
    def __call__(self, rollouts: Rollouts, picked_BN: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The reward of every row [B], and the mean of each part, unweighed, as `reward_{name}`.

        picked_BN: the teacher's log-probabilities of the new tokens.
        """
        parts: dict[str, list[float]] = {name: [] for name in self._weights}
        embedding_VD = self._teacher.network.matrix("embedding")
        for row, ids in enumerate(rollouts.rows()):
            prompt = rollouts.ids_BL[row, : rollouts.prompt].tolist()
            written = Written(prompt, ids, picked_BN[row][rollouts.live_BN[row]], embedding_VD)
            for name, found in parts.items():
                if name in self._own:
                    decode = self._teacher.tokenizer.decode
                    found.append(float(self._own[name](decode(prompt), decode(ids))))
                else:
                    found.append(REWARDS[name](written))
        total_B = sum(self._weights[name] * torch.tensor(found) for name, found in parts.items())
        assert isinstance(total_B, Tensor)
        return total_B, {f"reward_{name}": sum(found) / len(found) for name, found in parts.items()}


def check_rewards(names: Collection[str], own: Mapping[str, Reward]) -> None:
    """Whether there is a reward of every name.

    Raises:
        RecipeError: one has none, or one of the user's takes the name of a built-in one.
    """
    known = [*REWARDS, *own]
    if unknown := [name for name in names if name not in known]:
        raise RecipeError(
            f"distill.rl.rewards.{unknown[0]}: expected one of {', '.join(known)}; choose one, or give your own by the "
            "library: compress(recipe, out, rewards={name: function})"
        )
    if taken := [name for name in own if name in REWARDS]:
        raise RecipeError(f"rewards: expected a name that is not built in, got {taken[0]}; rename yours")
