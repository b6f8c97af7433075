"""The data that all stages share: formats, sites, actions, plans, scores.

Plain values: printable, hashable, comparable, saved as JSON. This file knows nothing of torch, ONNX or learning.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from compressor.errors import RecipeError

ALIGNMENT = 64
"""Bytes to which every tensor is aligned in the exported data file."""

FORMAT_NAMES = (
    "fp32, fp16, int8, w4a8, w8, w6, w5, w4, w3, w2 (blocks of 32, or w4b64, w4a8b128 and so on for others), nf4, fp4, "
    "int8row"
)

FINER = ("k", "v", "down")
"""The matrices of a site that have the second format of a pair: errors cost most there for their bytes."""

PLANES = {3: {"low": (2, 0), "high": (1, 2)}, 5: {"low": (4, 3), "high": (1, 7)}, 6: {"low": (4, 2), "high": (2, 6)}}
"""See `Format.planes`."""


@dataclass(frozen=True)
class Format:
    """How a weight matrix of shape [rows, columns] = [output, input] is stored and which kernel reads it.

    kind
        `float`: `bits` 32, or 16 (stored as fp16, computed in the graph's float type);
        `dynamic`: int8 weights, one scale a row; activations quantized at run time, to uint8 with one scale a tensor, or to
        int8 with one scale a row (`rowwise`);
        `blockwise`: weight-only codes of `bits`, one scale of 8 bits (and zero point) for `block` columns of a row; with
        `a8` they become int8 codes when a session is made, and activations are quantized as for `dynamic`;
        `codebook`: weight-only codes of `bits` into a table of values, one scale for `block` columns of a row;
        `dropped`: there is no weight, the sub-layer is gone.
    """

    name: str
    kind: Literal["float", "dynamic", "blockwise", "codebook", "dropped"]
    bits: int
    block: int = 0
    rowwise: bool = False
    a8: bool = False

    @classmethod
    def parse(cls, name: str) -> Format:
        """`w4` -> Format('w4', 'blockwise', 4, 32).

        Raises:
            RecipeError: the name is none that can be deployed.
        """
        fixed = {
            "fp32": cls("fp32", "float", 32),
            "fp16": cls("fp16", "float", 16),
            "int8": cls("int8", "dynamic", 8),
            "nf4": cls("nf4", "codebook", 4, 64),
            "fp4": cls("fp4", "codebook", 4, 64),
            "int8row": cls("int8row", "dynamic", 8, rowwise=True),
            "none": cls("none", "dropped", 0),
        }
        if name in fixed:
            return fixed[name]
        match = re.fullmatch(r"w(\d+)(a8)?(?:b(\d+))?", name)
        if not match:
            raise RecipeError(f"expected a format, got {name!r}; choose among {FORMAT_NAMES}")
        bits, a8, block = int(match[1]), match[2] or "", int(match[3] or 32)
        if bits not in (2, 3, 4, 5, 6, 8):
            raise RecipeError(f"format {name!r}: expected 2, 3, 4, 5, 6 or 8 bits, got {bits}")
        if a8 and bits != 4:
            raise RecipeError(f"format {name!r}: expected 4 bits with a8, got {bits}; choose w4a8 or int8")
        if block not in (32, 64, 128, 256):
            raise RecipeError(f"format {name!r}: block {block} has no fast kernel; choose among 32, 64, 128, 256")
        return cls(f"w{bits}{a8}" if block == 32 else name, "blockwise", bits, block, a8=bool(a8))

    @property
    def quantizes_input(self) -> bool:
        """Whether its kernels quantize all that a matrix reads, with one scale a tensor or a row."""
        return self.kind == "dynamic" or self.a8

    @property
    def has_zeros(self) -> bool:
        """Whether every block stores a zero point; those for the 8-bit kernel are symmetric."""
        return self.kind == "blockwise" and self.bits <= 4

    @property
    def kernel_bits(self) -> int:
        """Of a code of a blockwise format as the kernel reads it, which knows 2, 4 and 8."""
        return next(bits for bits in (2, 4, 8) if bits >= self.bits)

    @property
    def planes(self) -> dict[str, tuple[int, int]]:
        """The tensors that hold the codes of a blockwise format: name -> (bits that it has of a code, their place in the
        kernel's code). Where the kernel has more bits, the code is the highest ones of eight, and the lowest ones of four."""
        return PLANES.get(self.bits, {"codes": (self.bits, 0)})

    def mask(self, plane: str) -> int:
        """The bits of a byte of the kernel's codes that a plane holds."""
        width, place = self.planes[plane]
        bits = (2**width - 1) << place
        return bits if self.kernel_bits == 8 else bits * 0x11

    @property
    def of_bitsandbytes(self) -> bool:
        """Whether it is a format of bitsandbytes, which only torch runs."""
        return self.kind == "codebook" or self.rowwise

    def tensor_bytes(self, rows: int, columns: int, float_bytes: int = 4) -> list[int]:
        """Sizes in bytes of the tensors that store a [rows, columns] matrix: values or codes, scales (one of `float_bytes` a
        row, or of a byte a block and a float32 a row), zero points."""
        if self.kind == "dropped" or rows == 0 or columns == 0:
            return []
        if self.kind == "float":
            return [rows * columns * self.bits // 8]
        if self.kind == "dynamic":
            return [rows * columns, rows * float_bytes, rows]
        blocks = -(-columns // self.block)
        if self.kind == "codebook":  # beside codes and scales lie the table and what says how to read it
            return [rows * columns // 2, rows * blocks * 4, 16 * 4, 256]
        if self.a8:
            return [-(-rows * columns // 2), rows * blocks, rows * 4, -(-rows * blocks // 2)]
        sizes = [rows * blocks * (self.block * width // 8) for width, _ in self.planes.values()]
        sizes += [rows * blocks, rows * 4]
        return [*sizes, rows * -(-blocks * self.kernel_bits // 8)] if self.has_zeros else sizes


DROPPED, FP32 = Format.parse("none"), Format.parse("fp32")


@dataclass(frozen=True)
class Formats:
    """Those of a site: of its keys, values and down projection (`FINER`), and of all its other matrices."""

    most: Format
    finer: Format

    @classmethod
    def parse(cls, name: str) -> Formats:
        """`w4+w8` -> w4, but w8 for what is finer; `w4` -> w4 for all.

        Raises:
            RecipeError: a name is none that can be deployed, or a pair has one that has no part.
        """
        first, plus, second = name.partition("+")
        most = Format.parse(first)
        finer = Format.parse(second) if plus else most
        if plus and any(format.kind == "dropped" or format.rowwise for format in (most, finer)):
            raise RecipeError(f"format {name!r}: none and int8row stand alone; choose pairs such as w4+w8 or w4a8+int8")
        return cls(most, finer)

    @property
    def splits_input(self) -> bool:
        """Whether only one of them quantizes what it reads, so that matrices that read one thing would differ in it: no
        attention has such a pair."""
        return self.most.quantizes_input != self.finer.quantizes_input

    @property
    def name(self) -> str:
        return self.most.name if self.alike else f"{self.most.name}+{self.finer.name}"

    @property
    def alike(self) -> bool:
        """Whether all matrices have one format."""
        return self.most == self.finer

    @property
    def of_bitsandbytes(self) -> bool:
        """Whether one of them is a format of bitsandbytes."""
        return self.most.of_bitsandbytes or self.finer.of_bitsandbytes

    @property
    def each(self) -> tuple[Format, ...]:
        """Every format once."""
        return tuple(dict.fromkeys((self.most, self.finer)))

    @property
    def bits(self) -> int:
        """Mean of the two."""
        return (self.most.bits + self.finer.bits) // 2

    def of(self, matrix: str) -> Format:
        """That of a matrix, by its name."""
        return self.finer if matrix.rpartition(".")[2] in FINER else self.most


def aligned(size: int) -> int:
    """`size` in bytes, rounded up to the alignment of the exported data file."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of a site at full size, the side that shrinks when units are pruned, and whether a bias is added to
    what it gives."""

    name: str
    rows: int
    columns: int
    pruned: Literal["rows", "columns", "neither"]
    bias: bool = False

    def shape(self, keep: int, units: int) -> tuple[int, int]:
        """(rows, columns) when `keep` of `units` units are left."""
        rows = self.rows * keep // units if self.pruned == "rows" else self.rows
        columns = self.columns * keep // units if self.pruned == "columns" else self.columns
        return rows, columns


@dataclass(frozen=True)
class Site:
    """One place in the network that gets one decision.

    `units` is what an action's `keep` counts: key/value groups of an attention, channels of a feed-forward,
    1 for embedding and head, which are never pruned. `float_bytes`: of a scale or a bias in the exported file.
    `share`: of the tokens, those that reach it on average; all, but for an expert of a mixture, which is a feed-forward, too.
    `part`: of the blocks of an encoder-decoder, its encoder, which runs once a text; the decoder; or attention across, from
    the decoder to what the encoder gave. `tables`: what is stored beside the matrices, goes with the units and stays fp32.
    """

    name: str
    kind: Literal["attention", "ffn", "embedding", "head"]
    layer: int | None
    units: int
    matrices: tuple[Matrix, ...]
    float_bytes: int = 4
    share: float = 1.0
    part: Literal["encoder", "decoder", "cross"] | None = None
    tables: tuple[Matrix, ...] = ()

    @property
    def sub_layer(self) -> str:
        """The sub-layer of a block to which it belongs: itself, or the mixture of which it is an expert."""
        return self.name.split(".experts.")[0].removesuffix(".shared")

    def reached(self, tokens: int) -> int:
        """How many of so many tokens reach it on average, at least one."""
        return max(1, round(self.share * tokens))

    @property
    def parameters(self) -> int:
        """Number of weights at full size."""
        return sum(matrix.rows * matrix.columns for matrix in self.matrices)

    @property
    def inputs(self) -> dict[str, tuple[Matrix, ...]]:
        """The matrices of an attention or feed-forward by what they read: `{name}.in`, the stream, q, k, v or gate, up; of
        attention across q alone, and `{name}.source`, what the encoder gave, k, v; `{name}.out`, o or down."""
        found: dict[str, tuple[Matrix, ...]] = {}
        for matrix in self.matrices:
            read = "out" if matrix.pruned == "columns" else "in"
            if self.part == "cross" and matrix.name.endswith((".k", ".v")):
                read = "source"
            found[f"{self.name}.{read}"] = (*found.get(f"{self.name}.{read}", ()), matrix)
        return found

    def stored(self, action: Action) -> list[tuple[Matrix, Format]]:
        """Its matrices and tables, and the formats that an action gives them; none where it is dropped."""
        if action.keep == 0:
            return []
        formats = Formats.parse(action.format)
        own = [(matrix, formats.of(matrix.name)) for matrix in self.matrices]
        return own + [(table, FP32) for table in self.tables]

    def products(self, action: Action) -> dict[str, tuple[tuple[Matrix, ...], Format]]:
        """What its matrices are in the exported file, by name there: (matrices that are one, their format). Of an attention
        those are one that read the same and have one format; `{name}.qkv` say, or `{name}.q` and `{name}.kv`."""
        reads = {matrix.name: read for read, matrices in self.inputs.items() for matrix in matrices}
        together: dict[tuple[str, Format], tuple[Matrix, ...]] = {}
        for matrix, format in self.stored(action):
            key = (reads.get(matrix.name, matrix.name), format) if self.kind == "attention" else (matrix.name, format)
            together[key] = (*together.get(key, ()), matrix)
        found = {}
        for (_, format), parts in together.items():
            joined = f"{self.name}." + "".join(part.name[-1] for part in parts)
            found[joined if len(parts) > 1 else parts[0].name] = parts, format
        return found

    def size_bytes(self, action: Action) -> int:
        """Bytes of the exported data file that this site takes under `action`, alignment included."""
        total = 0
        for matrix, fmt in self.stored(action):
            rows, columns = matrix.shape(action.keep, self.units)
            sizes = fmt.tensor_bytes(rows, columns, self.float_bytes)
            sizes += [self.float_bytes * rows] if matrix.bias else []
            total += sum(aligned(size) for size in sizes)
        return total


@dataclass(frozen=True, order=True)
class Action:
    """What is decided for a site: how many units are kept (0 drops the sub-layer) and in which format, a pair included."""

    keep: int
    format: str

    def __str__(self) -> str:
        return "dropped" if self.keep == 0 else f"{self.keep}:{self.format}"


DROP = Action(0, DROPPED.name)


@dataclass(frozen=True)
class Plan(Mapping[str, Action]):
    """An action for every site, in depth order. Iterates over site names."""

    actions: tuple[tuple[str, Action], ...]

    @cached_property
    def _by_name(self) -> dict[str, Action]:
        return dict(self.actions)

    def __getitem__(self, site: str) -> Action:
        return self._by_name[site]

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.actions)

    def __len__(self) -> int:
        return len(self.actions)

    def __hash__(self) -> int:
        return hash(self.actions)

    @property
    def digest(self) -> str:
        """Sixteen hex digits that name this plan."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def diff(self, other: Plan) -> dict[str, tuple[Action, Action]]:
        """The sites on which two plans differ: name -> (ours, theirs)."""
        theirs = dict(other.actions)
        return {name: (action, theirs[name]) for name, action in self.actions if theirs[name] != action}

    def to_json(self) -> str:
        return json.dumps({name: {"keep": a.keep, "format": a.format} for name, a in self.actions}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls(tuple((name, Action(a["keep"], a["format"])) for name, a in json.loads(text).items()))


@dataclass(frozen=True)
class Score:
    """What a real evaluation of a plan said.

    kl: KL(teacher || student) in nats per token on the calibration text, over `tokens` tokens; lower is better.
    perplexity: the student's perplexity on the same tokens.
    part: which of the `PARTS` parts of the scoring text that was; None is all of it, and only such scores decide.
    by_part: of a score on all of it, the KL on every part, to which scores on that part compare.
    """

    kl: float
    perplexity: float
    tokens: int
    part: int | None = None
    by_part: tuple[float, ...] = ()

    @property
    def share(self) -> float:
        """How much of the scoring text that was."""
        return 1.0 if self.part is None else 1 / PARTS


PARTS = 8
"""Parts of the scoring text, windows p, p + PARTS, ... each: a plan is scored on one of them or on all."""


ActionMenu = Mapping[str, tuple[Action, ...]]
"""The actions that each site may take, by site name."""


def menu_json(menu: ActionMenu) -> dict[str, list[str]]:
    """A menu as JSON, for keys."""
    return {name: [str(action) for action in choices] for name, choices in menu.items()}
