"""On-policy distillation: the student learns from what it writes itself, by reinforcement learning on the tokens.

The decision process: state s = the text so far, action a = the next token, the policy pi is the student's distribution. What
is maximised is the teacher's likelihood of the text over the student's own, the reverse KL of whole texts:

    r(s, a) = log p_T(a | s) - log pi(a | s)

Actor-critic: a value head V on the student's last hidden state is the critic, and the TD error is the advantage.

    y = r(s) + gamma V(s')            r(s) = E_a r(s, a) = -KL(pi || p_T)   at s, over the whole vocabulary
    actor loss   =  KL(pi || p_T)  -  log pi(a | s) (y - V(s))
    critic loss  =  (y - V(s))^2

The first term of the actor's loss is the gradient of the reward at hand, exactly; the second that of what the token leads
to, of which gamma = 0 leaves nothing. y and the advantage pass no gradient, the mean advantage of a step is taken off. A text
that was cut off goes on in V(s'); an end token ends it with 0.

Sources: Gu et al. 2024, "MiniLLM" (reverse KL, section 2.2; the reward at hand in closed form); Agarwal et al. 2024, "GKD"
(algorithm 1: a share of the steps on the student's own text, the others on given text); Sutton & Barto 2018, section 13.5.
Departures: a learned critic in the place of MiniLLM's returns; no teacher-mixed sampling and no importance weights.

Shape letters: B rows, N new tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.network import Network
from compressor.recovery.distill import Imitation, Told
from compressor.recovery.rollouts import Rollouts, drawn, judged, reverse_kl, write


@dataclass(frozen=True)
class Settings:
    """rollouts: texts written in a step. new_tokens: of each. share: of the steps that are on-policy; the others imitate on
    given text. discount: gamma. seed: of the prompts' order and of what is written."""

    rollouts: int = 8
    new_tokens: int = 32
    share: float = 0.5
    discount: float = 0.9
    seed: int = 0


class ValueHead(nn.Module):
    """Hidden states [..., D] -> value [...], linear in their direction; 0 at first."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.normalize(hidden, dim=-1) @ self.weight + self.bias


class OnPolicy:
    """An `Objective`.

    Tells of every step: `loss`, `reverse_kl` (what the actor minimises), `value_error` (root mean square TD error, nats) and
    `entropy` of the student where it wrote, in nats.

    Args:
        prompts: token ids [P]; held_out_prompts: others, by whose continuations a student is judged.
        text: what the steps that are not on-policy do.
        ends: ids of tokens that end a text.
    """

    decides = "reverse_kl"

    def __init__(
        self,
        teacher: Network,
        network: Network,
        prompts: Sequence[Tensor],
        held_out_prompts: Sequence[Tensor],
        text: Imitation,
        settings: Settings,
        ends: Collection[int] = (),
    ):
        self.teacher, self.network, self.text, self.settings, self.ends = teacher, network, text, settings, ends
        self.prompts, self.held_out_prompts = prompts, held_out_prompts
        self.value = ValueHead(network.decoder.hidden).to(network.device)
        self.parameters = {f"value/{name}": parameter for name, parameter in self.value.named_parameters()}
        self.state: dict[str, float] = {}

    def updates(self, step: int) -> Iterator[Told]:
        s = self.settings
        if math.floor((step + 1) * s.share + 1e-9) == math.floor(step * s.share + 1e-9):
            yield from self.text.updates(step)
            return
        prompts = drawn(self.prompts, s.rollouts, step, s.seed)
        written = write(self.network, prompts, s.new_tokens, s.seed * 1_000_003 + step, self.ends)
        total = sum(int(rollouts.live_BN.sum()) for rollouts in written)
        told: dict[str, float] = {}
        for rollouts in written:
            loss, measures = self.losses(rollouts)
            share = int(rollouts.live_BN.sum()) / total
            (loss * share).backward()
            for name, value in {"loss": loss.detach(), **measures}.items():
                told[name] = told.get(name, 0.0) + share * float(value)
        told["value_error"] = math.sqrt(told["value_error"])
        yield told

    def losses(self, rollouts: Rollouts) -> tuple[Tensor, dict[str, Tensor]]:
        """The actor's and the critic's loss together, mean over tokens, and what is told; `value_error` squared."""
        with torch.no_grad():
            log_p_BNV = rollouts.log_probabilities(self.teacher)
        states_BMD = rollouts.states(self.network)
        log_q_BNV = torch.log_softmax(self.network.logits(states_BMD[:, :-1]), -1)
        kl_BN = reverse_kl(log_q_BNV, log_p_BNV)
        value_BM = self.value(states_BMD.detach())
        with torch.no_grad():
            ended_BN = torch.isin(rollouts.new_BN, torch.tensor(list(self.ends), device=kl_BN.device))
            y_BN = -kl_BN + self.settings.discount * value_BM[:, 1:] * ~ended_BN
            advantage_BN = y_BN - value_BM[:, :-1]
            advantage_BN -= rollouts.mean(advantage_BN)
        actor_BN = kl_BN - rollouts.picked(log_q_BNV) * advantage_BN
        critic_BN = (y_BN - value_BM[:, :-1]).square()
        measures = {
            "reverse_kl": rollouts.mean(kl_BN.detach()),
            "value_error": rollouts.mean(critic_BN.detach()),
            "entropy": rollouts.mean(-(log_q_BNV.detach().exp() * log_q_BNV.detach()).sum(-1)),
        }
        return rollouts.mean(actor_BN) + rollouts.mean(critic_BN), measures

    def held_out(self) -> Told:
        """What the student writes behind the held-out prompts, always with the same random numbers: `rollouts.judged`."""
        written = write(self.network, self.held_out_prompts, self.settings.new_tokens, 0, self.ends)
        return judged(self.teacher, self.network, written)
