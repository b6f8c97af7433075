"""How far a run is, as data, and how that is shown.

A stage calls `progress(Progress(...))` as often as it likes; only the renderer decides what is worth a line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import TaskID


@dataclass(frozen=True)
class Progress:
    """`done` of `total` steps of `stage`, and a few words on what is going on. The unit of a step is the stage's own."""

    stage: str
    done: int
    total: int
    message: str = ""


ProgressCallback = Callable[[Progress], None]
"""What a stage is given to report its progress to."""


def silent(_: Progress) -> None:
    """Shows nothing."""


def duration(seconds: float) -> str:
    """75 -> `1m15s`, 4000 -> `1h06m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class LineProgress:
    """For logs: a line when a stage begins, one when it ends, and in between one every `interval` seconds."""

    def __init__(self, file: TextIO, interval: float = 15.0, clock: Callable[[], float] = time.monotonic):
        self.file, self.interval, self.clock = file, interval, clock
        self.stage, self.began, self.began_at, self.said = "", 0.0, 0, 0.0
        self.ended = False

    def __call__(self, progress: Progress) -> None:
        now = self.clock()
        new = progress.stage != self.stage
        if new:
            self.stage, self.began, self.began_at, self.ended = progress.stage, now, progress.done, False
        ends = progress.done >= progress.total and not self.ended
        if not (new or ends or (now - self.said >= self.interval and not self.ended)):
            return
        self.said, self.ended = now, self.ended or ends
        line = f"{progress.stage}  {progress.done}/{progress.total}  {duration(now - self.began)}"
        left = self.seconds_left(progress, now)
        if left is not None:
            line += f", {duration(left)} left"
        print(f"{line}  {progress.message}".rstrip(), file=self.file, flush=True)

    def seconds_left(self, progress: Progress, now: float) -> float | None:
        """At the pace since the stage's first report, which may begin at `done` > 0 when a run is resumed."""
        made = progress.done - self.began_at
        if made <= 0 or progress.done >= progress.total:
            return None
        return (now - self.began) / made * (progress.total - progress.done)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class BarProgress:
    """For terminals: one bar a stage, with time spent and time left."""

    def __init__(self, file: TextIO):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.bars = Bars(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[message]}", markup=False),
            console=Console(file=file),
        )
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, progress: Progress) -> None:
        if progress.stage not in self.tasks:
            self.tasks[progress.stage] = self.bars.add_task(progress.stage, total=progress.total, message="")
        self.bars.update(
            self.tasks[progress.stage], completed=progress.done, total=progress.total, message=progress.message
        )

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()


class JsonProgress:
    """For programs: one JSON object a line, {"stage", "done", "total", "message", "seconds"}, seconds since the first."""

    def __init__(self, file: TextIO, clock: Callable[[], float] = time.monotonic):
        self.file, self.clock, self.began = file, clock, clock()

    def __call__(self, progress: Progress) -> None:
        line = {**asdict(progress), "seconds": round(self.clock() - self.began, 3)}
        print(json.dumps(line, ensure_ascii=False), file=self.file, flush=True)


def renderer(file: TextIO) -> BarProgress | LineProgress:
    """Bars on a terminal, lines anywhere else. A context manager that is called with each `Progress`."""
    return BarProgress(file) if file.isatty() else LineProgress(file)
