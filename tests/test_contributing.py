"""CONTRIBUTING's examples of a new model and a new data set, as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCK = r"```python\n# (mdt_jax/\S+?)(?:, in \w+)?\n(.*?)```"
CODE = dict(re.findall(BLOCK, TEXT, re.DOTALL))  # by the file that a block belongs to
TRAIN = """
import sys
sys.path.insert(0, sys.argv[1])
import mdt_jax
from mdt_jax.config import apply_recipe, default_config
from mdt_jax.models import flops
from mdt_jax.train import train
from mdt_jax.training.metrics import read_lines

assert mdt_jax.__file__.startswith(sys.argv[1]), mdt_jax.__file__
assert flops.forward_macs(mdt_jax.create_model("BiasedDiT-S/2")) > 0
config = default_config()
config.model.update(name="BiasedDiT", input_size=8, in_channels=1, num_classes=2, patch_size=4)
config.model.update(hidden_size=8, depth=2, num_heads=2)
apply_recipe(config)
config.data.name = "stripes"
config.update(num_steps=2, batch_size=8, log_every=1)
config.sample.update(every=0, guided_channels=None)
state = train(config, sys.argv[2])
(line, last) = read_lines(f"{sys.argv[2]}/metrics.jsonl")
print("trained", int(state.step), line["loss"] > 0, last["loss"] > 0)
"""


def insert(path: Path, after: str, added: str) -> None:
    code = path.read_text()
    assert code.count(after) == 1
    path.write_text(code.replace(after, after + added))


def test_a_new_model_and_a_new_data_set_are_one_file_and_one_line_each(tmp_path):
    shutil.copytree(ROOT / "mdt_jax", tmp_path / "mdt_jax")
    for new in ("mdt_jax/models/biased_dit.py", "mdt_jax/data/stripes.py"):
        (tmp_path / new).write_text(CODE[new])
    line = CODE["mdt_jax/models/registry.py"]
    assert line.count("\n") == 1
    insert(tmp_path / "mdt_jax/models/registry.py", "FAMILIES = {\n", line)
    line = CODE["mdt_jax/data/sources.py"]
    assert line.count("\n") == 1
    sources = tmp_path / "mdt_jax/data/sources.py"
    insert(sources, "SOURCES: dict[str, Callable[[ConfigDict], Source]] = {\n", line)
    insert(
        sources,
        "from mdt_jax.data.source import Source\n",
        "from mdt_jax.data.stripes import stripes\n",
    )
    result = subprocess.run(
        [sys.executable, "-c", TRAIN, tmp_path, tmp_path / "run"],
        env={**os.environ, "PYTHONPATH": "", "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.splitlines()[-1] == "trained 2 True True"
