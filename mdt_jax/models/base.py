"""The frame MDT, MDTv2 and DiT share: sizes, embeddings in, patches out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mdt_jax.basics import ranges
from mdt_jax.models import attention_kernel, layers, placement
from mdt_jax.models.blocks import Block, BlockStack
from mdt_jax.models.computation import (
    COMPUTATIONS,
    REMAT,
    BlockSettings,
    choose_kernels,
)
from mdt_jax.models.masking import NO_MASKED_PASS, KeptTokens
from mdt_jax.models.passes import Packing, Pass, join
from mdt_jax.models.positions import sincos_position_table


class Layers(NamedTuple):
    """Blocks of one kind that a pass goes through.

    Attributes:
      depth: how many.
      tokens: how many tokens each computes.
      skip: whether they first map concat(x, skip) from 2D to D.
    """

    depth: int
    tokens: int
    skip: bool = False


class LatentTransformer(nn.Module):
    """The base of MDT, MDTv2 and DiT: a diffusion transformer on square images (B, H, W, C), NHWC.

    It has embeddings, the packing of passes, side-interpolator and final layer. A subclass has
    `outputs`, an `nn.compact` method, and `layers_of`.

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
      kernels: the blocks' computation, a key of `computation.COMPUTATIONS`, or "auto": by the mesh
        that is in force, as `computation.choose_kernels` has it.
      remat: rematerialisation of the blocks, one of `computation.REMAT`.
      scan_unroll: layers per turn of the scanned stacks. `kernels`, `remat` and `scan_unroll`
        change no parameter's name.

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

    supports_masking = True  # whether there are masked passes, with `ids_keep`: in all but DiT
    relative_bias = True  # whether attention has a relative-position bias: in all families but DiT
    frozen: ClassVar[
        tuple[str, ...]
    ] = ()  # parameters (top-level names) that checkpoints hold and training leaves alone
    # The share of masked passes among the steps of inpainting (`sampling.inpainting`).
    inpainting_masked_share = 0.0

    def __post_init__(self):
        super().__post_init__()
        ranges.check_sizes({name: getattr(self, name) for name in self.__dataclass_fields__})
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
        if self.num_tokens > ranges.MAX_TOKENS:
            raise ValueError(
                f"input_size {self.input_size} in patches of patch_size {self.patch_size} is "
                f"{self.num_tokens:,} tokens; attention takes up to {ranges.MAX_TOKENS:,}"
            )
        if int(self.hidden_size * self.mlp_ratio) < 1:
            raise ValueError(
                f"mlp_ratio {self.mlp_ratio} of hidden_size {self.hidden_size} leaves no hidden "
                "unit; 4 is usual"
            )
        if self.kernels not in ("auto", *COMPUTATIONS):
            known = ", ".join(("auto", *COMPUTATIONS))
            raise ValueError(f"kernels {self.kernels!r} is unknown; known: {known}")
        self._check_kernels()
        if self.remat not in REMAT:
            raise ValueError(f"remat {self.remat!r} is unknown; known: {', '.join(REMAT)}")

    def _check_kernels(self) -> None:
        """Refuses kernels that cannot compute this model."""
        width, reason = self.hidden_size // self.num_heads, None
        if self.kernels in ("pallas", "cudnn") and width % 8:
            reason = f"takes heads of a multiple of 8, not {width}"
        elif self.kernels == "pallas" and not self.relative_bias:
            reason = "is for models with a relative-position bias"
        elif self.kernels == "pallas" and not attention_kernel.supports(self.grid_size, width):
            reason = f"takes {attention_kernel.TOKENS} tokens, not {self.num_tokens}"
        elif self.kernels == "cudnn" and jnp.dtype(self.dtype) != jnp.bfloat16:
            reason = f"computes in bfloat16, not {jnp.dtype(self.dtype).name}"
        if reason:
            raise ValueError(f"model.kernels {self.kernels!r} {reason}; 'auto' computes any")

    @property
    def chosen_kernels(self) -> str:
        """A key of `computation.COMPUTATIONS`."""
        if self.kernels != "auto":
            return self.kernels
        head_width = self.hidden_size // self.num_heads
        return choose_kernels(self.relative_bias, self.grid_size, head_width, self.dtype)

    @property
    def block_settings(self) -> BlockSettings:
        """The settings of this model's blocks on the mesh that is in force."""
        return BlockSettings(
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            grid_size=self.grid_size if self.relative_bias else None,
            computation=COMPUTATIONS[self.chosen_kernels],
            remat=self.remat,
            unroll=self.scan_unroll,
            dtype=self.dtype,
        )

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

    def kept_tokens(self, ratio: float, ratio_span: float, masked_pass: bool = True) -> KeptTokens:
        """How many tokens the masked passes of a training run keep (`masking.KeptTokens`).

        Args:
          ratio, ratio_span: the share of the tokens that is masked (`KeptTokens.of_ratio`).
          masked_pass: whether there is a masked pass.

        Raises:
          ValueError: ratios that leave [0, 1) or keep no token, in a model with masked passes.
        """
        if not (self.supports_masking and masked_pass):
            return NO_MASKED_PASS
        try:
            return KeptTokens.of_ratio(self.num_tokens, ratio, ratio_span)
        except ValueError as error:
            sizes = f"input_size {self.input_size}, patch_size {self.patch_size}"
            raise ValueError(f"{error} ({sizes})") from None

    def layers_of(self, num_kept: int | None) -> tuple[Layers, ...]:
        """The blocks that a pass goes through: a masked pass that keeps so many tokens, or a full
        one for None."""
        raise NotImplementedError

    @property
    def num_shortcuts(self) -> int:
        """Blocks whose output is kept for a later block."""
        return 0

    def __call__(
        self,
        x: Float[Array, "batch h w c"],
        t: Int[Array, " batch"] | Float[Array, " batch"],
        labels: Int[Array, " batch"] | None = None,
        ids_keep: Int[Array, "batch kept"] | None = None,
    ) -> Float[Array, "batch h w out"]:
        """The output of one pass, float32: C channels, or 2C (the variance's after the mean's).

        Args:
          x, t, labels, ids_keep: as in `Pass`.

        Raises:
          ValueError: as `run`.
        """
        (output,) = self.run([Pass(x, t, labels, ids_keep)])
        return output

    def run(self, passes: Sequence[Pass]) -> tuple[Float[Array, "batch h w out"], ...]:
        """The output of each of several passes of one batch size, computed side by side (`passes`).

        A layer's weights are then gathered once for all passes, and their gradients are summed on
        the device before they are sent. At most one pass may be masked, and
        `init` takes a single one.

        Raises:
          ValueError: inputs of another shape, labels that are missing, passes that the model does
            not have.
        """
        if sum(one.ids_keep is not None for one in passes) > 1:
            raise ValueError("more than one masked pass; one can run beside full ones")
        # The masked one last: Pallas kernels find the others at the same places in every array.
        order = sorted(range(len(passes)), key=lambda i: passes[i].ids_keep is not None)
        outputs = self.outputs(self.with_masks([passes[i] for i in order]))
        return tuple(outputs[:, order.index(i)] for i in range(len(passes)))

    def outputs(self, passes: Sequence[Pass]) -> Float[Array, "batch passes h w out"]:
        """The outputs of `run`, a masked pass being the last."""
        raise NotImplementedError

    def embed(
        self, passes: Sequence[Pass]
    ) -> tuple[Float[Array, "batch passes n width"], Float[Array, "batch passes width"]]:
        """Patch tokens without positions, and conditioning vectors c, of every pass."""
        for one in passes:
            if (shape := one.x.shape[1:]) != self.image_shape:
                raise ValueError(f"input of shape {shape}, the model takes {self.image_shape}")
        x = _as_one_batch([one.x for one in passes])
        t = _as_one_batch([one.t for one in passes])
        patches = layers.PatchEmbed(
            self.patch_size, self.hidden_size, self.dtype, name="patch_embed"
        )
        tokens = patches(x)
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
            labels = _as_one_batch([one.labels for one in passes])
        c = (c + placement.constrain_batch(table[labels])).astype(self.dtype)
        tokens, c = (x.reshape(-1, len(passes), *x.shape[1:]) for x in (tokens, c))
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

    def packing(self, ids_keep: Sequence[Int[Array, "batch kept"] | None]) -> Packing:
        """How passes with these tokens are packed, None for all tokens."""
        computation = self.block_settings.computation
        lengths = (self.num_tokens if ids is None else ids.shape[1] for ids in ids_keep)
        pairs: tuple = (None,) * len(ids_keep)
        if self.relative_bias:
            pairs = tuple(computation.bias_pairs(self.grid_size, ids) for ids in ids_keep)
        return Packing(tuple(lengths), tuple(ids_keep), pairs)

    @property
    def whole(self) -> Packing:
        """The packing of one pass with all tokens."""
        return self.packing([None])

    def pack(
        self, tokens: Float[Array, "batch passes n width"], passes: Sequence[Pass]
    ) -> tuple[Float[Array, "batch packed width"], Packing]:
        """The tokens that each pass keeps, packed."""
        parts = [gather_kept(tokens[:, i], one.ids_keep) for i, one in enumerate(passes)]
        return join(parts), self.packing([one.ids_keep for one in passes])

    def stack(self, depth: int, name: str) -> BlockStack:
        """A scanned stack of this model's blocks."""
        return BlockStack(self.block_settings, depth, name=name)

    def decode(
        self,
        blocks: BlockStack,
        tokens: Float[Array, "batch passes n width"],
        c: Float[Array, "batch passes width"],
        skip: Float[Array, "batch passes n width"] | None = None,
    ) -> Float[Array, "batch passes h w out"]:
        """All tokens through some blocks and the final layer, passes as one batch."""
        count = tokens.shape[1]
        tokens, c = _merge_passes(tokens), _merge_passes(c)[:, None]
        skip = None if skip is None else _merge_passes(skip)
        tokens = blocks(tokens, c, self.whole, skip=skip)
        return _split_passes(self.unembed(tokens, c), count)

    def interpolate_masked(
        self,
        kept: Float[Array, "batch kept width"],
        c: Float[Array, "batch 1 width"],
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
        side_block = Block(self.block_settings, name="side_block")
        return jnp.where(masked[..., None], side_block(tokens, c, self.whole), tokens)

    def decoder_input(
        self,
        packed: Float[Array, "batch packed width"],
        packing: Packing,
        c: Float[Array, "batch passes width"],
        decoder_positions: Float[Array, "n width"],
    ) -> Float[Array, "batch passes n width"]:
        """All N tokens of each pass from the encoder's output, decoder positions added.

        Those of a masked pass go through the side-interpolator.
        """

        def whole(i: int, tokens: Array) -> Array:
            if (ids := packing.ids_keep[i]) is None:
                return tokens + decoder_positions
            return self.interpolate_masked(tokens, c[:, i : i + 1], ids, decoder_positions)

        parts = [whole(i, tokens) for i, tokens in enumerate(packing.split(packed))]
        return jnp.stack(parts, axis=1)

    def with_masks(self, passes: Sequence[Pass]) -> Sequence[Pass]:
        """The passes; at `init` a full one becomes a masked one that keeps all tokens.

        So the side-interpolator's parameters are made, too.
        """
        if not (self.is_initializing() and self.supports_masking):
            return passes

        def masked(one: Pass) -> Pass:
            if one.ids_keep is not None:
                return one
            ids = jnp.broadcast_to(jnp.arange(self.num_tokens), (len(one.x), self.num_tokens))
            return one._replace(ids_keep=ids)

        return [masked(one) for one in passes]

    def unembed(
        self, x: Float[Array, "batch n width"], c: Float[Array, "batch 1 width"]
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


def _as_one_batch(arrays: Sequence[Array]) -> Array:
    """Arrays (batch, ...) of P passes, alike in shape, as one batch (batch · P, ...).

    A sample's passes lie next to each other, so that each stays on its device.
    """
    return placement.constrain_batch(_merge_passes(jnp.stack(arrays, axis=1)))


def _merge_passes(x: Array) -> Array:
    """(batch, passes, ...) to (batch · passes, ...)."""
    return x.reshape(-1, *x.shape[2:])


def _split_passes(x: Array, count: int) -> Array:
    """(batch · passes, ...) to (batch, passes, ...)."""
    return placement.constrain_batch(x.reshape(-1, count, *x.shape[1:]))


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
