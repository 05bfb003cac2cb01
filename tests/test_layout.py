"""The house stays in order: the entries of mdt_jax/, their imports, and a short training loop."""

import ast
import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mdt_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mdt_jax"
# Beside the entries: how the package presents itself, to Python and to type checkers.
MARKS = {"__init__", "__main__", "py", "__pycache__"}
# From the ground up: an entry imports from its own floor only itself, and from those below it.
FLOORS = (
    ("basics",),
    ("models", "diffusion"),
    ("data",),
    ("parallel", "convert", "config"),
    ("checkpoints",),
    ("weights",),
    ("sampling", "evaluation"),
    ("training",),
    ("compilers",),
    ("sample",),
    ("commands",),
    ("train", "evaluate", "digits_report", "demo"),
)
MOST_LINES = 450
HEIGHT = {entry: height for height, floor in enumerate(FLOORS) for entry in floor}


def imports(code: str) -> Iterator[str]:
    """The entries of mdt_jax/ that a file's code imports, anywhere in it."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module == "mdt_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mdt_jax."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            parts = [alias.name.split(".") for alias in node.names]
            yield from (path[1] for path in parts if path[0] == "mdt_jax" and len(path) > 1)


def climbs(entry: str, code: str) -> list[str]:
    """Imports in an entry's code of entries beside or above it, which are not allowed."""
    return [other for other in imports(code) if other != entry and HEIGHT[other] >= HEIGHT[entry]]


def test_the_entries_of_the_package_are_those_of_the_floors():
    found = {path.stem for path in PACKAGE.iterdir()} - MARKS
    assert found == {*HEIGHT} and len(found) <= 20


@pytest.mark.parametrize("entry", HEIGHT)
def test_no_import_climbs(entry):
    place = PACKAGE / entry
    files = place.rglob("*.py") if place.is_dir() else [place.with_suffix(".py")]
    found = {str(file.relative_to(ROOT)): climbs(entry, file.read_text()) for file in files}
    assert {file: others for file, others in found.items() if others} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from mdt_jax.training import step",
        "from mdt_jax import training",
        "import mdt_jax.training.step",
        "def late():\n    from mdt_jax.training.step import Trainer",
        "from mdt_jax.evaluation import statistics",  # beside it
    ],
)
def test_an_import_that_climbs_is_found(line):
    assert climbs("sampling", f"from mdt_jax.models import MDT\n{line}\n") != []


def test_no_file_is_too_long():
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    assert {file: n for file, n in lengths.items() if n > MOST_LINES} == {}


def test_a_block_knows_of_no_kernels():
    code = (PACKAGE / "models" / "blocks.py").read_text()
    assert re.findall(r"pallas|kernel|\btpu\b", code, re.IGNORECASE) == []


def test_the_readmes_map_is_the_tree_in_the_floors_order():
    code_map = (ROOT / "README.md").read_text().partition("## Map of the code")[2]
    rows = dict(re.findall(r"^  (\w+)(?:/|\.py)\s(.*(?:\n {15}.*)*)", code_map, re.MULTILINE))
    assert set(rows) == {*HEIGHT}
    heights = [HEIGHT[entry] for entry in rows]
    assert heights == sorted(heights)
    for entry, text in rows.items():
        modules = {p.name for p in (PACKAGE / entry).glob("*.py")} - {"__init__.py"}
        assert {name for name in modules if name not in text} == set(), entry


def test_the_training_loop_is_seen_whole():
    (loop,) = (
        node
        for node in ast.walk(ast.parse((PACKAGE / "train" / "loop.py").read_text()))
        if isinstance(node, ast.FunctionDef) and node.name == "_train"
    )
    assert loop.end_lineno - loop.lineno < 45


def test_the_version_stands_in_one_place():
    assert mdt_jax.__version__ == importlib.metadata.version("mdt-jax")
    assert f'__version__ = "{mdt_jax.__version__}"' in (PACKAGE / "__init__.py").read_text()
    assert "version = attr: mdt_jax.__version__" in (ROOT / "setup.cfg").read_text()
