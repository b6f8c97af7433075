"""Distillation: the student is trained, on the grids that are deployed, until its predictions come back to the teacher's.

    loss = a KL(p_T || p_S) t^2  +  b mean over blocks |h_S - h_T|^2 / |h_T|^2      p at temperature t

Source: Hinton et al. 2015 (logits), Sun et al. 2019, "Patient Knowledge Distillation" (hidden states). What is trained,
beside the norm gains:

    scales    those of all quantized matrices; codes stay. Chen et al. 2024, "EfficientQAT", section 3.3. Departures: gains as
              well; changes are relative and in units of a grid's own precision, 2^-bits, so that one learning rate suits
              all: what helps 2 bits would spoil 8
    weights   latent float copies of all matrices; the forward pass rounds them to their grids, gradients pass straight
              through (Bengio et al. 2013). Scales and zero points stay

The embedding and the head stay as they are. A student is kept only if its KL on held-out text fell.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.executor import Reference
from compressor.files import write_bytes_atomic
from compressor.model import Network, Rounding
from compressor.quantize import Grid, Weight, store_float
from compressor.student import Student

CHECKPOINT_SECONDS = 60
"""Least time between two checkpoints, which hold three times the trained weights."""


Train = Literal["scales", "weights"]

LEARNING_RATES: dict[Train, float] = {"scales": 1e-2, "weights": 1e-4}
"""Peak learning rates that suit most students."""

GAIN_BITS = 4
"""Gains are trained as finely as scales of so many bits."""


@dataclass(frozen=True)
class Settings:
    """How long and how hard to train.

    steps: optimizer steps; train: what is trained; sequences: sequences a step; learning_rate: peak, linear warm-up over
    `warmup` steps, then cosine to a tenth; kl_weight, hidden_weight: the a and b of the loss; check_every: steps between
    two looks at the held-out text.
    """

    steps: int
    train: Train = "scales"
    sequences: int = 1
    learning_rate: float = 1e-2
    warmup: int = 5
    kl_weight: float = 1.0
    hidden_weight: float = 0.0
    temperature: float = 1.0
    check_every: int = 10
    seed: int = 0

    def to_dict(self) -> dict:
        return asdict(self)


@dataclass
class Curve:
    """What training said: loss of every step, held-out KL (nats per token) at some, and whether the result was kept."""

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    kept_step: int = 0

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Curve:
        return cls(data["losses"], [(step, kl) for step, kl in data["held_out"]], data["kept_step"])


class Scaled(nn.Module):
    """A parametrization that multiplies what was given by factors, 1 + unit * a trained change: one for every scale of a
    grid, or for every gain."""

    def __init__(self, grid: Grid | None, like: Tensor):
        super().__init__()
        self.format = grid.format if grid else None
        self.unit = 2.0 ** -(grid.format.bits if grid else GAIN_BITS)
        self.change = nn.Parameter(torch.zeros_like(grid.scales if grid else like, device=like.device))

    @property
    def factors(self) -> Tensor:
        return 1 + self.unit * self.change

    def forward(self, given: Tensor) -> Tensor:
        if self.format is None:
            return given * self.factors
        return Grid(self.format, self.factors, torch.zeros_like(self.change)).values(given)


class OnGrid(nn.Module):
    """A parametrization that rounds the latent weight to its grid, straight-through for gradients."""

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid

    def forward(self, latent_OI: Tensor) -> Tensor:
        with torch.no_grad():
            step = self.grid.nearest(latent_OI) - latent_OI
        return latent_OI + step


def load_student(student: Student, network: Network, rounding: Rounding = "dynamic") -> None:
    """Put a student's weights into a network; `rounding` as for `Network.install`."""
    for name, action in student.plan.items():
        site = network.sites[name]
        dense = {m.name: student.matrices[m.name].dequantize() for m in site.matrices} if action.keep else {}
        network.install(site, action, dense, rounding)
    with torch.no_grad():
        for name, gain in student.vectors.items():
            network.module(name).weight.copy_(gain)


