"""The recorded landscape: it holds what was measured, predicts what was held out, and policies search on it."""

import numpy as np
import pytest
from landscape import WORST, Landscape, best_after, read, search  # benchmarks/landscape.py

from compressor.plan import PARTS
from policies import Question


@pytest.fixture(scope="module")
def recorded():
    return read(bits=2.5)


@pytest.fixture(scope="module")
def landscape(recorded):
    """Fitted to nine tenths of the plans."""
    problem, plans, log_kl = recorded
    held = np.arange(len(plans)) % 10 == 0
    return Landscape(problem, plans[~held], log_kl[~held])


def test_the_real_problem_is_recorded(recorded):
    problem, plans, log_kl = recorded
    assert len(problem.sites) == 61 and log_kl.shape == (len(plans), PARTS) and len(plans) >= 1900
    assert problem.limits["bytes"] == 2.5 / 8 * sum(site.parameters for site in problem.sites)
    assert all(problem.valid_SA[np.arange(61), plan].all() for plan in plans)


def test_what_was_recorded_is_returned_and_the_rest_predicted(recorded, landscape):
    problem, plans, log_kl = recorded
    whole = next(n for n in range(1, len(plans)) if n % 10 and not np.isnan(log_kl[n]).any())
    assert landscape.score(Question(problem.plan(plans[whole]))).kl == pytest.approx(np.exp(log_kl[whole]).mean())
    assert landscape.score(Question(problem.plan(plans[whole]), 3)).kl == pytest.approx(np.exp(log_kl[whole, 3]))
    held = np.arange(len(plans)) % 10 == 0
    good = log_kl[held] < np.log(WORST)
    error = (landscape.log_kl(plans[held]) - log_kl[held])[good]
    assert 1 - error.var() / log_kl[held][good].var() > 0.97


def test_learning_from_scores_helps_there_too(recorded, landscape):
    """The first plan of dynamic programming against what random plans and evolution make of twelve evaluations."""
    problem, _, _ = recorded
    (_, first), *_ = search("dynamic_programming", problem, 0, 1, landscape)
    evolution, random = (best_after(search(name, problem, 0, 12, landscape), 12) for name in ("evolution", "random"))
    assert evolution < first < random
