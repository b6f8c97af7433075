"""The latency table: milliseconds of every (site shape, action), measured once. `eval.prediction` says what they make of a
plan. Knows nothing of runtimes: whoever measures hands over a callable that makes a stack of sites to be timed.

An entry is the slope between a short and a long stack of one site, so that what a run costs by itself cancels:
    entry = (t(long copies) - t(short copies)) / (long - short)

Other work on a machine comes in bursts, some of which outlast an entry. So the table is gone through in passes, until what
an entry was measured in each of them agrees; its time is their median.

An expert runs for `Site.share` of the tokens on average: its prefill is that of so many tokens (whoever makes the stack sees
to it), its decoding the share of a token's time that is the chance that it runs at all. What routing takes falls to `rest`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Protocol

import numpy as np

from compressor.plan import Action, Site
from eval.timing import CacheFlusher, interleave

COPIES = {"attention": (2, 6), "ffn": (2, 6), "embedding": (1, 2), "head": (1, 2)}
"""Short and long stack by kind of site; tables are so large that two of them dwarf the cost of a run."""

PHASES = ("prefill", "decode")

REPEATS = {"prefill": 7, "decode": 21}
"""Calls that are timed of a stack; decoding takes a tenth of the time, and other work disturbs it as long."""

PASSES = (3, 6)
"""How often an entry is measured, at least and at most."""

PRECISION = 0.05
"""Standard error, as a fraction of an entry, above which it is measured once more."""


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


NO_TIME = Milliseconds(0.0, 0.0)


@dataclass(frozen=True)
class Entry:
    """Milliseconds of one site under one action, one of every pass that measured them."""

    prefill: tuple[float, ...] = ()
    decode: tuple[float, ...] = ()

    @property
    def prefill_ms(self) -> float:
        return median(self.prefill)

    @property
    def decode_ms(self) -> float:
        return median(self.decode)

    @property
    def error(self) -> Milliseconds:
        """Standard error of both times."""
        return Milliseconds(*(_standard_error(measured) for measured in (self.prefill, self.decode)))

    @property
    def passes(self) -> int:
        """Those that measured any of it."""
        return max(len(self.prefill), len(self.decode))

    @property
    def open_phases(self) -> tuple[str, ...]:
        """Those that have to be measured once more."""
        return tuple(phase for phase in PHASES if not _settled(getattr(self, phase)))

    def with_pass(self, found_ms: Mapping[str, float]) -> Entry:
        """What was measured, and one pass more of some phases."""
        return replace(self, **{phase: (*getattr(self, phase), ms) for phase, ms in found_ms.items()})


def _standard_error(measured_ms: Sequence[float]) -> float:
    return float(np.std(measured_ms, ddof=1) / len(measured_ms) ** 0.5) if len(measured_ms) > 1 else 0.0


def _settled(measured_ms: Sequence[float]) -> bool:
    least, most = PASSES
    if least <= len(measured_ms) < most:
        return _standard_error(measured_ms) <= PRECISION * median(measured_ms)
    return len(measured_ms) >= most


class LatencyTable:
    """Entries on disk, under a key that names all that they depend on.

    Args:
        path: JSON file; entries of other environments in it are left alone.
        environment: processor, runtime and its version, provider, threads, workload: whatever changes the times.
    """

    def __init__(self, path: Path, environment: Mapping[str, str | int | float | None]):
        self._path = Path(path)
        self.environment = dict(environment)
        named = json.dumps({"form": "passes", **self.environment}, sort_keys=True)  # not what older files hold
        self._environment_key = hashlib.sha256(named.encode()).hexdigest()[:16]
        self._entries = self._read(self._path)

    def take_over(self, path: Path) -> None:
        """Have the entries of another file, of the same environment, that are missing here."""
        self._entries = self._read(Path(path)) | self._entries

    def _read(self, path: Path) -> dict[str, Entry]:
        everything = json.loads(path.read_text()) if path.exists() else {}
        stored = everything.get(self._environment_key, {"entries": {}})["entries"]
        return {key: Entry(*(tuple(entry[phase]) for phase in PHASES)) for key, entry in stored.items()}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        """All entries and their keys."""
        return iter(self._entries.items())

    def missing(self, wanted: Iterable[tuple[Site, Action]]) -> dict[str, tuple[Site, Action]]:
        """Those that have to be measured, for the first time or once more, one for each key: sites of the same shape share an
        entry."""
        pairs = {entry_key(site, action): (site, action) for site, action in wanted if action.keep}
        return {key: pair for key, pair in pairs.items() if self._so_far(key).open_phases}

    def measure(
        self,
        wanted: Iterable[tuple[Site, Action]],
        make_stack: MakeStack,
        *,
        flush: Callable[[], object] | None = None,
        progress: Callable[[int, int, str], object] = lambda done, of, key: None,
    ) -> None:
        """Measure what is missing of `wanted`, pass by pass; saved entry by entry, so that a kill loses one measurement.

        flush: empties the caches of the device, ahead of every decode; those of the processor if None.
        progress: called with (measurements done, measurements to do as far as is known, key) before each.
        """
        wanted, flush, done = list(wanted), flush or CacheFlusher(), 0
        while missing := self.missing(wanted):
            to_do = done + sum(max(1, PASSES[0] - self._so_far(key).passes) for key in missing)
            for key, (site, action) in missing.items():
                progress(done, to_do, key)
                before = self._so_far(key)
                found_ms = measure_entry(site, action, make_stack, flush, before.open_phases)
                self._entries[key] = before.with_pass(found_ms)
                self._save()
                done += 1

    def _so_far(self, key: str) -> Entry:
        return self._entries.get(key, Entry())

    def _save(self) -> None:
        """Write this environment's entries into the file, by way of a draft beside it."""
        everything = json.loads(self._path.read_text()) if self._path.exists() else {}
        entries = {key: asdict(entry) for key, entry in self._entries.items()}
        everything[self._environment_key] = {"environment": self.environment, "entries": entries}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_name(f".{self._path.name}.draft")
        draft.write_text(json.dumps(everything, indent=1))
        os.replace(draft, self._path)


