"""The Gymnasium environment: it passes the checker, walks end within the budget, and a library's agent learns on it."""

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from policies.base import log_kl
from policies.environment import CompressionEnv
from tests.toys import brute_force, landscape, tiny


def episode(env, choose):
    """Rewards of one walk and the last step's info."""
    env.reset()
    rewards, done = [], False
    while not done:
        _, reward, done, _, info = env.step(choose(env.action_masks()))
        rewards.append(reward)
    return rewards, info


def test_gymnasiums_checker_passes():
    check_env(CompressionEnv(*tiny(0)), skip_render_check=True)


@pytest.mark.parametrize("limits", [{"bytes": 0.4}, {"bytes": 0.4, "decode_ms": 0.55}])
def test_walks_end_within_the_budget_and_pay_the_score(limits):
    problem, score = landscape(3, blocks=5, limits=limits)
    rng = np.random.default_rng(0)
    for choose in (lambda mask: rng.choice(np.flatnonzero(mask)), lambda mask: rng.integers(len(mask))):
        rewards, info = episode(CompressionEnv(problem, score), choose)
        assert problem.fits(problem.indices(info["plan"]))
        assert rewards[-1] == -log_kl(score(info["plan"])) and not any(rewards[:-1])


def test_shaping_leaves_the_sum_as_it_is():
    problem, score = landscape(4, blocks=3)

    def largest_bytes(mask):
        return int(np.flatnonzero(mask)[0])

    plain, _ = episode(CompressionEnv(problem, score), largest_bytes)
    shaped, _ = episode(CompressionEnv(problem, score, shaped=True), largest_bytes)
    assert sum(shaped) == pytest.approx(sum(plain)) and any(shaped[:-1])


def test_maskable_ppo_learns_a_toy():
    from sb3_contrib import MaskablePPO

    problem, score = tiny(1)
    env = CompressionEnv(problem, score)
    agent = MaskablePPO("MlpPolicy", env, n_steps=100, batch_size=50, learning_rate=3e-3, seed=0, device="cpu")

    def mean_reward():
        found = []
        for _ in range(60):
            observation, _ = env.reset()
            done = False
            while not done:
                action, _ = agent.predict(observation, action_masks=env.action_masks())
                observation, reward, done, _, _ = env.step(int(action))
            found.append(reward)
        return np.mean(found)

    before = mean_reward()
    agent.learn(4000)
    after, best = mean_reward(), -np.log(brute_force(problem, score))
    assert after > before + 0.5 * (best - before)
