"""The timing arithmetic and the latency table, on clocks and stacks that the tests make themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest

from compressor.measure import Target
from compressor.plan import DROP, Action, Matrix, Site
from compressor.recipe import TargetSection
from eval import latency, timing
from eval.latency import LatencyTable, entry_key
from eval.timing import interleave, median_interval, time_call


class Clock:
    """Stands for `time.perf_counter`; calls made by `takes` move it."""

    def __init__(self, monkeypatch):
        self.now_ms = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now_ms / 1e3)

    def takes(self, *durations_ms: float):
        queue = list(durations_ms)

        def call() -> None:
            self.now_ms += queue.pop(0) if len(queue) > 1 else queue[0]

        return call


def ffn(layer: int, channels: int = 64) -> Site:
    name = f"layers.{layer}.ffn"
    matrices = (Matrix(f"{name}.up", channels, 32, "rows"), Matrix(f"{name}.down", 32, channels, "columns"))
    return Site(name, "ffn", layer, channels, matrices)


@dataclass
class FakeStacks:
    """Makes stacks that take 5 ms, and for every copy `keep` ms in prefill and `keep / 10` in decode."""

    clock: Clock
    made: list[tuple[str, Action, int]]
    closed: int = 0
    fail_at: int | None = None

    def __call__(self, site: Site, action: Action, copies: int):
        if self.fail_at is not None and len(self.made) >= self.fail_at:
            raise KeyboardInterrupt
        self.made.append((site.name, action, copies))
        outer = self

        class Stack:
            prefill = staticmethod(outer.clock.takes(5 + copies * action.keep))
            decode = staticmethod(outer.clock.takes(5 + copies * action.keep / 10))

            def close(self) -> None:
                outer.closed += 1

        return Stack()


@pytest.fixture
def stacks(monkeypatch) -> FakeStacks:
    return FakeStacks(Clock(monkeypatch), [])


def test_warmup_and_before_are_not_timed(monkeypatch):
    clock = Clock(monkeypatch)
    flush = clock.takes(1000.0)
    measured = time_call(clock.takes(500, 500, 1, 2, 3, 4, 5), warmup=2, repeats=5, before=flush)
    assert measured == pytest.approx(3)


def test_threads_are_those_of_the_cores_that_the_process_may_use(monkeypatch):
    """None leaves it to ONNX Runtime, which counts the machine's."""
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    for allowed, threads in (({0}, 1), ({0, 1, 2, 3}, None)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, allowed=allowed: allowed)
        assert Target.of(TargetSection(device="cpu")).threads == threads
    assert Target.of(TargetSection(device="cpu", threads=3)).threads == 3


def test_interleave_alternates():
    order: list[str] = []
    interleave([lambda: order.append("a"), lambda: order.append("b")], warmup=1, repeats=2)
    assert order == ["a", "b"] * 3


def test_where_a_median_lies():
    assert median_interval([3.0]) == (3.0, 3.0)
    assert median_interval([5.0, 1.0, 4.0, 2.0, 3.0]) == (1.0, 5.0)
    assert median_interval([float(n) for n in range(15)]) == (3.0, 11.0)
    rng, held = np.random.default_rng(0), 0
    for _ in range(2000):  # of a distribution whose median is 1
        low, high = median_interval((2.0 ** rng.normal(size=9)).tolist())
        held += low <= 1 <= high
    assert 0.93 < held / 2000 < 0.98


def test_no_repeats_is_refused():
    with pytest.raises(ValueError, match="repeats = 0"):
        time_call(lambda: None, repeats=0)


def test_last_level_cache_is_found():
    assert timing.last_level_cache_bytes() >= 256 << 10


def test_entry_is_the_slope_without_the_run_itself(tmp_path, stacks):
    table = LatencyTable(tmp_path / "table.json", {"cpu": "x"})
    table.measure([(ffn(0), Action(64, "w4"))], stacks)
    ((_, entry),) = table
    assert (entry.prefill_ms, entry.decode_ms) == (pytest.approx(64), pytest.approx(6.4))
    assert stacks.closed == len(stacks.made) == 2


def test_same_shapes_are_measured_once_and_dropped_sites_never(tmp_path, stacks):
    table = LatencyTable(tmp_path / "table.json", {"cpu": "x"})
    table.measure([(ffn(layer), action) for layer in range(3) for action in (Action(64, "w4"), DROP)], stacks)
    assert len(table) == 1 and len(stacks.made) == 2


