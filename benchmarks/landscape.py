"""A recorded landscape: some thousand plans scored on the real model, on which policies are developed in seconds.

    python benchmarks/landscape.py record recipes/benchmark-controllers.yaml runs/controllers --plans 3000
    python benchmarks/landscape.py compare --bits 3.0 --seeds 3 --evaluations 16

`record` scores plans on an eighth of the scoring text and keeps them in landscape.npz beside this file: plans of dynamic
programming for budgets of 2.2 to 4.5 bits a weight on perturbed sensitivities, some sites of them switched at random; and
whatever searches of controllers.py had scored on an eighth. It goes on where it was stopped. `compare` fits a model to
them, says how well it predicts plans that it was not fitted to, and lets policies search on it, in place of the real
model. A plan that was recorded scores what was recorded.

A surrogate benchmark (Zela et al. 2022, arXiv 2008.09777) is for developing only: away from what was recorded it is too
friendly, and policies go where it is. Figures that count are those of controllers.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from seeds import spread  # the script beside this one
from torch import Tensor, nn

from compressor.files import write_bytes_atomic
from compressor.plan import PARTS, Action, Matrix, Score, Site
from policies import POLICIES, Meter, Problem, Question
from policies.critic import PART_NOISE
from policies.dynamic_programming import perturbed, solve

FILE = Path(__file__).with_suffix(".npz")
PART = 0
"""Of the scoring text, on which all plans are scored."""
SAVE_EVERY = 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("recipe", type=Path)
    recording.add_argument("out", type=Path)
    recording.add_argument("--plans", type=int, default=3000)
    comparing = commands.add_parser("compare")
    comparing.add_argument("--bits", type=float, default=3.0)
    comparing.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    comparing.add_argument("--seeds", type=int, default=3)
    comparing.add_argument("--evaluations", type=int, default=16)
    options = parser.parse_args()
    if options.command == "record":
        record(options.recipe, options.out, options.plans)
    else:
        compare(options.bits, options.policies, options.seeds, options.evaluations)


# Recording ------------------------------------------------------------------------------------------------------------


def record(recipe: Path, out: Path, plans: int) -> None:
    """Score what is missing of the first `plans` plans of the sample."""
    from compressor import pipeline
    from compressor.ledger import comparable_entries
    from compressor.progress import LineProgress
    from compressor.recipe import Recipe
    from compressor.stages import Stages

    run = pipeline.start(Recipe.load(recipe), out, False, Stages(out / "stages", LineProgress(sys.stderr)))
    sensitivity, latency = pipeline.find_sensitivities(run), pipeline.measure_latency(run)
    decoder = run.teacher.network.decoder
    whole = {"bytes": 4.0 * sum(site.parameters for site in decoder.sites())}
    problem = pipeline.pose(run, sensitivity, latency, whole)
    known = {}
    if FILE.exists():
        _, plans_NS, log_kl_N = read()
        known = {plan_S.tobytes(): (plan_S, log_kl) for plan_S, log_kl in zip(plans_NS, log_kl_N, strict=True)}
    for plan, score in comparable_entries(out / "ledger.log", run.menu, run.comparable):
        if score.part == PART:
            indices = problem.indices(plan)
            known[indices.tobytes()] = indices, float(np.log(score.kl))
    with run.stages.timed("recording") as report:
        for number, indices in zip(range(plans), sample(problem), strict=False):
            if indices.tobytes() not in known:
                known[indices.tobytes()] = indices, float(np.log(run.executor.score(problem.plan(indices), PART).kl))
            if number % SAVE_EVERY == 0:
                write(problem, list(known.values()))
                report(number, plans)
    write(problem, list(known.values()))


def sample(problem: Problem) -> Iterator[np.ndarray]:
    """Plans [S] without end, always the same ones."""
    rng = np.random.default_rng(0)
    parameters = sum(site.parameters for site in problem.sites)
    while True:
        budgeted = replace(problem, limits={"bytes": rng.uniform(2.2, 4.5) / 8 * parameters})
        indices = solve(budgeted, perturbed(problem, rng, spread=rng.uniform(0.0, 1.0)), width=50)
        for site in rng.choice(len(indices), size=rng.choice([0, 1, 2, 4, 8, 16]), replace=False):
            indices[site] = rng.integers(len(problem.actions[site]))
        yield indices


def write(problem: Problem, scores: Sequence[tuple[np.ndarray, float]]) -> None:
    """All that a policy may see, as JSON, and the scores (plan [S], log KL), in one file without pickles."""
    text = json.dumps(
        {
            "sites": [asdict(site) for site in problem.sites],
            "actions": [[asdict(action) for action in menu] for menu in problem.actions],
            "sensitivity": [np.round(row, 9).tolist() for row in problem.sensitivity],
            "costs": {name: [np.round(row, 6).tolist() for row in rows] for name, rows in problem.costs.items()},
            "fixed": dict(problem.fixed),
        }
    )
    buffer = io.BytesIO()
    plans_NS, log_kl_N = (np.array(part) for part in zip(*scores, strict=True))
    np.savez_compressed(
        buffer, problem=np.array(text), plans=plans_NS.astype(np.int8), log_kl=log_kl_N.astype(np.float32)
    )
    write_bytes_atomic(FILE, buffer.getvalue())


def read(bits: float = 32.0) -> tuple[Problem, np.ndarray, np.ndarray]:
    """The problem at a budget of so many bits a weight, the recorded plans [N, S] and their log KL [N]."""
    with np.load(FILE, allow_pickle=False) as stored:
        found, plans_NS, log_kl_N = json.loads(str(stored["problem"])), stored["plans"], stored["log_kl"]
    sites = []
    for site in found["sites"]:
        matrices = tuple(Matrix(**matrix) for matrix in site.pop("matrices"))
        sites.append(Site(**site, matrices=matrices))
    problem = Problem(
        sites=tuple(sites),
        actions=tuple(tuple(Action(**action) for action in menu) for menu in found["actions"]),
        sensitivity=tuple(np.array(row) for row in found["sensitivity"]),
        costs={name: tuple(np.array(row) for row in rows) for name, rows in found["costs"].items()},
        fixed=found["fixed"],
        limits={"bytes": bits / 8 * sum(site.parameters for site in sites)},
    )
    return problem, plans_NS.astype(int), log_kl_N.astype(float)


# The landscape --------------------------------------------------------------------------------------------------------


class Landscape:
    """log KL of any plan, from those that were recorded.

        log KL = g(log t),  t = sum_s x[s, a_s] + sum_h sum_s eta[h, s] sqrt(x_s x_s+h)        h: 1 to 3 sites apart

    g is a parabola. x starts at the sensitivities, x and eta are learned for every site and action: the mean of an ensemble.
    """

    def __init__(self, problem: Problem, plans_NS: np.ndarray, log_kl_N: np.ndarray, members: int = 3):
        self.problem = problem
        self.recorded = {plan_S.astype(np.int8).tobytes(): y for plan_S, y in zip(plans_NS, log_kl_N, strict=True)}
        self.nets = [_Net(problem.sensitivity_SA, seed) for seed in range(members)]
        plans, target = torch.tensor(plans_NS), torch.tensor(log_kl_N, dtype=torch.float32)
        for net in self.nets:
            _train(net, plans, target)

    @torch.no_grad()
    def log_kl(self, plans_BS: np.ndarray) -> np.ndarray:
        """[B, S] -> [B], of the model alone."""
        return torch.stack([net(torch.tensor(plans_BS)) for net in self.nets]).mean(0).numpy().astype(float)

    def score(self, question: Question) -> Score:
        """What was recorded, else what the model says; on a part of the text with the error of such a score."""
        indices = self.problem.indices(question.plan)
        found = self.recorded.get(indices.astype(np.int8).tobytes())
        log_kl = float(self.log_kl(indices[None])[0]) if found is None else found
        error_P = PART_NOISE * np.random.default_rng(int(question.plan.digest, 16)).normal(size=PARTS)
        by_part = tuple(np.exp(log_kl + error_P)) if question.part is None else ()
        kl = float(np.exp(log_kl + (0.0 if question.part is None else error_P[question.part])))
        return Score(kl, float(np.exp(min(kl, 100.0))), 2048, question.part, by_part)


class _Net(nn.Module):
    def __init__(self, sensitivity_SA: np.ndarray, seed: int, hops: int = 3):
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)
        floor = 1e-3 * float(np.median(sensitivity_SA[sensitivity_SA > 0]))
        self.start_SA = torch.tensor(np.log(sensitivity_SA + floor), dtype=torch.float32)
        self.change_SA = nn.Parameter(torch.zeros(sensitivity_SA.shape))
        self.eta_HS = nn.Parameter(torch.zeros(hops, len(sensitivity_SA)))
        self.parabola = nn.Parameter(torch.tensor([0.0, 1.0, 0.0]))

    def forward(self, plans_BS: Tensor) -> Tensor:
        x_BS = (self.start_SA + self.change_SA)[torch.arange(plans_BS.shape[1]), plans_BS].exp()
        root_BS, sum_B = x_BS.sqrt(), x_BS.sum(1)
        total_B = sum_B
        for hop, eta_S in enumerate(self.eta_HS, 1):
            total_B = total_B + (root_BS[:, hop:] * root_BS[:, :-hop]) @ eta_S[:-hop]
        z_B = torch.log(torch.maximum(total_B, 0.05 * sum_B))
        return self.parabola[0] + self.parabola[1] * z_B + self.parabola[2] * z_B**2


def _train(net: _Net, plans_NS: Tensor, target_N: Tensor, epochs: int = 200, batch: int = 64) -> None:
    """Adam with a rate that rises and falls; what x and eta depart from their start is held small."""
    steps = epochs * -(-len(plans_NS) // batch)
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(plans_NS), generator=net.random).split(batch):
            error_B = net(plans_NS[rows]) - target_N[rows]
            departure = net.change_SA.square().sum() + net.eta_HS.square().sum()
            loss = error_B.square().mean() + 0.02 * departure / len(plans_NS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


# Comparing ------------------------------------------------------------------------------------------------------------


def compare(bits: float, policies: Sequence[str], seeds: int, evaluations: int) -> None:
    """How well the model predicts plans held out from it, then a table of policies on it."""
    problem, plans_NS, log_kl_N = read(bits)
    held = np.arange(len(plans_NS)) % 10 == 0
    tested = Landscape(problem, plans_NS[~held], log_kl_N[~held])
    error_N = tested.log_kl(plans_NS[held]) - log_kl_N[held]
    print(
        f"{len(plans_NS)} plans, log KL {log_kl_N.min():.2f} to {log_kl_N.max():.2f}; of {held.sum()} held out: root mean"
    )
    print(f"square error {np.sqrt(np.mean(error_N**2)):.3f}, explained {1 - error_N.var() / log_kl_N[held].var():.3f}")
    landscape = Landscape(problem, plans_NS, log_kl_N)
    print(f"\n| {bits} bits, {evaluations} evaluations, {seeds} seeds | KL | seconds |\n| --- | --- | --- |")
    for name in policies:
        start = time.monotonic()
        found = [search(name, problem, seed, evaluations, landscape) for seed in range(seeds)]
        print(f"| {name} | {spread(found)} | {(time.monotonic() - start) / seeds:.1f} |", flush=True)


def search(name: str, problem: Problem, seed: int, evaluations: int, landscape: Landscape) -> float:
    """The least KL on all of the text that a policy finds."""
    policy, meter, least = POLICIES[name](problem, seed), Meter(), float("inf")
    while meter.allows(question := policy.ask(), evaluations):
        score = landscape.score(question)
        policy.tell(question.plan, score)
        meter.add(question)
        least = min(least, score.kl) if question.part is None else least
    return least


if __name__ == "__main__":
    main()
