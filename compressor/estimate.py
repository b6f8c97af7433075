"""What a run would do and take, before it is started: a dry run, and whether the model fits into memory. Reads the model's
configuration, none of its weights."""

from __future__ import annotations

from pathlib import Path

import torch

from compressor import actions
from compressor.checks import checked, named
from compressor.errors import RecipeError
from compressor.latency import ANCHORS, CORRECTIONS
from compressor.measure import available_bytes
from compressor.plan import PARTS, Formats
from compressor.recipe import Recipe
from compressor.recovery.rollouts import cache_bytes, rows_at_once
from compressor.report import DryRun, SiteLine, StageEstimate
from compressor.runtimes import runtime
from compressor.student import Decoder
from eval.timing import time_call

EFFICIENCY = 0.6
"""Share of a plain matrix product's speed that a whole forward pass reaches."""

TOKEN_BY_TOKEN = 0.4
"""Share of that speed when a batch of texts is written, a token of each at a time."""

SECONDS_PER_ENTRY = 2.5
"""A latency-table entry: two stacks, opened and timed three to six times."""

SECONDS_PER_WHOLE = 10.0
"""A whole model, timed in five rounds."""

QUANTIZE_FLOPS_PER_WEIGHT = 2e4
"""Work of GPTQ on one weight, as products of the same speed."""


LIBRARIES_BYTES = 400_000_000
"""Memory of a run without any model: torch, transformers, ONNX Runtime, a tokenizer."""


def dry_run(recipe: Recipe | str | Path, trust_remote_code: bool = False) -> DryRun:
    """Sites, actions, sizes, and roughly the time and memory of every stage on this machine, of a recipe or the one in a YAML
    file.

    Raises:
        RuntimeTargetError, BudgetError, RecipeError: the run itself would end with that before any work.
    """
    recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    named(recipe)
    recipe, _, decoder = checked(recipe, trust_remote_code)
    layerwise = layer_by_layer(recipe, decoder)
    sites = decoder.sites()
    menu = actions.menu(recipe.search, sites)
    lines = []
    for site in sites:
        sizes = [site.size_bytes(action) for action in menu[site.name]]
        lines.append(SiteLine(site.name, site.kind, site.units, site.parameters, len(sizes), min(sizes), max(sizes)))
    where = runtime(recipe.target.runtime)
    fixed, reference, limit = where.fixed_bytes(decoder), where.fp32_bytes(decoder), recipe.budget.bytes
    return DryRun(
        model=recipe.model.path,
        sites=tuple(lines),
        bytes_largest=fixed + sum(line.largest_bytes for line in lines),
        bytes_smallest=fixed + sum(line.smallest_bytes for line in lines),
        bytes_budget=limit.resolve(reference) if limit else None,
        stages=tuple(_estimates(recipe, decoder, menu, layerwise)),
        layerwise=layerwise,
    )


def layer_by_layer(recipe: Recipe, decoder: Decoder) -> bool:
    """Whether the recipe's model is compressed layer by layer: as it says, or where memory, a GPU's if there is one, is too
    short for all of it.

    Raises:
        RecipeError: the recipe has what takes the whole model.
    """
    asked = recipe.model.layerwise
    if asked is False or (asked == "auto" and recipe.model.gguf):
        return False
    stages, free = memory(recipe, decoder, False), available_bytes()
    if torch.cuda.is_available():  # the teacher goes there
        free = min(free, torch.cuda.mem_get_info()[0])
    needed = LIBRARIES_BYTES + max(size for stage, size in stages.items() if stage != "distill")
    if asked == "auto" and needed <= free:
        return False
    budget, gate = recipe.budget, recipe.gate
    wholes: dict[str, object] = {
        f"distill.steps = {recipe.distill.steps}": recipe.distill.steps,
        "generated, in data.calibration": recipe.data.generated_windows,
        "target.runtime = torch": recipe.target.runtime == "torch",
        "an encoder-decoder": decoder.encoder,
        "gate.baseline with gate.times": gate.baseline and gate.times,
        "gate.memory as a share of the fp32 export's": gate.memory and gate.memory.relative,
    }
    for name in ("prefill", "decode"):
        for section, limit in (("budget", getattr(budget, name)), ("gate", getattr(gate, name))):
            wholes[f"{section}.{name} as a share of the fp32 export's"] = limit and limit.relative
    for key, given in wholes.items():
        if given:
            raise RecipeError(
                f"{key}: expected none with model.layerwise = {asked}, as it takes the whole model: some {needed / 1e9:.1f} "
                f"GB of memory, {free / 1e9:.1f} GB are free; leave it out (distill.reconstruct may stay, and times in ms), "
                "or set model.layerwise: false on a machine with more memory"
            )
    return True