def test_entries_of_another_table_are_taken_where_there_are_none(tmp_path, stacks):
    for name, environment, keeps in (("old", "x", (16, 32)), ("other", "y", (48,)), ("new", "x", (32, 64))):
        wanted = [(ffn(0), Action(keep, "w4")) for keep in keeps]
        LatencyTable(tmp_path / f"{name}.json", {"cpu": environment}).measure(wanted, stacks)
    table = LatencyTable(tmp_path / "new.json", {"cpu": "x"})
    before = dict(table)
    for name in ("old", "other", "none"):
        table.take_over(tmp_path / f"{name}.json")
    assert len(table) == 3 and before.items() <= dict(table).items()
    assert not table.missing([(ffn(0), Action(16, "w4"))]) and table.missing([(ffn(0), Action(48, "w4"))])


def test_a_killed_measurement_goes_on_where_it_stopped(tmp_path, stacks):
    wanted = [(ffn(0), Action(keep, "w4")) for keep in (16, 32, 48, 64)]
    stacks.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        LatencyTable(tmp_path / "table.json", {"cpu": "x"}).measure(wanted, stacks)
    stacks.made.clear()
    stacks.fail_at = None
    again = LatencyTable(tmp_path / "table.json", {"cpu": "x"})
    assert len(again) == 2
    again.measure(wanted, stacks)
    assert {action.keep for _, action, _ in stacks.made} == {48, 64}
    assert dict(again)[entry_key(*wanted[0])].prefill_ms == pytest.approx(16)


def test_what_was_disturbed_is_measured_more_often(tmp_path, stacks, monkeypatch):
    """Pass by pass, and only the phase that was: one burst does not count."""
    monkeypatch.setattr(latency, "PASSES", (3, 6))
    wanted = [(ffn(0), Action(keep, "w4")) for keep in (16, 32, 48)]
    table = LatencyTable(tmp_path / "table.json", {"cpu": "x"})
    clock, undisturbed = stacks.clock, stacks.__call__

    def disturbed(site: Site, action: Action, copies: int):
        stack, busy = undisturbed(site, action, copies), copies == 6 and action.keep == 32 and len(stacks.made) < 8

        def prefill(quiet=stack.prefill) -> None:
            quiet()
            clock.now_ms += 500 * busy

        stack.prefill = prefill
        return stack

    table.measure(wanted, disturbed)
    assert [action.keep for _, action, _ in stacks.made[::2]] == [16, 32, 48] * 3 + [32] * 3
    assert [dict(table)[entry_key(*pair)].prefill_ms for pair in wanted] == pytest.approx([16, 32, 48])
    again = LatencyTable(tmp_path / "table.json", {"cpu": "x"})
    entry = dict(again)[entry_key(*wanted[1])]
    assert len(entry.prefill) == 6 and len(entry.decode) == 3
    assert not again.missing(wanted)


def test_a_killed_pass_is_taken_up_again(tmp_path, stacks, monkeypatch):
    monkeypatch.setattr(latency, "PASSES", (2, 4))
    wanted = [(ffn(0), Action(keep, "w4")) for keep in (16, 32)]
    stacks.fail_at = 6
    with pytest.raises(KeyboardInterrupt):
        LatencyTable(tmp_path / "table.json", {"cpu": "x"}).measure(wanted, stacks)
    stacks.fail_at = None
    again = LatencyTable(tmp_path / "table.json", {"cpu": "x"})
    assert len(again) == 2 and len(again.missing(wanted)) == 1
    again.measure(wanted, stacks)
    assert len(stacks.made) == 8


def test_environments_do_not_share_entries(tmp_path, stacks):
    path, wanted = tmp_path / "table.json", [(ffn(0), Action(64, "w4"))]
    LatencyTable(path, {"threads": 1}).measure(wanted, stacks)
    other = LatencyTable(path, {"threads": 2})
    assert len(other) == 0
    other.measure(wanted, stacks)
    assert len(json.loads(path.read_text())) == 2
    assert len(LatencyTable(path, {"threads": 1})) == 1


def test_keys_tell_shapes_and_formats_apart():
    keys = {entry_key(ffn(0), Action(keep, name)) for keep in (32, 64) for name in ("w4", "w8")}
    assert len(keys) == 4
    assert entry_key(ffn(0), Action(32, "w4")) == "ffn 32x32 32x32 w4"
