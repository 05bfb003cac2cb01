"""MDT, MDTv2 and DiT in PyTorch, with their losses, Adan, EMA and the authors' file layouts.

Our own, as a second opinion: test_torch_models.py holds it to the authors' reference arrays, and
the tests of conversions then hold our weight files and runs to it.
Names, shapes and order of parameters and buffers are the authors', so that their state dicts load
with strict=True and optimiser states index the same parameters.
"""

from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

torch.set_num_threads(1)

# ---- Networks ----------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    """LayerNorm without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift; x (B, N, D), the others (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def table(*shape: int) -> nn.Parameter:
    """A parameter large enough to be felt in every output."""
    return nn.Parameter(0.5 * torch.randn(shape))


class Holder(nn.Module):
    """A module that only names its children."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class RelativeBias(nn.Module):
    """A learned bias for every offset between two tokens of a grid, and three unused rows."""

    def __init__(self, grid_size: int, num_heads: int):
        super().__init__()
        reach = 2 * grid_size - 1
        self.relative_position_bias_table = table(reach**2 + 3, num_heads)
        token = torch.arange(grid_size**2)
        rows, columns = (
            c[:, None] - c[None, :] + grid_size - 1 for c in (token // grid_size, token % grid_size)
        )
        self.register_buffer("relative_position_index", rows * reach + columns)

    def forward(self, ids: Tensor | None) -> Tensor:
        """(1, heads, N, N), or (B, heads, kept, kept) among the kept ids (B, kept)."""
        index = self.relative_position_index[None]
        if ids is not None:
            index = index[0][ids[:, :, None], ids[:, None, :]]
        return self.relative_position_bias_table[index].permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention; grid_size None leaves the relative-position bias out."""

    def __init__(self, width: int, num_heads: int, grid_size: int | None):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_bias = RelativeBias(grid_size, num_heads) if grid_size else None

    def forward(self, x: Tensor, ids: Tensor | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.rel_pos_bias(ids) if self.rel_pos_bias else None
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
        self, x: Tensor, c: Tensor, ids: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate1[:, None] * self.attn(modulate(norm(x), shift1, scale1), ids)
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
    """What the three networks share; keywords are `Architecture.settings()`.

    A subclass makes its blocks in `make_blocks` and runs them in `run_blocks`.
    """

    masks = True

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

        self.pos_embed = table(1, self.grid_size**2, hidden_size)
        if self.masks:
            self.decoder_pos_embed = table(1, self.grid_size**2, hidden_size)
            self.mask_token = table(1, 1, hidden_size)
        self.x_embedder = Holder(proj=nn.Conv2d(in_channels, hidden_size, patch_size, patch_size))
        linears = nn.Linear(256, hidden_size), nn.Linear(hidden_size, hidden_size)
        self.t_embedder = Holder(mlp=nn.Sequential(linears[0], nn.SiLU(), linears[1]))
        rows = num_classes + (null_class or num_classes == 0)
        self.y_embedder = Holder(embedding_table=nn.Embedding(rows, hidden_size))
        self.make_blocks()
        channels = in_channels * (2 if learn_variance else 1)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * channels)

    def blocks_of(self, count: int, skip: bool = False) -> nn.ModuleList:
        """`count` blocks of this network's sizes."""
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
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128) / 128)
        angles = t[:, None].float() * frequencies
        c = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1))
        c = c + self.y_embedder.embedding_table(y)
        tokens = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        patches = self.final_layer(self.run_blocks(tokens, c, ids_keep), c)
        grid, p = self.grid_size, self.patch_size
        image = patches.unflatten(1, (grid, grid)).unflatten(-1, (p, p, -1))
        return image.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def interpolate(self, kept: Tensor, c: Tensor, ids: Tensor | None) -> Tensor:
        """The decoder's input, all N tokens with `decoder_pos_embed`, from the encoder's output."""
        if ids is None:
            return kept + self.decoder_pos_embed
        batch, count = len(kept), self.grid_size**2
        places = ids[..., None].expand(kept.shape)
        filled = self.mask_token.expand(batch, count, -1).scatter(1, places, kept)
        tokens = filled + self.decoder_pos_embed
        masked = torch.ones(batch, count, dtype=torch.bool).scatter(1, ids, False)
        return torch.where(masked[..., None], self.sideblocks[0](tokens, c), tokens)


def gather(tokens: Tensor, ids: Tensor | None) -> Tensor:
    """The kept tokens, all of them without ids."""
    return tokens if ids is None else tokens[torch.arange(len(ids))[:, None], ids]


