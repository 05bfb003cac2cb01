"""CONTRIBUTING's examples of a new sampler option and a new sampler: a few edits each."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# (file, a piece of it, what takes its place), as CONTRIBUTING.md shows them.
OPTION = (
    (
        "mdt_jax/diffusion/options.py",
        '    clip: bool = option(False, "',
        '    temperature: float = option(1.0, "Standard deviation of the noise drawn.")\n'
        '    clip: bool = option(False, "',
    ),
    (
        "mdt_jax/basics/ranges.py",
        '    "sample.eta": ',
        '    "sample.temperature": _number(0, 10),\n    "sample.eta": ',
    ),
    (
        "mdt_jax/sampling/sampler.py",
        "            return jax.random.normal(key, self.shape[1:])\n",
        "            return self._options.temperature * jax.random.normal(key, self.shape[1:])\n",
    ),
)
SAMPLER = (
    (
        "mdt_jax/diffusion/samplers.py",
        'SINGLE_STEP = {"ddpm": ddpm_step, ',
        '''def mean_step(
    diffusion: GaussianDiffusion,
    model_fn: ModelFn,
    x: Float[Array, "b h w c"],
    i: Int[Array, " b"],
    noise: Float[Array, "b h w c"],
    *,
    clip: bool = False,
) -> Float[Array, "b h w c"]:
    """x_{i−1} from x_i: the mean of DDPM's step, without its noise."""
    del noise
    return diffusion.predict(model_fn, x, i, clip).mean


SINGLE_STEP = {"mean": mean_step, "ddpm": ddpm_step, ''',
    ),
    (
        "mdt_jax/diffusion/options.py",
        '    "ddim": "deterministic, ',
        '    "mean": "the mean of ddpm, 100 or more",\n    "ddim": "deterministic, ',
    ),
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
values(["sample", "--sampler=mean"])
print("flags", given, given_options(values)["sampler"], "mean: " in values["sampler"].help)

config.model.update(name="DiT", input_size=4, in_channels=1, num_classes=2, patch_size=4)
config.model.update(hidden_size=4, depth=1, num_heads=1)
config.sample.update(steps=2, cfg_scale=1.0, guided_channels=None)
model = mdt_jax.DiffusionModel.from_config(config)
x, zero = jnp.zeros((1, 4, 4, 1)), jnp.zeros(1, jnp.int32)
shapes = nn.unbox(jax.eval_shape(model.network.init, jax.random.key(0), x, zero, zero))["params"]
params = jax.tree.map(lambda a: np.full(a.shape, 0.1, np.float32), shapes)
draw = lambda **options: mdt_jax.sample(model, params, labels=[0, 0], **options)
own, still, mean = draw(), draw(**given), draw(sampler="mean")
print("option", np.array_equal(own[0], own[1]), np.array_equal(still[0], still[1]))
print("sampler", np.isfinite(mean).all(), np.array_equal(mean, own))
"""


def test_a_new_option_and_a_new_sampler_are_a_few_edits_each(tmp_path):
    shutil.copytree(ROOT / "mdt_jax", tmp_path / "mdt_jax")
    for place, piece, edited in (*OPTION, *SAMPLER):
        code = (tmp_path / place).read_text()
        assert code.count(piece) == 1, (place, piece)
        (tmp_path / place).write_text(code.replace(piece, edited))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment.pop("XLA_FLAGS", None)  # one device will do
    done = subprocess.run(
        [sys.executable, "-c", SHOW, str(tmp_path)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "config 1.0 None",
        "flags {'temperature': 0.0} mean True",
        "option False True",
        "sampler True False",
    ]
