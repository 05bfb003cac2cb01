"""The batch that fits: from what the devices say of their memory, and the model's own size."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh

import mdt_jax
from mdt_jax import config as config_lib
from mdt_jax import sampling
from mdt_jax.parallel import sharding
from mdt_jax.sampling import batch_size

GIB = 2**30


def create(name, **sizes):
    """A network and the shapes of its parameters."""
    network = mdt_jax.create_model(name, **sizes)
    x, zero = jnp.zeros((1, *network.image_shape)), jnp.zeros(1, jnp.int32)
    variables = jax.eval_shape(network.init, jax.random.key(0), x, zero, zero)
    return network, nn.unbox(variables)["params"]


@pytest.fixture
def memory(monkeypatch):
    """Sets what the devices of any mesh say; None: nothing, as CPUs do."""

    def fake(*limits):
        devices = [
            types.SimpleNamespace(memory_stats=lambda limit=limit: limit and {"bytes_limit": limit})
            for limit in limits
        ]
        monkeypatch.setattr(Mesh, "local_devices", property(lambda mesh: devices))

    return fake


@pytest.fixture(scope="module")
def xl2():
    return create("MDTv2-XL/2", dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("gib", "guided", "expected"),
    [(74, True, 256), (15.75, False, 128), (15.75, True, 64), (9, True, 32), (4, True, 1)],
    ids=["a GPU of 80 GB", "a TPU v5e", "guided", "a GPU of 12 GB", "too small"],
)
def test_the_batch_follows_the_memory_of_one_device(gib, guided, expected, xl2, memory):
    memory(int(gib * GIB))
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    assert batch_size.fitting(*xl2, mesh, guided) == expected


def test_several_devices_take_as_many_times_what_the_smallest_does(xl2, memory):
    memory(74 * GIB, int(15.75 * GIB), *[74 * GIB] * 6)
    assert batch_size.fitting(*xl2, sharding.create_mesh(), True) == 8 * 64
    assert batch_size.fitting(*xl2, sharding.create_mesh(tensor=4), True) == 2 * 64


def test_parameters_in_shards_leave_more_room(memory):
    network, shapes = create("MDTv2-S/2")
    mesh = sharding.create_mesh(fsdp=8)
    abstract = sharding.abstract_parameters(mesh, network)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), abstract)
    whole = batch_size.parameter_bytes(network, shapes)
    assert whole == 2 * 4 * sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    assert whole / 8 < batch_size.parameter_bytes(network, zeros) < whole / 7


def test_devices_that_do_not_say_take_256_in_all(xl2, memory):
    memory(None, None)
    assert batch_size.fitting(*xl2, sharding.create_mesh(), True) == 256


def test_a_given_batch_size_is_taken(memory):
    config = config_lib.default_config()
    config.model.update(name="DiT", input_size=8, in_channels=1, num_classes=4, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    config.sample.guided_channels = None
    model = sampling.DiffusionModel.from_config(config)
    mesh, options = sharding.create_mesh(), sampling.resolve_options(model)
    memory(GIB)
    for given, expected in ((None, 256 * 8), (7, 7), (0, 0)):
        found = sampling.resolve_batch_size(given, model, {}, mesh, options)
        assert found == expected


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("MDTv2", {"hidden_size": 64, "depth": 8, "num_heads": 2, "decoder_depth": 2}),
        ("DiT", {"hidden_size": 64, "depth": 2, "num_heads": 4}),
        ("DiT", {"hidden_size": 256, "depth": 2, "num_heads": 2}),
    ],
)
def test_rows_take_no_more_than_is_reckoned_by_xlas_own_count(name, sizes):
    """The growth of a compiled pass's temporary memory with its batch, on this CPU."""
    network, params = create(name, input_size=16, patch_size=2, num_classes=4, **sizes)

    def temporary(rows):
        images = jax.ShapeDtypeStruct((rows, *network.image_shape), jnp.float32)
        numbers = jax.ShapeDtypeStruct((rows,), jnp.int32)
        run = jax.jit(lambda params, *inputs: network.apply({"params": params}, *inputs))
        compiled = run.lower(params, images, numbers, numbers).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    measured = (temporary(32) - temporary(16)) / 16
    assert measured < batch_size.row_bytes(network) < 4 * measured
