"""Compresses a Transformer to a budget of bytes and latency. `compress recipe.yaml`, or from Python:

    from compressor import Recipe, compress, load

    report = compress(Recipe.load("recipe.yaml"), "runs/mine")
    student = load("runs/mine/onnx")

pipeline.py      the main job, stage by stage              plan.py         formats, sites, actions, plans, scores
recipe.py        what a run is asked for, checked          student.py      a decoder's shape and a student's weights
actions.py       from a recipe to every site's menu        quantize.py     formats as arithmetic: grids, GPTQ
text.py          windows of tokens                         prune.py        pruning as arithmetic: OBS
model.py         the one file that knows architectures     calibrate.py    what one look at the teacher tells
bank.py          variants, made once and kept              sensitivity.py  predicted KL of every action
executor.py      puts plans into the student, scores them  search.py       policies against the executor
ledger.py        every plan that was scored                reconstruct.py  recovery in closed form
export/          the one package that knows ONNX           folder.py       what is deployed, and back into torch
distill.py       recovery by training                      results.py      from measurements to the report
measure.py       exported students, timed and weighed      report.py       the page and the pictures
estimate.py      what a run would take                     cli.py          the command line
progress.py, files.py, stages.py, errors.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.folder import load
    from compressor.pipeline import compress
    from compressor.recipe import Recipe

__all__ = ["Recipe", "compress", "load"]

_HOMES = {"Recipe": "compressor.recipe", "compress": "compressor.pipeline", "load": "compressor.folder"}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: torch and transformers take seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module 'compressor' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
