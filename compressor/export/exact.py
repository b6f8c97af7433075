"""The deployed graph without the rounding of activations: the same weights and the same nodes, in plain float32 products.

The deployed kernels round what they read to int8. In a deep network a difference in the last bit of a float flips some of
these codes, and the flips of one layer make more in the next, so that two correct programs end as far apart as the
rounding itself is from none. What torch and ONNX Runtime compute can be compared sharply only without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from compressor.export.files import GRAPH_FILE


@contextmanager
def exact_graph(folder: Path) -> Iterator[Path]:
    """Path of a graph beside the folder's own, on the same weights, without rounding; gone when the context ends."""
    model = ir.load(folder / GRAPH_FILE)
    _without_rounding(model.graph)
    path = folder / f".{GRAPH_FILE}.exact"
    try:
        path.write_bytes(ir.serde.serialize_model(model).SerializeToString())
        yield path
    finally:
        path.unlink(missing_ok=True)


def _without_rounding(graph: ir.Graph) -> None:
    """MatMulNBits at accuracy level 0; MatMulIntegerToFloat of a quantized activation as MatMul of the activation itself."""
    for node in list(graph):
        if node.op_type == "MatMulNBits":
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", 0)
        elif node.op_type == "MatMulIntegerToFloat":
            x = node.inputs[0].producer().inputs[0]  # type: ignore[union-attr]
            zeros = node.inputs[5:6]
            weight = ir.node("DequantizeLinear", [node.inputs[1], node.inputs[3], *zeros], {"axis": 1})
            weight.outputs[0].name = f"{node.outputs[0].name}.weight"
            plain = [weight, ir.node("MatMul", [x, weight.outputs[0]])]
            if len(node.inputs) > 6:
                plain.append(ir.node("Add", [plain[-1].outputs[0], node.inputs[6]]))
            for number, made in enumerate(plain[1:]):
                made.outputs[0].name = f"{node.outputs[0].name}.exact.{number}"
            graph.insert_before(node, plain)
            node.outputs[0].replace_all_uses_with(plain[-1].outputs[0], replace_graph_outputs=True)
            graph.remove(node, safe=True)