def loaded(teacher: Network, student: Student, rounding: Rounding = "dynamic") -> Network:
    """A network of its own with a student's weights; `rounding` as for `Network.install`."""
    network = teacher.copy()
    load_student(student, network, rounding)
    return network


def distill(
    teacher: Network,
    student: Student,
    tokens_NL: Tensor,
    held_out_NL: Tensor,
    settings: Settings,
    checkpoint: Path,
    progress: Callable[[int, int, str], None] = lambda done, total, message: None,
) -> tuple[Student, Curve]:
    """Train a student; resumes from `checkpoint` if a run with it was cut off.

    Args:
        teacher: the full network; its weights are only read.
        student: what to start from.
        tokens_NL: training text; visited in an order drawn from the seed, again and again.
        held_out_NL: text that decides which step is kept.
        checkpoint: file for the state of the training; removed at the end.

    Returns:
        The best student on held-out text (the given one if none was better), and the curve.
    """
    network = loaded(teacher, student)
    trainer = _Trainer(network, student, settings)
    held_out = Reference(teacher, held_out_NL)
    curve, best = Curve(), student
    start = 0
    if checkpoint.exists():
        start, curve, best = trainer.restore(checkpoint.read_bytes(), student)
    else:
        curve.held_out.append((0, held_out.kl(network)))
    best_kl = min(kl for _, kl in curve.held_out)
    order = _visits(len(tokens_NL), settings)
    last_saved = time.monotonic()
    for step in range(start, settings.steps):
        batch_BL = tokens_NL[order[step * settings.sequences : (step + 1) * settings.sequences]]
        curve.losses.append(trainer.step(teacher, batch_BL, step))
        if (step + 1) % settings.check_every == 0 or step + 1 == settings.steps:
            kl = held_out.kl(network)
            curve.held_out.append((step + 1, kl))
            if kl < best_kl:
                best_kl, best, curve.kept_step = kl, trainer.student(), step + 1
            if time.monotonic() - last_saved > CHECKPOINT_SECONDS:
                write_bytes_atomic(checkpoint, trainer.state(step + 1, curve, best))
                last_saved = time.monotonic()
        progress(step + 1, settings.steps, f"held-out KL {curve.held_out[-1][1]:.4f}")
    checkpoint.unlink(missing_ok=True)
    return best, curve


