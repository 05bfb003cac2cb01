"""MDT, MDTv2 and DiT in PyTorch, with losses, Adan and EMA: what `benchmark.py` times beside ours.

Written to be fast in PyTorch: fused attention with the bias as its mask, the bias's index gathered
once a pass, optimiser and EMA over lists of tensors, autocast to bfloat16 on a GPU, and all of it
under `torch.compile` if asked to. Names, shapes and order of parameters and buffers are the
authors', whose reference arrays the tests hold it to.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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

    def forward(self, index: Tensor | None) -> Tensor:
        """(1, heads, N, N), or (B, heads, kept, kept) for an index (B, kept, kept) of rows."""
        index = self.relative_position_index[None] if index is None else index
        return self.relative_position_bias_table[index].permute(0, 3, 1, 2)


class Attention(nn.Module):
    """Self-attention; grid_size None leaves the relative-position bias out."""

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
        """Bias-table rows (B, kept, kept) among the kept ids (B, kept), the same in every block."""
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


def gather(tokens: Tensor, ids: Tensor | None) -> Tensor:
    """The kept tokens, all of them without ids."""
    return (
        tokens if ids is None else tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[2]))
    )


class MDT(LatentTransformer):
    """MDT v1."""

    def make_blocks(self) -> None:
        self.blocks = self.blocks_of(self.depth)
        self.sideblocks = self.blocks_of(1)

    def run_blocks(self, tokens: Tensor, c: Tensor, ids: Tensor | None) -> Tensor:
        x, index, first = gather(tokens, ids), self.kept_index(ids), self.depth - self.decoder_depth
        for block in self.blocks[:first]:
            x = block(x, c, index)
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
        x, index, skips = gather(tokens, ids), self.kept_index(ids), []
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
    """The network of an `Architecture`, at random weights none of which is zero."""
    kind = {"MDT": MDT, "MDTv2": MDTv2, "DiT": DiT}[architecture.family]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(**architecture.settings())


# ---- Losses ------------------------------------------------------------------------------------


@functools.cache
def tables(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """What the losses look up by timestep, of the linear schedule of 1000 steps."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bars = torch.cumprod(1 - betas, 0)
    previous = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bars[:-1]])
    posterior_variance = betas * (1 - previous) / (1 - alpha_bars)
    found = {
        "signal": alpha_bars.sqrt(),
        "noise": (1 - alpha_bars).sqrt(),
        "inverse_snr": (1 - alpha_bars) / alpha_bars,
        "low": torch.cat([posterior_variance[1:2], posterior_variance[1:]]).log(),
        "high": betas.log(),
        "of_x0": betas * previous.sqrt() / (1 - alpha_bars),
        "of_xt": (1 - previous) * (1 - betas).sqrt() / (1 - alpha_bars),
    }
    return {name: values.to(device, dtype) for name, values in found.items()}


