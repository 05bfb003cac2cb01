"""One model, however it is spread: every mesh trains it alike, or is refused."""

import dataclasses
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fixtures import make_trainer, reference, start
from flax import linen as nn
from jobs import outcomes, start_job

from mdt_jax.parallel import sharding
from mdt_jax.training.step import Trainer

NUM_STEPS, BATCH = 5, 16


def randomised(model):
    """Parameters with every tensor random: zero gates and last layers hide every error."""
    x, zero = jnp.zeros((1, *model.image_shape)), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, zero, zero)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape, scale=0.1), jnp.float32), nn.unbox(shapes)
    )


def run(mesh_shape, fault=None, **settings):
    """Losses and per-tensor gradient norms of five steps on a mesh of that shape."""
    devices = jax.devices()[: int(np.prod(mesh_shape))]
    mesh = sharding.create_mesh(*mesh_shape, devices=devices)
    model = reference("mdt_v2").model(scan_unroll=settings.pop("scan_unroll", 1))
    trainer = make_trainer("mdt_v2", mesh=mesh, model=model, **settings)
    seen = []

    # Plain descent, whose "state" is the norm of each tensor's gradient.
    def record(grads, norms, params=None):
        norms = [jnp.linalg.norm(g) for g in jax.tree.leaves(grads)]
        return jax.tree.map(lambda g: -1e-2 * g, grads), norms

    probe = optax.GradientTransformation(
        lambda params: [jnp.zeros(())] * len(jax.tree.leaves(params)), record
    )
    trainer = dataclasses.replace(trainer, optimizer=probe)
    if fault:
        trainer = fault(trainer)
    state = start(trainer, randomised(model))
    step = trainer.jit_step(9)
    rng = np.random.default_rng(1)
    for _ in range(NUM_STEPS):
        batch = {
            "image": rng.normal(size=(BATCH, 8, 8, 4)).astype(np.float32),
            "label": rng.integers(0, 10, BATCH).astype(np.int32),
        }
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        state, metrics = step(state, batch)
        norms = {f"tensor {i}": norm for i, norm in enumerate(state.opt_state)}
        seen.append({"loss": metrics["loss"], **norms})
    return jax.tree.map(lambda *xs: np.array(xs, np.float64), *seen)


@pytest.fixture(scope="module")
def single():
    """One device, replicated, scanned, no accumulation: every other way must equal it."""
    # Compiling is nearly all that these runs take, and this takes a third off.
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield run((1, 1, 1))
    jax.config.update("jax_disable_most_optimizations", before)


def largest_difference(a, b):
    scale = max(np.abs(v).max() for k, v in b.items() if k != "loss")

    def difference(k):
        # A gradient that is zero in exact arithmetic is rounding noise beside the others.
        floor = 1e-6 * scale if k != "loss" else 0.0
        return np.max(np.abs(a[k] - b[k]) / np.maximum(np.abs(b[k]), floor))

    return max(difference(k) for k in b)


@pytest.mark.parametrize(
    ("mesh_shape", "settings"),
    [
        ((1, 1, 1), {"scan_unroll": 2, "accumulation_steps": 2}),
        ((2, 1, 1), {"accumulation_steps": 4}),
        ((4, 1, 1), {}),
        ((8, 1, 1), {}),
        ((1, 8, 1), {}),
        ((1, 4, 1), {"scan_unroll": 2}),
        ((1, 1, 4), {}),
        ((2, 2, 2), {"accumulation_steps": 2}),
    ],
)
def test_every_mesh_trains_the_same_model(single, mesh_shape, settings):
    assert largest_difference(run(mesh_shape, **settings), single) < 1e-5


