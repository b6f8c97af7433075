"""Synthetic searches with known answers: small ones for brute force, and a landscape in the style of the real one."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Protocol

import numpy as np

from compressor.plan import DROP, PARTS, Action, Format, Matrix, Plan, Score, Site
from policies.problem import Problem


class Scorer(Protocol):
    def __call__(self, plan: Plan, part: int | None = None) -> Score: ...


def tiny(
    seed: int, sites: int = 5, actions: int = 4, budgets: int = 1, interaction: float = 1.0, room: float = 1.0
) -> tuple[Problem, Scorer]:
    """A few sites, whole-number costs; truth: prediction * exp(0.7 * normal), plus products of neighbours.

    Without `interaction` the prediction is the truth. room: limits as multiples of the mean plan's cost.
    """
    rng = np.random.default_rng(seed)
    formats = ["w8", "w4", "w2"]
    menus = tuple(
        tuple(sorted({Action(keep, fmt) for keep in (8, 6, 4) for fmt in formats}, reverse=True)[:actions])
        for _ in range(sites)
    )
    places = tuple(site("attention" if i % 2 else "ffn", i, 8) for i in range(sites))
    names = ("bytes", "prefill_ms", "decode_ms")[:budgets]
    costs = {name: tuple(rng.integers(1, 30, actions).astype(float) for _ in menus) for name in names}
    sensitivity = tuple(rng.lognormal(-2, 1.0, actions) for _ in menus)
    truth = [s * rng.lognormal(0, 0.7, actions) if interaction else s for s in sensitivity]
    limits = {name: room * float(sum(row.mean() for row in rows)) for name, rows in costs.items()}
    problem = Problem(places, menus, sensitivity, costs, dict.fromkeys(names, 0.0), limits)

    def score(plan: Plan, part: int | None = None) -> Score:
        x = np.array([row[i] for row, i in zip(truth, problem.indices(plan))])
        kl = float(x.sum() + interaction * np.sqrt(x[1:] * x[:-1]).sum())
        return noisy(kl, plan, part)

    return problem, score


def noisy(kl: float, plan: Plan, part: int | None) -> Score:
    """Every part of the text has a level of its own, and an error that is the same whenever the plan is scored on it."""
    error_P = np.random.default_rng(int(plan.digest, 16)).normal(size=PARTS)
    factor_P = np.exp(np.linspace(-0.1, 0.2, PARTS) + 0.025 * error_P)
    by_part = tuple(kl * factor_P / factor_P.mean())
    if part is not None:
        return Score(by_part[part], float(np.exp(by_part[part])), 256, part)
    return Score(kl, float(np.exp(kl)), 2048, by_part=by_part)


def site(kind: str, layer: int, units: int, hidden: int = 64) -> Site:
    matrix = Matrix(f"{layer}.{kind}.weight", units * 32, hidden, "rows")
    return Site(f"layers.{layer}.{kind}", kind, layer, units, (matrix,))  # type: ignore[arg-type]


def brute_force(problem: Problem, score: Scorer) -> float:
    """The least KL of all plans that fit."""
    every = np.array(list(product(*(range(len(menu)) for menu in problem.actions))))
    return min(score(problem.plan(indices)).kl for indices in every[problem.fits(every)])


def landscape(
    seed: int, blocks: int = 30, shared: float = 0.0, limits: Mapping[str, float] | None = None, tight: float = 0.30
) -> tuple[Problem, Scorer]:
    """A decoder of `blocks` blocks and an embedding (61 sites for 30), 13 actions a site.

    The prediction misses the truth by exp(0.8 * normal). `shared` is the part of that variance which sites have in
    common: half of it by (kind, bits), (kind, keep) and depth, half by site; the rest is drawn for every action.
    Truth: KL = 12 (1 - exp(-u / 12)), u = t + 0.05 t^2, t = sum_s x_s + 0.5 sum_s sqrt(x_s x_s+1).
    limits: factors on the cost of the whole model in w8; `tight` on bytes if None.
    """
    rng = np.random.default_rng(seed)
    places = [Site("embedding", "embedding", None, 1, (Matrix("embedding", 16384, 576, "neither"),))]
    for i in range(blocks):
        q, kv, f = Matrix(f"{i}.q", 576, 576, "rows"), Matrix(f"{i}.k", 384, 576, "rows"), 1536
        attention = (q, kv, Matrix(f"{i}.o", 576, 576, "columns"))
        ffn = (Matrix(f"{i}.up", 2 * f, 576, "rows"), Matrix(f"{i}.down", 576, f, "columns"))
        places += [
            Site(f"layers.{i}.attention", "attention", i, 4, attention),
            Site(f"layers.{i}.ffn", "ffn", i, f, ffn),
        ]
    keeps, formats = (1.0, 0.75, 0.5, 0.25), ("w8", "w4", "w2")
    menus, sensitivity, truth = [], [], []
    family: dict[object, float] = {}
    half = np.sqrt(shared / 2)
    slope = rng.normal()
    for place in places:
        pruned = (1.0,) if place.kind == "embedding" else keeps
        menu = [Action(round(k * place.units), fmt) for k in pruned for fmt in formats]
        menu = sorted(menu, key=lambda a: -place.size_bytes(a)) + ([DROP] if place.layer is not None else [])
        depth = 0.5 if place.layer is None else place.layer / blocks
        base = 0.02 * np.exp(rng.normal(0, 0.5) + 1.0 * (abs(depth - 0.5) * 2) ** 2)
        base *= {"embedding": 3.0, "attention": 0.8, "ffn": 1.5}[place.kind]
        own = rng.normal()
        xs, ys = [], []
        for action in menu:
            bits, lost = Format.parse(action.format).bits, 1 - action.keep / place.units
            step = {8: 0.005, 4: 0.15, 2: 4.0, 0: 0.0}[bits]
            xs.append(base * (step * (1 - lost) + 8.0 * lost**1.7))
            for key in ((place.kind, "bits", bits), (place.kind, "lost", round(lost, 2))):
                family.setdefault(key, rng.normal())
            common = 0.6 * family[place.kind, "bits", bits] + 0.6 * family[place.kind, "lost", round(lost, 2)]
            common += 0.53 * slope * (2 * depth - 1) * np.sqrt(3)
            error = half * common + half * own + np.sqrt(1 - shared) * rng.normal()
            ys.append(xs[-1] * np.exp(0.8 * error))
        menus.append(tuple(menu))
        sensitivity.append(np.array(xs))
        truth.append(np.array(ys))
    ms = {"w8": (1.4, 0.27), "w4": (1.1, 0.17), "w2": (1.15, 0.14), "none": (0.0, 0.0)}
    size = [[(p.parameters * a.keep / p.units * 1e-6, a) for a in m] for p, m in zip(places, menus)]
    costs = {
        "bytes": tuple(np.array([float(p.size_bytes(a)) for a in m]) for p, m in zip(places, menus)),
        "prefill_ms": tuple(np.array([n * 4 * ms[a.format][0] for n, a in row]) for row in size),
        "decode_ms": tuple(np.array([n * ms[a.format][1] for n, a in row]) for row in size),
    }
    fixed = {"bytes": 1e5, "prefill_ms": 20.0, "decode_ms": 1.0}
    full = {name: sum(row[0] for row in rows) for name, rows in costs.items()}
    limits = {name: fixed[name] + factor * full[name] for name, factor in (limits or {"bytes": tight}).items()}
    problem = Problem(tuple(places), tuple(menus), tuple(sensitivity), costs, fixed, limits)

    def score(plan: Plan, part: int | None = None) -> Score:
        x = np.array([row[i] for row, i in zip(truth, problem.indices(plan))])
        t = x.sum() + 0.5 * np.sqrt(x[1:] * x[:-1]).sum()
        kl = float(12 * (1 - np.exp(-(t + 0.05 * t * t) / 12)))
        return noisy(kl, plan, part)

    return problem, score
