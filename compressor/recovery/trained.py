"""What is trained of a student: the norm gains and, on the grids that are deployed, its matrices or their scales.

    scales    those of all quantized matrices; codes stay. Chen et al. 2024, "EfficientQAT", section 3.3. Departures: gains as
              well; changes are relative and in units of a grid's own precision, 2^-bits, so that one learning rate suits
              all: what helps 2 bits would spoil 8
    weights   latent float copies of all matrices; the forward pass rounds them to their grids, gradients pass straight
              through (Bengio et al. 2013). Scales and zero points stay
    lora      of the latent copies a change of low rank alone, W + B A (Hu et al. 2022), which is rounded with them: nothing
              is left beside the grid. Takes a fraction of the memory of `weights`

The embedding and the head stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.network import Network
from compressor.quantize import Grid, Weight, store_float
from compressor.student import Student

Train = Literal["scales", "weights", "lora"]

LEARNING_RATES: dict[Train, float] = {"scales": 1e-2, "weights": 1e-4, "lora": 1e-3}
"""Peak learning rates that suit most students."""

GAIN_BITS = 4
"""Gains are trained as finely as scales of so many bits."""

RANK = 16
"""Of the change in `lora`."""


class Scaled(nn.Module):
    """A parametrization that multiplies what was given by factors, 1 + unit * a trained change: one for every scale of a
    grid, or for every gain."""

    def __init__(self, grid: Grid | None, like: Tensor):
        super().__init__()
        self.grid = grid.to(like.device) if grid else None
        self.unit = 2.0 ** -(grid.format.bits if grid else GAIN_BITS)
        self.change = nn.Parameter(torch.zeros_like(grid.scales if grid else like, device=like.device))

    @property
    def factors(self) -> Tensor:
        """Those that lead to scales which can be stored, straight-through for gradients."""
        factors = 1 + self.unit * self.change
        if self.grid is None:
            return factors
        with torch.no_grad():
            step = self.grid.stored(self.grid.scales * factors) / self.grid.scales - factors
        return factors + step

    def forward(self, given: Tensor) -> Tensor:
        return given * self.factors if self.grid is None else replace(self.grid, scales=self.factors).times(given)


class LowRank(nn.Module):
    """A parametrization that adds B A of rank `RANK`, nothing at first."""

    def __init__(self, like_OI: Tensor, seed: int):
        super().__init__()
        rows, columns = like_OI.shape
        random_RI = torch.randn(RANK, columns, generator=torch.Generator().manual_seed(seed)) / columns**0.5
        self.a_RI = nn.Parameter(random_RI.to(like_OI.device))
        self.b_OR = nn.Parameter(like_OI.new_zeros(rows, RANK))

    def forward(self, given_OI: Tensor) -> Tensor:
        return given_OI + self.b_OR @ self.a_RI


class OnGrid(nn.Module):
    """A parametrization that rounds the latent weight to its grid, straight-through for gradients."""

    def __init__(self, grid: Grid):
        super().__init__()
        self.grid = grid

    def forward(self, latent_OI: Tensor) -> Tensor:
        with torch.no_grad():
            step = self.grid.nearest(latent_OI) - latent_OI
        return latent_OI + step


class Trained:
    """A student in a network of its own, ready for an optimizer.

    network: holds the student's weights; takes the parametrizations. parameters: what is trained, by name.
    """

    def __init__(self, network: Network, student: Student, train: Train):
        # asked for again and again along a training, which takes the whole model anyway
        self.network, self.given = network, replace(student, matrices=dict(student.matrices))
        self._train = train
        self.parameters: dict[str, nn.Parameter] = {}
        self._scaled: dict[str, Scaled] = {}
        gains = [name for name in student.vectors if name.endswith("norm")]
        for name in gains:
            if train == "weights":
                self.parameters[name] = network.vector(name)
            else:
                self._add_scales(name, None)
        for number, name in enumerate(self.given.matrices):
            if name in ("embedding", "head"):
                continue
            grid = self.given.matrices[name].grid
            if train == "scales" and grid:
                self._add_scales(name, grid)
            elif train != "scales":
                self._add_latent(name, grid, number)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def _add_scales(self, name: str, grid: Grid | None) -> None:
        module = self.network.module(name)
        self._scaled[name] = Scaled(grid, module.weight)
        parametrize.register_parametrization(module, "weight", self._scaled[name], unsafe=True)
        self.parameters[name] = self._scaled[name].change

    def _add_latent(self, name: str, grid: Grid | None, seed: int) -> None:
        module = self.network.module(name)
        if grid is None:  # floats as they are may be the teacher's own
            module.weight = nn.Parameter(module.weight.detach().clone())
        latent = module.weight
        if self._train == "lora":
            low_rank = LowRank(latent, seed)
            parametrize.register_parametrization(module, "weight", low_rank, unsafe=True)
            self.parameters |= {f"{name}/a": low_rank.a_RI, f"{name}/b": low_rank.b_OR}
        else:
            self.parameters[name] = latent
        if grid:
            parametrize.register_parametrization(module, "weight", OnGrid(grid.to(latent.device)), unsafe=True)
            if self._train == "weights":
                self.parameters[name] = module.parametrizations.weight.original

    @torch.no_grad()
    def student(self) -> Student:
        """The weights of this moment, on their grids."""
        matrices, vectors = dict(self.given.matrices), dict(self.given.vectors)
        for name, scaled in self._scaled.items():
            factors = scaled.factors.cpu()
            if name in vectors:
                vectors[name] = vectors[name] * factors
            elif grid := matrices[name].grid:
                matrices[name] = replace(matrices[name], scales=grid.stored(grid.scales * factors))
        for name in {key.split("/")[0] for key in self.parameters} - self._scaled.keys():
            now = self.network.module(name).weight.detach().cpu()
            if name in vectors:
                vectors[name] = now.clone()
                continue
            given = matrices[name]
            stored = Weight.on_grid(given.grid, now) if given.grid else store_float(now.clone(), given.format)
            matrices[name] = replace(stored, bias=given.bias)
        return Student(self.given.decoder, self.given.plan, matrices, vectors)