def entry_key(site: Site, action: Action) -> str:
    """The part of an encoder-decoder that the site belongs to, its kind, the shape of its matrices under `action`, an
    expert's share, and last the format: `ffn 1000x576 1000x576 576x1000 w4`."""
    kind = f"{site.part} {site.kind}" if site.part else site.kind
    shapes = ("{}x{}".format(*matrix.shape(action.keep, site.units)) for matrix in site.matrices)
    share = () if site.share == 1 else (f"{site.share:g}",)
    return " ".join((kind, *shapes, *share, action.format))


def measure_entry(
    site: Site, action: Action, make_stack: MakeStack, before: Callable[[], object], phases: Iterable[str] = PHASES
) -> dict[str, float]:
    """Time a short and a long stack in alternation: milliseconds by phase. `before` runs ahead of every decode, to empty the
    caches."""
    short_copies, long_copies = COPIES[site.kind]
    stacks = [make_stack(site, action, copies) for copies in (short_copies, long_copies)]
    found = {}
    try:
        for phase in phases:
            if phase == "decode" and site.part == "encoder":  # it has read the text by then
                found[phase] = 0.0
                continue
            calls = [getattr(stack, phase) for stack in stacks]
            flush, share = (before, site.share) if phase == "decode" else (None, 1.0)
            short, long = interleave(calls, repeats=REPEATS[phase], before=flush)
            # noise can turn the slope of a tiny site around; it cannot cost less than nothing
            found[phase] = share * max(0.0, (long - short) / (long_copies - short_copies))
        return found
    finally:
        for stack in reversed(stacks):  # what one found when it was made is there again
            stack.close()
