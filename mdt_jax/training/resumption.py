"""Which settings of a run may be others when it goes on: one table, `CHANGES`.

Practice elsewhere takes any: nothing tells a batch size that is meant from one that was forgotten.
Here what would be another run is refused, what a person may well mean is taken and told with the
flags that undo it, and what only says how a run is computed, read or shown is free.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from mdt_jax.diffusion.options import SAMPLER_OPTIONS
from mdt_jax.training import optimizers
from mdt_jax.training.remarks import unused, value_of

FREE = "free"  # says how the run is computed, read, saved or shown
TOLD = "told"  # taken, and told in one line
MEANT = "meant"  # another experiment on the same arrays: refused unless --allow_changes names it
FIXED = "fixed"  # the arrays or their meaning are others: refused

_NAMES = {
    FREE: """
        accumulation_steps model.kernels model.remat model.scan_unroll
        mesh.data mesh.fsdp mesh.tensor
        data.path data.num_workers data.read_ahead data.on_bad_image data.max_bad_fraction
        log_every log.wandb profile_steps checkpoint_every keep_last keep_every
        checkpoint.local_every checkpoint.local_dir
        watchdog.factor watchdog.least_seconds watchdog.slow watchdog.window
        sample.every sample.num_samples eval_every eval.batch_size
    """,
    TOLD: """
        num_steps batch_size model.dtype
        optimizer.name optimizer.learning_rate optimizer.weight_decay optimizer.betas optimizer.eps
        optimizer.clip_norm
        schedule.name schedule.warmup_steps schedule.boundaries schedule.factor
        eval.num_samples eval.seed eval.evaluator eval.inception eval.reference eval.vae
    """,
    MEANT: """
        seed init_from label_dropout
        masking.ratio masking.ratio_span masking.masked_pass
        diffusion.loss diffusion.min_snr
        data.name data.split data.class_order data.labels data.crop data.flip
    """,
    FIXED: """
        ema_rates
        model.name model.input_size model.in_channels model.num_classes model.patch_size
        model.hidden_size model.depth model.num_heads model.mlp_ratio model.decoder_depth
        diffusion.schedule diffusion.num_timesteps diffusion.prediction diffusion.variance
        diffusion.timestep_sampler
    """,
}
CHANGES: dict[str, str] = {key: kind for kind, keys in _NAMES.items() for key in keys.split()}
# Samples drawn otherwise are judged otherwise: eval_fid before and after cannot be compared.
CHANGES |= {f"{part}.{name}": TOLD for part in ("sample", "eval") for name in SAMPLER_OPTIONS}


class Change(NamedTuple):
    """A setting that is another than when the run was saved."""

    key: str
    before: Any
    now: Any
    kind: str

    def __str__(self) -> str:
        return f"{self.key}: {self.before}, now {self.now}"


def changes(saved: ConfigDict, config: ConfigDict) -> list[Change]:
    """The settings that differ between a run's saved config and the one that it is to go on with.

    Those that neither has a use for are left out, such as the boundaries of a constant schedule.
    """
    idle = unused(saved).keys() & unused(config).keys()
    pairs = {key: (_plain(saved, key), _plain(config, key)) for key in CHANGES if key not in idle}
    return [
        Change(key, before, now, _kind(key, before, now))
        for key, (before, now) in sorted(pairs.items())
        if before != now
    ]


def _plain(config: ConfigDict, key: str) -> Any:
    value = value_of(config, key)
    return tuple(value) if isinstance(value, list) else value


def _kind(key: str, before: Any, now: Any) -> str:
    """The kind of a change; some that are told or meant change the arrays at some values."""
    moments = optimizers.MOMENTS
    if key == "optimizer.name" and moments.get(before) != moments.get(now):
        return FIXED
    # Without label dropout there is no null class.
    if key == "label_dropout" and bool(before) != bool(now):
        return FIXED
    return CHANGES[key]


def check_allowed(allowed: Collection[str]) -> None:
    """Refuses, with ValueError, keys of --allow_changes that no run can change."""
    for key in allowed:
        kind = CHANGES.get(key)
        if kind is None:
            meant = ", ".join(key for key, kind in CHANGES.items() if kind == MEANT)
            raise ValueError(f"--allow_changes {key} is no setting; it takes {meant}")
        if kind == FIXED:
            raise ValueError(
                f"--allow_changes {key}: no run can go on with another {key}; "
                "start one from its weights, with config.init_from, in another --workdir"
            )


def check_changes(found: Iterable[Change], workdir: Path, allowed: Collection[str] = ()) -> None:
    """Refuses, with ValueError, to go on with settings of another run.

    Args:
      found: from `changes`.
      workdir: the run's folder, for the message.
      allowed: the keys that --allow_changes names.
    """
    refused = [
        change
        for change in found
        if change.kind == FIXED or (change.kind == MEANT and change.key not in allowed)
    ]
    if not refused:
        return
    said = f"{workdir} holds a run with other settings ({'; '.join(map(str, refused))}); "
    if any(change.kind == FIXED for change in refused):
        raise ValueError(
            f"{said}give this one another --workdir; --config.init_from={workdir} has it begin "
            "with that run's weights"
        )
    keys = ",".join(change.key for change in refused)
    raise ValueError(
        f"{said}give this one another --workdir; or, if that run is to go on with them, add "
        f"--allow_changes={keys}"
    )


def tell_changes(found: Iterable[Change], workdir: Path, step: int) -> None:
    """Warns, in one line, of what is taken and changes how the run goes on, and how to undo it.

    Args:
      found: from `changes`.
      workdir, step: the run, and the step from which it goes on.
    """
    told = [change for change in found if change.kind != FREE]
    if told:
        logging.warning(
            "%s goes on from step %d with other settings than it was saved with: %s. If that is "
            "not meant, stop it now and add %s",
            workdir,
            step,
            ", ".join(f"{c.key} {c.now!r} (was {c.before!r})" for c in told),
            " ".join(shlex.quote(f"--config.{c.key}={_as_text(c.before)}") for c in told),
        )


def _as_text(value: Any) -> str:
    """A setting as its flag takes it."""
    return ",".join(map(str, value)) or "()" if isinstance(value, tuple) else str(value)
