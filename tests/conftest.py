"""A tiny Llama with grouped-query attention, a byte tokenizer and some text: everything that a whole run needs."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: more threads only wait for one another

import pytest
import torch

from compressor import measure
from compressor.model import load_teacher
from compressor.network import Network
from eval import latency

pytest_plugins = ["pytester"]

ROOT = Path(__file__).parents[1]
TEXT = ROOT / "recipes" / "text"


@pytest.fixture(scope="session", autouse=True)
def one_pass():
    """Runs of tiny models gain nothing from precise times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "PASSES", (1, 1))
        patch.setattr(measure, "ROUNDS", (3, 3))
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A model folder as transformers writes it: 3 blocks, hidden 64, 2 groups of 2 heads, 128 channels, tied."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):  # gains of 1 would hide a gain that is forgotten
            parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_folder) -> Network:
    return load_teacher(tiny_folder).network


@pytest.fixture(scope="session")
def windows() -> torch.Tensor:
    """Token ids [24, 64] of the calibration text, a byte each."""
    data = (TEXT / "wiki-calibration.txt").read_bytes()[: 24 * 64]
    return torch.tensor(list(data)).view(24, 64)


GOLDEN = Path(__file__).with_name("golden.json")


def check_golden(name: str, kl: float, folder: Path) -> None:
    """Compare the KL of a plan's variants and the bytes of its exported weights with what they were: with `GOLDEN=write` in
    the environment, they are written down instead. Another processor rounds otherwise, so that codes differ here and there;
    layouts don't.
    """
    known = json.loads(GOLDEN.read_text()) if GOLDEN.is_file() else {}
    size = (folder / "model.onnx_data").stat().st_size
    if os.environ.get("GOLDEN") == "write":
        known[name] = {"kl": float(f"{kl:.3g}"), "bytes": size}
        GOLDEN.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
    assert known[name]["bytes"] == size and known[name]["kl"] == pytest.approx(kl, rel=0.3)
