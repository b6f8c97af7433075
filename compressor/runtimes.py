"""Where students run: ONNX Runtime (`compressor.export`) or torch (`compressor.torch_runtime`), behind the same functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from compressor.network import Network
from compressor.plan import Action, Plan, Site
from compressor.student import Decoder, Precision, Student

RuntimeName = Literal["onnx", "torch"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class BenchCalls:
    """Two calls without arguments, to be timed: a prefill of an empty cache to the logits of its last token, and one decoded
    token on a filled one. Of a masked language model: to all logits, and of a single token."""

    prefill: Callable[[], object]
    decode: Callable[[], object]
    close: Callable[[], None]


class Deployed(Protocol):
    """A folder that is ready to run; a context manager that closes it."""

    @property
    def writes(self) -> bool: ...
    @property
    def answers(self) -> bool: ...
    @property
    def provider(self) -> str: ...
    def logits(self, ids: np.ndarray) -> np.ndarray: ...
    def generate(self, ids: np.ndarray, new_tokens: int, ends: Collection[int] = ()) -> list[int]: ...
    def bench_callables(self, prefill_tokens: int, context: int) -> BenchCalls: ...
    def rehearse(self, prefill_tokens: int) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> Any: ...
    def __exit__(self, *_: object) -> None: ...


class Runtime(Protocol):
    """Formats, sizes, folders and sessions of a place where students run."""

    def refused_formats(
        self,
        kind: Literal["attention", "ffn", "embedding"],
        formats: Sequence[str],
        device: Device,
        precision: Precision,
    ) -> dict[str, str]: ...
    def fixed_bytes(self, decoder: Decoder) -> int: ...
    def fp32_bytes(self, decoder: Decoder) -> int: ...
    def exported_files(self, folder: Path) -> list[Path]: ...
    def exported_bytes(self, folder: Path) -> int: ...
    def save_model(self, student: Student, network: Network, folder: Path) -> None: ...
    def save_random(self, plan: Plan, network: Network, folder: Path) -> None: ...
    def read_student(self, folder: Path, decoder: Decoder, plan: Plan) -> Student: ...
    def open_model(
        self, folder: Path, device: Device = "cpu", threads: int | None = None, *, exact: bool = False
    ) -> Deployed: ...
    def site_stack(
        self,
        decoder: Decoder,
        site: Site,
        action: Action,
        copies: int,
        *,
        prefill_tokens: int,
        context: int,
        device: Device = "cpu",
        threads: int | None = None,
    ) -> BenchCalls: ...


def runtime(name: RuntimeName) -> Runtime:
    """By the name of `target.runtime`."""
    if name == "torch":
        from compressor import torch_runtime

        return torch_runtime
    from compressor import export

    return export


def runtime_of(folder: Path) -> Runtime:
    """That of a deployed folder."""
    return runtime("torch" if (folder / "model.safetensors").is_file() else "onnx")
