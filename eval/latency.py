"""The latency table: milliseconds of every (site shape, action), measured once, and what they predict for a plan.

    T(plan) = rest + scale * sum over sites of entry(site shape, action)

`rest` and `scale` are fitted to whole models measured in the same session, prefill and decode apart.
Knows nothing of runtimes: whoever measures hands over a callable that makes a stack of sites to be timed.

An entry is the slope between a short and a long stack of one site, so that what a run costs by itself cancels:
    entry = (t(long copies) - t(short copies)) / (long - short)

An expert runs for `Site.share` of the tokens on average: its prefill is that of so many tokens (whoever makes the stack sees
to it), its decoding the share of a token's time that is the chance that it runs at all. What routing takes falls to `rest`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from compressor.plan import Action, Site
from eval.timing import CacheFlusher, interleave

COPIES = {"attention": (2, 6), "ffn": (2, 6), "embedding": (1, 2), "head": (1, 2)}
"""Short and long stack by kind of site; tables are so large that two of them dwarf the cost of a run."""

PHASES = ("prefill", "decode")

REPEATS = {"prefill": 7, "decode": 21}
"""Calls that are timed of a stack; decoding takes a tenth of the time, and other work disturbs it as long."""

STEADY = 0.15
"""Quartile range, as a fraction of the median, above which an entry is measured again, when all others have been: other work
on a machine comes in bursts, of which some outlast an entry."""

ATTEMPTS = 3
"""Measurements of one entry at most; of each phase the steadiest counts."""


class Stack(Protocol):
    """Some copies of a site, ready to be timed."""

    @property
    def prefill(self) -> Callable[[], object]: ...
    @property
    def decode(self) -> Callable[[], object]: ...
    @property
    def close(self) -> Callable[[], None]: ...


MakeStack = Callable[[Site, Action, int], Stack]
"""(site, action, copies) -> stack."""


@dataclass(frozen=True)
class Milliseconds:
    """Time of one prefill and of one decoded token."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Entry:
    """Milliseconds of one site under one action, and the spread (see `Timing`) of its measurements."""

    prefill_ms: float
    decode_ms: float
    prefill_spread: float
    decode_spread: float

    @property
    def steady(self) -> bool:
        return max(self.prefill_spread, self.decode_spread) <= STEADY

    def steadier(self, other: Entry) -> Entry:
        """Of each phase what was measured with the smaller spread, here or there."""
        prefill = min(self, other, key=lambda entry: entry.prefill_spread)
        decode = min(self, other, key=lambda entry: entry.decode_spread)
        return Entry(prefill.prefill_ms, decode.decode_ms, prefill.prefill_spread, decode.decode_spread)


NOTHING = Entry(0.0, 0.0, 0.0, 0.0)
"""What a dropped sub-layer takes."""


class LatencyTable:
    """Entries on disk, under a key that names all that they depend on.

    Args:
        path: JSON file; entries of other environments in it are left alone.
        environment: processor, runtime and its version, provider, threads, workload: whatever changes the times.
    """

    def __init__(self, path: Path, environment: Mapping[str, str | int | float | None]):
        self._path = Path(path)
        self.environment = dict(environment)
        self._environment_key = hashlib.sha256(json.dumps(self.environment, sort_keys=True).encode()).hexdigest()[:16]
        self._entries: dict[str, Entry] = {}
        if self._path.exists():
            stored = json.loads(self._path.read_text()).get(self._environment_key, {"entries": {}})
            self._entries = {key: Entry(**entry) for key, entry in stored["entries"].items()}

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, site: Site, action: Action) -> Entry:
        """The entry of a measured (site, action).

        Raises:
            KeyError: it was never measured.
        """
        return NOTHING if action.keep == 0 else self._entries[entry_key(site, action)]

    def missing(self, wanted: Iterable[tuple[Site, Action]]) -> dict[str, tuple[Site, Action]]:
        """Those that have to be measured, one for each key: sites of the same shape share an entry."""
        pairs = {entry_key(site, action): (site, action) for site, action in wanted if action.keep}
        return {key: pair for key, pair in pairs.items() if key not in self._entries}

    def measure(
        self,
        wanted: Iterable[tuple[Site, Action]],
        make_stack: MakeStack,
        *,
        flush: Callable[[], object] | None = None,
        progress: Callable[[int, int, str], object] = lambda done, of, key: None,
    ) -> None:
        """Measure what is missing of `wanted`, and what was not `STEADY` of it once more when all of it was; saved entry by
        entry, so that a kill loses one.

        flush: empties the caches of the device, ahead of every decode; those of the processor if None.
        progress: called with (entries done, entries to do, key) before each.
        """
        missing, flush = self.missing(wanted), flush or CacheFlusher()
        for _ in range(ATTEMPTS):
            for done, (key, (site, action)) in enumerate(missing.items()):
                progress(done, len(missing), key)
                entry = measure_entry(site, action, make_stack, flush)
                self._entries[key] = entry.steadier(self._entries.get(key, entry))
                self._save()
            missing = {key: pair for key, pair in missing.items() if not self._entries[key].steady}

    def sum_ms(self, plan: Mapping[str, Action], sites: Sequence[Site]) -> Milliseconds:
        """Sum of the entries of a plan, before `rest` and `scale`."""
        entries = [self.entry(site, plan[site.name]) for site in sites]
        return Milliseconds(sum(e.prefill_ms for e in entries), sum(e.decode_ms for e in entries))

    def fit(self, anchors: Sequence[tuple[Mapping[str, Action], Milliseconds]], sites: Sequence[Site]) -> LatencyModel:
        """Fit `rest` and `scale` to whole models: (plan, its measured milliseconds)."""
        sums = [self.sum_ms(plan, sites) for plan, _ in anchors]
        fits = [
            fit_line([getattr(s, phase) for s in sums], [getattr(measured, phase) for _, measured in anchors])
            for phase in PHASES
        ]
        rests, scales = zip(*fits, strict=True)
        return LatencyModel(self, tuple(sites), Milliseconds(*rests), Milliseconds(*scales))

    def _save(self) -> None:
        """Write this environment's entries into the file, by way of a draft beside it."""
        everything = json.loads(self._path.read_text()) if self._path.exists() else {}
        entries = {key: asdict(entry) for key, entry in self._entries.items()}
        everything[self._environment_key] = {"environment": self.environment, "entries": entries}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.draft")
        draft.write_text(json.dumps(everything, indent=1))
        os.replace(draft, self._path)