def losses(
    model: nn.Module,
    x0: Tensor,
    t: Tensor,
    noise: Tensor,
    y: Tensor | None,
    ids_keep: Tensor | None = None,
    min_snr: float | None = None,
    tabulated: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Per-sample terms (B,) of one pass: "mse", "vb" (learned variance) and "loss".

    Computed in x0's dtype; the model is given float32. `tabulated` is what `tables` gives, for a
    compiler that would compute it anew each time.
    """
    tabulated = tabulated or tables(x0.device, x0.dtype)
    at = {name: values[t][:, None, None, None] for name, values in tabulated.items()}
    noise = noise.to(x0.dtype)
    xt = at["signal"] * x0 + at["noise"] * noise
    output = model(xt.float(), t, y, ids_keep).to(x0.dtype)
    epsilon = output[:, : x0.shape[1]]
    mse = (noise - epsilon).square().mean((1, 2, 3))
    if min_snr is not None:
        mse = mse * (min_snr * tabulated["inverse_snr"]).clamp(max=1)[t]
    if not model.learn_variance:
        return {"mse": mse, "loss": mse}

    fraction = (output[:, x0.shape[1] :] + 1) / 2
    log_variance = fraction * at["high"] + (1 - fraction) * at["low"]
    # The bound trains the variance alone.
    guess = (xt - at["noise"] * epsilon.detach()) / at["signal"]
    mean = at["of_x0"] * guess + at["of_xt"] * xt
    ratio = at["low"] - log_variance
    distance = (at["of_x0"] * (x0 - guess)).square()
    kl = (ratio.exp() - 1 - ratio + distance * (-log_variance).exp()) / 2
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


# ---- Training ----------------------------------------------------------------------------------


class Adan(torch.optim.Optimizer):
    """The authors' Adan, its state laid out as theirs.

    A parameter's state is exp_avg (m), exp_avg_diff (v), exp_avg_sq (n) and neg_pre_grad, minus the
    last gradient as clipped; the step count is the group's. Gradients are clipped to the norm
    max_grad_norm over all groups, 0 for no clipping.
    """

    MOMENTS = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "neg_pre_grad")

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
        gradients = [p.grad for group in self.param_groups for p in trained(group)]
        length = torch.stack(torch._foreach_norm(gradients)).norm()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            self._update(group, length)

    def _update(self, group: dict[str, Any], length: Tensor) -> None:
        params = trained(group)
        gradients = [p.grad for p in params]
        if group["max_grad_norm"]:
            clip = (group["max_grad_norm"] / (length + group["eps"])).clamp(max=1.0)
            gradients = torch._foreach_mul(gradients, clip)
        m, v, n, negative = self._moments(params, gradients)
        b1, b2, b3 = group["betas"]
        c1, c2, c3 = (1 - b ** group["step"] for b in group["betas"])
        torch._foreach_add_(negative, gradients)  # the difference of gradients
        torch._foreach_lerp_(m, gradients, 1 - b1)
        torch._foreach_lerp_(v, negative, 1 - b2)
        look_ahead = torch._foreach_add(gradients, negative, alpha=b2)
        torch._foreach_mul_(n, b3)
        torch._foreach_addcmul_(n, look_ahead, look_ahead, 1 - b3)
        torch._foreach_copy_(negative, gradients)
        torch._foreach_neg_(negative)

        denominator = torch._foreach_sqrt(n)
        torch._foreach_div_(denominator, math.sqrt(c3))
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, m, denominator, -group["lr"] / c1)
        torch._foreach_addcdiv_(params, v, denominator, -group["lr"] * b2 / c2)
        if group["weight_decay"]:
            torch._foreach_div_(params, 1 + group["lr"] * group["weight_decay"])

    def _moments(self, params: list[Tensor], gradients: list[Tensor]) -> list[list[Tensor]]:
        """The parameters' moments, by kind; those of new parameters as before a first step."""
        for p, g in zip(params, gradients, strict=True):
            if not self.state[p]:
                self.state[p].update({name: torch.zeros_like(p) for name in self.MOMENTS[:3]})
                self.state[p]["neg_pre_grad"] = -g
        return [[self.state[p][name] for p in params] for name in self.MOMENTS]


def trained(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of an optimiser's group that have a gradient."""
    return [p for p in group["params"] if p.grad is not None]


def create_optimizer(model: LatentTransformer) -> torch.optim.Optimizer:
    """The optimiser the authors trained this kind of network with, over all its parameters."""
    if isinstance(model, MDTv2):
        return Adan(model.parameters(), lr=3e-4)
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)


def ema_of(model: nn.Module) -> nn.Module:
    """An EMA that starts here: a copy that asks for no gradients."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, rate: float = 0.9999) -> None:
    """ema ← rate·ema + (1 − rate)·model, over parameters."""
    averages, params = list(ema.parameters()), list(model.parameters())
    torch._foreach_mul_(averages, rate)
    torch._foreach_add_(averages, params, alpha=1 - rate)


# ---- What is timed -----------------------------------------------------------------------------


class Reference:
    """Train step and forward pass of an architecture on one device, eager or compiled.

    Attributes:
      model: the network, in float32; under autocast to bfloat16 if asked to.
    """

    def __init__(self, architecture: Any, device: str, bfloat16: bool, compiled: bool):
        torch.set_float32_matmul_precision("highest" if not bfloat16 else "high")
        self.device = torch.device(device)
        self.model = build(architecture).to(self.device)
        self._ema, self._optimizer = ema_of(self.model), create_optimizer(self.model)
        self._min_snr = 5.0 if isinstance(self.model, MDTv2) else None
        self._tables = tables(self.device, torch.float32)
        self._autocast = functools.partial(
            torch.autocast, self.device.type, torch.bfloat16, enabled=bfloat16
        )
        # Every number of kept tokens has its own program, as ours has.
        compile_ = functools.partial(torch.compile, dynamic=False) if compiled else lambda f: f
        self._loss, self._forward = compile_(self._loss), compile_(self._forward)

    def step(self, x0: Tensor, y: Tensor, num_kept: int | None) -> Tensor:
        """One training step on latents (B, C, H, W) and labels (B,); returns the loss."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(x0, y, num_kept)
        loss.backward()
        self._optimizer.step()
        update_ema(self._ema, self.model)
        return loss.detach()

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """The network's output."""
        return self._forward(x, t, y)

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        with self._autocast():
            return self.model(x, t, y)

    def _loss(self, x0: Tensor, y: Tensor, num_kept: int | None) -> Tensor:
        """mean(full) + mean(masked), each with its own noise and label dropout."""
        batch, model = len(x0), self.model
        t = torch.randint(1000, (batch,), device=x0.device)
        passes = [None]
        if num_kept is not None:
            order = torch.rand(batch, model.grid_size**2, device=x0.device).argsort(1)
            passes.append(order[:, :num_kept])
        total = 0.0
        for ids in passes:
            dropped = torch.rand(batch, device=x0.device) < 0.1
            labels = torch.where(dropped, model.num_classes, y)
            noise = torch.randn_like(x0)
            with self._autocast():
                terms = losses(model, x0, t, noise, labels, ids, self._min_snr, self._tables)
            total = total + terms["loss"].mean()
        return total
