"""What a student imitates of its teacher, at equal steps: one plan and one order of the windows a seed, several losses.

    python benchmarks/imitation.py recipes/benchmark-25.yaml runs/imitation --ways kd top_8 top_32 sampled_32 --seeds 3

The plan: attentions in 4 bits, feed-forwards in 2, the table in 8; its variants as they are. A way is

    kd              KL over the vocabulary, the teacher beside the student
    top_K           the cache of `distill.top_k`: K tokens and all others as one
    alone_K         K tokens alone, their probabilities scaled to 1: what top_K would be without the others
    sampled_K       K draws from the teacher at every position, an unbiased target (Anshumann et al. 2025, "Sparse Logit
                    Sampling")
    attention_W     kd, and `distill.attention_weight` W

Told: KL on held-out text before and after; bytes on disk a token of text; what float16 loses, KL(float32 || float16) of the
K + 1 outcomes. `--time ROUNDS` times one step of every way in turn instead, after a step that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from seeds import spread  # the script beside this one
from torch import Tensor
from torch.nn.functional import kl_div

from compressor.files import write_json_atomic
from compressor.network import Network, loaded
from compressor.plan import Plan
from compressor.progress import LineProgress
from compressor.recipe import Recipe
from compressor.recovery.cache import TeacherCache, outcomes
from compressor.recovery.distill import Curve, Imitation, Settings, distill, visited
from compressor.recovery.trained import LEARNING_RATES, Trained
from compressor.report import table
from compressor.run import start
from compressor.stages import Stages, key_of
from compressor.student import Student, full_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ways", nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--time", type=int, default=0, metavar="ROUNDS")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other keys of the recipe")
    options = parser.parse_args()
    training = [f"distill.steps={options.steps}", f"distill.batch_tokens={options.batch_tokens}", *options.set]
    recipe = Recipe.load(options.recipe, training)
    stages = Stages(options.out / "stages", LineProgress(sys.stderr))
    run = start(recipe, options.out, False, stages)
    teacher, text_NL = run.teacher.network, run.texts.trained_NL
    mixed = {"attention": "w4", "ffn": "w2", "embedding": "w8", "head": "w8"}
    plans = {fmt: full_plan(teacher.decoder, fmt, "w8") for fmt in set(mixed.values())}
    plan = Plan(tuple((name, plans[mixed[site.kind]][name]) for name, site in teacher.sites.items()))
    student = run.bank.realize(plan)

    def cache(k: int, seed: int) -> TeacherCache:
        visits = min(options.steps * recipe.batch_windows, len(text_NL))
        windows = sorted({visited(len(text_NL), n, seed) for n in range(visits)})
        made = TeacherCache(options.out / f"top-{k}", run.bank.key, text_NL, windows, k)
        with stages.timed(f"cache-{k}"):
            made.make(teacher, recipe.micro_batch_windows)
        return made

    def objective(way: str, seed: int, network: Network) -> Imitation:
        name, _, number = way.partition("_")
        told: dict[str, Callable[[], Any]] = {
            "top": lambda: cache(int(number), seed),
            "alone": lambda: Alone(teacher, text_NL, int(number)),
            "sampled": lambda: Sampled(teacher, text_NL, int(number)),
        }
        return Imitation(
            teacher,
            network,
            text_NL,
            windows=recipe.batch_windows,
            together=recipe.micro_batch_windows,
            attention_weight=float(number) if name == "attention" else 0.0,
            seed=seed,
            cache=told[name]() if name in told else None,
        )

    if options.time:
        networks = {way: Trained(loaded(teacher, student), student, "scales").network for way in options.ways}
        times = timed({way: objective(way, 0, network) for way, network in networks.items()}, options.time)
        first = options.ways[0]
        print(table(["way", "seconds a step", f"of {first}"], [
            [way, f"{np.median(t):.2f} ({min(t):.2f} to {max(t):.2f})", f"{np.median(np.divide(t, times[first])):.0%}"]
            for way, t in times.items()
        ]))  # fmt: skip
        return

    settings = Settings(
        options.steps,
        learning_rate=LEARNING_RATES["scales"],
        warmup=recipe.distill.warmup,
        check_every=options.steps,
    )
    rows, found = [], {}
    for way in options.ways:
        curves = []
        for seed in range(options.seeds):
            key = key_of(run.bank.key, plan.digest, options.steps, recipe.batch_windows, way, seed)
            part = options.out / f"{key}.part"
            aim = partial(objective, way, seed)
            report = stages.reporter(f"{way}, seed {seed}")
            train = partial(distill, teacher, student, aim, run.texts.held_out_NL, settings, part, report)
            told = stages.value(f"{way}-{seed}", key, partial(curve_of, train))
            curves.append([kls["kl"] for _, kls in told["held_out"]])
        row = [way, spread([before for before, _ in curves]), spread([after for _, after in curves])]
        row += on_disk(cache(int(way[4:]), 0), teacher, text_NL) if way.startswith("top_") else ["–", "–"]
        rows.append(row)
        found[way] = curves
        write_json_atomic(options.out / "imitation.json", found)
        print(json.dumps(row), file=sys.stderr)
    print(f"\n{options.steps} steps of {options.batch_tokens} tokens, {options.seeds} seeds\n")
    print(table(["way", "KL before", "KL after", "bytes a token", "lost to float16"], rows))


class Alone:
    """In the place of a cache: the K likeliest tokens alone."""

    def __init__(self, teacher: Network, text_NL: Tensor, k: int):
        self.teacher, self.text_NL, self.k = teacher, text_NL, k

    def kl(self, windows: list[int], logits_TV: Tensor) -> Tensor:
        with torch.no_grad():
            z_TV = self.teacher.logits(self.teacher.hidden(self.text_NL[windows]).flatten(0, 1))
            weight_TK, ids_TK = self.target(torch.softmax(z_TV, -1), windows)
        log_q_TK = torch.log_softmax(logits_TV, -1).gather(-1, ids_TK)
        return (torch.xlogy(weight_TK, weight_TK) - weight_TK * log_q_TK).sum() / len(log_q_TK)

    def target(self, p_TV: Tensor, windows: list[int]) -> tuple[Tensor, Tensor]:
        """(weights that sum to 1, tokens), [T, K] each."""
        p_TK, ids_TK = p_TV.topk(self.k)
        return p_TK / p_TK.sum(-1, keepdim=True), ids_TK


class Sampled(Alone):
    """K draws, always the same of a window."""

    def target(self, p_TV: Tensor, windows: list[int]) -> tuple[Tensor, Tensor]:
        torch.manual_seed(windows[0])
        ids_TK = torch.multinomial(p_TV, self.k, replacement=True)
        return torch.full(ids_TK.shape, 1 / self.k), ids_TK


def curve_of(train: Callable[[], tuple[Student, Curve]], _: object) -> dict:
    return train()[1].to_dict()


def on_disk(cache: TeacherCache, teacher: Network, text_NL: Tensor) -> list[str]:
    """Bytes a token; KL that rounding to float16 makes, in nats per token of one window."""
    size = sum(path.stat().st_size for path in cache._files)
    window, (ids_PK, half_PK) = next(iter(cache._places)), cache._read(next(iter(cache._places)))
    with torch.no_grad():
        exact_PK = outcomes(teacher.logits(teacher.hidden(text_NL[[window]])[0]), ids_PK.long()).double()
    rounded_PK = torch.log_softmax(half_PK.double(), -1)
    lost = float(kl_div(rounded_PK, exact_PK, reduction="batchmean", log_target=True))
    return [f"{size / (len(cache._places) * text_NL.shape[1]):.0f}", f"{lost:.1e}"]


def timed(objectives: dict[str, Imitation], rounds: int) -> dict[str, list[float]]:
    """Seconds of one step of each, in turn."""
    times: dict[str, list[float]] = {way: [] for way in objectives}
    for step in range(rounds + 1):
        for way, objective in objectives.items():
            start = time.perf_counter()
            list(objective.updates(step))
            if step:
                times[way].append(time.perf_counter() - start)
    return times


if __name__ == "__main__":
    main()
