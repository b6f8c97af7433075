"""Files that are either whole or absent: written beside their place, then moved there.

A run that is killed while it writes leaves at most a hidden `.name.*.part` file, never half a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from compressor.errors import CompressorError


def write_bytes_atomic(path: Path, data: bytes) -> None:
    """Writes `data` to `path`, whose folder is made if need be. A reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)  # mkstemp makes the file private; a result has the rights of any other new file
        os.umask(umask)
        os.chmod(part, 0o666 & ~umask)
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if need be, for one run; it is free again when the process ends, however it ends.

    Raises:
        CompressorError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise CompressorError(
            f"{folder}: expected a folder of its own, another run is at work in it; wait for that, or choose another one"
        ) from None
    try:
        yield
    finally:
        lock.release()


def digest(path: Path) -> str:
    """SHA-256 of a file, as hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def link(path: Path, place: Path) -> None:
    """Have a file that is never changed in another place, too: the same bytes on the disk, or a copy on another one."""
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, place)
    except FileExistsError:
        return
    except OSError:
        write_bytes_atomic(place, path.read_bytes())


def write_text_atomic(path: Path, text: str) -> None:
    """The same for text, as UTF-8 with `\\n` line ends."""
    write_bytes_atomic(path, text.encode())


def write_json_atomic(path: Path, data: object) -> None:
    """The same for JSON that any reader takes: ValueError for NaN and infinity."""
    write_text_atomic(path, json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
