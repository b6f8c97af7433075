"""The critic: log KL of a whole plan, learned from the few plans that were really scored. Knows nothing of actors.

    x_s   = sensitivity[s, a_s] * exp(sum of the corrections theta that apply to (s, a_s))
    t     = sum_s x_s + sum_h sum_s eta_hk sqrt(x_s x_s+h)        h: 1, 2, 4, 8 sites apart; k: kinds of the two
    log KL = b + (1 + beta) z + gamma z^2,                 z = log t - log t(prior's best plan)

theta, b, beta, gamma have independent normal priors around 0, so with nothing told the critic is nearly the additive
surrogate; eta's lies around 0.3, since the errors of sites add up more often than they cancel. A sensitivity beyond a nat
is bent towards it, as no KL goes on growing. There are more corrections (some 1,300 for 61 sites) than scores (20 to 150):
the prior's groups, from whole families of actions down to one action of one site, decide how far a score speaks. Fitted
by Gauss-Newton in the space of scores (iterated Kalman update; Bell & Cathey 1993). Uncertainty: an ensemble, each member
fitted to noisy scores from a prior mean drawn from the prior (randomized maximum likelihood, Oliver et al. 1996), which
for a linear model is an exact posterior sample.

What scores on some parts say of all of the text (`History.estimates`) is log KL + b' + beta' z, and has noise of its own.

Departure: the noise of a score grows with its distance to the best one, because the form above is meant for good plans
and destroyed students say little about them.

Letters: E members, N scored plans, B plans, S sites, A actions, F parameters, K corrections that apply to one action, Q pairs
of sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

import numpy as np

from compressor.plan import PARTS, Action, Formats, Site
from policies.problem import Problem

GROUPS: dict[str, tuple[float, Callable[[Site, Action, float], tuple[object, float]]]] = {
    # name: (standard deviation of the correction in log units, (site, action, depth -1..1) -> (key, weight))
    "kind and bits": (0.5, lambda s, a, depth: ((s.kind, _bits(a)), 1.0)),
    "kind and keep": (0.5, lambda s, a, depth: ((s.kind, round(8 * a.keep / s.units)), 1.0)),
    "depth of kind and bits": (0.4, lambda s, a, depth: ((s.kind, _bits(a)), depth)),
    "depth of pruning": (0.3, lambda s, a, depth: (s.kind, depth * (1 - a.keep / s.units))),
    "part of the depth": (0.3, lambda s, a, depth: ((s.kind, round(3 * depth)), 1.0)),
    "site": (0.4, lambda s, a, depth: (s.name, 1.0)),
    "site and bits": (0.3, lambda s, a, depth: ((s.name, _bits(a)), 1.0)),
    "site, pruned or not": (0.3, lambda s, a, depth: ((s.name, a.keep < s.units), 1.0)),
    "site and action": (0.4, lambda s, a, depth: ((s.name, a), 1.0)),
}

OUTER_STD = (1.5, 0.2, 0.1)
"""Standard deviations of b, beta, gamma."""

PART_STD = (0.05, 0.15)
"""Standard deviations of b' and beta'."""

SCALES = (0.2, 0.35, 0.7)
"""Common scales of the corrections' deviations, among which the scores choose."""

NOISE = (0.02, 0.3)
"""Standard deviation of a score, in log KL: of the best plan's within the budget, and its growth for every nat of log KL away
from it. It stands for what the form above cannot say, too."""

PART_NOISE = 0.025
"""Standard deviation of log KL on a part of the text, against what all of it says of that part."""

HOPS = (1, 2, 4, 8)
"""How many sites apart pairs are."""

ETA = (0.3, 0.4)
"""Mean and standard deviation of eta."""

CAP = 1.0
"""A sensitivity s counts as s / (1 + s / CAP), in nats."""


FAMILIES = ("kind and bits", "kind and keep", "depth of kind and bits", "depth of pruning", "part of the depth")
"""The groups whose corrections mean the same on another problem and another model."""


