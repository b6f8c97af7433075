"""What a policy is given: menus, predicted sensitivities, costs and budgets, as arrays. Knows nothing of models.

Letters: S sites, A actions of the longest menu (shorter ones are padded), B plans at once, D budgets, V vectors of a
suffix. A plan is an int array [S] of positions in the menus. Costs are held as whole units (a byte, a nanosecond),
rounded up, and limits rounded down, so that sums are exact and a plan that fits in units fits in truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np

from compressor.errors import BudgetError
from compressor.plan import Action, Plan, Site

UNITS = {"bytes": 1.0, "prefill_ms": 1e-6, "decode_ms": 1e-6}
"""Size of one whole unit of a cost, by its name."""

FAR = 2**50
"""Cost in units of an action that isn't on the menu."""


@dataclass(frozen=True, eq=False)
class Problem:
    """One search: sites in depth order with a menu each, and numbers about them.

    actions: the menu of every site.
    sensitivity: nats per token that each action is predicted to add alone, [A_s] >= 0; may be wrong by a large factor.
    costs: `bytes`, `prefill_ms`, `decode_ms` of each action, [A_s]; differences to a base may be negative.
    fixed: the part of each cost that no action changes; limits: the budgeted costs only, one or more, `fixed` included.

    Raises:
        ValueError: arrays and menus disagree, or a limit has no costs.
        BudgetError: no plan fits.
    """

    sites: tuple[Site, ...]
    actions: tuple[tuple[Action, ...], ...]
    sensitivity: tuple[np.ndarray, ...]
    costs: Mapping[str, tuple[np.ndarray, ...]]
    fixed: Mapping[str, float]
    limits: Mapping[str, float]

    def __post_init__(self) -> None:
        sizes = [len(menu) for menu in self.actions]
        for name, arrays in {"sensitivity": self.sensitivity, **self.costs}.items():
            if [len(array) for array in arrays] != sizes or len(self.sites) != len(sizes) or 0 in sizes:
                raise ValueError(f"{name}: expected one number for each of {sizes} actions of {len(self.sites)} sites")
        if unknown := set(self.limits) - (set(self.costs) & set(UNITS)):
            raise ValueError(f"limits on {sorted(unknown)}: expected costs for them, among {sorted(UNITS)}")
        if not self.limits or not all(np.isfinite(s).all() and (s >= 0).all() for s in self.sensitivity):
            raise ValueError("expected a limit, and sensitivities that are finite and not negative")
        self._check_reachable()

    # The data as padded arrays.

    @cached_property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgeted costs: the meaning of the axis D."""
        return tuple(name for name in UNITS if name in self.limits)

    @cached_property
    def valid_SA(self) -> np.ndarray:
        sizes = np.array([len(menu) for menu in self.actions])
        return np.arange(sizes.max()) < sizes[:, None]

    @cached_property
    def sensitivity_SA(self) -> np.ndarray:
        """Predicted sensitivities in nats per token; 0 off the menu."""
        return self.pad(self.sensitivity)

    @cached_property
    def units_SAD(self) -> np.ndarray:
        """Budgeted costs in whole units, int64, FAR off the menu."""
        units = [np.ceil(np.round(self.pad(self.costs[name]) / UNITS[name], 3)) for name in self.budgets]
        return np.where(self.valid_SA[..., None], np.stack(units, -1), FAR).astype(np.int64)

    @cached_property
    def room_D(self) -> np.ndarray:
        """What the actions of a plan may cost together, in whole units."""
        room = [(self.limits[name] - self.fixed.get(name, 0.0)) / UNITS[name] for name in self.budgets]
        return np.floor(np.round(room, 3)).astype(np.int64)

    @cached_property
    def share_SAD(self) -> np.ndarray:
        """Budgeted costs as shares of the room; enormous off the menu."""
        return self.units_SAD / np.maximum(np.abs(self.room_D), 1)

    def pad(self, rows: Sequence[np.ndarray]) -> np.ndarray:
        """One array a site, [A_s] -> [S, A], 0 off the menu."""
        padded = np.zeros(self.valid_SA.shape)
        padded[self.valid_SA] = np.concatenate([np.asarray(row, float) for row in rows])
        return padded

    # Plans.

    def plan(self, indices: np.ndarray) -> Plan:
        """Positions in the menus, [S] -> plan."""
        chosen = zip(self.sites, self.actions, indices, strict=True)
        return Plan(tuple((site.name, menu[int(i)]) for site, menu, i in chosen))

    def indices(self, plan: Plan) -> np.ndarray:
        """The inverse of `plan`.

        Raises:
            ValueError: an action isn't on the menu of its site.
        """
        chosen = zip(self.sites, self.actions, strict=True)
        return np.array([menu.index(plan[site.name]) for site, menu in chosen])

    def cost(self, indices: np.ndarray) -> dict[str, float]:
        """All known costs of a plan [S] (bytes, ms), `fixed` included, budgeted or not."""
        chosen = {name: sum(float(row[i]) for row, i in zip(rows, indices)) for name, rows in self.costs.items()}
        return {name: value + self.fixed.get(name, 0.0) for name, value in chosen.items()}

    def used(self, indices_BS: np.ndarray) -> np.ndarray:
        """Budgeted costs of plans in whole units, `fixed` excluded: [..., S] -> [..., D]."""
        return self.units_SAD[np.arange(len(self.sites)), indices_BS].sum(-2)

    def fits(self, indices_BS: np.ndarray) -> np.ndarray:
        """Whether plans are within every budget: [..., S] -> bool [...]."""
        return np.all(self.used(indices_BS) <= self.room_D, axis=-1)

    # Walks over the sites in depth order.

    def allowed(self, site: int, left_BD: np.ndarray) -> np.ndarray:
        """The actions after which a walk can still end within all budgets: bool [B, A].

        left_BD: what is left for this site and those after it, in whole units; `room_D` at the first site, then less
        `units_SAD[site, choice]` after every choice.

        An action a is allowed iff cost(a) + v <= left, in all D at once, for some vector v of the next suffix. Every v
        is the cost of a real completion: v = cost(b) + w for an action b of the next site and a vector w of the suffix
        after it. So once a is taken, w witnesses that b is allowed at the next site, and no walk that starts with an
        allowed action meets an empty mask. Thinning only removes witnesses, never makes false ones. With one budget
        V = 1, the minimum, and the mask is exact; with several it may refuse what would have fitted, never the reverse.
        """
        reach_BAD = left_BD[:, None] - self.units_SAD[site]
        fits_BAV = np.ones((*reach_BAD.shape[:2], len(self._suffixes[site + 1])), bool)
        for d, v_V in enumerate(self._suffixes[site + 1].T):
            fits_BAV &= v_V <= reach_BAD[:, :, d, None]
        return np.any(fits_BAV, axis=-1)

    def slack(self, site: int, left_BD: np.ndarray) -> np.ndarray:
        """What is left, from 0 (only the cheapest rest fits) to 1 (any rest fits): [B, D]."""
        low, high = self._extremes
        return np.clip((left_BD - low[site]) / np.maximum(high[site] - low[site], 1), 0.0, 1.0)

    def walk(self, penalty_SA: np.ndarray) -> np.ndarray:
        """The plan [S] that takes the allowed action of least penalty at every site."""
        left, chosen = self.room_D[None], []
        for site, penalty in enumerate(penalty_SA):
            chosen.append(int(np.where(self.allowed(site, left)[0], penalty, np.inf).argmin()))
            left = left - self.units_SAD[site, chosen[-1]]
        return np.array(chosen)

    @cached_property
    def _extremes(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest cost of the sites from s on, each budget alone: [S + 1, D] twice."""
        low_SD = self.units_SAD.min(1)
        high_SD = np.where(self.valid_SA[..., None], self.units_SAD, -FAR).max(1)
        tails = [np.concatenate([x[::-1].cumsum(0)[::-1], np.zeros_like(x[:1])]) for x in (low_SD, high_SD)]
        return tails[0], tails[1]

    @cached_property
    def _suffixes(self) -> list[np.ndarray]:
        """Per site s a thinned set of Pareto-minimal costs of the sites from s on, [V, D]; last, a zero for the end."""
        slack_D = np.maximum(self.room_D - self._extremes[0][0], 1)
        suffixes = [np.zeros((1, len(self.budgets)), np.int64)]
        for units_AD, valid_A in zip(self.units_SAD[::-1], self.valid_SA[::-1]):
            sums_VD = (units_AD[valid_A, None] + suffixes[-1]).reshape(-1, len(self.budgets))
            suffixes.append(_minimal(_thinned(sums_VD, slack_D)))
        return suffixes[::-1]

    def _check_reachable(self) -> None:
        if (self._suffixes[0] <= self.room_D).all(1).any():
            return
        excess_V = np.max((self._suffixes[0] - self.room_D) / np.maximum(np.abs(self.room_D), 1), axis=1)
        nearest_D = self._suffixes[0][excess_V.argmin()]
        lines, alone = [], True
        for d, name in enumerate(self.budgets):
            smallest = self._extremes[0][0, d] * UNITS[name] + self.fixed.get(name, 0.0)
            nearest = nearest_D[d] * UNITS[name] + self.fixed.get(name, 0.0)
            lines.append(f"{name}: limit {self.limits[name]:,.10g}, smallest reachable {smallest:,.10g}")
            lines[-1] += f", nearest plan {nearest:,.10g}" if len(self.budgets) > 1 else ""
            alone &= smallest <= self.limits[name]
        why = "; each can be met alone, together no plan was found" if alone else ""
        raise BudgetError(
            f"no plan fits the budget: {'; '.join(lines)}{why}. Raise the limit, or offer smaller actions in the "
            "recipe's search section: fewer bits, lower keep fractions, 0 to drop sub-layers"
        )


