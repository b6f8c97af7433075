"""Imports run one way (see the README's tree), and nothing dangerous is used."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("compressor", "policies", "eval")
FILES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
TOP = {f"compressor.{name}" for name in ("pipeline", "run", "search", "results", "measure", "latency", "estimate")}
"""Modules of `compressor` that may bring `eval` and `policies` together."""


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_arrows(path):
    here, found = module_name(path), imports(path)
    ours = {name for name in found if within(name, *PACKAGES)}
    if within(here, "policies"):
        assert all(within(name, "policies", "compressor.plan", "compressor.errors") for name in ours), ours
    elif within(here, "eval"):
        assert all(within(name, "eval", "compressor.plan", "compressor.errors") for name in ours), ours
    elif here not in TOP:
        assert not {name for name in ours if within(name, "eval", "policies")}, ours
    if here != "compressor.cli":
        assert not {name for name in ours if within(name, "compressor.cli")}
    if not within(here, "compressor.export"):
        assert not {name for name in found if within(name, "onnx", "onnx_ir", "onnxscript")}
    if here not in ("compressor.model", "compressor.families", "compressor.cli", "compressor.measure"):
        assert not {name for name in found if within(name, "transformers")}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_pickle_and_no_eval(path):
    tree = ast.parse(path.read_text())
    assert not {name for name in imports(path) if within(name, "pickle", "dill", "cloudpickle", "joblib", "shelve")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in ("eval", "exec", "torch.load", "torch.save", "yaml.unsafe_load"), f"{path}:{node.lineno}"
            assert name != "np.load" or all(k.arg != "allow_pickle" for k in node.keywords)
