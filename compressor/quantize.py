"""Weights on a format's grid: codes, scales and zero points are made here once, and everything else reads them.

Arithmetic on tensors only; no files, no modules. Shape letters: O output rows, I input columns, G blocks along I.

    w_OI = (code_OI - zero_OG) * scale_OG          blockwise, codes and zero points unsigned; scale_OG = level_OG * unit_O,
                                                   levels unsigned, of 8 bits; of w4a8 (code - zero) * level is an int8
                                                   code (Lin et al. 2024, "QServe", section 4.1)
    w_OI = code_OI * scale_O                       dynamic int8, codes signed, symmetric
    w_OI = table[code_OI] * scale_OG               codebook

The packed layouts are those of ONNX Runtime's MatMulNBits: codes [O, G, block * bits / 8], low bits first;
zero points [O, ceil(G * bits / 8)], low bits first. Codes of 3, 5 and 6 bits lie apart in two tensors, from which those of
its 4 or 8-bit kernel are put together when a session is made, see `pack_codes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from types import MappingProxyType

import torch
from torch import Tensor, nn

from compressor.plan import FP32, Format

CHUNK = 32
"""Columns that GPTQ handles before it updates the rest."""

ROUNDS = 2
"""Of coordinate descent behind GPTQ."""

TOP_LEVEL = 255
"""Of a scale; what it is stored as, a multiple of its row's unit."""

FIRST_LEVEL = 232
"""Of the largest scale of a row at first: descent may make it larger."""

CODEBOOKS = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (
        0.0,
        1 / 192,
        2 / 3,
        1.0,
        1 / 3,
        0.5,
        1 / 6,
        0.25,
        -0.0,
        -1 / 192,
        -2 / 3,
        -1.0,
        -1 / 3,
        -0.5,
        -1 / 6,
        -0.25,
    ),
}
"""Values by code, as bitsandbytes numbers them: quantiles of a normal distribution (Dettmers et al. 2023, "QLoRA", appendix
E), and floats of a sign, two bits of exponent and one of mantissa over their largest."""

ROWS = 4096
"""Of a matrix that are worked on at once: a table of all tokens would else lie in memory several times."""

CLIP_STEPS = 16
"""Shrink factors that the clipping search tries: 1, 1 - 1/40, ..., down to about 0.6."""

CACHED = 2**18
"""Weights that it works on at once: what it makes on the way then stays in a processor's cache."""


