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
    before, _ = resident_bytes()
    call(*arguments)
    answer.send(max(0, resident_bytes()[1] - before))


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process now, and at its highest."""
    status = Path("/proc/self/status")
    if not status.exists():
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return highest, highest
    # not ru_maxrss: on Linux a process inherits that of the one that started it
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
