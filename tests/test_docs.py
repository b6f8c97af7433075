"""What the documentation says can be typed: commands parse, Python compiles, recipes load, links lead somewhere."""

import re
import shlex

import pytest
import typer
import yaml

from compressor.cli import app
from compressor.recipe import Recipe
from compressor.reference import recipe_reference
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.M | re.S)


@pages
def test_commands_parse(page):
    """Every `compress ...` in a block without a language: its options and arguments are those of the command line."""
    command = typer.main.get_command(app)
    lines = [line.split(" #")[0] for block in blocks(page, "") for line in block.splitlines()]
    for line in (line for line in lines if line.startswith("compress ")):
        context = command.make_context("compress", shlex.split(line)[1:], resilient_parsing=False)
        name, chosen, arguments = command.resolve_command(context, [*context.protected_args, *context.args])
        chosen.make_context(name, arguments, parent=context)


@pages
def test_python_compiles(page):
    for block in blocks(page, "python"):
        compile(block, str(page), "exec")


@pages
def test_recipes_load(page):
    """Pieces of a recipe are put into a whole one."""
    whole = {
        "model": {"path": "."},
        "data": {"calibration": ["a.txt"], "evaluation": ["b.txt"]},
        "budget": {"bytes": "25%"},
    }
    for block in blocks(page, "yaml"):
        Recipe.from_dict({**whole, **yaml.safe_load(block)})


@pages
def test_links_and_pictures_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_the_reference_is_that_of_the_schema():
    assert (ROOT / "docs" / "recipe.md").read_text() == recipe_reference(), (
        "run: compress schema --markdown > docs/recipe.md"
    )


def test_every_file_of_the_tree_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for package in ("compressor", "policies", "eval", "compressor/recovery"):
        for path in (ROOT / package).glob("*.py"):
            assert path.name in text or path.name == "__init__.py", path
