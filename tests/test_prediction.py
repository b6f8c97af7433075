"""Predicted times: the table corrected by whole models, and what a search does with them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from compressor import latency
from compressor.latency import Latency, corrected
from compressor.measure import Spread, Times
from compressor.plan import DROP, Action, Plan
from compressor.stages import Stages
from eval.latency import Entry, LatencyTable, Milliseconds, entry_key
from eval.prediction import DEVIATIONS, LatencyModel
from tests.test_latency import ffn

FORMATS = ("int8", "w8", "w4")
SITES = tuple(ffn(layer) for layer in range(12))
MENU = [Action(keep, name) for name in FORMATS for keep in (32, 48, 64)]


def table_of(path: Path, ms: dict[Action, float], error: float = 0.05) -> LatencyTable:
    """Entries with a decode of a tenth of the prefill, measured three times with this standard error."""
    table = LatencyTable(path / "table.json", {"cpu": "x"})
    for action, time in ms.items():
        around = tuple(time * (1 + error * 3**0.5 * step) for step in (-1, 0, 1))
        table._entries[entry_key(SITES[0], action)] = Entry(around, tuple(t / 10 for t in around))
    return table


def plan_of(actions: list[Action]) -> Plan:
    return Plan(tuple((site.name, action) for site, action in zip(SITES, actions, strict=True)))


def drawn(rng: np.random.Generator) -> Plan:
    weights = rng.dirichlet(np.full(len(MENU), 0.5))
    return plan_of([MENU[n] for n in rng.choice(len(MENU), size=len(SITES), p=weights)])


def took(plan: Plan, ms: dict[Action, float], rest: float = 0.0) -> Milliseconds:
    total = sum(ms[action] for action in plan.values() if action.keep)
    return Milliseconds(rest + total, (rest + total) / 10)


def test_whole_models_scale_the_table(tmp_path):
    """A rest, and a machine that is half as fast as when the table was made."""
    rng, entries = np.random.default_rng(0), {action: float(action.keep) for action in MENU}
    now = {action: 1.5 * time for action, time in entries.items()}
    table, plans = table_of(tmp_path, entries), [drawn(rng) for _ in range(6)]
    model = LatencyModel.fit(table, SITES, [(plan, took(plan, now, 30.0)) for plan in plans[:5]])
    predicted, truth = model.predict(plans[5]), took(plans[5], now, 30.0)
    assert predicted.prefill == pytest.approx(truth.prefill, rel=0.03)
    assert predicted.decode == pytest.approx(truth.decode, rel=0.03)
    parts = [model.site_ms(site, plans[5][site.name]).prefill for site in SITES]
    assert model.rest.prefill + sum(parts) == pytest.approx(predicted.prefill)
    dropped = plan_of([DROP] * 12)
    assert model.predict(dropped) == model.rest and model.site_ms(SITES[0], DROP) == Milliseconds(0.0, 0.0)


def test_errors_are_as_large_as_it_says(tmp_path):
    """Over many tables and machines as the prior has them, misses over their standard errors have a deviation of 1."""
    rng, misses = np.random.default_rng(0), []
    for _ in range(300):
        entries, truth = {}, {}
        common, by_format = (
            DEVIATIONS["scale"] * rng.normal(),
            {f: DEVIATIONS["format"] * rng.normal() for f in FORMATS},
        )
        for action in MENU:
            entries[action] = float(action.keep)
            own = np.hypot(0.05, DEVIATIONS["entry"]) * rng.normal()
            truth[action] = entries[action] * (1 + common + by_format[action.format] + own)
        rest, wholes = abs(DEVIATIONS["rest"] * 500 * rng.normal()), []
        for plan in (drawn(rng) for _ in range(4)):
            ms, noise = took(plan, truth, rest).prefill, 1 + DEVIATIONS["whole"] * rng.normal()
            wholes.append((plan, Milliseconds(ms * noise, ms * noise / 10)))
        model, other = LatencyModel.fit(table_of(tmp_path, entries), SITES, wholes), drawn(rng)
        misses.append((model.predict(other).prefill - took(other, truth, rest).prefill) / model.error(other).prefill)
    assert 0.85 < np.std(misses) < 1.15


def test_nothing_takes_less_than_no_time(tmp_path):
    table = table_of(tmp_path, {action: float(action.keep) for action in MENU})
    small, large = plan_of([MENU[0]] * 12), plan_of([MENU[2]] * 12)
    model = LatencyModel.fit(table, SITES, [(small, Milliseconds(200.0, 20.0)), (large, Milliseconds(900.0, 90.0))])
    assert model.rest == Milliseconds(0.0, 0.0)
    assert model.error(small).prefill > 0
    with pytest.raises(ValueError, match="at least one whole model"):
        LatencyModel.fit(table, SITES, [])


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A run whose students take what `truth` says, and twice that later on; w4 was measured a third too fast."""
    truth = {action: action.keep * {"int8": 1.0, "w8": 1.2, "w4": 1.5}[action.format] for action in MENU}
    table = table_of(
        tmp_path, {action: ms * (0.67 if action.format == "w4" else 1.0) for action, ms in truth.items()}, 0.1
    )
    folders: dict[Path, Plan] = {}
    timed: list[Plan] = []

    def save(plan, teacher, folder, runtime):
        folder.mkdir(parents=True)
        folders[folder] = plan

    def time_models(models, progress):
        plans = {name: folders[opening.args[0]] for name, opening in models.items()}
        timed.append(plans[next(name for name in plans if name.startswith("searched"))])
        ms = {name: took(plan, truth, 20.0) for name, plan in plans.items()}
        return {n: Times(*(Spread(2 * m, 2 * m, 2 * m) for m in (t.prefill, t.decode))) for n, t in ms.items()}

    monkeypatch.setattr(latency, "save_random", save)
    monkeypatch.setattr(latency, "time_models", time_models)
    rng = np.random.default_rng(1)
    wholes = {f"anchor-{n}": drawn(rng) for n in range(4)}
    at = {name: tmp_path / name for name in wholes}
    folders |= {at[name]: plan for name, plan in wholes.items()}
    measured = {name: took(plan, truth, 20.0) for name, plan in wholes.items()}
    run = SimpleNamespace(
        recipe=SimpleNamespace(budget=SimpleNamespace(prefill="500 ms", decode=None)),
        out=tmp_path,
        teacher=None,
        target=SimpleNamespace(runtime="onnx", environment={}),
        bank=SimpleNamespace(key=""),
        stages=Stages(tmp_path / "stages", lambda _: None),
    )
    return run, Latency(table, SITES, 0, wholes, measured, at), truth, timed


