"""What a run would do and take, before it is started: a dry run. Reads the model's configuration, none of its weights."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from compressor import actions
from compressor.measure import Target
from compressor.model import read_decoder
from compressor.plan import PARTS, Format
from compressor.recipe import Recipe
from compressor.report import DryRun, SiteLine, StageEstimate
from compressor.runtimes import runtime
from compressor.student import Decoder, full_plan

EFFICIENCY = 0.6
"""Share of a plain matrix product's speed that a whole forward pass reaches."""

SECONDS_PER_ENTRY = 1.0
"""A latency-table entry: two stacks, opened and timed."""

QUANTIZE_FLOPS_PER_WEIGHT = 2e4
"""Work of GPTQ on one weight, as products of the same speed."""


def dry_run(recipe: Recipe) -> DryRun:
    """Sites, actions, sizes, and roughly the time and memory of every stage on this machine."""
    model = recipe.model
    decoder = read_decoder(model.path, gguf=model.gguf, revision=model.revision)
    decoder = replace(decoder, precision=Target.of(recipe.target).precision)
    sites = decoder.sites()
    menu = actions.menu(recipe.search, sites)
    lines = []
    for site in sites:
        sizes = [site.size_bytes(action) for action in menu[site.name]]
        lines.append(SiteLine(site.name, site.kind, site.units, site.parameters, len(sizes), min(sizes), max(sizes)))
    fixed = runtime(recipe.target.runtime).fixed_bytes(decoder)
    fp32 = full_plan(decoder, "fp32", "fp32")
    fp32_bytes = fixed + sum(site.size_bytes(fp32[site.name]) for site in sites)
    limit = recipe.budget.bytes
    return DryRun(
        model=model.path,
        sites=tuple(lines),
        bytes_largest=fixed + sum(line.largest_bytes for line in lines),
        bytes_smallest=fixed + sum(line.smallest_bytes for line in lines),
        bytes_budget=limit.resolve(fp32_bytes) if limit else None,
        stages=tuple(_estimates(recipe, decoder, menu, fp32_bytes)),
    )


def _estimates(recipe: Recipe, decoder: Decoder, menu, fp32_bytes: int) -> list[StageEstimate]:
    sites, search, data = decoder.sites(), recipe.search, recipe.data
    parameters = sum(site.parameters for site in sites)
    table = decoder.vocabulary * decoder.hidden
    speed = EFFICIENCY * measured_flops()

    def forward(tokens: int) -> float:
        return 2 * tokens * (parameters - (0 if decoder.tied else table)) / speed

    weights = 4 * parameters
    moments = sum(4 * (3 * d.hidden**2 + d.channels**2) * d.layers for d in (decoder, decoder.encoder) if d)
    shapes = {
        (*(matrix.shape(a.keep, s.units) for matrix in s.matrices), a.format) for s in sites for a in menu[s.name]
    }
    quantized = sum(Format.parse(name).kind == "blockwise" for name in search.formats)
    making = quantized * QUANTIZE_FLOPS_PER_WEIGHT * parameters / speed
    probabilities = 4 * search.tokens * decoder.vocabulary
    noise = len(sites) * forward(search.tokens) / PARTS if search.sensitivity == "noise" else 0.0
    distill = recipe.distill
    tried = distill.compared if distill.compared > 1 else 0
    steps = distill.steps + tried * min(distill.finalist_steps, distill.steps)
    fits = max(1, tried) * distill.reconstruct
    fitting = (
        4 * forward(distill.tokens or data.calibration_tokens)
        + 2 * forward(search.tokens)
        + QUANTIZE_FLOPS_PER_WEIGHT * parameters / speed
    )
    return [
        StageEstimate("statistics", forward(data.calibration_tokens) + 3 * forward(search.tokens), weights + moments),
        StageEstimate("sensitivity", making + noise, weights + moments),
        StageEstimate("latency", SECONDS_PER_ENTRY * len(shapes) + 20, weights + 2 * fp32_bytes),
        StageEstimate(
            "search",
            1.1 * len(search.searches) * search.evaluations * forward(search.tokens) + making,
            2 * weights + moments + probabilities,
        ),
        StageEstimate("reconstruct", fits * fitting, 3 * weights + moments if fits else 0),
        StageEstimate("distill", 7 * steps * forward(recipe.distill.batch_tokens), 6 * weights if steps else 0),
        StageEstimate("export and measure", 4 * forward(data.evaluation_tokens) + 60, weights + 2 * fp32_bytes),
    ]


def measured_flops() -> float:
    """Floating-point operations a second of a square matrix product where torch will work, the best of five."""
    device, size = ("cuda", 4096) if torch.cuda.is_available() else ("cpu", 768)
    a = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        float((a @ a)[0, 0])  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
