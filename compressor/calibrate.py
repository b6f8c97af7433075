"""What one look at the teacher tells: second moments of inputs, their dynamic range, Fisher weights of outputs.

For a linear layer y = W x and a change D of its weights, with g the gradient of log p(sampled label) at y,
    KL(teacher || student) per token  ~  1/2 sum_o E[g_o^2] (D H D^T)_oo        H = E[x x^T]
the Kronecker-factored Fisher of Martens and Grosse 2015 ("K-FAC", section 3) with a diagonal output side.

Of an expert, H is of the tokens that reach it, and g is 0 at the others, so that it counts as much as it is used. Where none
reaches it, all is 0: it is predicted to be of no use, and its matrices are rounded as if all inputs were alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.errors import ModelError
from compressor.network import POSITIONS, Network
from compressor.text import compared, plain

OUTPUTS = "outputs"
"""Name of the Fisher weights among what `collect` gives, the last of it."""


@dataclass(frozen=True)
class Statistics:
    """What `collect` made, read by name when it is asked for; it comes on `device`."""

    read: Callable[[str], Mapping[str, Tensor]]
    device: torch.device

    def second_moment(self, name: str) -> Tensor:
        """E[x x^T] of an input, float32 [I, I]; `head.in` is what the output head reads."""
        return self.read(name)["moment"].to(self.device)

    def rounding_variance(self, name: str, rowwise: bool) -> float:
        """Mean squared error of an input under dynamic uint8, one scale a sequence, or int8, one scale a row; over the
        sequences that reach it."""
        return float(self.read(name)["rounding"][int(rowwise)])

    def fisher(self, matrix: str) -> Tensor:
        """E[g_o^2] of a matrix's outputs, float32 [O]; of the embedding, at the vectors it looks up, [hidden]."""
        return self.read(OUTPUTS)[matrix].to(self.device)

    def token_frequency(self) -> Tensor:
        """How often each token occurs in the text, per token, float32 [vocabulary]."""
        return self.read(OUTPUTS)["frequency"].to(self.device)


def collect(
    network: Network,
    calibration_NL: Tensor,
    fisher_NL: Tensor,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Run the teacher over `calibration_NL` forward, sub-layer by sub-layer, and over `fisher_NL` forward and backward.

    Yields `moment` and `rounding` of every input, under its name, in the order of the sub-layers; then `OUTPUTS`.
    """
    windows, fisher_windows = (
        [network.written(ids_L) for ids_L in given_NL] for given_NL in (calibration_NL, fisher_NL)
    )
    total = len(windows) + 2 * len(fisher_windows)
    yield from _inputs(network, windows, lambda share: progress(int(share * len(windows)), total))
    found = _fisher(network, fisher_windows, seed, lambda done: progress(len(windows) + 2 * done, total))
    ids_T = plain(network.seen(torch.cat(windows))).cpu()
    found["frequency"] = torch.bincount(ids_T, minlength=network.decoder.vocabulary) / len(ids_T)
    yield OUTPUTS, found


def _inputs(
    network: Network, windows: Sequence[Tensor], progress: Callable[[float], None]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    streams = [network.stream(ids_L[None]) for ids_L in windows]
    sub_layers = network.decoder.every_sub_layer()
    for done, sites in enumerate(sub_layers.values(), 1):
        inputs = {
            name: _Input(first.columns, network.device) for site in sites for name, (first, *_) in site.inputs.items()
        }
        with network.watch_inputs(lambda name, x_BLI, inputs=inputs: inputs[name].see(x_BLI), sites):  # type: ignore[misc]
            for stream in streams:
                stream.advance()
        yield from ((name, found.tensors(name)) for name, found in inputs.items())
        progress(done / len(sub_layers))
    head = _Input(network.decoder.hidden, network.device)
    for stream, ids_L in zip(streams, windows, strict=True):
        head.see(stream.end()[:, compared(ids_L)])
    yield "head.in", head.tensors("head.in")


class _Input:
    """What is gathered of one input."""

    def __init__(self, width: int, device: torch.device):
        self._moment_II, self._rounding = torch.zeros(width, width, device=device), torch.zeros(2, device=device)
        self._tokens, self._sequences = 0, 0

    @torch.no_grad()
    def see(self, x_BLI: Tensor) -> None:
        """A sequence of it."""
        x_TI = x_BLI.flatten(0, 1)
        self._moment_II.addmm_(x_TI.T, x_TI)
        self._tokens += len(x_TI)
        self._sequences += 1
        low, high = torch.aminmax(x_TI)
        scale, scale_T = (high.clamp_min(0) - low.clamp_max(0)) / 255, x_TI.abs().amax(-1) / 127
        self._rounding += torch.stack([scale.square(), scale_T.square().mean()]) / 12

    def tensors(self, name: str) -> dict[str, Tensor]:
        """`moment` and `rounding`, means; zeros where no sequence came."""
        found = {
            "moment": (self._moment_II / max(1, self._tokens)).cpu(),
            "rounding": (self._rounding / max(1, self._sequences)).cpu(),
        }
        if not all(torch.isfinite(tensor).all() for tensor in found.values()):
            raise ModelError(
                f"expected finite activations, the teacher's at {name} are not; check its weights, and that the calibration "
                "text is one it can read"
            )
        return found


@torch.enable_grad()
def _fisher(
    network: Network, windows: Sequence[Tensor], seed: int, progress: Callable[[int], None]
) -> dict[str, Tensor]:
    """E[g_o^2] of every matrix's outputs; inside of no more than one block at a time (Chen et al. 2016)."""
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
    network.model.checkpointing = True
    try:
        for index, ids_L in enumerate(windows):
            hidden_PD = network.hidden(ids_L[None])[0, compared(ids_L)]
            given_PD = hidden_PD.detach().requires_grad_()
            for given_BD in given_PD.split(POSITIONS):
                logits_BV = network.logits(given_BD)
                logits_BV.register_hook(lambda gradient: add("head", gradient))
                log_p_BV = torch.log_softmax(logits_BV, -1)
                labels_B1 = torch.multinomial(log_p_BV.detach().exp(), 1, generator=generator)
                log_p_BV.gather(1, labels_B1).sum().backward()
            hidden_PD.backward(given_PD.grad)
            progress(index + 1)
    finally:
        network.model.checkpointing = False
        for handle in handles:
            handle.remove()
    predicted = sum(len(ids_L[compared(ids_L)]) for ids_L in windows)
    return {name: (total / predicted).cpu() for name, total in sums.items()}
