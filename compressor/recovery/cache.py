"""What the teacher says of the windows that are trained on, asked once and kept on disk, so that it need not run beside the
student: at every position its K likeliest tokens, and all others as one.

    {folder}/{key}.safetensors    of some windows, n being the place among them:
                                  ids/{n} int32 [P, K], log_p/{n} float16 [P, K + 1], the last of which is all others'

The divergence is that of the K + 1 outcomes, P and Q being 1 less the sum of the K:

    KL = sum_i p_i log(p_i / q_i)  +  P log(P / Q)                          i over the teacher's K likeliest tokens

Lumping outcomes together can only lower a divergence (the log sum inequality), so this is at most the KL over the
vocabulary, grows with K, and reaches it at K = V - 1. What it leaves open is how the student divides Q.

Sources: Raman et al. 2023, "For Distillation, Tokens Are Not All You Need" (the highest of the teacher's logits alone);
Anshumann et al. 2025, "Sparse Logit Sampling" (their probabilities alone, as if they were all, are a biased target: the
student grows too sure). Departure from both: the outcome of all others, which leaves p as it is. The temperature is that of
the training: at another one P is not known.

Shape letters: L tokens of a window, P of them compared (`compressor.text.compared`), T of several windows, D hidden, V
vocabulary, K tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn import functional

from compressor.files import write_bytes_atomic
from compressor.network import Network
from compressor.stages import key_of
from compressor.text import compared, tokens_digest

WINDOWS = 32
"""In a file; a run that was cut off asks again about those of one."""


def outcomes(logits_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Log-probabilities [T, K + 1] of some tokens and of all others together; [T, V] where there are no others."""
    kept_TK = logits_TV.gather(-1, ids_TK)
    if ids_TK.shape[-1] < logits_TV.shape[-1]:
        others_T1 = logits_TV.scatter(-1, ids_TK, -torch.inf).logsumexp(-1, keepdim=True)
        kept_TK = torch.cat([kept_TK, others_T1], -1)
    return torch.log_softmax(kept_TK, -1)


class TeacherCache:
    """What a teacher says of some windows. Files are mapped, not read.

    Args:
        folder: of the files alone: what is not of these windows is removed by `make`.
        teacher: names it.
        windows: which of `tokens_NL`.
        top_k: the K. temperature: by which logits are divided.
    """

    def __init__(
        self,
        folder: Path,
        teacher: str,
        tokens_NL: Tensor,
        windows: Sequence[int],
        top_k: int,
        temperature: float = 1.0,
    ):
        self.tokens_NL, self.top_k, self.temperature = tokens_NL, top_k, temperature
        self._folder, self._files = folder, {}
        for start in range(0, len(windows), WINDOWS):
            some = list(windows[start : start + WINDOWS])
            key = key_of(teacher, tokens_digest(tokens_NL[some]), top_k, temperature)
            self._files[folder / f"{key}.safetensors"] = some
        self.key = key_of([path.name for path in self._files])
        self._places = {n: (path, place) for path, some in self._files.items() for place, n in enumerate(some)}
        self._mapped: dict[Path, dict[str, Tensor]] = {}

    @torch.no_grad()
    def make(
        self,
        teacher: Network,
        together: int = 1,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Ask the teacher about all windows whose file is not there, `together` at once."""
        for path in set(self._folder.glob("*.safetensors")) - self._files.keys():
            path.unlink()
        done, total = 0, len(self._places)
        for path, windows in self._files.items():
            tensors: dict[str, Tensor] = {}
            for start in () if path.exists() else range(0, len(windows), together):
                some_BL = self.tokens_NL[windows[start : start + together]]
                hidden_BLD = teacher.hidden(some_BL)
                for place, (ids_L, hidden_LD) in enumerate(zip(some_BL, hidden_BLD, strict=True), start):
                    logits_PV = teacher.logits(hidden_LD[compared(ids_L)]) / self.temperature
                    ids_PK = logits_PV.topk(min(self.top_k, logits_PV.shape[1])).indices
                    tensors[f"ids/{place}"] = ids_PK.int().cpu()
                    tensors[f"log_p/{place}"] = outcomes(logits_PV, ids_PK).half().cpu()
                progress(done + start + len(some_BL), total)
            if tensors:
                write_bytes_atomic(path, save(tensors))
            done += len(windows)
            progress(done, total)

    def kl(self, windows: Sequence[int], logits_TV: Tensor) -> Tensor:
        """KL from the teacher in nats per token, of logits at all compared positions of these windows, divided by the
        temperature."""
        found = [self._read(window) for window in windows]
        ids_TK, log_p_TK = (torch.cat(side).to(logits_TV.device) for side in zip(*found, strict=True))
        log_p_TK = torch.log_softmax(log_p_TK.float(), -1)  # what was rounded sums to 1 again
        log_q_TK = outcomes(logits_TV.float(), ids_TK.long())
        return functional.kl_div(log_q_TK, log_p_TK, reduction="batchmean", log_target=True)

    def _read(self, window: int) -> tuple[Tensor, Tensor]:
        path, place = self._places[window]
        if path not in self._mapped:
            self._mapped[path] = load_file(path)
        return self._mapped[path][f"ids/{place}"], self._mapped[path][f"log_p/{place}"]
