"""The one file that knows architectures: loads the teacher and puts weights into its sub-layers.

Everything else sees a `Network`: matrices by the names of `compressor.student`, inputs that can be watched, and
sites that can be replaced. To add a family, extend `DECODERS` and `Network._modules`.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.errors import ModelError
from compressor.plan import Action, Format, Site
from compressor.quantize import Weight, fake_block_int8, fake_dynamic_int8
from compressor.student import Decoder

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type` of the supported configurations: pre-norm blocks, SiLU-gated feed-forward, rotary grouped-query attention."""


@dataclass(frozen=True)
class Teacher:
    """The Transformer as given.

    tokenizer: as transformers made it; source: the local folder or hub id it came from.
    """

    network: Network
    tokenizer: Any
    source: str


def load_teacher(
    path: str | Path, *, gguf: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> Teacher:
    """Load a causal language model in float32, and its tokenizer.

    Args:
        path: hub id or local folder.
        gguf: name of a GGUF file in that folder; its weights are dequantized.

    Raises:
        ModelError: nothing can be loaded from there, or the architecture is not supported.
    """
    import transformers

    options: dict = {"trust_remote_code": trust_remote_code}
    options |= {"gguf_file": gguf} if gguf else {}
    options |= {"revision": revision} if revision else {}
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
        _check_supported(config)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(path, gguf, error) from error
    if gguf:  # the weights are plain floats now
        del model.config.quantization_config, model.hf_quantizer
    model.eval().requires_grad_(False)
    return Teacher(Network(model, decoder_of(model.config)), tokenizer, str(path))


def network_from_config(folder: Path) -> Network:
    """A network of the shape that `folder`/config.json says, its weights not yet set."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        _check_supported(config)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} holds no usable config.json: {str(error).strip().splitlines()[0]}") from error
    model.eval().requires_grad_(False)
    return Network(model, decoder_of(config))


def read_decoder(path: str | Path, *, gguf: str | None = None, revision: str | None = None) -> Decoder:
    """The shape of a model from its configuration alone; no weights are read.

    Raises:
        ModelError: there is no configuration, or the architecture is not supported.
    """
    import transformers

    options = ({"gguf_file": gguf} if gguf else {}) | ({"revision": revision} if revision else {})
    try:
        config = transformers.AutoConfig.from_pretrained(path, **options)
    except (OSError, ValueError) as error:
        raise _cannot_load(path, gguf, error) from error
    _check_supported(config)
    return decoder_of(config)


def _cannot_load(path: str | Path, gguf: str | None, error: Exception) -> ModelError:
    return ModelError(
        f"model.path = {str(path)!r}{f' with gguf = {gguf!r}' if gguf else ''} cannot be loaded; "
        "expected a hub id or a local folder with config.json, tokenizer and weights; transformers says: "
        f"{str(error).strip().splitlines()[0]}"
    )


def _check_supported(config) -> None:
    problems = []
    if config.model_type not in DECODERS:
        problems.append(f"model_type {config.model_type!r} (supported: {', '.join(DECODERS)})")
    else:
        if config.hidden_act != "silu":
            problems.append(f"hidden_act {config.hidden_act!r} (supported: silu)")
        if len(set(getattr(config, "layer_types", None) or ["full_attention"])) > 1:
            problems.append("blocks with different attention windows (supported: one window for all, or none)")
        if config.rope_parameters["rope_type"] not in ("default", "linear", "llama3"):
            problems.append(f"rope_type {config.rope_parameters['rope_type']!r} (supported: default, linear, llama3)")
    if problems:
        raise ModelError("this architecture is not supported: " + "; ".join(problems))


def decoder_of(config) -> Decoder:
    """The shape that a supported transformers configuration describes."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rotary = LlamaRotaryEmbedding(config)
    return Decoder(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        channels=config.intermediate_size,
        vocabulary=config.vocab_size,
        max_positions=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rope_frequencies=tuple(rotary.inv_freq.tolist()),
        rope_scale=float(rotary.attention_scaling),
        tied=config.tie_word_embeddings,
        biases=_biases(config),
        qk_norm=config.model_type == "qwen3",
        window=_window(config),
    )


def _biases(config) -> tuple[str, ...]:
    if config.model_type == "qwen2":
        return ("q", "k", "v")
    attention = "qkvo" if getattr(config, "attention_bias", False) else ""
    return (*attention, *(("gate", "up", "down") if getattr(config, "mlp_bias", False) else ()))


def _window(config) -> int | None:
    """Positions that every attention sees; None if that is all of them."""
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    return window if slides and window and window < config.max_position_embeddings else None


Rounding = Literal["none", "dynamic", "all"]

_ATTRIBUTES = {"attention": "self_attn", "ffn": "mlp"}


def _named_modules(model: Any, decoder: Decoder) -> dict[str, Any]:
    """Our names for the modules that hold matrices and norm gains."""
    modules = {"embedding": model.model.embed_tokens, "norm": model.model.norm}
    for i, block in enumerate(model.model.layers):
        for name in "qkvo":
            modules[f"layers.{i}.attention.{name}"] = getattr(block.self_attn, f"{name}_proj")
        for name in ("gate", "up", "down"):
            modules[f"layers.{i}.ffn.{name}"] = getattr(block.mlp, f"{name}_proj")
        if decoder.qk_norm:
            for name in "qk":
                modules[f"layers.{i}.attention.{name}_norm"] = getattr(block.self_attn, f"{name}_norm")
        modules[f"layers.{i}.attention.norm"] = block.input_layernorm
        modules[f"layers.{i}.ffn.norm"] = block.post_attention_layernorm
    if not decoder.tied:
        modules["head"] = model.lm_head
    return modules


def _rounding_hook(fmt: Format) -> Callable[[nn.Module, tuple, dict], tuple[tuple, dict]]:
    """A forward pre-hook that rounds the activation a sub-layer or a linear layer reads, as the format's kernel does."""

    def rounded(x: Tensor) -> Tensor:
        if fmt.kind == "blockwise":
            return fake_block_int8(x, fmt.block)
        return fake_dynamic_int8(x)

    def hook(_module: nn.Module, arguments: tuple, named: dict) -> tuple[tuple, dict]:
        if arguments:
            return (rounded(arguments[0]), *arguments[1:]), named
        return arguments, {**named, "hidden_states": rounded(named["hidden_states"])}

    return hook


class DroppedFeedForward(nn.Module):
    """Stands where a feed-forward was: adds nothing to the residual stream."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.zeros_like(hidden_states)


class DroppedAttention(nn.Module):
    """Stands where an attention was. A cache takes its length from its first layer, so this one counts the tokens there."""

    def __init__(self, layer: int):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, cache: Any = None, **_) -> tuple[Tensor, None]:
        if cache is not None:
            nothing_BHLK = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(nothing_BHLK, nothing_BHLK, self.layer)
        return torch.zeros_like(hidden_states), None


class Network:
    """A decoder in torch whose sites can be replaced one by one.

    Args:
        model: a transformers causal language model of a supported family; taken over, not copied.
        decoder: its shape at full size.
    """

    def __init__(self, model: Any, decoder: Decoder):
        self.model = model
        self.decoder = decoder
        self.sites = {site.name: site for site in decoder.sites()}
        self._modules = _named_modules(model, decoder)
        self._owners = {
            site.name: getattr(self.model.model.layers[site.layer], _ATTRIBUTES[site.kind])
            for site in self.sites.values()
            if site.layer is not None
        }
        self._hooks: dict[str, list] = {}

    def copy(self) -> Network:
        """An independent network with the same weights."""
        assert not self._hooks, "a network with hooks cannot be copied"
        return Network(copy.deepcopy(self.model), self.decoder)

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    def to(self, device: torch.device | str) -> Network:
        self.model.to(device)
        return self

    # -- running --

    def hidden(self, ids_BL: Tensor) -> Tensor:
        """Final hidden states [B, L, D], behind the last norm."""
        return self.model.model(ids_BL.to(self.device), use_cache=False).last_hidden_state

    def every_hidden(self, ids_BL: Tensor) -> list[Tensor]:
        """Hidden states [B, L, D] of the embedding and behind every block; the last one lies behind the last norm."""
        return list(self.model.model(ids_BL.to(self.device), use_cache=False, output_hidden_states=True).hidden_states)

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """Hidden states -> logits [B, L, V]."""
        return self.model.lm_head(hidden_BLD)

    @torch.no_grad()
    def array_logits(self, ids_L: np.ndarray) -> np.ndarray:
        """Token ids [L] -> logits [L, V], for `eval.perplexity`."""
        return self.logits(self.hidden(torch.from_numpy(ids_L)[None]))[0].cpu().numpy()

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
        fresh_BL, cache = ids_BL, None
        with parametrize.cached():  # weights in training are computed once, not for every token
            for _ in range(new_tokens):
                output = self.model(fresh_BL, cache=cache, use_cache=True, logits_to_keep=1)
                fresh_BL, cache = pick(output.logits[:, -1])[:, None], output.cache
                ids_BL = torch.cat([ids_BL, fresh_BL], 1)
                ended_B |= torch.isin(fresh_BL[:, 0], torch.tensor(list(ends), device=self.device))
                if ended_B.all():
                    break
        return ids_BL

    def greedy(self, ids_L: Tensor, new_tokens: int, eos: int | None = None) -> list[int]:
        """At most `new_tokens` greedy tokens behind `ids_L`; ends behind `eos`."""
        ends = () if eos is None else (eos,)
        return self.generate(ids_L[None], new_tokens, lambda logits_BV: logits_BV.argmax(-1), ends)[
            0, len(ids_L) :
        ].tolist()

    def cached_step(self, context_BL: Tensor) -> Callable[[], Tensor]:
        """A call that decodes one token behind `context_BL`, every time from the same cache. For the full network."""
        cache = self.model.model(context_BL.to(self.device), use_cache=True).cache
        token_BL = context_BL[:, -1:].to(self.device)

        @torch.no_grad()
        def step() -> Tensor:
            logits = self.model(token_BL, cache=cache, use_cache=True).logits
            cache.crop(-1)
            return logits

        return step

    def stream(self, ids_NL: Tensor) -> Stream:
        """These windows in front of the first block."""
        return Stream(self, ids_NL)

    # -- weights --

    def matrix(self, name: str) -> nn.Parameter:
        """The weight [output, input] of one matrix; the embedding's is [vocabulary, hidden]."""
        return self._modules[name].weight

    def module(self, name: str) -> Any:
        """The module that holds a matrix or a norm gain."""
        return self._modules[name]

    def vectors(self) -> dict[str, Tensor]:
        """The norm gains by name."""
        return {name: module.weight for name, module in self._modules.items() if name.endswith("norm")}

    def inputs(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """(name of an input, matrices that read it), over the pruned and quantized linear layers.

        `layers.{i}.attention.in` -> q, k, v; `.attention.out` -> o; `layers.{i}.ffn.in` -> gate, up; `.ffn.out` -> down.
        """
        for site in self.sites.values():
            if site.layer is not None:
                yield f"{site.name}.in", tuple(m.name for m in site.matrices if m.pruned == "rows")
                yield f"{site.name}.out", tuple(m.name for m in site.matrices if m.pruned == "columns")

    @contextmanager
    def watch_inputs(self, see: Callable[[str, Tensor], None]) -> Iterator[None]:
        """While open, `see(input name, x_BLI)` is called for every input of `inputs()` during a forward pass."""

        def hook(name: str):
            return lambda _module, arguments: see(name, arguments[0].detach())

        with _watching({self._modules[matrices[0]]: hook(name) for name, matrices in self.inputs()}):
            yield

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
        for handle in self._hooks.pop(site.name, []):
            handle.remove()
        fmt = Format.parse(action.format)
        if site.layer is None:
            weight = self._parameter(weights[site.name].dequantize())
            self._modules[site.name].weight = weight
            if site.name == "embedding" and self.decoder.tied:
                self.model.lm_head.weight = weight
            readers = [] if site.name == "embedding" and not self.decoder.tied else [self.model.lm_head]
        elif action.keep == 0:
            gone = DroppedAttention(site.layer) if site.kind == "attention" else DroppedFeedForward()
            setattr(self.model.model.layers[site.layer], _ATTRIBUTES[site.kind], gone)
            return
        else:
            for name, given in weights.items():
                linear = self._modules[name]
                linear.weight = self._parameter(given.dequantize())
                linear.bias = None if given.bias is None else self._parameter(given.bias)
                linear.out_features, linear.in_features = given.shape
            owner = self._owners[site.name]
            setattr(self.model.model.layers[site.layer], _ATTRIBUTES[site.kind], owner)
            readers = [owner, self._modules[site.matrices[-1].name]]
        if fmt.kind in {"none": (), "dynamic": ("dynamic",), "all": ("dynamic", "blockwise")}[rounding]:
            hook = _rounding_hook(fmt)
            self._hooks[site.name] = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in readers]

    def _parameter(self, tensor: Tensor) -> nn.Parameter:
        return nn.Parameter(tensor.to(self.device), requires_grad=False)

    def weight_bytes(self) -> int:
        """Bytes of all weights as they lie in memory; a tied table counts once."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def save_configuration(self, folder: Path) -> None:
        """Write config.json and generation_config.json, as transformers reads them."""
        self.model.config.save_pretrained(folder)
        self.model.generation_config.save_pretrained(folder)

    @property
    def family(self) -> str:
        """transformers' name of the architecture, `model_type`."""
        return self.model.config.model_type

    def special_tokens(self) -> dict[str, int | list[int]]:
        """Ids of the tokens that begin, end and pad a text, under transformers' names, those that there are; what
        ends a generation counts before what ends a text."""
        config, generation = self.model.config, self.model.generation_config
        ends = config.eos_token_id if generation.eos_token_id is None else generation.eos_token_id
        found = {"bos_token_id": config.bos_token_id, "eos_token_id": ends, "pad_token_id": config.pad_token_id}
        return {name: token for name, token in found.items() if token is not None}

    def ends(self) -> tuple[int, ...]:
        """Ids of the tokens that end a text."""
        ends = self.special_tokens().get("eos_token_id", ())
        return (ends,) if isinstance(ends, int) else tuple(ends)

    def digest(self) -> str:
        """A hash of shape and weights, for cache keys."""
        digest = hashlib.sha256(json.dumps(self.decoder.to_dict()).encode())
        for name, parameter in self.model.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]


