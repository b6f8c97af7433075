"""The bank: every site under every action that was ever asked for, computed once and kept on disk.

    statistics   second moments of every input (Hessians), its dynamic range, and the Fisher weight of every output
    order        which heads and channels go first, per site
    variant      the pruned, compensated, quantized weights of one (site, action), in the layout that is deployed
    fit          those of a plan's site after reconstruction

Files are mapped, not read: what is not used takes no memory, and the system can take back what was.

A folder holds one bank; its name says which teacher, text and settings it belongs to. Every file is written beside
and renamed, then listed with its hash in `manifest.jsonl`; what is not listed is made again.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from compressor.calibrate import OUTPUTS, Statistics, collect
from compressor.errors import BankError
from compressor.files import digest, link, write_bytes_atomic
from compressor.network import Network
from compressor.plan import Action, Format, Formats, Matrix, Plan, Site
from compressor.prune import compensate, removal_order, unit_columns
from compressor.quantize import Hessian, Weight, as_floats, damped, quantize, quantize_together
from compressor.student import Lazy, Student, matrices_from, matrix_tensors

VERSION = 5
"""Raise when the same request would give other numbers."""

DAMPING = 0.01
ORDER_CHUNK = 32
"""Channels removed between two scorings of the feed-forward."""

MEMORY_BYTES = 2 * 2**30
"""Of variants, as codes, that are kept in memory."""

Factored = dict[int, list[tuple[list[str], Hessian]]]
"""Of a site, by the units that are kept: (matrices that share an input, its Hessian)."""


class Bank:
    """Variants of one teacher over one calibration text.

    Args:
        root: folder under which this bank gets a folder of its own.
        teacher: the network to compress.
        calibration_NL: token ids that give the statistics.
        fisher_NL: token ids of the one backward pass.
        quantizer: `gptq`, or `nearest` as the reference.
        seed: of the labels that the Fisher pass samples.
        memory_bytes: of variants that are kept in memory.

    Raises:
        BankError: a stored file does not match its hash.
    """

    def __init__(
        self,
        root: Path,
        teacher: Network,
        calibration_NL: Tensor,
        fisher_NL: Tensor,
        quantizer: str = "gptq",
        seed: int = 0,
        memory_bytes: int = MEMORY_BYTES,
    ):
        assert quantizer in ("gptq", "nearest"), quantizer
        self.teacher, self.quantizer, self.seed = teacher, quantizer, seed
        self.calibration_NL, self.fisher_NL = calibration_NL, fisher_NL
        identity = json.dumps([VERSION, teacher.digest(), quantizer, seed, DAMPING, ORDER_CHUNK])
        key = hashlib.sha256(identity.encode())
        for tokens in (calibration_NL, fisher_NL):
            key.update(str(tuple(tokens.shape)).encode() + tokens.numpy().tobytes())
        self.key = key.hexdigest()[:16]
        self.folder = root / self.key
        self.folder.mkdir(parents=True, exist_ok=True)
        self._listed = _read_manifest(self.folder)
        self._checked: set[str] = set()
        self._recent: OrderedDict[str, dict[str, Weight]] = OrderedDict()
        self._recent_bytes, self._most_bytes = 0, memory_bytes
        self._statistics: Statistics | None = None

    # -- what the bank holds --

    def take_over(self, root: Path) -> None:
        """Have what a bank of the same key holds in another place, as far as this one never had it."""
        earlier = root / self.key
        for name, sha256 in _read_manifest(earlier).items():
            path = earlier / self._path(name).relative_to(self.folder)
            if name not in self._listed and path.is_file():
                link(path, self._path(name))
                self._list(name, sha256)

    def statistics(self, progress: Callable[[int, int], None] = lambda done, total: None) -> Statistics:
        """Second moments, ranges and Fisher weights; the first call runs the teacher, later ones read the disk."""
        if self._statistics is None:

            def read(name: str) -> dict[str, Tensor] | None:
                return self._load(f"statistics/{name}")

            if not self._holds(f"statistics/{OUTPUTS}"):
                for name, found in collect(self.teacher, self.calibration_NL, self.fisher_NL, self.seed, progress):
                    self._store(f"statistics/{name}", found)
            outputs = read(OUTPUTS)  # asked for often, and small
            self._statistics = Statistics(
                lambda name: (outputs if name == OUTPUTS else read(name)) or {}, self.teacher.device
            )
        return self._statistics

    def order(self, site: Site) -> Tensor:
        """Units of an attention or feed-forward in order of removal, int64 [units], on the teacher's device; the first goes
        first."""
        stored = self._load(f"{site.name}/order")
        if stored is None:
            narrow = site.matrices[-1]
            order = removal_order(
                self.teacher.matrix(narrow.name),
                self._moment(f"{site.name}.out"),
                unit=narrow.columns // site.units,
                chunk=1 if site.kind == "attention" else ORDER_CHUNK,
            )
            stored = {"order": order}
            self._store(f"{site.name}/order", stored)
        return stored["order"].to(self.teacher.device)

    def kept(self, site: Site, keep: int) -> Tensor:
        """The units of a site that stay when `keep` do, in their own order, int64 [keep]."""
        return self.order(site)[site.units - keep :].sort().values

    def pruned(self, site: Site, keep: int) -> dict[str, Tensor]:
        """A site with `keep` units left and the last matrix compensated, float32 and not yet quantized."""
        dense: dict[str, Tensor] = {matrix.name: self.teacher.matrix(matrix.name) for matrix in site.matrices}
        if keep == site.units:
            return dense
        units = self.kept(site, keep)
        for matrix in site.matrices:
            w_OI = dense[matrix.name]
            if matrix.pruned == "rows":
                dense[matrix.name] = w_OI[unit_columns(units, matrix.rows // site.units)].contiguous()
            else:
                columns = unit_columns(units, matrix.columns // site.units)
                dense[matrix.name] = compensate(w_OI, self._moment(f"{site.name}.out"), columns)
        return dense

    def with_biases(self, site: Site, keep: int, weights: Mapping[str, Weight]) -> dict[str, Weight]:
        """Matrices of a site with `keep` units, the teacher's biases for what they give, and its tables."""

        def rows(matrix: Matrix, given: Tensor) -> Tensor:
            pruned = matrix.pruned == "rows" and keep < site.units
            kept = unit_columns(self.kept(site, keep), matrix.rows // site.units) if pruned else slice(None)
            return given.detach()[kept].clone()

        biased = dict(weights)
        for matrix in site.matrices:
            if matrix.bias:
                bias_O = rows(matrix, self.teacher.module(matrix.name).bias)
                biased[matrix.name] = replace(weights[matrix.name], bias=bias_O)
        tables = {table.name: rows(table, self.teacher.matrix(table.name)) for table in site.tables}
        return biased | as_floats(tables)

    def variant(self, site: Site, action: Action, factored: Factored | None = None) -> dict[str, Weight]:
        """The stored weights of a site under an action, by matrix name, on the teacher's device; empty where the site is
        dropped.

        factored: of the same site; what is factored for one format is left there for the others.
        """
        if action.keep == 0:
            return {}
        formats = Formats.parse(action.format)
        if not formats.alike:
            alone = {fmt: self.variant(site, Action(action.keep, fmt.name), factored) for fmt in formats.each}
            return {name: alone[formats.of(name)][name] for name in alone[formats.most]}
        name, fmt = f"{site.name}/{action.keep}-{action.format}", formats.most
        weights = self._stored(name, site, action)
        if weights is None:
            weights = self.with_biases(site, action.keep, self._make(site, action.keep, fmt, factored))
            if fmt.kind != "float" or action.keep < site.units:
                self._store(name, matrix_tensors(weights))
            self._remember(name, weights)
        return weights

    def realize(self, plan: Plan) -> Student:
        """The weights of a plan, as they are deployed."""
        return self.student(plan, self.matrix)

    def matrix(self, site: Site, action: Action, name: str) -> Weight:
        """One of a site's matrices under an action."""
        return self.variant(site, action)[name]

    def student(self, plan: Plan, matrix: Callable[[Site, Action, str], Weight]) -> Student:
        """A plan's student with matrices that are made when they are asked for, and the teacher's norm gains, on the CPU."""
        gains = self.teacher.vectors()
        vectors = {name: gains[name].detach().cpu().clone() for name in self.teacher.decoder.vectors_of(plan)}
        matrices = Lazy(self.teacher.sites.values(), plan, lambda *asked: matrix(*asked).to("cpu"))
        return Student(self.teacher.decoder, plan, matrices, vectors)

    def has_fit(self, name: str, site: Site) -> bool:
        """Whether a site was stored under the name of a fit."""
        return self._holds(f"fits/{name}/{site.name}")

    def fit(self, name: str, site: Site, action: Action) -> dict[str, Weight] | None:
        """The weights of a site that were stored under the name of a fit, of which there is one action for every site."""
        return self._stored(f"fits/{name}/{site.name}", site, action)

    def store_fit(self, name: str, site: Site, weights: Mapping[str, Weight]) -> None:
        """Keep the weights of a site under the name of a fit."""
        self._store(f"fits/{name}/{site.name}", matrix_tensors(weights))

    # -- making --

    def _make(self, site: Site, keep: int, fmt: Format, factored: Factored | None) -> dict[str, Weight]:
        dense = self.pruned(site, keep)
        if not fmt.block or self.quantizer == "nearest":
            return {name: quantize(w, fmt) for name, w in dense.items()}
        if site.layer is None:
            return {name: self._quantize_table(site, w, fmt) for name, w in dense.items()}
        weights: dict[str, Weight] = {}
        factored = {} if factored is None else factored
        if keep not in factored:
            factored[keep] = self._readers(site, keep)
        for matrices, hessian in factored[keep]:
            weights |= quantize_together({name: dense[name] for name in matrices}, fmt, hessian)
        return weights

    def _quantize_table(self, site: Site, w: Tensor, fmt: Format) -> Weight:
        """Embedding and head: what an output reads of the head is a product, so GPTQ serves there and in a tied table."""
        if site.name == "embedding" and not self.teacher.decoder.tied:
            return quantize(w, fmt)
        return quantize(w, fmt, Hessian(self._moment("head.in")))

    def _readers(self, site: Site, keep: int) -> list[tuple[list[str], Hessian]]:
        """(matrices that share an input, its Hessian) of a site with `keep` units."""
        found = []
        for name, matrices in site.inputs.items():
            moment_II = self._moment(name)
            if keep < site.units and matrices[0].pruned == "columns":
                columns = unit_columns(self.kept(site, keep), matrices[0].columns // site.units)
                moment_II = moment_II[columns][:, columns]
            found.append(([matrix.name for matrix in matrices], Hessian(moment_II)))
        return found

    def _moment(self, name: str) -> Tensor:
        return damped(self.statistics().second_moment(name), DAMPING)

    # -- memory and disk --

    def forget(self) -> None:
        """Keep no variants in memory; they are read again where they are needed."""
        self._recent.clear()
        self._recent_bytes = 0

    def _stored(self, name: str, site: Site, action: Action) -> dict[str, Weight] | None:
        """Weights of a site that are in memory or on disk."""
        if name in self._recent:
            self._recent.move_to_end(name)
            return self._recent[name]
        stored = self._load(name)
        if stored is None:
            return None
        here = {part: tensor.to(self.teacher.device) for part, tensor in stored.items()}
        self._remember(name, weights := matrices_from(site, action, here))
        return weights

    def _remember(self, name: str, weights: dict[str, Weight]) -> None:
        self._recent[name] = weights
        self._recent_bytes += _memory(weights)
        while self._recent_bytes > self._most_bytes and len(self._recent) > 1:
            _, oldest = self._recent.popitem(last=False)
            self._recent_bytes -= _memory(oldest)

    def _store(self, name: str, tensors: dict[str, Tensor]) -> None:
        data = save({key: tensor.contiguous() for key, tensor in tensors.items()})
        write_bytes_atomic(self._path(name), data)
        self._list(name, hashlib.sha256(data).hexdigest())

    def _list(self, name: str, sha256: str) -> None:
        with open(self.folder / "manifest.jsonl", "a") as manifest:
            manifest.write("\n" + json.dumps({"name": name, "sha256": sha256}))
        self._listed[name] = sha256

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _holds(self, name: str) -> bool:
        return name in self._listed and self._path(name).exists()

    def _load(self, name: str) -> dict[str, Tensor] | None:
        if not self._holds(name):
            return None
        path = self._path(name)
        if name not in self._checked:
            if digest(path) != self._listed[name]:
                raise BankError(f"{path} does not match its hash in manifest.jsonl: delete the file and run again")
            self._checked.add(name)
        try:
            return load_file(path)
        except SafetensorError as error:
            raise BankError(f"{path} cannot be read ({error}): delete the file and run again") from error


def _read_manifest(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a bank, by name."""
    path, listed = folder / "manifest.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that a kill cut off: its file is made again
        listed[entry["name"]] = entry["sha256"]
    return listed


def _memory(weights: dict[str, Weight]) -> int:
    return sum(
        tensor.nbytes for w in weights.values() for tensor in (w.values, w.codes, w.scales) if tensor is not None
    )