class MDT(LatentTransformer):
    """MDT v1."""

    def make_blocks(self) -> None:
        self.blocks = self.blocks_of(self.depth)
        self.sideblocks = self.blocks_of(1)

    def run_blocks(self, tokens: Tensor, c: Tensor, ids: Tensor | None) -> Tensor:
        x, first = gather(tokens, ids), self.depth - self.decoder_depth
        for block in self.blocks[:first]:
            x = block(x, c, ids)
        x = self.interpolate(x, c, ids)
        for block in self.blocks[first:]:
            x = block(x, c)
        return x


class MDTv2(LatentTransformer):
    """MDT v2."""

    def make_blocks(self) -> None:
        half = (self.depth - self.decoder_depth) // 2
        self.en_inblocks = self.blocks_of(half)
        self.en_outblocks = self.blocks_of(half, skip=True)
        self.de_blocks = self.blocks_of(self.decoder_depth, skip=True)
        self.sideblocks = self.blocks_of(1)

    def run_blocks(self, tokens: Tensor, c: Tensor, ids: Tensor | None) -> Tensor:
        x, skips = gather(tokens, ids), []
        for block in self.en_inblocks:
            x = block(x, c, ids)
            skips.append(x)
        for block in self.en_outblocks:
            x = block(x, c, ids, skips.pop())
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
    """The network of an `Architecture`, at random weights none of which is zero."""
    kind = {"MDT": MDT, "MDTv2": MDTv2, "DiT": DiT}[architecture.family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**architecture.settings())


# ---- Losses ------------------------------------------------------------------------------------

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BARS = torch.cumprod(1 - BETAS, 0)
_PREVIOUS = torch.cat([torch.ones(1, dtype=torch.float64), ALPHA_BARS[:-1]])
_POSTERIOR_VARIANCE = BETAS * (1 - _PREVIOUS) / (1 - ALPHA_BARS)
_LOW = torch.cat([_POSTERIOR_VARIANCE[1:2], _POSTERIOR_VARIANCE[1:]]).log()
_OF_X0 = BETAS * _PREVIOUS.sqrt() / (1 - ALPHA_BARS)
_OF_XT = (1 - _PREVIOUS) * (1 - BETAS).sqrt() / (1 - ALPHA_BARS)


def kept_ids(noise: Tensor, ratio: float) -> Tensor:
    """The ids a masked pass keeps: the first int(N·(1 − ratio)) of the argsort of noise (B, N)."""
    return noise.argsort(1)[:, : int(noise.shape[1] * (1 - ratio))]


def losses(
    model: nn.Module,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    y: Tensor | None,
    ids_keep: Tensor | None = None,
    min_snr: float | None = None,
) -> dict[str, Tensor]:
    """Per-sample terms (B,) in float64 of one pass: "mse", "vb" (learned variance) and "loss"."""

    def at(tabulated: Tensor) -> Tensor:
        return tabulated[t][:, None, None, None]

    x0, noise = x0.double(), noise.double()
    xt = at(ALPHA_BARS).sqrt() * x0 + at(1 - ALPHA_BARS).sqrt() * noise
    output = model(xt.float(), t, y, ids_keep).double()
    epsilon = output[:, : x0.shape[1]]
    mse = (noise - epsilon).square().mean((1, 2, 3))
    if min_snr is not None:
        mse = mse * (min_snr * (1 - ALPHA_BARS) / ALPHA_BARS).clamp(max=1)[t]
    if not model.learn_variance:
        return {"mse": mse, "loss": mse}

    fraction = (output[:, x0.shape[1] :] + 1) / 2
    log_variance = fraction * at(BETAS.log()) + (1 - fraction) * at(_LOW)
    # The bound trains the variance alone.
    guess = (xt - at(1 - ALPHA_BARS).sqrt() * epsilon.detach()) / at(ALPHA_BARS).sqrt()
    mean, true_mean = (at(_OF_X0) * x + at(_OF_XT) * xt for x in (guess, x0))
    ratio = at(_LOW) - log_variance
    kl = (ratio.exp() - 1 - ratio + (true_mean - mean).square() * (-log_variance).exp()) / 2
    nll = decoder_nll(x0, mean, log_variance)
    bound = torch.where((t == 0)[:, None, None, None], nll, kl)
    vb = bound.mean((1, 2, 3)) / math.log(2)
    return {"mse": mse, "vb": vb, "loss": mse + vb}


