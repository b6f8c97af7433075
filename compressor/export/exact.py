"""The deployed graph without the rounding of activations: the same weights and the same nodes, in plain float32.

The deployed kernels round what they read to int8. In a deep network a difference in the last bit of a float flips some of
these codes, and the flips of one layer make more in the next, so that two correct programs end as far apart as the
rounding itself is from none. What torch and ONNX Runtime compute can be compared sharply only without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir


@contextmanager
def exact_graph(deployed: Path) -> Iterator[Path]:
    """Path of a graph beside the deployed one, on the same weights, without rounding; gone when the context ends."""
    model = ir.load(deployed)
    _in_float32(model.graph)
    _without_rounding(model.graph)
    path = deployed.with_name(f".{deployed.name}.exact")
    try:
        path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _in_float32(graph: ir.Graph) -> None:
    """Every float16 that goes in, comes out, or is stored or made as a constant, as a float32: all nodes follow."""
    half, full = ir.DataType.FLOAT16, ir.DataType.FLOAT
    for value in (*graph.inputs, *graph.outputs):
        if value.dtype == half:
            value.dtype = full
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
            node.attributes["to"] = ir.AttrInt64("to", full.value)
    for name, value in graph.initializers.items():
        if value.dtype == half:
            uses, cast = list(value.uses()), ir.node("Cast", [value], {"to": full.value})
            cast.outputs[0].name = f"{name}.exact"
            for node, index in uses:
                node.replace_input_with(index, cast.outputs[0])
            graph.insert_before(graph[0], cast)


def _without_rounding(graph: ir.Graph) -> None:
    """MatMulNBits at accuracy level 0; MatMulIntegerToFloat of a quantized activation as MatMul of the activation itself."""
    for node in list(graph):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        elif node.op_type == "MatMulIntegerToFloat":
            x, (codes, scales) = node.inputs[0].producer().inputs[0], (node.inputs[1], node.inputs[3])  # type: ignore[union-attr]
            zeros, bias = (node.inputs[i] if len(node.inputs) > i else None for i in (5, 6))
            # plain arithmetic: ONNX Runtime makes a rounding MatMulNBits out of DequantizeLinear and MatMul
            made = [ir.node("Cast", [codes], {"to": ir.DataType.FLOAT.value})]
            if zeros is not None:
                made.append(ir.node("Cast", [zeros], {"to": ir.DataType.FLOAT.value}))
                made.append(ir.node("Sub", [made[0].outputs[0], made[1].outputs[0]]))
            made.append(ir.node("Mul", [made[-1].outputs[0], scales]))
            made.append(ir.node("MatMul", [x, made[-1].outputs[0]]))
            if bias is not None:
                made.append(ir.node("Add", [made[-1].outputs[0], bias]))
            for number, plain in enumerate(made):
                plain.outputs[0].name = f"{node.outputs[0].name}.exact.{number}"
            graph.insert_before(node, made)
            node.outputs[0].replace_all_uses_with(made[-1].outputs[0], replace_graph_outputs=True)
            graph.remove(node, safe=True)
