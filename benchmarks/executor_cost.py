"""What evaluating a plan costs, in forward passes of the same tokens: seconds of `Executor.score` over seconds of the
teacher's own pass to the logits. Plans are drawn at random, each is scored thrice: `first` makes and installs the variants
that differ from the last plan; then, `again`, all plans in turn, twice, the bank holding their variants. The pass is
timed in between, so that what else the machine does meets both.

    python benchmarks/executor_cost.py models/benchmark-teacher runs/benchmark-25/bank --tokens 2048 --plans 6
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from compressor.bank import Bank
from compressor.executor import Executor
from compressor.model import load_teacher
from compressor.plan import Action, Plan
from compressor.recipe import TextSource
from compressor.text import load_tokens

FORMATS = ("w4", "w8")
LENGTH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("bank", type=Path)
    parser.add_argument("--text", type=Path, default=Path("recipes/text/wiki-calibration.txt"))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--plans", type=int, default=6)
    options = parser.parse_args()
    teacher = load_teacher(options.teacher)
    windows_NL = load_tokens([TextSource(file=str(options.text))], teacher.tokenizer, options.tokens, LENGTH)
    network = teacher.network
    bank = Bank(options.bank, network, windows_NL, windows_NL[:2], "gptq")
    executor = Executor(bank, windows_NL)

    @torch.no_grad()
    def plain() -> None:
        hidden_NLD = network.hidden(windows_NL)
        for hidden_LD in hidden_NLD:
            network.logits(hidden_LD)

    def seconds(call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    rng = np.random.default_rng(0)
    names = {site.name: site.units for site in network.decoder.sites()}
    plans = [
        Plan(tuple((name, Action(units, str(rng.choice(FORMATS)))) for name, units in names.items()))
        for _ in range(options.plans)
    ]
    plain()
    for plan in plans:
        print(f"first: {seconds(lambda plan=plan: executor.score(plan)):.2f} s")
    ratios = []
    for _ in range(2):
        for plan in plans:
            before = seconds(plain)
            scored = seconds(lambda plan=plan: executor.score(plan))
            after = seconds(plain)
            ratios.append(scored / ((before + after) / 2))
            print(f"again: {scored:.2f} s, plain forward {before:.2f} and {after:.2f} s, ratio {ratios[-1]:.3f}")
    low, middle, high = np.quantile(ratios, (0, 0.5, 1))
    print(f"an evaluation costs {middle:.3f} plain forward passes (median of {len(ratios)}; {low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()
