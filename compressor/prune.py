"""Structured pruning with optimal-brain-surgeon compensation: which input units of a matrix go, and what the rest becomes.

Arithmetic on tensors only. Shape letters: O output rows, I input columns, K columns kept, U units (I / unit columns each).

Removing the columns S of W costs, after the best update of the columns that stay,
    loss(S) = tr(W_:S ([H^-1]_SS)^-1 W_:S^T)            H = E[x x^T], damped
and the matrix that attains it is the least-squares fit W_K = W H_:K (H_KK)^-1.
Source: Kurtic et al. 2023, "ZipLM", equations 2 to 4 (there the update is applied unit by unit; for the same units
the closed form is the same matrix). Departure: cheap units go in chunks whose members are scored together.
"""

from __future__ import annotations

import torch
from torch import Tensor


def removal_order(w_OI: Tensor, hessian_II: Tensor, unit: int = 1, chunk: int = 1) -> Tensor:
    """The order in which units of `unit` consecutive columns are best removed, int64 [U]; the first goes first.

    Greedy: the unit of least loss goes, the others are compensated, scores are taken anew.

    Args:
        w_OI: float32 weights.
        hessian_II: positive definite (damped) second moment of the input.
        unit: columns per unit.
        chunk: units that go between two scorings; 1 is the exact greedy order.
    """
    units = w_OI.shape[1] // unit
    w = w_OI.clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian_II))
    left = torch.ones(units, dtype=torch.bool, device=w.device)
    order: list[Tensor] = []
    while left.any():
        losses = _unit_losses(w, inverse, unit, left)
        gone = torch.argsort(losses)[: min(chunk, int(left.sum()))]
        order.append(gone)
        left[gone] = False
        columns = unit_columns(gone, unit)
        step = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
        w -= w[:, columns] @ step
        inverse = inverse - inverse[:, columns] @ step
        # exact zeros in place of rounding residue
        w[:, columns] = 0
        inverse[columns] = 0
        inverse[:, columns] = 0
    return torch.cat(order)


def _unit_losses(w: Tensor, inverse: Tensor, unit: int, left: Tensor) -> Tensor:
    if unit == 1:
        losses = w.square().sum(0) / inverse.diagonal().clamp_min(1e-30)
    else:
        losses = w.new_zeros(len(left))
        for index in left.nonzero().flatten().tolist():
            part = slice(index * unit, (index + 1) * unit)
            losses[index] = (torch.linalg.solve(inverse[part, part], w[:, part].T) * w[:, part].T).sum()
    return torch.where(left, losses, torch.inf)


def unit_columns(units: Tensor, unit: int) -> Tensor:
    """Column indices of the given units, in the order given."""
    return (units[:, None] * unit + torch.arange(unit, device=units.device)).flatten()


def compensate(w_OI: Tensor, hessian_II: Tensor, kept_K: Tensor) -> Tensor:
    """The best matrix over the columns `kept_K` alone: W H_:K (H_KK)^-1, [O, K]."""
    if len(kept_K) == w_OI.shape[1]:
        return w_OI[:, kept_K].clone()
    factor = torch.linalg.cholesky(hessian_II[kept_K][:, kept_K])
    return torch.cholesky_solve((w_OI @ hessian_II[:, kept_K]).T, factor).T.contiguous()


def output_error(delta_OI: Tensor, hessian_II: Tensor) -> Tensor:
    """Mean squared change of every output, [O]: diag(D H D^T)."""
    return ((delta_OI @ hessian_II) * delta_OI).sum(1)