class _Seen(Exception):
    """Ends a forward pass that has shown what it was run for."""


class Stream:
    """The residual stream of some windows on their way through a network, sub-layer by sub-layer.

    hidden_NLD: in front of the next sub-layer, or behind the last; on the network's device.
    """

    BATCH = 4
    """Windows that run together."""

    def __init__(self, network: Network, ids_NL: Tensor):
        self._network = network
        self._sites = [site for site in network.sites.values() if site.layer is not None]
        self._options: dict = {}
        batches: list[Tensor] = []

        def begin(_module: nn.Module, arguments: tuple, named: dict) -> None:
            batches.append(arguments[0])
            self._options = named  # positions and mask, which are those of every block and batch
            raise _Seen

        with _watching({network.model.model.layers[0]: begin}, with_kwargs=True):
            for ids_BL in ids_NL.to(network.device).split(1):
                with suppress(_Seen):
                    network.model.model(ids_BL, use_cache=False)
        self.hidden_NLD = torch.cat(batches)

    @property
    def site(self) -> Site:
        """The sub-layer that comes next."""
        return self._sites[0]

    def inputs(self, matrix: str) -> Iterator[tuple[slice, Tensor]]:
        """What a matrix of the next sub-layer reads, batch by batch: (windows, x_BLI)."""
        for windows in self._batches():
            seen: list[Tensor] = []

            def see(_module: nn.Module, arguments: tuple, seen: list[Tensor] = seen) -> None:
                seen.append(arguments[0])
                raise _Seen

            with _watching({self._network.module(matrix): see}), suppress(_Seen):
                self._run(windows)
            yield windows, seen[0]

    def advance(self) -> None:
        """Pass the next sub-layer."""
        self.hidden_NLD = torch.cat([self.hidden_NLD[windows] + self._run(windows) for windows in self._batches()])
        self._sites.pop(0)

    def _batches(self) -> Iterator[slice]:
        return (slice(start, start + self.BATCH) for start in range(0, len(self.hidden_NLD), self.BATCH))

    def _run(self, windows: slice) -> Tensor:
        """What the next sub-layer adds to the stream."""
        site = self.site
        sub_layer = getattr(self._network.model.model.layers[site.layer], _ATTRIBUTES[site.kind])
        x_BLD = self._network.module(f"{site.name}.norm")(self.hidden_NLD[windows])
        return sub_layer(x_BLD) if site.kind == "ffn" else sub_layer(hidden_states=x_BLD, **self._options)[0]


@contextmanager
def _watching(hooks: Mapping[nn.Module, Callable], **options: bool) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(hook, **options) for module, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
