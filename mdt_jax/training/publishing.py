"""A run as a folder for the hub: its average's weights, config.json, a card and a picture."""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
from pathlib import Path
from typing import Any

from mdt_jax import checkpoints, sampling
from mdt_jax.basics.places import open_file
from mdt_jax.convert.architecture import BUFFER, parameter_shapes
from mdt_jax.sampling import images
from mdt_jax.training import metrics, model_card, transfer
from mdt_jax.training.model_card import Picture
from mdt_jax.weights import descriptions, hub_config, hub_folder, pretrained
from mdt_jax.weights import files as weight_files
from mdt_jax.weights.descriptions import PIXEL_CHANNELS
from mdt_jax.weights.hub_folder import CARD, SAMPLES, WEIGHTS
from mdt_jax.weights.pretrained import Pretrained

# A license by the hub's name of it: "apache-2.0", "cc-by-nc-4.0", "other".
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_DRAWN = 16  # samples in a grid that is drawn for the card
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclasses.dataclass(frozen=True)
class About:
    """What a person says of a model that its run does not know.

    Attributes:
      license: by the hub's name of it.
      data: the training data, in words; empty for their name in the config.
      samples: a PNG to show in place of the run's newest grid; empty for that.
    """

    license: str = hub_config.NO_LICENSE
    data: str = ""
    samples: str = ""

    def check(self) -> None:
        """Refuses, with ValueError, what cannot be; one line names the flag."""
        if not _LICENSE.fullmatch(self.license):
            raise ValueError(
                f"--license {self.license!r} is no name of a licence as the hub has them; give one "
                'such as "apache-2.0", "cc-by-nc-4.0" or "other"'
            )
        if self.samples and not Path(self.samples).is_file():
            raise ValueError(f"--samples {self.samples} is no file; give a PNG")
        if self.samples:
            with open_file(self.samples) as file:
                if file.read(len(_PNG)) != _PNG:
                    raise ValueError(f"--samples {self.samples} is no PNG; give one")


def write_folder(
    source: str | Path,
    output: str | Path,
    *,
    ema_rate: float | None = None,
    step: int | None = None,
    dtype: str | None = None,
    about: About | None = None,
    address: str | None = None,
) -> Path:
    """Writes the folder of docs/hub.md, whole or not at all.

    Args:
      source: a run's workdir, or one set of weights.
      output: a folder that does not exist yet, or is empty.
      ema_rate: which average of a run; its first by default.
      step: which checkpoint of a run; the newest by default.
      dtype: a key of `transfer.DTYPES`; as saved by default.
      about: what the run does not know.
      address: what the card says loads the model; the folder's name by default.

    Raises:
      CheckpointError, WeightsError, ValueError: the source cannot be read, holds no such average,
        or the folder cannot be written.
    """
    about = about or About()
    about.check()
    transfer.check_new_folder(Path(output))
    found, described = _describe(source, ema_rate, step, about)
    arrays, metadata = transfer.to_state_dict(source, ema_rate=ema_rate, step=step, dtype=dtype)
    metadata = descriptions.file_metadata(
        hub_config.config_of(described), found.class_names, found.step, found.latents
    )
    names = parameter_shapes(found.architecture)
    kinds = {array.dtype.name for name, array in arrays.items() if not name.endswith(BUFFER)}
    in_words = ", ".join(sorted(kinds))
    with transfer.aside(Path(output)) as folder:
        folder.mkdir()
        weight_files.write_weights(folder / WEIGHTS, arrays, metadata)
        hub_folder.write_config(folder, described, in_words)
        card = model_card.model_card(
            described,
            address=address or Path(output).name,
            parameters=sum(math.prod(shape) for shape in names.values()),
            dtype=in_words,
            data=about.data,
            lines=_lines(source),
            picture=_write_picture(source, folder, found, about),
        )
        (folder / CARD).write_text(card, "utf-8")
    return Path(output)


def _describe(
    source: str | Path, ema_rate: float | None, step: int | None, about: About
) -> tuple[Pretrained, dict[str, Any]]:
    """A source as `read_pretrained` has it, of an average and a step, and its config.json."""
    examples, is_run = None, False
    found = pretrained.read_pretrained(source)
    if not hub_folder.is_one_set(source):
        step, meta = checkpoints.read_meta(source, step)
        config = found.config.copy_and_resolve_references()
        descriptions.average_item(source, config, ema_rate)
        config.ema_rates = (config.ema_rates[0] if ema_rate is None else ema_rate,)
        found = dataclasses.replace(found, config=config, step=step)
        # Of converted weights neither data nor settings are known.
        examples, is_run = meta.get("num_examples"), "weights" not in meta
    described = hub_config.describe(
        found.config,
        found.architecture,
        step=found.step,
        class_names=found.class_names,
        latents=found.latents,
        license=about.license,
        num_examples=examples,
        is_run=is_run,
    )
    if hub_folder.is_hub_folder(source):  # it knows of the run that it was made of
        known = hub_folder.open_folder(source).described
        described["training"] = known["training"]
        if about.license == hub_config.NO_LICENSE:
            described["license"] = known["license"]
    return found, described


def _lines(source: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl, none without one."""
    try:
        return metrics.read_lines(Path(source) / metrics.METRICS_FILE)
    except OSError:
        return []


def _write_picture(
    source: str | Path, folder: Path, found: Pretrained, about: About
) -> Picture | None:
    """Writes samples.png: the one given, the run's grid of the step or before, or one drawn."""
    target = folder / SAMPLES
    if about.samples:
        shutil.copyfile(about.samples, target)
        return Picture()
    grids = sorted(
        (int(path.stem), path)
        for path in (Path(source) / "samples").glob("*.png")
        if path.stem.isdecimal() and int(path.stem) <= found.step
    )
    if grids:
        step, grid = grids[-1]
        shutil.copyfile(grid, target)
        guidance = images.read_metadata(grid).get("cfg_scale")
        return Picture(step, float(guidance) if guidance else None)
    if found.architecture.in_channels not in PIXEL_CHANNELS:
        return None
    model, params = sampling.load(folder)
    options = sampling.resolve_options(model)
    samples = sampling.sample(model, params, num_samples=_DRAWN, key=0)
    labels = sampling.resolve_labels(model, None, _DRAWN).tolist()
    said = images.provenance(
        model=model.name, step=model.step, seed=0, labels=labels, **vars(options)
    )
    images.save_png(target, images.image_grid(images.to_uint8(samples)), said)
    return Picture(model.step, options.cfg_scale)
