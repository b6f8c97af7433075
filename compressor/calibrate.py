"""What one look at the teacher tells: second moments of inputs, their dynamic range, Fisher weights of outputs.

For a linear layer y = W x and a change D of its weights, with g the gradient of log p(sampled label) at y,
    KL(teacher || student) per token  ~  1/2 sum_o E[g_o^2] (D H D^T)_oo        H = E[x x^T]
the Kronecker-factored Fisher of Martens and Grosse 2015 ("K-FAC", section 3) with a diagonal output side.

Of an expert, H is of the tokens that reach it, and g is 0 at the others, so that it counts as much as it is used. Where none
reaches it, all is 0: it is predicted to be of no use, and its matrices are rounded as if all inputs were alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.network import Network
from compressor.text import compared, plain


@dataclass(frozen=True)
class Statistics:
    """Named tensors, as `collect` made them; what is asked for comes on `device`."""

    tensors: dict[str, Tensor]
    device: torch.device

    def second_moment(self, name: str) -> Tensor:
        """E[x x^T] of an input, float32 [I, I]; `head.in` is what the output head reads."""
        return self.tensors[f"{name}:moment"].to(self.device)

    def rounding_variance(self, name: str, rowwise: bool) -> float:
        """Mean squared error of an input under dynamic uint8, one scale a sequence, or int8, one scale a row; over the
        sequences that reach it."""
        return float(self.tensors[f"{name}:rounding"][int(rowwise)])

    def fisher(self, matrix: str) -> Tensor:
        """E[g_o^2] of a matrix's outputs, float32 [O]; of the embedding, at the vectors it looks up, [hidden]."""
        return self.tensors[f"{matrix}:fisher"].to(self.device)

    def token_frequency(self) -> Tensor:
        """How often each token occurs in the text, per token, float32 [vocabulary]."""
        return self.tensors["frequency"].to(self.device)


def collect(
    network: Network,
    calibration_NL: Tensor,
    fisher_NL: Tensor,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Tensor]:
    """Run the teacher over `calibration_NL` forward, and over `fisher_NL` forward and backward."""
    windows, fisher_windows = (
        [network.written(ids_L) for ids_L in given_NL] for given_NL in (calibration_NL, fisher_NL)
    )
    total = len(windows) + 2 * len(fisher_windows)
    tensors = _second_moments(network, windows, lambda done: progress(done, total))
    tensors |= _fisher(network, fisher_windows, seed, lambda done: progress(len(windows) + 2 * done, total))
    ids_T = plain(network.seen(torch.cat(windows))).cpu()
    tensors["frequency"] = torch.bincount(ids_T, minlength=network.decoder.vocabulary) / len(ids_T)
    return tensors


@torch.no_grad()
def _second_moments(network: Network, windows: Sequence[Tensor], progress: Callable[[int], None]) -> dict[str, Tensor]:
    widths = {name: network.matrix(first).shape[1] for name, (first, *_) in network.inputs()}
    widths["head.in"] = network.decoder.hidden
    moments = {name: torch.zeros(width, width, device=network.device) for name, width in widths.items()}
    rounding = {name: torch.zeros(2, device=network.device) for name in widths}
    tokens, reached = dict.fromkeys(widths, 0), dict.fromkeys(widths, 0)

    def see(name: str, x_BLI: Tensor) -> None:
        x_TI = x_BLI.flatten(0, 1)
        moments[name].addmm_(x_TI.T, x_TI)
        tokens[name] += len(x_TI)
        reached[name] += 1
        low, high = torch.aminmax(x_TI)
        scale, scale_T = (high.clamp_min(0) - low.clamp_max(0)) / 255, x_TI.abs().amax(-1) / 127
        rounding[name] += torch.stack([scale.square(), scale_T.square().mean()]) / 12

    with network.watch_inputs(see):
        for index, ids_L in enumerate(windows):
            see("head.in", network.hidden(ids_L[None])[:, compared(ids_L)])
            progress(index + 1)
    tensors = {f"{name}:moment": (moment / max(1, tokens[name])).cpu() for name, moment in moments.items()}
    tensors |= {f"{name}:rounding": (value / max(1, reached[name])).cpu() for name, value in rounding.items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(
                f"expected finite activations, the teacher's at {name.split(':')[0]} are not; check its weights, and that "
                "the calibration text is one it can read"
            )
    return tensors


@torch.enable_grad()
def _fisher(
    network: Network, windows: Sequence[Tensor], seed: int, progress: Callable[[int], None]
) -> dict[str, Tensor]:
    generator = torch.Generator(network.device).manual_seed(seed)
    linears = [matrix.name for site in network.sites.values() if site.layer is not None for matrix in site.matrices]
    sums = {name: torch.zeros(len(network.matrix(name)), device=network.device) for name in [*linears, "head"]}
    sums["embedding"] = torch.zeros(network.decoder.hidden, device=network.device)

    def add(name: str, gradient: Tensor) -> None:
        sums[name] += gradient.detach().flatten(0, -2).square().sum(0)

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _arguments: tuple, output: Tensor) -> None:
            if not output.requires_grad:  # the weights need no gradients: the graph starts at the embedding's output
                output.requires_grad_()
            output.register_hook(lambda gradient: add(name, gradient))

        return hook

    handles = [network.module(name).register_forward_hook(watch(name)) for name in ["embedding", *linears]]
    try:
        for index, ids_L in enumerate(windows):
            hidden_LD = network.hidden(ids_L[None])[0]
            logits = network.logits(hidden_LD[compared(ids_L)])
            logits.register_hook(lambda gradient: add("head", gradient))
            log_probabilities = torch.log_softmax(logits, -1)
            labels = torch.multinomial(log_probabilities.detach().exp(), 1, generator=generator)
            log_probabilities.gather(1, labels).sum().backward()
            progress(index + 1)
    finally:
        for handle in handles:
            handle.remove()
    predicted = sum(len(ids_L[compared(ids_L)]) for ids_L in windows)
    return {f"{name}:fisher": (total / predicted).cpu() for name, total in sums.items()}
