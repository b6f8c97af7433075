"""What a finished stage left, on disk under a key of what it was made from; and how long every stage took.

stages/{name}.json           {"key": ..., "seconds": ..., "value": ...}
stages/{name}.safetensors    the weights of a student, beside the JSON that names their key
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save

from compressor.files import link, write_bytes_atomic, write_json_atomic
from compressor.plan import Plan
from compressor.progress import Progress, ProgressCallback
from compressor.student import Decoder, Student

T = TypeVar("T")


def key_of(*parts: object) -> str:
    """Sixteen hex digits that name some JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Stages:
    """The stages of one run.

    Args:
        folder: where their results lie.
        progress: told what goes on.
    """

    def __init__(self, folder: Path, progress: ProgressCallback):
        self.folder, self._progress = folder, progress
        self.seconds: dict[str, float] = {}

    def reporter(self, stage: str) -> Callable[..., None]:
        """`report(done, total, message="")` for one stage."""
        return lambda done, total, message="": self._progress(Progress(stage, done, total, str(message)))

    @contextmanager
    def timed(self, name: str, key: str = "") -> Iterator[Callable[..., None]]:
        """A stage that keeps its own results. Gives its reporter; the time is added to that of earlier, interrupted calls
        under the same key."""
        report, start = self.reporter(name), time.monotonic()
        report(0, 1)
        stored = self._stored(f"{name}-time", key) if key else None
        try:
            yield report
        finally:
            self.seconds[name] = time.monotonic() - start + (stored["seconds"] if stored else 0.0)
            if key:
                write_json_atomic(self.folder / f"{name}-time.json", {"key": key, "seconds": self.seconds[name]})
        report(1, 1)

    def take_over(self, folder: Path, pattern: str) -> None:
        """Have the values of some stages of another run, where there are none of that name."""
        for path in folder.glob(pattern):
            link(path, self.folder / path.name)

    def value(self, name: str, key: str, make: Callable[[Callable[..., None]], T]) -> T:
        """The JSON value of a stage: read if it was made under the same key, else `make(reporter)`."""

        def timed() -> dict:
            with self.timed(name) as report:
                value = make(report)
            return {"seconds": self.seconds[name], "value": value}

        stored = self._record(name, key, timed)
        self.seconds[name] = stored["seconds"]
        return stored["value"]

    def kept(self, name: str, key: str, make: Callable[[], T]) -> T:
        """A JSON value in the same way, which is no stage of its own: it is not timed and not told."""
        return self._record(name, key, lambda: {"value": make()})["value"]

    def student(
        self, name: str, key: str, decoder: Decoder, make: Callable[[Callable[..., None]], tuple[Student, Any]]
    ) -> tuple[Student, Any]:
        """A student and a JSON value beside it, in the same way."""
        weights = self.folder / f"{name}.safetensors"

        def write(report: Callable[..., None]) -> dict:
            student, value = make(report)
            (self.folder / f"{name}.json").unlink(missing_ok=True)  # what it says of the weights ends here
            tensors = {key: tensor.contiguous() for key, tensor in student.tensors().items()}
            write_bytes_atomic(weights, save(tensors))
            return {"plan": student.plan.to_json(), "value": value}

        record = self.value(name, key, write)
        return Student.from_tensors(decoder, Plan.from_json(record["plan"]), load_file(weights)), record["value"]

    def _record(self, name: str, key: str, make: Callable[[], dict]) -> dict:
        stored = self._stored(name, key)
        if stored is None:
            stored = {"key": key, **make()}
            write_json_atomic(self.folder / f"{name}.json", stored)
        return stored

    def _stored(self, name: str, key: str) -> dict | None:
        path = self.folder / f"{name}.json"
        if not path.exists():
            return None
        stored = json.loads(path.read_text())
        return stored if stored["key"] == key else None
