"""The train step and forward pass in PyTorch that `benchmark.py` times beside ours.

The networks of `torch_networks.py` and their training of `torch_training.py`, under autocast to
bfloat16 and under `torch.compile` if asked to.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch_networks import build
from torch_training import create_optimizer, ema_of, loss_tables, losses, update_ema


class Reference:
    """The train step and forward pass of an architecture on one device, eager or compiled.

    Attributes:
      model: the network with float32 parameters.
    """

    def __init__(self, architecture: Any, device: str, bfloat16: bool, compiled: bool):
        torch.set_float32_matmul_precision("highest" if not bfloat16 else "high")
        self.device = torch.device(device)
        self.model = build(architecture).to(self.device)
        self._ema, self._optimizer = ema_of(self.model), create_optimizer(self.model)
        self._tables = loss_tables(self.device, torch.float32)
        self._autocast = functools.partial(
            torch.autocast, self.device.type, torch.bfloat16, enabled=bfloat16
        )
        # As in ours, every number of kept tokens has its own program.
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
                terms = losses(model, x0, t, noise, labels, ids, model.min_snr, self._tables)
            total = total + terms["loss"].mean()
        return total
