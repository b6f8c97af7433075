"""A recorded landscape: some thousand scores of the real model, on which policies are developed in seconds.

    python benchmarks/landscape.py record recipes/benchmark-controllers.yaml runs/controllers
    python benchmarks/landscape.py compare --bits 2.5 --seeds 4 --evaluations 16 --policies dynamic_programming actor_critic

`record` keeps what the searches of controllers.py had scored, part by part of the scoring text, in landscape.npz beside this
file. `compare` fits a model to it, says how well it predicts plans that it was not fitted to, and lets policies search on
it, in place of the real model. What was recorded scores what was recorded.

A surrogate benchmark (Zela et al. 2022, arXiv 2008.09777) is for developing only: away from what was recorded it is too
friendly, and policies go where it is. Most of what is recorded is of 2.5 and of 4.0 bits and of budgets on time. Figures
that count are those of controllers.py.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from seeds import spread  # the script beside this one
from torch import Tensor, nn

from compressor.files import write_bytes_atomic
from compressor.latency import measure_latency
from compressor.plan import PARTS, Action, Matrix, Score, Site
from compressor.run import start
from policies import POLICIES, Meter, Problem, Question

FILE = Path(__file__).with_suffix(".npz")
WORST = 4.0
"""KL in nats beyond which a score is left out: such plans are destroyed."""
ERROR = (0.015, 0.02)
"""Deviations in log KL of what no model knows: of a plan, and of a part of the text besides."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("recipe", type=Path)
    recording.add_argument("out", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("--bits", type=float, default=2.5)
    comparing.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    comparing.add_argument("--seeds", type=int, default=3)
    comparing.add_argument("--evaluations", type=int, default=16)
    options = parser.parse_args()
    if options.command == "record":
        record(options.recipe, options.out)
    else:
        compare(options.bits, options.policies, options.seeds, options.evaluations)


# Recording ------------------------------------------------------------------------------------------------------------


def record(recipe: Path, out: Path) -> None:
    """Write what the ledger of OUT holds."""
    from compressor import pipeline
    from compressor.ledger import comparable_entries
    from compressor.progress import silent
    from compressor.recipe import Recipe
    from compressor.stages import Stages

    run = start(Recipe.load(recipe), out, False, Stages(out / "stages", silent))
    sensitivity, latency = pipeline.find_sensitivities(run), measure_latency(run)
    whole = {"bytes": 4.0 * sum(site.parameters for site in run.teacher.network.decoder.sites())}
    problem = pipeline.pose(run, sensitivity, latency, whole)
    known: dict[bytes, np.ndarray] = {}
    for plan, score in comparable_entries(out / "ledger.log", run.menu, run.comparable):
        known_P = known.setdefault(problem.indices(plan).astype(np.int8).tobytes(), np.full(PARTS, np.nan))
        known_P[slice(None) if score.part is None else score.part] = np.log(score.by_part or score.kl)
    plans_NS = np.stack([np.frombuffer(key, np.int8) for key in known])
    text = json.dumps(
        {
            "sites": [asdict(site) for site in problem.sites],
            "actions": [[asdict(action) for action in menu] for menu in problem.actions],
            "sensitivity": [np.round(row, 9).tolist() for row in problem.sensitivity],
            "costs": {name: [np.round(row, 6).tolist() for row in rows] for name, rows in problem.costs.items()},
            "fixed": dict(problem.fixed),
        }
    )
    buffer, log_kl_NP = io.BytesIO(), np.stack(list(known.values())).astype(np.float32)
    np.savez_compressed(buffer, problem=np.array(text), plans=plans_NS, log_kl=log_kl_NP)
    write_bytes_atomic(FILE, buffer.getvalue())


def read(bits: float = 32.0) -> tuple[Problem, np.ndarray, np.ndarray]:
    """The problem at a budget of so many bits a weight, the recorded plans [N, S] and their log KL on the parts of the text
    [N, P], not-a-number where they were not scored."""
    with np.load(FILE, allow_pickle=False) as stored:
        found, plans_NS, log_kl_NP = json.loads(str(stored["problem"])), stored["plans"], stored["log_kl"]
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
    return problem, plans_NS.astype(int), log_kl_NP.astype(float)


# The landscape --------------------------------------------------------------------------------------------------------


class Landscape:
    """log KL of any plan on any part of the text, from what was recorded.

        log KL = a + b log t + t_p + c_p sigmoid(sum_s w[p, s, a_s] + w_p)
        t      = sum_s x_s + sum_h sum_s eta[h, s] sqrt(x_s x_s+h)            h: 1, 2, 3, 4 and 8 sites apart

    x starts at the sensitivities, and is learned for every site and action, and a little for every part. c is what is lost on
    a part with its attention sink, a step that sums cannot make.
    """

    def __init__(self, problem: Problem, plans_NS: np.ndarray, log_kl_NP: np.ndarray):
        self.problem = problem
        self.recorded = {plan_S.astype(np.int8).tobytes(): row for plan_S, row in zip(plans_NS, log_kl_NP, strict=True)}
        self.net = _Net(problem.sensitivity_SA)
        plan_M, part_M = np.nonzero(log_kl_NP < np.log(WORST))
        target_M = torch.tensor(log_kl_NP[plan_M, part_M], dtype=torch.float32)
        _train(self.net, torch.tensor(plans_NS[plan_M]), torch.tensor(part_M), target_M)

    @torch.no_grad()
    def log_kl(self, plans_BS: np.ndarray) -> np.ndarray:
        """[B, S] -> [B, P], of the model alone."""
        parts = [self.net(torch.tensor(plans_BS), torch.full((len(plans_BS),), part)) for part in range(PARTS)]
        return torch.stack(parts, 1).numpy().astype(float)

    def score(self, question: Question) -> Score:
        """What was recorded, else what the model says, with the errors of such a score."""
        indices = self.problem.indices(question.plan)
        rng = np.random.default_rng(int(question.plan.digest, 16))
        told_P = self.log_kl(indices[None])[0] + ERROR[0] * rng.normal() + ERROR[1] * rng.normal(size=PARTS)
        known_P = self.recorded.get(indices.astype(np.int8).tobytes(), np.full(PARTS, np.nan))
        kl_P = np.exp(np.where(np.isnan(known_P), told_P, known_P))
        kl = float(kl_P.mean() if question.part is None else kl_P[question.part])
        return Score(
            kl, float(np.exp(min(kl, 100.0))), 4096, question.part, tuple(kl_P) if question.part is None else ()
        )


HOPS = (1, 2, 3, 4, 8)


class _Net(nn.Module):
    def __init__(self, sensitivity_SA: np.ndarray):
        super().__init__()
        bent_SA = sensitivity_SA / (1 + sensitivity_SA)
        floor = 1e-4 * float(np.median(bent_SA[bent_SA > 0]))
        self.start_SA = torch.tensor(np.log(bent_SA + floor), dtype=torch.float32)
        sites = len(sensitivity_SA)
        pairs = [(s, s + hop) for hop in HOPS for s in range(sites - hop)]
        self.sites, (self.first_Q, self.second_Q) = torch.arange(sites), torch.tensor(pairs).T
        self.change_SA = nn.Parameter(torch.zeros(sensitivity_SA.shape))
        self.change_PSA = nn.Parameter(torch.zeros(PARTS, *sensitivity_SA.shape))
        self.log_eta_Q = nn.Parameter(torch.full((len(pairs),), -1.2))
        self.sink_PSA = nn.Parameter(torch.zeros(PARTS, *sensitivity_SA.shape))
        self.sink_P, self.lost_P = nn.Parameter(torch.zeros(PARTS)), nn.Parameter(torch.full((PARTS,), -2.0))
        self.level_P, self.line = nn.Parameter(torch.zeros(PARTS)), nn.Parameter(torch.tensor([0.0, 1.0]))

    def forward(self, plans_BS: Tensor, part_B: Tensor) -> Tensor:
        chosen = self.sites, plans_BS
        on_part = part_B[:, None], *chosen
        log_x_BS = (self.start_SA + self.change_SA)[chosen] + self.change_PSA[on_part]
        root_BS = (log_x_BS / 2).exp()
        pairs_B = (root_BS[:, self.first_Q] * root_BS[:, self.second_Q]) @ self.log_eta_Q.exp()
        lost_B = torch.sigmoid(self.sink_PSA[on_part].sum(1) + self.sink_P[part_B])
        level_B = self.level_P[part_B] + nn.functional.softplus(self.lost_P)[part_B] * lost_B
        return self.line[0] + self.line[1] * torch.log(log_x_BS.exp().sum(1) + pairs_B) + level_B

    def departure(self) -> Tensor:
        """What the prior says of the parameters, as a negative log-probability."""
        terms = [
            (self.change_SA, 0.0, 0.4),
            (self.change_PSA, 0.0, 0.1),
            (self.log_eta_Q, -1.2, 0.7),
            (self.sink_PSA, 0.0, 0.7),
            (self.level_P, 0.0, 0.3),
            (self.lost_P, -2.0, 1.0),
        ]
        return torch.stack([((given - mean) / std).square().sum() for given, mean, std in terms]).sum()


def _train(net: _Net, plans_MS: Tensor, part_M: Tensor, target_M: Tensor, steps: int = 900, batch: int = 1024) -> None:
    """Adam on Student's t of the errors and the prior."""
    optimizer, random = torch.optim.Adam(net.parameters(), 0.02), torch.Generator().manual_seed(0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(target_M), (batch,), generator=random)
        error_B = (net(plans_MS[rows], part_M[rows]) - target_M[rows]) / 0.04
        loss = 2 * torch.log1p(error_B.square() / 4).mean() + net.departure() / len(target_M)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


# Comparing ------------------------------------------------------------------------------------------------------------


def compare(bits: float, policies: Sequence[str], seeds: int, evaluations: int) -> None:
    """How well the model predicts plans held out from it, then a table of policies on it."""
    problem, plans_NS, log_kl_NP = read(bits)
    held = np.arange(len(plans_NS)) % 10 == 0
    tested = Landscape(problem, plans_NS[~held], log_kl_NP[~held])
    good_NP = log_kl_NP[held] < np.log(WORST)
    error_M = (tested.log_kl(plans_NS[held]) - log_kl_NP[held])[good_NP]
    scores, median, mean = (~np.isnan(log_kl_NP)).sum(), np.median(np.abs(error_M)), np.sqrt(np.mean(error_M**2))
    print(f"{len(plans_NS)} plans, {scores} scores on parts")
    print(f"error of log KL of plans held out: median {median:.3f}, root mean square {mean:.3f}")
    landscape = Landscape(problem, plans_NS, log_kl_NP)
    after = [count for count in (2, 4, 8) if count < evaluations] + [evaluations]
    print(f"\n| {bits} bits, {seeds} seeds: KL after | {' | '.join(map(str, after))} | seconds |")
    print("| --- " * (len(after) + 2) + "|")
    for name in policies:
        start = time.monotonic()
        curves = [search(name, problem, seed, evaluations, landscape) for seed in range(seeds)]
        found = [spread([best_after(curve, count) for curve in curves]) for count in after]
        print(f"| {name} | {' | '.join(found)} | {(time.monotonic() - start) / seeds:.1f} |", flush=True)


def search(name: str, problem: Problem, seed: int, evaluations: int, landscape: Landscape) -> list[tuple[float, float]]:
    """(evaluations spent, KL on all of the text) of every plan of a search that was scored on all of it."""
    policy, meter, curve = POLICIES[name](problem, seed), Meter(), []
    while meter.allows(question := policy.ask(), evaluations):
        score = landscape.score(question)
        policy.tell(question.plan, score)
        meter.add(question)
        if question.part is None:
            curve.append((meter.spent, score.kl))
    return curve


def best_after(curve: Sequence[tuple[float, float]], evaluations: float) -> float:
    """The least KL of a search after so many evaluations."""
    return min((kl for spent, kl in curve if spent <= evaluations + 1e-9), default=float("inf"))


if __name__ == "__main__":
    main()
