"""Policies against one another on the real model: the same budget, the same number of evaluations, several seeds.

    python benchmarks/controllers.py recipes/benchmark-25.yaml runs/controllers --cells bits-3.0 bits-2.5 --evaluations 24

A cell is a budget: `bits-3.0` (bytes of 3.0 bits for every weight of the teacher, a tied table once), `prefill-0.6` and
`decode-0.5` (share of the fp32 export's time), or several joined by `+`. Model, texts, menu and the tokens that score come
from the recipe, its budget, policies and seed do not. Everything is kept in OUT, so the same command goes on after a kill.
Prints a table for each cell; writes OUT/controllers.json (best KL after every evaluation) and OUT/{cell}.png.

Beside the policies: `dynamic_programming/noise` is told sensitivities from noise on the weights (HIGGS), all others those of
Fisher; `actor_critic/memory` starts from the memory of actor_critic's search in the cell before, same seed, or from that in
--memory (a run's policy.safetensors); `actor_critic/scores` is told all scores of that search. Not in the first cell.

The last columns score the best plan of every search on texts that no search saw, as its variants are; with --recover its
student after reconstruction, too. `same actions`: sites on which the best
plans of two seeds agree, mean over the pairs. `to beat` is the evaluation after which the searches of a policy (median of
the seeds) were better than the final mean of the best rival of the actor-critic.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import cache
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import matplotlib
import numpy as np
from seeds import agreement, spread  # the script beside this one

from compressor import pipeline
from compressor.executor import Reference
from compressor.files import write_json_atomic
from compressor.latency import Latency, measure_latency
from compressor.ledger import Ledger
from compressor.network import Network, loaded
from compressor.plan import Plan, menu_json
from compressor.progress import LineProgress
from compressor.recipe import Recipe
from compressor.recovery.reconstruct import reconstruct
from compressor.run import start
from compressor.search import Scorer, Trials, best, run_policy, spent
from compressor.stages import Stages, key_of
from policies import POLICIES, Policy, Problem
from policies.actor_critic import ActorCritic, Memory

matplotlib.use("Agg")
from matplotlib import pyplot

OURS = "actor_critic"
CELLS = ["bits-4.0", "bits-3.0", "bits-2.5", "prefill-0.4", "decode-0.3", "bits-3.0+prefill-0.5"]
VARIANTS = [*POLICIES, "dynamic_programming/noise", f"{OURS}/memory", f"{OURS}/scores"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--policies", nargs="+", choices=VARIANTS, default=VARIANTS[:-2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=16)
    parser.add_argument("--memory", type=Path)
    parser.add_argument("--recover", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other keys of the recipe")
    options = parser.parse_args()
    progress = LineProgress(sys.stderr)
    recipe = Recipe.load(options.recipe, options.set)
    run = start(recipe, options.out, False, Stages(options.out / "stages", progress))
    latency = measure_latency(run)
    ways = ["fisher", *(["noise"] if any(name.endswith("/noise") for name in options.policies) else [])]
    sensitivity = {way: pipeline.find_sensitivities(run, way) for way in ways}
    teacher, decoder = run.teacher.network, run.teacher.network.decoder
    unseen = {
        name: Reference(teacher, text_NL[: len(run.texts.held_out_NL)])
        for name, text_NL in run.texts.evaluation.items()
    }

    @cache
    def judged(plan: Plan) -> dict[str, tuple[float, float]]:
        found = quality(loaded(teacher, run.bank.realize(plan)), unseen)
        if options.recover:
            report = run.stages.reporter(f"reconstructing {plan.digest[:6]}")
            fitted = loaded(teacher, reconstruct(run.bank, plan, run.texts.fitted_NL, report))
            found |= {f"{text}, reconstructed": told for text, told in quality(fitted, unseen).items()}
        return found

    scorer = Scorer(run.executor.score)
    results = {}
    before: dict[int, tuple[Problem, Trials]] = {}
    for cell in options.cells:
        limits = limits_of(cell, decoder, latency)
        problems = {way: pipeline.pose(run, found, latency, limits) for way, found in sensitivity.items()}
        key = key_of(run.bank.key, limits, menu_json(run.menu))
        curves: dict[str, list[list[float]]] = {}
        final: dict[str, list[dict[str, tuple[float, float]]]] = {}
        plans: dict[str, list[Plan]] = {}
        after: dict[int, tuple[Problem, Trials]] = {}
        for name in options.policies:
            if not before and (name.endswith("/scores") or (name.endswith("/memory") and not options.memory)):
                continue  # nothing to start from in the first cell
            curves[name], final[name], plans[name] = [], [], []
            for seed in range(options.seeds):
                given = f"-{options.memory.parent.name}" if options.memory and name.endswith("/memory") else ""
                study = f"{cell}-{name}-{seed}-{key}{given}"
                ledger = Ledger(options.out / "ledger.log", study, run.menu, run.comparable)
                report = run.stages.reporter(f"{cell}: {name}, seed {seed}")
                policy, earlier = make_policy(name, seed, problems, before.get(seed), options.memory)
                trials = run_policy(policy, options.evaluations, scorer, ledger, report, earlier)
                curves[name].append(curve(trials, options.evaluations))
                plans[name].append(best(trials)[0])
                final[name].append(judged(plans[name][-1]))
                if name == OURS:
                    after[seed] = problems["fisher"], trials
        before = after
        stable = {name: agreement(found) for name, found in plans.items()}
        results[cell] = {
            "limits": limits,
            "curves": curves,
            "agreement": stable,
            "unseen": final,
        }
        print(table(cell, limits, curves, final, stable), flush=True)
        draw(cell, curves, options.out / f"{cell}.png")
        write_json_atomic(options.out / "controllers.json", results)


def make_policy(
    name: str, seed: int, problems: dict[str, Problem], before: tuple[Problem, Trials] | None, memory: Path | None
) -> tuple[Policy, Trials]:
    """A policy of `VARIANTS`, and what it is told first. before: the agent's search in the cell before."""
    base, _, variant = name.partition("/")
    problem = problems["noise" if variant == "noise" else "fisher"]
    if variant == "memory" and memory:
        return ActorCritic(problem, seed, memory=Memory.read(memory)), ()
    if variant in ("memory", "scores"):
        assert before is not None
        if variant == "scores":
            return POLICIES[base](problem, seed), before[1]
        elder = ActorCritic(before[0], seed)
        for plan, result in before[1]:
            elder.tell(plan, result)
        return ActorCritic(problem, seed, memory=elder.memory()), ()
    return POLICIES[base](problem, seed), ()


