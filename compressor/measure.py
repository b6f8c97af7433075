"""Measures exported students as they are deployed: quality, time, memory. Puts `eval` and `compressor.export` together."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from compressor.network import Network
from compressor.recipe import TargetSection
from compressor.runtimes import BenchCalls, Device, RuntimeName, runtime
from compressor.student import Precision
from eval.latency import Milliseconds
from eval.memory import peak_growth_bytes
from eval.timing import CacheFlusher, median_interval, time_call


@dataclass(frozen=True)
class Target:
    """Where students run and in which floats, threads (None for one a core), tokens of the prefill and of the decode's
    context."""

    runtime: RuntimeName
    device: Device
    precision: Precision
    threads: int | None
    prefill_tokens: int
    context: int

    @classmethod
    def of(cls, wanted: TargetSection) -> Target:
        """`auto` takes the GPU where torch sees one, and float16 there."""
        device: Device = "cpu" if wanted.device == "cpu" else "cuda"
        if wanted.device == "auto" and not torch.cuda.is_available():
            device = "cpu"
        precision: Precision = "float16" if device == "cuda" else "float32"
        if wanted.precision != "auto":
            precision = wanted.precision
        threads = wanted.threads
        if threads is None and len(_processors()) < (os.cpu_count() or 1):
            threads = cores()  # ONNX Runtime would start one for every core of the machine
        return cls(wanted.runtime, device, precision, threads, wanted.workload.prefill, wanted.workload.context)

    @property
    def environment(self) -> dict[str, str | int | None]:
        """Everything that changes a time, as the key of the latency table."""
        return {
            "cpu": processor(),
            "gpu": gpu() if self.device == "cuda" else None,
            "cores": cores(),
            "device": self.device,
            "precision": self.precision,
            "threads": self.threads,
            "runtime": f"torch {torch.__version__}" if self.runtime == "torch" else f"onnxruntime {runtime_version()}",
            "prefill_tokens": self.prefill_tokens,
            "prefill_logits": 1,
            "context": self.context,
        }


ROUNDS = (5, 12)
"""Turns of models that are timed, at least and at most."""

PREFILLS, DECODES = 4, 24
"""Calls of a model in a turn."""

STEADY = 0.06
"""Half of the interval in which a median lies, as a share, with which it is known well enough: two standard errors."""


@dataclass(frozen=True)
class Spread:
    """Milliseconds: the median of the rounds' medians, and where the true one lies (`eval.timing.median_interval`)."""

    median_ms: float
    low_ms: float
    high_ms: float

    @classmethod
    def of(cls, medians_ms: list[float]) -> Spread:
        return cls(float(np.median(medians_ms)), *median_interval(medians_ms))

    @property
    def error(self) -> float:
        """Half of the interval, as a share of the median."""
        return (self.high_ms - self.low_ms) / 2 / self.median_ms


@dataclass(frozen=True)
class Times:
    """Time of one prefill and of one decoded token."""

    prefill: Spread
    decode: Spread

    @classmethod
    def from_dict(cls, data: dict) -> Times:
        return cls(Spread(**data["prefill"]), Spread(**data["decode"]))

    @property
    def medians(self) -> Milliseconds:
        return Milliseconds(self.prefill.median_ms, self.decode.median_ms)


def time_models(
    models: Mapping[str, Callable[[], AbstractContextManager[BenchCalls]]],
    *,
    rounds: tuple[int, int] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, message: None,
) -> dict[str, Times]:
    """Prefill and decode times of several models, by name.

    Models are open one at a time, since idle sessions spin; they take turns, so that what else the machine does meets all of
    them, until their medians are known to `STEADY`.

    Args:
        models: how to open each for timing; see `opened` and `opened_torch`.
        rounds: turns, at least and at most; `ROUNDS` if None.
    """
    medians: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in models}
    least, most = rounds or ROUNDS
    for turn in range(most):
        for index, (name, open_model) in enumerate(models.items()):
            with open_model() as calls:
                medians[name][0].append(time_call(calls.prefill, repeats=PREFILLS))
                medians[name][1].append(time_call(calls.decode, repeats=DECODES))
            progress(turn * len(models) + index + 1, max(turn + 1, least) * len(models), name)
        times = {name: Times(Spread.of(prefill), Spread.of(decode)) for name, (prefill, decode) in medians.items()}
        if turn + 1 >= least and all(max(t.prefill.error, t.decode.error) <= STEADY for t in times.values()):
            break
    return times


