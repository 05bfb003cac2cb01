"""Whether data fit a run: its model, its classes, and what it was trained on before."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from mdt_jax import config as config_lib
from mdt_jax.data import Source, create_source
from mdt_jax.distributed import check_agreement


def autoencoder_digest(source: Source) -> str | None:
    """The digest of the encoder that made a cache of latents, None for other sources."""
    return getattr(getattr(source.records, "description", None), "vae_digest", None)


def check_same(meta: dict[str, Any], source: Source, workdir: Path) -> None:
    """Refuses, with ValueError, to go on with other classes or another autoencoder's latents."""
    if not meta or "weights" in meta:  # a fresh run, or weights whose data nobody knows
        return
    way_out = "give the data it was trained on as data.path, or another --workdir"
    names = zip_longest(meta["class_names"], source.class_names)
    for label, (before, now) in enumerate(names):
        if before != now:
            raise ValueError(
                f"{source.name}: class {label} is {now!r}, and was {before!r} when {workdir} was "
                f"trained; {way_out}"
            )
    before, now = meta.get("autoencoder"), autoencoder_digest(source)
    if before and now and before != now:
        raise ValueError(
            f"{source.name}: encoded by another autoencoder ({now[:12]}) than the latents that "
            f"{workdir} was trained on ({before[:12]}); {way_out}"
        )
    if (count := meta.get("num_examples", len(source))) != len(source):
        logging.warning(
            "%s: %d examples, and %d when the run was last saved: the rest of this epoch is of "
            "another order",
            source.name,
            len(source),
            count,
        )


def check_processes(config: ConfigDict, source: Source) -> None:
    """Refuses, with ValueError, processes of one job that would train on different things.

    Each may find the data at a path of its own, and read with as many workers as it likes.
    """
    settings = config_lib.to_json(config)
    for key in ("path", "num_workers", "read_ahead"):
        del settings["data"][key]
    names = {str(label): name for label, name in enumerate(source.class_names)}
    check_agreement({"config": settings, "class": names, "data": source.identity()})


def image_size(config: ConfigDict, source: Source) -> int | None:
    """What images are cropped to; latents are not."""
    return None if source.latents else config.model.input_size


def count_classes(config: ConfigDict) -> ConfigDict:
    """The config with its data's number of classes, if it asks for that."""
    if config.model.num_classes != -1:
        return config
    return config_lib.resolve_classes(config, create_source(config.data).class_names)


def check_source(config: ConfigDict, source: Source) -> None:
    """Refuses data that the model does not take, with ValueError."""
    size, channels = config.model.input_size, config.model.in_channels
    wanted, given = (size, size, channels), tuple(source.image_shape)
    # Images are cropped to size, latents are not.
    if given != wanted if source.latents else given[-1] != channels:
        raise ValueError(
            f"data.name {config.data.name!r} gives {given}, the model takes {wanted}: "
            "set model.input_size and model.in_channels"
        )
    classes = config.model.num_classes
    if classes and len(source.class_names) > classes:
        raise ValueError(
            f"the data have {len(source.class_names)} classes, model.num_classes is {classes}"
        )
    if classes and not source.class_names:
        raise ValueError(
            f"the data have no labels ({source.note or source.name}); model.num_classes is "
            f"{classes}, 0 would do, or data.labels 'file_names'"
        )
