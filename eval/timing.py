"""Wall-clock time of calls: warm-up, cold caches, medians, alternation. Times callables and knows nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path
from statistics import median

import numpy as np

FALLBACK_CACHE_BYTES = 32 << 20
"""Assumed size of the last-level cache where the system does not tell."""


CONFIDENCE = 0.93
"""Probability with which intervals of medians hold the true one."""


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The narrowest interval of order statistics that holds the true median with at least `CONFIDENCE`, whatever the
    distribution (the sign test's; Conover, Practical Nonparametric Statistics, section 3.2): of five samples all of their
    range, of fifteen the fourth to the twelfth; of fewer than five their range, which holds it less often."""
    count, ordered = len(samples), sorted(samples)
    cut = 0
    while 2 * sum(comb(count, k) for k in range(cut + 2)) / 2**count <= 1 - CONFIDENCE:
        cut += 1
    return ordered[cut], ordered[count - 1 - cut]


def time_call(
    call: Callable[[], object], *, warmup: int = 2, repeats: int = 10, before: Callable[[], object] | None = None
) -> float:
    """Median time of `call` in milliseconds; `before` runs ahead of every call, outside the measured time."""
    return interleave([call], warmup=warmup, repeats=repeats, before=before)[0]


def interleave(
    calls: Sequence[Callable[[], object]],
    *,
    warmup: int = 2,
    repeats: int = 10,
    before: Callable[[], object] | None = None,
) -> list[float]:
    """Median times of several calls in milliseconds, taken in alternation, so that what else the machine does meets all of
    them alike.

    Args:
        warmup: rounds that are not counted.
        repeats: rounds that are; at least 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: at least 1 call must be timed")
    samples: list[list[float]] = [[] for _ in calls]
    for turn in range(warmup + repeats):
        for call, into in zip(calls, samples, strict=True):
            if before is not None:
                before()
            start = time.perf_counter()
            call()
            elapsed_ms = (time.perf_counter() - start) * 1e3
            if turn >= warmup:
                into.append(elapsed_ms)
    return [median(sample) for sample in samples]


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first processor has."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) << {"K": 10, "M": 20, "G": 30}[text[-1]])
    return max(sizes, default=FALLBACK_CACHE_BYTES)


class CacheFlusher:
    """Called before a timed call, it leaves none of the call's weights in the processor's caches.

    A whole model does not fit there, so a single layer timed with hot caches looks faster than it will be.
    """

    def __init__(self, size_bytes: int | None = None):
        self._buffer = np.ones((size_bytes or 2 * last_level_cache_bytes()) // 8)

    def __call__(self) -> None:
        # written, not only read: exclusive last-level caches keep lines that were only read elsewhere
        self._buffer += 1.0
