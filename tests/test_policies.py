"""Every policy keeps one contract; the mask is sound; toys are solved; the agent beats its rivals."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from compressor.errors import BudgetError
from compressor.plan import PARTS, Score
from policies import POLICIES, Meter, Question
from policies.actor_critic import METRICS, ActorCritic, Memory, Region, Settings
from policies.base import LUCK, History, log_kl
from policies.critic import CAP, ETA, HOPS, Critic
from policies.dynamic_programming import solve
from policies.greedy import best_actions
from policies.problem import Problem
from policies.uniform import uniform_plans
from tests.toys import brute_force, landscape, tiny

ROOT = Path(__file__).parent.parent
LEARNING = ("random", "greedy", "dynamic_programming", "evolution", "tpe", "nsga2", "ppo", "actor_critic")
BUDGETS = {
    "one": {"bytes": 0.4},
    "two": {"bytes": 0.4, "decode_ms": 0.55},
    "three": {"bytes": 0.4, "decode_ms": 0.55, "prefill_ms": 0.7},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def play(policy, score, evaluations):
    """Plans and scores of a search; scores cost what `Meter` says."""
    ledger, meter = [], Meter()
    while meter.allows(question := policy.ask(), evaluations):
        ledger.append((question.plan, score(question.plan, question.part)))
        policy.tell(*ledger[-1])
        meter.add(question)
    return ledger


def best(ledger):
    return min(score.kl for _, score in ledger if score.part is None)


# The contract.


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", POLICIES)
def test_every_plan_is_within_every_budget(name, budget):
    problem, score = landscape(3, blocks=5, limits=BUDGETS[budget])
    assert len(problem.budgets) == len(BUDGETS[budget])
    for plan, _ in play(POLICIES[name](problem, 0), score, 14):
        cost = problem.cost(problem.indices(plan))
        assert all(cost[budget] <= limit for budget, limit in problem.limits.items())


@pytest.mark.parametrize("name", POLICIES)
def test_same_seed_same_plans_and_no_global_randomness(name):
    problem, score = landscape(4, blocks=4, tight=0.4)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    first = play(POLICIES[name](problem, 7), score, 13)
    np.random.random(3), torch.rand(3)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    assert play(POLICIES[name](problem, 7), score, 13) == first
    assert (np.random.get_state()[1] == states[0]).all() and (torch.get_rng_state() == states[1]).all()
    if name in LEARNING:
        assert play(POLICIES[name](problem, 8), score, 13) != first


@pytest.mark.parametrize("name", POLICIES)
def test_resumes_from_any_point_of_the_ledger(name):
    problem, score = landscape(5, blocks=4, tight=0.4)
    ledger = play(POLICIES[name](problem, 1), score, 14)
    for told in (0, 1, 5, 8, 9, 11, 13):
        policy = POLICIES[name](problem, 1)
        for plan, result in ledger[:told]:
            policy.tell(plan, result)
        plan, score_then = ledger[told]
        assert policy.ask() == policy.ask() == Question(plan, score_then.part)


@pytest.mark.parametrize("name", LEARNING)
def test_no_question_is_asked_twice(name):
    problem, score = landscape(6, blocks=6, tight=0.4)
    questions = [(plan, result.part) for plan, result in play(POLICIES[name](problem, 0), score, 30)]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("kind", ["one plan", "four plans", "all fits"])
def test_ends_where_there_is_little_to_find(name, kind):
    """Policies that know of no other plan ask one again, which costs; in an endless budget the best one loses nothing."""
    problem, score = landscape(2, blocks=2)
    keep = {"one plan": lambda s: 1, "four plans": lambda s: 2 if s < 2 else 1, "all fits": lambda s: 99}[kind]

    def first(rows):
        return tuple(row[: keep(s)] for s, row in enumerate(rows))

    problem = Problem(
        problem.sites,
        first(problem.actions),
        tuple(np.append(0.0, row[1:]) for row in first(problem.sensitivity)),
        {cost: first(rows) for cost, rows in problem.costs.items()},
        problem.fixed,
        dict.fromkeys(problem.limits, 1e12),
    )
    ledger = play(POLICIES[name](problem, 0), score, 12)
    assert len(ledger) <= 12 * PARTS and any(told.part is None for _, told in ledger)


@pytest.mark.parametrize("name", POLICIES)
def test_survives_destroyed_students_and_plans_of_others(name):
    problem, score = landscape(7, blocks=3, tight=0.5)
    policy = POLICIES[name](problem, 0)
    for indices in uniform_plans(problem)[-3:]:
        policy.tell(problem.plan(indices), Score(float("nan"), float("inf"), 1))
    policy.tell(problem.plan(problem.walk(-problem.sensitivity_SA)), Score(float("inf"), float("inf"), 1))
    policy.tell(problem.plan(best_actions(problem)), Score(1e-4, 1.0, 1))  # best of all, but over the budget
    for plan, _ in play(policy, score, 8):
        assert problem.fits(problem.indices(plan))


def test_the_table_holds_names():
    problem, _ = tiny(0)
    assert all(make(problem, 0).name == name for name, make in POLICIES.items())


def test_scores_are_held_within_bounds():
    assert log_kl(Score(float("nan"), 1.0, 1)) == log_kl(Score(float("inf"), 1.0, 1)) == pytest.approx(np.log(100))
    assert log_kl(Score(0.5, 1.0, 1)) == pytest.approx(np.log(0.5))


# The problem.


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_masked_walks_always_end_within_the_budget(budgets):
    """Random problems, from loose to as tight as can be, with costs of both signs."""
    rng = np.random.default_rng(budgets)
    for seed in range(40):
        source, _ = tiny(seed, sites=int(rng.integers(1, 9)), actions=5, budgets=budgets, room=2.0)
        names = list(source.limits)
        costs = {n: tuple(row - 10 if n == "decode_ms" else row for row in source.costs[n]) for n in names}
        limits = {n: sum(row.min() + rng.uniform(0, 0.5) * np.ptp(row) for row in costs[n]) for n in names}
        try:
            problem = Problem(source.sites, source.actions, source.sensitivity, costs, {}, limits)
        except BudgetError:
            continue
        count = len(problem.sites)
        left_BD, plans_BS = np.repeat(problem.room_D[None], 64, 0), np.zeros((64, count), int)
        for s in range(count):
            mask_BA = problem.allowed(s, left_BD)
            assert mask_BA.any(1).all()
            plans_BS[:, s] = np.where(mask_BA, rng.random(mask_BA.shape), -1.0).argmax(1)
            left_BD = left_BD - problem.units_SAD[s, plans_BS[:, s]]
        assert problem.fits(plans_BS).all() and (problem.used(plans_BS) <= problem.room_D).all()


def test_the_mask_is_exact_for_one_budget():
    problem, _ = tiny(11, sites=4)
    every = np.stack(np.meshgrid(*[range(4)] * 4, indexing="ij"), -1).reshape(-1, 4)
    fits = every[problem.fits(every)]
    for prefix in np.unique(fits[:, :2], axis=0):
        left = problem.room_D - sum(problem.units_SAD[s, a] for s, a in enumerate(prefix))
        possible = {int(row[2]) for row in fits if (row[:2] == prefix).all()}
        assert set(np.flatnonzero(problem.allowed(2, left[None])[0])) == possible


def test_independent_minima_would_not_be_sound_for_two_budgets():
    """Either site can save bytes or time, not both: the mask must see it at the first site."""
    source, _ = tiny(0, sites=2, actions=2, budgets=2)
    costs = {"bytes": (np.array([0.0, 1.0]),) * 2, "prefill_ms": (np.array([1.0, 0.0]),) * 2}
    problem = Problem(source.sites, source.actions, source.sensitivity, costs, {}, {"bytes": 1.0, "prefill_ms": 1.0})
    assert problem.allowed(0, problem.room_D[None]).tolist() == [[True, True]]
    assert problem.allowed(1, (problem.room_D - problem.units_SAD[0, 0])[None]).tolist() == [[False, True]]
    with pytest.raises(BudgetError, match="together no plan was found"):
        Problem(source.sites, source.actions, source.sensitivity, costs, {}, {"bytes": 1.0, "prefill_ms": 0.5})


def test_plans_and_indices_are_inverse_and_costs_add_up():
    problem, _ = landscape(0, blocks=2, limits=BUDGETS["two"])
    indices = solve(problem)
    plan = problem.plan(indices)
    assert list(plan) == [site.name for site in problem.sites] and (problem.indices(plan) == indices).all()
    size = sum(site.size_bytes(plan[site.name]) for site in problem.sites)
    assert problem.cost(indices)["bytes"] == size + problem.fixed["bytes"]
    assert set(problem.cost(indices)) == {"bytes", "prefill_ms", "decode_ms"}


def test_a_budget_out_of_reach_says_what_to_change():
    with pytest.raises(BudgetError) as error:
        landscape(0, blocks=2, limits={"bytes": 0.01, "decode_ms": 0.9})
    message = str(error.value)
    assert "bytes: limit 271,381.76, smallest reachable 2,901,664" in message and "decode_ms: limit" in message
    assert "fewer bits" in message and "Raise the limit" in message


def test_arrays_that_disagree_are_refused():
    p, _ = tiny(0)
    with pytest.raises(ValueError, match="sensitivity: expected one number"):
        Problem(p.sites, p.actions, p.sensitivity[:-1], p.costs, p.fixed, p.limits)
    with pytest.raises(ValueError, match="limits on"):
        Problem(p.sites, p.actions, p.sensitivity, p.costs, p.fixed, {"watts": 1.0})


# Toys with a known optimum.


@pytest.mark.parametrize("budgets", [1, 2, 3])
@pytest.mark.parametrize("seed", range(6))
def test_dynamic_programming_is_exact_on_an_additive_toy(seed, budgets):
    problem, score = tiny(seed, budgets=budgets, interaction=0.0)
    assert score(problem.plan(solve(problem))).kl == pytest.approx(brute_force(problem, score))


def test_dynamic_programming_uses_a_big_budget_to_the_end():
    problem, _ = landscape(0, tight=0.4)
    assert 0.999 < problem.used(solve(problem))[0] / problem.room_D[0] <= 1.0


@pytest.mark.parametrize("seed", range(4))
def test_actor_critic_solves_a_toy_that_is_not_additive(seed):
    problem, score = tiny(seed)
    optimum = brute_force(problem, score)
    policy = POLICIES["actor_critic"](problem, 0)
    assert any(best(play(policy, score, 4)) <= 1.05 * optimum for _ in range(10))


@pytest.mark.parametrize(("name", "asks"), [("evolution", 150), ("tpe", 100), ("nsga2", 150), ("ppo", 150)])
@pytest.mark.parametrize("seed", range(3))
def test_searching_rivals_solve_it_too(seed, name, asks):
    problem, score = tiny(seed)
    assert best(play(POLICIES[name](problem, 0), score, asks)) <= 1.1 * brute_force(problem, score)


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_greedy_is_near_the_optimum_of_an_additive_toy(budgets):
    found, optimum = [], []
    for seed in range(20):
        problem, score = tiny(seed, budgets=budgets, interaction=0.0)
        found.append(score(POLICIES["greedy"](problem, 0).ask().plan).kl)
        optimum.append(brute_force(problem, score))
    assert sum(optimum) <= sum(found) < 1.25 * sum(optimum)


# The critic and the agent's own parts.


def test_critic_starts_as_the_surrogate_and_its_slopes_are_right():
    problem, _ = landscape(0, blocks=3, tight=0.5)
    reference = solve(problem)
    critic = Critic(problem, reference, members=2)
    x_S = problem.sensitivity_SA[np.arange(len(reference)), reference]
    x_S = x_S / (1 + x_S / CAP)
    surrogate = x_S.sum() + ETA[0] * sum(np.sqrt(x_S[hop:] * x_S[:-hop]).sum() for hop in HOPS if hop < len(x_S))
    assert critic.predict(reference[None], 0)[0] == pytest.approx(np.log(surrogate), abs=1e-2)
    rng = np.random.default_rng(0)
    theta_F = critic.std_F * rng.normal(size=len(critic.std_F))
    plans_BS = np.stack([problem.walk(rng.random(problem.valid_SA.shape)) for _ in range(4)])
    partial_B = np.array([False, True, True, False])
    slope_BF = critic._forward(theta_F, plans_BS, partial_B, slopes=True)[2]
    direction_F = critic.std_F * rng.normal(size=len(critic.std_F))
    ahead, behind = (critic._forward(theta_F + h * direction_F, plans_BS, partial_B)[0] for h in (1e-5, -1e-5))
    np.testing.assert_allclose(slope_BF @ direction_F, (ahead - behind) / 2e-5, rtol=1e-4)


def test_critic_ranks_plans_that_it_has_not_seen():
    problem, score = landscape(5, blocks=6, shared=1.0, tight=0.45)
    rng = np.random.default_rng(0)
    plans = np.stack(
        [problem.walk(problem.sensitivity_SA * rng.lognormal(0, 1, problem.valid_SA.shape)) for _ in range(90)]
    )
    truth = np.array([log_kl(score(problem.plan(p))) for p in plans])
    critic = Critic(problem, solve(problem))
    before = np.corrcoef(critic.predict(plans[60:], 0), truth[60:])[0, 1]
    critic.fit(plans[:60], truth[:60], np.full(60, PARTS), rng)
    after = np.corrcoef(critic.predict(plans[60:]).mean(0), truth[60:])[0, 1]
    assert after > max(0.85, before)


def test_a_uniform_plan_that_is_better_than_predicted_is_found_at_once():
    problem, score = landscape(2, blocks=4, tight=0.5)
    agent = ActorCritic(problem, 0)
    uniform = problem.plan(agent.uniform)

    def surprising(plan, part=None):
        return Score(0.01, 1.01, 1, part) if plan == uniform else score(plan, part)

    assert best(play(agent, surprising, 3)) == 0.01


def test_only_what_stayed_ahead_on_every_part_is_scored_on_all():
    """And such a score costs nothing more, so the warm-up's two are the only ones that are paid for whole."""
    problem, score = landscape(1, blocks=4, tight=0.4)
    agent = ActorCritic(problem, 0, Settings(tempered=3))
    trials, meter = play(agent, score, 14), Meter()
    whole = [
        cost for plan, result in trials if (cost := meter.add(Question(plan, result.part))) and result.part is None
    ]
    assert len(whole) <= 2
    completed = [result.kl for _, result in trials if result.part is None][len(whole) :]
    assert completed and min(completed) == best(trials)


