"""bfloat16 is bfloat16, and float32 stays float32 where it matters: read off the step's jaxpr."""

import dataclasses
import functools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest
from fixtures import make_trainer, reference
from jax.extend import core

from mdt_jax.diffusion import GaussianDiffusion
from mdt_jax.models import layers, plain_attention

# What softmax, norms, losses and optimisers take, and nothing else of a step in bfloat16: the
# activations are tanh and logistic.
DELICATE = {"exp", "exp2", "expm1", "log", "log1p", "rsqrt", "sqrt", "pow", "reduce_max", "argmax"}
# Where modules' names end the scope is within the model; the loss is what comes after them.
OUTSIDE_THE_MODEL = re.compile(r"^/+((transpose\()?(jvp\()?loss\)*/+|optimizer/|ema/)$")
BLOCK = re.compile(r"/(attn|mlp|skip|modulation)/")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One equation of a jaxpr.

    Attributes:
      name: its primitive.
      dtypes: of its floating operands.
      scope: the path of passes and modules, "transpose(" in it marking the backward pass.
    """

    name: str
    dtypes: frozenset[str]
    scope: str


def operations(jaxpr: core.Jaxpr, scope: str = "/") -> Iterator[Operation]:
    """All equations, those of scans, checkpoints, conditions, calls and kernels among them."""
    for equation in jaxpr.eqns:
        inside = f"{scope}{equation.source_info.name_stack}/"
        dtypes = (getattr(v.aval, "dtype", jnp.int32) for v in equation.invars)
        floats = frozenset(str(d) for d in dtypes if jnp.issubdtype(d, jnp.floating))
        yield Operation(equation.primitive.name, floats, inside)
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from operations(getattr(value, "jaxpr", value), inside)


def _is_jaxpr(value: object) -> bool:
    return isinstance(value, core.Jaxpr | core.ClosedJaxpr)


def step_operations(name: str, remat: str = "none") -> list[Operation]:
    """Those of a fixture's training step in bfloat16: its passes, forward and backward."""
    r = reference(name)
    trainer = make_trainer(name, model=r.model(dtype=jnp.bfloat16, remat=remat))
    image = jax.ShapeDtypeStruct((2, *trainer.model.image_shape), jnp.float32)
    batch = {"image": image, "label": jax.ShapeDtypeStruct((2,), jnp.int32)}
    step = functools.partial(trainer.step, num_kept=8 if r.masks else None)
    return list(operations(jax.make_jaxpr(step)(trainer.abstract_state(), batch).jaxpr))


def faults(found: list[Operation]) -> list[str]:
    """What is computed in the wrong precision: primitive, dtypes and scope."""

    def is_wrong(op: Operation) -> bool:
        # The bias' gradient is summed over samples in float32, on CPUs as a product with ones.
        is_sum = "/sum_over_samples/" in op.scope
        if op.name == "dot_general" and BLOCK.search(op.scope) and not is_sum:
            return op.dtypes != {"bfloat16"}
        must_be_float32 = (
            op.name in DELICATE
            or "/modulated_norm/" in op.scope
            or OUTSIDE_THE_MODEL.match(op.scope)
        )
        # Outside the model, what converts its output.
        return must_be_float32 and "bfloat16" in op.dtypes and op.name != "convert_element_type"

    return sorted({f"{op.name} of {'+'.join(sorted(op.dtypes))}: {op.scope}"
                   for op in found if is_wrong(op)})  # fmt: skip


@pytest.mark.parametrize(
    ("name", "remat", "passes"),
    [("dit", "none", 1), ("dit", "full", 1), ("mdt_v1", "none", 2), ("mdt_v2", "none", 2)],
)
def test_blocks_multiply_in_bfloat16_and_norms_softmax_and_loss_are_float32(name, remat, passes):
    found = step_operations(name, remat)
    assert not faults(found)

    # That the check looks at something: a stack's body is traced once, each way.
    def count(primitive: str, module: str, backward: bool) -> int:
        return sum(
            op.name == primitive and module in op.scope and ("transpose(" in op.scope) == backward
            for op in found
        )

    # The encoder's, for packed passes; the side-interpolator; the decoder, for passes as one batch.
    stacks = {"dit": 1, "mdt_v1": 3, "mdt_v2": 4}[name]
    assert count("dot_general", "/mlp/", False) == 2 * stacks
    again = 2 if remat == "full" else 0  # the forward's, recomputed
    assert count("dot_general", "/mlp/", True) == (4 + again) * stacks
    assert count("dot_general", "/attn/", True) >= 2 * count("dot_general", "/attn/", False) > 0
    assert count("exp", "/attn/", False) >= stacks
    assert count("rsqrt", "/modulated_norm/", False) == 2 * stacks + 1
    assert sum(bool(OUTSIDE_THE_MODEL.match(op.scope)) for op in found) > 100 * passes


def float32_mlp(original):
    def mlp(ratio, gelu, dtype, **more):
        module = original(ratio, gelu, jnp.float32, **more)

        def product(x):
            found = module(x)
            return found._replace(value=found.value.astype(dtype))

        return product

    return mlp


def bfloat16_softmax(original):
    return lambda x, axis: original(x.astype(jnp.bfloat16), axis).astype(jnp.float32)


def bfloat16_norm(original):
    def norm(x, shift, scale, lengths):
        with jax.named_scope("modulated_norm"):
            x = x.astype(jnp.bfloat16)
            return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True))

    return norm


def bfloat16_modulation(original):
    def norm(x, shift, scale, lengths):
        with jax.named_scope("modulated_norm"):
            x = layers.layer_norm(x).astype(jnp.bfloat16)
            shift, scale = (vector.astype(jnp.bfloat16) for vector in (shift, scale))
            return x * (1 + scale) + shift

    return norm


def differentiated_logits(original):
    """Without a rule of their own for the gradient, which comes in float32."""
    return original.__wrapped__


def bfloat16_loss(original):
    def terms(self, output, *args):
        return original(self, output.astype(jnp.bfloat16) * 1, *args)

    return terms


@pytest.mark.parametrize(
    ("owner", "attribute", "spoil", "told"),
    [
        (layers, "Mlp", float32_mlp, "dot_general of float32: .*/mlp/fc2"),
        (plain_attention, "attention_logits", differentiated_logits,
         "dot_general of bfloat16[+]float32: .*transpose.*/attn/"),
        (jax.nn, "softmax", bfloat16_softmax, "exp of bfloat16: .*/attn/"),
        (layers, "modulated_norm", bfloat16_norm, "rsqrt of bfloat16: .*/modulated_norm/"),
        (layers, "modulated_norm", bfloat16_modulation, "mul of bfloat16: .*/modulated_norm/"),
        (GaussianDiffusion, "training_terms", bfloat16_loss, "mul of bfloat16: .*loss"),
    ],
)  # fmt: skip
def test_one_wrong_precision_is_told(owner, attribute, spoil, told, monkeypatch):
    monkeypatch.setattr(owner, attribute, spoil(getattr(owner, attribute)))
    found = faults(step_operations("dit"))
    assert any(re.match(told, fault) for fault in found), found
