"""Peak memory of a call, measured in a process of its own. Knows nothing of what the call does."""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from compressor.errors import CompressorError


def peak_growth_bytes(call: Callable[..., object], *arguments: object) -> int:
    """How far resident memory rose at its highest while `call(*arguments)` ran in a fresh process, in bytes.

    What the process held before, interpreter and libraries, does not count. The process imports the module of `call` and
    nothing else: a script that measures is not run again.

    Args:
        call: a function of a module, or of a script that can be imported; it is called once.
        arguments: JSON values, or paths, which arrive as strings.

    Raises:
        CompressorError: the process ended without an answer.
    """
    module = call.__module__
    if module == "__main__":
        module = Path(sys.modules["__main__"].__file__ or "").stem
    ended = subprocess.run(
        [sys.executable, "-P", "-m", __name__],  # not what happens to lie where one is
        input=json.dumps([module, call.__name__, arguments], default=os.fspath),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )
    if ended.returncode:
        *_, reason = ["", *ended.stderr.strip().splitlines()]
        raise CompressorError(f"measuring memory: the process ended with code {ended.returncode}. {reason}")
    return int(ended.stdout)


def _main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries have to say
    module, name, arguments = json.load(sys.stdin)
    call = getattr(importlib.import_module(module), name)
    before, _ = resident_bytes()
    call(*arguments)
    print(max(0, resident_bytes()[1] - before), file=answer)
    answer.close()


def resident_bytes() -> tuple[int, int]:
    """Resident memory of this process now, and at its highest."""
    status = Path("/proc/self/status")
    if not status.exists():
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return highest, highest
    # not ru_maxrss: on Linux a process inherits that of the one that started it
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
    return tuple(int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


if __name__ == "__main__":
    _main()
