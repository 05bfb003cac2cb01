"""MDT, MDTv2 and DiT in PyTorch, with the authors' names, shapes and order of parameters.

Written to be fast in PyTorch: fused attention with the bias as its mask, the bias's index gathered
once a pass. Tests hold the networks to the authors' reference arrays.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift; x (B, N, D), the others (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def random_table(*shape: int) -> nn.Parameter:
    """A parameter of random values large enough to change every output."""
    return nn.Parameter(0.5 * torch.randn(shape))


class Holder(nn.Module):
    """A module that only gives names to its children."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class RelativeBias(nn.Module):
    """A learned bias for every offset between two tokens of a grid, and three unused rows."""

    def __init__(self, grid_size: int, num_heads: int):
        super().__init__()
        reach = 2 * grid_size - 1
        self.relative_position_bias_table = random_table(reach**2 + 3, num_heads)
        token = torch.arange(grid_size**2)
        rows, columns = (
            c[:, None] - c[None, :] + grid_size - 1 for c in (token // grid_size, token % grid_size)
        )
        self.register_buffer("relative_position_index", rows * reach + columns)

    def forward(self, index: Tensor | None) -> Tensor:
        """(1, heads, N, N), or (B, heads, kept, kept) for an index (B, kept, kept) of rows."""
        index = self.relative_position_index[None] if index is None else index
        return self.relative_position_bias_table[index].permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention; without relative-position bias if grid_size is None."""

    def __init__(self, width: int, num_heads: int, grid_size: int | None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_bias = RelativeBias(grid_size, num_heads) if grid_size else None

    def forward(self, x: Tensor, index: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        # In q's dtype, which under autocast is not the table's.
        bias = self.rel_pos_bias(index).to(q.dtype) if self.rel_pos_bias else None
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """The adaLN block; with `skip`, concat(x, skip) is mapped from 2D to D first."""

    def __init__(
        self, width: int, num_heads: int, hidden: int, grid_size: int | None, skip: bool = False
    ):
        super().__init__()
        self.attn = Attention(width, num_heads, grid_size)
        self.mlp = Holder(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        if skip:
            self.skip_linear = nn.Linear(2 * width, width)

    def forward(
        self, x: Tensor, c: Tensor, index: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1[:, None] * self.attn(modulate(norm(x), shift1, scale1), index)
        h = F.gelu(self.mlp.fc1(modulate(norm(x), shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * self.mlp.fc2(h)


class FinalLayer(nn.Module):
    """Modulated norm and the map to a patch's outputs, (p_row, p_col, channels)."""

    def __init__(self, width: int, features: int):
        super().__init__()
        self.linear = nn.Linear(width, features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return self.linear(modulate(norm(x), *self.adaLN_modulation(c).chunk(2, -1)))


class LatentTransformer(nn.Module):
    """The parts that the three networks share; the keywords are those of `Architecture.settings()`.

    A subclass makes its blocks in `make_blocks` and runs them in `run_blocks`.

    Attributes:
      masks: whether the network has masked passes.
      optimizer: the optimiser that the authors trained it with, "adamw" or "adan".
      min_snr: γ of the min-SNR weights that they trained it with, None for none.
    """

    masks = True
    optimizer = "adamw"
    min_snr: float | None = None

    def __init__(
        self,
        *,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        decoder_depth: int = 0,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        null_class: bool = True,
        learn_variance: bool = True,
    ):
        super().__init__()
        self.patch_size, self.num_classes = patch_size, num_classes
        self.depth, self.decoder_depth = depth, decoder_depth
        self.learn_variance = learn_variance
        self.grid_size = input_size // patch_size
        self.sizes = (hidden_size, num_heads, int(hidden_size * mlp_ratio))

        self.pos_embed = random_table(1, self.grid_size**2, hidden_size)
        if self.masks:
            self.decoder_pos_embed = random_table(1, self.grid_size**2, hidden_size)
            self.mask_token = random_table(1, 1, hidden_size)
        self.x_embedder = Holder(proj=nn.Conv2d(in_channels, hidden_size, patch_size, patch_size))
        linears = nn.Linear(256, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.t_embedder = Holder(mlp=nn.Sequential(linears[0], nn.SiLU(), linears[1]))
        rows = num_classes + (null_class or num_classes == 0)
        self.y_embedder = Holder(embedding_table=nn.Embedding(rows, hidden_size))
        self.make_blocks()
        channels = in_channels * (2 if learn_variance else 1)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * channels)

    def blocks_of(self, count: int, skip: bool = False) -> nn.ModuleList:
        """Makes blocks of this network's sizes."""
        grid_size = self.grid_size if self.masks else None
        return nn.ModuleList(Block(*self.sizes, grid_size, skip) for _ in range(count))

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, ids_keep: Tensor | None = None
    ) -> Tensor:
        """Output (B, C or 2C, H, W) for x (B, C, H, W), timesteps t (B,) and labels y (B,).

        ids_keep (B, kept) makes it a masked pass.
        """
        if self.num_classes == 0:
            y = torch.zeros_like(t)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, device=x.device) / 128)
        angles = t[:, None].float() * frequencies
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1))
        c = c + self.y_embedder.embedding_table(y)
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        patches = self.final_layer(self.run_blocks(tokens, c, ids_keep), c)
        grid, p = self.grid_size, self.patch_size
        image = patches.unflatten(1, (grid, grid)).unflatten(-1, (p, p, -1))
        return image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def kept_index(self, ids: Tensor | None) -> Tensor | None:
        """Rows (B, kept, kept) of the bias table for the kept ids (B, kept), for every block."""
        if ids is None:
            return None
        index = self.sideblocks[0].attn.rel_pos_bias.relative_position_index
        return index[ids[:, :, None], ids[:, None, :]]

    def interpolate(self, kept: Tensor, c: Tensor, ids: Tensor | None) -> Tensor:
        """The decoder's input, all N tokens with `decoder_pos_embed`, from the encoder's output."""
        if ids is None:
            return kept + self.decoder_pos_embed
        batch, count = len(kept), self.grid_size**2
        places = ids[..., None].expand(kept.shape)
        filler = self.mask_token.to(kept.dtype).expand(batch, count, -1)
        tokens = filler.scatter(1, places, kept) + self.decoder_pos_embed
        masked = torch.ones_like(tokens[..., 0], dtype=torch.bool).scatter(1, ids, False)
        return torch.where(masked[..., None], self.sideblocks[0](tokens, c), tokens)