def _visits(sequences: int, settings: Settings) -> Tensor:
    """Indices of the training sequences in order of use: a fresh permutation for every pass over the text."""
    generator = torch.Generator().manual_seed(settings.seed)
    passes = -(-settings.steps * settings.sequences // sequences)
    return torch.cat([torch.randperm(sequences, generator=generator) for _ in range(passes)])


class _Trainer:
    """The student in training: what is trained, the optimizer, and how to take a step, save and restore."""

    def __init__(self, network: Network, student: Student, settings: Settings):
        self.network, self.given, self.settings = network, student, settings
        self.parameters: dict[str, nn.Parameter] = {}
        self.scaled: dict[str, Scaled] = {}
        train = self._train_scales if settings.train == "scales" else self._train_weights
        for name in [*student.matrices, *student.vectors]:
            if name not in ("embedding", "head"):
                train(name, network.module(name), student.matrices[name].grid if name in student.matrices else None)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.parameters.values(), lr=settings.learning_rate, betas=(0.9, 0.95))

    def _train_scales(self, name: str, module: Any, grid: Grid | None) -> None:
        if grid or name in self.given.vectors:
            scaled = Scaled(grid, module.weight)
            parametrize.register_parametrization(module, "weight", scaled, unsafe=True)
            self.parameters[name], self.scaled[name] = scaled.change, scaled

    def _train_weights(self, name: str, module: Any, grid: Grid | None) -> None:
        self.parameters[name] = module.weight
        if grid:
            here = Grid(grid.format, grid.scales.to(module.weight), grid.zeros.to(module.weight))
            parametrize.register_parametrization(module, "weight", OnGrid(here), unsafe=True)
            self.parameters[name] = module.parametrizations.weight.original

    def step(self, teacher: Network, batch_BL: Tensor, step: int) -> float:
        """One optimizer step; returns the loss."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.learning_rate * _schedule(step, s)
        loss_value = 0.0
        for ids_L in batch_BL:
            with torch.no_grad():
                hidden_t = teacher.every_hidden(ids_L[None])
                log_p_LV = torch.log_softmax(teacher.logits(hidden_t[-1])[0] / s.temperature, -1)
            hidden_s = self.network.every_hidden(ids_L[None])
            log_q_LV = torch.log_softmax(self.network.logits(hidden_s[-1])[0] / s.temperature, -1)
            loss = s.kl_weight * s.temperature**2 * _kl(log_p_LV, log_q_LV)
            if s.hidden_weight:
                pairs = zip(hidden_s[1:], hidden_t[1:], strict=True)
                gaps = [(a - b).square().mean() / b.square().mean() for a, b in pairs]
                loss = loss + s.hidden_weight * torch.stack(gaps).mean()
            (loss / len(batch_BL)).backward()
            loss_value += float(loss.detach()) / len(batch_BL)
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss_value

    @torch.no_grad()
    def student(self) -> Student:
        """The weights of this moment, on their grids."""
        matrices, vectors = dict(self.given.matrices), dict(self.given.vectors)
        for name, parameter in self.parameters.items():
            trained = parameter.detach().cpu()
            if name in self.scaled:
                factors = self.scaled[name].factors.cpu()
                if name in vectors:
                    vectors[name] = vectors[name] * factors
                elif grid := matrices[name].grid:
                    matrices[name] = replace(matrices[name], scales=grid.scales * factors)
            elif name in vectors:
                vectors[name] = trained.clone()
            elif grid := matrices[name].grid:
                matrices[name] = Weight.on_grid(grid, trained)
            else:
                matrices[name] = store_float(trained.clone(), matrices[name].format)
        return Student(self.given.decoder, self.given.plan, matrices, vectors)

    def state(self, step: int, curve: Curve, best: Student) -> bytes:
        """Everything that `restore` needs, as safetensors."""
        tensors = {}
        for name, parameter in self.parameters.items():
            moments = self.optimizer.state[parameter]
            tensors[f"trained/{name}"] = parameter.detach()
            tensors[f"first/{name}"], tensors[f"second/{name}"] = moments["exp_avg"], moments["exp_avg_sq"]
        if curve.kept_step:
            tensors |= {f"best/{name}": tensor for name, tensor in best.tensors().items()}
        data = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        # the state lies in a tensor of its own: `load` of bytes gives no metadata back
        data["curve"] = torch.tensor(
            list(json.dumps({"step": step, "curve": curve.to_dict()}).encode()), dtype=torch.uint8
        )
        return save(data)

    def restore(self, data: bytes, given: Student) -> tuple[int, Curve, Student]:
        """Continue from a checkpoint: (steps done, curve, best student so far)."""
        tensors = load(data)
        state = json.loads(bytes(tensors["curve"].tolist()))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"trained/{name}"])
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["step"])),
                    "exp_avg": tensors[f"first/{name}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"second/{name}"].to(parameter.device),
                }
        curve = Curve.from_dict(state["curve"])
        stored = {name[5:]: tensor for name, tensor in tensors.items() if name.startswith("best/")}
        return state["step"], curve, Student.from_tensors(given.decoder, given.plan, stored) if stored else given


def _schedule(step: int, settings: Settings) -> float:
    """Share of the peak learning rate: linear warm-up, then cosine to a tenth."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _kl(log_p_LV: Tensor, log_q_LV: Tensor) -> Tensor:
    """KL(p || q) in nats, mean over positions."""
    return nn.functional.kl_div(log_q_LV, log_p_LV, reduction="batchmean", log_target=True)
