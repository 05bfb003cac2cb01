"""What latents are: which autoencoder made them, and the numbers that they are normalised by.

A diffusion model neither sees an autoencoder nor knows its own latents by their values: two
autoencoders of one shape give latents that look alike, and decode to garbage when they are mixed.
So a `LatentSpace` goes with the latents wherever they go: a cache's manifest, a checkpoint's meta
data and a file of exported weights hold it, and whatever pairs latents with an autoencoder compares
the two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

# Stable Diffusion's first-stage scale: latents times this have about unit variance
# (Rombach et al. 2022, https://arxiv.org/abs/2112.10752, appendix G). MDT and DiT train with it.
STABLE_DIFFUSION_SCALE = 0.18215
STABLE_DIFFUSION_CHANNELS = 4
STABLE_DIFFUSION_STRIDE = 8
_LARGEST = 1e6  # of a number of the normalisation; latents themselves have values of about 1
_SHOWN = 12  # hexadecimal digits of a digest in a message


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """An autoencoder's latents, and how a diffusion model sees them.

    The model sees (latent − shift)·scale, as diffusers has it, or (latent − mean) / std where every
    channel has a mean and a standard deviation of its own.

    Attributes:
      channels: channels of a latent.
      stride: pixels of an image to one of its latents, along each side; 0 if not known.
      scale, shift: the factor and the offset of all channels; not used where `mean` and `std` are.
      mean, std: of each channel; empty where `scale` and `shift` hold.
      autoencoder: the name or path by which the autoencoder was asked for; the digest says which it
        is.
      digest: the SHA-256 of its encoder's weights; empty if not known. Autoencoders that differ in
        their decoders alone, as Stable Diffusion's "ema" and "mse", have one digest.
    """

    channels: int = STABLE_DIFFUSION_CHANNELS
    stride: int = STABLE_DIFFUSION_STRIDE
    scale: float = STABLE_DIFFUSION_SCALE
    shift: float = 0.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    autoencoder: str = ""
    digest: str = ""

    def __post_init__(self):
        numbers = {"scale": self.scale, "shift": self.shift}
        numbers |= {f"mean of channel {i}": value for i, value in enumerate(self.mean)}
        numbers |= {f"std of channel {i}": value for i, value in enumerate(self.std)}
        for name, value in numbers.items():
            positive = name == "scale" or name.startswith("std")
            if not math.isfinite(value) or (positive and value <= 0):
                raise _wrong(name, value, "a number above 0" if positive else "a number")
            if abs(value) > _LARGEST or (positive and value < 1 / _LARGEST):
                least = f"from {1 / _LARGEST:g} to" if positive else f"from {-_LARGEST:g} to"
                raise _wrong(name, value, f"a number {least} {_LARGEST:g}")
        for name, least in (("channels", 1), ("stride", 0)):
            if getattr(self, name) < least:
                raise _wrong(name, getattr(self, name), f"a whole number from {least} on")
        for name in ("mean", "std"):
            count = len(getattr(self, name))
            if count not in (0, self.channels) or count != len(self.mean or self.std):
                raise ValueError(
                    f"the latents' {name} has {count} values, and the latents {self.channels} "
                    "channels: mean and std have a value for each channel, or none"
                )

    @classmethod
    def from_json(cls, values: Any) -> LatentSpace:
        """The space of `to_json`'s values; fields that are missing have Stable Diffusion's.

        Raises:
          ValueError: a value of a wrong type or out of range, or an unknown name.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                f"the latents' description is a {type(values).__name__}, not an object"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise ValueError(
                f"the latents' description has {unknown[0]!r}; known: {', '.join(sorted(known))}"
            )
        read: dict[str, Callable[[str, Any], Any]] = {
            "channels": _whole_number, "stride": _whole_number, "scale": _number, "shift": _number,
            "mean": _numbers, "std": _numbers, "autoencoder": _text, "digest": _text,
        }  # fmt: skip
        return cls(**{name: read[name](name, value) for name, value in values.items()})

    def to_json(self) -> dict[str, Any]:
        """The fields as values of JSON."""
        values = dataclasses.asdict(self)
        return values | {"mean": list(self.mean), "std": list(self.std)}

    def normalize(self, latents: Any) -> Any:
        """Latents of the autoencoder as a diffusion model sees them; NumPy's arrays or JAX's.

        Args:
          latents: float32, channels last.
        """
        if self.mean:
            return (latents - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return (latents - self.shift if self.shift else latents) * self.scale

    def denormalize(self, latents: Any) -> Any:
        """The inverse of `normalize`: latents as the autoencoder decodes them."""
        if self.mean:
            return latents * np.asarray(self.std, np.float32) + np.asarray(self.mean, np.float32)
        return latents / np.float32(self.scale) + np.float32(self.shift)

    def describe(self) -> str:
        """The space in a few words, for a message or a log."""
        by = self.autoencoder or "an autoencoder that is not known by name"
        encoder = f" (encoder {self.digest[:_SHOWN]})" if self.digest else ""
        pixels = f", {self.stride} pixels each" if self.stride else ""
        return f"{by}{encoder}, {self.channels} channels{pixels}, {self.numbers}"

    @property
    def numbers(self) -> str:
        """The normalisation in words."""
        if self.mean:
            first = f"mean {self.mean[0]:.6g}, std {self.std[0]:.6g}"
            return f"{first} of channel 0" + (" and others" if self.channels > 1 else "")
        return f"scale {self.scale:.10g}, shift {self.shift:.10g}"

    def difference(self, other: LatentSpace) -> tuple[str, str] | None:
        """What differs first between two spaces, as words for each; None if they are the same.

        An encoder or a stride that one of them does not know is no difference.
        """
        if self.channels != other.channels:
            return f"{self.channels} channels", f"{other.channels} channels"
        if self.stride and other.stride and self.stride != other.stride:
            return f"{self.stride} pixels a latent", f"{other.stride} pixels a latent"
        if self.digest and other.digest and self.digest != other.digest:
            return f"the encoder {self.digest[:_SHOWN]}", f"the encoder {other.digest[:_SHOWN]}"
        if self.normalisation == other.normalisation:
            return None
        if self.mean and other.mean:  # of which a line cannot hold all
            for name in ("mean", "std"):
                pairs = zip(getattr(self, name), getattr(other, name), strict=True)
                for i, (ours, theirs) in enumerate(pairs):
                    if ours != theirs:
                        return (
                            f"{name} {ours!r} of channel {i}",
                            f"{name} {theirs!r} of channel {i}",
                        )
        return self.numbers, other.numbers

    @property
    def normalisation(self) -> tuple[Any, ...]:
        """The numbers of the normalisation."""
        return (self.mean, self.std) if self.mean else (self.scale, self.shift)


def _wrong(name: str, value: Any, wanted: str) -> ValueError:
    return ValueError(f"the latents' {name} is {value!r}; it must be {wanted}")


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, value, "a number")
    try:
        return float(value)
    except OverflowError:
        raise _wrong(name, "too large", "a number of 64 bits") from None


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _wrong(name, value, "a whole number")
    return value


