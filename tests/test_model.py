"""The network: sites replaced one by one, against plain forward passes of the same weights."""

import shutil
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file

from compressor.errors import ModelError
from compressor.model import load_teacher, read_decoder
from compressor.network import Network
from compressor.plan import DROP, Action
from compressor.quantize import as_floats, fake_dynamic_int8


def full_matrices(network: Network, site: str) -> dict[str, torch.Tensor]:
    return {matrix.name: network.matrix(matrix.name).clone() for matrix in network.sites[site].matrices}


def logits(network, ids):
    with torch.no_grad():
        return network.logits(network.hidden(ids))


def test_shape(tiny):
    decoder = tiny.decoder
    assert (decoder.layers, decoder.heads, decoder.kv_heads, decoder.head_dim, decoder.channels) == (3, 4, 2, 16, 128)
    assert decoder.tied and len(decoder.rope_frequencies) == 8
    assert [site.name for site in decoder.sites()][:3] == ["embedding", "layers.0.attention", "layers.0.ffn"]
    assert sum(site.parameters for site in decoder.sites()) == sum(
        p.numel() for name, p in tiny.model.named_parameters() if "norm" not in name
    )


def test_shape_from_the_configuration_alone(tiny, tiny_folder):
    assert read_decoder(tiny_folder) == tiny.decoder


def test_pruned_channels_are_as_if_masked(tiny, windows):
    """A narrow feed-forward computes what the full one does with the other channels' outputs zeroed."""
    site, kept = tiny.sites["layers.1.ffn"], torch.arange(0, 128, 2)
    masked = deepcopy(tiny)
    with torch.no_grad():
        masked.matrix("layers.1.ffn.down")[:, 1::2] = 0
    full = full_matrices(tiny, site.name)
    narrow = {name: w[kept] if not name.endswith("down") else w[:, kept] for name, w in full.items()}
    tiny.install(site, Action(64, "fp32"), as_floats(narrow))
    torch.testing.assert_close(logits(tiny, windows[:2]), logits(masked, windows[:2]), rtol=1e-4, atol=1e-4)


def test_pruned_groups_are_as_if_masked(tiny, windows):
    """A group takes its key, its value and both of its query heads."""
    site, masked = tiny.sites["layers.1.attention"], deepcopy(tiny)
    with torch.no_grad():
        masked.matrix("layers.1.attention.o")[:, :32] = 0
    full = full_matrices(tiny, site.name)
    q, k, v, o = (full[f"{site.name}.{part}"] for part in "qkvo")
    narrow = {f"{site.name}.q": q[32:], f"{site.name}.k": k[16:], f"{site.name}.v": v[16:], f"{site.name}.o": o[:, 32:]}
    tiny.install(site, Action(1, "fp32"), as_floats(narrow))
    torch.testing.assert_close(logits(tiny, windows[:2]), logits(masked, windows[:2]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, last", [("attention", "o"), ("ffn", "down")])
def test_dropped_sub_layers_pass_the_residual_stream_by_and_come_back(tiny, windows, kind, last):
    site, masked = tiny.sites[f"layers.2.{kind}"], deepcopy(tiny)
    before, full = logits(tiny, windows[:1]), full_matrices(tiny, site.name)
    with torch.no_grad():
        masked.matrix(f"{site.name}.{last}").zero_()
    tiny.install(site, DROP, {})
    torch.testing.assert_close(logits(tiny, windows[:1]), logits(masked, windows[:1]))
    tiny.install(site, Action(site.units, "fp32"), as_floats(full))
    assert torch.equal(logits(tiny, windows[:1]), before)


@pytest.mark.parametrize(("format", "read", "last"), [("int8", 1, 1), ("w4a8+w8", 1, 0), ("w8+int8", 0, 1)])
def test_int8_quantizes_what_the_linears_read(tiny, windows, format, read, last):
    def seen_as(quantized, x):
        return fake_dynamic_int8(x) if quantized else x

    site, seen = tiny.sites["layers.0.ffn"], {}
    with tiny.watch_inputs(lambda name, x: seen.setdefault(name, x)):
        logits(tiny, windows[:2])
    plain = dict(seen)
    seen.clear()
    tiny.install(site, Action(site.units, format), as_floats(full_matrices(tiny, site.name)))
    with tiny.watch_inputs(lambda name, x: seen.setdefault(name, x)):
        logits(tiny, windows[:2])
    assert torch.equal(seen["layers.0.ffn.in"], seen_as(read, plain["layers.0.ffn.in"]))
    gate, up = (
        torch.nn.functional.linear(seen["layers.0.ffn.in"], tiny.matrix(f"layers.0.ffn.{n}")) for n in ("gate", "up")
    )
    expected = seen_as(last, torch.nn.functional.silu(gate) * up)
    torch.testing.assert_close(seen["layers.0.ffn.out"], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen["layers.0.attention.in"], plain["layers.0.attention.in"])


def test_a_tied_table_is_replaced_at_both_ends(tiny):
    tiny.install(tiny.sites["embedding"], Action(1, "w8"), as_floats({"embedding": torch.ones(256, 64)}))
    assert tiny.model.embedding.weight is tiny.model.head.weight
    assert tiny.matrix("embedding").eq(1).all()


def test_copies_are_independent(tiny, windows):
    before, copy = logits(tiny, windows[:1]), tiny.copy()
    copy.install(copy.sites["layers.0.ffn"], DROP, {})
    assert torch.equal(logits(tiny, windows[:1]), before)


def test_cached_step_is_the_last_row_of_a_whole_pass(tiny, windows):
    ids = windows[:1, :9]
    step = tiny.cached_step(ids[:, :8])
    expected = logits(tiny, torch.cat([ids[:, :8], ids[:, 7:8]], 1))[0, -1]
    for _ in range(2):
        torch.testing.assert_close(step()[0, -1], expected, rtol=1e-4, atol=1e-4)


def test_pickled_weights_are_not_read(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="safetensors"):
        load_teacher(folder)


def test_a_missing_model_is_one_clear_error(tmp_path):
    with pytest.raises(ModelError, match="expected a hub id or a local folder"):
        load_teacher(tmp_path / "nothing")