def test_a_part_says_little_of_the_others_where_a_plan_repairs_what_is_broken_on_it():
    problem, _ = landscape(1, blocks=3, tight=0.5)
    best_S, repaired_S, worse_S = (
        problem.walk(np.random.default_rng(n).random(problem.valid_SA.shape)) for n in range(3)
    )
    history, kl_P = History(problem), np.array([1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    history.add(problem.plan(best_S), Score(kl_P.mean(), 3.0, 800, by_part=tuple(kl_P)))
    assert history.untried(repaired_S)[0] == 3  # where the best plan does worst
    history.add(problem.plan(repaired_S), Score(1.0, 3.0, 100, 3))
    history.add(problem.plan(worse_S), Score(2.2, 3.0, 100, 3))
    plans_NS, log_kl_N, parts_N = history.estimates()
    assert (plans_NS == [best_S, repaired_S, worse_S]).all() and list(parts_N) == [PARTS, 1, 1]
    expected = [kl_P.mean(), (1.0 + 7 * (1 - LUCK)) / 8, 1.1 * kl_P.mean()]
    np.testing.assert_allclose(np.exp(log_kl_N), expected)
    for part in history.untried(repaired_S):
        history.add(problem.plan(repaired_S), Score(0.99, 3.0, 100, part))
    assert history.untried(repaired_S) == []
    np.testing.assert_allclose(np.exp(history.estimates()[1][1]), (1.0 + 7 * 0.99) / 8)


def test_a_region_holds_plans_within_the_budget_that_are_near():
    problem, _ = landscape(2, blocks=5, tight=0.5)
    rng = np.random.default_rng(0)
    centre_S = solve(problem)
    plans_BS = np.stack([problem.walk(rng.random(problem.valid_SA.shape)) for _ in range(40)])
    region = Region(problem, centre_S, 3)
    near_PS, marks_P = region.reach(plans_BS, 10, rng)
    assert (near_PS[0] == centre_S).all() and 20 < len(near_PS) <= 41 and not marks_P[0]
    assert 0 < marks_P.sum() <= 30 and region.holds(near_PS).all() and problem.fits(near_PS).all()
    assert ((near_PS[1:] != centre_S).sum(1) == 3).all()
    assert not region.holds(plans_BS).any()


def test_log_explains_every_metric_and_memory_carries_over(tmp_path):
    """To another number of blocks and other budgets; what is read is what was written."""
    problem, score = landscape(0, blocks=3, tight=0.5)
    agent = ActorCritic(problem, 0, Settings(tempered=3, tries=2))
    play(agent, score, 5)
    assert agent.log and all(set(row) == set(METRICS) for row in agent.log)
    (tmp_path / "memory").write_bytes(agent.memory().to_bytes())
    memory = Memory.read(tmp_path / "memory")
    assert memory.families == agent.memory().families and any(memory.families.values())
    assert all(torch.equal(w, memory.actor[name]) for name, w in agent.memory().actor.items())
    other, score = landscape(1, blocks=2, limits=BUDGETS["three"])
    play(ActorCritic(other, 0, Settings(tempered=3, tries=2), memory=memory), score, 6)


# At the size of the real thing.


def geometric_best(name, seeds, asks, **kind):
    """Geometric mean over seeds of the least KL after `asks` evaluations."""
    results = []
    for seed in seeds:
        problem, score = landscape(seed, tight=0.4, **kind)
        results.append(best(play(POLICIES[name](problem, seed), score, asks)))
    return float(np.exp(np.mean(np.log(results))))


def test_actor_critic_beats_its_rivals_on_a_short_search():
    """20 blocks, 30 evaluations, one seed."""
    kl = {name: geometric_best(name, [0], 30, blocks=20, shared=0.7) for name in POLICIES}
    assert kl["actor_critic"] < 0.95 * min(kl[name] for name in POLICIES if name != "actor_critic")


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0.0, 0.7])
def test_actor_critic_beats_its_rivals_at_61_sites(shared):
    """60 evaluations, 3 seeds: at least 10% less KL than the best rival, at most half of uniform's and random's."""
    kl = {name: geometric_best(name, range(3), 60, shared=shared) for name in POLICIES}
    assert kl["actor_critic"] < 0.9 * kl["dynamic_programming"]
    assert kl["actor_critic"] < 0.5 * min(kl["uniform"], kl["random"])


def test_policies_know_nothing_of_the_other_packages():
    code = "import policies, sys; print(*(m for m in sys.modules if m.startswith(('compressor.', 'eval', 'onnx'))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert set(done.stdout.split()) == {"compressor.errors", "compressor.plan"}
