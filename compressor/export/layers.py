"""What the ONNX graphs of students are made of, with onnx-ir: nodes, matrices in every format, norms, sub-layers.

Knows nothing of files or sessions: a `store` callable says where a tensor's bytes go. Every sub-layer is one
function, which the whole model and the latency table's stacks share, so that what is timed is what is deployed.

    float       FusedMatMul(transB) on [O, I]; of other floats than the graph's through a Cast, which ONNX Runtime folds when
                the session is made
    blockwise   MatMulNBits, accuracy_level 4 (activations in int8 blocks); embedding: GatherBlockQuantized
    int8, w4a8  DynamicQuantizeLinear (shared by the matrices that read one input), MatMulIntegerToFloat; float32 graphs only
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from compressor.export import layout
from compressor.export.layout import Stored
from compressor.plan import Action, Format, Formats
from compressor.student import Decoder, Experts

OPSETS = {"": 21, "com.microsoft": 1}
FUNCTIONS = "compressor"
"""Domain of the graph's own functions."""
IR_VERSION = 10

Attribute = int | float | str | Sequence[int]

Store = Callable[[str, np.ndarray], ir.TensorProtocol]
"""(name, array) -> the tensor, in memory or in a data file."""

Matrices = Callable[[tuple[str, ...]], Stored]
"""Names of matrices that share format and input -> the one matrix of all their rows."""

Past = tuple[ir.Value, ir.Value]
"""Keys and values that an earlier run gave, [B, H, past, head_dim] each."""


class GraphBuilder:
    """Collects nodes and initializers in order; every tensor is stored once, however many nodes read it.

    floats: what the graph computes in, float32 or float16.
    """

    def __init__(self, store: Store, floats: np.dtype):
        self.floats, self.float_type = floats, ir.DataType.from_numpy(floats)
        self.nodes: list[ir.Node] = []
        self.initializers: dict[str, ir.Value] = {}
        self.inputs: list[ir.Value] = []
        self.outputs: list[ir.Value] = []
        self._store = store
        self._quantized: dict[ir.Value, tuple[ir.Value, ...]] = {}
        self._scales: dict[str, ir.Value] = {}
        self._codes: dict[str, ir.Value] = {}
        self._functions: dict[str, ir.Function] = {}

    def op(self, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Attribute) -> ir.Value:
        """One node of the standard operators with one output, called `name`."""
        return self.node("", kind, inputs, [name], attributes)[0]

    def ms(self, kind: str, inputs: Sequence[ir.Value | None], name: str, **attributes: Attribute) -> ir.Value:
        """One node of ONNX Runtime's own operators with one output, called `name`."""
        return self.node("com.microsoft", kind, inputs, [name], attributes)[0]

    def node(
        self, domain: str, kind: str, inputs: Sequence[ir.Value | None], names: list[str], attributes: Mapping
    ) -> list[ir.Value]:
        outputs = [ir.Value(name=name) for name in names]
        self.nodes.append(ir.node(kind, inputs, attributes, domain=domain, outputs=outputs))
        return outputs

    def input(self, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        self.inputs.append(ir.val(name, dtype, shape))
        return self.inputs[-1]

    def default(self, name: str, array: np.ndarray) -> ir.Value:
        """An input that need not be fed."""
        self.inputs.append(self.small(name, array))
        return self.inputs[-1]

    def output(self, value: ir.Value, name: str, shape: list[int | str]) -> None:
        value.name, value.type, value.shape = name, ir.TensorType(self.float_type), ir.Shape(shape)
        self.outputs.append(value)

    def small(self, name: str, array: np.ndarray) -> ir.Value:
        """A constant of a few bytes, kept inside the graph."""
        if name not in self.initializers:
            self._initializer(name, ir.tensor(array, name=name))
        return self.initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """A constant list of integers."""
        return self.small(f"integers.{'.'.join(map(str, values))}", np.array(values, np.int64))

    def number(self, name: str, number: float) -> ir.Value:
        """A constant of the graph's floats."""
        return self.small(name, np.array(number, self.floats))

    def floating(self, x: ir.Value, dtype: np.dtype, name: str) -> ir.Value:
        """`x`, of this type, in the graph's floats."""
        return x if dtype == self.floats else self.op("Cast", [x], name, to=self.float_type.value)

    def tensor(self, name: str, array: np.ndarray) -> ir.Value:
        """A weight, put where `store` says."""
        if name not in self.initializers:
            self._initializer(name, self._store(name, array))
        return self.initializers[name]

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> None:
        self.initializers[name] = ir.val(name, tensor.dtype, list(tensor.shape.numpy()), const_value=tensor)

    def quantized(self, x: ir.Value) -> tuple[ir.Value, ...]:
        """`x` as uint8 with one scale and zero point for the whole tensor: (codes, scale, zero point)."""
        if x not in self._quantized:
            names = [f"{x.name}.{part}" for part in ("q", "s", "z")]
            self._quantized[x] = tuple(self.node("", "DynamicQuantizeLinear", [x], names, {}))
        return self._quantized[x]

    def scales(self, name: str, w: Mapping[str, ir.Value]) -> ir.Value:
        """Scales [O, G] of the blocks of matrix `name`: arithmetic on constants, which ONNX Runtime does when the session is
        made."""
        if name not in self._scales:
            whole = self.op("Cast", [w["levels"]], f"{name}.levels.float", to=ir.DataType.FLOAT.value)
            exact = self.op("Mul", [whole, w["units"]], f"{name}.scales")
            self._scales[name] = self.floating(exact, np.dtype(np.float32), f"{name}.scales.float")
        return self._scales[name]

    def codes(self, name: str, format: Format, w: Mapping[str, ir.Value]) -> ir.Value:
        """Codes [O, G, M] of the blocks of matrix `name` as the kernel reads them, put together out of what is stored."""
        planes = [w[part] for part in format.planes]
        if len(planes) == 1:
            return planes[0]
        return self._put_together(
            f"{name}.codes", f"Codes{format.bits}", lambda f: codes_function(f, format), planes, {}
        )

    def int8_codes(self, name: str, block: int, w: Mapping[str, ir.Value]) -> tuple[ir.Value, ir.Value | None]:
        """Of matrix `name` in 4 bits: codes [I, O] in 8, which the kernel reads, and their zero point, if they need one."""
        exact = layout.int8_products_are_exact()
        zero = self.small("int8.zero", np.array(0, np.int8) if exact else np.array(128, np.uint8))
        stored, attributes = [w["codes"], w["levels"], w["zeros"], zero], {"block_size": block}
        codes = self._put_together(f"{name}.codes8", "Int8Codes", int8_codes_function, stored, attributes)
        return codes, None if exact else zero

    def _put_together(
        self,
        name: str,
        function: str,
        make: Callable[[str], ir.Function],
        stored: Sequence[ir.Value],
        attributes: Mapping[str, Attribute],
    ) -> ir.Value:
        """What a function of the graph's own makes of a matrix's tensors, called `name`; once, however many nodes read it."""
        if name not in self._codes:
            if function not in self._functions:
                self._functions[function] = make(function)
            self._codes[name] = self.node(FUNCTIONS, function, stored, [name], attributes)[0]
        return self._codes[name]

    def model(self, facts: Mapping[str, str] = MappingProxyType({})) -> ir.Model:
        """facts: metadata, which a session gives back."""
        graph = ir.Graph(
            self.inputs,
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.initializers.values()),
            opset_imports=OPSETS | ({FUNCTIONS: 1} if self._functions else {}),
            name="student",
        )
        functions = [self._functions[name] for name in sorted(self._functions)]
        return ir.Model(graph, ir_version=IR_VERSION, functions=functions, metadata_props=dict(facts))


