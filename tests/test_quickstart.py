"""The notebook docs/quickstart.ipynb: it is as committed notebooks should be, and it runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a short run in a folder of its own."""
    folder = tmp_path_factory.mktemp("quickstart")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICKSTART_STEPS", "8")
        patch.setenv("QUICKSTART_SAMPLING_STEPS", "2")
        patch.setenv("QUICKSTART_FOLDER", str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("XLA_FLAGS", "")  # one device, for which it compiles sooner
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
            patch.setenv(name, str(folder / "jupyter"))
        nbclient.NotebookClient(
            notebook,
            timeout=900,
            startup_timeout=300,
            resources={"metadata": {"path": str(NOTEBOOK.parent)}},
        ).execute()
    return notebook, folder


def test_it_is_valid_and_holds_neither_outputs_nor_counts():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    for cell in code_cells(notebook):
        assert cell.outputs == [] and cell.execution_count is None, cell.id


def test_its_cells_are_formatted_and_linted():
    for command in (["format", "--check"], ["check"]):
        subprocess.run([sys.executable, "-m", "ruff", *command, NOTEBOOK], check=True, cwd=ROOT)


def test_every_cell_runs_and_says_that_nothing_is_lost(executed):
    notebook, folder = executed
    said = "".join(
        output.text
        for cell in code_cells(notebook)
        for output in cell.outputs
        if output.output_type == "stream" and output.name == "stdout"
    )
    assert "the same bits: True" in said and "the same samples: True" in said
    assert "digits.pt: " in said and "arrays of an MDTv2" in said
    assert sorted(path.name for path in (folder / "published").iterdir()) == [
        *("README.md", "config.json", "model.safetensors", "samples.png")
    ]


def test_it_shows_the_losses_the_digits_and_the_sweep(executed):
    notebook, _ = executed
    pictures = [
        [output for output in cell.outputs if "image/png" in output.get("data", {})]
        for cell in code_cells(notebook)
    ]
    assert [len(found) for found in pictures if found] == [1, 1, 1]
