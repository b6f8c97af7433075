"""The search as a Gymnasium environment, so that any reinforcement-learning library can train on it.

An episode walks over the sites in depth order; a step decides one site's action; when the last one is decided the plan is
scored and the reward is -log KL, before that 0. Deterministic; `reset` only starts over. With `shaped`, every step also pays
the change of the potential -log(sensitivities so far + the least of the rest): potential-based shaping, which leaves the best
plan where it is (Ng et al. 1999).
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
from gymnasium import spaces

from compressor.plan import Plan, Score
from policies.actor import features
from policies.base import log_kl
from policies.problem import UNITS, Problem


class CompressionEnv(gymnasium.Env):
    """Observations: features of the site, of its menu and of the last action, and what is left of every budget in 0..1.

    Args:
        problem: sites, menus, costs and budgets.
        score: plan -> Score; called once an episode, at its end.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 as in the base class

    def __init__(self, problem: Problem, score: Callable[[Plan], Score], shaped: bool = False):
        self.problem, self.score, self.shaped = problem, score, shaped
        x_SA = np.maximum(problem.sensitivity_SA, 1e-12)
        site_SP, action_SAQ = features(problem, x_SA)
        self._site_SP, self._action_SAQ = site_SP.numpy(), action_SAQ.numpy()
        least_S = np.where(problem.valid_SA, x_SA, np.inf).min(1)
        self._x_SA, self._rest_S = x_SA, np.append(least_S[::-1].cumsum()[::-1], 0.0)
        self.action_space = spaces.Discrete(problem.valid_SA.shape[1])
        width = self._site_SP.shape[1] + self._action_SAQ[0].size + self._action_SAQ.shape[2] + len(UNITS)
        self.observation_space = spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self._chosen: list[int] = []
        self._left_D = problem.room_D

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self._chosen, self._left_D = [], self.problem.room_D
        return self._observation(), {}

    def action_masks(self) -> np.ndarray:
        """The actions after which a plan can still end within all budgets: bool [A]; the name is sb3-contrib's."""
        return self.problem.allowed(len(self._chosen), self._left_D[None])[0]

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Decide the next site; an action that the mask forbids is taken as the allowed one next to it on the menu.

        Returns:
            observation, reward, whether the plan is complete, False, and `{"plan": ..., "score": ...}` at the end.
        """
        site, mask_A = len(self._chosen), self.action_masks()
        (allowed,) = np.nonzero(mask_A)
        chosen = int(allowed[np.abs(allowed - int(action)).argmin()])
        before = self._potential()
        self._chosen.append(chosen)
        self._left_D = self._left_D - self.problem.units_SAD[site, chosen]
        done = len(self._chosen) == len(self.problem.sites)
        reward, info = 0.0, {}
        if done:
            plan = self.problem.plan(np.array(self._chosen))
            score = self.score(plan)
            reward, info = -log_kl(score), {"plan": plan, "score": score}
        if self.shaped:
            reward += (0.0 if done else self._potential()) - before
        return self._observation(), reward, done, False, info

    def _potential(self) -> float:
        """0 at the start and at the end of an episode, so that the shaping sums to 0."""
        count = len(self._chosen)
        if not count:
            return 0.0
        spent = self._x_SA[np.arange(count), self._chosen].sum()
        return float(np.log(self._rest_S[0]) - np.log(spent + self._rest_S[count]))

    def _observation(self) -> np.ndarray:
        count = len(self._chosen)
        site = min(count, len(self.problem.sites) - 1)  # behind the last decision: the last site again
        before_Q = self._action_SAQ[count - 1, self._chosen[-1]] if count else np.zeros_like(self._action_SAQ[0, 0])
        slack_3 = np.ones(len(UNITS))
        axes = [list(UNITS).index(name) for name in self.problem.budgets]
        slack_3[axes] = self.problem.slack(site, self._left_D[None])[0]
        parts = (self._site_SP[site], self._action_SAQ[site].ravel(), before_Q, slack_3)
        return np.concatenate(parts).astype(np.float32)
