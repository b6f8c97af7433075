"""Compresses a Transformer to a budget of bytes and latency. `compress recipe.yaml`, or from Python:

    from compressor import Recipe, compress, load

    report = compress(Recipe.load("recipe.yaml"), "runs/mine")
    report.check(baseline="runs/last")                 # RegressionError, with a table of what got worse
    student = load("runs/mine/onnx")

pipeline.py      the main job, stage by stage              plan.py         formats, sites, actions, plans, scores
run.py           what its stages share                     recover.py      from the best plans to the student
recipe.py        what a run is asked for, checked          student.py      a decoder's shape and a student's weights
actions.py       from a recipe to every site's menu        quantize.py     formats as arithmetic: grids, GPTQ
text.py          windows of tokens, prompts                prune.py        pruning as arithmetic: OBS
families.py      the one file that knows architectures     calibrate.py    what one look at the teacher tells
model.py         the teacher, loaded                       network.py      a model in torch, site by site
bank.py          variants, made once and kept              sensitivity.py  predicted KL of every action
executor.py      puts plans into the student, scores them  search.py       policies against the executor
ledger.py        every plan that was scored                recovery/       what brings a student back to its teacher
export/          the one package that knows ONNX           torch_runtime.py  students in torch, with bitsandbytes
runtimes.py      these two behind the same functions       folder.py       what is deployed, and back into torch
latency.py       what plans take in time                   measure.py      exported students, timed and weighed
results.py       from measurements to the report           reference.py    every key of a recipe, as a page
report.py        what a run found                          page.py         the page and the card
pictures.py      the plots                                 gate.py         limits, and an earlier report
checks.py        what is refused before the work           estimate.py     what a run would take
cli.py           the command line
transformer.py   the modules of all models in torch         pytest_plugin.py, progress.py, files.py, stages.py, errors.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.errors import (
        BankError,
        BudgetError,
        ComparisonError,
        CompressorError,
        DataError,
        ModelError,
        RecipeError,
        RegressionError,
        RuntimeTargetError,
    )
    from compressor.estimate import dry_run
    from compressor.folder import load
    from compressor.gate import compare
    from compressor.pipeline import compress
    from compressor.recipe import Recipe
    from compressor.report import Report

__all__ = [
    "BankError",
    "BudgetError",
    "ComparisonError",
    "CompressorError",
    "DataError",
    "ModelError",
    "Recipe",
    "RecipeError",
    "RegressionError",
    "Report",
    "RuntimeTargetError",
    "compare",
    "compress",
    "dry_run",
    "load",
]

_HOMES = {
    "Recipe": "compressor.recipe",
    "Report": "compressor.report",
    "compare": "compressor.gate",
    "compress": "compressor.pipeline",
    "dry_run": "compressor.estimate",
    "load": "compressor.folder",
}
"""Where public names are; those of errors are in `compressor.errors`."""


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: torch and transformers take seconds."""
    import importlib
    from importlib.metadata import version

    if name == "__version__":
        return version("model-compressor")
    if name not in __all__:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES.get(name, "compressor.errors")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__, "__version__"]
