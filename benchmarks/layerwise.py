"""A model larger than the memory in which it is compressed: seconds and peak memory of every stage.

    python benchmarks/layerwise.py models/benchmark-teacher runs/layerwise --limit 1.5e9

Writes a Llama of random weights (24 blocks, 1536 wide, with the tokenizer of the given model: 3.0 GB in float32) into
OUT/model, then runs OUT/recipe.yaml in a control group that may not take more than --limit bytes, page cache included: the
kernel takes that back or ends the run. Prints how much of it was memory of the processes' own, which cannot be taken back,
at its highest in every stage. Takes the right to make control groups (Linux, root); everything but the measuring is
`compress OUT/recipe.yaml`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

GROUPS = Path("/sys/fs/cgroup")
TEXT = Path(__file__).parents[1] / "recipes" / "text"
SECONDS_BETWEEN_LOOKS = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", help="a model folder, whose tokenizer is taken")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=float, default=1.5e9, help="bytes")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the checkpoint")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="handed on to `compress`")
    options = parser.parse_args()
    model = options.out / "model"
    if not (model / "tokenizer.json").exists():
        write_model(model, options.tokenizer, options.layers, getattr(torch, options.dtype))
    recipe = options.out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(model.resolve())))
    compress = str(Path(sys.executable).with_name("compress"))
    command = [compress, "run", str(recipe), "--out", str(options.out / "run"), "--json"]
    command += [f"--set={change}" for change in options.set]
    with control_group(int(options.limit)) as group:
        code, peaks = measured(command, group)
    print(f"{files_size(model) / 1e9:.2f} GB of weights, {options.limit / 1e9:.2f} GB of memory; exit code {code}\n")
    print(f"{'stage':24}{'peak, MB':>10}")
    for stage, peak in peaks.items():
        print(f"{stage:24}{peak / 1e6:10.0f}")
    if code:
        raise SystemExit(code)
    report = json.loads((options.out / "run" / "report.json").read_text())
    print("\n" + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["stage_seconds"].items()))


def write_model(folder: Path, tokenizer: str, layers: int, dtype: torch.dtype) -> None:
    """A Llama of random weights."""
    config = LlamaConfig(
        vocab_size=len(words := AutoTokenizer.from_pretrained(tokenizer)),
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(dtype)  # type: ignore[arg-type] # as transformers annotates it
    model.save_pretrained(folder, max_shard_size="500MB")
    words.save_pretrained(folder)


def recipe_of(model: Path) -> dict:
    return {
        "model": {"path": str(model)},
        "data": {
            "calibration": [str(TEXT / "wiki-calibration.txt")],
            "evaluation": [str(TEXT / "wiki-evaluation.txt"), str(TEXT / "novel-evaluation.txt")],
            "calibration_tokens": 4096,
            "evaluation_tokens": 1024,
        },
        "target": {"device": "cpu", "workload": {"prefill": 64, "context": 64}},
        "budget": {"bytes": "12%"},
        "search": {
            "evaluations": 3,
            "tokens": 1024,
            "rivals": ["uniform"],
            "formats": ["w8", "w4", "w2"],
            "embedding_formats": ["w8", "w4"],
            "ffn_keep": [1.0, 0.5, 0.0],
        },
    }


def files_size(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """The folder of a control group of its own, version 1 or 2."""
    root, name = (GROUPS / "memory", "memory.limit_in_bytes")
    if not root.is_dir():
        root, name = GROUPS, "memory.max"
    group = root / f"layerwise-{os.getpid()}"
    try:
        group.mkdir()
        (group / name).write_text(str(limit))
    except OSError as error:
        raise SystemExit(f"expected the right to make a control group under {root}: {error}; run as root") from error
    try:
        yield group
    finally:
        group.rmdir()


def measured(command: list[str], group: Path) -> tuple[int, dict[str, int]]:
    """(exit code of a command in a control group, peak of its own memory in bytes by the stage that was shown last)."""
    peaks: dict[str, int] = defaultdict(int)
    stage, ended = "start", threading.Event()

    def look() -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            peaks[stage] = max(peaks[stage], own_bytes(group))

    def enter() -> None:
        (group / "cgroup.procs").write_text(str(os.getpid()))

    watch = threading.Thread(target=look)
    watch.start()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=enter) as process:
        assert process.stderr
        for line in process.stderr:
            try:
                stage = json.loads(line)["stage"]
            except (ValueError, KeyError, TypeError):
                sys.stderr.write(line)
        code = process.wait()
    ended.set()
    watch.join()
    return code, dict(peaks)


def own_bytes(group: Path) -> int:
    """Memory of a control group's processes that no file holds."""
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(stat.get("total_rss") or stat["anon"])


if __name__ == "__main__":
    main()
