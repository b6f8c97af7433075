"""Reconstruction: block by block, a student's matrices are fitted to what the student itself lets them read.

A variant of the bank suits the teacher's activations. In a student all that lies before a matrix has changed too, and the
errors add up. So the blocks are visited in order, teacher and student side by side on the same text, and every matrix is
the least-squares solution, in closed form, of

    readers (q, k, v, gate, up)    sum_t |W x_t - W' x'_t|^2                       + ridge |W' - W|^2
    writers (o, down)              sum_t c_t |h_t - h'_t - p_t W' x'_t|^2          + ridge |W' - W|^2
                                   c_t = 1 / (|h_t|^2 + |h'_t + p_t W x'_t|^2)

x, x': its input in the teacher and in the student; h: the teacher's residual stream behind the sub-layer; h': the student's
in front of it, with the bias; W: the variant before quantization. W' is then quantized with the second moment of x'. p is 1
but for experts: their sums run over the tokens that the student routes to them, with probability p, and h' has what the
mixture's other experts add, those that were fitted before and those that are still to be. A writer thus takes back what the
blocks before it have done to the stream, a dropped sub-layer included. Its weights are those that the next norm gives to an
error, on either side: without them the few tokens of an attention sink, a thousand times as large, would count alone, those
too that are none in the teacher. Where a norm stands behind a writer, norm(u) = g u / |u|, what the stream lacks is carried
back through it with the length |u| that W gives.

Sources: Frantar et al. 2022, "GPTQ" (blocks in order, on the student's own inputs); Li et al. 2025, "GPTAQ" (the teacher's
output as the target). Departures: the residual stream as the writers' target, the weights, and structured pruning.

Shape letters: N windows, L tokens a window, O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from compressor.bank import DAMPING, Bank
from compressor.network import Network, Stream
from compressor.plan import Action, Formats, Plan, Site
from compressor.quantize import Hessian, Weight, as_floats, damped, quantize_together
from compressor.student import Student
from compressor.text import tokens_digest

RIDGE = 1.0
"""Of the least squares, in mean second moments of an input: only what the text shows strongly moves a matrix far."""


@torch.no_grad()
def reconstruct(
    bank: Bank, plan: Plan, tokens_NL: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> Student:
    """The student of a plan, fitted on `tokens_NL`; embedding, head and norms are those of `bank.realize`. What was fitted is
    kept in the bank, and not fitted again."""
    teacher = bank.teacher
    fit = f"{plan.digest}-{tokens_digest(tokens_NL)}"
    fitted = [site for site in teacher.sites.values() if site.layer is not None and plan[site.name].keep]
    if not all(bank.has_fit(fit, site) for site in fitted):
        _fit(bank, plan, fit, tokens_NL, progress)

    def matrix(site: Site, action: Action, name: str) -> Weight:
        weights = bank.variant(site, action) if site.layer is None else bank.fit(fit, site, action)
        assert weights is not None, name
        return weights[name]

    return bank.student(plan, matrix)


def _fit(bank: Bank, plan: Plan, fit: str, tokens_NL: Tensor, progress: Callable[[int, int], None]) -> None:
    """Fit every site and store it in the bank; those that are there are taken as they are."""
    teacher, student = bank.teacher, bank.teacher.copy()
    for name, site in teacher.sites.items():
        if site.layer is None:
            student.install(site, plan[name], bank.variant(site, plan[name]))
    wanted, given = teacher.stream(tokens_NL), student.stream(tokens_NL)
    if not teacher.decoder.encoder:  # of which the answers are still to be looked up
        for site in teacher.sites.values():
            if site.layer is None:
                student.restore(site, teacher)
    sub_layers = teacher.decoder.every_sub_layer()
    for done, sites in enumerate(sub_layers.values(), 1):
        read = wanted.read()
        behind_NLD = wanted.advance()
        for fitting in [_Fitting(bank, student, site, plan[site.name]) for site in sites]:
            if not fitting.action.keep or fitting.take(bank.fit(fit, fitting.site, fitting.action)):
                continue
            fitting.fit(given, read, behind_NLD)
            bank.store_fit(fit, fitting.site, fitting.weights)
        given.advance()
        for site in sites:  # what was passed need not lie in memory
            student.restore(site, teacher)
        progress(done, len(sub_layers))


class _Fitting:
    """One site of the student while it is fitted. weights: what is finished; the rest is installed unquantized."""

    def __init__(self, bank: Bank, student: Network, site: Site, action: Action):
        self._bank, self._student, self.site, self.action = bank, student, site, action
        self._dense = bank.pruned(site, action.keep) if action.keep else {}
        self._unquantized = bank.with_biases(site, action.keep, as_floats(self._dense)) if action.keep else {}
        self.weights = {name: weight for name, weight in self._unquantized.items() if name not in self._dense}
        self._install()

    def take(self, weights: dict[str, Weight] | None) -> bool:
        """Install weights that were fitted before, if there are any."""
        if weights is None:
            return False
        self.weights = weights
        self._install()
        return True

    def fit(self, given: Stream, read: Mapping[str, Tensor], behind_NLD: Tensor) -> None:
        """Fit all matrices. read: what the sub-layer reads in the teacher, by the ends of its inputs' names, [N, L, D];
        behind_NLD: the teacher's stream behind it."""
        *readers, (_, (last,)) = self.site.inputs.items()
        for name, together in readers:
            self._readers(given, name, [matrix.name for matrix in together], read[name.rpartition(".")[2]])
        self._writer(given, last.name, behind_NLD)

    def _readers(self, given: Stream, read: str, names: list[str], x_NLD: Tensor) -> None:
        """Fit the matrices that share an input; x_NLD: what they read in the teacher."""
        fit = _LeastSquares(torch.cat([self._dense[name] for name in names]))
        for windows, weight_BL, x_TI in given.inputs(self.site, read):
            fit.add(x_TI, (x_NLD[windows][weight_BL != 0] - x_TI) @ fit.w_OI.T)
        self._finish(fit, names)

    def _writer(self, given: Stream, name: str, behind_NLD: Tensor) -> None:
        """Fit the matrix that writes to the stream; behind_NLD: the teacher's stream behind the sub-layer."""
        fit, bias_D = _LeastSquares(self._dense[name]), self._unquantized[name].bias
        norm = self._student.module(self.site.sub_layer).post_norm
        for windows, weight_BL, x_TI in given.inputs(self.site, f"{self.site.name}.out"):
            reached_BL = weight_BL != 0
            p_T1 = weight_BL[reached_BL][:, None].clamp_min(1e-12)
            h_TD, without_TD = (
                stream[reached_BL] for stream in (behind_NLD[windows], given.without(self.site, windows))
            )
            own_TD = x_TI @ fit.w_OI.T + (0.0 if bias_D is None else bias_D)
            behind_TD = without_TD + p_T1 * (own_TD if norm is None else norm(own_TD))
            size_T = h_TD.square().mean(-1) + behind_TD.square().mean(-1)
            missed_TD = (h_TD - behind_TD) / p_T1
            if norm is not None:
                length_T1 = own_TD.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
                missed_TD, p_T1 = missed_TD * length_T1 / norm.weight, p_T1 / length_T1
            fit.add(x_TI, missed_TD, p_T1[:, 0] ** 2 / size_T.clamp_min(1e-12))
        self._finish(fit, [name])

    def _finish(self, fit: _LeastSquares, names: list[str]) -> None:
        w_OI, moment_II = fit.solution()
        rows = w_OI.split([len(self._dense[name]) for name in names])
        hessian = None if self._bank.quantizer == "nearest" else Hessian(damped(moment_II, DAMPING))
        formats, fitted = Formats.parse(self.action.format), dict(zip(names, rows, strict=True))
        for format in dict.fromkeys(map(formats.of, names)):
            own = {name: w_RI for name, w_RI in fitted.items() if formats.of(name) == format}
            made = quantize_together(own, format, hessian)
            self.weights |= {name: replace(weight, bias=self._unquantized[name].bias) for name, weight in made.items()}
        self._install()

    def _install(self) -> None:
        self._student.install(self.site, self.action, self._unquantized | self.weights)


