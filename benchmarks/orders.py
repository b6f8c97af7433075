"""In which order to prune, quantize and distill: one plan, the same number of training steps.

    python benchmarks/orders.py recipes/benchmark-controllers.yaml runs/orders --cell bits-3.0 --steps 16 --seeds 3

    PQD     pruned and quantized at once, reconstructed, then its scales trained: what a run does
    PQD/w   the same, its weights trained on their grids
    PDQ     pruned and reconstructed in floats, its weights trained; then quantized, what that loses fitted block by block
    PDQD    the same with half of the steps; the other half trains the scales

The plan is that of dynamic programming. KL and perplexity are over the recipe's evaluation texts, which nothing saw before.
Trainings are kept in OUT, so the same command goes on after a kill.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from controllers import limits_of, quality  # the scripts beside this one
from seeds import spread
from torch import Tensor

from compressor import pipeline
from compressor.bank import Bank
from compressor.executor import Reference
from compressor.latency import measure_latency
from compressor.network import loaded
from compressor.plan import Action, Plan, Site
from compressor.progress import LineProgress
from compressor.quantize import Weight
from compressor.recipe import Recipe
from compressor.recovery import distill
from compressor.recovery.reconstruct import reconstruct
from compressor.recovery.trained import LEARNING_RATES, Train
from compressor.report import number, table
from compressor.run import start
from compressor.stages import Stages, key_of
from compressor.student import Student
from policies import POLICIES


class Trained(Bank):
    """A bank whose pruned weights and gains are those of a trained student; its fits are kept in memory."""

    def __init__(self, bank: Bank, student: Student):
        vars(self).update(vars(bank))
        self._given = student
        self._fits: dict[str, dict[str, Weight]] = {}
        gained = bank.teacher.copy()
        for name, vector in student.vectors.items():
            gained.replace_vector(name, vector)
        self.teacher = bank.teacher.copy()
        self.teacher.copy = gained.copy  # type: ignore[method-assign] # what students begin as

    def pruned(self, site: Site, keep: int) -> dict[str, Tensor]:
        return {matrix.name: self._given.matrices[matrix.name].dequantize() for matrix in site.matrices}

    def has_fit(self, name: str, site: Site) -> bool:
        return site.name in self._fits

    def fit(self, name: str, site: Site, action: Action) -> dict[str, Weight] | None:
        return self._fits.get(site.name)

    def store_fit(self, name: str, site: Site, weights: Mapping[str, Weight]) -> None:
        self._fits[site.name] = dict(weights)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cell", default="bits-3.0", help="the budget, as in controllers.py")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    training = [f"distill.steps={options.steps}", f"distill.batch_tokens={options.batch_tokens}"]
    recipe = Recipe.load(options.recipe, training)  # the text that is trained on is read with the others
    run = start(recipe, options.out, False, Stages(options.out / "stages", LineProgress(sys.stderr)))
    sensitivity, latency = pipeline.find_sensitivities(run), measure_latency(run)
    teacher = run.teacher.network
    problem = pipeline.pose(run, sensitivity, latency, limits_of(options.cell, teacher.decoder, latency))
    plan = POLICIES["dynamic_programming"](problem, 0).ask().plan
    floats = Plan(tuple((n, a if teacher.sites[n].layer is None else Action(a.keep, "fp32")) for n, a in plan.items()))
    fitted_NL = run.texts.fitted_NL
    texts = {name: Reference(teacher, text_NL) for name, text_NL in run.texts.evaluation.items()}

    def kept(name: str, key: str, make: Callable[..., Student]) -> Student:
        return run.stages.student(name, key, teacher.decoder, lambda report: (make(report), None))[0]

    def trained(given: Callable[[], Student], name: str, train: Train, steps: int, seed: int) -> Student:
        settings = distill.Settings(steps, train, LEARNING_RATES[train], warmup=min(5, steps // 4), seed=seed)
        imitation = lambda network: distill.Imitation(teacher, network, run.texts.trained_NL, seed=seed)  # noqa: E731

        def make(report_progress) -> Student:
            part = options.out / "stages" / f"{name}-{seed}.part"
            better, _ = distill.distill(
                teacher, given(), imitation, run.texts.held_out_NL, settings, part, report_progress
            )
            return better

        return kept(f"{name}-{seed}", key_of(run.bank.key, plan.digest, settings.to_dict()), make)

    def pdq(name: str, steps: int, seed: int) -> Student:
        better = trained(lambda: reconstruct(run.bank, floats, fitted_NL), name, "weights", steps, seed)

        def make(report_progress) -> Student:
            student = reconstruct(Trained(run.bank, better), plan, fitted_NL, report_progress)
            return replace(student, vectors=better.vectors)

        return kept(f"{name}-quantized-{seed}", key_of(run.bank.key, plan.digest, steps), make)

    half = options.steps // 2
    rebuilt = reconstruct(run.bank, plan, fitted_NL)
    orders = {
        "PQD": lambda seed: trained(lambda: rebuilt, "pqd", "scales", options.steps, seed),
        "PQD/w": lambda seed: trained(lambda: rebuilt, "pqd-w", "weights", options.steps, seed),
        "PDQ": lambda seed: pdq("pdq", options.steps, seed),
        "PDQD": lambda seed: trained(lambda: pdq("pdqd-1", half, seed), "pdqd-2", "scales", options.steps - half, seed),
    }
    found = {"not trained": [quality(loaded(teacher, rebuilt), texts)]}
    for name, order in orders.items():
        found[name] = [quality(loaded(teacher, order(seed)), texts) for seed in range(options.seeds)]
    of_teacher = ", ".join(f"{text} {number(ppl)}" for text, (_, ppl) in quality(teacher, texts).items())
    print(
        f"\n{options.cell}, {options.steps} steps of {options.batch_tokens} tokens; the teacher's perplexity: {of_teacher}\n"
    )
    rows = [
        [name, *(spread([by_seed[text][i] for by_seed in told]) for text in texts for i in (0, 1))]
        for name, told in found.items()
    ]
    print(table(["order", *(f"{figure}, {text}" for text in texts for figure in ("KL", "perplexity"))], rows))


if __name__ == "__main__":
    main()