def keep_tokens(tokens: Tensor, ids: Tensor | None) -> Tensor:
    """The tokens (B, kept, D) with the ids (B, kept); all tokens if there are no ids."""
    return (
        tokens if ids is None else tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))
    )


class MDT(LatentTransformer):
    """MDT v1."""

    def make_blocks(self) -> None:
        self.blocks = self.blocks_of(self.depth)
        self.sideblocks = self.blocks_of(1)

    def run_blocks(self, tokens: Tensor, c: Tensor, ids: Tensor | None) -> Tensor:
        x, index = keep_tokens(tokens, ids), self.kept_index(ids)
        first = self.depth - self.decoder_depth
        for block in self.blocks[:first]:
            x = block(x, c, index)
        x = self.interpolate(x, c, ids)
        for block in self.blocks[first:]:
            x = block(x, c)
        return x


class MDTv2(LatentTransformer):
    """MDT v2."""

    optimizer = "adan"
    min_snr = 5.0

    def make_blocks(self) -> None:
        half = (self.depth - self.decoder_depth) // 2
        self.en_inblocks = self.blocks_of(half)
        self.en_outblocks = self.blocks_of(half, skip=True)
        self.de_blocks = self.blocks_of(self.decoder_depth, skip=True)
        self.sideblocks = self.blocks_of(1)

    def run_blocks(self, tokens: Tensor, c: Tensor, ids: Tensor | None) -> Tensor:
        x, index, skips = keep_tokens(tokens, ids), self.kept_index(ids), []
        for block in self.en_inblocks:
            x = block(x, c, index)
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, c, index, skips.pop())
        x = self.interpolate(x, c, ids)
        for block in self.de_blocks:
            x = block(x, c, skip=tokens)
        return x


class DiT(LatentTransformer):
    """DiT; its position table is a parameter that is not trained."""

    masks = False

    def make_blocks(self) -> None:
        self.pos_embed.requires_grad_(False)
        self.blocks = self.blocks_of(self.depth)

    def run_blocks(self, tokens: Tensor, c: Tensor, ids: Tensor | None) -> Tensor:
        assert ids is None, "DiT has no masked pass"
        for block in self.blocks:
            tokens = block(tokens, c)
        return tokens


def build(architecture: Any, seed: int = 0) -> LatentTransformer:
    """The network of an `Architecture` with random weights, none of them zero."""
    kind = {"MDT": MDT, "MDTv2": MDTv2, "DiT": DiT}[architecture.family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**architecture.settings())
