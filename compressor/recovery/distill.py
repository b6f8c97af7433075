"""Distillation: a student is trained until what the teacher would say of it no longer gets better on held-out text.

This file has the training itself, whatever it aims at, and the plainest aim:

    kd           the student imitates the teacher on given text (`Imitation`, here)
    on_policy    on what the student itself writes (`compressor.recovery.on_policy`)
    rl           towards a reward that the user composes, on a leash to the teacher (`compressor.recovery.reinforce`)

What is trained of the student is told in `compressor.recovery.trained`. A student is kept only if it got better by its own
measure on held-out text.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from compressor.executor import Reference
from compressor.files import write_bytes_atomic
from compressor.network import Network, loaded
from compressor.recovery.cache import TeacherCache
from compressor.recovery.relations import related, relation_kl
from compressor.recovery.trained import Train, Trained
from compressor.student import Student
from compressor.text import compared

CHECKPOINT_SECONDS = 60
"""Least time between two checkpoints, which hold three times the trained weights."""


Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True)
class Settings:
    """How long and how hard to train.

    learning_rate: peak; linear warm-up over `warmup` steps, then cosine to a tenth; check_every: steps between two looks at
    the held-out text; seed: of whatever a step draws; precision: of the products, weights and sums stay in fp32;
    checkpointing: see `transformer.Transformer`.
    """

    steps: int
    train: Train = "scales"
    learning_rate: float = 1e-2
    warmup: int = 5
    check_every: int = 10
    seed: int = 0
    precision: Precision = "fp32"
    checkpointing: bool = False

    def to_dict(self) -> dict:
        return asdict(self)


Told = Mapping[str, float]
"""Measures by name. Every training has `loss`, every look at held-out text `kl`, KL from the teacher in nats per token."""


class Objective(Protocol):
    """What a training aims at.

    decides: the name of the held-out measure of which the least is kept. parameters: trained beside the student's own.
    state: numbers that change along the training, beside the parameters; kept in checkpoints.
    """

    decides: str
    parameters: dict[str, nn.Parameter]
    state: dict[str, float]

    def updates(self, step: int) -> Iterator[Told]:
        """A step of the training: adds gradients, once for every item, behind each of which the optimizer goes one step."""
        ...

    def held_out(self) -> Told:
        """Measures on held-out text, beside `kl`."""
        ...


@dataclass
class Curve:
    """What a training said: of every step (the mean over its updates), of the held-out text after some steps, 0 being before
    the first, and which of them was kept."""

    decides: str
    training: list[dict[str, float]] = field(default_factory=list)
    held_out: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    kept_step: int = 0

    @property
    def kl(self) -> float:
        """KL on held-out text (nats per token) of what was kept."""
        return dict(self.held_out)[self.kept_step]["kl"]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Curve:
        return cls(**{**data, "held_out": [(step, told) for step, told in data["held_out"]]})


def distill(
    teacher: Network,
    student: Student,
    make_objective: Callable[[Network], Objective],
    held_out_NL: Tensor,
    settings: Settings,
    checkpoint: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, message: None,
) -> tuple[Student, Curve]:
    """Train a student; resumes from `checkpoint` if a run with it was cut off.

    Args:
        teacher: the full network; its weights are only read.
        student: what to start from.
        make_objective: gets the network that is trained.
        held_out_NL: text for the KL that every training is watched by.
        checkpoint: file for the state of the training; removed at the end.

    Returns:
        The student of the least `decides` on held-out text (the given one if none was better), and the curve.
    """
    trained = Trained(loaded(teacher, student), student, settings.train)
    objective = make_objective(trained.network)
    reference = Reference(teacher, held_out_NL)
    trainer = _Trainer(trained, objective, settings)

    def look() -> dict[str, float]:
        return {"kl": reference.kl(trained.network), **objective.held_out()}

    start, curve, best = 0, Curve(objective.decides), student
    if checkpoint.exists():
        start, curve, best = trainer.restore(checkpoint.read_bytes())
    else:
        curve.held_out.append((0, look()))
    least = min(told[curve.decides] for _, told in curve.held_out)
    last_saved = time.monotonic()
    for step in range(start, settings.steps):
        curve.training.append(trainer.step(step))
        if (step + 1) % settings.check_every == 0 or step + 1 == settings.steps:
            curve.held_out.append((step + 1, look()))
            if (found := curve.held_out[-1][1][curve.decides]) < least:
                least, best, curve.kept_step = found, trained.student(), step + 1
            if time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                write_bytes_atomic(checkpoint, trainer.state(step + 1, curve, best))
                last_saved = time.monotonic()
        seen = curve.held_out[-1][1][curve.decides]
        progress(step + 1, settings.steps, f"held-out {curve.decides.replace('_', ' ')} {seen:.4f}")
    checkpoint.unlink(missing_ok=True)
    return best, curve


class _Trainer:
    """The optimizer over what is trained of a student and of its objective: takes steps, saves and restores."""

    def __init__(self, trained: Trained, objective: Objective, settings: Settings):
        self.trained, self.objective, self.settings = trained, objective, settings
        self.parameters = {**trained.parameters, **objective.parameters}
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.95))

    def step(self, step: int) -> dict[str, float]:
        """One step of the training; returns the mean of what its updates told."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * _schedule(step, self.settings)
        told = []
        for said in self._updates(step):
            norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            told.append({**said, "gradient_norm": float(norm)})
        return {name: sum(one[name] for one in told) / len(told) for name in told[0]}

    def _updates(self, step: int) -> Iterator[Told]:
        model = self.trained.network.model
        model.checkpointing = self.settings.checkpointing
        with torch.autocast(
            self.trained.network.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"
        ):
            yield from self.objective.updates(step)
        model.checkpointing = False

    def state(self, step: int, curve: Curve, best: Student) -> bytes:
        """Everything that `restore` needs, as safetensors."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"trained/{name}"] = parameter.detach()
            if moments := self.optimizer.state.get(parameter):
                tensors[f"first/{name}"], tensors[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
                tensors[f"steps/{name}"] = moments["step"]
        if curve.kept_step:
            tensors |= {f"best/{name}": tensor for name, tensor in best.tensors().items()}
        data = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        # the state lies in a tensor of its own: `load` of bytes gives no metadata back
        numbers = {"step": step, "curve": curve.to_dict(), "objective": self.objective.state}
        data["numbers"] = torch.tensor(list(json.dumps(numbers).encode()), dtype=torch.uint8)
        return save(data)

    def restore(self, data: bytes) -> tuple[int, Curve, Student]:
        """Continue from a checkpoint: (steps done, curve, best student so far)."""
        tensors, given = load(data), self.trained.given
        numbers = json.loads(bytes(tensors["numbers"].tolist()))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"trained/{name}"])
                if f"first/{name}" in tensors:
                    self.optimizer.state[parameter] = {
                        "step": tensors[f"steps/{name}"],
                        "exp_avg": tensors[f"first/{name}"].to(parameter.device),
                        "exp_avg_sq": tensors[f"second/{name}"].to(parameter.device),
                    }
        self.objective.state.update(numbers["objective"])
        stored = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("best/")}
        best = Student.from_tensors(given.decoder, given.plan, stored) if stored else given
        return numbers["step"], Curve.from_dict(numbers["curve"]), best


def _schedule(step: int, settings: Settings) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to a tenth."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


class Imitation:
    """The student imitates the teacher on given text:

        loss = a KL(p_T || p_S) t^2  +  b mean over blocks |h_S - h_T|^2 / |h_T|^2  +  c KL(R_T || R_S)

    with p at temperature t, and R the relations of an attention (`compressor.recovery.relations`).

    Source: Hinton et al. 2015 (logits), Sun et al. 2019, "Patient Knowledge Distillation" (hidden states).

    Args:
        tokens_NL: training text; visited in an order drawn from the seed, again and again.
        windows: of it in a step. together: of these at once.
        kl_weight, hidden_weight, attention_weight, temperature: the a, b, c and t of the loss.
        cache: of the windows that are visited, in place of the teacher, which then does not run; for the first term alone.
    """

    decides = "kl"

    def __init__(
        self,
        teacher: Network,
        network: Network,
        tokens_NL: Tensor,
        *,
        windows: int = 1,
        together: int = 1,
        kl_weight: float = 1.0,
        hidden_weight: float = 0.0,
        attention_weight: float = 0.0,
        temperature: float = 1.0,
        seed: int = 0,
        cache: TeacherCache | None = None,
    ):
        assert cache is None or not (hidden_weight or attention_weight), "these take the teacher itself"
        assert not (attention_weight and network.decoder.encoder), "relations of a padded target"
        self.teacher, self.network, self.tokens_NL, self.seed = teacher, network, tokens_NL, seed
        self.windows, self.together, self.cache = windows, together, cache
        self.kl_weight, self.hidden_weight, self.temperature = kl_weight, hidden_weight, temperature
        self.attention_weight = attention_weight
        self.related = related(network) if attention_weight else ()
        self.parameters: dict[str, nn.Parameter] = {}
        self.state: dict[str, float] = {}

    def updates(self, step: int) -> Iterator[Told]:
        seen = range(step * self.windows, (step + 1) * self.windows)
        windows = [visited(len(self.tokens_NL), n, self.seed) for n in seen]
        value = 0.0
        for start in range(0, self.windows, self.together):
            some = windows[start : start + self.together]
            loss = self._loss(some) * (len(some) / self.windows)
            loss.backward()
            value += float(loss.detach())
        yield {"loss": value}

    def held_out(self) -> Told:
        return {}

    def _loss(self, windows: list[int]) -> Tensor:
        ids_BL = self.tokens_NL[windows]
        if self.cache is not None:
            logits_TV = self._logits(self.network, ids_BL, self.network.hidden(ids_BL))
            return self.kl_weight * self.temperature**2 * self.cache.kl(windows, logits_TV)
        with torch.no_grad(), self.teacher.watch_outputs(self.related) as heads_t:
            hidden_t = self.teacher.every_hidden(ids_BL)
            log_p_TV = torch.log_softmax(self._logits(self.teacher, ids_BL, hidden_t[-1]), -1)
        with self.network.watch_outputs(self.related) as heads_s:
            hidden_s = self.network.every_hidden(ids_BL)
            log_q_TV = torch.log_softmax(self._logits(self.network, ids_BL, hidden_s[-1]), -1)
        kl = nn.functional.kl_div(log_q_TV, log_p_TV, reduction="batchmean", log_target=True)
        loss = self.kl_weight * self.temperature**2 * kl
        blank_BL = self.teacher.model.blank(ids_BL.to(self.teacher.device))
        if self.hidden_weight:
            pairs = zip(hidden_s[1:], hidden_t[1:], strict=True)
            if blank_BL is not None:
                pairs = ((a[~blank_BL], b[~blank_BL]) for a, b in pairs)  # type: ignore[assignment]
            gaps = [(a - b).square().mean() / b.square().mean() for a, b in pairs]
            loss = loss + self.hidden_weight * torch.stack(gaps).mean()
        if self.related:
            kls = [relation_kl(heads_s[name], heads_t[name], blank_BL) for name in self.related]
            loss = loss + self.attention_weight * torch.stack(kls).mean()
        return loss

    def _logits(self, network: Network, ids_BL: Tensor, hidden_BLD: Tensor) -> Tensor:
        """Logits [T, V] at all compared positions, divided by the temperature."""
        return network.logits(hidden_BLD.flatten(0, 1)[compared(ids_BL.flatten())]) / self.temperature


def visited(count: int, n: int, seed: int) -> int:
    """Which of `count` things the n-th visit goes to: every pass over them has an order of its own."""
    done, place = divmod(n, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + done))
    return int(order[place])
