"""Formats: packing, grids, GPTQ against the plain algorithm, dynamic int8 against a loop."""

from dataclasses import replace

import pytest
import torch

from compressor.errors import RecipeError
from compressor.plan import Format
from compressor.quantize import (
    Hessian,
    Weight,
    damped,
    fake_dynamic_int8,
    find_grid,
    gptq,
    pack_rows,
    quantize,
    round_to_nearest,
    store_float,
    unpack_rows,
)

BLOCKWISE = ["w8", "w6", "w5", "w4", "w3", "w2", "w4b64", "w3b64", "w4a8", "w4a8b64"]


def problem(rows=24, columns=96, seed=0):
    """Weights and the second moment of correlated inputs."""
    torch.manual_seed(seed)
    x = torch.randn(512, columns) @ torch.randn(columns, columns)
    return torch.randn(rows, columns) * 0.1, damped(x.T @ x / 512, 0.01)


def row_losses(weight, w, hessian):
    delta = weight.dequantize() - w
    return ((delta @ hessian) * delta).sum(1)


def output_loss(weight, w, hessian):
    return float(row_losses(weight, w, hessian).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("columns", [1, 3, 32])
def test_packing_round_trips(bits, columns):
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    packed = pack_rows(codes, bits)
    assert packed.shape == (5, -(-columns * bits // 8))
    assert torch.equal(unpack_rows(packed, bits)[:, :columns], codes)


def test_packing_puts_low_bits_first():
    assert pack_rows(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[1 | 2 << 2 | 3 << 4]]


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8", "int8row", *BLOCKWISE])
@pytest.mark.parametrize("columns", [64, 80])
def test_stored_form_round_trips_and_has_the_promised_bytes(name, columns):
    fmt, w = Format.parse(name), torch.randn(6, columns)
    weight = store_float(w, fmt) if fmt.kind == "float" else round_to_nearest(w, fmt)
    stored = weight.tensors()
    again = Weight.from_tensors(fmt, columns, stored)
    assert torch.equal(again.dequantize(), weight.dequantize())
    promised = sum(fmt.tensor_bytes(6, columns))
    if fmt.kind == "dynamic":  # zero points: some processors only
        promised -= 6
    if not fmt.a8:  # the file packs these otherwise, see `export.layout`
        assert sum(t.nbytes for t in stored.values()) == promised


@pytest.mark.parametrize("name", BLOCKWISE)
def test_grid_values_stay_on_the_grid(name):
    w = torch.randn(8, 128)
    grid = find_grid(w, Format.parse(name))
    once = grid.nearest(w)
    assert torch.equal(grid.nearest(once), once)


@pytest.mark.parametrize("name", ["w4", "w2"])
def test_clipping_search_is_never_worse_than_the_full_range(name):
    fmt, w = Format.parse(name), torch.randn(16, 64)
    blocks = w.view(16, -1, fmt.block)
    low, high = blocks.amin(2).clamp_max(0), blocks.amax(2).clamp_min(0)
    top = 2**fmt.bits - 1
    scales = (high - low) / top
    zeros = torch.round(-low / scales)
    plain = ((torch.round(blocks / scales[..., None]) + zeros[..., None]).clamp(0, top) - zeros[..., None]) * scales[
        ..., None
    ]
    assert (find_grid(w, fmt).nearest(w) - w).square().sum() <= (plain.view_as(w) - w).square().sum()


def naive_gptq(w, hessian, grid):
    """Optimal brain quantization, column by column from the largest second moment down, with the inverse downdated after
    each (Frantar et al. 2022, eq. 2, 3)."""
    w, inverse = w.double().clone(), torch.linalg.inv(hessian.double())
    result = torch.empty_like(w)
    for i in hessian.diagonal().argsort(descending=True).tolist():
        result[:, i] = grid.nearest(w.float())[:, i].double()
        error = (w[:, i] - result[:, i]) / inverse[i, i]
        w -= error[:, None] * inverse[i][None]
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return result.float()


@pytest.mark.parametrize("name", BLOCKWISE)
def test_gptq_is_the_plain_algorithm(name, monkeypatch):
    monkeypatch.setattr("compressor.quantize.ROUNDS", 0)
    w, hessian = problem(columns=128)
    fmt = Format.parse(name)
    grid = find_grid(w, fmt, hessian.diagonal())
    ours, naive = gptq(w, Hessian(hessian), fmt).dequantize(), naive_gptq(w, hessian, grid)
    # a weight that lies between two codes may fall to either side in float32: compare what they achieve, and most codes
    assert (ours == naive).float().mean() > 0.97
    loss = lambda q: float((((q - w) @ hessian) * (q - w)).sum())  # noqa: E731
    assert loss(ours) == pytest.approx(loss(naive), rel=0.02)


@pytest.mark.parametrize("name", [*BLOCKWISE, "nf4"])
def test_descent_ends_where_no_scale_and_no_code_can_be_better(name, monkeypatch):
    w, hessian = problem(rows=6, columns=64)
    fmt, losses = Format.parse(name), []
    for rounds in (0, 1, 2, 200):
        monkeypatch.setattr("compressor.quantize.ROUNDS", rounds)
        found = gptq(w, Hessian(hessian), fmt)
        losses.append(output_loss(found, w, hessian))
    assert losses[0] > losses[1] > losses[2] >= losses[3]
    for column in (0, 33, 63):
        for step in (-1, 1):
            codes = found.codes.int()
            codes[:, column] = (codes[:, column] + step).clamp(0, 2**fmt.bits - 1)
            other = replace(found, codes=codes.to(torch.uint8))
            assert (row_losses(other, w, hessian) >= row_losses(found, w, hessian) * (1 - 1e-4)).all()
    for step in (-1, 1):
        scales = found.scales.clone()
        scales[:, 0] += step * (scales[:, 0] / 100 if found.units is None else found.units[:, 0])
        assert (row_losses(replace(found, scales=scales), w, hessian) > row_losses(found, w, hessian)).all()


@pytest.mark.parametrize("name", BLOCKWISE)
def test_scales_are_stored_in_a_byte_each(name):
    w, hessian = problem(columns=128)
    w[0, :32] *= 1e-6  # far below the unit of its row
    w[1] = 0
    for made in (round_to_nearest(w, Format.parse(name)), gptq(w, Hessian(hessian), Format.parse(name))):
        stored = made.tensors()
        assert stored["levels"].dtype == torch.uint8 and stored["levels"].min() > 0
        step = {"w6": 4, "w5": 8}.get(name, 1)  # to the highest bits of the 8-bit kernel's codes
        assert torch.equal(stored["levels"] * stored["units"] * step, made.scales)
        again = Weight.from_tensors(made.format, 128, stored)
        assert torch.equal(again.dequantize(), made.dequantize()) and not made.dequantize()[1].any()


@pytest.mark.parametrize("name", BLOCKWISE)
def test_gptq_beats_rounding(name):
    w, hessian = problem()
    fmt = Format.parse(name)
    assert output_loss(gptq(w, Hessian(hessian), fmt), w, hessian) < 0.8 * output_loss(
        round_to_nearest(w, fmt), w, hessian
    )


@pytest.mark.parametrize("name", ["w4a8", "w4a8b64"])
@pytest.mark.parametrize("shift", [0.0, 0.3, -0.3])
def test_codes_of_w4a8_become_int8_codes(name, shift):
    """Whatever the zero points: (code - zero point) * level is a whole number of at most 127, and most of these are used."""
    w, hessian = problem(columns=128)
    fmt, w = Format.parse(name), w * torch.logspace(-1, 1, len(w))[:, None] + shift
    for weight in (round_to_nearest(w, fmt), gptq(w, Hessian(hessian), fmt)):
        levels = weight.tensors()["levels"].float()
        steps = weight.codes.float().unflatten(1, (-1, fmt.block)) - weight.zeros.float()[..., None]
        codes8 = (steps * levels[..., None]).flatten(1)
        assert 90 < codes8.abs().max() <= 127
        torch.testing.assert_close(codes8 * weight.units, weight.dequantize())


def test_gptq_meets_inputs_that_are_always_zero():
    w, hessian = problem(columns=64)
    hessian[5], hessian[:, 5] = 0, 0
    assert torch.isfinite(gptq(w, Hessian(damped(hessian, 0.01)), Format.parse("w4")).dequantize()).all()


def test_dynamic_int8_quantizes_every_sequence_by_itself():
    x = torch.randn(3, 7, 16) * torch.tensor([1.0, 10.0, 100.0])[:, None, None]
    result = fake_dynamic_int8(x)
    for sequence, found in zip(x, result):
        low, high = min(float(sequence.min()), 0.0), max(float(sequence.max()), 0.0)
        scale = (high - low) / 255
        zero = round(-low / scale)
        codes = [min(max(round(float(v) / scale) + zero, 0), 255) for v in sequence.flatten()]
        naive = torch.tensor([(code - zero) * scale for code in codes]).view_as(sequence)
        torch.testing.assert_close(found, naive, atol=scale * 1e-3, rtol=0)


def test_dynamic_int8_lets_gradients_through():
    x = torch.randn(1, 4, 8, requires_grad=True)
    fake_dynamic_int8(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert fake_dynamic_int8(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "name, says", [("w7", "7"), ("q4", "choose among"), ("w4b48", "48"), ("int4", "choose among"), ("w8a8", "int8")]
)
def test_formats_without_a_kernel_are_refused(name, says):
    with pytest.raises(RecipeError, match=says):
        Format.parse(name)


@pytest.mark.parametrize("format", ["int8", "w4", "w2", "nf4"])
def test_a_matrix_of_many_rows_is_worked_on_in_parts(monkeypatch, format):
    torch.manual_seed(0)
    w_OI, fmt, x_TI = torch.randn(70, 64), Format.parse(format), torch.randn(200, 64)
    whole = quantize(w_OI, fmt, Hessian(damped(x_TI.T @ x_TI / 200, 0.01)))
    monkeypatch.setattr("compressor.quantize.ROWS", 16)
    parts = quantize(w_OI, fmt, Hessian(damped(x_TI.T @ x_TI / 200, 0.01)))
    for ours, theirs in zip(parts.tensors().values(), whole.tensors().values(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(parts.dequantize(), torch.cat([part.dequantize() for _, part in whole.row_batches()]))
