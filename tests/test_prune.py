"""Structured pruning against the plain optimal brain surgeon."""

import itertools

import pytest
import torch

from compressor.prune import compensate, output_error, removal_order, unit_columns
from compressor.quantize import damped


def problem(rows=10, columns=12, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(256, columns) @ torch.randn(columns, columns)
    return torch.randn(rows, columns), damped(x.T @ x / 256, 0.01)


def loss_without(w, hessian, gone):
    """Least loss over all matrices whose columns `gone` are zero, by least squares in float64."""
    kept = [i for i in range(w.shape[1]) if i not in gone]
    w, h = w.double(), hessian.double()
    best = torch.zeros_like(w)
    best[:, kept] = torch.linalg.solve(h[kept][:, kept], (w @ h[:, kept]).T).T
    return float(output_error(best - w, h).sum())


def naive_order(w, hessian, unit):
    """Greedy: try every unit that is left, refit everything, take the cheapest."""
    order, units = [], w.shape[1] // unit
    while len(order) < units:
        losses = {}
        for candidate in set(range(units)) - set(order):
            gone = {u * unit + j for u in [*order, candidate] for j in range(unit)}
            losses[candidate] = loss_without(w, hessian, gone)
        order.append(min(losses, key=losses.get))
    return order


@pytest.mark.parametrize("unit", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_order_is_the_greedy_one(unit, seed):
    w, hessian = problem(seed=seed)
    assert removal_order(w, hessian, unit).tolist() == naive_order(w, hessian, unit)


def test_chunks_lose_little_against_one_by_one():
    w, hessian = problem(rows=20, columns=64)
    exact, chunked = (removal_order(w, hessian, chunk=chunk) for chunk in (1, 8))
    assert sorted(chunked.tolist()) == list(range(64))
    losses = [loss_without(w, hessian, set(order[:32].tolist())) for order in (exact, chunked)]
    random = loss_without(w, hessian, set(range(32)))
    assert losses[1] < losses[0] + 0.5 * (random - losses[0])


def test_compensation_is_the_surgeons_update_one_by_one():
    w, hessian = problem()
    order = removal_order(w, hessian)
    step, inverse = w.double().clone(), torch.linalg.inv(hessian.double())
    for j in order[:5].tolist():
        step -= torch.outer(step[:, j], inverse[j]) / inverse[j, j]
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    kept = order[5:].sort().values
    torch.testing.assert_close(compensate(w, hessian, kept), step[:, kept].float(), rtol=1e-3, atol=1e-4)


def test_compensation_beats_leaving_the_rest_alone():
    w, hessian = problem()
    kept = torch.arange(8)
    delta = torch.zeros_like(w)
    delta[:, kept] = compensate(w, hessian, kept)
    cut = torch.zeros_like(w)
    cut[:, kept] = w[:, kept]
    assert output_error(delta - w, hessian).sum() < output_error(cut - w, hessian).sum()


def test_keeping_everything_changes_nothing():
    w, hessian = problem()
    assert torch.equal(compensate(w, hessian, torch.arange(w.shape[1])), w)


def test_greedy_is_near_the_best_subset():
    w, hessian = problem(columns=8)
    greedy = loss_without(w, hessian, set(removal_order(w, hessian)[:3].tolist()))
    best = min(loss_without(w, hessian, set(gone)) for gone in itertools.combinations(range(8), 3))
    assert greedy <= 1.5 * best


def test_unit_columns():
    assert unit_columns(torch.tensor([2, 0]), 3).tolist() == [6, 7, 8, 0, 1, 2]
