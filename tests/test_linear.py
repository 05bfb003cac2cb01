"""Products with weights that may be sharded."""

import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax.compilers import estimate, topologies
from mdt_jax.models import linear
from mdt_jax.parallel import sharding


def draw(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("mesh_shape", [None, (2, 4, 1), (2, 2, 2)])
def test_tokens_last_is_the_product_transposed(mesh_shape):
    """With features merged into one axis (no tensor axis) and apart."""
    x, kernel = draw(8, 16, 8), draw(8, 3, 2, 6)
    axes = ("embed", None, "heads", None)
    along = draw(8, 3, 2, 6, 16, seed=1)

    def einsum(x, kernel):
        return jnp.einsum("bnd,dshw->bshwn", x, kernel)

    def ours(x, kernel):
        y = linear.project_tokens_last(x, kernel, axes)
        assert y.shape[-1] == linear.LANES
        return y.reshape(8, 3, 2, 6, -1)[..., :16]

    def through(function):
        y, pull = jax.vjp(function, x, kernel)
        return y, *pull(along)

    mesh = sharding.create_mesh(*mesh_shape) if mesh_shape else None
    with sharding.activations(mesh) if mesh else contextlib.nullcontext():
        found = jax.jit(lambda: through(ours))()
    for a, e in zip(found, through(einsum), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mesh_shape", [(1, 1, 1), (2, 2, 1), (1, 1, 2)])
@pytest.mark.parametrize(
    ("inputs", "features", "axes"),
    [((24,), (8,), ("mlp", "embed")), ((2, 12), (8,), ("heads", None, "embed"))],
)
def test_the_gradient_of_a_kernel_that_narrows_is_that_of_the_product(
    inputs, features, axes, mesh_shape
):
    """On a CPU the narrower array is the product's left one: no wide one is transposed."""
    x, kernel, along = draw(4, 5, *inputs), draw(*inputs, *features), draw(4, 5, *features, seed=1)
    mesh = sharding.create_mesh(*mesh_shape, jax.devices()[: np.prod(mesh_shape)])

    def gradient(kernel):
        with sharding.activations(mesh):
            y, pull = jax.vjp(lambda k: linear.project(x, k, axes, len(inputs)), kernel)
            return pull(along.reshape(y.shape))[0]

    expected = jnp.einsum("bnd,bnf->df", x.reshape(4, 5, -1), along).reshape(kernel.shape)
    np.testing.assert_allclose(jax.jit(gradient)(kernel), expected, atol=1e-5, rtol=1e-5)
    if mesh_shape == (1, 1, 1):
        assert re.search(r":f32\[8,24\] = dot_general", str(jax.make_jaxpr(gradient)(kernel)))


def transfers(function, kernel, x):
    """How often a kernel is gathered for an output and its gradients, and how often its gradient is
    summed over eight devices."""
    mesh = sharding.create_mesh(1, 8, 1)

    def gradients(kernel, x):
        with sharding.activations(mesh):
            return jax.grad(lambda *args: function(*args).sum(), (0, 1))(kernel, x)

    cut = jax.NamedSharding(mesh, jax.P("fsdp"))
    lowered = jax.jit(gradients, in_shardings=(cut, cut), out_shardings=(cut, cut)).lower(kernel, x)
    program = lowered.compile().as_text()

    # One transfer may take several arrays.
    def arrays(names):
        results = re.findall(rf"= (.*) (?:{names})(?:-start)?\(", program)
        return sum(result.count("[") for result in results)

    return arrays("all-gather"), arrays("all-reduce|reduce-scatter")


def test_packed_passes_share_a_gathered_kernel_and_one_sum_of_its_gradient():
    kernel, x = draw(64, 32), draw(16, 8 + 3, 64)
    axes = ("embed", "mlp")

    def together(kernel, x):
        return linear.project(x, kernel, axes, 1)

    def apart(kernel, x):
        parts = x[:, :8], x[:, 8:]
        return jnp.concatenate([linear.project(part, kernel, axes, 1) for part in parts], axis=1)

    gathered, summed = transfers(together, kernel, x)
    assert (gathered, summed) == (1, 1)
    assert transfers(apart, kernel, x)[1] == 2
    np.testing.assert_allclose(together(kernel, x), apart(kernel, x), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("axes", [("embed", "mlp"), ("mlp", "embed"), (None, "mlp")])
@pytest.mark.parametrize("mesh_shape", [None, (2, 4, 1), (1, 8, 1), (8, 1, 1), (2, 2, 2)])
def test_gradients_are_those_of_the_product(mesh_shape, axes):
    kernel, x, along = draw(16, 24), draw(8, 21, 16), draw(8, 21, 24, seed=2)

    def through(function):
        return jax.vjp(function, x, kernel)[1](along)

    mesh = sharding.create_mesh(*mesh_shape) if mesh_shape else None
    with sharding.activations(mesh) if mesh else contextlib.nullcontext():
        project = lambda x, kernel: linear.project(x, kernel, axes, 1)  # noqa: E731
        found = jax.jit(lambda: through(project))()
    expected = through(lambda x, kernel: x @ kernel)
    for a, e in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5, rtol=1e-5)


def sums(mesh, kernel, x):
    """Collectives that are not gathers, in a layer's gradient: (opcode, group, bytes)."""

    def gradient(kernel, x):
        with sharding.activations(mesh):
            return jax.grad(lambda k: linear.project(x, k, ("embed", "mlp"), 1).sum())(kernel)

    cut = jax.NamedSharding(mesh, jax.P("fsdp"))
    at = (cut, sharding.batch_sharding(mesh))
    lowered = jax.jit(gradient, in_shardings=at, out_shardings=cut).lower(kernel, x)
    program = lowered.compile(sharding.compiler_options(mesh)).as_text()
    collectives = estimate.estimate_program(program).collectives
    return {(c.opcode, c.group, c.bytes) for c in collectives if c.opcode != "all-gather"}


def test_only_parts_of_a_gradient_leave_the_group_that_divides_it():
    """A sum within fsdp leaves a part on each device; that crosses data, which slices may be."""
    found = sums(sharding.create_mesh(2, 4, 1), draw(64, 32), draw(16, 8, 64))
    whole = 64 * 32 * 4
    assert found == {("reduce-scatter", 4, whole), ("all-reduce", 2, whole // 4)}


@pytest.mark.tpu
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4"])
def test_the_tpus_compiler_keeps_the_reduce_scatter_of_a_part_of_the_mesh(topology):
    """Of a sharding constraint it makes an all-reduce: twice the bytes."""
    mesh = topologies.create_topology_mesh(topologies.parse_topology(topology), data=2, fsdp=8)
    kernel = jax.ShapeDtypeStruct((1152, 4608), jnp.float32)
    x = jax.ShapeDtypeStruct((64, 256, 1152), jnp.bfloat16)
    whole = 1152 * 4608 * 4
    expected = {("reduce-scatter", 8, whole), ("all-reduce", 2, whole // 8)}
    assert sums(mesh, kernel, x) == expected
