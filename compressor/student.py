"""A decoder as data: its shape, and the weights of one student. Knows nothing of transformers or ONNX.

Names of a student's tensors, `{i}` being the block:

    embedding                      [vocabulary, hidden]       head (only when untied)  [vocabulary, hidden]
    layers.{i}.attention.q/k/v     [heads * head_dim, hidden]  (k, v: kv_heads * head_dim)
    layers.{i}.attention.o         [hidden, heads * head_dim]
    layers.{i}.ffn.gate/up         [channels, hidden]          layers.{i}.ffn.down      [hidden, channels]
    layers.{i}.attention.norm, layers.{i}.ffn.norm, norm       [hidden]
    layers.{i}.attention.q_norm/k_norm (only where queries and keys have a norm)                  [head_dim]

A dropped sub-layer has none of its tensors. A matrix may come with a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from torch import Tensor

from compressor.plan import Action, Format, Matrix, Plan, Site
from compressor.quantize import Weight


@dataclass(frozen=True)
class Decoder:
    """Shape of a Llama-type decoder at full size: pre-norm blocks of grouped-query attention with rotary
    positions and a gated feed-forward.

    rope_frequencies: inverse frequencies, [head_dim / 2]; rope_scale multiplies cos and sin.
    biases: which of q, k, v, o, gate, up, down have one. qk_norm: whether every head's query and key have a
    root-mean-square norm in front of the rotation. window: positions that an attention sees, its own included; None is all.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    channels: int
    vocabulary: int
    max_positions: int
    norm_epsilon: float
    rope_frequencies: tuple[float, ...]
    rope_scale: float
    tied: bool
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    window: int | None = None

    def sites(self) -> tuple[Site, ...]:
        """Every site, in depth order: embedding, then attention and feed-forward of each block, then an untied head."""
        vocabulary, hidden, width = self.vocabulary, self.hidden, self.head_dim
        sites = [Site("embedding", "embedding", None, 1, (Matrix("embedding", vocabulary, hidden, "neither"),))]
        for i in range(self.layers):
            name = f"layers.{i}.attention"
            attention = (
                Matrix(f"{name}.q", self.heads * width, hidden, "rows", "q" in self.biases),
                Matrix(f"{name}.k", self.kv_heads * width, hidden, "rows", "k" in self.biases),
                Matrix(f"{name}.v", self.kv_heads * width, hidden, "rows", "v" in self.biases),
                Matrix(f"{name}.o", hidden, self.heads * width, "columns", "o" in self.biases),
            )
            sites.append(Site(name, "attention", i, self.kv_heads, attention))
            name = f"layers.{i}.ffn"
            ffn = (
                Matrix(f"{name}.gate", self.channels, hidden, "rows", "gate" in self.biases),
                Matrix(f"{name}.up", self.channels, hidden, "rows", "up" in self.biases),
                Matrix(f"{name}.down", hidden, self.channels, "columns", "down" in self.biases),
            )
            sites.append(Site(name, "ffn", i, self.channels, ffn))
        if not self.tied:
            sites.append(Site("head", "head", None, 1, (Matrix("head", vocabulary, hidden, "neither"),)))
        return tuple(sites)

    def vectors(self) -> dict[str, int]:
        """Length of every norm gain, by name; those of a site begin with its name."""
        lengths = {"norm": self.hidden}
        for site in self.sites():
            if site.layer is not None:
                lengths[f"{site.name}.norm"] = self.hidden
            if site.kind == "attention" and self.qk_norm:
                lengths |= {f"{site.name}.q_norm": self.head_dim, f"{site.name}.k_norm": self.head_dim}
        return lengths

    def heads_of(self, action: Action) -> tuple[int, int]:
        """(query heads, key/value heads) of an attention under `action`; query heads go with their group."""
        return action.keep * self.heads // self.kv_heads, action.keep

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Decoder:
        return cls(**{**data, "rope_frequencies": tuple(data["rope_frequencies"]), "biases": tuple(data["biases"])})


@dataclass(frozen=True)
class Student:
    """Everything that is needed to run or to export one student.

    matrices: the weight matrices by name; vectors: the norm gains, float32 [hidden], by name.
    """

    decoder: Decoder
    plan: Plan
    matrices: dict[str, Weight]
    vectors: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        """All weights in their stored layout: `{matrix}:{part}` and `{vector}`."""
        return {**matrix_tensors(self.matrices), **self.vectors}

    @classmethod
    def from_tensors(cls, decoder: Decoder, plan: Plan, stored: Mapping[str, Tensor]) -> Student:
        """The inverse of `tensors`."""
        matrices: dict[str, Weight] = {}
        for site in decoder.sites():
            matrices |= matrices_from(site, plan[site.name], stored)
        return cls(decoder, plan, matrices, {name: t for name, t in stored.items() if ":" not in name})


def matrix_tensors(matrices: Mapping[str, Weight]) -> dict[str, Tensor]:
    """Weights -> tensors in their stored layout, named `{matrix}:{part}`."""
    return {f"{name}:{part}": tensor for name, w in matrices.items() for part, tensor in w.tensors().items()}


def matrices_from(site: Site, action: Action, stored: Mapping[str, Tensor]) -> dict[str, Weight]:
    """The weights of a site under an action, out of the tensors that `matrix_tensors` made."""
    if action.keep == 0:
        return {}
    matrices = {}
    for matrix in site.matrices:
        parts = {
            part: stored[key]
            for part in ("values", "codes", "scales", "zeros", "bias")
            if (key := f"{matrix.name}:{part}") in stored
        }
        columns = matrix.shape(action.keep, site.units)[1]
        matrices[matrix.name] = Weight.from_tensors(Format.parse(action.format), columns, parts)
    return matrices


def full_plan(decoder: Decoder, format: str, table_format: str) -> Plan:
    """Nothing pruned: attention and feed-forward in one format, embedding and head in another."""
    return Plan(tuple((s.name, Action(s.units, table_format if s.layer is None else format)) for s in decoder.sites()))
