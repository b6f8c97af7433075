"""A model in torch as everything else sees it: matrices by name, inputs that can be watched, sites that can be replaced; and
`Stream`, which walks through it sub-layer by sub-layer. Its modules are `compressor.transformer`.

Shape letters: B batch, N windows, L tokens, S tokens of a source, D hidden, I inputs of a matrix, V vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from compressor.plan import Action, Format, Formats, Site
from compressor.quantize import Weight, as_floats, fake_dynamic_int8, fake_row_int8
from compressor.student import Forced, Student
from compressor.transformer import Cache, Linear, Rounder, Sides, Transformer

Rounding = Literal["none", "dynamic", "all"]

POSITIONS = 128
"""Whose logits are worked on at once: those of a long window over many tokens would take more memory than all else."""


def _rounder(fmt: Format, rounding: Rounding) -> Rounder:
    """What the format's kernels do to what they read, as far as it is imitated."""
    if fmt.quantizes_input and rounding != "none":
        return fake_row_int8 if fmt.rowwise else fake_dynamic_int8
    return None


def _block(fmt: Format, rounding: Rounding) -> int:
    """Channels whose codes share a scale in what a weight-only kernel makes of its input, 0 where that is not imitated."""
    return fmt.block if fmt.kind == "blockwise" and not fmt.a8 and rounding == "all" else 0


