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
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.recovery.distill import Imitation, Told
from compressor.recovery.rollouts import Rollouts, Writer, add, reverse_kl


@dataclass(frozen=True)
class Settings:
    """rollouts: texts written in a step. share: of the steps that are on-policy; the others imitate on given text. discount:
    gamma."""

    rollouts: int = 8
    share: float = 0.5
    discount: float = 0.9


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
        text: what the steps that are not on-policy do.
    """

    decides = "reverse_kl"

    def __init__(self, writer: Writer, text: Imitation, settings: Settings):
        self.writer, self.text, self.settings = writer, text, settings
        self.value = ValueHead(writer.network.decoder.hidden).to(writer.network.device)
        self.parameters = {f"value/{name}": parameter for name, parameter in self.value.named_parameters()}
        self.state: dict[str, float] = {}

    def updates(self, step: int) -> Iterator[Told]:
        s = self.settings
        if math.floor((step + 1) * s.share + 1e-9) == math.floor(step * s.share + 1e-9):
            yield from self.text.updates(step)
            return
        written = self.writer.write(self.writer.drawn(s.rollouts, step), step)
        total = sum(int(rollouts.live_BN.sum()) for rollouts in written)
        told: dict[str, float] = {}
        for rollouts in written:
            loss, measures = self.losses(rollouts)
            share = int(rollouts.live_BN.sum()) / total
            (loss * share).backward()
            add(told, {"loss": float(loss.detach()), **measures}, share)
        told["value_error"] = math.sqrt(told["value_error"])
        yield told

    def losses(self, rollouts: Rollouts) -> tuple[Tensor, dict[str, float]]:
        """The actor's and the critic's loss together, mean over tokens, and what is told; `value_error` squared."""
        network, ends = self.writer.network, torch.tensor(list(self.writer.ends))
        with torch.no_grad():
            log_p_BNV = rollouts.log_probabilities(self.writer.teacher)
        states_BMD = rollouts.states(network)
        log_q_BNV = torch.log_softmax(network.logits(states_BMD[:, :-1]), -1)
        kl_BN = reverse_kl(log_q_BNV, log_p_BNV)
        value_BM = self.value(states_BMD.detach())
        with torch.no_grad():
            ended_BN = torch.isin(rollouts.new_BN, ends.to(kl_BN.device))
            y_BN = -kl_BN + self.settings.discount * value_BM[:, 1:] * ~ended_BN
            advantage_BN = y_BN - value_BM[:, :-1]
            advantage_BN -= rollouts.mean(advantage_BN)
        actor_BN = kl_BN - rollouts.picked(log_q_BNV) * advantage_BN
        critic_BN = (y_BN - value_BM[:, :-1]).square()
        measures = {
            "reverse_kl": float(rollouts.mean(kl_BN.detach())),
            "value_error": float(rollouts.mean(critic_BN.detach())),
            "entropy": float(rollouts.mean(-(log_q_BNV.detach().exp() * log_q_BNV.detach()).sum(-1))),
        }
        return rollouts.mean(actor_BN) + rollouts.mean(critic_BN), measures

    def held_out(self) -> Told:
        return self.writer.look()[0]
