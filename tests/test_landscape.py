"""The recorded landscape: it holds what was measured, predicts what was held out, and policies search on it."""

import numpy as np
import pytest
from landscape import Landscape, read, search  # benchmarks/landscape.py

from policies import Question


@pytest.fixture(scope="module")
def recorded():
    return read(bits=3.0)


@pytest.fixture(scope="module")
def landscape(recorded):
    """Fitted to nine tenths of the plans."""
    problem, plans, log_kl = recorded
    held = np.arange(len(plans)) % 10 == 0
    return Landscape(problem, plans[~held], log_kl[~held], members=1)


def test_the_real_problem_is_recorded(recorded):
    problem, plans, _ = recorded
    assert len(problem.sites) == 61 and len(plans) >= 2000
    assert problem.limits["bytes"] == 3.0 / 8 * sum(site.parameters for site in problem.sites)
    assert all(problem.valid_SA[np.arange(61), plan].all() for plan in plans)


def test_what_was_recorded_is_returned_and_the_rest_predicted(recorded, landscape):
    problem, plans, log_kl = recorded
    assert landscape.score(Question(problem.plan(plans[1]))).kl == pytest.approx(np.exp(log_kl[1]))
    held = np.arange(len(plans)) % 10 == 0
    error = landscape.log_kl(plans[held]) - log_kl[held]
    assert 1 - error.var() / log_kl[held].var() > 0.97


def test_learning_from_scores_helps_there_too(recorded, landscape):
    """The first plan of dynamic programming against what random plans and evolution make of five evaluations."""
    problem, _, _ = recorded
    first = search("dynamic_programming", problem, 0, 1, landscape)
    assert search("evolution", problem, 0, 6, landscape) <= first < search("random", problem, 0, 6, landscape)