class MissingShard(Trainer):
    """Leaves the samples of one shard of eight out of the gradient, and in the loss."""

    def loss(self, params, samples, num_kept):
        total, losses = super().loss(params, samples, num_kept)
        last = slice(-BATCH // 8, None)
        missing = sum(terms["loss"][last].sum() / BATCH for terms in losses.values())
        return total - missing + jax.lax.stop_gradient(missing), losses


class NoBias(Trainer):
    """Runs the model with its relative-position bias dropped."""

    def loss(self, params, samples, num_kept):
        params = jax.tree_util.tree_map_with_path(
            lambda path, p: 0 * p if "relative_bias" in jax.tree_util.keystr(path) else p, params
        )
        return super().loss(params, samples, num_kept)


@pytest.mark.parametrize("broken", [MissingShard, NoBias])
def test_a_fault_of_one_mesh_is_seen(single, broken):
    def fault(trainer):
        fields = {f.name: getattr(trainer, f.name) for f in dataclasses.fields(trainer)}
        return broken(**fields)

    assert largest_difference(run((8, 1, 1), fault=fault), single) > 1e-3


def test_parameters_and_moments_are_really_sharded():
    mesh = sharding.create_mesh(1, 4, 2)
    abstract = make_trainer("mdt_v2", mesh=mesh).abstract_state()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))
    assert sharding.bytes_per_device(abstract) < whole / 5
    qkv = abstract.opt_state[1].m["in_blocks"]["layers"]["attn"]["qkv"]["kernel"]
    assert tuple(qkv.sharding.spec) == (None, "fsdp", None, "tensor", None)


def test_activations_are_constrained_to_the_batch_in_every_block():
    """Without constraints XLA is free to gather the batch and cut activations by their width."""
    trainer = make_trainer("mdt_v2", mesh=sharding.create_mesh(2, 2, 2))
    batch = {
        "image": jax.ShapeDtypeStruct((8, 8, 8, 4), jnp.float32),
        "label": jax.ShapeDtypeStruct((8,), jnp.int32),
    }
    lowered = trainer.jit_step(9).lower(trainer.abstract_state(), batch).as_text()
    tokens = re.findall(
        r'sharding_constraint.*\[\{"data", "fsdp"\}, \{\}, \{\}\].*tensor<(8x25|8x16|16x16)x32',
        lowered,
    )
    # Both passes packed: in and out stacks. The masked one: around the side-interpolator. Both as
    # one batch: embeddings and the decoder stack.
    assert [tokens.count(shape) >= 2 for shape in ("8x25", "8x16")] == [True, True]
    assert "16x16" in tokens


def test_no_device_computes_the_whole_batch():
    """Collectives of batch-sized activations would mean that sharding the parameters undid it."""
    mesh = sharding.create_mesh(1, 8, 1)
    model = reference("mdt_v2").model(hidden_size=64)
    trainer = make_trainer("mdt_v2", mesh=mesh, model=model)
    batch = {
        "image": jax.ShapeDtypeStruct((56, 8, 8, 4), jnp.float32),
        "label": jax.ShapeDtypeStruct((56,), jnp.int32),
    }
    compiled = trainer.jit_step(9).lower(trainer.abstract_state(), batch).compile().as_text()
    collectives = re.findall(r"= (\S+) (?:all-reduce|all-gather|reduce-scatter)\(", compiled)
    assert len(collectives) > 10
    assert [shape for shape in collectives if re.match(r"f32\[(?:56|7),\d+,", shape)] == []


def test_one_process_holds_the_whole_batch():
    assert sharding.batch_parts(sharding.create_mesh(2, 2, 2)) == ((0,), 1)


# Prints what each process's devices hold of a batch that it read the parts of.
MEMBER = """
import jax, numpy as np
from mdt_jax.parallel.distributed import initialize_distributed
initialize_distributed()
from mdt_jax.parallel import sharding
from mdt_jax.data import Source, create_batches, prefetch_to_device
# Processes 0 and 1 in turn, twice next to each other: as the chips of a TPU slice may be.
devices = [jax.devices()[i] for i in ORDER]
mesh = jax.sharding.Mesh(np.array(devices).reshape(4, 2, 1), sharding.MESH_AXES)
parts, count = sharding.batch_parts(mesh)
records = [(np.full((1, 1, 1), i, np.uint8), i) for i in range(64)]
source = Source("numbers", records, (1, 1, 1), tuple(map(str, range(64))))
batches = create_batches(source, global_batch_size=16, seed=0, process_index=parts,
                         process_count=count, flip=False)
whole = create_batches(source, global_batch_size=16, seed=0, process_index=0, process_count=1,
                       flip=False)
with prefetch_to_device(batches, sharding.batch_sharding(mesh)) as on_device:
    for _ in range(2):
        expected, batch = next(whole), next(on_device)
        for name in ("image", "label"):
            assert batch[name].shape == expected[name].shape
            for shard in batch[name].addressable_shards:
                np.testing.assert_array_equal(shard.data, expected[name][shard.index])
print(parts, count)
"""


