"""The PyTorch networks of tools/torch_networks.py, trained and saved as the authors did.

They are written here, not copied: test_torch_models.py holds them to the authors' reference arrays,
and the tests of conversions hold our weight files and runs to them. State dicts load with
strict=True, and optimiser states index the same parameters.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import torch_training  # noqa: E402
from torch_networks import build, norm  # noqa: E402
from torch_training import create_optimizer, ema_of, update_ema  # noqa: E402

__all__ = ["build", "create_optimizer", "ema_of", "norm"]

torch.set_num_threads(1)


def kept_ids(noise: Tensor, ratio: float) -> Tensor:
    """The ids a masked pass keeps: the first int(N·(1 − ratio)) of the argsort of noise (B, N)."""
    return noise.argsort(1)[:, : int(noise.shape[1] * (1 - ratio))]


def losses(model: nn.Module, x0: Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Per-sample terms of one pass in float64, see `torch_training.losses`."""
    return torch_training.losses(model, x0.double(), *args, **kwargs)


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