class Critic:
    """An ensemble; member 0 is the most probable fit, the others are posterior samples.

    terms_ESA: the corrected sensitivities x of every member, in units of the prediction.
    """

    def __init__(
        self,
        problem: Problem,
        reference: np.ndarray,
        members: int = 9,
        families: Mapping[str, float] | None = None,
    ):
        """reference: the prior's best plan [S]; families: what `families` gave after another search, the prior's mean
        here."""
        self.problem = problem
        sens_SA = problem.sensitivity_SA / (1 + problem.sensitivity_SA / CAP)
        positive = sens_SA[sens_SA > 0]
        self.floor = 1e-4 * float(np.median(positive)) if len(positive) else 1e-6
        self.log_sens_SA = np.log(sens_SA + self.floor)
        self.sites = np.arange(len(problem.sites))
        self.shared: dict[str, int] = {}
        self._lay_out(problem)
        self.mean_F = np.zeros(len(self.std_F))
        self.mean_F[self.eta : self.outer] = ETA[0]
        for name, value in (families or {}).items():
            if name in self.shared:
                self.mean_F[self.shared[name]] = value
        self.members = members
        self.scale = 1.0
        self.log_reference = 0.0
        self.theta_EF = np.tile(self.mean_F, (members, 1))
        self.log_reference = float(self._forward(self.theta_EF[0], reference[None])[1][0])
        self.terms_ESA = self._terms()

    def _lay_out(self, problem: Problem) -> None:
        """Numbers the parameters: index and weight of the K corrections of every (s, a), deviations of the prior."""
        shape = (len(GROUPS), *problem.valid_SA.shape)
        self.index_KSA, self.weight_KSA = np.zeros(shape, int), np.zeros(shape)
        numbers: dict[object, int] = {}
        counter, std = count(), []
        for k, (name, (deviation, describe)) in enumerate(GROUPS.items()):
            for s, (site, menu) in enumerate(zip(problem.sites, problem.actions)):
                depth = 2 * s / max(len(problem.sites) - 1, 1) - 1
                for a, action in enumerate(menu):
                    key, self.weight_KSA[k, s, a] = describe(site, action, depth)
                    if (name, key) not in numbers:
                        numbers[name, key] = next(counter)
                        std.append(deviation)
                        if name in FAMILIES:
                            self.shared[f"{name}: {key}"] = numbers[name, key]
                    self.index_KSA[k, s, a] = numbers[name, key]
        sites = len(problem.sites)
        pairs = [(s, s + hop) for hop in HOPS for s in range(sites - hop)]
        self.first_Q, self.second_Q = np.array(pairs, int).reshape(-1, 2).T
        self.member_QS = np.zeros((len(pairs), sites))
        self.member_QS[np.arange(len(pairs)), self.first_Q] = 1.0
        self.member_QS[np.arange(len(pairs)), self.second_Q] = 1.0
        kinds = [(t - s, problem.sites[s].kind, problem.sites[t].kind) for s, t in pairs]
        order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
        self.kind_Q = np.array([order[kind] for kind in kinds], int)
        self.eta = len(std)
        self.outer = self.eta + len(order)
        self.shared |= {f"pairs: {kind}": self.eta + i for kind, i in order.items()}
        self.shared |= {name: self.outer + i for i, name in enumerate(("b", "beta", "gamma"))}
        self.partial = self.outer + len(OUTER_STD)
        self.std_F = np.array([*std, *[ETA[1]] * len(order), *OUTER_STD, *PART_STD])

    def _forward(
        self, theta_F: np.ndarray, plans_BS: np.ndarray, partial_B: np.ndarray | None = None, slopes: bool = False
    ) -> tuple[np.ndarray, ...]:
        """Plans -> (log KL [B], on a part of the text where `partial_B`, log t [B]), and the derivative of log KL by all
        parameters [B, F] if asked for."""
        index_KBS = self.index_KSA[:, self.sites, plans_BS]
        weight_KBS = self.weight_KSA[:, self.sites, plans_BS]
        x_BS = np.exp(self.log_sens_SA[self.sites, plans_BS] + (theta_F[index_KBS] * weight_KBS).sum(0))
        root_BQ, total_B = self._total(x_BS, theta_F)
        z_B = np.log(total_B) - self.log_reference
        b, beta, gamma = theta_F[self.outer : self.partial]
        on_B = np.zeros(len(plans_BS)) if partial_B is None else partial_B.astype(float)
        b_part, beta_part = theta_F[self.partial :]
        slope_B = 1 + beta + on_B * beta_part
        y_B = self.log_reference + b + on_B * b_part + slope_B * z_B + gamma * z_B**2
        if not slopes:
            return y_B, np.log(total_B)
        share_BS = x_BS.copy()
        half_BQ = 0.5 * root_BQ * theta_F[self.eta : self.outer][self.kind_Q]
        share_BS += half_BQ @ self.member_QS
        by_z_B = slope_B + 2 * gamma * z_B
        share_BS *= (by_z_B / total_B)[:, None]
        rows, width = len(plans_BS), len(theta_F)
        flat = (index_KBS + width * np.arange(rows)[:, None]).ravel()
        slope_BF = np.bincount(flat, (weight_KBS * share_BS).ravel(), rows * width).reshape(rows, width)
        for kind in range(self.outer - self.eta):
            slope_BF[:, self.eta + kind] = root_BQ[:, self.kind_Q == kind].sum(1) * by_z_B / total_B
        slope_BF[:, self.outer : self.partial] = np.stack([np.ones(rows), z_B, z_B**2], 1)
        slope_BF[:, self.partial :] = np.stack([on_B, on_B * z_B], 1)
        return y_B, np.log(total_B), slope_BF

    def _total(self, x_BS: np.ndarray, theta_F: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """sqrt(x_s x_t) of all pairs [B, Q], and t [B], which stays above a twentieth of its first sum."""
        root_BS, sum_B = np.sqrt(x_BS), x_BS.sum(1)
        root_BQ = root_BS[:, self.first_Q] * root_BS[:, self.second_Q]
        return root_BQ, np.maximum(sum_B + root_BQ @ theta_F[self.eta : self.outer][self.kind_Q], 0.05 * sum_B)

    def fit(self, plans_NS: np.ndarray, log_kl_N: np.ndarray, parts_N: np.ndarray, rng: np.random.Generator) -> None:
        """Fits all members to everything that was scored. The prior's common scale is the most probable one of `SCALES`.

        parts_N: on how many parts of the text they were scored.
        """
        fits_N = self.problem.fits(plans_NS)
        best = log_kl_N[fits_N if fits_N.any() else slice(None)].min()
        noise_N = NOISE[0] + NOISE[1] * np.abs(log_kl_N - best)
        noise_N = np.hypot(noise_N, part_noise(parts_N))
        told = (plans_NS, parts_N < PARTS)
        fits = {c: self._fit_one(told, log_kl_N, noise_N, self.mean_F, c * self.std_F) for c in SCALES}
        self.scale = max(fits, key=lambda c: fits[c][1])
        std_F = self.scale * self.std_F
        std_F[self.outer :] = self.std_F[self.outer :]
        self.theta_EF[0] = fits[self.scale][0]
        for e in range(1, self.members):
            start_F = self.mean_F + std_F * rng.standard_normal(len(std_F))
            noisy_N = log_kl_N + noise_N * rng.standard_normal(len(log_kl_N))
            self.theta_EF[e] = self._fit_one(told, noisy_N, noise_N, start_F, std_F)[0]
        self.terms_ESA = self._terms()

    def families(self) -> dict[str, float]:
        """The most probable values, by name, of the parameters that mean the same on another problem: the corrections of
        whole families of actions, eta, b, beta and gamma."""
        return {name: float(self.theta_EF[0, number]) for name, number in self.shared.items()}

    def _fit_one(
        self,
        told: tuple[np.ndarray, np.ndarray],
        y_N: np.ndarray,
        noise_N: np.ndarray,
        prior_F: np.ndarray,
        std_F: np.ndarray,
    ) -> tuple[np.ndarray, float]:
        """The most probable parameters [F] around a prior mean, and their log evidence (Laplace).

        told: plans [N, S], and which scores are of a part [N].
        """
        theta_F, best, best_loss, evidence = prior_F, prior_F, np.inf, -np.inf
        for _ in range(8):
            predicted_N, _, slope_NF = self._forward(theta_F, *told, slopes=True)
            residual_N = y_N - predicted_N
            loss = ((residual_N / noise_N) ** 2).sum() + (((theta_F - prior_F) / std_F) ** 2).sum()
            scaled_NF = slope_NF * std_F
            covariance_NN = scaled_NF @ scaled_NF.T + np.diag(noise_N**2)
            linear_N = residual_N + slope_NF @ (theta_F - prior_F)
            weights_N = np.linalg.solve(covariance_NN, linear_N)
            if loss < best_loss:
                best, best_loss = theta_F, loss
                evidence = -0.5 * linear_N @ weights_N - 0.5 * np.linalg.slogdet(covariance_NN)[1]
            theta_F = theta_F + 0.8 * (prior_F + std_F * (scaled_NF.T @ weights_N) - theta_F)
        return best, evidence

    def _terms(self) -> np.ndarray:
        corrections = [(theta_F[self.index_KSA] * self.weight_KSA).sum(0) for theta_F in self.theta_EF]
        return np.exp(self.log_sens_SA + np.stack(corrections))

    def predict(self, plans_BS: np.ndarray, member: int | None = None) -> np.ndarray:
        """log KL of plans on all of the text, by every member [E, B], or by one [B]."""
        if member is None:
            return np.stack([self.predict(plans_BS, e) for e in range(self.members)])
        x_BS = self.terms_ESA[member][self.sites, plans_BS]
        theta_F = self.theta_EF[member]
        _, total_B = self._total(x_BS, theta_F)
        z_B = np.log(total_B) - self.log_reference
        b, beta, gamma = theta_F[self.outer : self.partial]
        return self.log_reference + b + (1 + beta) * z_B + gamma * z_B**2


def part_noise(parts_N: np.ndarray) -> np.ndarray:
    """Standard deviation [N] of log KL on all of the text, as estimated from so many parts of it."""
    return PART_NOISE * np.sqrt(1 / parts_N - 1 / PARTS)


def _bits(action: Action) -> int:
    return Formats.parse(action.format).bits
