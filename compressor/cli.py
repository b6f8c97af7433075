"""The command `compress`: reads the recipe, calls the pipeline, shows progress and result. Decides nothing itself.

Heavy modules are imported where they are used, so that `compress --help` is quick.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from compressor.errors import CompressorError, DataError, ModelError, RecipeError, is_out_of_memory

if TYPE_CHECKING:
    from compressor.report import DryRun


class DefaultRun(TyperGroup):
    """`compress recipe.yaml` is short for `compress run recipe.yaml`: what names no command is given to `run`."""

    def parse_args(self, ctx, args):
        own = {option for parameter in self.get_params(ctx) for option in parameter.opts}
        if args and args[0] not in {*self.commands, *own}:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(cls=DefaultRun, no_args_is_help=True, pretty_exceptions_enable=False)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("model-compressor"))
        raise typer.Exit


@app.callback()
def about(
    show: Annotated[
        bool, typer.Option("--version", callback=show_version, is_eager=True, help="Shows the version and ends.")
    ] = False,
) -> None:
    """Compresses a language model to a budget: `compress recipe.yaml`."""


@app.command()
def run(
    recipe: Annotated[Path, typer.Argument(help="The recipe, a YAML file; `compress schema` lists its keys.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the run; runs/NAME_OF_THE_RECIPE when absent.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Changes a key: search.evaluations=8.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only says what the run would do and take.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Lets the model's repository run its own code here.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Shows no progress.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Shows progress as JSON, an object a line.")] = False,
) -> None:
    """Runs a recipe (`run` may be left out). The same command goes on where an interrupted run stopped.

    compress recipe.yaml --set budget.bytes=20% --out runs/small
    """
    with told():
        from compressor.recipe import Recipe

        loaded = Recipe.load(recipe, settings or ())
        loaded.check_files()

        if dry_run:
            from compressor.estimate import dry_run as estimate

            show_dry_run(estimate(loaded, trust_remote_code))
            return
        # both are read by later imports: threads that wait must not keep a core from other processes, and progress is ours
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("TQDM_DISABLE", "1")
        from compressor import pipeline
        from compressor.progress import JsonProgress, ProgressCallback, renderer, silent

        folder = out or Path("runs", recipe.stem)
        if quiet:
            shown: AbstractContextManager[ProgressCallback] = nullcontext(silent)
        else:
            shown = nullcontext(JsonProgress(sys.stderr)) if json_lines else renderer(sys.stderr)
        with shown as progress:
            report = pipeline.compress(loaded, folder, trust_remote_code=trust_remote_code, progress=progress)

        from compressor.page import headline, verdict

        said = f"{headline(report)}{verdict(report)}".replace("**", "")
        typer.echo(f"{said}\n{folder / loaded.deployed}\n{folder / 'report.html'}\n{folder / 'report.md'}")


@app.command()
def init(
    model: Annotated[str, typer.Argument(help="A local folder or a hub id.")],
    calibration: Annotated[
        list[str] | None, typer.Option(help="A text file for statistics, search and recovery; of WikiText when absent.")
    ] = None,
    evaluation: Annotated[list[str] | None, typer.Option(help="Another one, for the measurement at the end.")] = None,
) -> None:
    """Prints a recipe to begin with.

    compress init ./my-model --calibration notes.txt --evaluation others.txt > recipe.yaml
    """
    from compressor.reference import first_recipe

    typer.echo(first_recipe(model, calibration or (), evaluation or ()), nl=False)


@app.command()
def schema(
    markdown: Annotated[bool, typer.Option("--markdown", help="As a page of tables (docs/recipe.md).")] = False,
) -> None:
    """Prints the JSON schema of a recipe.

    compress schema > recipe.schema.json
    """
    from compressor.recipe import recipe_schema
    from compressor.reference import recipe_reference

    if markdown:
        typer.echo(recipe_reference(), nl=False)
        return
    typer.echo(json.dumps(recipe_schema(), indent=2))


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(help="A run's folder, or its report.json.")],
    baseline: Annotated[
        Path | None, typer.Option(help="An earlier run's folder or report.json, against which nothing may be lost.")
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(
            "--tolerance",
            metavar="NAME=SHARE",
            help="What may be lost: perplexity_ratio=2%, accuracy_ratio, bytes, prefill, decode.",
        ),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option(
            "--limit", metavar="NAME=LIMIT", help="A further limit, as in a recipe's gate: bytes=60MB, kl=0.1."
        ),
    ] = None,
    times: Annotated[
        bool,
        typer.Option("--times/--no-times", help="Whether times and memory are looked at, which depend on the device."),
    ] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="File for the checks as JSON.")] = None,
    junit: Annotated[Path | None, typer.Option(help="File for the checks as JUnit XML.")] = None,
    benchmark: Annotated[
        Path | None,
        typer.Option(help="File for the figures as github-action-benchmark reads them (customSmallerIsBetter)."),
    ] = None,
) -> None:
    """Checks a finished run against its recipe's gate and an earlier run. Exit code 3 if something was missed.

    compress check runs/mine --baseline runs/last --tolerance decode=15% --junit checks.xml
    """
    with told():
        from compressor import gate
        from compressor.files import write_text_atomic

        report = gate.read_report(folder)
        further = dict(pair("--limit", text, "bytes=60MB") for text in limits or ())
        lines = gate.every_line(report, baseline, dict(map(parse_tolerance, tolerance or ())), times, further)
        for path, text in ((json_file, gate.as_json), (junit, gate.as_junit)):
            if path is not None:
                write_text_atomic(path, text(lines, report))
        if benchmark is not None:
            write_text_atomic(benchmark, gate.as_benchmark(report))
        typer.echo(
            gate.gate_table(lines) if lines else "no limits: the recipe has no gate; name a --baseline or a --limit"
        )
        gate.require(report, lines)


def parse_tolerance(text: str) -> tuple[str, float]:
    """`decode=15%` or `decode=0.15` -> (name, share)."""
    name, value = pair("--tolerance", text, "decode=15%")
    try:
        return name, float(value.removesuffix("%")) / (100 if value.endswith("%") else 1)
    except ValueError:
        raise RecipeError(f"--tolerance {text}: expected a share such as decode=15%") from None


def pair(option: str, text: str, example: str) -> tuple[str, str]:
    """`NAME=VALUE` -> (name, value)."""
    name, equals, value = text.partition("=")
    if not equals:
        raise RecipeError(f"{option} {text}: expected {option} NAME=VALUE, such as {example}")
    return name.strip(), value.strip()


@app.command()
def compare(
    ours: Annotated[Path, typer.Argument(help="A run's folder, or its report.json.")],
    theirs: Annotated[Path, typer.Argument(help="Another one.")],
) -> None:
    """Shows two finished runs side by side.

    compress compare runs/small runs/smaller
    """
    with told():
        from compressor.gate import compare as side_by_side

        typer.echo(side_by_side(ours, theirs))


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="A deployed folder.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate at most.")] = 64,
    chat: Annotated[bool, typer.Option("--chat", help="Puts the prompt to a chat model, by its template.")] = False,
) -> None:
    """Shows the greedy continuation that an exported folder gives, or the answer of an encoder-decoder, on CPU.

    compress generate runs/small/onnx "Once upon a time" --tokens 32
    """
    with told():
        import numpy as np
        from transformers import AutoTokenizer

        from compressor.folder import ends_of
        from compressor.model import read_decoder
        from compressor.runtimes import runtime_of
        from compressor.text import chat_text

        with runtime_of(folder).open_model(folder) as decoder:
            if not decoder.writes:
                raise ModelError(f"{folder}: expected a model that writes, this one only reads")
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder)
            except (OSError, ValueError) as error:
                raise ModelError(f"{folder}: expected a tokenizer beside model.onnx; {error}") from None
            text = prompt
            if chat:
                if not tokenizer.chat_template:
                    raise ModelError(f"{folder}: expected a chat template, its tokenizer has none; leave --chat out")
                asked = [{"role": "user", "content": prompt}]
                text = chat_text(asked, tokenizer, "--chat", add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=not chat)["input_ids"]  # a template writes those itself
            if not ids:
                raise DataError(f"prompt = {prompt!r}: expected at least one token; give some text")
            longest = read_decoder(folder).longest
            needed = max(len(ids), tokens) if decoder.answers else len(ids) + tokens
            if longest is not None and needed > longest:
                raise DataError(
                    f"{len(ids)} tokens of prompt and --tokens {tokens}: expected at most {longest} "
                    f"{'each' if decoder.answers else 'together'}, the positions that the model has; give a shorter text, "
                    "or fewer"
                )
            made = decoder.generate(np.array(ids), tokens, ends_of(folder))
        shown = made if decoder.answers or chat else [*ids, *made]
        typer.echo(tokenizer.decode(shown, skip_special_tokens=True))


DISK = {
    errno.ENOSPC: "What is finished is kept; make room, and give the same command again",
    errno.EDQUOT: "What is finished is kept; make room, and give the same command again",
    errno.EROFS: "Choose a folder that can be written with --out",
    errno.EACCES: "Choose a folder that can be written with --out",
    errno.EPERM: "Choose a folder that can be written with --out",
}
"""What to do when a file cannot be written."""


@contextmanager
def told() -> Iterator[None]:
    """An error that is meant for the user becomes one message on stderr and its exit code; Ctrl-C says how to go on."""
    try:
        yield
    except CompressorError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except OSError as error:
        if error.errno not in DISK:
            raise
        typer.echo(
            f"error: {error.filename or 'a file'} cannot be written: {error.strerror}. {DISK[error.errno]}", err=True
        )
        raise typer.Exit(1) from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        typer.echo(
            "error: out of memory. What is finished is kept; lower distill.batch_tokens, search.tokens or "
            "data.sequence_length, or set distill.gradient_checkpointing, and give the same command again",
            err=True,
        )
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        typer.echo(f"\ninterrupted; the same command goes on from here:\n  {command}", err=True)
        raise typer.Exit(130) from None


def show_dry_run(plan: DryRun) -> None:
    """Prints the sites, the range of sizes and the estimates of a dry run."""
    from rich.console import Console
    from rich.table import Table

    from compressor.progress import duration
    from compressor.report import size

    console = Console(width=None if sys.stdout.isatty() else 100)
    sites = Table(title=f"{plan.model}: {len(plan.sites)} sites, {plan.actions} actions", title_justify="left")
    for name in ("site", "units", "parameters", "actions", "smallest", "largest"):
        sites.add_column(name, justify="left" if name == "site" else "right")
    alike: dict[tuple, list[str]] = {}
    for site in plan.sites:
        shape = (site.units, site.parameters, site.actions, site.smallest_bytes, site.largest_bytes)
        alike.setdefault((site.kind, *shape), []).append(site.name)
    for (kind, units, parameters, actions, smallest, largest), names in alike.items():
        name = names[0] if len(names) == 1 else f"{len(names)} × {kind}"
        sites.add_row(name, str(units), f"{parameters:,}", str(actions), size(smallest), size(largest))
    console.print(sites)
    budget = "none" if plan.bytes_budget is None else size(plan.bytes_budget)
    console.print(
        f"exported files: {size(plan.bytes_smallest)} to {size(plan.bytes_largest)}; budget: {budget}", highlight=False
    )
    stages = Table(title=f"estimates{', layer by layer' if plan.layerwise else ''}", title_justify="left")
    for name in ("stage", "time", "memory"):
        stages.add_column(name, justify="left" if name == "stage" else "right")
    for stage in plan.stages:
        stages.add_row(stage.name, duration(stage.seconds), size(stage.memory_bytes))
    stages.add_section()
    stages.add_row(
        "all",
        duration(sum(s.seconds for s in plan.stages)),
        size(max((s.memory_bytes for s in plan.stages), default=0)),
    )
    console.print(stages)


if __name__ == "__main__":
    app()