def decoder_nll(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """−log p(x), in nats, under a normal cut into 255 bins on [−1, 1] with open outer ones."""

    def cdf(z: Tensor) -> Tensor:
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2

    scale = (-log_variance / 2).exp()
    above, below = (cdf(scale * (x - mean + side / 255)) for side in (1, -1))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log()


def training_loss(
    model: nn.Module,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    y: Tensor | None,
    ids_keep: Tensor | None = None,
    min_snr: float | None = None,
) -> Tensor:
    """mean(full) + mean(masked), the same noise in both passes; without ids_keep mean(full)."""
    total = losses(model, x0, t, noise, y, min_snr=min_snr)["loss"].mean()
    if ids_keep is not None:
        total = total + losses(model, x0, t, noise, y, ids_keep, min_snr)["loss"].mean()
    return total


# ---- Training ----------------------------------------------------------------------------------


class Adan(torch.optim.Optimizer):
    """The authors' Adan, its state laid out as theirs.

    A parameter's state is exp_avg (m), exp_avg_diff (v), exp_avg_sq (n) and neg_pre_grad, minus the
    last gradient as clipped; the step count is the group's. Gradients are clipped to the norm
    max_grad_norm over all groups, 0 for no clipping.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
    ):
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # The last three are in the authors' files; here they change nothing.
        theirs = {"no_prox": False, "foreach": True, "fused": True}
        super().__init__(params, {**settings, "max_grad_norm": max_grad_norm, **theirs})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        trained = [(p, g) for g in self.param_groups for p in g["params"] if p.grad is not None]
        length = torch.stack([p.grad.norm() for p, _ in trained]).norm()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
        for p, group in trained:
            clip = 1.0
            if group["max_grad_norm"]:
                clip = (group["max_grad_norm"] / (length + group["eps"])).clamp(max=1.0)
            self._update(p, clip * p.grad, group)

    def _update(self, p: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        b1, b2, b3 = group["betas"]
        c1, c2, c3 = (1 - b ** group["step"] for b in group["betas"])
        state = self.state[p]
        if not state:
            for key in ("exp_avg", "exp_avg_sq", "exp_avg_diff"):
                state[key] = torch.zeros_like(p)
            state["neg_pre_grad"] = -g
        difference = g + state["neg_pre_grad"]
        state["exp_avg"].lerp_(g, 1 - b1)
        state["exp_avg_diff"].lerp_(difference, 1 - b2)
        state["exp_avg_sq"].lerp_((g + b2 * difference).square(), 1 - b3)
        state["neg_pre_grad"] = -g
        look_ahead = state["exp_avg"] / c1 + b2 * state["exp_avg_diff"] / c2
        p -= group["lr"] * look_ahead / (state["exp_avg_sq"].sqrt() / math.sqrt(c3) + group["eps"])
        p /= 1 + group["lr"] * group["weight_decay"]


def create_optimizer(model: LatentTransformer) -> torch.optim.Optimizer:
    """The optimiser the authors trained this kind of network with, over all its parameters."""
    if isinstance(model, MDTv2):
        return Adan(model.parameters(), lr=3e-4)
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)


def update(
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Tensor,
    rate: float = 0.9999,
) -> float:
    """One optimiser step down `loss`, then the EMA's; returns the loss."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update_ema(ema, model, rate)
    return loss.item()


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, rate: float = 0.9999) -> None:
    """ema ← rate·ema + (1 − rate)·model, over parameters."""
    for average, p in zip(ema.parameters(), model.parameters(), strict=True):
        average.mul_(rate).add_(p, alpha=1 - rate)


def ema_of(model: nn.Module) -> nn.Module:
    """An EMA that starts here: a copy that asks for no gradients."""
    return copy.deepcopy(model).requires_grad_(False)


# ---- Files -------------------------------------------------------------------------------------


def _named(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with nn.Parameter values, as MDT's files hold them (DiT's are plain)."""
    state = model.state_dict()
    state.update(model.named_parameters())
    return state


def save_run(
    folder: str | Path,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    rate: float | str = 0.9999,
) -> None:
    """MDT's three files of a run: modelNNNNNN.pt, ema_RATE_NNNNNN.pt and optNNNNNN.pt.

    MDT saves before it counts the step: files of step N have seen N + 1 updates, but for those
    written at the end of a run, which have seen N.
    """
    folder = Path(folder)
    torch.save(_named(model), folder / f"model{step:06d}.pt")
    torch.save(_named(ema), folder / f"ema_{rate}_{step:06d}.pt")
    torch.save(optimizer.state_dict(), folder / f"opt{step:06d}.pt")


def save_dit_run(
    path: str | Path,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    args: argparse.Namespace,
) -> None:
    """DiT's one file of a run: both state dicts, the optimiser's and the command's arguments.

    torch.load(weights_only=True) refuses the file for the Namespace of its arguments. DiT names it
    by the number of updates, NNNNNNN.pt.
    """
    contents = {"model": model.state_dict(), "ema": ema.state_dict()}
    contents |= {"opt": optimizer.state_dict(), "args": args}
    torch.save(contents, path)
