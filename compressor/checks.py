"""What of a recipe can be refused before any weight is read: what it names, what its target runs, what suits the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from compressor import actions
from compressor.errors import BudgetError, RecipeError, RuntimeTargetError
from compressor.gate import read_report
from compressor.measure import Target
from compressor.model import read_decoder
from compressor.recipe import Recipe
from compressor.recovery.reward import Reward, check_rewards
from compressor.report import Report, size
from compressor.runtimes import runtime
from compressor.student import Decoder


def named(recipe: Recipe, rewards: Mapping[str, Reward] = MappingProxyType({})) -> Report | None:
    """The gate's baseline, if there is one, once all that the recipe names is there; rewards: the caller's own.

    Raises:
        RecipeError: a file or a reward is not there.
        DataError: the baseline is no report.
    """
    recipe.check_files()
    if recipe.distill.method == "rl":
        check_rewards(recipe.distill.rl.rewards, rewards)
    return read_report(recipe.gate.baseline) if recipe.gate.baseline else None


def checked(recipe: Recipe, trust_remote_code: bool) -> tuple[Recipe, Target, Decoder]:
    """The recipe with the formats that its target runs, the target, and the shape of the model there.

    Raises:
        RuntimeTargetError: the target does not run a format that the recipe names, or none at all.
        ModelError: the model's configuration cannot be read, or it is not supported.
        RecipeError: the recipe asks of the model what only another kind does.
        BudgetError: even the smallest plan has more bytes than are budgeted.
    """
    target, model = Target.of(recipe.target), recipe.model
    recipe = _runnable(recipe, target)
    decoder = read_decoder(model.path, **model.weights, trust_remote_code=trust_remote_code)
    decoder = replace(decoder, precision=target.precision)
    _check_asked(recipe, decoder)
    _check_lengths(recipe, decoder)
    _check_bytes(recipe, decoder)
    return recipe, target, decoder


def _runnable(recipe: Recipe, target: Target) -> Recipe:
    search, left = recipe.search, {}
    for key, kind in (("formats", "ffn"), ("embedding_formats", "embedding")):
        formats = getattr(search, key)
        refused = runtime(target.runtime).refused_formats(kind, formats, target.device, target.precision)  # type: ignore[arg-type]
        left[key] = tuple(name for name in formats if name not in refused)
        if refused and (key in search.model_fields_set or not left[key]):
            raise RuntimeTargetError(
                f"{target.environment['runtime']} cannot run {', '.join(refused)} ({kind}) on {target.device} in "
                f"{target.precision}: take them out of search.{key}. It says: {next(iter(refused.values()))}"
            )
    return recipe.model_copy(update={"search": search.model_copy(update=left)})


def _check_asked(recipe: Recipe, decoder: Decoder) -> None:
    distill, budget, gate = recipe.distill, recipe.budget, recipe.gate
    method, in_torch = f"distill.method = {distill.method}", recipe.target.runtime == "torch"
    targets = [source.target for source in (*recipe.data.calibration, *recipe.data.evaluation) if source.target]
    generated = next((source for source in recipe.data.calibration if source.generated), None)
    alone = "a decoder alone, this one is an encoder-decoder"
    writes = "a model that writes, this one only reads"
    refused = [  # what the recipe says, whether it does and the model doesn't suit, what was expected
        (method, distill.own_text and decoder.encoder, alone),
        (f"distill.attention_weight = {distill.attention_weight}", distill.attention_weight and decoder.encoder, alone),
        ("target.runtime = torch", in_torch and decoder.encoder, alone),
        (method, distill.own_text and not decoder.causal, writes),
        (f"data.calibration: {generated}", generated and decoder.encoder, alone),
        (f"data.calibration: {generated}", generated and not decoder.causal, writes),
        ("budget.decode", budget.decode and not decoder.causal, writes),
        ("gate.decode", gate.decode and not decoder.causal, writes),
        ("target.runtime = torch", in_torch and decoder.pooling, "a model with a head, this one is an embedder"),
        ("gate.accuracy_ratio", gate.accuracy_ratio and not decoder.classes, "a classifier, this one is none"),
        (
            f"data: target = {targets[0] if targets else None}",
            targets and not decoder.encoder,
            "an encoder-decoder, which answers a text",
        ),
    ]
    for said, wrong, expected in refused:
        if wrong:
            raise RecipeError(f"{said}: expected {expected}; leave it out")


def _check_lengths(recipe: Recipe, decoder: Decoder) -> None:
    if (most := decoder.longest) is None:
        return
    workload, data, answer = recipe.target.workload, recipe.data, recipe.data.said_length
    lengths = {"target.workload.prefill": workload.prefill}
    if decoder.causal:
        lengths["target.workload.context + 1"] = workload.context + 1
    if decoder.encoder:
        lengths |= {
            "data.sequence_length less the answer's": data.sequence_length - answer,
            "data.target_length": answer,
        }
    else:
        lengths["data.sequence_length"] = data.sequence_length
    for key, length in lengths.items():
        if length > most:
            raise RecipeError(f"{key} = {length}: expected at most {most}, the positions that the model has; lower it")


def _check_bytes(recipe: Recipe, decoder: Decoder) -> None:
    if not recipe.budget.bytes:
        return
    where, sites = runtime(recipe.target.runtime), decoder.sites()
    menu = actions.menu(recipe.search, sites)
    smallest = where.fixed_bytes(decoder) + sum(min(map(site.size_bytes, menu[site.name])) for site in sites)
    whole = where.fp32_bytes(decoder)
    if (limit := recipe.budget.bytes.resolve(whole)) < smallest:
        raise BudgetError(
            f"budget.bytes = {size(limit)}: expected at least {size(smallest)}, what the smallest plan of this menu takes; "
            f"write 25% for a share of the {size(whole)} in fp32 and 25MB for megabytes, raise it, or offer smaller actions: "
            "fewer bits in search.formats and search.embedding_formats, lower fractions in search.ffn_keep"
        )