@contextmanager
def opened(folder: Path, target: Target) -> Iterator[BenchCalls]:
    """An exported folder, as calls to be timed."""
    with runtime(target.runtime).open_model(folder, target.device, target.threads) as model:
        yield model.bench_callables(target.prefill_tokens, target.context)


@contextmanager
def opened_torch(network: Network, target: Target) -> Iterator[BenchCalls]:
    """The teacher in torch, as calls to be timed; on the target, if torch has it, with torch's own number of threads."""
    ids_BL = torch.full((1, target.prefill_tokens), network.decoder.filler)
    home = network.device
    network.to(target.device if torch.cuda.is_available() else "cpu")
    try:
        if network.decoder.encoder:
            step = network.cached_step(torch.zeros(1, target.context, dtype=torch.int64), ids_BL)
            yield BenchCalls(
                lambda: network.generate(ids_BL, 1, lambda logits_BV: logits_BV.argmax(-1)).cpu(),
                lambda: step().cpu(),
                lambda: None,
            )
            return
        if not network.decoder.causal:
            yield BenchCalls(
                lambda: network.logits(network.hidden(ids_BL)).cpu(),
                lambda: network.logits(network.hidden(ids_BL[:, :1])).cpu(),
                lambda: None,
            )
            return
        step = network.cached_step(torch.zeros(1, target.context, dtype=torch.int64))
        # logits in host memory, as ONNX Runtime gives them: a GPU has finished then
        yield BenchCalls(
            lambda: network.logits(network.hidden(ids_BL)[:, -1:]).cpu(), lambda: step().cpu(), lambda: None
        )
    finally:
        network.to(home)


def cache_flusher(device: Device) -> Callable[[], object]:
    """A call that leaves no weights in the caches of the device, see `eval.timing.CacheFlusher`."""
    if device == "cpu" or not torch.cuda.is_available():
        return CacheFlusher()
    buffer = torch.zeros(4 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")

    def flush() -> None:
        buffer.add_(1)
        torch.cuda.synchronize()

    return flush


def peak_memory_bytes(folder: Path, target: Target) -> int:
    """Memory that an exported folder takes at its highest: opened, one prefill, eight decoded tokens."""
    return peak_growth_bytes(_use, folder, asdict(target))


def _use(folder: str, target: dict) -> None:
    wanted = Target(**target)
    with runtime(wanted.runtime).open_model(Path(folder), wanted.device, wanted.threads) as model:
        model.rehearse(wanted.prefill_tokens)


def available_bytes() -> int:
    """Memory that this process may still take: what the system has left, or all that its control groups allow, if that is
    less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([free, *_limits()])


def _limits() -> Iterator[int]:
    """Those of the control groups of this process, version 1 or 2, and of all above them."""
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    kinds = {"": ("/sys/fs/cgroup", "memory.max"), "memory": ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")}
    for _, controllers, path in groups:
        root, name = kinds.get(controllers, ("", ""))
        place = Path(root + path)
        for folder in (place, *place.parents) if root else ():
            with suppress(OSError, ValueError):  # `max` is none
                yield int((folder / name).read_text())


def return_memory_at_once() -> None:
    """Have the C library give back to the system what is freed, where it can be told to: by itself it comes to keep matrices
    of less than 32 MB for later (glibc's M_MMAP_THRESHOLD)."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(-3, 2**17)


def cores() -> int:
    """Physical cores that this process may use: what ONNX Runtime has threads for."""
    siblings = set()
    for number in _processors():
        path = Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list")
        siblings.add(path.read_text() if path.is_file() else str(number))
    return len(siblings)


def _processors() -> set[int]:
    """Numbers of those that this process may use, a core's threads one by one."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def processor() -> str:
    """Name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def gpu() -> str | None:
    """Name of the GPU that torch sees first."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def runtime_version() -> str:
    """Version of ONNX Runtime, whichever package brought it."""
    import onnxruntime

    return onnxruntime.__version__


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    packages = ("torch", "transformers", "onnx", "numpy")
    return {"python": platform.python_version(), "onnxruntime": runtime_version()} | {p: version(p) for p in packages}