def memory(recipe: Recipe, decoder: Decoder, layerwise: bool) -> dict[str, int]:
    """Roughly the bytes that every stage takes beside the libraries: of the whole model, or layer by layer."""
    sub_layers = decoder.every_sub_layer().values()
    tables = sum(4 * site.parameters for site in decoder.sites() if site.layer is None)
    block = max(sum(4 * site.parameters for site in sites) for sites in sub_layers)
    moments = max(4 * sum(m.columns**2 for s in sites for m in (s.matrices[0], s.matrices[-1])) for sites in sub_layers)
    weights = 4 * sum(site.parameters for site in decoder.sites())
    data, distill = recipe.data, recipe.distill
    streams = 4 * decoder.hidden * (distill.tokens or data.calibration_tokens)
    predictions = recipe.search.tokens // (data.sequence_length if decoder.classes else 1)
    outputs = data.anchors if decoder.pooling else decoder.outputs
    reference = 4 * predictions * (decoder.hidden if layerwise else outputs)
    logits = 4 * 4 * (1 if decoder.classes else data.sequence_length) * outputs
    teacher, student = (0, tables + block) if layerwise else (weights, weights)
    deployed = student if layerwise else 2 * runtime(recipe.target.runtime).fp32_bytes(decoder)
    written = rows_at_once(decoder, data.sequence_length) if data.generated_windows else 0
    caches = written * cache_bytes(decoder, data.sequence_length)
    return {
        "generate": teacher + 2 * caches if written else 0,
        "statistics": teacher + block + max(moments + streams, logits),
        "sensitivity": teacher + 2 * block + 3 * moments,
        "latency": teacher + (16 * block if layerwise else deployed),
        "search": teacher + student + reference,
        "reconstruct": teacher + tables + 2 * block + 3 * moments + 3 * streams if distill.reconstruct else 0,
        "distill": 6 * weights if distill.steps else 0,
        "export and measure": teacher + deployed,
    }


def _estimates(recipe: Recipe, decoder: Decoder, menu, layerwise: bool) -> list[StageEstimate]:
    sites, search, data = decoder.sites(), recipe.search, recipe.data
    parameters = sum(site.parameters for site in sites)
    read = sum(site.parameters * site.share for site in sites)
    table = decoder.vocabulary * decoder.hidden
    speed = EFFICIENCY * measured_flops()

    def forward(tokens: int) -> float:
        return 2 * tokens * (read - (0 if decoder.tied else table)) / speed

    shapes = {
        (*(matrix.shape(a.keep, s.units) for matrix in s.matrices), a.format) for s in sites for a in menu[s.name]
    }
    formats = {format for name in search.formats for format in Formats.parse(name).each}
    quantized = sum(format.kind == "blockwise" for format in formats)
    making = quantized * QUANTIZE_FLOPS_PER_WEIGHT * parameters / speed
    noise = len(sites) * forward(search.tokens) / PARTS if search.sensitivity == "noise" else 0.0
    distill = recipe.distill
    tried = distill.compared if distill.compared > 1 else 0
    steps = distill.steps + tried * min(distill.finalist_steps, distill.steps)
    asked = distill.steps if distill.top_k else steps  # steps' text that the teacher runs over
    fits = max(1, tried) * distill.reconstruct
    fitting = (
        4 * forward(distill.tokens or data.calibration_tokens)
        + 2 * forward(search.tokens)
        + QUANTIZE_FLOPS_PER_WEIGHT * parameters / speed
    )
    timed = recipe.budget.prefill or recipe.budget.decode
    searched = CORRECTIONS[0] + 1 if timed else 0  # mostly one is enough behind the search
    wholes = ANCHORS + 1 + 2 * searched  # each of these beside another model
    seconds = {
        "generate": forward(data.generated_windows * data.sequence_length) / TOKEN_BY_TOKEN,
        "statistics": forward(data.calibration_tokens) + 4 * forward(search.tokens),
        "sensitivity": making + noise,
        "latency": SECONDS_PER_ENTRY * len(shapes) + SECONDS_PER_WHOLE * wholes,
        "search": 1.1 * len(search.searches) * search.evaluations * forward(search.tokens) + making,
        "reconstruct": fits * fitting,
        "distill": (6 * steps + asked) * forward(distill.batch_tokens),
        "export and measure": 4 * forward(data.evaluation_tokens) + 60,
    }
    return [StageEstimate(stage, seconds[stage], size) for stage, size in memory(recipe, decoder, layerwise).items()]


def measured_flops() -> float:
    """Floating-point operations a second of a square matrix product where torch will work."""
    device, size = ("cuda", 4096) if torch.cuda.is_available() else ("cpu", 768)
    a = torch.randn(size, size, device=device)
    ms = time_call(lambda: float((a @ a)[0, 0]), repeats=5)  # a number, so it waits for a GPU
    return 2 * size**3 / ms * 1e3
