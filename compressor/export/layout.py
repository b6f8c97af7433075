"""How a weight matrix lies in the exported file: arrays in the layout of the kernel that reads them.

Knows formats and numpy, neither graphs nor files.

    float       values [O, I] float32 or float16
    blockwise   codes [O, G, block * bits / 8] uint8, levels [O, G] uint8, units [O, 1] float32, zeros [O, ceil(G * bits / 8)]
                uint8; the scales that the kernel reads, levels * units, are computed when a session is made, and so are
                its codes where these are of 3, 5 or 6 bits, in two tensors: `low` and `high`
    w4a8        codes [O, I] uint4, levels [O, G] uint8, zeros [O, G] uint4, units [O] float32; the int8 codes that the kernel
                reads are computed when a session is made
    int8        codes [I, O] int8, scales [O] floats; where int8 products saturate, codes uint8 and zeros [O] = 128

and a bias [O] floats where there is one; floats are what the graph computes in, float32 or float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper

from compressor.plan import Format
from compressor.quantize import Weight, pack_codes, pack_rows

UINT4 = helper.tensor_dtype_to_np_dtype(TensorProto.UINT4)
"""A byte an element in memory, half of one in a file."""


@dataclass(frozen=True)
class Stored:
    """A [rows, columns] = [output, input] matrix as arrays of the file, by the names of `quantize.STORED_PARTS`."""

    format: Format
    rows: int
    columns: int
    arrays: dict[str, np.ndarray]

    @classmethod
    def of(cls, weight: Weight, floats: np.dtype) -> Stored:
        rows, columns = weight.shape
        arrays = {part: tensor.detach().numpy() for part, tensor in weight.tensors().items()}
        if weight.format.kind == "dynamic":
            arrays["codes"] = np.ascontiguousarray(arrays["codes"].T)
            arrays["scales"] = arrays["scales"].reshape(rows)
            if not int8_products_are_exact():
                # the same grid, shifted: (code + 128 - 128) * scale
                arrays["codes"] = (arrays["codes"].astype(np.int16) + 128).astype(np.uint8)
                arrays["zeros"] = np.full(rows, 128, np.uint8)
        if weight.format.a8:
            assert weight.codes is not None and weight.zeros is not None
            arrays |= {"codes": weight.codes.numpy().astype(UINT4), "zeros": weight.zeros.numpy().astype(UINT4)}
            arrays["units"] = arrays["units"].reshape(rows)
        arrays |= {part: arrays[part].astype(floats, copy=False) for part in ("scales", "bias") if part in arrays}
        return cls(weight.format, rows, columns, arrays)

    @classmethod
    def blank(cls, format: Format, rows: int, columns: int, bias: bool, floats: np.dtype) -> Stored:
        """All zeros, in no memory: for measuring the graph alone."""
        shapes = layout(format, rows, columns, bias, floats)
        return cls(
            format,
            rows,
            columns,
            {part: np.broadcast_to(dtype.type(0), shape) for part, (dtype, shape) in shapes.items()},
        )

    @classmethod
    def random(
        cls, rng: np.random.Generator, format: Format, rows: int, columns: int, bias: bool, floats: np.dtype
    ) -> Stored:
        """Weights of a plausible size, for timing."""
        arrays: dict[str, np.ndarray] = {}
        for part, (dtype, shape) in layout(format, rows, columns, bias, floats).items():
            if part in ("scales", "units"):
                arrays[part] = np.full(shape, (0.1 if part == "scales" else 1e-3) / 2**format.bits, dtype)
            elif dtype == UINT4:
                arrays[part] = rng.integers(16, size=shape, dtype=np.uint8).astype(dtype)
            elif np.issubdtype(dtype, np.floating):
                arrays[part] = (rng.random(shape, np.float32) * 0.1 - 0.05).astype(dtype)
            else:
                arrays[part] = np.frombuffer(rng.bytes(int(np.prod(shape))), dtype).reshape(shape)
        return cls(format, rows, columns, arrays)

    def weight(self) -> Weight:
        """The inverse of `of`: the same values, codes, levels, units and zero points; other floats as they were rounded."""
        arrays = dict(self.arrays)
        if self.format.kind == "dynamic":
            if arrays.pop("zeros", None) is not None:
                arrays["codes"] = (arrays["codes"].astype(np.int16) - 128).astype(np.int8)
            arrays["codes"] = arrays["codes"].T
            arrays["scales"] = arrays["scales"].reshape(self.rows, 1)
        if self.format.a8:
            codes, zeros = (torch.from_numpy(arrays[part].astype(np.uint8)) for part in ("codes", "zeros"))
            arrays["codes"] = pack_codes(codes, self.format)["codes"].numpy()
            arrays["zeros"] = pack_rows(zeros, self.format.bits).numpy()
            arrays["units"] = arrays["units"].reshape(self.rows, 1)
        # copies: the arrays may be read-only views of a mapped file
        tensors = {part: torch.from_numpy(np.array(array, order="C")) for part, array in arrays.items()}
        tensors |= {part: tensors[part].float() for part in ("scales", "bias") if part in tensors}
        return Weight.from_tensors(self.format, self.columns, tensors)


def layout(
    format: Format, rows: int, columns: int, bias: bool, floats: np.dtype
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """(numpy type, shape) of every array of a [rows, columns] matrix."""
    byte, values = np.dtype(np.uint8), np.dtype(np.float16 if format.bits == 16 else np.float32)
    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {"bias": (floats, (rows,))} if bias else {}
    if format.kind == "float":
        return shapes | {"values": (values, (rows, columns))}
    if format.kind == "dynamic":
        if int8_products_are_exact():
            return shapes | {"codes": (np.dtype(np.int8), (columns, rows)), "scales": (floats, (rows,))}
        return shapes | {"codes": (byte, (columns, rows)), "scales": (floats, (rows,)), "zeros": (byte, (rows,))}
    blocks = -(-columns // format.block)
    if format.a8:
        shapes |= {
            "codes": (UINT4, (rows, columns)),
            "levels": (byte, (rows, blocks)),
            "zeros": (UINT4, (rows, blocks)),
        }
        return shapes | {"units": (np.dtype(np.float32), (rows,))}
    shapes |= {name: (byte, (rows, blocks, format.block * width // 8)) for name, (width, _) in format.planes.items()}
    shapes |= {"levels": (byte, (rows, blocks)), "units": (np.dtype(np.float32), (rows, 1))}
    return shapes | ({"zeros": (byte, (rows, -(-blocks * format.kernel_bits // 8)))} if format.has_zeros else {})


@cache
def int8_products_are_exact() -> bool:
    """Whether this processor multiplies uint8 activations with int8 weights exactly.

    x86 without VNNI adds two products in saturating int16; a product that would saturate is compared with the
    exact one, with one row and with several, which take different kernels.
    """
    inner, columns = 64, 32
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", inner])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, ["rows", columns])],
        [helper.make_tensor("w", TensorProto.INT8, [inner, columns], [127] * (inner * columns))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    products = (session.run(None, {"x": np.full((rows, inner), 255, np.uint8)})[0] for rows in (1, 16))
    return all((product == 255 * 127 * inner).all() for product in products)