@pytest.mark.parametrize(
    ("order", "parts"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], ["(0,) 2", "(1,) 2"]),
        ([0, 1, 4, 5, 2, 3, 6, 7], ["(0, 2) 4", "(1, 3) 4"]),
        ([4, 0, 1, 5, 6, 2, 3, 7], ["(1, 2, 5, 6) 8", "(0, 3, 4, 7) 8"]),
    ],
)
def test_every_device_gets_its_rows_in_whatever_order_the_mesh_has_them(order, parts):
    code = MEMBER.replace("ORDER", str(order))
    job = outcomes(start_job([sys.executable, "-c", code], 2, devices=4), timeout=120)
    assert [status for status, _ in job] == [0, 0], job
    assert [text.splitlines()[-1] for _, text in job] == parts


# ---- The order of devices ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip and its place, as JAX describes them."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int
    core_on_chip: int = 0
    device_kind: str = "TPU v4"
    platform: str = "tpu"


def pod(x, y, z, slices=1):
    """The chips of slices of x × y × z."""
    places = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    return [
        Chip(s * len(places) + i, place, s) for s in range(slices) for i, place in enumerate(places)
    ]


def test_a_mesh_axis_may_cut_an_axis_of_the_torus():
    """v4-512 is 8 × 8 × 4 chips: no product of its axes is 16."""
    chips = pod(8, 8, 4)
    devices = sharding.arrange_devices((16, 16, 1), chips)
    assert devices.shape == (16, 16, 1)
    assert {chip.id for chip in devices.flat} == set(range(256))


@pytest.mark.parametrize("shape", [(8, 8, 1), (4, 16, 1), (8, 2, 4), (64, 1, 1)])
def test_only_the_data_axis_crosses_slices(shape):
    devices = sharding.arrange_devices(shape, pod(4, 4, 1, slices=4))
    assert devices.shape == shape
    slice_of = np.vectorize(lambda chip: chip.slice_index)(devices)
    assert all(len(set(row.flat)) == 1 for row in slice_of)
    assert list(dict.fromkeys(slice_of[:, 0, 0].tolist())) == [0, 1, 2, 3]


def test_a_mesh_that_crosses_slices_is_refused():
    with pytest.raises(ValueError, match="mesh.data 2 .* 4 TPU slices.* is 32, .*1, 2, 4, 8, 16$"):
        sharding.arrange_devices((2, 32, 1), pod(4, 4, 1, slices=4))


def test_slices_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\[15, 16\] devices"):
        sharding.arrange_devices((31, 1, 1), pod(4, 4, 1, slices=2)[:-1])


# ---- Meshes that cannot work -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 1, 1), "data 3 .* does not fit 8 devices.*1, 2, 4, 8"),
        ((-1, -1, 1), "mesh.data and mesh.fsdp are both -1"),
        ((0, 1, 1), "mesh.data 0"),
        ((2, 2, 1), "must be 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        sharding.create_mesh(*shape)


def test_a_tensor_axis_that_cuts_a_head_is_refused():
    with pytest.raises(
        ValueError, match="mesh.tensor 8 does not divide the model's 4 heads; 1, 2, 4"
    ):
        sharding.check_heads(sharding.create_mesh(1, 1, 8), 4)


def test_an_axis_that_does_not_divide_a_parameter_is_named():
    model = reference("mdt_v2").model(hidden_size=36, num_heads=4)
    trainer = make_trainer("mdt_v2", mesh=sharding.create_mesh(1, 8, 1), model=model)
    with pytest.raises(ValueError, match=r"mesh.fsdp 8 does not divide an axis of 36 of .*"):
        trainer.abstract_state()
