"""What the server takes from anyone: numbers, texts and pictures, each checked before its use.

A page's own limits bind nobody who calls the server without it. So each value that arrives is read
here, whatever its type, and refused with a ValueError of one line.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import re
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from mdt_jax.basics.ranges import MAX_COUNT, Range
from mdt_jax.data.decoding import decode_picture
from mdt_jax.data.transforms import center_crop

# Browsers compute in float64, which has all whole numbers up to here.
MOST_SEED = 2**53 - 1
# The formats of pictures that are read. Pillow knows more; one of them starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
_DATA_URL = re.compile(r"data:[\w.+/-]{0,100};base64,")


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that one request may ask for.

    Attributes:
      pictures: pictures at a time.
      steps: steps of the sampler.
      resamples: how often a step of painting is taken.
      picture_bytes: bytes of a picture that is sent.
      picture_pixels: its pixels, width times height.
      waiting: requests that wait while one is being worked on.
    """

    pictures: int = 16
    steps: int = 250
    resamples: int = 10
    picture_bytes: int = 10 * 2**20
    picture_pixels: int = 20_000_000
    waiting: int = 8

    @property
    def body_bytes(self) -> int:
        """Bytes of the largest request: a picture in base 64, a mask, and the rest."""
        return self.picture_bytes * 4 // 3 + 2 * 2**20


def whole(name: str, value: Any, low: int, high: int = MAX_COUNT) -> int:
    """A whole number from `low` to `high`, which may come as 7, 7.0 or "7"."""
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", value):
        value = int(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= MOST_SEED:
        value = int(value)
    Range(low, high, whole=True).check(name, value)
    return int(value)


def number(name: str, value: Any, low: int | float, high: int | float) -> float:
    """A number from `low` to `high`; NaN is in no range."""
    Range(low, high).check(name, value)
    return float(value)


def picture(
    value: Any, limits: Limits, side: int, channels: int
) -> UInt8[np.ndarray, "{side} {side} {channels}"]:
    """The middle square of a picture that was sent, scaled to a model's size.

    Args:
      value: a data URL in base 64, as browsers make them of files.
      limits: of its size.
      side: height and width of the result.
      channels: 1 for grey, 3 for RGB.

    Raises:
      ValueError: no such text, no picture, or one beyond the limits.
    """
    contents = _contents(value, limits)
    try:
        with Image.open(io.BytesIO(contents), formats=FORMATS) as opened:
            width, height = opened.size  # the header alone; nothing is decoded yet
    except Image.DecompressionBombError:
        raise ValueError(f"the picture has {_too_many(limits)}") from None
    except Exception:  # Pillow's decoders raise nearly anything
        known = ", ".join(FORMATS)
        raise ValueError(f"the file is no picture of a known kind; send one of {known}") from None
    if width * height > limits.picture_pixels:
        raise ValueError(f"the picture is {width} × {height}: {_too_many(limits)}")
    return center_crop(decode_picture(contents, "the picture", channels), side)


def _contents(value: Any, limits: Limits) -> bytes:
    """The bytes of a data URL."""
    if not isinstance(value, str) or not value:
        raise ValueError("there is no picture; choose one first")
    if len(value) > limits.picture_bytes * 4 // 3 + 200:
        raise ValueError(f"the picture is larger than {limits.picture_bytes / 2**20:g} MiB")
    start = _DATA_URL.match(value)
    if not start:
        raise ValueError("the picture is no data URL in base 64 (data:image/png;base64,…)")
    try:
        return base64.b64decode(value[start.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the picture is damaged: its base 64 cannot be read") from None


def _too_many(limits: Limits) -> str:
    return f"more than {limits.picture_pixels / 1e6:g} million pixels; send a smaller one"


def mask(value: Any, side: int) -> Bool[np.ndarray, "{side} {side}"]:
    """A mask, True where it is to be painted, from a text of a 1 or 0 for each pixel, row by row.

    Raises:
      ValueError: another text, or a mask with nothing to paint.
    """
    if not isinstance(value, str) or len(value) != side**2 or not set(value) <= {"0", "1"}:
        raise ValueError(f"the mask is no text of {side} × {side} zeros and ones")
    cells = np.frombuffer(value.encode("ascii"), np.uint8).reshape(side, side) == ord("1")
    if not cells.any():
        raise ValueError("nothing is marked; brush over what is to be painted anew")
    return cells


def text(name: str, value: Any, known: tuple[str, ...]) -> str:
    """One of a few texts."""
    if not isinstance(value, str) or value not in known:
        shown = " ".join(str(value).split())[:60]
        raise ValueError(f"{name} {shown!r} is unknown; known: {', '.join(known)}")
    return value
