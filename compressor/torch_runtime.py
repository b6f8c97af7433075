"""Students in torch: float matrices, and those that bitsandbytes multiplies with: 4 bits (NF4 and FP4, blocks of 64) and
LLM.int8() without outliers.

The other runtime is `compressor.export`, with functions of the same names. A folder holds model.safetensors: matrices and
vectors under transformers' names where the family's modules are written as ours are, else under ours; quantized ones as
bitsandbytes writes them. Where nothing is pruned, transformers' `from_pretrained` reads the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from compressor.errors import BankError, RuntimeTargetError
from compressor.families import module_names
from compressor.files import write_bytes_atomic, write_text_atomic
from compressor.model import network_from_config
from compressor.network import Network
from compressor.plan import Action, Format, Formats, Plan, Site
from compressor.quantize import Weight, codebook, quantize
from compressor.runtimes import BenchCalls, Device
from compressor.student import Decoder, Lazy, Precision, Student, full_plan
from compressor.transformer import Attention, Cache, Context, FeedForward, Norm

FILE = "model.safetensors"
HEADER_BYTES = 200
"""Of the file's header, for a tensor, at most."""

DTYPES = {"float32": torch.float32, "float16": torch.float16}


def refused_formats(
    kind: Literal["attention", "ffn", "embedding"], formats: Sequence[str], device: Device, precision: Precision
) -> dict[str, str]:
    """Why formats cannot be deployed, by name.

    Raises:
        RuntimeTargetError: torch does not run on the device at all.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeTargetError(
            "expected a GPU, torch sees none; install a CUDA build of torch, or set target.device: cpu"
        )
    refused = {}
    for name in formats:
        found = Formats.parse(name)
        if any(format.kind != "float" and not format.of_bitsandbytes for format in found.each):
            refused[name] = "target.runtime: torch knows fp32, fp16, nf4, fp4 and int8row"
        elif found.of_bitsandbytes and kind == "embedding":
            refused[name] = "bitsandbytes has no kernel that looks up rows"
        elif found.of_bitsandbytes:
            try:
                import bitsandbytes  # type: ignore[import-untyped] # noqa: F401
            except ImportError as error:
                refused[name] = f"bitsandbytes cannot be imported ({error}); pip install bitsandbytes"
    return refused


def fixed_bytes(decoder: Decoder) -> int:
    """Bytes of everything in the file that no site accounts for: an upper bound, whatever the plan."""
    vectors = decoder.vectors()
    matrices = [matrix for site in decoder.sites() for matrix in site.matrices]
    stored = sum(4 * prod(shape) for shape in vectors.values())
    return stored + HEADER_BYTES * (6 * len(matrices) + len(vectors) + 1)


def fp32_bytes(decoder: Decoder) -> int:
    """An upper bound of `exported_bytes` of a model as it is given."""
    plan = full_plan(decoder, "fp32", "fp32")
    return fixed_bytes(decoder) + sum(site.size_bytes(plan[site.name]) for site in decoder.sites())


def exported_files(folder: Path) -> list[Path]:
    """The weights."""
    return [Path(folder) / FILE]


def exported_bytes(folder: Path) -> int:
    """Size in bytes of the weights, the quantity that a byte budget limits."""
    return (Path(folder) / FILE).stat().st_size


# -- the file --


def save_model(student: Student, network: Network, folder: Path) -> None:
    """Write a student's weights into `folder`, and what transformers has to know to read them. network: the teacher's."""
    names = _names(network, student.decoder)
    tensors: dict[str, Tensor] = {}
    for name, weight in student.matrices.items():
        for part, tensor in _stored(weight, student.decoder.precision).items():
            tensors[f"{names.get(name, name)}.{part}"] = tensor.contiguous()
    for name, vector in student.vectors.items():
        tensors[_vector_name(names, name)] = vector.contiguous()
    metadata = {"format": "pt", "precision": student.decoder.precision}
    write_bytes_atomic(folder / FILE, to_safetensors(tensors, metadata=metadata))
    config = folder / "config.json"
    if config.is_file() and (told := _quantization_config(student, network, names)):
        write_text_atomic(config, json.dumps(json.loads(config.read_text()) | told, indent=2))


def save_random(plan: Plan, network: Network, folder: Path) -> None:
    """Write weights of a plan's shape that are random, for timing. network: the teacher's."""
    decoder, random = network.decoder, _seeded()

    def made(site: Site, action: Action, name: str) -> Weight:
        matrix, format = next(pair for pair in site.stored(action) if pair[0].name == name)
        return _random(matrix.shape(action.keep, site.units), format, matrix.bias, random)

    shapes = decoder.vectors()
    vectors = {name: torch.ones(shapes[name]) for name in decoder.vectors_of(plan)}
    save_model(Student(decoder, plan, Lazy(decoder.sites(), plan, made), vectors), network, folder)


def _random(shape: tuple[int, int], format: Format, bias: bool, random: torch.Generator) -> Weight:
    """A matrix of a plausible size."""
    rows, columns = shape
    added = torch.zeros(rows) if bias else None
    if format.kind == "float":
        return replace(quantize(0.05 * torch.randn(shape, generator=random), format), bias=added)
    if format.rowwise:
        codes = torch.randint(-127, 128, shape, generator=random, dtype=torch.int8)
        return Weight(format, codes=codes, scales=torch.full((rows, 1), 5e-4), bias=added)
    codes = torch.randint(16, shape, generator=random, dtype=torch.uint8)
    return Weight(format, codes=codes, scales=torch.full((rows, -(-columns // format.block)), 0.1), bias=added)


def _names(network: Network, decoder: Decoder) -> dict[str, str]:
    return module_names(network.configuration[0], decoder) or {}


def _vector_name(names: Mapping[str, str], name: str) -> str:
    module, kind = (name.removesuffix(".bias"), "bias") if name.endswith(".bias") else (name, "weight")
    return f"{names.get(module, module)}.{kind}"


def _stored(weight: Weight, precision: Precision) -> dict[str, Tensor]:
    """A matrix as it lies in the file, by the names that bitsandbytes gives its parts."""
    dtype = DTYPES[precision]
    bias = {} if weight.bias is None else {"bias": weight.bias.to(dtype)}
    if weight.values is not None:
        return {"weight": weight.values, **bias}
    assert weight.codes is not None and weight.scales is not None
    if weight.format.rowwise:
        limits_O = 127 * weight.scales.flatten()
        return {"weight": weight.codes, "SCB": limits_O, "weight_format": torch.tensor(0, dtype=torch.uint8), **bias}
    if weight.shape[1] % weight.format.block:
        raise RuntimeTargetError(
            f"bitsandbytes stores {weight.format.name} in blocks of {weight.format.block}, a matrix reads {weight.shape[1]} "
            f"channels: take {weight.format.name} out of search.formats, or keep multiples of {weight.format.block}"
        )
    state = {"quant_type": weight.format.name, "blocksize": weight.format.block, "dtype": precision}
    told = json.dumps(state | {"shape": list(weight.shape)}).encode()
    pairs = weight.codes.reshape(-1, 2)
    return {
        "weight": (pairs[:, :1] << 4) | pairs[:, 1:],
        "weight.absmax": weight.scales.flatten(),
        "weight.quant_map": codebook(weight.format, weight.scales),
        f"weight.quant_state.bitsandbytes__{weight.format.name}": torch.tensor(list(told), dtype=torch.uint8),
        **bias,
    }


def _quantization_config(student: Student, network: Network, names: Mapping[str, str]) -> dict[str, Any] | None:
    """For transformers, where it can read the folder: nothing pruned, and quantized matrices of one kind."""
    whole = all(student.plan[site.name].keep == site.units for site in student.decoder.sites())
    stored = [pair for site in student.decoder.sites() for pair in site.stored(student.plan[site.name])]
    kinds = {format.name for _, format in stored if format.of_bitsandbytes}
    if not names or not whole or len(kinds) != 1:
        return None
    skipped = [names[matrix.name] for matrix, format in stored if format.kind == "float" and matrix.name in names]
    told: dict[str, Any] = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": [*skipped, names["head"]]}
    if kinds == {"int8row"}:
        told |= {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    else:
        told |= {"load_in_4bit": True, "bnb_4bit_quant_type": next(iter(kinds))}
        told |= {"bnb_4bit_compute_dtype": student.decoder.precision, "bnb_4bit_quant_storage": "uint8"}
    return {"quantization_config": told}


def read_student(folder: Path, decoder: Decoder, plan: Plan) -> Student:
    """The student that was saved in `folder` under `plan`, exactly but for the rounding of biases to its precision and
    the last bit of int8row's scales.

    Raises:
        BankError: the file is missing or truncated, or does not hold what the plan says.
    """
    path = Path(folder) / FILE
    names = _names(network_from_config(Path(folder)), decoder)
    matrices: dict[str, Weight] = {}
    try:
        with safe_open(path, "pt") as file:
            decoder = replace(decoder, precision=(file.metadata() or {}).get("precision", "float32"))
            stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        for site in decoder.sites():
            action = plan[site.name]
            for matrix, format in site.stored(action):
                parts = {key: stored.get(f"{names.get(matrix.name, matrix.name)}.{key}") for key in _PARTS}
                shape = matrix.shape(action.keep, site.units)
                matrices[matrix.name] = _weight(format, shape, parts)
        vectors = {name: stored[_vector_name(names, name)].float() for name in decoder.vectors_of(plan)}
    except (OSError, SafetensorError, KeyError, RuntimeError, AttributeError) as error:
        raise BankError(
            f"{path} cannot be read, or does not hold what its plan says ({error}); save it again"
        ) from error
    return Student(decoder, plan, matrices, vectors)


_PARTS = ("weight", "weight.absmax", "SCB", "bias")


def _weight(format: Format, shape: tuple[int, int], parts: Mapping[str, Any]) -> Weight:
    """The inverse of `_stored`."""
    stored, bias = parts["weight"], None if parts["bias"] is None else parts["bias"].float()
    if format.kind == "float":
        return Weight(format, values=stored.view(shape), bias=bias)
    if format.rowwise:
        return Weight(format, codes=stored.view(shape), scales=parts["SCB"][:, None] / 127, bias=bias)
    codes = torch.cat([stored >> 4, stored & 15], 1).view(shape)
    return Weight(format, codes=codes, scales=parts["weight.absmax"].view(shape[0], -1), bias=bias)


# -- running --


def linear(weight: Weight, precision: Precision, device: Device) -> nn.Module:
    """A matrix as the module that multiplies with it."""
    rows, columns = weight.shape
    dtype = DTYPES[precision]
    if weight.format.kind == "float":
        made: nn.Module = nn.Linear(columns, rows, weight.bias is not None, device=device, dtype=dtype)
        made.weight = nn.Parameter(weight.dequantize().to(device, dtype), requires_grad=False)
    elif weight.format.rowwise:
        parts = {key: tensor.to(device) for key, tensor in _stored(weight, precision).items()}
        made = RowInt8(parts["weight"], parts["SCB"])
    else:
        from bitsandbytes.functional import QuantState  # type: ignore[import-untyped]
        from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-untyped]

        parts = {key: tensor.to(device) for key, tensor in _stored(weight, precision).items()}
        state = QuantState(
            absmax=parts["weight.absmax"],
            shape=torch.Size(weight.shape),
            code=parts["weight.quant_map"],
            blocksize=weight.format.block,
            quant_type=weight.format.name,
            dtype=dtype,
        )
        made = Linear4bit(columns, rows, weight.bias is not None, dtype, quant_type=weight.format.name, device="meta")
        made.weight = Params4bit(
            parts["weight"],
            requires_grad=False,
            quant_state=state,
            blocksize=weight.format.block,
            quant_type=weight.format.name,
            bnb_quantized=True,
            module=made,
        )
        made.quant_state = state
    bias = None if weight.bias is None else nn.Parameter(weight.bias.to(device, dtype), requires_grad=False)
    made.register_parameter("bias", bias)
    return made


class RowInt8(nn.Module):
    """What bitsandbytes' Linear8bitLt without outliers computes, but in float32, and with no word about inputs that are so.

    y_to = sum_i code(x)_ti code(W)_oi  limit_t limit_o / 127^2         limits: the greatest sizes of a row
    """

    bias: nn.Parameter | None

    def __init__(self, codes_OI: Tensor, limits_O: Tensor):
        super().__init__()
        self._codes_OI, self._limits_O = codes_OI, limits_O  # no buffers: they keep their types wherever the model goes

    def forward(self, x: Tensor) -> Tensor:
        from bitsandbytes.functional import int8_linear_matmul, int8_vectorwise_quant

        x_TI = x.flatten(0, -2)
        codes_TI, limits_T, _ = int8_vectorwise_quant(x_TI if x.device.type == "cpu" else x_TI.half())
        sums_TO = int8_linear_matmul(codes_TI, self._codes_OI).float()
        y_TO = (sums_TO * limits_T[:, None] * self._limits_O / 127**2).to(x.dtype)
        return (y_TO if self.bias is None else y_TO + self.bias).unflatten(0, x.shape[:-1])


class TorchDecoder:
    """A saved folder, ready to run; the counterpart of `export.OnnxDecoder`.

    exact: with plain products of the values that 4-bit matrices stand for, in float32 on the CPU, for comparisons.
    """

    @torch.no_grad()
    def __init__(self, folder: Path, device: Device = "cpu", threads: int | None = None, *, exact: bool = False):
        folder = Path(folder)
        if not (folder / "plan.json").is_file():
            raise RuntimeTargetError(f"{folder}: expected an exported model, it has no plan.json")
        network = network_from_config(folder)
        plan = Plan.from_json((folder / "plan.json").read_text())
        student = read_student(folder, network.decoder, plan)
        precision = student.decoder.precision
        self._device: Device = "cpu" if exact else device
        for name, action in plan.items():
            site = network.sites[name]
            weights = {matrix.name: student.matrices[matrix.name] for matrix in site.matrices if action.keep}
            network.install(site, action, weights, "none")
            for key, weight in weights.items():
                if weight.format.of_bitsandbytes and not exact:  # site by site: never all matrices as floats
                    parent, _, part = key.rpartition(".")
                    setattr(network.module(parent), part, linear(weight, precision, device))
        for name, vector in student.vectors.items():
            network.vector(name).copy_(vector)
        if not exact:
            network.model.to(device, DTYPES[precision])
        self._network, self._threads, self._before = network, threads, torch.get_num_threads()
        if threads:
            torch.set_num_threads(threads)

    @property
    def writes(self) -> bool:
        """Whether it goes on from a cache: it is a causal model."""
        return self._network.decoder.causal

    @property
    def answers(self) -> bool:
        """Whether what it writes is an answer to a text: encoder-decoders don't run here."""
        return False

    @property
    def provider(self) -> str:
        """What runs this model."""
        return f"torch on {self._device}"

    @torch.no_grad()
    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Token ids [S] -> logits [S, V], or [1, classes]."""
        return self._network.window_logits(np.asarray(ids, np.int64)).float().cpu().numpy()

    def generate(self, ids: np.ndarray, new_tokens: int, ends: Collection[int] = ()) -> list[int]:
        """At most `new_tokens` greedy tokens that follow `ids`; ends behind one of `ends`."""
        with torch.no_grad():
            return self._network.greedy(torch.as_tensor(np.asarray(ids, np.int64)), new_tokens, ends)

    def bench_callables(self, prefill_tokens: int, context: int) -> BenchCalls:
        """Calls to be timed, as of `export.OnnxDecoder`."""
        network = self._network
        ids_L = torch.randint(network.decoder.vocabulary, (1, max(prefill_tokens, context)), generator=_seeded())
        ids_L = ids_L.where(ids_L != network.decoder.pad, network.decoder.filler)

        @torch.no_grad()
        def prefill() -> Tensor:
            hidden = network.hidden(ids_L[:, :prefill_tokens])
            return network.logits(hidden[:, -1:] if self.writes else hidden).cpu()

        if not self.writes:
            return BenchCalls(prefill, lambda: network.window_logits(ids_L[0, :1].numpy()).cpu(), self.close)
        step = network.cached_step(ids_L[:, :context])
        return BenchCalls(prefill, lambda: step().cpu(), self.close)

    def rehearse(self, prefill_tokens: int) -> None:
        """One prefill and eight decoded tokens, for what they take of memory."""
        ids = np.full(prefill_tokens, self._network.decoder.filler)
        self.generate(ids, 9) if self.writes else self.logits(ids)

    def close(self) -> None:
        """Give torch its threads back."""
        if self._threads:
            torch.set_num_threads(self._before)

    def __enter__(self) -> TorchDecoder:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@torch.no_grad()
def site_stack(
    decoder: Decoder,
    site: Site,
    action: Action,
    copies: int,
    *,
    prefill_tokens: int,
    context: int,
    device: Device = "cpu",
    threads: int | None = None,
) -> BenchCalls:
    """`copies` repetitions of `site` under `action` with random weights, as calls to be timed; as `export.site_stack`."""
    dtype, random = DTYPES[decoder.precision], _seeded()
    prefill_tokens = site.reached(prefill_tokens)
    stored = {matrix.name: (matrix, format) for matrix, format in site.stored(action)}

    def made(name: str) -> nn.Module:
        matrix, format = stored[name]
        weight = _random(matrix.shape(action.keep, site.units), format, matrix.bias, random)
        return linear(weight, decoder.precision, device)

    stack: list[Callable[[Tensor, Context], Tensor]] = []
    for copy in range(copies):
        if site.layer is None:
            norm, table = Norm.of(decoder).to(device, dtype), made(site.name)
            stack.append(_table(site, decoder, norm, table))  # type: ignore[arg-type]
            continue
        shape = replace(decoder, layers=copies)
        layer = (
            Attention(shape, copy) if site.kind == "attention" else FeedForward(shape, f"layers.{copy}.ffn", site.units)
        )
        for matrix in site.matrices:
            setattr(layer, matrix.name.rpartition(".")[2], made(matrix.name))
        layer.to(device, dtype)
        stack.append(_residual(layer))
    like = torch.zeros((), device=device, dtype=dtype)
    many = torch.randn(1, prefill_tokens, decoder.hidden, generator=random).to(like)
    if site.kind == "embedding":
        many = torch.randint(decoder.vocabulary, (1, prefill_tokens), generator=random).to(device)

    def run(x: Tensor, cache: Cache | None) -> Tensor:
        shared = Context.of(decoder, x.shape[1], cache, like)
        for layer in stack:
            if site.layer is None:
                given = layer(x, shared)
            else:
                x = given = layer(x, shared)
        return given.cpu()

    filled = Cache()
    with torch.no_grad():
        if site.kind == "attention" and decoder.causal and context:
            run(torch.randn(1, context, decoder.hidden, generator=random).to(like), filled)
            filled.length = context

    @torch.no_grad()
    def prefill() -> Tensor:
        return run(many, Cache() if decoder.causal else None)

    @torch.no_grad()
    def decode() -> Tensor:
        given = run(many[:, :1], filled if decoder.causal else None)
        filled.crop(context)
        return given

    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    return BenchCalls(prefill, decode, lambda: torch.set_num_threads(before))


def _residual(layer: Attention | FeedForward) -> Callable[[Tensor, Context], Tensor]:
    def run(x: Tensor, context: Context) -> Tensor:
        front = layer.front(x)
        return front + layer(front, context)

    return run


def _table(site: Site, decoder: Decoder, norm: Norm, table: nn.Linear) -> Callable[[Tensor, Context], Tensor]:
    """Lookup and final norm, and the head's product where it belongs to the site."""

    def run(x: Tensor, context: Context) -> Tensor:
        if site.kind == "embedding":
            x = nn.functional.embedding(x, table.weight)
        x = norm(x)
        if site.kind == "embedding" and not decoder.tied:
            return x
        return table(x[:, -1:] if decoder.causal else x)

    return run


open_model = TorchDecoder
