"""What is pruned together, against the dependency graph of torch-pruning: an independent oracle, asked about transformers'
own modules wherever it can trace them.

It cannot trace GPT-2's transposed matrices (its Conv1D) and experts that lie stacked in a parameter. Of attentions with
grouped queries it hangs, or prunes one query head for a whole group (its issue 527); those that rotate want positions.
"""

from itertools import takewhile

import pytest
import torch
import transformers

from compressor.families import FAMILIES, Part, decoder_of, modules_of
from compressor.student import Decoder
from tests import test_encoders, test_families, test_sequences

tp = pytest.importorskip("torch_pruning")

UNIT = 3
"""The channel that is pruned, and with it all that depends on it."""

KINDS = (
    (transformers.AutoModelForCausalLM, test_families.CONFIGS),
    (transformers.AutoModelForMaskedLM, test_encoders.CONFIGS),
    (transformers.AutoModelForSeq2SeqLM, test_sequences.CONFIGS),
)
CONFIGS = {name: (kind, *config) for kind, configs in KINDS for name, config in configs.items()}
UNTRACED = {"gpt2", "mixtral", "qwen2_moe"}
ATTENTIONS = ("bert", "bert-untied", "roberta", "distilbert", *test_sequences.CONFIGS)


@pytest.mark.parametrize(
    ("name", "sub_layer"),
    [(name, "layers.0.ffn") for name in CONFIGS if name not in UNTRACED]
    + [(name, "layers.0.attention") for name in ATTENTIONS],
)
def test_torch_pruning_couples_the_same_channels(name, sub_layer):
    kind, config_name, changes = CONFIGS[name]
    config = getattr(transformers, config_name)(**changes, attn_implementation="eager")
    model, decoder = kind.from_config(config).eval(), decoder_of(config)
    pruned = {m.name: m.pruned for site in decoder.sites() if site.name == sub_layer for m in site.matrices}
    places = {
        ours: (model.get_submodule(theirs), theirs, part)
        for ours, theirs, part in modules_of(FAMILIES[config.model_type], decoder)
        if ours in pruned
    }
    assert pruned.keys() == places.keys()
    expected: dict[tuple[torch.nn.Module, str], set[int]] = {}
    for ours, (module, _, part) in places.items():
        way = f"prune_{'out' if pruned[ours] == 'rows' else 'in'}_channels"
        expected.setdefault((module, way), set()).update(their_units(module, pruned[ours], part, decoder))

    in_step = zip(*(theirs.split(".") for _, theirs, _ in places.values()), strict=False)
    around = ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, in_step))
    graph = tp.DependencyGraph().build_dependency(
        model.get_submodule(around).requires_grad_(True), example_inputs=torch.randn(1, 5, config.hidden_size)
    )
    first = next(iter(places.values()))[0]
    group = graph.get_pruning_group(first, tp.prune_linear_out_channels, idxs=[UNIT])
    found = {(dep.target.module, dep.handler.__name__): set(units) for dep, units in group}
    assert {key: units for key, units in found.items() if isinstance(key[0], torch.nn.Linear)} == expected


def their_units(module: torch.nn.Linear, pruned: str, part: Part | None, decoder: Decoder) -> set[int]:
    """The rows or columns of transformers' matrix of which our matrix takes its own number `UNIT`."""
    dim, found = ("rows", "columns").index(pruned), set()
    for unit in range(module.weight.shape[dim]):
        marked = torch.zeros_like(module.weight)
        marked.select(dim, unit).fill_(1)
        ours = marked if part is None else part(marked, decoder)
        found |= {unit} if ours.select(dim, UNIT).any() else set()
    return found