class _LeastSquares:
    """min over W' of sum_t c_t |W x_t + m_t - W' x_t|^2 + ridge |W' - W|^2, gathered batch by batch."""

    def __init__(self, w_OI: Tensor):
        self.w_OI = w_OI
        self._moment_II = w_OI.new_zeros(w_OI.shape[1], w_OI.shape[1])
        self._missed_OI = torch.zeros_like(w_OI)
        self._weight = 0.0

    def add(self, x_TI: Tensor, missed_TO: Tensor, c_T: Tensor | None = None) -> None:
        """missed: the m of the formula, what W does not give."""
        c_T1 = torch.ones_like(x_TI[:, :1]) if c_T is None else c_T[:, None]
        self._moment_II.addmm_((x_TI * c_T1).T, x_TI)
        self._missed_OI.addmm_((missed_TO * c_T1).T, x_TI)
        self._weight += float(c_T1.sum())

    def solution(self) -> tuple[Tensor, Tensor]:
        """(W' [O, I], weighted second moment of the input [I, I]); (W, zeros) where nothing was added."""
        weight = self._weight or 1.0
        moment_II, missed_OI = self._moment_II / weight, self._missed_OI / weight
        factor_II = torch.linalg.cholesky(damped(moment_II, RIDGE))
        return self.w_OI + torch.cholesky_solve(missed_OI.T, factor_II).T.contiguous(), moment_II