def quality(network: Network, texts: dict[str, Reference]) -> dict[str, tuple[float, float]]:
    """(KL, perplexity) of a network by text."""
    found = {name: reference.compare(network) for name, reference in texts.items()}
    return {name: (float(kl_N.mean()), float(np.exp(nll_N.mean()))) for name, (kl_N, nll_N) in found.items()}


def limits_of(cell: str, decoder, latency: Latency) -> dict[str, float]:
    """`bits-3.0+decode-0.5` -> limits in bytes and ms."""
    limits = {}
    for part in cell.split("+"):
        name, _, value = part.partition("-")
        if name == "bits":
            limits["bytes"] = float(value) / 8 * sum(site.parameters for site in decoder.sites())
        elif name in ("prefill", "decode"):
            limits[f"{name}_ms"] = float(value) * getattr(latency.fp32_ms, name)
        else:
            raise SystemExit(f"{cell}: expected bits-X, prefill-X or decode-X, joined by +; got {part!r}")
    return limits


def curve(trials: Trials, evaluations: int) -> list[float]:
    """Best KL on all of the scoring text after 1, 2, ... evaluations; infinite before there is one."""
    after = np.array(spent(trials))
    full = np.array([score.kl if score.part is None else np.inf for _, score in trials])
    return [float(np.min(full[after <= count + 1e-9], initial=np.inf)) for count in range(1, evaluations + 1)]


def table(
    cell: str,
    limits: dict[str, float],
    curves: dict[str, list[list[float]]],
    final: dict[str, list[dict[str, tuple[float, float]]]],
    stable: dict[str, float],
) -> str:
    """One cell as Markdown, best policy first."""
    count, seeds = len(curves[OURS][0]), len(curves[OURS])
    means = {name: float(np.mean([c[-1] for c in found])) for name, found in curves.items()}
    rivals = [name for name in means if not name.startswith(OURS)]
    rival = min(rivals, key=lambda name: means[name], default=OURS)
    what = ", ".join(f"{name} {value:,.4g}" for name, value in limits.items())
    texts = list(final[OURS][0])
    head = ["policy", "KL", f"to beat {rival}", "same actions"]
    head += [f"{figure}, {text}" for text in texts for figure in ("KL", "perplexity")]
    lines = [
        f"\n**{cell}** ({what}; {count} evaluations, {seeds} seeds, mean and range)\n",
        "| " + " | ".join(head) + " |",
        "| --- " * len(head) + "|",
    ]
    for name in sorted(means, key=lambda n: means[n]):
        reached = [next((i + 1 for i, kl in enumerate(c) if kl < means[rival]), None) for c in curves[name]]
        when = str(int(np.median([r for r in reached if r]))) if sum(map(bool, reached)) * 2 > seeds else "–"
        cells = [spread([c[-1] for c in curves[name]]), when, f"{stable[name]:.0%}"]
        for text in texts:
            cells += [spread([found[text][figure] for found in final[name]]) for figure in (0, 1)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(cell: str, curves: dict[str, list[list[float]]], path: Path) -> None:
    """Best KL so far against evaluations: mean of the seeds, and their range as a band; cut off somewhat above the agent's
    start."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, found in curves.items():
        x = np.arange(1, len(found[0]) + 1)
        (line,) = axes.plot(x, np.mean(found, 0), label=name, linewidth=2.5 if name == OURS else 1.2)
        axes.fill_between(x, np.min(found, 0), np.max(found, 0), color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(title=cell, xlabel="evaluations", ylabel="best KL so far, nats per token")
    axes.set_ylim(0.97 * min(c[-1] for found in curves.values() for c in found), 1.1 * max(c[0] for c in curves[OURS]))
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