@dataclass(frozen=True)
class LatencyModel:
    """T(plan) = rest + scale * sum of entries, prefill and decode apart. rest in ms, scale without unit."""

    table: LatencyTable
    sites: tuple[Site, ...]
    rest: Milliseconds
    scale: Milliseconds

    def predict(self, plan: Mapping[str, Action]) -> Milliseconds:
        """Expected milliseconds of a plan."""
        total = self.table.sum_ms(plan, self.sites)
        return Milliseconds(
            self.rest.prefill + self.scale.prefill * total.prefill, self.rest.decode + self.scale.decode * total.decode
        )

    def site_ms(self, site: Site, action: Action) -> Milliseconds:
        """What one site contributes to `predict`: the additive cost that a search can plan with."""
        entry = self.table.entry(site, action)
        return Milliseconds(self.scale.prefill * entry.prefill_ms, self.scale.decode * entry.decode_ms)


def entry_key(site: Site, action: Action) -> str:
    """Shape of the site's matrices under `action`, and format: `ffn 1000x576 1000x576 576x1000 w4`; an expert's share; in
    front, the part of an encoder-decoder that it belongs to."""
    kind = f"{site.part} {site.kind}" if site.part else site.kind
    shapes = ("{}x{}".format(*matrix.shape(action.keep, site.units)) for matrix in site.matrices)
    share = () if site.share == 1 else (f"{site.share:g}",)
    return " ".join((kind, *shapes, action.format, *share))


def measure_entry(site: Site, action: Action, make_stack: MakeStack, before: Callable[[], object]) -> Entry:
    """Time a short and a long stack in alternation. `before` runs ahead of every decode, to empty the caches."""
    short_copies, long_copies = COPIES[site.kind]
    stacks = [make_stack(site, action, copies) for copies in (short_copies, long_copies)]
    try:
        slopes, spreads = [], []
        for phase, flush in zip(PHASES, (None, before), strict=True):
            if phase == "decode" and site.part == "encoder":  # it has read the text by then
                slopes.append(0.0)
                spreads.append(0.0)
                continue
            calls = [getattr(stack, phase) for stack in stacks]
            short, long = interleave(calls, repeats=REPEATS[phase], before=flush)
            # noise can turn the slope of a tiny site around; it cannot cost less than nothing
            slopes.append(max(0.0, (long.median_ms - short.median_ms) / (long_copies - short_copies)))
            spreads.append(max(short.spread, long.spread))
        prefill_ms, decode_ms = slopes
        return Entry(prefill_ms, decode_ms * site.share, *spreads)
    finally:
        for stack in stacks:
            stack.close()


def fit_line(sums_ms: Sequence[float], measured_ms: Sequence[float]) -> tuple[float, float]:
    """(rest, scale) that minimize the squared relative errors of measured = rest + scale * sum; neither is negative.

    One anchor, or anchors whose sums hardly differ, tell only the scale.
    """
    x, y = np.asarray(sums_ms, float), np.asarray(measured_ms, float)
    if len(x) == 0:
        raise ValueError("at least one whole model must be measured to scale the table")
    ones = np.ones_like(x) / y
    only_scale = float((x / y).sum() / ((x / y) ** 2).sum())
    if x.max() - x.min() < 0.05 * x.max():
        return 0.0, only_scale
    rest, scale = np.linalg.lstsq(np.stack([ones, x / y], 1), np.ones_like(x), rcond=None)[0].tolist()
    return (rest, scale) if rest >= 0 and scale >= 0 else (0.0, only_scale)
