"""Exported students in ONNX Runtime: sessions on the device that was asked for, generation, and calls to be timed.

Knows nothing of plans beyond what a stack of sites needs; times nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from compressor.errors import RuntimeTargetError
from compressor.export.exact import exact_graph
from compressor.export.files import DATA_FILE, has_encoder, store
from compressor.export.graph import (
    ENCODER_FILE,
    FIRST_FILE,
    GRAPH_FILE,
    HIDDEN,
    KEEP,
    NEXT_FILE,
    PAD,
    START,
    stack_model,
)
from compressor.export.layers import Store
from compressor.export.layout import Stored
from compressor.plan import Action, Formats, Site
from compressor.runtimes import BenchCalls, Device
from compressor.student import Decoder, Forced, Precision

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PLACED = ("MatMulNBits", "MatMulIntegerToFloat", "FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention")
"""Operators that a device has to run itself; without a word, ONNX Runtime gives to the CPU what it has no kernel for."""

ROOM = 64
"""Positions that a cache has room for beyond those that are asked for, at least."""

REMEDY = "install onnxruntime-gpu instead of onnxruntime on a machine with a GPU, or set target.device: cpu"


def open_session(
    model: Path | bytes, device: Device = "cpu", threads: int | None = None, data: Path | None = None
) -> ort.InferenceSession:
    """A session on `device`; `threads` within an operator, None for one a core; data: the folder of a graph's weights that
    is itself in memory.

    Raises:
        RuntimeTargetError: ONNX Runtime has no such provider, or fell back to another one, for the whole or for operators
            that matter.
    """
    wanted = available_provider(device)
    if device == "cuda":
        ort.preload_dlls()  # CUDA's libraries may have come as packages
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # a session that waits must not spin on the cores that another one is timed on
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if data:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data))
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = ort.InferenceSession(str(model) if isinstance(model, Path) else model, options, providers=[wanted])
    except Exception as error:  # ONNX Runtime's exceptions have no common base
        what = model if isinstance(model, Path) else "a graph in memory"
        raise RuntimeTargetError(f"ONNX Runtime refused {what}: {str(error).strip().splitlines()[0]}") from error
    check_provider(session.get_providers(), wanted)
    check_placement(session, wanted)
    return session


def check_placement(session: ort.InferenceSession, wanted: str) -> None:
    """Raise RuntimeTargetError if an operator of `PLACED` runs elsewhere than on `wanted`."""
    subgraphs = session.get_provider_graph_assignment_info()
    placed = [(graph.ep_name, node.op_type) for graph in subgraphs for node in graph.get_nodes()]
    if elsewhere := sorted({kind for provider, kind in placed if provider != wanted and kind in PLACED}):
        raise RuntimeTargetError(f"{wanted} has no kernel for {', '.join(elsewhere)} as this model needs it")


def available_provider(device: Device) -> str:
    """Name of the execution provider for `device`.

    Raises:
        RuntimeTargetError: this ONNX Runtime doesn't have it.
    """
    wanted, available = PROVIDERS[device], ort.get_available_providers()
    if wanted not in available:
        raise RuntimeTargetError(f"expected {wanted}; this onnxruntime has {available}; {REMEDY}")
    return wanted


def check_provider(providers: list[str], wanted: str) -> None:
    """Raise RuntimeTargetError unless `wanted` comes first: onnxruntime-gpu falls back to CPU without a word."""
    if providers[0] != wanted:
        raise RuntimeTargetError(f"expected {wanted}, the session runs on {providers[0]}; {REMEDY}")


def refused_formats(
    kind: Literal["attention", "ffn", "embedding"], formats: Sequence[str], device: Device, precision: Precision
) -> dict[str, str]:
    """What ONNX Runtime says of the formats that it does not run, by name: a site of this kind with a few weights is tried.

    Raises:
        RuntimeTargetError: it does not run on the device at all.
    """
    available_provider(device)
    frequencies = tuple(10000.0 ** (-i / 32) for i in range(32))
    probe = Decoder(1, 256, 4, 2, 64, 256, 256, 64, 1e-5, frequencies, 1.0, tied=True, precision=precision)
    site = next(site for site in probe.sites() if site.kind == kind)
    refused: dict[str, str] = {}
    for name in formats:
        if Formats.parse(name).of_bitsandbytes:
            refused[name] = "ONNX Runtime has no kernel for it; target.runtime: torch has"
            continue
        try:
            action = Action(site.units, name)
            calls = site_stack(probe, site, action, 1, prefill_tokens=2, context=0, device=device, threads=1)
            calls.prefill()
            calls.close()
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            refused[name] = str(error).strip().splitlines()[0]
    return refused


class _Runner:
    """A session and what its runs hand on: what comes out as `present.*` goes in as `past_key_values.*`, and the
    `last_hidden_state` of an encoder as `encoder_hidden_states`.

    in_place: caches lie in buffers with room for more and are written there, as ONNX Runtime GenAI does it:
    `past_key_values.*` and `present.*` are the same memory. So where the mask says how many tokens there are; not on CUDA,
    where it was not tried.
    """

    def __init__(
        self,
        model: Path | bytes,
        device: Device,
        threads: int | None,
        data: Path | None = None,
        exact: bool = False,
    ):
        self._device: Device = "cpu" if exact else device
        with exact_graph(model) if exact and isinstance(model, Path) else nullcontext(model) as graph:
            self._session = open_session(graph, self._device, threads, data)
        # copied, since ONNX Runtime's own descriptions hold on to the weights behind `close`
        self._inputs = {value.name: (value.shape, value.type) for value in self._session.get_inputs()}
        self._caches = {name: value for name, value in self._inputs.items() if name.startswith("past_key_values.")}
        self._can_keep = KEEP in (value.name for value in self._session.get_overridable_initializers())
        self._outputs = {value.name: _handed_on(value.name) for value in self._session.get_outputs()}
        self.in_place = bool(self._caches) and self._device == "cpu" and "attention_mask" in self._inputs
        self._last: tuple[ort.IOBinding | None, dict[str, ort.OrtValue]] = None, {}

    def past(self, length: int, rng: np.random.Generator | None = None) -> dict[str, ort.OrtValue]:
        """Cache inputs for `length` positions: zeros, or random."""
        arrays = {}
        for name, ((_, heads, _, head_dim), type) in self._caches.items():
            shape = (1, heads, length, head_dim)
            floats = np.float16 if type == "tensor(float16)" else np.float32
            filled = np.zeros(shape, floats) if rng is None else rng.standard_normal(shape, np.float32)
            arrays[name] = filled.astype(floats, copy=False)
        return self.values(arrays)

    def values(self, arrays: Mapping[str, np.ndarray]) -> dict[str, ort.OrtValue]:
        """Arrays in the device's memory."""
        return {name: ort.OrtValue.ortvalue_from_numpy(array, self._device) for name, array in arrays.items()}

    def run(
        self, name: str, array: np.ndarray, past: Mapping[str, ort.OrtValue], past_length: int, keep: int = 0
    ) -> tuple[ort.OrtValue, dict[str, ort.OrtValue]]:
        """Feed `array` [1, S, ...] as input `name`; (first output that is not handed on, in host memory; the others, as
        inputs of the next run).

        past: what earlier runs gave, of which this one takes what it has inputs for; caches are written in place where that
            can be.
        keep: logits of so many last positions, all if it is 0 or if the graph is an older one that cannot choose.
        """
        if self._session is None:
            raise RuntimeTargetError("this session is closed; open the folder again")
        length = past_length + array.shape[1]
        past = self._with_room(past, length)
        binding = self._bound(past)
        binding.bind_cpu_input(name, array)
        if "attention_mask" in self._inputs:
            binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        if "cache_position" in self._inputs:
            binding.bind_cpu_input("cache_position", np.arange(past_length, length))
        if self._can_keep:
            binding.bind_ortvalue_input(KEEP, ort.OrtValue.ortvalue_from_numpy(np.array(keep, np.int64)))
        self._session.run_with_iobinding(binding)
        results = list(zip(self._outputs.values(), binding.get_outputs(), strict=True))
        first = next((value for into, value in results if not into), None)
        # of memory that was given, it is the value that was given that holds it
        return first, {into: past[into] if self.in_place else value for into, value in results if into}

    def _bound(self, past: Mapping[str, ort.OrtValue]) -> ort.IOBinding:
        """A binding of what earlier runs gave and of what comes out. The last one is taken again as long as the caches that
        are written in place are the same: binding them all takes a twentieth of a token's time."""
        values = {key: value for key, value in past.items() if key in self._inputs}
        binding, bound = self._last
        if anew := bound != values or binding is None:
            binding = self._session.io_binding()
            for key, value in values.items():
                binding.bind_ortvalue_input(key, value)
        for output, into in self._outputs.items():
            if not (into and self.in_place):
                binding.bind_output(output, self._device if into else "cpu")
            elif anew:
                binding.bind_ortvalue_output(output, past[into])
        if self.in_place:
            self._last = binding, values
        return binding

    def _with_room(self, past: Mapping[str, ort.OrtValue], length: int) -> Mapping[str, ort.OrtValue]:
        """Caches that are written in place, with room for so many positions: the same ones or copies."""
        if not self.in_place or past[next(iter(self._caches))].shape()[2] >= length:
            return past
        room = length + max(ROOM, length // 2)
        arrays = {name: past[name].numpy() for name in self._caches}
        wider = {
            name: np.pad(array, ((0, 0), (0, 0), (0, room - array.shape[2]), (0, 0))) for name, array in arrays.items()
        }
        return {**past, **self.values(wider)}

    def close(self) -> None:
        """Free the weights and end the session's threads."""
        self._session, self._last = None, (None, {})

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _handed_on(output: str) -> str | None:
    """The input of the next run that an output is, if it is one."""
    if output == HIDDEN:
        return "encoder_hidden_states"
    return output.replace("present", "past_key_values", 1) if output.startswith("present.") else None


@dataclass(frozen=True)
class Cache:
    """Keys and values of the `length` tokens seen so far, in the device's memory. What follows them may be written behind
    them there: of two texts that go on from one cache, the second overwrites the first."""

    length: int
    values: dict[str, ort.OrtValue]


class OnnxDecoder(_Runner):
    """An exported folder, ready to run; a context manager that closes its session. A masked language model only has `logits`.

    Args:
        folder: as `export_onnx` left it.
        threads: within an operator; None for one a core.
        exact: in float32 without the rounding of activations, for comparisons with torch; slow, and on the CPU, whatever the
            device (see `exact_graph`).

    Raises:
        RuntimeTargetError: the folder holds no graph, or the provider is not the one asked for.
    """

    GRAPH = GRAPH_FILE

    def __init__(self, folder: Path, device: Device = "cpu", threads: int | None = None, *, exact: bool = False):
        graph = Path(folder) / self.GRAPH
        if not graph.is_file():
            raise RuntimeTargetError(f"expected an exported model at {graph}; there is none")
        super().__init__(graph, device, threads, exact=exact)

    @property
    def answers(self) -> bool:
        """Whether what it writes is an answer to a text, and not what follows it."""
        return False

    @property
    def writes(self) -> bool:
        """Whether it goes on from a cache: what was exported of a causal model."""
        return self._can_keep or bool(self._caches)

    @property
    def provider(self) -> str:
        """The execution provider that runs this model."""
        return self._session.get_providers()[0]

    def prefill(self, ids: np.ndarray, keep: int = 0) -> tuple[np.ndarray, Cache]:
        """Token ids [S] -> (logits [S, V], or of the `keep` last positions only, cache)."""
        return self.extend(ids, self._empty(len(ids)), keep)

    def _empty(self, tokens: int) -> Cache:
        """In front of so many tokens."""
        return Cache(0, self.past(tokens + ROOM if self.in_place else 0))

    def step(self, token: int, cache: Cache) -> tuple[np.ndarray, Cache]:
        """One more token -> (logits [V], the longer cache); `cache` stays what it is."""
        logits, cache = self.extend(np.array([token]), cache)
        return logits[0], cache

    def extend(self, ids: np.ndarray, cache: Cache, keep: int = 0) -> tuple[np.ndarray, Cache]:
        """More tokens [S] behind `cache` -> (logits [S, V], or of the `keep` last positions only, the longer cache)."""
        ids = np.ascontiguousarray(ids, np.int64).reshape(1, -1)
        logits, values = self.run("input_ids", ids, cache.values, cache.length, keep)
        found, longer = logits.numpy(), Cache(cache.length + ids.shape[1], {**cache.values, **values})
        return found.reshape(-1, found.shape[-1])[-keep:].astype(np.float32, copy=False), longer

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """Token ids [S] -> logits [S, V], or [1, classes], or of an embedder the embedding [1, D]."""
        return self.prefill(ids)[0]

    def generate(self, ids: np.ndarray, new_tokens: int, ends: Collection[int] = ()) -> list[int]:
        """At most `new_tokens` greedy tokens that follow `ids`; ends behind one of `ends`."""
        logits, cache = self.prefill(ids, keep=1)
        made = [self.pick(logits[-1], 0, new_tokens)]
        while len(made) < new_tokens and made[-1] not in ends:
            logits_V, cache = self.step(made[-1], cache)
            made.append(self.pick(logits_V, len(made), new_tokens))
        return made[:new_tokens]

    def pick(self, logits_V: np.ndarray, place: int, length: int) -> int:
        """The likeliest token, for a place of a text of at most `length`."""
        return int(logits_V.argmax())

    def rehearse(self, prefill_tokens: int) -> None:
        """One prefill and, where it writes, eight decoded tokens, for what they take of memory."""
        _, cache = self.prefill(np.zeros(prefill_tokens, np.int64), keep=1)
        for _ in range(8 if self.writes else 0):
            _, cache = self.step(0, cache)

    def bench_callables(self, prefill_tokens: int, context: int) -> BenchCalls:
        """Calls to be timed: `prefill_tokens` tokens at once to the logits of the last, and one token behind `context` cached
        ones."""
        vocabulary = self._session.get_outputs()[0].shape[-1]
        rng = np.random.default_rng(0)
        ids = rng.integers(0, vocabulary, max(prefill_tokens, context))
        if not self.writes:
            return BenchCalls(lambda: self.logits(ids[:prefill_tokens]), lambda: self.logits(ids[:1]), self.close)
        cache = self.prefill(ids[:context], keep=1)[1] if context else self._empty(1)
        return BenchCalls(
            lambda: self.prefill(ids[:prefill_tokens], keep=1), lambda: self.step(int(ids[0]), cache), self.close
        )


class OnnxEncoderDecoder(OnnxDecoder):
    """An exported encoder-decoder, ready to run: what `prefill` and `generate` get is read by the encoder, and answered."""

    GRAPH = NEXT_FILE

    def __init__(self, folder: Path, device: Device = "cpu", threads: int | None = None, *, exact: bool = False):
        super().__init__(folder, device, threads, exact=exact)
        self._encoder, self._first = (
            _Runner(Path(folder) / name, device, threads, exact=exact) for name in (ENCODER_FILE, FIRST_FILE)
        )
        facts = self._session.get_modelmeta().custom_metadata_map
        self._start, self._pad = int(facts[START]), int(facts[PAD])
        self._forced = _forced(Path(folder) / "generation_config.json")

    @property
    def answers(self) -> bool:
        return True

    def prefill(self, ids: np.ndarray, keep: int = 0) -> tuple[np.ndarray, Cache]:
        """Token ids [S] of a source -> (logits [1, V] of the first token of an answer, cache)."""
        return self.extend(np.array([self._start]), self._read(ids), keep)

    def pick(self, logits_V: np.ndarray, place: int, length: int) -> int:
        """Or the one that is forced there."""
        forced = self._forced.at(place, length)
        return super().pick(logits_V, place, length) if forced is None else forced

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """A window [L] of source and target (see `text.Spans`) -> logits [L, V], zeros where it is not the target's."""
        (said,) = np.nonzero(ids < 0)
        first, end = said[0], said[-1] + 1
        source = ids[:first]
        before = np.maximum(ids, ~ids)[first : end - 1]
        found, _ = self.extend(np.array([self._start, *before]), self._read(source[source != self._pad]))
        return np.pad(found, ((first, len(ids) - end), (0, 0)))

    def run(
        self, name: str, array: np.ndarray, past: Mapping[str, ort.OrtValue], past_length: int, keep: int = 0
    ) -> tuple[ort.OrtValue, dict[str, ort.OrtValue]]:
        """The first step has a graph of its own."""
        if not past_length:
            return self._first.run(name, array, past, 0, keep)
        return super().run(name, array, past, past_length, keep)

    def bench_callables(self, prefill_tokens: int, context: int) -> BenchCalls:
        """Calls to be timed: a source of `prefill_tokens` tokens to the logits of the first of its answer, and one token more
        behind `context` of them."""
        ids = np.random.default_rng(0).integers(
            0, self._session.get_outputs()[0].shape[-1], max(prefill_tokens, context)
        )
        _, cache = self.extend(ids[:context], self._read(ids[:prefill_tokens]), keep=1)
        return BenchCalls(lambda: self.prefill(ids[:prefill_tokens]), lambda: self.step(int(ids[0]), cache), self.close)

    def _read(self, ids: np.ndarray) -> Cache:
        """A source [S] -> the cache in front of its answer."""
        source = np.ascontiguousarray(ids, np.int64).reshape(1, -1)
        _, values = self._encoder.run("input_ids", source, {}, 0)
        return Cache(0, {**self.values({"encoder_attention_mask": np.ones_like(source)}), **values})

    def close(self) -> None:
        super().close()
        self._encoder.close()
        self._first.close()


def _forced(path: Path) -> Forced:
    """What a configuration that lies beside the graphs, if there is one, forces to be said."""
    try:
        return Forced.of(json.loads(path.read_text())) if path.is_file() else Forced()
    except (ValueError, TypeError, AttributeError) as error:
        raise RuntimeTargetError(f"{path} cannot be read ({error}); export the model again") from None


def open_model(folder: Path, device: Device = "cpu", threads: int | None = None, *, exact: bool = False) -> OnnxDecoder:
    """An exported folder, ready to run; arguments as of `OnnxDecoder`."""
    kind = OnnxEncoderDecoder if has_encoder(folder) else OnnxDecoder
    return kind(folder, device, threads, exact=exact)


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
    """`copies` repetitions of `site` under `action` with random weights, mapped from a file as an exported folder's are,
    as calls to be timed.

    The graph is `graph.stack_model`: the very functions that build the export. An expert's prefill is of as many tokens as
    reach it on average. Of an encoder-decoder, the encoder reads the prompt; what is behind it then runs for one token, and
    in decoding alone.
    """
    shapes = {matrix.name: matrix.shape(action.keep, site.units) for matrix, _ in site.stored(action)}
    formats = {matrix.name: format for matrix, format in site.stored(action)}
    biased = {matrix.name for matrix in site.matrices if matrix.bias}
    rng = np.random.default_rng(0)

    def matrices(names: tuple[str, ...]) -> Stored:
        # drawn anew for every copy: ONNX Runtime keeps prepacked weights of equal contents once, which fit in a cache
        parts = [f"{site.name}.{name.rsplit('.', 1)[-1]}" if site.layer is not None else name for name in names]
        rows, columns = sum(shapes[part][0] for part in parts), shapes[parts[0]][1]
        return Stored.random(rng, formats[parts[0]], rows, columns, parts[0] in biased, decoder.floats)

    def opened(make: Callable[[Store], ir.Model]) -> _Runner:
        with TemporaryDirectory() as folder:
            with open(Path(folder, DATA_FILE), "wb") as data:
                model = make(partial(store, data))
            return _Runner(ir.serde.serialize_model(model).SerializeToString(), device, threads, Path(folder))

    make = partial(stack_model, decoder, site, action, copies, matrices)
    runner = first = opened(make)
    if site.kind == "attention" and site.part in ("decoder", "cross"):
        first = opened(partial(make, first=True))
    many: np.ndarray
    prefill_tokens = site.reached(prefill_tokens)
    if site.kind == "embedding":
        name, ids = "input_ids", rng.integers(0, decoder.vocabulary, prefill_tokens)
        many = ids[None]
    else:
        name = "x"
        many = rng.standard_normal((1, prefill_tokens, decoder.hidden), np.float32).astype(decoder.floats)
    one, across = many[:, :1], site.part == "cross"
    empty = first.past(prefill_tokens if first.in_place else 0)
    filled = runner.past(prefill_tokens if across else context + int(runner.in_place), rng)
    if across:
        mask = np.ones(many.shape[:2], np.int64)
        source = runner.values({"encoder_attention_mask": mask, "encoder_hidden_states": many})
        empty, filled = empty | source, filled | source
    fed = one if site.part in ("decoder", "cross") else many
    behind = context if decoder.causal else 0

    def decode() -> object:
        return None if site.part == "encoder" else runner.run(name, one, filled, behind)

    def close() -> None:
        runner.close()
        first.close()

    return BenchCalls(lambda: first.run(name, fed, empty, 0), decode, close)
