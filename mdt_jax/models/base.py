"""The frame MDT, MDTv2 and DiT share: sizes, embeddings in, patches out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mdt_jax.models import attention_kernel, layers, placement
from mdt_jax.models.attention import KERNELS, choose_kernels, kept_position_index
from mdt_jax.models.blocks import Block, BlockStack
from mdt_jax.models.layers import each
from mdt_jax.models.linear import Streams
from mdt_jax.models.positions import relative_position_index, sincos_position_table


class Pass(NamedTuple):
    """What a model is given for one forward pass.

    Attributes:
      x: noisy latents or images (batch, H, W, C).
      t: timesteps of the 1000-step training process (batch,), integers or floats.
      labels: classes (batch,); num_classes is the null class.
      ids_keep: kept token ids (batch, kept) of a masked pass, None for the full pass.
    """

    x: Float[Array, "batch h w c"]
    t: Int[Array, " batch"] | Float[Array, " batch"]
    labels: Int[Array, " batch"] | None = None
    ids_keep: Int[Array, "batch kept"] | None = None


class LatentTransformer(nn.Module):
    """Hyper-parameters of a diffusion transformer on square latents or images (B, H, W, C), NHWC.

    Attributes:
      input_size: side H = W of the input; patch_size must divide it.
      patch_size: side p of a patch; there are N = (H/p)² tokens.
      in_channels: C.
      hidden_size: width D, a multiple of 4 and of num_heads.
      depth: number of blocks, the side-interpolator's not counted.
      num_heads: attention heads.
      mlp_ratio: hidden width of the MLPs over D.
      num_classes: classes; 0 makes the model unconditional.
      null_class: whether the label table has one more row, index num_classes, for label dropout and
        guidance. An unconditional model has that row alone, and always uses it.
      learn_variance: whether C more output channels give the learned-range variance.
      dtype: compute dtype; parameters are float32. float32 also asks for float32 products.
      kernels: what computes the blocks, one of `attention.KERNELS`, or "auto": by the mesh that is
        in force, as `attention.choose_kernels` has it.
      remat: rematerialisation of the blocks, a key of `layers.REMAT_POLICIES`.
      scan_unroll: layers per turn of the scanned stacks. None of these changes a parameter's name.

    Raises:
      ValueError: sizes that do not fit each other, naming both.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    null_class: bool = True
    learn_variance: bool = True
    dtype: DTypeLike = jnp.float32
    kernels: str = "auto"
    remat: str = "none"
    scan_unroll: int = 1

    relative_bias = True  # of every family but DiT
    frozen = ()  # parameters (top-level names) that checkpoints hold and training leaves alone

    def __post_init__(self):
        super().__post_init__()
        if self.input_size % self.patch_size:
            sizes = [p for p in range(1, self.input_size + 1) if self.input_size % p == 0]
            raise ValueError(
                f"patch_size {self.patch_size} does not divide input_size {self.input_size}; "
                f"these do: {', '.join(map(str, sizes))}"
            )
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}"
            )
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of 4")
        if self.kernels not in ("auto", *KERNELS):
            raise ValueError(
                f"kernels {self.kernels!r} is unknown; known: {', '.join(('auto', *KERNELS))}"
            )
        self._check_kernels()
        if self.remat not in layers.REMAT_POLICIES:
            known = ", ".join(layers.REMAT_POLICIES)
            raise ValueError(f"remat {self.remat!r} is unknown; known: {known}")
        if self.scan_unroll < 1:
            raise ValueError(f"scan_unroll {self.scan_unroll} is below 1")

    def _check_kernels(self) -> None:
        """Refuses kernels that cannot compute this model."""
        width, reason = self.hidden_size // self.num_heads, None
        if self.kernels in ("pallas", "cudnn") and width % 8:
            reason = f"takes heads of a multiple of 8, not {width}"
        elif self.kernels == "pallas" and not self.relative_bias:
            reason = "is for models with a relative-position bias"
        elif self.kernels == "pallas" and not attention_kernel.supports(self.grid_size, width):
            reason = f"takes {attention_kernel.TOKENS} tokens, not {self.num_tokens}"
        elif self.kernels == "cudnn" and self.dtype != jnp.bfloat16:
            reason = f"computes in bfloat16, not {jnp.dtype(self.dtype).name}"
        if reason:
            raise ValueError(f"model.kernels {self.kernels!r} {reason}; 'auto' computes any")

    @property
    def chosen_kernels(self) -> str:
        """One of `attention.KERNELS`."""
        if self.kernels != "auto":
            return self.kernels
        if not self.relative_bias:
            return "plain"
        platform = placement.current.get().platform
        return choose_kernels(platform, self.grid_size, self.hidden_size // self.num_heads)

    @property
    def grid_size(self) -> int:
        """Side of the token grid."""
        return self.input_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        """N, the number of patch tokens."""
        return self.grid_size**2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of the input."""
        return (self.input_size, self.input_size, self.in_channels)

    @property
    def supports_masking(self) -> bool:
        """Whether `__call__` takes `ids_keep`."""
        return self.relative_bias

    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        t: Int[Array, " batch"] | Float[Array, " batch"],
        labels: Int[Array, " batch"] | None = None,
        ids_keep: Int[Array, "batch kept"] | None = None,
    ) -> Float[Array, "batch h w out"]:
        """Model output for noisy inputs x at original timesteps t: one `Pass`, its arguments'."""
        (output,) = self.run([Pass(x, t, labels, ids_keep)])
        return output

    def run(self, passes: Sequence[Pass]) -> tuple[Float[Array, "batch h w out"], ...]:
        """The output of each of several passes of one batch size, computed side by side.

        A layer's kernels are then gathered once for all passes, and what they add to their
        gradients is summed on the device before it is sent. Where passes have the same tokens they
        go as one batch. At most one of them may be masked, and `init` takes a single one.
        """
        raise NotImplementedError

    def embed(
        self, passes: Sequence[Pass]
    ) -> tuple[Float[Array, "batch n width"], Float[Array, "batch width"]]:
        """Patch tokens without positions, and conditioning vectors c; all passes as one batch."""
        for one in passes:
            if (shape := one.x.shape[1:]) != self.image_shape:
                raise ValueError(f"input of shape {shape}, the model takes {self.image_shape}")
        x = layers.join(tuple(one.x for one in passes))
        t = layers.join(tuple(one.t for one in passes))
        tokens = layers.PatchEmbed(
            self.patch_size, self.hidden_size, self.dtype, name="patch_embed"
        )(x)
        c = layers.TimestepEmbed(self.hidden_size, name="timestep_embed")(t)
        table = self.param(
            "label_embed",
            layers.partitioned(layers.normal, None, "embed"),
            (self.num_classes + (self.null_class or self.num_classes == 0), self.hidden_size),
            jnp.float32,
        )
        if self.num_classes == 0:
            labels = jnp.zeros(x.shape[:1], jnp.int32)
        elif any(one.labels is None for one in passes):
            raise ValueError(f"a model of {self.num_classes} classes needs labels")
        else:
            labels = layers.join(tuple(one.labels for one in passes))
        c = (c + placement.constrain_batch(table[labels])).astype(self.dtype)
        return placement.constrain_batch(tokens), placement.constrain_batch(c)

    def position_table(self, name: str) -> Float[Array, "n width"]:
        """A trained position table that starts as MAE's 2-D sin-cos."""
        table = sincos_position_table(self.hidden_size, self.grid_size)
        return self.param(
            name,
            layers.partitioned(lambda key, shape, dtype: jnp.asarray(table, dtype), None, "embed"),
            table.shape,
            jnp.float32,
        ).astype(self.dtype)

    def positions(self, ids_keep: Int[Array, "batch kept"] | None = None) -> Array | None:
        """Where the tokens of a pass are, as the blocks' attention wants it; all by default.

        The same in every layer, so a pass computes it once.
        """
        if not self.relative_bias or self.chosen_kernels == "pallas":
            return ids_keep
        index = jnp.asarray(relative_position_index(self.grid_size))
        return index if ids_keep is None else kept_position_index(index, ids_keep)

    def stack(
        self, depth: int, name: str, skips: str = "none", collect: bool = False
    ) -> BlockStack:
        """A scanned stack of this model's blocks."""
        return BlockStack(
            depth=depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            grid_size=self.grid_size if self.relative_bias else None,
            skips=skips,
            collect=collect,
            kernels=self.chosen_kernels,
            remat=self.remat,
            unroll=self.scan_unroll,
            dtype=self.dtype,
            name=name,
        )

    def interpolate_masked(
        self,
        kept: Float[Array, "batch kept width"],
        c: Float[Array, "batch width"],
        ids_keep: Int[Array, "batch kept"],
        decoder_positions: Float[Array, "n width"],
    ) -> Float[Array, "batch n width"]:
        """MDT's side-interpolator (MDT §3.3): all N tokens from the kept ones.

        Kept tokens return to their places, a learned mask token fills the rest, positions are
        added, one block runs over all tokens, and its output replaces the masked positions only.
        """
        mask_token = self.param(
            "mask_token", layers.partitioned(layers.normal, None), (self.hidden_size,), jnp.float32
        )
        tokens, masked = scatter_kept(
            kept, mask_token.astype(self.dtype), ids_keep, self.num_tokens
        )
        tokens = placement.constrain_batch(tokens + decoder_positions)
        side = Block(
            self.num_heads,
            self.mlp_ratio,
            self.grid_size,
            skip=False,
            collect=False,
            kernels=self.chosen_kernels,
            dtype=self.dtype,
            name="side_block",
        )
        (interpolated,), _ = side((tokens,), None, (c,), (self.positions(),))
        return jnp.where(masked[..., None], interpolated, tokens)

    def decoder_input(
        self,
        tokens: Streams,
        cs: Streams,
        passes: Sequence[Pass],
        decoder_positions: Float[Array, "n width"],
    ) -> Float[Array, "batch n width"]:
        """All N tokens of what the encoder gave, decoder positions added; passes as one batch.

        Those of a masked pass go through the side-interpolator.
        """

        if sum(one.ids_keep is not None for one in passes) > 1:
            raise ValueError("more than one masked pass; one can run beside full ones")

        def whole(tokens: Array, c: Array, one: Pass) -> Array:
            if one.ids_keep is None:
                return tokens + decoder_positions
            return self.interpolate_masked(tokens, c, one.ids_keep, decoder_positions)

        return layers.join(each(whole, tokens, cs, tuple(passes)))

    def with_masks(self, passes: Sequence[Pass]) -> Sequence[Pass]:
        """The passes; `init` runs masked ones, of all tokens, for the side-interpolator's sake."""
        if not self.is_initializing():
            return passes

        def masked(one: Pass) -> Pass:
            if one.ids_keep is not None:
                return one
            ids = jnp.broadcast_to(jnp.arange(self.num_tokens), (len(one.x), self.num_tokens))
            return one._replace(ids_keep=ids)

        return [masked(one) for one in passes]

    def unembed(
        self, x: Float[Array, "batch n width"], c: Float[Array, "batch width"]
    ) -> Float[Array, "batch h w out"]:
        """The final layer, and its patches laid out as (B, H, W, C or 2C) float32.

        The linear layer's features are (p_row, p_col, channels), the mean's before the variance's.
        """
        p = self.patch_size
        channels = self.in_channels * (2 if self.learn_variance else 1)
        x = layers.FinalLayer(p * p * channels, self.dtype, name="final_layer")(x, c)
        return rearrange(
            x, "b (h w) (p q c) -> b (h p) (w q) c", h=self.grid_size, p=p, q=p, c=channels
        )


def scatter_kept(
    kept: Float[Array, "batch kept width"],
    filler: Float[Array, " width"],
    ids_keep: Int[Array, "batch kept"],
    num_tokens: int,
) -> tuple[Float[Array, "batch n width"], Array]:
    """Puts kept tokens at their positions among `num_tokens`, `filler` elsewhere.

    Returns the tokens and the mask (batch, n), True where a token was filled in.
    """

    def scatter(tokens: Array, ids: Array) -> tuple[Array, Array]:
        full = jnp.broadcast_to(filler, (num_tokens, tokens.shape[-1])).at[ids].set(tokens)
        return full, jnp.ones(num_tokens, bool).at[ids].set(False)

    return jax.vmap(scatter)(kept, ids_keep)


def gather_kept(
    tokens: Float[Array, "batch n width"], ids_keep: Int[Array, "batch kept"] | None
) -> Float[Array, "batch kept width"]:
    """The kept tokens, in the order of `ids_keep`; all of them for None."""
    if ids_keep is None:
        return tokens
    return jnp.take_along_axis(tokens, ids_keep[..., None], axis=1)