@dataclass(frozen=True)
class Grid:
    """The representable values of one matrix: scales and zero points, before any code is chosen.

    scales: float32 [O, G] (G = 1 for int8); zeros: float32 [O, G], whole numbers. units: float32 [O, 1], of which the scales
    of blockwise formats are multiples; None for other formats.
    """

    format: Format
    scales: Tensor
    zeros: Tensor
    units: Tensor | None = None

    def to(self, device: torch.device | str) -> Grid:
        """The same grid on a device."""
        units = None if self.units is None else self.units.to(device)
        return Grid(self.format, self.scales.to(device), self.zeros.to(device), units)

    @property
    def code_range(self) -> tuple[int, int]:
        return (-127, 127) if self.format.kind == "dynamic" else (0, 2**self.format.bits - 1)

    def codes(self, w_OI: Tensor) -> Tensor:
        """Nearest codes, float32 [O, I]."""
        w, scales, zeros = self._blocks(w_OI)
        if self.format.kind == "codebook":
            return looked_up(w / scales, self.format).view(w_OI.shape)
        return (w / scales).round_().add_(zeros).clamp_(*self.code_range).view(w_OI.shape)

    def stored(self, scales_OG: Tensor, groups: slice = slice(None)) -> Tensor:
        """The nearest scales that can be stored, of some blocks of every row."""
        if self.units is None:
            return scales_OG
        top_OG = top_levels(self.format, self.zeros[:, groups])
        return (scales_OG / self.units).round_().clamp_min_(1).minimum(top_OG).mul_(self.units)

    def values(self, codes_OI: Tensor) -> Tensor:
        """What the kernel's arithmetic makes of the codes, float32 [O, I]."""
        if self.format.kind == "codebook":
            return self.times(codebook(self.format, codes_OI)[codes_OI.long()])
        codes, scales, zeros = self._blocks(codes_OI)
        return (codes - zeros).mul_(scales).view(codes_OI.shape)

    def times(self, matrix_OI: Tensor) -> Tensor:
        """A matrix times the scales of its blocks."""
        matrix, scales, _ = self._blocks(matrix_OI)
        return (matrix * scales).view(matrix_OI.shape)

    def rounder(self, group: int) -> Callable[[Tensor], Tensor]:
        """Multiples [O] of the scales of a block -> the nearest ones that have a code; may work in place."""
        if self.format.kind == "codebook":
            table = codebook(self.format, self.scales)
            return lambda x_O: table[looked_up(x_O, self.format).long()]
        zero_O, (low, high) = self.zeros[:, group], self.code_range
        lowest_O, highest_O = low - zero_O, high - zero_O
        return lambda x_O: x_O.round_().clamp_(lowest_O, highest_O)

    def codes_of(self, multiples_OI: Tensor) -> Tensor:
        """Codes, float32 [O, I], of multiples of the scales that have one."""
        if self.format.kind == "codebook":
            return looked_up(multiples_OI, self.format)
        multiples, _, zeros = self._blocks(multiples_OI)
        return (multiples + zeros).view(multiples_OI.shape)

    def nearest(self, w_OI: Tensor) -> Tensor:
        """`w_OI` rounded to the grid."""
        return self.values(self.codes(w_OI))

    def _blocks(self, matrix_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(matrix, scales, zeros) in shapes that broadcast: blocks apart where they divide the columns, else full rows."""
        columns = matrix_OI.shape[1]
        if self.scales.shape[1] == 1:
            return matrix_OI, self.scales, self.zeros
        block = self.format.block
        if columns % block == 0:
            return matrix_OI.unflatten(1, (-1, block)), self.scales.unsqueeze(2), self.zeros.unsqueeze(2)
        scales, zeros = (side.repeat_interleave(block, 1)[:, :columns] for side in (self.scales, self.zeros))
        return matrix_OI, scales, zeros


def top_levels(format: Format, zeros_OG: Tensor) -> Tensor:
    """The largest levels that scales may have beside their zero points."""
    if not format.a8:
        return torch.full_like(zeros_OG, TOP_LEVEL)
    return (127 / torch.maximum(zeros_OG, 2**format.bits - 1 - zeros_OG)).floor_()


def codebook(format: Format, like: Tensor) -> Tensor:
    """The values of a codebook format by code, float32 [16], beside a tensor."""
    return torch.tensor(CODEBOOKS[format.name], device=like.device)


def looked_up(x: Tensor, format: Format) -> Tensor:
    """Codes, float32, of the values of a codebook that are nearest to x."""
    values, order = codebook(format, x).sort()
    return order[torch.bucketize(x, (values[1:] + values[:-1]) / 2)].float()


PARTS = ("values", "codes", "scales", "zeros", "units", "bias")
"""Tensors of a weight, those that it has."""

STORED_PARTS = ("values", "codes", "low", "high", "scales", "levels", "units", "zeros", "bias")
"""Tensors of its stored form: of blockwise formats `Format.planes`, levels and units, of others codes and scales."""


@dataclass(frozen=True)
class Weight:
    """A stored [O, I] matrix: float values, or codes on a grid.

    values: [O, I] float32 or float16 when the format is float, else None.
    codes: [O, I] uint8 (blockwise) or int8 (dynamic); scales [O, G] float32; zeros [O, G] uint8 or None; units [O, 1] float32
    or None, see `Grid`.
    bias: [O] float32, added to what the matrix gives; None where there is none.
    """

    format: Format
    values: Tensor | None = None
    codes: Tensor | None = None
    scales: Tensor | None = None
    zeros: Tensor | None = None
    units: Tensor | None = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        stored = self.values if self.values is not None else self.codes
        assert stored is not None
        return stored.shape[0], stored.shape[1]

    @property
    def grid(self) -> Grid | None:
        """The grid on which this weight lies; None for float formats."""
        if self.scales is None:
            return None
        if self.zeros is not None:
            zeros = self.zeros.float()
        else:
            centre = 2.0 ** (self.format.bits - 1) if self.format.kind == "blockwise" else 0.0
            zeros = torch.full_like(self.scales, centre)
        return Grid(self.format, self.scales, zeros, self.units)

    def to(self, device: torch.device | str) -> Weight:
        """The same weight on a device."""
        moved = {name: t.to(device) for name in PARTS if (t := getattr(self, name)) is not None}
        return replace(self, **moved)

    def dequantize(self) -> Tensor:
        """The matrix that the deployed kernel multiplies with, float32 [O, I]."""
        rows = self.shape[0]
        if self.values is None and rows > ROWS:
            assert self.codes is not None
            whole_OI = torch.empty(self.shape, device=self.codes.device)
            for place, part in self.row_batches():
                whole_OI[place] = part.dequantize()
            return whole_OI
        grid = self.grid
        if grid is None:
            assert self.values is not None
            return self.values.float()
        assert self.codes is not None
        return grid.values(self.codes.float())

    def tensors(self) -> dict[str, Tensor]:
        """The stored form, codes in the layout of the deployed kernel: those of `STORED_PARTS` that there are."""
        bias = {} if self.bias is None else {"bias": self.bias}
        if self.values is not None:
            return {"values": self.values, **bias}
        assert self.codes is not None and self.scales is not None
        if self.format.kind == "dynamic":
            return {"codes": self.codes, "scales": self.scales, **bias}
        stored = pack_codes(self.codes, self.format) | bias
        if self.units is None:
            return stored | {"scales": self.scales}
        levels = (self.scales / self.units).round().to(torch.uint8)
        stored |= {"levels": levels, "units": self.units / _codes_step(self.format)}
        if self.zeros is not None:
            stored["zeros"] = pack_rows(self.zeros, self.format.kernel_bits)
        return stored

    @classmethod
    def from_tensors(cls, format: Format, columns: int, stored: Mapping[str, Tensor]) -> Weight:
        """The inverse of `tensors`; `columns` is I, which padding hides."""
        bias = stored.get("bias")
        if format.kind == "float":
            return cls(format, values=stored["values"], bias=bias)
        codes = stored["codes"] if format.kind == "dynamic" else unpack_codes(stored, format)[:, :columns]
        if format.kind != "blockwise":
            return cls(format, codes=codes, scales=stored["scales"], bias=bias)
        units, zeros = stored["units"] * _codes_step(format), stored.get("zeros")
        scales = stored["levels"] * units
        if zeros is not None:
            zeros = unpack_rows(zeros, format.kernel_bits)[:, : scales.shape[1]]
        return cls(format, codes=codes, scales=scales, zeros=zeros, units=units, bias=bias)

    @classmethod
    def on_grid(cls, grid: Grid, w_OI: Tensor) -> Weight:
        """`w_OI` rounded to the nearest values of `grid`."""
        dtype = torch.int8 if grid.format.kind == "dynamic" else torch.uint8
        zeros = grid.zeros.to(torch.uint8) if grid.format.has_zeros else None
        return cls(grid.format, codes=grid.codes(w_OI).to(dtype), scales=grid.scales, zeros=zeros, units=grid.units)

    @classmethod
    def concatenate(cls, parts: list[Weight]) -> Weight:
        """Stack matrices of one format and one input along the output rows."""

        def stack(name: str) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors)

        return cls(parts[0].format, *map(stack, PARTS))

    def rows(self, start: int, stop: int) -> Weight:
        """The matrix of output rows `start` to `stop`."""

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:stop]

        return Weight(self.format, *(cut(getattr(self, name)) for name in PARTS))

    def row_batches(self) -> Iterator[tuple[slice, Weight]]:
        """The matrix in parts of at most `ROWS` output rows."""
        for start in range(0, self.shape[0], ROWS):
            yield slice(start, start + ROWS), self.rows(start, start + ROWS)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [O, N] of `bits` -> bytes [O, ceil(N * bits / 8)], low bits first."""
    if bits == 8:
        return codes.contiguous()
    per_byte = 8 // bits
    padded = nn.functional.pad(codes, (0, -codes.shape[1] % per_byte)).unflatten(1, (-1, per_byte))
    packed = codes.new_zeros(padded.shape[:2])
    for index in range(per_byte):
        packed |= padded[:, :, index] << (bits * index)
    return packed


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`, with the padding: bytes [O, M] -> uint8 codes [O, M * 8 / bits]."""
    if bits == 8:
        return packed
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(1)


def pack_codes(codes_OI: Tensor, format: Format) -> dict[str, Tensor]:
    """uint8 codes [O, I] -> tensors by the names of `Format.planes`.

    Codes of a width that a kernel reads are its bytes K [O, G, M], M = block * bits / 8. Of others a plane takes `width`
    bits of every code in K, those at `place`: its byte j has them of the bytes j, j + M / n, j + 2 M / n, ... of K, the first
    one lowest, n = bits of the kernel / width; [O, G, M / n].
    """
    padded = nn.functional.pad(codes_OI, (0, -codes_OI.shape[1] % format.block)) * _codes_step(format)
    bytes_OGM = pack_rows(padded, format.kernel_bits).unflatten(1, (-1, format.block * format.kernel_bits // 8))
    if len(format.planes) == 1:
        return dict.fromkeys(format.planes, bytes_OGM)
    planes = {}
    for name, (width, place) in format.planes.items():
        parts = (bytes_OGM & format.mask(name)).chunk(format.kernel_bits // width, 2)
        planes[name] = reduce(torch.bitwise_or, (shifted(part, width * i - place) for i, part in enumerate(parts)))
    return planes


def unpack_codes(stored: Mapping[str, Tensor], format: Format) -> Tensor:
    """The inverse of `pack_codes`, with the padding: uint8 codes [O, G * block]."""
    planes = [stored[name] for name in format.planes]
    if len(planes) > 1:
        whole = []
        for name, (width, place) in format.planes.items():
            fields = range(format.kernel_bits // width)
            whole.append(torch.cat([shifted(stored[name], place - width * i) for i in fields], 2) & format.mask(name))
        planes = [whole[0] | whole[1]]
    return unpack_rows(planes[0].flatten(1), format.kernel_bits) // _codes_step(format)


def shifted(x: Tensor, by: int) -> Tensor:
    """Bytes, shifted left, or right by less than 0; what goes beyond a byte is lost."""
    return x << by if by >= 0 else x >> -by


def _codes_step(format: Format) -> int:
    """Between two codes of a format, in the kernel's codes."""
    return 2 ** (8 - format.bits) if format.kernel_bits == 8 else 1


def find_grid(w_OI: Tensor, format: Format, importance_I: Tensor | None = None) -> Grid:
    """Scales and zero points for `w_OI`.

    Blockwise: min-max of every block, codebook: its absolute maximum; then a search over shrunken ranges for the least
    squared error, weighted by `importance_I` (the diagonal of the input's second moment) where given; blockwise scales then
    go up to the next multiple of their unit, so that nothing else is clipped. Int8: the row's absolute maximum.

    Args:
        w_OI: float32 weights.
        format: a `dynamic`, `blockwise` or `codebook` format.
        importance_I: non-negative float32 [I].
    """
    if format.kind == "dynamic":
        scales = (w_OI.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
        return Grid(format, scales, torch.zeros_like(scales))
    assert format.kind in ("blockwise", "codebook"), format
    parts = [_clipped(w_RI, format, importance_I) for w_RI in w_OI.split(max(1, CACHED // w_OI.shape[1]))]
    scales, zeros = map(torch.cat, zip(*parts, strict=True))
    if format.kind == "codebook":
        return Grid(format, scales, zeros)
    top_OG = top_levels(format, zeros)
    units = (scales / (top_OG / TOP_LEVEL * FIRST_LEVEL)).amax(1, keepdim=True)
    return Grid(format, (scales / units).ceil_().clamp_min_(1).minimum(top_OG).mul_(units), zeros, units)


def _clipped(w_OI: Tensor, format: Format, importance_I: Tensor | None) -> tuple[Tensor, Tensor]:
    """(scales, zero points) [O, G] of the clipping search."""
    columns = w_OI.shape[1]
    pad = -columns % format.block
    w_OGB = nn.functional.pad(w_OI, (0, pad)).unflatten(1, (-1, format.block))
    importance = w_OI.new_ones(columns) if importance_I is None else importance_I
    importance_GB = nn.functional.pad(importance, (0, pad)).view(-1, format.block).to(w_OI)
    top_code = 2**format.bits - 1
    low, high = w_OGB.amin(2).clamp_max(0), w_OGB.amax(2).clamp_min(0)
    if not format.has_zeros:
        high = torch.maximum(high, -low)
        low = -high
    best_error = torch.full_like(low, torch.inf)
    best_scales, best_zeros = torch.ones_like(low), torch.zeros_like(low)
    for step in range(CLIP_STEPS if format.bits < 8 else 1):
        shrink = 1 - step / 40
        scales = ((high - low) * shrink / (2 if format.kind == "codebook" else top_code)).clamp_min(1e-12)
        if format.has_zeros:
            zeros = torch.round(-low * shrink / scales).clamp_(0, top_code)
        else:
            zeros = torch.full_like(scales, 2.0 ** (format.bits - 1))
        if format.kind == "codebook":
            values = codebook(format, w_OGB)[looked_up(w_OGB / scales.unsqueeze(2), format).long()]
        else:
            codes = (torch.round(w_OGB / scales.unsqueeze(2)) + zeros.unsqueeze(2)).clamp_(0, top_code)
            values = codes - zeros.unsqueeze(2)
        error = (values.mul_(scales.unsqueeze(2)).sub_(w_OGB).square_() * importance_GB).sum(2)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scales, best_zeros = torch.where(better, scales, best_scales), torch.where(better, zeros, best_zeros)
    return best_scales, best_zeros


def store_float(w_OI: Tensor, format: Format) -> Weight:
    """The matrix in a float format."""
    assert format.kind == "float", format
    return Weight(format, values=w_OI.to(torch.float16 if format.bits == 16 else torch.float32).contiguous())


def as_floats(dense: Mapping[str, Tensor], biases: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, Weight]:
    """Matrices as they are, in float32, with their biases."""
    return {name: Weight(FP32, values=w_OI, bias=biases.get(name)) for name, w_OI in dense.items()}


def round_to_nearest(w_OI: Tensor, format: Format) -> Weight:
    """The reference that GPTQ must beat: every weight to the nearest value of its grid."""
    return Weight.concatenate([Weight.on_grid(find_grid(w_RI, format), w_RI) for w_RI in w_OI.split(ROWS)])


@dataclass(frozen=True)
class Hessian:
    """H = X^T X, the second moment of what a matrix reads, times any positive number; what is factored of it serves all
    formats.

    Raises:
        torch.linalg.LinAlgError: it is not positive definite, see `damped` (non-finite activations).
    """

    moment_II: Tensor

    @cached_property
    def order_I(self) -> Tensor:
        """Columns by what they read, the largest second moment first."""
        return self.moment_II.diagonal().argsort(descending=True, stable=True)

    @cached_property
    def upper_II(self) -> Tensor:
        """U, upper triangular, with U^T U = H^-1, rows and columns in `order_I`."""
        ordered_II = self.moment_II[self.order_I][:, self.order_I]
        inverse_II = torch.cholesky_inverse(torch.linalg.cholesky(ordered_II))
        return torch.linalg.cholesky(inverse_II, upper=True)


def damped(moment_II: Tensor, damping: float) -> Tensor:
    """A second moment with `damping` times its mean diagonal added; inputs that were always zero get a unit diagonal."""
    moment = moment_II.clone()
    diagonal = moment.diagonal()
    diagonal[diagonal == 0] = 1
    return moment + torch.eye(len(moment), device=moment.device) * (damping * moment.diagonal().mean())


def quantize(w_OI: Tensor, format: Format, hessian: Hessian | None = None) -> Weight:
    """The matrix in any format: blockwise by GPTQ where its input's Hessian is given, else to the nearest values."""
    if format.kind == "float":
        return store_float(w_OI, format)
    if format.kind == "dynamic" or hessian is None:
        return round_to_nearest(w_OI, format)
    return gptq(w_OI, hessian, format)


def quantize_together(dense: Mapping[str, Tensor], format: Format, hessian: Hessian | None = None) -> dict[str, Weight]:
    """Matrices that read one input, as `quantize` does."""
    stacked = quantize(torch.cat(list(dense.values())), format, hessian)
    weights, row = {}, 0
    for name, w_OI in dense.items():
        weights[name] = stacked.rows(row, row + len(w_OI))
        row += len(w_OI)
    return weights


def gptq(w_OI: Tensor, hessian: Hessian, format: Format) -> Weight:
    """Quantize column by column; what rounding a column loses is taken up by the columns not yet rounded.

    With U the upper Cholesky factor of H^-1, for every column i:
        q_i = round(w_i);  e = (w_i - q_i) / U_ii;  w_j -= e U_ij  for j > i
    Source: Frantar et al. 2022, "GPTQ", Algorithm 1; columns in order of falling H_ii, as in its implementation. Departures:
    clipped grids found beforehand on the original weights, weighted by diag(H), so that blocks are those of the kernel in any
    order; `ROUNDS` of descent behind it, see `_descended`.

    Args:
        w_OI: float32 weights.
        hessian: float32, damped.
        format: a `blockwise` or `codebook` format.
    """
    return Weight.concatenate([_gptq(w_RI, hessian, format) for w_RI in w_OI.split(ROWS)])


def _gptq(w_OI: Tensor, hessian: Hessian, format: Format) -> Weight:
    grid = find_grid(w_OI, format, hessian.moment_II.diagonal())
    w_IO = w_OI.T.contiguous()  # columns as rows: one column's update then touches contiguous memory
    multiples_IO = _compensated(w_IO, hessian, grid)
    for _ in range(ROUNDS):
        grid = _descended(w_IO, hessian.moment_II, grid, multiples_IO)
    codes_OI = grid.codes_of(multiples_IO.T.contiguous()).to(torch.uint8)
    zeros = grid.zeros.to(torch.uint8) if format.has_zeros else None
    return Weight(format, codes=codes_OI, scales=grid.scales, zeros=zeros, units=grid.units)


def _compensated(w_IO: Tensor, hessian: Hessian, grid: Grid) -> Tensor:
    """Multiples [I, O] of the scales by GPTQ on a given grid."""
    order_I, upper_II, block = hessian.order_I, hessian.upper_II, grid.format.block
    groups = [(grid.scales[:, group].contiguous(), grid.rounder(group)) for group in range(grid.scales.shape[1])]
    left_IO, multiples_IO = w_IO[order_I], torch.empty_like(w_IO)
    columns = order_I.tolist()
    for start in range(0, len(columns), CHUNK):
        stop = min(start + CHUNK, len(columns))
        left_iO, upper_ii = left_IO[start:stop], upper_II[start:stop, start:stop]
        error_iO = torch.empty_like(left_iO)
        for i, column in enumerate(columns[start:stop]):
            scale_O, rounded = groups[column // block]
            multiples_IO[column] = rounded(left_iO[i] / scale_O)
            torch.addcmul(left_iO[i], multiples_IO[column], scale_O, value=-1, out=error_iO[i]).div_(upper_ii[i, i])
            left_iO[i + 1 :].addr_(upper_ii[i, i + 1 :], error_iO[i], alpha=-1)
        left_IO[stop:].addmm_(upper_II[start:stop, stop:].T, error_iO, alpha=-1)
    return multiples_IO


def _descended(w_IO: Tensor, moment_II: Tensor, grid: Grid, multiples_IO: Tensor) -> Grid:
    """A round of coordinate descent on the output error sum_o d_o H d_o, d = W' - W: block by block its scales, the stored
    ones nearest to the closed form, then each of its codes, everything else being given. No step makes it worse. The
    multiples [I, O] of the scales are changed in place, the new scales returned.

    Source: Behdin et al. 2023, "QuantEase", Algorithm 1, for the codes; the scales are ours.
    """
    grid = replace(grid, scales=grid.scales.clone())
    apart_IO, block = grid.times(multiples_IO.T).T.sub(w_IO).contiguous(), grid.format.block
    for group, start in enumerate(range(0, len(w_IO), block)):
        here = slice(start, min(start + block, len(w_IO)))
        multiples_iO, moment_ii, scale_O = multiples_IO[here], moment_II[here, here], grid.scales[:, group]
        slope_iO = moment_II[here] @ apart_IO
        curved_iO = moment_ii @ multiples_iO
        step_O = (multiples_iO * slope_iO).sum(0) / (multiples_iO * curved_iO).sum(0).clamp_min(1e-30)
        step_O = torch.where(step_O < scale_O, step_O, 0.0)  # a scale stays above 0
        step_O = scale_O - grid.stored((scale_O - step_O)[:, None], slice(group, group + 1))[:, 0]
        scale_O -= step_O
        slope_iO.sub_(curved_iO * step_O).div_(scale_O)
        rounded, curvature_i = grid.rounder(group), moment_ii.diagonal().tolist()
        for i, multiple_O in enumerate(multiples_iO):
            moved_O = rounded(torch.add(multiple_O, slope_iO[i], alpha=-1 / curvature_i[i])).sub_(multiple_O)
            slope_iO[i + 1 :].addr_(moment_ii[i + 1 :, i], moved_O)
            multiple_O += moved_O
        torch.sub(multiples_iO * scale_O, w_IO[here], out=apart_IO[here])
    return grid


def fake_dynamic_int8(x_BLD: Tensor) -> Tensor:
    """What DynamicQuantizeLinear leaves of an activation: uint8, one scale for each sequence of the batch.

    The kernel sees one tensor per run, so every sequence is quantized as if it ran alone. Straight-through
    for gradients (torch's fake quantization passes them where nothing was clipped, and nothing is).
    """
    return torch.stack([_fake_uint8(x_LD) for x_LD in x_BLD])


def _fake_uint8(x: Tensor) -> Tensor:
    low, high = torch.aminmax(x.detach().float())
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = ((high - low) / 255).clamp_min(1e-12)
    zero = torch.round(-low / scale).clamp_(0, 255).to(torch.int32)
    return torch.fake_quantize_per_tensor_affine(x.float(), scale, zero, 0, 255).to(x.dtype)


def fake_row_int8(x_BLI: Tensor) -> Tensor:
    """What LLM.int8() without outliers leaves of its input: int8, symmetric, one scale for each row (Dettmers et al. 2022,
    section 2.1). Straight-through for gradients."""
    return x_BLI + (fake_block_int8(x_BLI, x_BLI.shape[-1]) - x_BLI).detach()


def fake_block_int8(x_BLI: Tensor, block: int) -> Tensor:
    """What MatMulNBits at accuracy level 4 leaves of its input: int8, symmetric, one scale for `block` columns of a row."""
    columns = x_BLI.shape[-1]
    x = nn.functional.pad(x_BLI, (0, -columns % block)).unflatten(-1, (-1, block))
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 127
    return (torch.round(x / scale) * scale).flatten(-2)[..., :columns]