def _numbers(name: str, value: Any) -> tuple[float, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(name, value, "a list of numbers")
    return tuple(_number(f"{name} of channel {i}", entry) for i, entry in enumerate(value))


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    return value


STABLE_DIFFUSION = LatentSpace()
# Published autoencoders by the name that `--vae` and `eval.vae` take, with the numbers of their own
# config.json. "ema" and "mse" are Stable Diffusion's with its decoder trained on, by two losses:
# MDT and DiT train on latents of "mse" and decode samples with "ema"; their encoders are the same.
AUTOENCODERS = {
    space.autoencoder: space
    for space in (
        LatentSpace(autoencoder="ema"),
        LatentSpace(autoencoder="mse"),
        LatentSpace(scale=0.13025, autoencoder="sdxl"),
        LatentSpace(16, 8, 1.5305, 0.0609, autoencoder="sd3"),
        LatentSpace(16, 8, 0.3611, 0.1159, autoencoder="flux"),
        LatentSpace(32, 32, 0.41407, autoencoder="dc-ae-f32"),
        LatentSpace(128, 64, 0.2889, autoencoder="dc-ae-f64"),
    )
}


def check_same_latents(
    wanted: LatentSpace, given: LatentSpace, *, whose: str, other: str, way_out: str
) -> None:
    """Refuses to pair latents of two spaces.

    Args:
      wanted: the latents that are there.
      given: those of what is to work on them.
      whose, other: the two in words, with their place, such as "runs/a" and "--vae B".
      way_out: what to do instead.

    Raises:
      ValueError: they differ; the message names both, and the first difference.
    """
    if (found := wanted.difference(given)) is None:
        return
    names = [f" of {space.autoencoder}" if space.autoencoder else "" for space in (given, wanted)]
    raise ValueError(
        f"{other}: latents{names[0]} with {found[1]}, but {whose} has latents{names[1]} with "
        f"{found[0]}; {way_out}"
    )