def most_kept(known: Latency, limit: float = 500.0) -> Plan:
    """The plan of one action that keeps most within the limit, as far as is known; the fastest format of equals."""
    plans = [plan_of([action] * 12) for action in MENU]
    times = {plan: known.model.predict(plan).prefill + known.margin.prefill for plan in plans}
    fitting = [plan for plan in plans if times[plan] <= limit] or [min(plans, key=lambda p: times[p])]
    return max(fitting, key=lambda plan: (plan[SITES[0].name].keep, "w4" in str(plan[SITES[0].name])))


def test_what_a_search_takes_is_measured_and_learned_from(machine):
    run, before, truth, timed = machine
    first = most_kept(before)
    assert took(first, truth, 20.0).prefill > 550 > 500 >= before.model.predict(first).prefill
    after = corrected(run, before, most_kept, 4)
    found = most_kept(after)
    assert timed[0] == first and 1 < len(timed) <= 4
    assert took(found, truth, 20.0).prefill <= 500
    name = next(name for name, plan in after.wholes.items() if plan == first)
    assert after.measured[name].prefill == pytest.approx(
        took(first, truth, 20.0).prefill
    )  # though the machine was slower
    assert after.model.error(first).prefill < before.model.error(first).prefill
    assert 0 < after.margin.prefill < 0.1 * 500
    # kept: the next call times nothing
    count = len(timed)
    assert corrected(run, before, most_kept, 4).measured == after.measured and len(timed) == count


def test_without_a_limit_on_time_nothing_is_measured(machine):
    run, before, _, timed = machine
    run.recipe.budget.prefill = None
    assert corrected(run, before, most_kept, 4) is before and not timed
