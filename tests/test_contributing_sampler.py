"""CONTRIBUTING's example of a new sampler option: two edits, and it is everywhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# File, a line of it, and what takes the line's place, as CONTRIBUTING.md shows them.
FIELD = (
    "mdt_jax/diffusion/options.py",
    '    eta: float = option(0.0, "DDIM\'s: 0 deterministic, 1 ancestral.")\n',
    '    eta: float = option(0.0, "DDIM\'s: 0 deterministic, 1 ancestral.")\n'
    '    temperature: float = option(1.0, "Standard deviation of the noise drawn.")\n',
)
USE = (
    "mdt_jax/sampling/sampler.py",
    "            return jax.random.normal(key, self.shape[1:])\n",
    "            return self._options.temperature * jax.random.normal(key, self.shape[1:])\n",
)
SHOW = """
import sys
sys.path.insert(0, sys.argv[1])
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import linen as nn
import mdt_jax
from mdt_jax.config import default_config
from mdt_jax.sample.flags import define_flags, given_options

assert mdt_jax.__file__.startswith(sys.argv[1]), mdt_jax.__file__
config = default_config()
print("config", config.sample.temperature, config.eval.temperature)

values = flags.FlagValues()
define_flags(values)
values(["sample", "--temperature=0"])
given = given_options(values)
print("flag", given)

config.model.update(name="DiT", input_size=4, in_channels=1, num_classes=2, patch_size=4)
config.model.update(hidden_size=4, depth=1, num_heads=1)
config.sample.update(steps=2, cfg_scale=1.0, guided_channels=None)
model = mdt_jax.DiffusionModel.from_config(config)
x, zero = jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, jnp.int32)
shapes = nn.unbox(jax.eval_shape(model.network.init, jax.random.key(0), x, zero, zero))["params"]
params = jax.tree.map(lambda a: np.full(a.shape, 0.1, np.float32), shapes)
own, still = (mdt_jax.sample(model, params, labels=[0, 0], **o) for o in ({}, given))
print("effect", np.array_equal(own[0], own[1]), np.array_equal(still[0], still[1]))
"""


def test_a_new_option_is_a_field_and_its_use(tmp_path):
    shutil.copytree(ROOT / "mdt_jax", tmp_path / "mdt_jax")
    for place, line, edited in (FIELD, USE):
        code = (tmp_path / place).read_text()
        assert code.count(line) == 1, place
        (tmp_path / place).write_text(code.replace(line, edited))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    del environment["XLA_FLAGS"]  # one device will do
    done = subprocess.run(
        [sys.executable, "-c", SHOW, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "config 1.0 None",
        "flag {'temperature': 0.0}",
        "effect False True",
    ]
