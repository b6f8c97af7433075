"""What a user would deploy instead, side by side with a run's student: the same teacher, one machine, one protocol.

    python benchmarks/deployment.py recipes/benchmark-25.yaml runs/benchmark-25 --gguf q8_0.gguf q4_k_m.gguf q4_1.gguf

The run must be finished; of several, of one teacher at several budgets, every student has a row, and ratios are to the first.
Rivals, made from the recipe's teacher and kept in the first run's folder, under rivals:

    fp32             the teacher in ONNX Runtime, by our export
    quantize_dynamic onnxruntime.quantization's int8 of that, its products first put as plain MatMul, as general exporters do
    genai int4       ONNX Runtime GenAI's model builder, int4 for this device (needs onnxruntime-genai); of decoders alone
    *.gguf           llama.cpp (needs llama-cpp-python); made of the teacher by llama.cpp's own tools, and given here

Bytes are those of the files that the weights are read from. Perplexity and KL(teacher || model) on the recipe's evaluation
texts, window by window, and of embedders and classifiers how often they are right, as in a run's report. Times: prefill and
decode of the recipe's workload, the models open one at a time, in turns over `--rounds`, medians of these. `of bandwidth`:
bytes of a token's weights over the time of a token, as a share of the bandwidth with which torch sums a large array, which
takes its turns, too. `opens`: least of three times until a model is ready. OpenMP's waiting is left as it is: with the
passive one of the other benchmarks llama.cpp decodes five times slower. A prefill ends with the logits of the last token, but
for GenAI's graph, which has those of every token.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common
import torch

from compressor.export import OnnxDecoder
from compressor.files import write_json_atomic
from compressor.measure import Target, cores, opened, time_models, versions
from compressor.progress import LineProgress
from compressor.recipe import Recipe
from compressor.report import number, table
from compressor.results import reading
from compressor.run import Run, start
from compressor.runtimes import BenchCalls
from compressor.stages import Stages
from compressor.student import Decoder
from compressor.text import predictions
from eval.memory import peak_growth_bytes
from eval.perplexity import Quality, compare

SUMMED = 1 << 30
"""Bytes of the array whose sum says what memory gives."""


@dataclass(frozen=True)
class Engine:
    """One deployed model: a folder for ONNX Runtime, or a GGUF file for llama.cpp."""

    path: Path
    target: Target

    @property
    def size_bytes(self) -> int:
        """Graph and weights, without tokenizer and configuration."""
        files = [self.path] if self.path.is_file() else self.path.glob("model.onnx*")
        return sum(file.stat().st_size for file in files)

    @contextmanager
    def logits(self, length: int) -> Iterator[Callable[[np.ndarray], np.ndarray]]:
        """Token ids [L], at most `length` -> logits [L, V]."""
        if self.path.is_dir():
            with OnnxDecoder(self.path, self.target.device, self.target.threads) as decoder:
                yield decoder.logits
        else:
            model = self._llama(length, logits_all=True)

            def logits(ids: np.ndarray) -> np.ndarray:
                model.reset()
                model.eval(ids.tolist())
                return model.scores[: len(ids)]

            yield logits
            model.close()

    @contextmanager
    def calls(self) -> Iterator[BenchCalls]:
        """To be timed: the prefill of an empty cache, and a token on a filled one."""
        target = self.target
        if self.path.is_dir():
            with opened(self.path, target) as calls:
                yield calls
        else:
            model = self._llama(max(target.prefill_tokens, target.context) + 1)
            ids = np.random.default_rng(0).integers(0, model.n_vocab(), max(target.prefill_tokens, target.context) + 1)

            def prefill() -> None:
                model.reset()
                model.eval(ids[: target.prefill_tokens].tolist())

            def decode() -> None:
                model.n_tokens = target.context  # `eval` drops what lies behind
                model.eval([int(ids[0])])

            model.eval(ids[: target.context].tolist())
            yield BenchCalls(prefill, decode, lambda: None)
            model.close()

    def _llama(self, context: int, logits_all: bool = False):
        from llama_cpp import Llama

        threads = self.target.threads or cores()
        return Llama(
            str(self.path),
            n_ctx=context,
            n_batch=context,
            n_ubatch=context,
            n_threads=threads,
            n_threads_batch=threads,
            n_gpu_layers=0 if self.target.device == "cpu" else -1,
            logits_all=logits_all,
            verbose=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--gguf", nargs="*", type=Path, default=[])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    progress = LineProgress(sys.stderr)
    recipe = Recipe.load(options.recipe)
    out = options.runs[0]
    run = start(recipe, out, False, Stages(out / "stages", progress))
    folders = {f"student, {path.name}": path / recipe.deployed for path in options.runs}
    first = next(iter(folders))
    for student in folders.values():
        if not (student / "model.onnx").is_file():
            raise SystemExit(
                f"expected the student of a finished run in {student}; run compress {options.recipe} first"
            )
    decoder = run.teacher.network.decoder
    folders |= rivals(Path(recipe.model.path), out, run.target.device, decoder)
    folders |= {f"llama.cpp {path.stem}": path for path in options.gguf}
    engines = {name: Engine(path, run.target) for name, path in folders.items()}

    quality = score(engines, run)
    with run.stages.timed("timing") as report:
        timed = {name: engine.calls for name, engine in engines.items()} | {"memory": summing}
        times = time_models(timed, rounds=(options.rounds, options.rounds), progress=report)
    memory = {name: peak_growth_bytes(use, engine.path, asdict(run.target)) for name, engine in engines.items()}
    opening = {name: min(seconds_to_open(engine) for _ in range(3)) for name, engine in engines.items()}
    bandwidth = SUMMED / (times["memory"].decode.median_ms / 1e3)
    ours = times[first]
    rows = []
    for name, engine in engines.items():
        prefill, decode = times[name].prefill, times[name].decode
        rows.append(
            {
                "model": name,
                "MB": engine.size_bytes / 1e6,
                "perplexity": quality[name].perplexity,
                "KL": quality[name].kl,
                **({"right": quality[name].accuracy} if decoder.classes else {}),
                "prefill ms": prefill.median_ms,
                "× student": prefill.median_ms / ours.prefill.median_ms,
                **(
                    {
                        "decode ms": decode.median_ms,
                        "× student ": decode.median_ms / ours.decode.median_ms,
                        "of bandwidth": engine.size_bytes / (decode.median_ms / 1e3) / bandwidth,
                    }
                    if decoder.causal
                    else {}
                ),
                "peak MB": memory[name] / 1e6,
                "opens s": opening[name],
            }
        )
    print(
        f"teacher: perplexity {quality['teacher'].perplexity:.2f}; bandwidth {bandwidth / 1e9:.1f} GB/s; {versions()}\n"
    )
    print(table(list(rows[0]), [[v if isinstance(v, str) else number(v) for v in row.values()] for row in rows]))
    write_json_atomic(out / "deployment.json", rows)


def rivals(teacher: Path, out: Path, device: str, decoder: Decoder) -> dict[str, Path]:
    """Folders of the rivals in ONNX Runtime, made where they are missing."""
    import onnx
    import onnxruntime.quantization
    from onnxruntime.tools.onnx_model_utils import make_dim_param_fixed

    fp32, dynamic, int4 = out / "stages" / "fp32", out / "rivals" / "dynamic", out / "rivals" / "genai-int4"
    if not dynamic.exists():
        draft = dynamic.with_name("dynamic.draft")
        draft.mkdir(parents=True, exist_ok=True)
        with_plain_products(fp32 / "model.onnx", draft / "plain.onnx")
        options = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of what ONNX Runtime's own operators give
        onnxruntime.quantization.quantize_dynamic(draft / "plain.onnx", draft / "model.onnx", extra_options=options)
        for file in draft.glob("plain.onnx*"):
            file.unlink()
        draft.rename(dynamic)
    found = {"fp32": fp32, "quantize_dynamic": dynamic}
    if decoder.causal and not int4.exists():
        draft = int4.with_name("genai-int4.draft")
        build = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", device]
        subprocess.run([*build, "-i", str(teacher), "-o", str(draft), "-c", str(draft / "cache")], check=True)
        graph = onnx.load(draft / "model.onnx", load_external_data=False)
        make_dim_param_fixed(graph.graph, "kv_cache_dim", decoder.head_dim)  # GenAI has it from its configuration
        onnx.save(graph, draft / "model.onnx")
        draft.rename(int4)
    return found | ({"genai int4": int4} if decoder.causal else {})


def with_plain_products(source: Path, target: Path) -> None:
    """A copy of an fp32 graph with MatMul and weights [in, out] for FusedMatMul, which quantize_dynamic leaves alone."""
    model = ir.load(source)
    graph = model.graph
    for node in list(graph):
        if node.op_type == "FusedMatMul":
            x, weight = node.inputs
            assert weight is not None and weight.const_value is not None
            name = f"{weight.name}.transposed"
            array = np.ascontiguousarray(weight.const_value.numpy().T)
            graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
            product = ir.node("MatMul", [x, graph.initializers[name]])
            graph.insert_before(node, product)
            node.outputs[0].replace_all_uses_with(product.outputs[0], replace_graph_outputs=True)
            for attribute in ("name", "type", "shape"):
                setattr(product.outputs[0], attribute, getattr(node.outputs[0], attribute))
            graph.remove(node, safe=True)
    onnx_ir.passes.common.RemoveUnusedNodesPass()(model)  # and the weights that nothing reads any more
    ir.save(model, target, external_data=f"{target.name}.data")


def score(engines: dict[str, Engine], run: Run) -> dict[str, Quality]:
    """Perplexity and KL of the teacher and of every engine over all evaluation texts."""
    windows_NL, network = run.texts.evaluation_NL.numpy(), run.teacher.network
    with run.stages.timed("quality") as report, ExitStack() as stack:
        models = {name: stack.enter_context(engine.logits(windows_NL.shape[1])) for name, engine in engines.items()}
        read = {name: reading(network, logits) for name, logits in models.items()}
        return compare(network.window_logits, read, windows_NL, report, predictions, network.decoder.classes)


def seconds_to_open(engine: Engine) -> float:
    """Until it could run, its file in the page cache."""
    start = time.perf_counter()
    with engine.logits(8):
        return time.perf_counter() - start


def use(path: str, target: dict) -> None:
    """What peak memory is measured of: one prefill and eight tokens."""
    with Engine(Path(path), Target(**target)).calls() as calls:
        calls.prefill()
        for _ in range(8):
            calls.decode()


@contextmanager
def summing() -> Iterator[BenchCalls]:
    """The sum of `SUMMED` bytes, to be timed: what reading memory takes."""
    array = torch.ones(SUMMED // 4)
    yield BenchCalls(array.sum, array.sum, lambda: None)


if __name__ == "__main__":
    main()
