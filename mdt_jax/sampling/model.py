"""A network with its process, and how it is sampled by default: `load` makes one."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from mdt_jax import checkpoints
from mdt_jax import config as config_lib
from mdt_jax.basics import ranges
from mdt_jax.diffusion import GaussianDiffusion
from mdt_jax.diffusion.options import SAMPLER_OPTIONS
from mdt_jax.models import LatentTransformer
from mdt_jax.models.latent_space import LatentSpace
from mdt_jax.parallel import sharding
from mdt_jax.weights import descriptions, hub_folder, pretrained


@dataclasses.dataclass(frozen=True, eq=False)
class DiffusionModel:
    """A network with the process it was trained for, and how it is sampled by default.

    Attributes:
      name: the model's name, such as "MDTv2-XL/2".
      network: the Flax module.
      diffusion: its training process.
      class_names: names of the classes, empty if it has none.
      step: training steps behind the parameters.
      defaults: options of the sampler (fields of `SamplerOptions`) where the caller gives none.
      latents: the latents that it makes; None for pixels, or where it is not known.
    """

    name: str
    network: LatentTransformer
    diffusion: GaussianDiffusion
    class_names: tuple[str, ...] = ()
    step: int = 0
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    latents: LatentSpace | None = None

    @classmethod
    def from_config(
        cls,
        config: Any,
        class_names: Sequence[str] = (),
        step: int = 0,
        latents: LatentSpace | None = None,
    ):
        """The model of a run's config."""
        return cls(
            name=config.model.name,
            network=config_lib.create_network(config),
            diffusion=config_lib.create_diffusion(config),
            class_names=tuple(class_names),
            step=step,
            defaults={name: config.sample[name] for name in SAMPLER_OPTIONS},
            latents=latents,
        )

    def label(self, name: Any) -> int:
        """The class of a number or a name; ValueError lists the nearest names to an unknown one."""
        count = self.network.num_classes
        if isinstance(name, str) and name in self.class_names:
            return self.class_names.index(name)
        if isinstance(name, str) and not name.strip():
            raise ValueError(f"labels hold an empty name; classes are 0 to {count - 1}")
        label = _whole(name)
        if label is None and not isinstance(name, str):
            raise ValueError(
                f"label {name!r} is no class: classes are whole numbers, 0 to {count - 1}, or names"
            )
        if label is None:
            nearest = difflib.get_close_matches(str(name), self.class_names, n=3, cutoff=0.3)
            hint = f"; the nearest: {', '.join(nearest)}" if nearest else ""
            hint = hint or f"; classes are 0 to {count - 1}, {', '.join(self.class_names[:5])}, …"
            raise ValueError(f"no class is named {name!r}{hint}")
        if not 0 <= label < count:
            raise ValueError(f"label {label} is outside 0 to {count - 1}")
        return label


def _whole(label: Any) -> int | None:
    """A label as a whole number, None if it is none: a name, True, 3.7, NaN or an object."""
    if getattr(label, "ndim", None) == 0:  # a scalar of NumPy's or JAX's
        label = label.item()
    if isinstance(label, str):
        return int(label) if re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", label) else None
    if isinstance(label, bool) or not isinstance(label, (int, float)) or label != label // 1:
        return None
    return int(label)


def load(
    path: str | Path,
    *,
    ema_rate: float | None = None,
    step: int | None = None,
    mesh: Mesh | None = None,
    decode_layers: int | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> tuple[DiffusionModel, dict[str, Any]]:
    """A model and its EMA parameters, in their shards if a mesh has an fsdp or tensor axis.

    Args:
      path: a run's workdir; or a folder that `tools/push_to_hub.py` wrote, on the disk or as
        hf://OWNER/REPO[@REVISION]; or PyTorch weights: a .pt or .safetensors file, or
        hf://OWNER/REPO/FILE ("hf://shgao/MDT-XL2/mdt_xl2_v2_ckpt.pt").
      ema_rate: which average of a run; the config's first by default.
      step: which checkpoint of a run; the newest by default.
      mesh: devices to load onto; all of them, each with a whole copy, by default.
      decode_layers, num_heads, num_classes, input_size: sizes that PyTorch weights do not show: an
        MDT v1's decoder depth, a DiT's heads, how many rows of the label table are classes, and the
        side of the latents of diffusers' DiT. None stands for the usual value.

    Raises:
      checkpoints.CheckpointError: no checkpoint there, or a damaged one.
      ValueError: an average the run does not keep; PyTorch weights that cannot be read, are damaged
        or of another kind of model.
    """
    ranges.check_arguments(
        {
            "ema_rate": ema_rate,
            "step": step,
            "decode_layers": decode_layers,
            "num_heads": num_heads,
            "num_classes": num_classes,
            "input_size": input_size,
        }
    )
    mesh = sharding.create_mesh() if mesh is None else mesh
    pretrained.check_source(path)
    if hub_folder.is_one_set(path):
        if ema_rate is not None or step is not None:
            raise ValueError(f"ema_rate and step are a run's; {path} is one set of weights")
        found = pretrained.read_pretrained(
            path,
            decode_layers=decode_layers,
            num_heads=num_heads,
            num_classes=num_classes,
            input_size=input_size,
        )
        model = DiffusionModel.from_config(
            found.config, found.class_names, found.step, found.latents
        )
        abstract = sharding.abstract_parameters(mesh, model.network)
        return model, pretrained.place_parameters(found.params, abstract)
    step, meta = checkpoints.read_meta(path, step)
    config = config_lib.from_json(meta["config"])
    item = descriptions.average_item(path, config, ema_rate)
    latents = descriptions.latents_of_run(meta)
    model = DiffusionModel.from_config(config, meta["class_names"], step, latents)
    abstract = sharding.abstract_parameters(mesh, model.network)
    return model, checkpoints.restore_item(path, item, abstract, step=step)
