"""Dynamic programming over the additive surrogate: minimise sum_s sensitivity[s, a_s] within the budgets.

Departures from the knapsack table: a state is what is really left of every budget, not a rounded cost, so a plan is
never over and several budgets are one algorithm; states that a Lagrangian bound rules out are dropped (exact); what is
left beyond `width` states is thinned to the best one in each cell of a grid over what is left (not exact, small).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from compressor.plan import Formats, Plan, Score
from policies.base import History, Question, generator
from policies.problem import Problem


class DynamicProgramming:
    """First the plan for the sensitivities as given, then for sensitivities that are wrong in plausible ways.

    Ask n draws: a power of 0.5 to 1.5, and a factor exp(0.5 * normal) for every kind of site, every number of bits and
    for pruned actions. The scores it is told change nothing but which plans aren't asked for again.
    """

    name = "dynamic_programming"

    def __init__(self, problem: Problem, seed: int = 0):
        self.problem, self.seed, self.history = problem, seed, History(problem)
        self.reference = solve(problem)

    def ask(self) -> Question:
        first = self.reference not in self.history
        return Question(self.problem.plan(self.reference if first else tempered(self.problem, self.seed, self.history)))

    def tell(self, plan: Plan, score: Score) -> None:
        self.history.add(plan, score)


def tempered(
    problem: Problem, seed: int, history: History, solver: Callable[..., np.ndarray] | None = None
) -> np.ndarray:
    """The first plan [S] of ever more perturbed sensitivities that isn't in the history; the last one if all are.

    solver: (problem[, sensitivities [S, A]]) -> plan; `solve` if none is given.
    """
    solver = solver or solve
    if len(history) and (plain := solver(problem)) not in history:
        return plain
    rng = generator(seed, len(history))
    for attempt in range(12):
        indices = solver(problem, perturbed(problem, rng, spread=0.5 + 0.25 * attempt))
        if indices not in history:
            break
    return indices


def perturbed(problem: Problem, rng: np.random.Generator, spread: float) -> np.ndarray:
    """Sensitivities [S, A] to a random power, times random factors exp(spread * normal) for families of actions."""
    sens_SA = problem.sensitivity_SA
    scale = max(float(np.median(sens_SA[sens_SA > 0])) if (sens_SA > 0).any() else 1.0, 1e-12)
    result_SA = scale * (sens_SA / scale) ** rng.uniform(0.5, 1.5)
    kinds = {kind: spread * rng.normal() for kind in ("attention", "ffn", "embedding", "head")}
    named = {action.format for menu in problem.actions for action in menu}
    widths = sorted({format.bits for name in named for format in Formats.parse(name).each})
    bits = {width: spread * rng.normal() for width in widths}
    pruned = spread * rng.normal()
    for s, (site, menu) in enumerate(zip(problem.sites, problem.actions)):
        for a, action in enumerate(menu):
            own = float(np.mean([bits[format.bits] for format in Formats.parse(action.format).each]))
            factor = kinds[site.kind] + own + pruned * (action.keep < site.units)
            result_SA[s, a] *= np.exp(factor)
    return result_SA


def solve(
    problem: Problem, sensitivity: Sequence[np.ndarray] | np.ndarray | None = None, width: int = 1000
) -> np.ndarray:
    """The plan [S] of least summed sensitivity that fits; the problem's own sensitivities if none are given.

    sensitivity: [A_s] for every site, or padded [S, A]. Exact as long as no more than `width` states survive the bound
    at any site; near optimal beyond.
    """
    if sensitivity is None:
        sensitivity = problem.sensitivity_SA
    sens_SA = sensitivity if isinstance(sensitivity, np.ndarray) else problem.pad(sensitivity)
    price_D = prices(problem, sens_SA)
    priced_SA = np.where(problem.valid_SA, sens_SA + problem.units_SAD @ price_D, np.inf)
    rest_S = np.append(priced_SA.min(1)[::-1].cumsum()[::-1], 0.0)
    incumbent = problem.walk(priced_SA)
    ceiling = sens_SA[np.arange(len(sens_SA)), incumbent].sum() + 1e-9 * (1e-9 + np.abs(sens_SA).max())

    left_LD, sum_L = problem.room_D[None], np.zeros(1)
    trail: list[tuple[np.ndarray, np.ndarray]] = []
    for s in range(len(sens_SA)):
        parent, action = np.nonzero(problem.allowed(s, left_LD))
        left_LD, sum_L = left_LD[parent] - problem.units_SAD[s, action], sum_L[parent] + sens_SA[s, action]
        bound_L = sum_L + rest_S[s + 1] - left_LD @ price_D
        kept = np.nonzero(bound_L <= ceiling)[0]
        if not len(kept):
            return incumbent
        kept = kept[_best_of_cells(left_LD[kept], bound_L[kept], width)]
        left_LD, sum_L = left_LD[kept], sum_L[kept]
        trail.append((parent[kept], action[kept]))
    label, chosen = int(sum_L.argmin()), []
    for parent, action in reversed(trail):
        chosen.append(int(action[label]))
        label = int(parent[label])
    return np.array(chosen[::-1])


def prices(problem: Problem, sens_SA: np.ndarray) -> np.ndarray:
    """Lagrange multipliers [D] in nats per unit: where sum_s min_a (sens + price * cost) - price * room is greatest.

    The function is concave. Found on a grid in log price (with 0) that closes in on its best point.
    """
    count = len(problem.budgets)
    points = {1: 17, 2: 9, 3: 5}[count]
    spread_D = np.where(problem.valid_SA[..., None], problem.units_SAD, 0).max((0, 1)) + 1.0
    costs_SAD = np.where(problem.valid_SA[..., None], problem.units_SAD / spread_D, 1e6)
    sens_SA = np.where(problem.valid_SA, sens_SA, np.inf)
    centre_D, reach = np.full(count, np.log(max(float(sens_SA[problem.valid_SA].mean()), 1e-12))), 14.0
    best_D, best = np.zeros(count), -np.inf
    for _ in range(14):
        axes = [np.append(np.exp(c + np.linspace(-reach, reach, points)), 0.0) for c in centre_D]
        grid_GD = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, count)
        dual_G = (sens_SA + np.einsum("gd,sad->gsa", grid_GD, costs_SAD)).min(-1).sum(-1)
        dual_G -= grid_GD @ (problem.room_D / spread_D)
        if dual_G.max() > best:
            best_D, best = grid_GD[dual_G.argmax()], dual_G.max()
        centre_D = np.where(best_D > 0, np.log(np.maximum(best_D, 1e-300)), centre_D)
        reach *= 0.5
    return best_D / spread_D


def _best_of_cells(left_LD: np.ndarray, bound_L: np.ndarray, width: int) -> np.ndarray:
    """Positions of at most some `width` states: the least bound in each cell of what is left."""
    if len(bound_L) <= width:
        return np.arange(len(bound_L))
    low, high = left_LD.min(0), left_LD.max(0)
    steps = int(width ** (1 / left_LD.shape[1]))
    cells_LD = (left_LD - low) * steps // (high - low + 1)
    cell_L = cells_LD @ (steps ** np.arange(left_LD.shape[1]))
    order = np.lexsort((bound_L, cell_L))
    first = np.append(True, np.diff(cell_L[order]) != 0)
    return order[first]
