"""Peak memory of a call, measured in a process of its own. Knows nothing of what the call does."""

from __future__ import annotations

import multiprocessing
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from compressor.errors import CompressorError


def peak_growth_bytes(call: Callable[..., object], *arguments: object) -> int:
    """How far resident memory rose at its highest while `call(*arguments)` ran in a fresh process, in bytes.

    What the process held before, interpreter and libraries, does not count.

    Args:
        call: a function of a module, so that the other process can import it; it is called once.

    Raises:
        CompressorError: the process ended without an answer.
    """
    context = multiprocessing.get_context("spawn")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(its, call, arguments), daemon=True)
    process.start()
    its.close()
    try:
        return int(mine.recv())
    except EOFError:
        process.join()
        raise CompressorError(f"measuring memory: the process ended with code {process.exitcode}") from None
    finally:
        process.join()


def _measure(answer: Connection, call: Callable[..., object], arguments: tuple) -> None:
    before = _resident_bytes()
    call(*arguments)
    answer.send(max(0, _peak_bytes() - before))


def _resident_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * resource.getpagesize()
    return _peak_bytes()


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
