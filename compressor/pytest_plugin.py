"""A fixture for test suites that guard a compressed model.

def test_student(compressed):
    compressed("recipe.yaml").check(baseline="ci/baseline.json")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from compressor.report import Report


@pytest.fixture(scope="session")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Report]:
    """`compressed(recipe, out=None, overrides=(), **options)`: the report of a run, made once in a session.

    recipe: path of a YAML file; out: a folder, in which a later session goes on, and for which the workers of pytest-xdist
    wait for one another; a temporary one when absent; overrides: `section.key=value`; options: those of
    `compressor.compress`.
    """
    import compressor

    made: dict[tuple, Report | compressor.CompressorError] = {}

    def run(recipe: str | Path, out: str | Path | None = None, overrides: Sequence[str] = (), **options: Any) -> Report:
        key = (str(recipe), str(out), tuple(overrides), repr(sorted(options.items())))
        if key not in made:
            folder = Path(out or tmp_path_factory.mktemp("compressed"))
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(folder / ".session.lock"):
                    made[key] = compressor.compress(compressor.Recipe.load(recipe, overrides), folder, **options)
            except compressor.CompressorError as error:  # a missed gate too: every test that asks is told the same
                made[key] = error
        found = made[key]
        if isinstance(found, compressor.CompressorError):
            raise found
        return found

    return run
