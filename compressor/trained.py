"""What is trained of a student: the norm gains and, on the grids that are deployed, its matrices or their scales.

    scales    those of all quantized matrices; codes stay. Chen et al. 2024, "EfficientQAT", section 3.3. Departures: gains as
              well; changes are relative and in units of a grid's own precision, 2^-bits, so that one learning rate suits
              all: what helps 2 bits would spoil 8
    weights   latent float copies of all matrices; the forward pass rounds them to their grids, gradients pass straight
              through (Bengio et al. 2013). Scales and zero points stay

The embedding and the head stay as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.model import Network
from compressor.quantize import Grid, Weight, store_float
from compressor.student import Student

Train = Literal["scales", "weights"]

LEARNING_RATES: dict[Train, float] = {"scales": 1e-2, "weights": 1e-4}
"""Peak learning rates that suit most students."""

GAIN_BITS = 4
"""Gains are trained as finely as scales of so many bits."""


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


class Trained:
    """A student in a network of its own, ready for an optimizer.

    network: holds the student's weights; takes the parametrizations. parameters: what is trained, by matrix or vector.
    """

    def __init__(self, network: Network, student: Student, train: Train):
        self.network, self.given = network, student
        self.parameters: dict[str, nn.Parameter] = {}
        self._scaled: dict[str, Scaled] = {}
        add = self._add_scales if train == "scales" else self._add_weights
        for name in [*student.matrices, *student.vectors]:
            if name not in ("embedding", "head"):
                add(name, network.module(name), student.matrices[name].grid if name in student.matrices else None)
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)

    def _add_scales(self, name: str, module: Any, grid: Grid | None) -> None:
        if grid or name in self.given.vectors:
            scaled = Scaled(grid, module.weight)
            parametrize.register_parametrization(module, "weight", scaled, unsafe=True)
            self.parameters[name], self._scaled[name] = scaled.change, scaled

    def _add_weights(self, name: str, module: Any, grid: Grid | None) -> None:
        self.parameters[name] = module.weight
        if grid:
            here = Grid(grid.format, grid.scales.to(module.weight), grid.zeros.to(module.weight))
            parametrize.register_parametrization(module, "weight", OnGrid(here), unsafe=True)
            self.parameters[name] = module.parametrizations.weight.original

    @torch.no_grad()
    def student(self) -> Student:
        """The weights of this moment, on their grids."""
        matrices, vectors = dict(self.given.matrices), dict(self.given.vectors)
        for name, parameter in self.parameters.items():
            trained = parameter.detach().cpu()
            if name in self._scaled:
                factors = self._scaled[name].factors.cpu()
                if name in vectors:
                    vectors[name] = vectors[name] * factors
                elif grid := matrices[name].grid:
                    matrices[name] = replace(matrices[name], scales=grid.scales * factors)
            elif name in vectors:
                vectors[name] = trained.clone()
            elif grid := matrices[name].grid:
                matrices[name] = replace(Weight.on_grid(grid, trained), bias=matrices[name].bias)
            else:
                stored = store_float(trained.clone(), matrices[name].format)
                matrices[name] = replace(stored, bias=matrices[name].bias)
        return Student(self.given.decoder, self.given.plan, matrices, vectors)
