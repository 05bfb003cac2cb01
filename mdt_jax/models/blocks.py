"""The adaLN-Zero transformer block, and a stack of such blocks under one scanned parameter tree."""

from __future__ import annotations

from collections.abc import Callable

from flax import linen as nn
from jaxtyping import Array, Float, Float32

from mdt_jax.models import layers, placement
from mdt_jax.models.attention import Attention
from mdt_jax.models.computation import BlockSettings
from mdt_jax.models.linear import Product
from mdt_jax.models.passes import Packing

Vector = Float32[Array, "batch passes width"]


class Block(nn.Module):
    """x + gate · attention(modulated norm(x)), then x + gate · MLP(modulated norm(x)).

    adaLN-Zero (DiT §3.2): shifts, scales and gates are linear in SiLU(c), and zero at the start.
    With a skip, a linear map of concat(x, skip), 2D to D, comes first (MDTv2's long shortcuts).
    """

    settings: BlockSettings

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch n width"],
        c: Float[Array, "batch passes width"],
        packing: Packing,
        skip: Float[Array, "batch n width"] | None = None,
    ) -> Float[Array, "batch n width"]:
        """The block of one pass, or of several packed in one array."""
        s = self.settings
        attention = Attention(s, name="attn")
        mlp = layers.Mlp(s.mlp_ratio, s.computation.gelu, s.dtype, name="mlp")

        def residual(
            x: Array, f: Callable[[Array], Product], shift: Vector, scale: Vector, gate: Vector
        ) -> Array:
            """x + gate · f(modulated norm(x))."""
            h, x = s.computation.modulated_norm(x, shift, scale, packing)
            return s.computation.gated_residual(x, gate, f(h), packing)

        if skip is not None:
            x = layers.SkipLinear(s.dtype, name="skip")(x, skip)
        modulation = layers.Modulation(6, s.dtype, name="modulation")(c)
        x = residual(x, lambda h: attention(h, packing), *modulation[:3])
        x = residual(x, mlp, *modulation[3:])
        return placement.constrain_batch(x)


class BlockStack(nn.Module):
    """`depth` blocks in a row as one scan over stacked parameters, (depth, …) each.

    Not unrolled, it compiles as fast as one block, however deep it is. Unrolling and
    rematerialisation change no parameter's name.
    """

    settings: BlockSettings
    depth: int

    def __call__(
        self,
        x: Float[Array, "batch n width"],
        c: Float[Array, "batch passes width"],
        packing: Packing,
        *,
        skip: Float[Array, "batch n width"] | None = None,
        skips: Float[Array, "depth batch n width"] | None = None,
    ) -> Float[Array, "batch n width"]:
        """The last block's output; with a skip for all blocks, or one for each, or none."""
        x, _ = self.scan(x, c, packing, skip, skips, collected=lambda x: None)
        return x

    def with_outputs(
        self,
        x: Float[Array, "batch n width"],
        c: Float[Array, "batch passes width"],
        packing: Packing,
    ) -> tuple[Float[Array, "batch n width"], Float[Array, "depth batch n width"]]:
        """The last block's output, and every block's."""
        return self.scan(x, c, packing, None, None, collected=lambda x: x)

    @nn.compact
    def scan(
        self,
        x: Array,
        c: Array,
        packing: Packing,
        skip: Array | None,
        skips: Array | None,
        collected: Callable[[Array], Array | None],
    ) -> tuple[Array, Array | None]:
        """The last block's output, and of every block's what `collected` takes, stacked."""
        s = self.settings

        def layer(
            block: Block,
            x: Array,
            c: Array,
            packing: Packing,
            skip: Array | None,
            own: Array | None,
        ) -> tuple[Array, Array | None]:
            x = block(x, c, packing, skip if own is None else own)
            return x, collected(x)

        if s.remat != "none":
            # Under a scan the loop itself keeps XLA from merging the recomputation away.
            layer = nn.remat(layer, policy=s.remat_policy, prevent_cse=s.unroll > 1)
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, 0),
            length=self.depth,
            unroll=min(s.unroll, self.depth),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scanned(Block(s, name="layers"), x, c, packing, skip, skips)
