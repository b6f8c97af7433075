"""The additive surrogate: how much KL each (site, action) would add alone. Two ways:

    fisher   s(site, action) = 1/2 sum over matrices, outputs o of  F_o (D H D^T)_oo        (see `compressor.calibrate`)
             one backward pass of the teacher
    noise    s(site, action) = alpha(site) sum over matrices of |D|^2 / sum over matrices of |W|^2
             alpha from one forward pass a site, with noise of known size on its weights (HIGGS, Malinovskii et al. 2024,
             arXiv 2411.17525, section 3)

D is the real change of the weights for pruning and for quantization at full size. What quantizing a *pruned* site adds
is taken from the full-size variant: the rows that stay, and the share of columns that stay. So only the full-size
variants are made for it, and the rest of the bank stays lazy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from compressor.bank import Bank, Factored
from compressor.executor import Executor
from compressor.plan import FP32, Action, ActionMenu, Format, Formats, Site
from compressor.prune import output_error, unit_columns
from compressor.quantize import as_floats
from compressor.student import full_plan

NOISE = 0.02
"""Squared norm of the noise as a share of the weights': what blocks of 4 bits lose, about."""


@torch.no_grad()
def sensitivities(
    bank: Bank,
    menu: ActionMenu,
    progress: Callable[[int, int], None] = lambda done, total: None,
    alphas: Mapping[str, float] | None = None,
) -> dict[str, np.ndarray]:
    """Predicted KL in nats per token for every action of every site, by site name: float64 [actions].

    alphas: of `noise_coefficients`; Fisher's weights if there are none.
    """
    result = {}
    for index, (name, actions) in enumerate(menu.items()):
        site, alpha = bank.teacher.sites[name], alphas[name] if alphas else None
        if site.layer is None:
            result[name] = np.array([_table_loss(bank, site, action, alpha) for action in actions])
        else:
            sub_layer = _SubLayer(bank, site, alpha)
            result[name] = np.array([sub_layer.loss(action) for action in actions])
        progress(index + 1, len(menu))
    return result


def noise_coefficients(
    executor: Executor, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, float]:
    """KL in nats per token for noise of the size of a site's own weights, by site name, where the KL is still small: a
    forward pass for every site, on one part of the scoring text."""
    teacher, student = executor.teacher, executor.student
    alphas, whole = {}, full_plan(teacher.decoder, "fp32", "fp32")
    executor.install(whole)
    for index, (name, site) in enumerate(teacher.sites.items()):
        random = torch.Generator().manual_seed(index)
        dense = {matrix.name: teacher.matrix(matrix.name).cpu() for matrix in site.matrices}
        deviation = (NOISE * _squared_norm(dense) / sum(w.numel() for w in dense.values())) ** 0.5
        noisy = {key: w + deviation * torch.randn(w.shape, generator=random) for key, w in dense.items()}
        student.install(site, whole[name], executor.bank.with_biases(site, site.units, as_floats(noisy)))
        alphas[name] = executor.compare(0).kl / NOISE
        student.restore(site, teacher)
        progress(index + 1, len(teacher.sites))
    return alphas


def _squared_norm(matrices: Mapping[str, Tensor]) -> float:
    return sum(float(w.square().sum()) for w in matrices.values())


class _SubLayer:
    """Losses of one attention or feed-forward; what actions share is computed once."""

    def __init__(self, bank: Bank, site: Site, alpha: float | None = None):
        self.bank, self.site, self.alpha = bank, site, alpha
        self.statistics = bank.statistics()
        self.full: dict[str, Tensor] = {matrix.name: bank.teacher.matrix(matrix.name) for matrix in site.matrices}
        self.norm = _squared_norm(self.full)
        self._quantized: dict[Format, dict[str, Tensor]] = {}
        self._pruned: dict[int, float] = {}
        self._factored: Factored = {}

    def loss(self, action: Action) -> float:
        loss = self._pruning_loss(action.keep)
        if action.keep == 0:
            return loss
        units, formats = self.bank.order(self.site)[self.site.units - action.keep :], Formats.parse(action.format)
        for matrix in self.site.matrices:
            if (format := formats.of(matrix.name)) == FP32:
                continue
            losses_O = self._quantization_losses(format)[matrix.name]
            if matrix.pruned == "rows":
                loss += float(losses_O[unit_columns(units, matrix.rows // self.site.units)].sum())
            else:
                loss += float(losses_O.sum()) * action.keep / self.site.units
        return loss

    def _pruning_loss(self, keep: int) -> float:
        if keep not in self._pruned:
            narrow = self.site.matrices[-1]
            delta = -self.full[narrow.name]
            if keep:
                columns = unit_columns(self.bank.kept(self.site, keep), narrow.columns // self.site.units)
                delta[:, columns] += self.bank.pruned(self.site, keep)[narrow.name]
            self._pruned[keep] = float(self._weigh(narrow.name, delta).sum()) if keep < self.site.units else 0.0
        return self._pruned[keep]

    def _quantization_losses(self, format: Format) -> dict[str, Tensor]:
        """Loss of every output of every matrix, [O], at full size."""
        if format not in self._quantized:
            variant = self.bank.variant(self.site, Action(self.site.units, format.name), self._factored)
            losses = {}
            for name, w_OI in self.full.items():
                losses[name] = self._weigh(name, variant[name].dequantize() - w_OI)
                if format.quantizes_input:
                    variance = self.statistics.rounding_variance(self._input(name), format.rowwise)
                    losses[name] += 0.5 * self.statistics.fisher(name) * variance * w_OI.square().sum(1)
            self._quantized[format] = losses
        return self._quantized[format]

    def _weigh(self, name: str, delta_OI: Tensor) -> Tensor:
        """Loss of every output of a matrix, [O], when its weights change by `delta_OI`."""
        if self.alpha is not None:
            return self.alpha / self.norm * delta_OI.square().sum(1)
        moment = self.statistics.second_moment(self._input(name))
        return 0.5 * self.statistics.fisher(name) * output_error(delta_OI, moment)

    def _input(self, name: str) -> str:
        return next(read for read, matrices in self.site.inputs.items() if name in (m.name for m in matrices))


def _table_loss(bank: Bank, site: Site, action: Action, alpha: float | None) -> float:
    """Loss of a quantized embedding or head; a tied table counts as both."""
    statistics, given_VD, loss = bank.statistics(), bank.teacher.matrix(site.name), 0.0
    noise = None if alpha is None else alpha / _squared_norm({site.name: given_VD})
    for rows, part in bank.variant(site, action)[site.name].row_batches():
        delta_RD = part.dequantize() - given_VD[rows]
        if noise is not None:
            loss += noise * float(delta_RD.square().sum())
            continue
        if site.name == "embedding":
            looked_up_D = statistics.token_frequency()[rows] @ delta_RD.square()
            loss += float((statistics.fisher("embedding") * looked_up_D).sum()) / 2
        if site.name == "head" or bank.teacher.decoder.tied:
            error_R = output_error(delta_RD, statistics.second_moment("head.in"))
            loss += float((statistics.fisher("head")[rows] * error_R).sum()) / 2
    return loss
