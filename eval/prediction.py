"""What the latency table says of a whole plan, corrected by whole models that were measured.

    T(plan) = rest + sum over sites of cost(site shape, action)

A cost is the table's entry, as far as it can be believed: an entry was measured in a stack, within the noise of the machine,
and in a whole model a format may be slower or faster than there. So rest and costs are Gaussian, with the deviations below as
the prior; a measured whole model is one linear observation of them; the posterior mean predicts, and its covariance tells how
well (Rasmussen & Williams 2006, equation A.6). Prefill and decode apart.

A search takes what was measured too fast, so what it finds is slower than the table says (the optimizer's curse, Smith &
Winkler 2006). Measuring what it finds, and conditioning on it, corrects just those costs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from compressor.plan import Action, Site
from eval.latency import NO_TIME, PHASES, LatencyTable, Milliseconds, entry_key

DEVIATIONS = {"rest": 0.1, "scale": 0.3, "format": 0.1, "entry": 0.05, "whole": 0.03}
"""Standard deviations, as shares. Of the rest from nothing, of a whole model's time; of a cost from its entry, beside the
entry's own error: what is common to all of them, to those of one format, and its own; of a whole model's time as measured."""


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """K shapes under actions.

    position: of each in the vectors, by its key. mean [1 + K] and covariance [1 + K, 1 + K], in ms, of the rest and of the
    costs by phase.
    """

    sites: tuple[Site, ...]
    position: Mapping[str, int]
    mean: Mapping[str, np.ndarray]
    covariance: Mapping[str, np.ndarray]

    @classmethod
    def fit(
        cls, table: LatencyTable, sites: Sequence[Site], wholes: Sequence[tuple[Mapping[str, Action], Milliseconds]]
    ) -> LatencyModel:
        """wholes: plans of whole models, and the time that each was measured to take.

        Raises:
            ValueError: there is none.
        """
        if not wholes:
            raise ValueError("at least one whole model must be measured to scale the table")
        position = {key: 1 + n for n, (key, _) in enumerate(table)}
        uses_NK = np.stack([_uses(plan, sites, position) for plan, _ in wholes])
        formats_K = np.array([key.split()[-1] for key in position])
        mean, covariance = {}, {}
        for phase in PHASES:
            measured_N = np.array([getattr(ms, phase) for _, ms in wholes])
            entries_K = np.array([getattr(entry, f"{phase}_ms") for _, entry in table])
            errors_K = np.array([getattr(entry.error, phase) for _, entry in table])
            mean[phase], covariance[phase] = _posterior(uses_NK, measured_N, entries_K, errors_K, formats_K)
        return cls(tuple(sites), position, mean, covariance)

    @property
    def rest(self) -> Milliseconds:
        """What a model takes beside its sites."""
        return Milliseconds(*(float(self.mean[phase][0]) for phase in PHASES))

    def predict(self, plan: Mapping[str, Action]) -> Milliseconds:
        """Expected milliseconds of a plan."""
        uses_K = _uses(plan, self.sites, self.position)
        return Milliseconds(*(float(uses_K @ self.mean[phase]) for phase in PHASES))

    def error(self, plan: Mapping[str, Action]) -> Milliseconds:
        """Standard error of `predict`."""
        uses_K = _uses(plan, self.sites, self.position)
        return Milliseconds(*(float(uses_K @ self.covariance[phase] @ uses_K) ** 0.5 for phase in PHASES))

    def site_ms(self, site: Site, action: Action) -> Milliseconds:
        """What one site contributes to `predict`: the additive cost that a search can plan with."""
        if action.keep == 0:
            return NO_TIME
        position = self.position[entry_key(site, action)]
        return Milliseconds(*(float(self.mean[phase][position]) for phase in PHASES))


def _uses(plan: Mapping[str, Action], sites: Sequence[Site], position: Mapping[str, int]) -> np.ndarray:
    """How often a plan takes the rest, once, and every cost: [1 + K]."""
    counts = Counter(entry_key(site, plan[site.name]) for site in sites if plan[site.name].keep)
    uses_K = np.zeros(1 + len(position))
    uses_K[0] = 1
    uses_K[[position[key] for key in counts]] = list(counts.values())
    return uses_K


def _posterior(
    uses_NK: np.ndarray, measured_N: np.ndarray, entries_K: np.ndarray, errors_K: np.ndarray, formats_K: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of rest and costs, none below 0, given N whole models."""
    own_K = np.hypot(errors_K, DEVIATIONS["entry"] * entries_K)
    same_KK = DEVIATIONS["scale"] ** 2 + DEVIATIONS["format"] ** 2 * (formats_K[:, None] == formats_K)
    mean, prior = np.append(0.0, entries_K), np.zeros((1 + len(entries_K),) * 2)
    prior[1:, 1:] = same_KK * np.outer(entries_K, entries_K) + np.diag(own_K**2)
    noise_NN = np.diag((DEVIATIONS["whole"] * measured_N) ** 2)
    for rest in (DEVIATIONS["rest"] * measured_N.mean(), 0.0):  # less than nothing would make small plans free
        prior[0, 0] = rest**2
        gain_KN = np.linalg.solve(uses_NK @ prior @ uses_NK.T + noise_NN, uses_NK @ prior).T
        found = mean + gain_KN @ (measured_N - uses_NK @ mean)
        if found[0] >= 0:
            break
    return np.maximum(found, 0.0), prior - gain_KN @ uses_NK @ prior
