"""Every seed gives draws of its own, up to 63 bits; below 32 bits they are JAX's own."""

import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import data
from mdt_jax.config import default_config
from mdt_jax.data.stream import ExampleStream
from mdt_jax.diffusion.seeds import key_of
from mdt_jax.models.masking import KeptTokens
from mdt_jax.sampling import DiffusionModel, draw_labels
from mdt_jax.training.step import draw_latents, draw_randomness

ROOT = Path(__file__).parents[1]
SMALL = (0, 1, 7, 2**31 - 1, 2**31, 2**32 - 1)
LARGE = (2**32, 2**32 + 7, 5 * 2**32, 2**62 + 3, 2**63 - 1)


def bits(key):
    return np.asarray(jax.random.key_data(key)).tolist()


@pytest.mark.parametrize("seed", SMALL)
def test_a_seed_of_32_bits_has_the_key_that_it_always_had(seed):
    assert bits(key_of(seed)) == bits(key_of(np.int64(seed))) == bits(jax.random.key(seed))


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("seed", LARGE)
def test_a_larger_one_has_the_key_that_jax_makes_in_64_bits(seed, implementation):
    with jax.default_prng_impl(implementation):
        found = bits(key_of(seed))
        with jax.enable_x64(True):
            assert found == bits(jax.random.key(seed))


def test_no_two_seeds_share_a_key():
    assert len({tuple(bits(key_of(seed))) for seed in (*SMALL, *LARGE)}) == len(SMALL + LARGE)


def test_a_key_is_left_as_it_is():
    for key in (jax.random.key(3), jax.random.PRNGKey(3)):
        assert key_of(key) is key


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 1.5, True, "0", None, float("nan")])
def test_what_is_no_seed_is_refused_in_one_line(seed):
    with pytest.raises(ValueError, match=r"^key [^\n]* 0 to 9,223,372,036,854,775,807$"):
        key_of(seed)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (np.array([1, 2]), r"key \[1, 2\] is no PRNG key; give a seed, or jax.random.key\(0\)"),
        (jnp.array([0.5, 1.0]), r"key \[0.5, 1.0\] is no PRNG key"),
        (np.zeros(3, np.uint32), r"key \[0, 0, 0\] is no PRNG key"),
        (jax.random.split(jax.random.key(0), 3), r"key holds 3 keys, of shape \(3,\); give one of"),
        (jax.random.split(jax.random.PRNGKey(0)), r"key holds 2 keys, of shape \(2,\); give one"),
    ],
)
def test_an_array_that_is_not_one_key_is_refused_in_one_line(key, said):
    with pytest.raises(ValueError, match=rf"^{said}[^\n]*$"):
        key_of(key)


def _step(seed):
    return draw_randomness(seed, jnp.int32(0), (2, 4, 4, 1), 4).full_noise


def _latents(seed):
    return draw_latents(seed, jnp.int32(0), jnp.ones((2, 4, 4, 2)))


def _kept(seed):
    kept = KeptTokens.of_ratio(256, 0.3, 0.2)
    return [kept.draw(seed, step) for step in range(40)]


def _order(seed):
    images = np.arange(32, dtype=np.uint8).reshape(32, 1, 1, 1)
    source = data.arrays(images, np.zeros(32, int), ("a",))
    return [int(ExampleStream(source, seed, flip=True)[i]["image"][0, 0, 0]) for i in range(32)]


def _labels(seed):
    model = DiffusionModel.from_config(default_config())
    return draw_labels(model, None, 40, key=seed)


@pytest.mark.parametrize("draw", [_step, _latents, _kept, _order, _labels])
def test_whatever_is_drawn_by_a_seed_differs_between_seeds(draw):
    drawn = {seed: np.asarray(draw(seed)).tobytes() for seed in (0, 2**32, 2**32 + 1, 2**62)}
    assert len(set(drawn.values())) == 4
    assert np.asarray(draw(2**32)).tobytes() == drawn[2**32]


def keys_made(code):
    """The calls of `jax.random.key` and `PRNGKey` in code whose argument is no constant."""
    for node in ast.walk(ast.parse(code)):
        name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if name.rpartition(".")[2] in ("key", "PRNGKey") and "random" in name:
            argument = node.args[0] if node.args else None
            if not isinstance(argument, ast.Constant):
                yield ast.unparse(node)


def test_no_key_is_made_of_a_seed_elsewhere():
    files = [*(ROOT / "mdt_jax").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]
    found = {str(f.relative_to(ROOT)): list(keys_made(f.read_text())) for f in files}
    assert {file: keys for file, keys in found.items() if keys} == {
        "mdt_jax/diffusion/seeds.py": ["jax.random.key(low)"]
    }
    assert list(keys_made("k = jax.random.key(f.seed)\nj = jax.random.PRNGKey(s)")) != []