class Network:
    """A decoder whose sites can be replaced one by one.

    Args:
        model: its modules; taken over, not copied.
        configuration: transformers' configuration of the whole and of its generation, which are deployed with it.
        mask_token: what a model that is not causal reads where a token, or the text's class, is to be predicted.

    layerwise: its weights are mapped from a disk, since memory is short of them; see `student`.
    """

    layerwise = False

    def __init__(self, model: Transformer, configuration: tuple[Any, Any], mask_token: int | None = None):
        self.model, self.configuration = model.eval().requires_grad_(False), configuration
        self.mask_token = mask_token
        self.decoder = model.decoder
        self.sites = {site.name: site for site in self.decoder.sites()}

    def copy(self) -> Network:
        """A network whose sites and vectors can be replaced without touching this one's. Until they are, both have the same
        weights in memory, and no one may change these in place."""
        return self._sharing(Network)

    def student(self) -> Network:
        """A copy for a student's weights: a `Layerwise`, if this network is too large for memory."""
        return self._sharing(Layerwise if self.layerwise else Network)

    def _sharing(self, kind: type[Network]) -> Network:
        shared = {id(parameter): parameter for parameter in self.model.parameters()}
        return kind(copy.deepcopy(self.model, shared), self.configuration, self.mask_token)

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def to(self, device: torch.device | str) -> Network:
        self.model.to(device)
        return self

    # -- running --

    def hidden(self, ids_BL: Tensor) -> Tensor:
        """Final hidden states [B, L, D], which the head reads."""
        return self.model.hidden(self.seen(ids_BL))

    def every_hidden(self, ids_BL: Tensor) -> list[Tensor]:
        """Hidden states [B, L, D] of the embedding and behind every block; the last one is what the head reads."""
        return self.model.every_hidden(self.seen(ids_BL))

    def seen(self, ids: Tensor) -> Tensor:
        """Token ids as the model reads them, on its device: the mask token in place of masked ones (`text.Masking`). A
        window of an encoder-decoder as it is."""
        ids = ids.to(self.device)
        return ids if self.mask_token is None else ids.where(ids >= 0, self.mask_token)

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Hidden states -> logits [B, L, V]."""
        return self.model.logits(hidden_BLD)

    def written(self, ids_L: Tensor) -> Tensor:
        """A window without the padding behind its text."""
        blank_L = self.model.blank(ids_L)
        return ids_L if blank_L is None else ids_L[~blank_L]

    @torch.no_grad()
    def window_logits(self, ids_L: np.ndarray) -> Tensor:
        """Token ids [L] -> logits [L, V], or [1, classes], on the network's device, for `eval.perplexity`."""
        logits_LV = self.logits(self.hidden(self.written(torch.from_numpy(ids_L))[None]))[0]
        return logits_LV[:1] if self.decoder.classes else logits_LV

    def told(self, output: np.ndarray) -> Tensor:
        """What a deployed model gives, as logits: those of an embedding [1, D], and else the same."""
        found = torch.from_numpy(output)
        return self.logits(found.to(self.device)) if self.decoder.pooling else found

    @torch.no_grad()
    def compare_with(self, texts_NL: Tensor) -> None:
        """Of an embedder: from now on its logits [N] say how near a text is to each of these windows."""
        embeddings = [self.hidden(self.written(ids_L)[None])[0, 0] for ids_L in texts_NL]
        self.decoder = self.model.decoder = replace(self.decoder, classes=len(embeddings))
        self.model.head = Linear(self.decoder.hidden, len(embeddings), bias=False)
        self.model.head.weight = self._parameter(nn.functional.normalize(torch.stack(embeddings), dim=-1))

    @torch.no_grad()
    def generate(
        self, ids_BL: Tensor, new_tokens: int, pick: Callable[[Tensor], Tensor], ends: Collection[int] = ()
    ) -> Tensor:
        """Prompts with at most `new_tokens` more, [B, L + N], on the network's device; ends when every row had an end token.

        Args:
            pick: logits [B, V] -> token ids [B].
            ends: what a row has behind an end token means nothing.
        """
        ids_BL = ids_BL.to(self.device)
        ended_B = torch.zeros(len(ids_BL), dtype=torch.bool, device=self.device)
        with parametrize.cached():  # weights in training are computed once, not for every token
            fresh_BL, cache = self.model.begin(ids_BL)
            for place in range(new_tokens):
                last_BD = self.model.hidden(fresh_BL, cache)[:, -1]
                fresh_BL = pick(self.logits(last_BD))[:, None]
                if (token := self.forced.at(place, new_tokens)) is not None:
                    fresh_BL = torch.full_like(fresh_BL, token)
                ids_BL = torch.cat([ids_BL, fresh_BL], 1)
                ended_B |= torch.isin(fresh_BL[:, 0], torch.tensor(list(ends), device=self.device))
                if ended_B.all():
                    break
        return ids_BL

    def greedy(self, ids_L: Tensor, new_tokens: int, ends: Collection[int] = ()) -> list[int]:
        """At most `new_tokens` greedy tokens behind `ids_L`; ends behind one of `ends`."""
        whole_BL = self.generate(ids_L[None], new_tokens, lambda logits_BV: logits_BV.argmax(-1), ends)
        return whole_BL[0, len(ids_L) :].tolist()

    def cached_step(self, context_BL: Tensor, source_BS: Tensor | None = None) -> Callable[[], Tensor]:
        """A call that decodes one token behind `context_BL`, every time from the same cache. source_BS: what an encoder
        reads."""
        cache, token_BL = Cache(), context_BL[:, -1:].to(self.device)
        with torch.no_grad():
            if source_BS is not None:
                _, cache = self.model.begin(source_BS.to(self.device))
            self.model.hidden(context_BL.to(self.device), cache)

        @torch.no_grad()
        def step() -> Tensor:
            logits = self.logits(self.model.hidden(token_BL, cache))
            cache.crop(context_BL.shape[1])
            return logits

        return step

    def stream(self, ids_NL: Tensor) -> Stream:
        """These windows in front of the first block."""
        return Stream(self, ids_NL)

    # -- weights --

    def matrix(self, name: str) -> nn.Parameter:
        """The weight [output, input] of one matrix; the embedding's is [vocabulary, hidden]."""
        return self.module(name).weight

    def module(self, name: str) -> Any:
        """The module that holds a matrix or a norm gain."""
        return self.model.get_submodule(name)

    def vector(self, name: str) -> nn.Parameter:
        """What is stored beside the matrices, by the names of `Decoder.vectors`."""
        return self.model.get_parameter(_parameter_name(name))

    def replace_vector(self, name: str, vector: Tensor) -> None:
        """Put a copy in its place."""
        module, _, kind = _parameter_name(name).rpartition(".")
        setattr(self.module(module), kind, self._parameter(vector.detach().clone()))

    def vectors(self) -> dict[str, Tensor]:
        """All that is stored beside the matrices: norm gains and their biases, a table of positions."""
        return {name: self.vector(name) for name in self.decoder.vectors()}

    @contextmanager
    def watch_inputs(self, see: Callable[[str, Tensor], None], sites: Iterable[Site] | None = None) -> Iterator[None]:
        """While open, `see(input name, x_BLI)` is called for every input (`Site.inputs`) of some sites, or of all, during a
        forward pass; of an expert, those of the tokens that reach it, [1, T, I]."""

        def hook(name: str):
            return lambda _module, arguments: see(name, arguments[0].detach())

        watched = self.sites.values() if sites is None else sites
        inputs = [pair for site in watched if site.layer is not None for pair in site.inputs.items()]
        with _watching(self.module(first.name).register_forward_pre_hook(hook(name)) for name, (first, *_) in inputs):
            yield

    @contextmanager
    def watch_outputs(self, matrices: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """While open, what these matrices gave in the last forward pass, [B, L, O], by name."""
        given: dict[str, Tensor] = {}

        def hook(name: str):
            return lambda _module, _arguments, output: given.update({name: output})

        with _watching(self.module(name).register_forward_hook(hook(name)) for name in matrices):
            yield given

    def weights(self, site: Site) -> dict[str, Weight]:
        """The matrices of a site that has not been replaced, as they are."""
        modules = {matrix.name: self.module(matrix.name) for matrix in (*site.matrices, *site.tables)}
        biases = {name: module.bias for name, module in modules.items() if getattr(module, "bias", None) is not None}
        return as_floats({name: module.weight for name, module in modules.items()}, biases)

    def install(
        self, site: Site, action: Action, weights: Mapping[str, Weight], rounding: Rounding = "dynamic"
    ) -> None:
        """Replace a site.

        Args:
            weights: its matrices under `action`; none where it is dropped.
            rounding: which kernels' rounding of activations is imitated. `dynamic`: that of dynamic int8, which moves
                a model much; `all`: also the blocks of int8 inside weight-only kernels, which move it little and cost
                some 8% of a forward pass, so that scoring leaves them out; `none`.
        """
        formats = Formats.parse(action.format)
        if site.layer is None:
            module = self.module(site.name)
            module.weight = self._parameter(weights[site.name].dequantize())
            if (bias := weights[site.name].bias) is not None:
                module.bias = self._parameter(bias)
            if site.name == "embedding" and self.decoder.tied:
                self.model.head.weight = module.weight
            if site.name == "head" or self.decoder.tied:
                self.model.head.block = _block(formats.most, rounding)
            return
        sub_layer = self.module(site.name)
        sub_layer.dropped = action.keep == 0
        sub_layer.rounding = _rounder(formats.most, rounding)
        sub_layer.last_rounding = _rounder(formats.of(site.matrices[-1].name), rounding)
        for matrix, format in site.stored(action):
            given, linear = weights[matrix.name], self.module(matrix.name)
            wanted = matrix.shape(action.keep, site.units)
            assert given.shape == wanted, f"{matrix.name}: {given.shape} where {action} is {wanted}"
            linear.weight = self._parameter(given.dequantize())
            linear.bias = None if given.bias is None else self._parameter(given.bias)
            linear.out_features, linear.in_features = given.shape
            linear.block = _block(format, rounding)

    def restore(self, site: Site, whole: Network) -> None:
        """Give a site the weights of a network that has it as it was; both have them in memory once."""
        self.install(site, Action(site.units, "fp32"), whole.weights(site))

    def _parameter(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(self.device), requires_grad=False)

    def weight_bytes(self) -> int:
        """Bytes of all weights as they lie in memory; a tied table counts once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def save_configuration(self, folder: Path) -> None:
        """Write config.json and generation_config.json, as transformers reads them."""
        for configuration in self.configuration:
            configuration.save_pretrained(folder)

    @property
    def family(self) -> str:
        """transformers' name of the architecture, `model_type`."""
        return self.configuration[0].model_type

    def special_tokens(self) -> dict[str, int | list[int]]:
        """Ids of the tokens that begin, end and pad a text, under transformers' names, those that there are; what
        ends a generation counts before what ends a text."""
        config, generation = self.configuration
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        found = {name: getattr(config, name, None) for name in names}
        if generation.eos_token_id is not None:
            found["eos_token_id"] = generation.eos_token_id
        return {name: token for name, token in found.items() if token is not None}

    def ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end a text."""
        ends = self.special_tokens().get("eos_token_id", ())
        return (ends,) if isinstance(ends, int) else tuple(ends)

    @property
    def forced(self) -> Forced:
        """What its answers are forced to say."""
        return Forced.of(self.configuration[1].to_dict()) if self.decoder.encoder else Forced()

    def digest(self) -> str:
        """A hash of shape and weights, for cache keys, in which the precision of students does not count, nor what a
        `Decoder` says by default."""
        decoder = replace(self.decoder, precision="float32")
        defaults = {field.name: field.default for field in fields(decoder)}
        shape = {name: value for name, value in decoder.to_dict().items() if value != defaults[name]}
        digest = hashlib.sha256(json.dumps(shape).encode())
        for name, parameter in self.model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]


def _parameter_name(vector: str) -> str:
    return vector if vector.endswith(".bias") else f"{vector}.weight"


class Layerwise(Network):
    """A student's network of which no more than one sub-layer has weights of its own in memory, embedding and head apart: a
    pass makes those of one after the other, from what they were to be replaced with, and forgets them. It does not write."""

    def __init__(self, model: Transformer, configuration: tuple[Any, Any], mask_token: int | None = None):
        super().__init__(model, configuration, mask_token)
        self._whole = {name: self.weights(site) for name, site in self.sites.items()}
        self._replaced: dict[str, tuple[Action, Mapping[str, Weight], Rounding]] = {}

    def install(
        self, site: Site, action: Action, weights: Mapping[str, Weight], rounding: Rounding = "dynamic"
    ) -> None:
        """As `Network.install`; `weights` are asked for by every pass."""
        if site.layer is None:
            super().install(site, action, weights, rounding)
        else:
            self._replaced[site.name] = action, weights, rounding

    def hidden(self, ids_BL: Tensor) -> Tensor:
        stream = self.stream(ids_BL)
        while stream.sites:
            passed = [site for site in stream.sites if site.name in self._replaced]
            for site in passed:
                super().install(site, *self._replaced[site.name])
            stream.advance()
            for site in passed:
                super().install(site, Action(site.units, "fp32"), self._whole[site.name])
        return stream.end()

    def every_hidden(self, ids_BL: Tensor) -> list[Tensor]:
        raise NotImplementedError("hidden states of a network that is never whole")

    def generate(
        self, ids_BL: Tensor, new_tokens: int, pick: Callable[[Tensor], Tensor], ends: Collection[int] = ()
    ) -> Tensor:
        raise NotImplementedError("text of a network that is never whole")


class _Seen(Exception):
    """Ends a forward pass that has shown what it was run for."""


class Stream:
    """The residual stream of some windows on their way through a network, sub-layer by sub-layer.

    hidden_NLD: behind the sub-layer that was passed last; on the network's device.
    """

    BATCH = 4
    """Windows that run together."""

    @torch.no_grad()
    def __init__(self, network: Network, ids_NL: Tensor):
        self._network, model = network, network.model
        self._sub_layers = list(network.decoder.every_sub_layer().items())
        self._sides: Sides | None = None
        self._length = ids_NL.shape[1]
        ids_NL = network.seen(ids_NL)
        if model.encoder is None:
            self.hidden_NLD, self._context = model.placed(ids_NL)
        else:
            self._sides = Sides.of(model.decoder, ids_NL)
            self.hidden_NLD, self._context = model.read(self._sides.source_BS)
        self._block_NLD = self.hidden_NLD

    @property
    def sites(self) -> list[Site]:
        """Those of the sub-layer that comes next; none behind the last."""
        return self._sub_layers[0][1] if self._sub_layers else []

    def read(self) -> dict[str, Tensor]:
        """What the next sub-layer reads, by the ends of its inputs' names: `in` [N, L, D], and across `source` [N, S, D]."""
        found = {"in": torch.cat([self._module.read(self._source(windows)) for windows in self._batches()])}
        if self.sites[0].part == "cross" and self._context.source is not None:
            found["source"] = self._context.source.hidden_BSD
        return found

    def inputs(self, site: Site, name: str) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """What is read at an input of the next sub-layer, batch by batch: (windows, weight_BL, x_TI), x being of those tokens
        that reach its site, whose weights are not 0 (see `SubLayer.weights`); padding's are.

        name: of the input, see `Site.inputs`.
        """
        for windows in self._batches():
            weight_BL, blank_BL = self._weights(site, name, windows)
            reached = int(weight_BL.count_nonzero())
            seen: list[Tensor] = []

            def see(_module: nn.Module, given: tuple, seen: list[Tensor] = seen, reached: int = reached) -> None:
                seen.append(given[0].flatten(0, 1))
                if sum(map(len, seen)) == reached:
                    raise _Seen

            if reached:
                module = self._network.module(site.inputs[name][0].name)
                with _watching([module.register_forward_pre_hook(see)]), suppress(_Seen):
                    self._added(windows)
                x_TI = torch.cat(seen)
                if blank_BL is not None:
                    x_TI, weight_BL = x_TI[~blank_BL[weight_BL != 0]], weight_BL * ~blank_BL
                yield windows, weight_BL, x_TI

    def _weights(self, site: Site, name: str, windows: slice) -> tuple[Tensor, Tensor | None]:
        """(weights of the tokens of an input, which of them are padding), [B, L] each."""
        context = self._context.of_windows(windows)
        if name.endswith(".source"):
            assert context.source is not None
            return context.source.hidden_BSD.new_ones(context.source.hidden_BSD.shape[:2]), context.source.blank_BS
        weight_BLP = self._module.weights(self._module.read(self._source(windows)))
        return weight_BLP[..., self.sites.index(site)], context.blank_BM

    def without(self, site: Site, windows: slice) -> Tensor:
        """The stream [B, L, D] behind the next sub-layer, if this site of it gave nothing."""
        module = self._network.module(site.name)
        module.dropped = True
        behind_BLD = self._behind(windows)
        module.dropped = False
        return behind_BLD

    def advance(self) -> Tensor:
        """Pass the next sub-layer; the stream behind it. Behind an encoder's last, the decoder's stream begins."""
        behind_NLD = torch.cat([self._behind(windows) for windows in self._batches()])
        self.hidden_NLD = behind_NLD
        if self.sites[0].kind == "ffn":
            self._block_NLD = behind_NLD
        (_, (passed, *_)), model = self._sub_layers.pop(0), self._network.model
        if passed.part == "encoder" and all(site.part == "decoder" for site in self.sites):
            assert self._sides is not None
            self.hidden_NLD, self._context = model.answer(self._sides, model.source(behind_NLD, self._context))
        return behind_NLD

    @torch.no_grad()
    def end(self) -> Tensor:
        """Behind the last sub-layer: what the head reads, as `Network.hidden` gives it."""
        return self._network.model.end(self.hidden_NLD, self._sides, self._length, self._context.blank_BM)

    @property
    def _module(self) -> Any:
        return self._network.module(self._sub_layers[0][0])

    def _batches(self) -> Iterator[slice]:
        return (slice(start, start + self.BATCH) for start in range(0, len(self.hidden_NLD), self.BATCH))

    def _source(self, windows: slice) -> Tensor:
        """The stream of which the next sub-layer reads the norm."""
        return self._block_NLD[windows] if self._network.decoder.parallel else self._front(windows)

    def _front(self, windows: slice) -> Tensor:
        """The stream to which the next sub-layer is added."""
        return self._module.front(self.hidden_NLD[windows])

    def _added(self, windows: slice) -> Tensor:
        """What the next sub-layer adds to the stream."""
        return self._module(self._source(windows), self._context.of_windows(windows))

    def _behind(self, windows: slice) -> Tensor:
        return self._front(windows) + self._added(windows)


@contextmanager
def _watching(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed at the end."""
    handles = list(hooks)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def load_student(student: Student, network: Network, rounding: Rounding = "dynamic") -> None:
    """Put a student's weights into a network; `rounding` as for `Network.install`."""
    for name, action in student.plan.items():
        network.install(network.sites[name], action, student.matrices, rounding)
    for name, vector in student.vectors.items():
        network.replace_vector(name, vector)


def loaded(teacher: Network, student: Student, rounding: Rounding = "dynamic") -> Network:
    """A network of its own with a student's weights; `rounding` as for `Network.install`."""
    network = teacher.student()
    load_student(student, network, rounding)
    return network
