"""Everything that this toolkit raises on purpose.

CompressorError          a run could not go on; the message says what was expected, what arrived and what to change
├── RecipeError          the recipe is wrong (exit code 2)
├── ModelError           the model cannot be loaded, or its architecture is not supported
├── DataError            a text cannot be read, or is too short for what was asked of it
├── BudgetError          no plan fits the budget
├── BankError            a stored variant or intermediate is missing, truncated or altered
├── RuntimeTargetError   the target's runtime or execution provider is not what was asked for
├── ComparisonError      two reports measured different things
└── RegressionError      the result misses the gate (exit code 3)
"""

from __future__ import annotations

from typing import Any


class CompressorError(Exception):
    """Base of every error that is meant for the user: one message, no traceback on the command line."""

    exit_code = 1


class RecipeError(CompressorError):
    """The recipe is wrong: unknown key, bad value, or values that contradict one another."""

    exit_code = 2


class ModelError(CompressorError):
    """The model cannot be loaded, or nothing here knows its architecture."""


class DataError(CompressorError):
    """A text or data set cannot be read, or holds fewer tokens than were asked for."""


class BudgetError(CompressorError):
    """No plan over the given actions fits the budget."""


class BankError(CompressorError):
    """A file of the bank or of a finished stage is missing, truncated or altered."""


class RuntimeTargetError(CompressorError):
    """The runtime or the execution provider that ran is not the one that was asked for."""


class ComparisonError(CompressorError):
    """Two reports measured different things, or one lacks a figure."""


class RegressionError(CompressorError):
    """The finished model misses the gate. missed: the lines of the report that did; report: all that was measured."""

    exit_code = 3

    def __init__(self, message: str, missed: tuple = (), report: Any = None):
        super().__init__(message)
        self.missed, self.report = missed, report


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was too short: torch says so on a GPU with a class of its own, on a CPU with a RuntimeError."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )
