"""The exported folder: model.onnx (graph; three of an encoder-decoder) and model.onnx_data (weights), written, read back, and
their size promised.

Every tensor starts at a multiple of `plan.ALIGNMENT` in the data file and is written as soon as it is made, so
that no more than one site's bytes are in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import ceil, prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir
import torch

from compressor.errors import BankError
from compressor.export.graph import ENCODER_FILE, GRAPH_FILE, SEQUENCE_FILES, graph_files, student_models
from compressor.export.layers import Matrices
from compressor.export.layout import Stored, layout
from compressor.plan import Action, Format, Plan, Site, aligned
from compressor.quantize import STORED_PARTS, Weight
from compressor.student import Decoder, Lazy, Precision, Student, full_plan

DATA_FILE = "model.onnx_data"


def export_onnx(student: Student, folder: Path) -> None:
    """Write `student` to `folder`, which is made if need be; files of an earlier export are replaced.

    A reader never sees a graph with another export's weights: the old graph goes first, the new one comes last.
    """

    def matrices(names: tuple[str, ...]) -> Stored:
        return Stored.of(Weight.concatenate([student.matrices[name] for name in names]), floats)

    floats = student.decoder.floats
    vectors = {name: vector.detach().numpy().astype(floats) for name, vector in student.vectors.items()}
    _write(student.decoder, student.plan, matrices, vectors, Path(folder))


def export_random(decoder: Decoder, plan: Plan, folder: Path) -> None:
    """Write a model of a plan's shape with random weights, for timing."""
    rng = np.random.default_rng(0)
    vectors = {}
    for name, shape in decoder.vectors().items():  # of equal scores a router takes the same experts for all tokens
        made = rng.standard_normal(shape, np.float32) if name.endswith("router") else np.ones(shape)
        vectors[name] = made.astype(decoder.floats)
    _write(decoder, plan, _made(decoder, plan, partial(Stored.random, rng)), vectors, Path(folder))


def _made(
    decoder: Decoder, plan: Mapping[str, Action], make: Callable[[Format, int, int, bool, np.dtype], Stored]
) -> Matrices:
    """The matrices of a plan, each made from its format, rows and columns, and whether it has a bias."""
    shapes, formats, biased = {}, {}, {}
    for site in decoder.sites():
        for matrix, format in site.stored(plan[site.name]):
            shapes[matrix.name] = matrix.shape(plan[site.name].keep, site.units)
            formats[matrix.name] = format
            biased[matrix.name] = matrix.bias

    def matrices(names: tuple[str, ...]) -> Stored:
        first = names[0]
        return make(
            formats[first], sum(shapes[name][0] for name in names), shapes[first][1], biased[first], decoder.floats
        )

    return matrices


def _write(decoder: Decoder, plan: Plan, matrices: Matrices, vectors: Mapping[str, np.ndarray], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    drafts = {name: folder / f".{name}.draft" for name in (DATA_FILE, *graph_files(decoder))}
    try:
        with open(drafts[DATA_FILE], "wb") as data:
            models = student_models(decoder, plan, matrices, vectors, partial(store, data))
            data.flush()
            os.fsync(data.fileno())
        for name, model in models.items():
            drafts[name].write_bytes(_serialize(model))
            (folder / name).unlink(missing_ok=True)
        for name, draft in drafts.items():
            os.replace(draft, folder / name)
    finally:
        for draft in drafts.values():
            draft.unlink(missing_ok=True)


def store(data: BinaryIO, name: str, array: np.ndarray) -> ir.ExternalTensor:
    """Write an array of a graph into the data file beside it."""
    data.seek(aligned(data.tell()))
    tensor = _external(name, array.dtype, array.shape, data.tell())
    ir.Tensor(array).tofile(data)  # two codes of 4 bits a byte
    return tensor


def _external(name: str, dtype: np.dtype, shape: tuple[int, ...], offset: int) -> ir.ExternalTensor:
    kind = ir.DataType.from_numpy(dtype)
    length = ceil(prod(shape) * kind.itemsize)
    return ir.ExternalTensor(DATA_FILE, offset, length, kind, shape=ir.Shape(shape), name=name)


def _serialize(model: ir.Model) -> bytes:
    return ir.serde.serialize_model(model).SerializeToString()


def exported_files(folder: Path) -> list[Path]:
    """The exported graphs and weights."""
    graphs = SEQUENCE_FILES if has_encoder(folder) else (GRAPH_FILE,)
    return [Path(folder) / name for name in (*graphs, DATA_FILE)]


def exported_bytes(folder: Path) -> int:
    """Size in bytes of the exported graphs and weights, the quantity that a byte budget limits."""
    return sum(file.stat().st_size for file in exported_files(folder))


def has_encoder(folder: Path) -> bool:
    """Whether an encoder-decoder was exported there."""
    return (Path(folder) / ENCODER_FILE).is_file()


@lru_cache
def fixed_bytes(decoder: Decoder) -> int:
    """Bytes of everything in the exported files that no site accounts for: an upper bound, whatever the plan.

        exported_bytes(folder) <= fixed_bytes(decoder) + sum over sites of site.size_bytes(action)

    That is the norm gains and the graph. A graph is a sum of what each site writes, so its bound is the sum of the
    bounds of attention, feed-forward and tables, each in the format whose nodes take most.
    """
    base = _graph_bytes(decoder)
    alone = ("fp32", "fp16", "w4b256", "w3b256", "w5b256")
    blocks = (*alone, "int8", "w4a8b256", "w3b256+w3b128", "w3b256+w5b256", "w4a8b256+w4a8b128")
    formats = {"table": alone, "attention": blocks, "ffn": (*blocks, "w4a8b256+w6b256")}
    growth = {
        kind: max(_graph_bytes(decoder, **{kind: name}) for name in names) - base for kind, names in formats.items()
    }
    # 64: the length prefixes of graph and model may each take a byte more than in `base`, and names of a skipped
    # block's neighbours differ by a few characters; what a dropped site saves is far more
    return _vector_bytes(decoder) + base + sum(growth.values()) + 64


def fp32_bytes(decoder: Decoder) -> int:
    """An upper bound of `exported_bytes` of a model as it is given, close to it."""
    plan = full_plan(decoder, "fp32", "fp32")
    matrices = sum(site.size_bytes(plan[site.name]) for site in decoder.sites())
    return _vector_bytes(decoder) + _graph_bytes(decoder) + matrices


def _vector_bytes(decoder: Decoder) -> int:
    return sum(aligned(decoder.floats.itemsize * prod(shape)) for shape in decoder.vectors().values())


def _graph_bytes(decoder: Decoder, attention: str = "fp32", ffn: str = "fp32", table: str = "fp32") -> int:
    """Size of the graph with every site whole, in these formats, and every offset as long as offsets can be."""
    names = {"attention": attention, "ffn": ffn, "embedding": table, "head": table}
    sites = decoder.sites()
    plan = {site.name: Action(site.units, names[site.kind]) for site in sites}
    largest = sum(site.parameters for site in sites) * 4

    def nowhere(name: str, array: np.ndarray) -> ir.ExternalTensor:
        return _external(name, array.dtype, array.shape, largest)

    gains = {name: np.broadcast_to(decoder.floats.type(0), shape) for name, shape in decoder.vectors().items()}
    models = student_models(decoder, plan, _made(decoder, plan, Stored.blank), gains, nowhere)
    return sum(len(_serialize(model)) for model in models.values())


def read_student(folder: Path, decoder: Decoder, plan: Plan) -> Student:
    """The student that was exported to `folder` under `plan`: `export_onnx` backwards, exactly but for the rounding of its
    floats to its precision.

    Raises:
        BankError: a file is missing or truncated, or does not hold what the plan says.
    """
    folder = Path(folder)
    tensors = _open_tensors(folder, graph_files(decoder))
    decoder = replace(decoder, precision=_precision(folder, tensors))
    places: dict[str, tuple[Stored, int, int]] = {}
    vectors = {name: _vector(folder, tensors, name).float() for name in decoder.vectors_of(plan)}
    for site in decoder.sites():
        action = plan[site.name]
        for name, (parts, format) in site.products(action).items():
            heights, (columns, *_) = zip(*(part.shape(action.keep, site.units) for part in parts), strict=True)
            whole = _stored(folder, tensors, name, format, sum(heights), columns, parts[0].bias, decoder.floats)
            for part, height, end in zip(parts, heights, np.cumsum(heights).tolist(), strict=True):
                places[part.name] = whole, end - height, end

    def matrix(site: Site, action: Action, name: str) -> Weight:
        whole, start, stop = places[name]
        return whole.weight().rows(start, stop)

    return Student(decoder, plan, Lazy(decoder.sites(), plan, matrix), vectors)


def _open_tensors(folder: Path, graphs: Sequence[str]) -> Mapping[str, ir.TensorProtocol]:
    for name in (*graphs, DATA_FILE):
        if not (folder / name).is_file():
            raise BankError(f"{folder / name} is missing; export the model again")
    tensors: dict[str, ir.TensorProtocol] = {}
    for name in graphs:
        try:
            graph = ir.load(folder / name).graph
        except Exception as error:  # protobuf and onnx-ir have no common base
            raise BankError(f"{folder / name} cannot be read ({error}); export the model again") from error
        tensors |= {
            key: value.const_value for key, value in graph.initializers.items() if value.const_value is not None
        }
    external = [tensor for tensor in tensors.values() if isinstance(tensor, ir.ExternalTensor)]
    for tensor in external:
        if tensor.location != DATA_FILE:
            raise BankError(
                f"{folder / graphs[-1]}: expected all weights in {DATA_FILE}, {tensor.name} points to {tensor.location}"
            )
    end = max(((tensor.offset or 0) + (tensor.length or 0) for tensor in external), default=0)
    size = (folder / DATA_FILE).stat().st_size
    if (folder / DATA_FILE).is_symlink():
        raise BankError(f"{folder / DATA_FILE} is a link, behind which anything could lie; put the file itself there")
    if size != end:
        raise BankError(f"{folder / DATA_FILE} has {size} bytes, its graph says {end}; export the model again")
    return tensors


def _precision(folder: Path, tensors: Mapping[str, ir.TensorProtocol]) -> Precision:
    floats = _vector(folder, tensors, "norm").dtype
    return "float16" if floats == torch.float16 else "float32"


def _stored(
    folder: Path,
    tensors: Mapping[str, ir.TensorProtocol],
    name: str,
    format: Format,
    rows: int,
    columns: int,
    bias: bool,
    floats: np.dtype,
) -> Stored:
    """The arrays of one matrix, checked; int8 codes may be unsigned, from processors that need it."""
    arrays = {}
    for part in STORED_PARTS:
        if f"{name}.{part}" in tensors:
            arrays[part] = tensors[f"{name}.{part}"].numpy()
    promised = layout(format, rows, columns, bias, floats)
    expected = {part: (kind.itemsize, *shape) for part, (kind, shape) in promised.items()}
    found = {part: (array.dtype.itemsize, *array.shape) for part, array in arrays.items()}
    if format.kind == "dynamic":
        expected.pop("zeros", None)
        found.pop("zeros", None)
    if found != expected:
        raise BankError(
            f"{folder}: exported matrix {name!r}: the plan says {format.name}, (item bytes, *shape) = {expected}; "
            f"the file holds {found}"
        )
    return Stored(format, rows, columns, arrays)


def _vector(folder: Path, tensors: Mapping[str, ir.TensorProtocol], name: str) -> torch.Tensor:
    if name not in tensors:
        raise BankError(f"{folder}: exported norm {name!r}: the plan keeps this sub-layer, the file does not hold it")
    return torch.from_numpy(np.array(tensors[name].numpy()))
