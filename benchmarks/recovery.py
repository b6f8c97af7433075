"""Ways of recovery at equal compute: the plan of dynamic programming at one budget, recovered in several ways.

    python benchmarks/recovery.py recipes/benchmark-controllers.yaml runs/recovery --cell bits-3.0 --steps 24 --seeds 3

A way is what happens to the plan's variants: `reconstruct`, then `scales` or `weights`, which are trained for --steps
steps of --batch-tokens tokens towards the teacher's predictions, or `on_policy` or `rl`, which train scales on as many
tokens of the student's own text; with a rate, as `scales@3e-3`, it is the peak learning rate. `none` is the variants as
they are. The seed is that of all that a training draws. Everything is kept in OUT, so the same command goes on after a kill.

KL and perplexity are over the recipe's evaluation texts, which nothing saw before. `recovered`: share of what the variants
lose in log-perplexity against the teacher that the way brings back. A second table is about what the students write behind
prompts out of these texts, by the names of `compressor.recovery.rollouts.judged`.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from controllers import limits_of, quality  # the scripts beside this one
from seeds import spread
from torch import Tensor

from compressor import pipeline
from compressor.executor import Reference
from compressor.files import write_json_atomic
from compressor.latency import measure_latency
from compressor.network import Network, loaded
from compressor.progress import LineProgress
from compressor.recipe import Recipe
from compressor.recover import recover
from compressor.recovery.rollouts import judged, write
from compressor.report import number, table
from compressor.run import start
from compressor.stages import Stages
from compressor.text import prompts_of
from policies import POLICIES

WAYS = ["none", "reconstruct", "scales", *(f"reconstruct+{way}" for way in ("scales", "weights", "on_policy", "rl"))]
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 32, 32, 32
"""What the students continue at the end: so many prompts of so many tokens, by so many."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cell", default="bits-3.0", help="the budget, as in controllers.py")
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other keys of the recipe")
    options = parser.parse_args()
    training = [f"distill.steps={options.steps}", f"distill.batch_tokens={options.batch_tokens}", *options.set]
    recipe = Recipe.load(options.recipe, training)  # the text that is trained on is read with the others
    stages = Stages(options.out / "stages", LineProgress(sys.stderr))
    run = start(recipe, options.out, False, stages)
    sensitivity, latency = pipeline.find_sensitivities(run), measure_latency(run)
    problem = pipeline.pose(run, sensitivity, latency, limits_of(options.cell, run.teacher.network.decoder, latency))
    plan = POLICIES["dynamic_programming"](problem, 0).ask().plan

    texts = {name: Reference(run.teacher.network, text_NL) for name, text_NL in run.texts.evaluation.items()}
    prompts = prompts_of(run.texts.evaluation_NL, PROMPT_TOKENS, NEW_TOKENS)
    prompts = prompts[:: len(prompts) // PROMPTS][:PROMPTS]
    teacher, of_teacher = (
        quality(run.teacher.network, texts),
        written(run.teacher.network, run.teacher.network, prompts),
    )
    lost: dict[str, float] = {}
    rows, results = [], {}
    own_rows = [["teacher", *(number(value) for value in of_teacher.values())]]
    for way in ["none", *(way for way in options.ways if way != "none")]:
        found, own, seconds = [], [], []
        trained = way.removeprefix("reconstruct").removeprefix("+").removeprefix("none")
        for seed in range(options.seeds if trained else 1):
            distill = {**recipe.to_dict()["distill"], "reconstruct": way.startswith("reconstruct"), "seed": seed}
            if trained:
                name, _, rate = trained.partition("@")
                distill |= {"train": name} if name in ("scales", "weights") else {"method": name}
                distill |= {"learning_rate": float(rate)} if rate else {}
            ours = replace(run, recipe=Recipe.from_dict({**recipe.to_dict(), "distill": distill}))
            stages.seconds.clear()
            recovery = recover(ours, plan, options.steps if trained else 0, f"{options.cell}-{way}-{seed}")
            seconds.append(sum(stages.seconds.values()))
            network = loaded(run.teacher.network, recovery.student)
            found.append(quality(network, texts))
            own.append(written(run.teacher.network, network, prompts))
        if way == "none":
            lost = {text: np.log(found[0][text][1] / teacher[text][1]) for text in texts}
        cells = [way, spread(seconds)]
        for text in texts:
            back = [1 - np.log(f[text][1] / teacher[text][1]) / lost[text] for f in found]
            cells += [spread([f[text][0] for f in found]), spread([f[text][1] for f in found]), f"{np.mean(back):.0%}"]
        rows.append(cells)
        own_rows.append([way, *(spread([o[name] for o in own]) for name in of_teacher)])
        results[way] = [{"texts": f, "written": o} for f, o in zip(found, own)]
        write_json_atomic(options.out / f"recovery-{options.cell}.json", {"teacher": teacher, "ways": results})
    told = ", ".join(f"{text} {perplexity:.2f}" for text, (_, perplexity) in teacher.items())
    print(
        f"\n**{options.cell}**, {options.steps} steps of {options.batch_tokens} tokens; the teacher's perplexity: {told}\n"
    )
    heads = [f"{figure}, {text}" for text in texts for figure in ("KL", "perplexity", "recovered")]
    print(table(["way", "seconds", *heads], rows))
    print(f"\nWritten behind {PROMPTS} prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} tokens each:\n")
    print(table(["way", *(name.replace("_", " ") for name in of_teacher)], own_rows))


def written(teacher: Network, network: Network, prompts: list[Tensor]) -> dict[str, float]:
    """What a network writes behind the prompts, judged by the teacher."""
    return judged(teacher, network, write(network, prompts, NEW_TOKENS, seed=0, ends=teacher.ends()))


if __name__ == "__main__":
    main()
