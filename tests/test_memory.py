"""Peak memory of a call in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from compressor.errors import CompressorError
from eval.memory import peak_growth_bytes


def fill(megabytes: int) -> None:
    np.ones(megabytes << 17)


def chat(path: str) -> None:
    print("a library says", path)


def fail(path: str) -> None:
    raise FileNotFoundError(path)


def test_what_a_call_took_is_counted_though_it_was_given_back():
    assert 60 << 20 < peak_growth_bytes(fill, 64) < 80 << 20


def test_a_call_that_fails_says_why(tmp_path):
    with pytest.raises(CompressorError, match="code 1. FileNotFoundError: .*missing"):
        peak_growth_bytes(fail, tmp_path / "missing")


def test_neither_what_is_said_nor_what_lies_around_disturbs(tmp_path, monkeypatch):
    for name in ("json", "eval"):
        (tmp_path / f"{name}.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    assert peak_growth_bytes(chat, tmp_path) >= 0


def test_a_script_that_measures_is_not_run_again(tmp_path):
    """As a user's is that calls `compress` at its top level."""
    script = tmp_path / "script.py"
    script.write_text("print('begun')\nfrom eval.memory import peak_growth_bytes, resident_bytes\n")
    script.write_text(script.read_text() + "print(peak_growth_bytes(resident_bytes))\n")
    ended = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert ended.stdout.split("\n")[0::2] == ["begun", ""]
