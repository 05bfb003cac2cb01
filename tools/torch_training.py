"""Training of the PyTorch networks: the losses, the authors' Adan and the EMA.

Written to be fast in PyTorch: the optimiser and the EMA work on lists of tensors, and
`torch.compile` takes the losses. Tests hold them to the authors' reference arrays.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch_networks import LatentTransformer

# ---- Losses ------------------------------------------------------------------------------------


@functools.cache
def loss_tables(device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The losses' coefficients by timestep, for the linear schedule of 1000 steps."""
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

    The terms are computed in x0's dtype; the model gets float32. `tabulated` is the result of
    `loss_tables`, given so that a compiled loss does not compute it in every call.
    """
    tabulated = tabulated or loss_tables(x0.device, x0.dtype)
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


# ---- Optimiser and EMA -------------------------------------------------------------------------


class Adan(torch.optim.Optimizer):
    """The authors' Adan, with their layout of its state.

    A parameter's state is exp_avg (m), exp_avg_diff (v), exp_avg_sq (n) and neg_pre_grad, minus the
    last clipped gradient; a group has the count of steps. Gradients are clipped to the norm
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
        """The parameters' moments by kind; new parameters get those before a first step."""
        for p, g in zip(params, gradients, strict=True):
            if not self.state[p]:
                self.state[p].update({name: torch.zeros_like(p) for name in self.MOMENTS[:3]})
                self.state[p]["neg_pre_grad"] = -g
        return [[self.state[p][name] for p in params] for name in self.MOMENTS]


def trained(group: dict[str, Any]) -> list[Tensor]:
    """The parameters of an optimiser's group that have a gradient."""
    return [p for p in group["params"] if p.grad is not None]


def create_optimizer(model: LatentTransformer) -> torch.optim.Optimizer:
    """The optimiser that the authors trained this network with, over all its parameters."""
    if model.optimizer == "adan":
        return Adan(model.parameters(), lr=3e-4)
    return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)


def ema_of(model: nn.Module) -> nn.Module:
    """A copy of the model without gradients, as the first value of its EMA."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, rate: float = 0.9999) -> None:
    """ema ← rate·ema + (1 − rate)·model, over parameters."""
    averages, params = list(ema.parameters()), list(model.parameters())
    torch._foreach_mul_(averages, rate)
    torch._foreach_add_(averages, params, alpha=1 - rate)
