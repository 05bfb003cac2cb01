"""Importing: `mdt_jax.sample` is a function whatever was imported, and names alone cost no JAX."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import mdt_jax
from mdt_jax import checkpoints, data, diffusion, models, sampling, train

ROOT = Path(__file__).parents[1]
# The three uses of the name, each in its own order in a new process.
USES = {
    "import": "import mdt_jax.sample",
    "command": """
sys.argv = ["sample", "--help"]
try:
    runpy.run_module("mdt_jax.sample", run_name="__main__", alter_sys=True)
except SystemExit:
    pass
""",
    "call": """
import mdt_jax
try:
    mdt_jax.sample()
except TypeError as error:
    assert "'model'" in str(error), error
else:
    raise AssertionError("sample() needs a model")
""",
}


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("order", list(itertools.permutations(USES)), ids=" ".join)
def test_sample_is_a_function_after_its_uses_in_any_order(order):
    parts = ["import runpy, sys", *(USES[use] for use in order)]
    parts += ["import mdt_jax, types", "print(type(mdt_jax.sample) is types.FunctionType)"]
    parts += ["from mdt_jax import sample", "print(sample is mdt_jax.sampling.sample)"]
    assert run("\n".join(parts)).splitlines()[-2:] == ["True", "True"]


@pytest.mark.parametrize(
    "name",
    ["mdt_jax", "mdt_jax.convert.transformers", "mdt_jax.convert.architecture",
     "mdt_jax.convert.autoencoder_dc", "mdt_jax.models.positions", "mdt_jax.sample"],
)  # fmt: skip
def test_names_and_converters_import_neither_jax_nor_flax(name):
    heavy = run(f"import sys, {name}; print(sorted({{'jax', 'flax', 'torch'}} & set(sys.modules)))")
    assert heavy == "[]\n"


LAZY = (mdt_jax, checkpoints, data, diffusion, sampling, train)


@pytest.mark.parametrize("module", [*LAZY, models], ids=lambda module: module.__name__)
def test_every_public_name_is_there_and_listed(module):
    assert set(module.__all__) <= set(dir(module))
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
    with pytest.raises(AttributeError, match="has no attribute 'smaple'"):
        module.smaple  # noqa: B018


@pytest.mark.parametrize("module", LAZY, ids=lambda module: module.__name__)
def test_the_names_of_type_checkers_are_those_of_the_table(module):
    """Both say where a name is from: the imports under TYPE_CHECKING, and `_HOMES`."""
    (block,) = [
        node
        for node in ast.parse(Path(module.__file__).read_text()).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    named = {alias.name: node.module for node in block.body for alias in node.names}
    assert named == module._HOMES and sorted(named) == sorted(module.__all__)
