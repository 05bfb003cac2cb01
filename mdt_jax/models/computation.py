"""How a block's parts are computed: in plain JAX, by cuDNN, or by Pallas kernels.

A block has three parts that can be computed in more than one way: the modulated norm, attention,
and the gated residual. `BlockComputation` is their interface; a model chooses one for its blocks.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Int

from mdt_jax.models import (
    attention_kernel,
    layers,
    norm_gradients,
    norm_kernels,
    passes,
    placement,
    plain_attention,
)
from mdt_jax.models.linear import OUTPUT, Linear, Product
from mdt_jax.models.passes import Packing
from mdt_jax.models.positions import relative_position_index

PROJECTION = "projection"  # the name of attention's output in rematerialisation policies
REMAT = ("none", "full", "dots")


class BlockComputation(abc.ABC):
    """The parts of a block that are computed in more than one way.

    Attributes:
      remat_names: results that rematerialisation "dots" keeps.
    """

    remat_names: tuple[str, ...]

    @abc.abstractmethod
    def bias_pairs(
        self, grid_size: int, ids_keep: Int[Array, "batch kept"] | None
    ) -> Int[Array, "*batch kept kept"] | None:
        """`Packing.pairs` of a pass, as this attention wants them."""

    @abc.abstractmethod
    def modulated_norm(
        self,
        x: Float[Array, "batch n width"],
        shift: Float32[Array, "batch passes width"],
        scale: Float32[Array, "batch passes width"],
        packing: Packing,
    ) -> tuple[Float[Array, "batch n width"], Float[Array, "batch n width"]]:
        """(LayerNorm(x)·(1 + scale) + shift in x's dtype, x).

        The caller goes on with the x that is returned, not with its own, so that a kernel can add
        the gradients of x's two uses.
        """

    @abc.abstractmethod
    def attention(
        self,
        h: Float[Array, "batch n width"],
        qkv: Linear,
        table: Float[Array, "rows heads"] | None,
        packing: Packing,
    ) -> Float[Array, "batch n heads width"]:
        """Each pass's softmax(q·kᵀ/√width + bias) v among its own tokens.

        Args:
          h: the blocks' input of attention.
          qkv: the linear map to (3, heads, head width).
          table: the relative-position bias table, None for no bias.
          packing: where the tokens lie.
        """

    @abc.abstractmethod
    def gated_residual(
        self,
        x: Float[Array, "batch n width"],
        gate: Float32[Array, "batch passes width"],
        branch: Product,
        packing: Packing,
    ) -> Float[Array, "batch n width"]:
        """x + gate · (the branch's product and its bias), each pass with its own gate.

        The bias gets its gradient here: by `branch.added()`, or in a kernel.
        """

    def gelu(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The tanh form of GELU."""
        return layers.gelu(x)


@dataclasses.dataclass(frozen=True)
class PlainComputation(BlockComputation):
    """Norm and gated residual in plain JAX, which the compiler fuses; attention by a function.

    Attributes:
      attend: attention of one pass, from (qkv, bias).
    """

    attend: Callable[[Array, Array | None], Array]
    remat_names = (OUTPUT, PROJECTION)

    def bias_pairs(self, grid_size: int, ids_keep: Array | None) -> Array:
        """The pairs' rows, gathered at the kept ids on both axes."""
        index = jnp.asarray(relative_position_index(grid_size))
        return index if ids_keep is None else kept_position_index(index, ids_keep)

    def modulated_norm(
        self, x: Array, shift: Array, scale: Array, packing: Packing
    ) -> tuple[Array, Array]:
        """As `BlockComputation` has it."""
        h = layers.modulated_norm(x, shift, scale, packing.lengths)
        return h.astype(x.dtype), x

    def attention(
        self, h: Array, qkv: Linear, table: Array | None, packing: Packing
    ) -> Float[Array, "batch n heads width"]:
        """As `BlockComputation` has it."""

        def attend(part: Array, pairs: Array | None) -> Array:
            bias = None if table is None else jnp.moveaxis(table[pairs], -1, -3)
            return self.attend(part, bias)

        return passes.join(list(map(attend, packing.split(qkv(h)), packing.pairs)))

    def gated_residual(self, x: Array, gate: Array, branch: Product, packing: Packing) -> Array:
        """As `BlockComputation` has it."""
        h = branch.added()
        return x + passes.over_tokens(gate.astype(h.dtype), packing.lengths) * h


@dataclasses.dataclass(frozen=True)
class CudnnComputation(PlainComputation):
    """For GPUs: cuDNN's attention, and plain forms whose gradients are written out."""

    attend: Callable[[Array, Array | None], Array] = plain_attention.cudnn_attention

    def modulated_norm(
        self, x: Array, shift: Array, scale: Array, packing: Packing
    ) -> tuple[Array, Array]:
        """As `BlockComputation` has it."""
        return norm_gradients.modulated_norm(x, shift, scale, packing.lengths, layers.EPSILON)

    def gated_residual(self, x: Array, gate: Array, branch: Product, packing: Packing) -> Array:
        """As `BlockComputation` has it."""
        h = branch.added_without_gradient()
        return norm_gradients.gated_residual(x, h, branch.bias, gate, packing.lengths)

    def gelu(self, x: Array) -> Array:
        """As `BlockComputation` has it."""
        return norm_gradients.gelu(x)


@dataclasses.dataclass(frozen=True)
class PallasComputation(BlockComputation):
    """Pallas kernels for a TPU: they read each activation once, and sum the biases' gradients."""

    # Attention and its output are computed again for less than keeping them costs.
    remat_names = (OUTPUT,)

    def bias_pairs(self, grid_size: int, ids_keep: Array | None) -> None:
        """None: the kernel takes the kept ids."""

    def modulated_norm(
        self, x: Array, shift: Array, scale: Array, packing: Packing
    ) -> tuple[Array, Array]:
        """As `BlockComputation` has it."""
        return norm_kernels.modulated_norm(x, shift, scale, packing.lengths, layers.EPSILON)

    def attention(
        self, h: Array, qkv: Linear, table: Array | None, packing: Packing
    ) -> Float[Array, "batch n heads width"]:
        """As `BlockComputation` has it."""
        projected = qkv.product_tokens_last(h)
        value, heads = projected.added_without_gradient(), qkv.features
        out = attention_kernel.attention(
            value.reshape(value.shape[0], *heads, value.shape[-1]),
            projected.bias.reshape(heads),
            attention_kernel.bias_strips(table, attention_kernel.GRID_SIZE),
            packing.ids_keep,
            packing.lengths,
        )
        return jnp.transpose(out, (0, 3, 1, 2))

    def gated_residual(self, x: Array, gate: Array, branch: Product, packing: Packing) -> Array:
        """As `BlockComputation` has it."""
        h = branch.added_without_gradient()
        return norm_kernels.gated_residual(x, h, branch.bias, gate, packing.lengths)


COMPUTATIONS: dict[str, BlockComputation] = {
    "plain": PlainComputation(plain_attention.attention),
    "pallas": PallasComputation(),
    "cudnn": CudnnComputation(),
}


def choose_kernels(relative_bias: bool, grid_size: int, head_width: int, dtype: DTypeLike) -> str:
    """The key of COMPUTATIONS that computes a model best on the mesh that is in force.

    On a TPU these are the Pallas kernels, for models with a bias of sizes that they take. On GPUs
    since Ampere it is cuDNN's attention, in bfloat16 and for heads that it takes; no card has timed
    it, the bytes of the compiled programs decide (docs/performance.md). Elsewhere, and outside of
    `sharding.activations` everywhere, it is "plain": a Pallas call has to be divided over a known
    mesh. The choice is made when the model is traced.
    """
    place = placement.current.get()
    if place.platform == "tpu":
        fits = relative_bias and attention_kernel.supports(grid_size, head_width)
        return "pallas" if fits else "plain"
    if place.platform == "gpu" and place.cudnn_attention and jnp.dtype(dtype) == jnp.bfloat16:
        return "cudnn" if plain_attention.cudnn_takes(head_width) else "plain"
    return "plain"


def kept_position_index(
    index: Int[Array, "n n"], ids_keep: Int[Array, "batch kept"]
) -> Int[Array, "batch kept kept"]:
    """The bias-table rows among each sample's kept tokens, gathered on both axes."""
    return index[ids_keep[:, :, None], ids_keep[:, None, :]]


@dataclasses.dataclass(frozen=True)
class BlockSettings:
    """The settings that all blocks of a model share.

    Attributes:
      num_heads: attention heads; they divide the width.
      mlp_ratio: hidden width of the MLP over the width.
      grid_size: side of the token grid for the relative-position bias, None for no bias (DiT).
      computation: how blocks are computed.
      remat: the part that is computed again for the gradient: "none", "full" (all of a block), or
        "dots" (all but the results in the computation's `remat_names`). The side-interpolator's
        block is never computed again.
      unroll: layers in one turn of a loop over layers.
      dtype: compute dtype.
    """

    num_heads: int
    mlp_ratio: float
    grid_size: int | None
    computation: BlockComputation
    remat: str
    unroll: int
    dtype: DTypeLike

    @property
    def remat_policy(self) -> Callable:
        """The policy of `jax.checkpoint`, where `remat` is not "none"."""
        if self.remat == "full":
            return jax.checkpoint_policies.nothing_saveable
        return jax.checkpoint_policies.save_only_these_names(*self.computation.remat_names)