def _minimal(costs_VD: np.ndarray) -> np.ndarray:
    """The vectors that no other one undercuts, each once."""
    if costs_VD.shape[1] == 1:
        return costs_VD.min(0, keepdims=True)
    costs_VD = np.unique(costs_VD, axis=0)
    below_VV = (costs_VD[:, None] <= costs_VD[None]).all(-1)
    return costs_VD[below_VV.sum(0) == 1]


def _thinned(costs_VD: np.ndarray, slack_D: np.ndarray, most: int = 64) -> np.ndarray:
    """Some 100 vectors at most: for a fan of weights w those of least sum_d w_d h_d and of least max_d w_d h_d.

    The heights h above the minima are measured in the slack of the whole budget; for the maxima in the range between
    the minima too. The sums compose: the best whole plan of each weight is never lost.
    """
    count = costs_VD.shape[1]
    if len(costs_VD) <= most or count == 1:
        return costs_VD
    steps = {2: 31, 3: 7}[count]
    fan_WD = np.array([w for w in product(range(steps + 1), repeat=count) if sum(w) == steps]) / steps + 1e-6
    above_VD = costs_VD - costs_VD.min(0)
    range_D = np.maximum(above_VD[above_VD.argmin(0)].max(0), 1)
    kept = set((above_VD / slack_D @ fan_WD.T).argmin(0).tolist())
    for heights_VD in (above_VD / range_D, above_VD / slack_D):
        highest_VW = np.max([np.outer(h_V, w_W) for h_V, w_W in zip(heights_VD.T, fan_WD.T)], axis=0)
        kept |= set((highest_VW + 1e-6 * heights_VD.sum(1, keepdims=True)).argmin(0).tolist())
    return costs_VD[sorted(kept)]