class Arithmetic:
    """Nodes of a function of the graph's own, on constants: ONNX Runtime does them when the session is made."""

    def __init__(self) -> None:
        self._nodes: list[ir.Node] = []

    def op(self, kind: str, *inputs: ir.Value, **attributes: Attribute | ir.TensorProtocol | ir.Attr) -> ir.Value:
        self._nodes.append(ir.node(kind, list(inputs), attributes))
        self._nodes[-1].outputs[0].name = f"{kind}.{len(self._nodes)}"
        return self._nodes[-1].outputs[0]

    def constant(self, number: int, dtype: type[np.generic]) -> ir.Value:
        return self.op("Constant", value=ir.tensor(np.array(number, dtype)))

    def function(
        self, name: str, inputs: Sequence[ir.Value], output: ir.Value, attributes: Sequence[ir.Attr] = ()
    ) -> ir.Function:
        graph = ir.Graph(inputs, [output], nodes=self._nodes, opset_imports={"": OPSETS[""]}, name=name)
        return ir.Function(FUNCTIONS, name, graph=graph, attributes=attributes)


def codes_function(name: str, format: Format) -> ir.Function:
    """Planes of codes -> codes [O, G, M] as the kernel reads them: `quantize.unpack_codes`, as far as the kernel's bytes."""
    f = Arithmetic()

    def shifted(x: ir.Value, by: int) -> ir.Value:
        if not by:
            return x
        return f.op("BitShift", x, f.constant(abs(by), np.uint8), direction="LEFT" if by > 0 else "RIGHT")

    planes = {part: ir.Value(name=part) for part in format.planes}
    whole = []
    for part, (width, place) in format.planes.items():
        fields = [shifted(planes[part], place - width * i) for i in range(format.kernel_bits // width)]
        whole.append(f.op("BitwiseAnd", f.op("Concat", *fields, axis=-1), f.constant(format.mask(part), np.uint8)))
    return f.function(name, list(planes.values()), f.op("BitwiseOr", *whole))


def int8_codes_function(name: str) -> ir.Function:
    """(codes [O, I], levels and zero points [O, G], the zero point of what is made), `block_size` -> codes [I, O] of 8 bits,
    (code - zero point) * level. Of DequantizeLinear ONNX Runtime folds only what leads into QuantizeLinear; float16, which
    holds all of these numbers, takes half of the memory."""
    f = Arithmetic()
    codes, levels, zeros, zero = inputs = [ir.Value(name=part) for part in ("codes", "levels", "zeros", "zero")]
    scales = f.op("Cast", levels, to=ir.DataType.FLOAT16.value)
    block_size = ir.RefAttr("block_size", "block_size", ir.AttributeType.INT)
    whole_OI = f.op("DequantizeLinear", codes, scales, zeros, axis=1, block_size=block_size)
    whole_IO = f.op("Transpose", whole_OI, perm=[1, 0])
    made_IO = f.op("QuantizeLinear", whole_IO, f.constant(1, np.float16), zero)
    return f.function(name, inputs, made_IO, [ir.Attr("block_size", ir.AttributeType.INT, None)])


# -- matrices --


def linear(b: GraphBuilder, x: ir.Value, name: str, weight: Stored, output: str) -> ir.Value:
    """x [B, S, I] times the transpose of the [O, I] matrix `name`, and its bias -> [B, S, O], called `output`."""
    w = {part: b.tensor(f"{name}.{part}", array) for part, array in weight.arrays.items()}
    if weight.format.kind == "float":
        values = b.floating(w["values"], weight.arrays["values"].dtype, f"{name}.float")
        if "bias" not in w:
            return b.ms("FusedMatMul", [x, values], output, transB=1)
        product = b.ms("FusedMatMul", [x, values], f"{output}.unbiased", transB=1)
        return b.op("Add", [product, w["bias"]], output)
    if weight.format.quantizes_input:
        read, scale, zero = b.quantized(x)
        if weight.format.a8:
            codes, own_zero = b.int8_codes(name, weight.format.block, w)
            own = (codes, scale, w["units"], zero, own_zero)
        else:
            own = (w["codes"], scale, w["scales"], zero, w.get("zeros"))
        return b.ms("MatMulIntegerToFloat", _given([read, *own, w.get("bias")]), output)
    return b.ms(
        "MatMulNBits",
        _given([x, b.codes(name, weight.format, w), b.scales(name, w), w.get("zeros"), None, w.get("bias")]),
        output,
        K=weight.columns,
        N=weight.rows,
        bits=weight.format.kernel_bits,
        block_size=weight.format.block,
        accuracy_level=4,
    )


def _given(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    """Inputs of a node without those at the end that are left out."""
    while inputs[-1] is None:
        inputs.pop()
    return inputs


def embedding(b: GraphBuilder, ids: ir.Value, name: str, weight: Stored) -> ir.Value:
    """Rows of the table `name` at ids [B, S] -> [B, S, D]."""
    w = {part: b.tensor(f"{name}.{part}", array) for part, array in weight.arrays.items()}
    if weight.format.kind == "float":
        rows = b.op("Gather", [w["values"], ids], f"{name}.rows")
        return b.floating(rows, weight.arrays["values"].dtype, f"{name}.out")
    flat = b.small("table_shape", np.array([weight.rows, -1], np.int64))
    table = b.op("Reshape", [b.codes(name, weight.format, w), flat], f"{name}.table")
    rows = b.ms(
        "GatherBlockQuantized",
        [table, ids, b.scales(name, w), *([w["zeros"]] if "zeros" in w else [])],
        f"{name}.rows",
        bits=weight.format.kernel_bits,
        block_size=weight.format.block,
        gather_axis=0,
        quantize_axis=1,
    )
    if weight.columns % weight.format.block == 0:
        return rows
    bounds = {"slice_start": 0, "slice_stop": weight.columns, "slice_axis": 2}
    return b.op("Slice", [rows, *(b.small(k, np.array([v], np.int64)) for k, v in bounds.items())], f"{name}.out")


def last(b: GraphBuilder, x: ir.Value, keep: ir.Value) -> ir.Value:
    """The `keep` last positions of x [B, S, D], all if it is 0: what is behind it costs a fraction of a prefill then."""
    one, end = b.small("one", np.array([1], np.int64)), b.small("end_of_sequence", np.array([2**63 - 1], np.int64))
    start = b.op("Reshape", [b.op("Neg", [keep], f"{x.name}.start"), one], f"{x.name}.starts")
    return b.op("Slice", [x, start, end, one], f"{x.name}.last")


# -- sub-layers --


class Stream:
    """The residual stream x [B, S, D]; what sub-layers gave waits, to be added inside the next norm's kernel."""

    def __init__(self, b: GraphBuilder, x: ir.Value, decoder: Decoder, vectors: Mapping[str, np.ndarray]):
        self._b, self._decoder, self._vectors = b, decoder, vectors
        self._x = x
        self._waiting: list[ir.Value] = []

    def enter(self, site: str, front: bool = False) -> ir.Value:
        """What a sub-layer reads: `norm` of the stream, which becomes that norm where it is of the stream itself."""
        normed = self.norm(f"{site}.norm", front)
        if self._decoder.norms_stream(site):
            self._x = normed
        return normed

    def norm(self, name: str, front: bool = False) -> ir.Value:
        """Add what waits to the stream and return its norm. front: of the stream in front of what waits, which goes on
        waiting."""
        if front or not self._waiting:
            return norm(self._b, self._x, name, self._decoder, self._vectors)
        b = self._b
        weights = norm_weights(b, name, self._vectors)
        while len(self._waiting) > 1:
            last = self._waiting.pop()
            self._waiting[-1] = b.op("Add", [self._waiting[-1], last], f"{last.name}.together")
        kind = "SkipSimplifiedLayerNormalization" if self._decoder.norm == "rms" else "SkipLayerNormalization"
        normed, _, _, self._x = b.node(
            "com.microsoft",
            kind,
            [self._x, *self._waiting, *weights],
            [f"{name}.out", "", "", f"{name}.sum"],
            {"epsilon": self._decoder.norm_epsilon},
        )
        self._waiting = []
        return normed

    def add(self, delta: ir.Value, name: str) -> None:
        """What the sub-layer `name` gave, behind its own last norm, if it has one."""
        if self._decoder.post_norm:
            delta = norm(self._b, delta, f"{name}.post_norm", self._decoder, self._vectors)
        self._waiting.append(delta)

    def end(self) -> ir.Value:
        """The stream with all that was added."""
        for delta in self._waiting:
            self._x = self._b.op("Add", [self._x, delta], f"{delta.name}.end")
        self._waiting = []
        return self._x


def norm_weights(b: GraphBuilder, name: str, vectors: Mapping[str, np.ndarray]) -> list[ir.Value]:
    """The gain of the norm `name`, and its bias, if it has one."""
    return [b.tensor(key, vectors[key]) for key in (name, f"{name}.bias") if key in vectors]


def norm(b: GraphBuilder, x: ir.Value, name: str, decoder: Decoder, vectors: Mapping[str, np.ndarray]) -> ir.Value:
    """The norm `name` over the last axis of x."""
    weights = norm_weights(b, name, vectors)
    kind = "SimplifiedLayerNormalization" if decoder.norm == "rms" else "LayerNormalization"
    return b.op(kind, [x, *weights], f"{name}.out", epsilon=decoder.norm_epsilon, axis=-1)


class Positions:
    """What every attention reads: the mask, lengths from it, distances, and the rotary tables. fed: what is read at once,
    [B, S, ...].

    The tables [max_positions, head_dim / 2] are written as arithmetic on a range, which ONNX Runtime folds
    into a constant when the session is made: they cost no bytes in the file.
    """

    def __init__(self, b: GraphBuilder, decoder: Decoder, mask: ir.Value, fed: ir.Value):
        self._b, self._decoder, self._fed = b, decoder, fed
        self._tables: dict[tuple[float, ...], tuple[ir.Value, ir.Value]] = {}
        self._far: ir.Value | None = None
        self._apart: ir.Value | None = None
        self._start: ir.Value | None = None
        self._total = b.op("Squeeze", [b.op("Shape", [mask], "mask.total", start=1, end=2)], "total")
        if decoder.causal:
            one, to_int32 = b.small("one", np.array([1], np.int64)), ir.DataType.INT32.value
            lengths = b.op("ReduceSum", [mask, one], "lengths", keepdims=0)
            self.last = b.op("Cast", [b.op("Sub", [lengths, one], "lengths.last")], "seqlens_k", to=to_int32)
            self.total = b.op("Cast", [self._total], "total_sequence_length", to=to_int32)
        else:
            self.mask = key_mask(b, mask)

    def rotation(self, layer: int) -> tuple[ir.Value | None, ir.Value | None]:
        """(cos, sin) of the attention of a block, or nothing without rotary positions."""
        decoder, b = self._decoder, self._b
        frequencies = decoder.frequencies_of(layer)
        if not frequencies:
            return None, None
        if frequencies not in self._tables:
            end = f".local{len(self._tables)}" if self._tables else ""
            one = b.small("one", np.array([1], np.int64))
            ends = [b.small(f"positions.{i}", np.array(i, np.int64)) for i in (0, decoder.max_positions, 1)]
            positions = b.op("Range", ends, f"positions{end}")
            positions = b.op("Cast", [positions], f"positions{end}.float", to=ir.DataType.FLOAT.value)
            column = b.op("Unsqueeze", [positions, one], f"positions{end}.column")
            row = b.small(f"frequencies{end}", np.array([frequencies], np.float32))
            angles = b.op("Mul", [column, row], f"angles{end}")
            scale = b.small("rope_scale", np.array(decoder.rope_scale, np.float32))
            tables = []
            for kind in ("cos", "sin"):
                exact = b.op("Mul", [b.op(kind.title(), [angles], f"{kind}{end}"), scale], f"{kind}{end}.scaled")
                tables.append(b.floating(exact, np.dtype(np.float32), f"{kind}{end}.float"))
            self._tables[frequencies] = tables[0], tables[1]
        return self._tables[frequencies]

    def far(self, layer: int) -> ir.Value | None:
        """What is added to the scores of a local attention that is not causal, [1, 1, S, S]: nothing within its window."""
        b, window = self._b, self._decoder.window_of(layer)
        if window is None:
            return None
        if self._far is None:
            ends = [b.small(f"positions.{i}", np.array(i, np.int64)) for i in (0, 1)]
            places = b.op("Range", [ends[0], self._total, ends[1]], "places.all")
            axes = [b.small(f"axis.{i}", np.array([i], np.int64)) for i in (0, 1)]
            column, row = (b.op("Unsqueeze", [places, axis], f"places.{i}") for axis, i in zip(axes[::-1], "qk"))
            distance = b.op("Abs", [b.op("Sub", [column, row], "places.apart")], "places.distance")
            near = b.op("Less", [distance, b.small("window", np.array(window, np.int64))], "places.near")
            bias = b.op("Where", [near, b.number("near", 0.0), b.number("far", FAR)], "places.bias")
            self._far = b.op("Unsqueeze", [bias, b.small("axes.two", np.array([0, 1], np.int64))], "places.bias.all")
        return self._far

    def near(self, name: str, table: Stored) -> ir.Value:
        """What is added to scores for their distance, [1, H, S, total], by the table of an attention."""
        b, reach = self._b, self._decoder.distance_reach
        if self._apart is None:
            one = b.small("positions.1", np.array(1, np.int64))
            keys = b.op("Range", [b.small("positions.0", np.array(0, np.int64)), self._total, one], "places.keys")
            queries = b.op("Range", [self._fed_from(), self._total, one], "places.queries")
            column = b.op("Unsqueeze", [queries, b.small("axis.1", np.array([1], np.int64))], "places.column")
            apart = b.op("Sub", [keys, column], "places.apart")
            ends = [b.small(f"reach.{i}", np.array(i, np.int64)) for i in (-reach, reach)]
            self._apart = b.op("Add", [b.op("Clip", [apart, *ends], "places.within"), ends[1]], "places.number")
        values = b.floating(
            b.tensor(f"{name}.values", table.arrays["values"]), table.arrays["values"].dtype, f"{name}.float"
        )
        # the first Gather is of constants, and folded when the session is made
        buckets = b.small("distance_buckets", self._decoder.buckets().numpy())
        by_distance = b.op("Gather", [values, buckets], f"{name}.all", axis=1)
        rows = b.op("Gather", [by_distance, self._apart], f"{name}.rows", axis=1)
        return b.op("Unsqueeze", [rows, b.small("axis.0", np.array([0], np.int64))], f"{name}.bias")

    def learned(self, table: np.ndarray) -> ir.Value:
        """Rows of a table of positions for the tokens that are fed, [S, D]."""
        b, name = self._b, f"{self._decoder.prefix}positions"
        one = b.small("positions.1", np.array(1, np.int64))
        places = b.op("Range", [self._fed_from(), self._total, one], "places")
        return b.op("Gather", [b.tensor(name, table), places], f"{name}.rows")

    def _fed_from(self) -> ir.Value:
        """The position of the first token that is fed."""
        b = self._b
        if self._start is None:
            length = b.op("Squeeze", [b.op("Shape", [self._fed], "ids.fed", start=1, end=2)], "fed")
            self._start = b.op("Sub", [self._total, length], "fed.start")
        return self._start


def whole_mask(b: GraphBuilder, fed: ir.Value, before: ir.Value | None) -> ir.Value:
    """A mask [B, past + S] of tokens that all are some. fed: what is read at once, [B, S, ...]; before: past, int64 [1]."""
    size = b.op("Shape", [fed], "fed.size", start=0, end=2)
    if before is not None:
        behind = b.op("Concat", [b.integers(0), before], "past.size", axis=0)
        size = b.op("Add", [size, behind], "whole.size")
    return b.op("Expand", [b.small("one", np.array([1], np.int64)), size], "whole_mask")


def past_inputs(b: GraphBuilder, cache: str, heads: int, head_dim: int) -> Past:
    """Inputs for the keys and values of an attention, `cache` being their name."""
    length = "source" if cache.endswith("encoder") else "past"
    shape: list[int | str] = ["batch_size", heads, length, head_dim]
    key, value = (b.input(f"past_key_values.{cache}.{part}", b.float_type, shape) for part in ("key", "value"))
    return key, value


def key_mask(b: GraphBuilder, mask: ir.Value, name: str = "key_padding_mask") -> ir.Value:
    """The mask [B, M] of tokens that are some, as `MultiHeadAttention` takes it."""
    return b.op("Cast", [mask], name, to=ir.DataType.INT32.value)


FAR = -3e4
"""Is added to scores that must not count; float16 knows it."""


def attention(
    b: GraphBuilder,
    stream: Stream,
    layer: int,
    cache: str,
    action: Action,
    decoder: Decoder,
    matrices: Matrices,
    vectors: Mapping[str, np.ndarray],
    positions: Positions,
    past: Past | None,
) -> None:
    """Grouped-query attention of block `layer` under `action`. cache: name of its keys and values."""
    name, heads, head_dim = f"{decoder.prefix}layers.{layer}.attention", decoder.heads_of(action), decoder.head_dim
    x = stream.enter(name)
    window = decoder.window_of(layer)
    rotation = positions.rotation(layer)
    near = None
    if decoder.distance_buckets:
        near = positions.near(f"{name}.distances", matrices((f"{name}.distances",)))
    inputs = projections(b, x, name, action, decoder, matrices)
    if decoder.qk_norm:
        inputs[:2] = [head_norm(b, part, f"{name}.{n}_norm", vectors, decoder) for n, part in zip("qk", inputs)]
    if not decoder.causal:
        if rotation[0] is not None:
            start = b.small("start", np.array([0], np.int64))
            inputs[:2] = [b.ms("RotaryEmbedding", [p, start, *rotation], f"{p.name}.turned") for p in inputs[:2]]
        seen = [None, positions.mask, near or positions.far(layer)]
        mixed = b.ms("MultiHeadAttention", _given([*inputs, *seen]), f"{name}.mixed", num_heads=heads[0])
        stream.add(linear(b, mixed, f"{name}.o", matrices((f"{name}.o",)), f"{name}.out"), name)
        return
    absent = [None] * (3 - len(inputs))
    mixed, key, value = b.node(
        "com.microsoft",
        "GroupQueryAttention",
        _given([*inputs, *absent, *(past or (None, None)), positions.last, positions.total, *rotation, None, near]),
        [f"{name}.mixed", f"present.{cache}.key", f"present.{cache}.value"],
        {"num_heads": heads[0], "kv_num_heads": heads[1], "do_rotary": int(rotation[0] is not None)}
        | ({"local_window_size": window} if window else {})
        | ({"softcap": decoder.attention_cap} if decoder.attention_cap else {}),
    )
    b.output(key, f"present.{cache}.key", ["batch_size", heads[1], "total", head_dim])
    b.output(value, f"present.{cache}.value", ["batch_size", heads[1], "total", head_dim])
    stream.add(linear(b, mixed, f"{name}.o", matrices((f"{name}.o",)), f"{name}.out"), name)


def projections(
    b: GraphBuilder, x: ir.Value, name: str, action: Action, decoder: Decoder, matrices: Matrices
) -> list[ir.Value]:
    """Queries, keys and values of x for the attention `name`; or one value of all three side by side, where they are one
    product and nothing needs them apart."""
    q, k, v = (f"{name}.{part}" for part in "qkv")
    outputs = [f"{part}.out" for part in (q, k, v)]
    if not Formats.parse(action.format).alike:
        queries = linear(b, x, q, matrices((q,)), outputs[0])
        kv = linear(b, x, f"{name}.kv", matrices((k, v)), f"{name}.kv.out")
        return [queries, *b.node("", "Split", [kv], outputs[1:], {"axis": -1, "num_outputs": 2})]
    qkv = linear(b, x, f"{name}.qkv", matrices((q, k, v)), f"{name}.qkv.out")
    if decoder.causal and not decoder.qk_norm:
        return [qkv]
    heads, groups = decoder.heads_of(action)
    widths = np.array([heads, groups, groups], np.int64) * decoder.head_dim
    return list(b.node("", "Split", [qkv, b.small(f"{name}.widths", widths)], outputs, {"axis": -1}))


@dataclass(frozen=True)
class Source:
    """What attentions across read. mask: see `key_mask`; hidden: what the encoder gave, [B, source, D], in the first step."""

    mask: ir.Value
    hidden: ir.Value | None


def cross(
    b: GraphBuilder,
    stream: Stream,
    layer: int,
    cache: str,
    heads: int,
    decoder: Decoder,
    matrices: Matrices,
    source: Source,
    past: Past | None,
) -> None:
    """Attention across of block `layer`, to keys and values of the source, which the first step makes; cache: their name."""
    name = f"layers.{layer}.cross"
    q = linear(b, stream.enter(name), f"{name}.q", matrices((f"{name}.q",)), f"{name}.q.out")
    key, value = past or of_source(b, source, layer, cache, heads, decoder, matrices)
    mixed = b.ms("MultiHeadAttention", [q, key, value, None, source.mask], f"{name}.mixed", num_heads=heads)
    stream.add(linear(b, mixed, f"{name}.o", matrices((f"{name}.o",)), f"{name}.out"), name)


def of_source(
    b: GraphBuilder, source: Source, layer: int, cache: str, heads: int, decoder: Decoder, matrices: Matrices
) -> Past:
    """Keys and values of what the encoder gave, for the attention across of block `layer`, and as outputs."""
    name = f"layers.{layer}.cross"
    assert source.hidden
    kv = linear(b, source.hidden, f"{name}.kv", matrices((f"{name}.k", f"{name}.v")), f"{name}.kv.out")
    apart = b.small("heads_apart", np.array([0, 0, -1, decoder.head_dim], np.int64))
    by_head = b.op("Transpose", [b.op("Reshape", [kv, apart], f"{name}.heads")], f"{name}.by_head", perm=[0, 2, 1, 3])
    key, value = b.node("", "Split", [by_head], [f"{name}.{part}" for part in "kv"], {"axis": 1, "num_outputs": 2})
    for half, part in ((key, "key"), (value, "value")):
        b.output(half, f"present.{cache}.{part}", ["batch_size", heads, "source", decoder.head_dim])
    return key, value


def head_norm(b: GraphBuilder, x: ir.Value, name: str, vectors: Mapping[str, np.ndarray], decoder: Decoder) -> ir.Value:
    """Root-mean-square norm of every head of x [B, S, heads * head_dim]."""
    apart = b.small("heads_apart", np.array([0, 0, -1, decoder.head_dim], np.int64))
    together = b.small("heads_together", np.array([0, 0, -1], np.int64))
    heads = b.op("Reshape", [x, apart], f"{name}.heads")
    normed = b.op(
        "SimplifiedLayerNormalization",
        [heads, b.tensor(name, vectors[name])],
        f"{name}.normed",
        epsilon=decoder.norm_epsilon,
        axis=-1,
    )
    return b.op("Reshape", [normed, together], f"{name}.out")


def feed_forward(
    b: GraphBuilder, stream: Stream, layer: int, decoder: Decoder, matrices: Matrices, beside: bool = False
) -> None:
    """Pre-norm feed-forward of block `layer`: down(activation(gate x) * up x), or down(activation(up x)).

    beside: it reads the stream in front of the block's attention, which waits to be added.
    """
    name = f"{decoder.prefix}layers.{layer}.ffn"
    x = stream.enter(name, front=beside)
    stream.add(channels(b, x, name, decoder, matrices), name)


def channels(b: GraphBuilder, x: ir.Value, name: str, decoder: Decoder, matrices: Matrices) -> ir.Value:
    """What the feed-forward or the expert `name` gives for x [..., D]."""
    up = linear(b, x, f"{name}.up", matrices((f"{name}.up",)), f"{name}.up.out")
    if decoder.gated:
        gate = linear(b, x, f"{name}.gate", matrices((f"{name}.gate",)), f"{name}.gate.out")
        inner = b.op("Mul", [activation(b, gate, decoder.activation, name), up], f"{name}.product")
    else:
        inner = activation(b, up, decoder.activation, name)
    return linear(b, inner, f"{name}.down", matrices((f"{name}.down",)), f"{name}.out")


def mixture(
    b: GraphBuilder,
    stream: Stream,
    layer: int,
    kept: Collection[str],
    decoder: Decoder,
    matrices: Matrices,
    vectors: Mapping[str, np.ndarray],
    beside: bool = False,
) -> None:
    """The experts of block `layer` (see `student.Experts`), each on the tokens alone that are routed to it.

    The T tokens stand in a list of N = T A, once for each of the A experts that they are routed to, sorted by expert, and
    every expert reads its piece of it; an empty one takes the kernels some microseconds. What they give is gathered back and
    added up slot by slot: ONNX Runtime's ScatterND adds in parallel, in any order.

    kept: names of the experts that are not dropped; the others give 0. beside: as in `feed_forward`.
    """
    name, experts = f"layers.{layer}.ffn", decoder.experts_of(layer)
    assert experts
    x = stream.enter(name, front=beside)
    x_TD = b.op("Reshape", [x, b.integers(-1, decoder.hidden)], f"{name}.tokens")
    p_TA, expert_TA = routes(b, x_TD, name, experts, vectors)

    expert_N = b.op("Reshape", [expert_TA, b.integers(-1)], f"{name}.slots")
    order_N = ascending(b, expert_N, f"{name}.order")
    token_N = b.op("Div", [order_N, b.integers(experts.active)], f"{name}.token")
    hits_NE = b.op("OneHot", [expert_N, b.integers(experts.count), b.integers(0, 1)], f"{name}.hits")
    counts_E = b.op("ReduceSum", [hits_NE, b.integers(0)], f"{name}.counts", keepdims=0)
    rows_ND = b.op("Gather", [x_TD, token_N], f"{name}.rows")
    parts = [f"{name}.experts.{e}" for e in range(experts.count)]
    pieces = b.node("", "Split", [rows_ND, counts_E], [f"{part}.in" for part in parts], {"axis": 0})
    given = []
    for part, piece in zip(parts, pieces, strict=True):
        if part in kept:
            given.append(channels(b, piece, part, decoder, matrices))
        else:
            given.append(b.op("Mul", [piece, b.number("nothing", 0.0)], f"{part}.out"))
    given_ND = b.op("Concat", given, f"{name}.given", axis=0)

    back_ND = b.op("Gather", [given_ND, ascending(b, order_N, f"{name}.place")], f"{name}.given.back")
    back_TAD = b.op("Reshape", [back_ND, b.integers(-1, experts.active, decoder.hidden)], f"{name}.given.slots")
    p_TA1 = b.op("Unsqueeze", [p_TA, b.integers(-1)], f"{name}.p.slots")
    weighed_TAD = b.op("Mul", [back_TAD, p_TA1], f"{name}.weighed")
    added_TD = b.op("ReduceSum", [weighed_TAD, b.integers(1)], f"{name}.sum", keepdims=0)
    if (shared := f"{name}.shared") in kept:
        p_T1 = b.op("Sigmoid", [scores(b, x_TD, f"{shared}.router", vectors)], f"{shared}.p")
        p_T1 = b.floating(p_T1, np.dtype(np.float32), f"{shared}.p.float")
        shared_TD = b.op("Mul", [channels(b, x_TD, shared, decoder, matrices), p_T1], f"{shared}.weighed")
        added_TD = b.op("Add", [added_TD, shared_TD], f"{name}.together")
    stream.add(b.op("Reshape", [added_TD, b.op("Shape", [x], f"{name}.shape")], f"{name}.out"), name)


def routes(
    b: GraphBuilder, x_TD: ir.Value, name: str, experts: Experts, vectors: Mapping[str, np.ndarray]
) -> tuple[ir.Value, ir.Value]:
    """(probabilities, numbers), [T, A] each, of the experts that tokens are routed to in the mixture `name`."""
    p_TE = b.op("Softmax", [scores(b, x_TD, f"{name}.router", vectors)], f"{name}.p", axis=-1)
    outputs = [f"{name}.best", f"{name}.chosen"]
    p_TA, expert_TA = b.node("", "TopK", [p_TE, b.integers(experts.active)], outputs, {"axis": -1})
    if experts.normalized:
        whole_T1 = b.op("ReduceSum", [p_TA, b.integers(-1)], f"{name}.p.sum")
        p_TA = b.op("Div", [p_TA, whole_T1], f"{name}.p.normalized")
    return b.floating(p_TA, np.dtype(np.float32), f"{name}.p.float"), expert_TA


def scores(b: GraphBuilder, x: ir.Value, router: str, vectors: Mapping[str, np.ndarray]) -> ir.Value:
    """What a router says of x [T, D], float32 [T, experts]."""
    product = b.ms("FusedMatMul", [x, b.tensor(router, vectors[router])], f"{router}.product", transB=1)
    if b.floats == np.float32:
        return product
    return b.op("Cast", [product], f"{router}.scores", to=ir.DataType.FLOAT.value)


def ascending(b: GraphBuilder, x_N: ir.Value, name: str) -> ir.Value:
    """Places of x's values in ascending order, of equal ones the first one first."""
    size = b.op("Shape", [x_N], f"{name}.size")
    return b.node("", "TopK", [x_N, size], [f"{name}.values", name], {"axis": 0, "largest": 0})[1]


def activation(b: GraphBuilder, x: ir.Value, kind: str, name: str) -> ir.Value:
    """An activation of `transformer.ACTIVATIONS`."""
    if kind == "silu":
        return b.op("Mul", [x, b.op("Sigmoid", [x], f"{name}.sigmoid")], f"{name}.silu")
    if kind in ("relu", "tanh"):
        return b.op(kind.title(), [x], f"{name}.{kind}")
    return b.op("Gelu", [x], f"{name}.gelu", approximate="tanh" if kind == "gelu_tanh" else "none")


def transform(b: GraphBuilder, x: ir.Value, decoder: Decoder, vectors: Mapping[str, np.ndarray]) -> ir.Value:
    """The square matrix, the activation and the norm in front of the head."""
    x = product(b, x, "transform", vectors)
    x = activation(b, x, decoder.transform_activation or decoder.activation, "transform")
    return norm(b, x, "transform_norm", decoder, vectors) if decoder.transform_norm else x


def pooled(b: GraphBuilder, x: ir.Value, mask: ir.Value, decoder: Decoder) -> ir.Value:
    """Last hidden states [B, S, D] and a mask [B, S] -> embeddings [B, D]."""
    if decoder.pooling == "mean":
        weight = b.op(
            "Unsqueeze", [b.floating(mask, np.dtype(np.int64), "pooled.mask"), b.integers(1)], "pooled.weight"
        )
        total = b.op("ReduceSum", [weight, b.integers(2)], "pooled.total", keepdims=1)
        x = b.op("MatMul", [b.op("Div", [weight, total], "pooled.share"), x], "pooled.mean")
        x = b.op("Squeeze", [x, b.integers(1)], "pooled.out")
    else:
        x = b.op("Gather", [x, b.small("first", np.array(0, np.int64))], "pooled.out", axis=1)
    return b.op("LpNormalization", [x], "pooled.normalized", axis=-1, p=2) if decoder.normalized else x


def product(b: GraphBuilder, x: ir.Value, name: str, vectors: Mapping[str, np.ndarray]) -> ir.Value:
    """x times the transpose of a matrix that no plan changes, and its bias."""
    x = b.ms("FusedMatMul", [x, b.tensor(name, vectors[name])], f"{name}.product", transB=1)
    return (
        b.op("Add", [x, b.tensor(f"{name}.bias", vectors[f"{name}.bias"])], f"{name}.out")
        if f"{name}.bias" in vectors
        else x
    )
