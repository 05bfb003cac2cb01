"""Decoding pictures: the one way for every source whose images Pillow decodes."""

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from mdt_jax.basics.names import printable
from mdt_jax.data import reading

_ORIENTATION = 0x0112  # an EXIF tag
# The turn that shows a picture of each orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(ValueError):
    """An image that cannot be used; the message names its file or record, and what is wrong."""


def decode_image(
    file: str | Path | bytes, name: str, channels: int = 3
) -> UInt8[np.ndarray, "h w {channels}"]:
    """The pixels of a picture; arguments and errors are those of `decode_picture`."""
    pixels = np.asarray(decode_picture(file, name, channels))
    return pixels.reshape(*pixels.shape[:2], channels)


def decode_picture(file: str | Path | bytes, name: str, channels: int = 3) -> Image.Image:
    """The picture in a file, or in the bytes of one, as a person would see it.

    The contents tell the format, not the file's name. Colours are those of ADM's loader: gray and
    palette pictures become RGB, CMYK is converted without its colour profile, and other profiles
    are ignored. Four kinds of pictures differ from ADM's, which would surprise:

    - Photographs stand upright, as their EXIF orientation says. ADM leaves them lying. Pictures
      without that tag are the same either way.
    - Transparent parts are white, as on a page. ADM shows the colour that was stored below.
    - Of 16 bits a channel the upper 8 are kept. Pillow's own conversion of 16-bit gray pictures
      clips nearly everything to white.
    - An animation gives its first frame.

    Args:
      file: path or contents.
      name: its name in messages.
      channels: 3 for RGB, 1 for gray.

    Returns:
      A picture of mode "RGB" or "L", loaded into memory.

    Raises:
      BadImage: a picture that is missing, cut off or damaged, of an unknown format, of more than
        twice `PIL.Image.MAX_IMAGE_PIXELS`, or of 32-bit values, whose white is unknown.
    """
    reading.at(printable, name)
    try:
        if not isinstance(file, bytes) and _is_endless(file):
            raise ValueError("it is a pipe or a device, not a file")
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
            picture.load()
            return _flatten(_turn_upright(picture), "RGB" if channels == 3 else "L")
    except MemoryError:  # not the picture's fault
        raise
    # Damage surfaces in Pillow's decoders as nearly any exception: struct.error, IndexError, ...
    except Exception as error:
        raise BadImage(
            f"{printable(name)}: cannot be decoded ({_reason(error)}); replace the image or remove "
            "it"
        ) from error


def _is_endless(file: str | Path) -> bool:
    """Whether reading a path could wait for ever."""
    return os.path.exists(file) and not (os.path.isfile(file) or os.path.isdir(file))


def _turn_upright(picture: Image.Image) -> Image.Image:
    try:
        method = _UPRIGHT.get(picture.getexif().get(_ORIENTATION))
    except Exception:  # damaged EXIF, as in some of ImageNet's pictures, counts as none
        return picture
    return picture if method is None else picture.transpose(method)


def _flatten(picture: Image.Image, mode: str) -> Image.Image:
    """A loaded picture of any mode as "RGB" or "L", on white."""
    if picture.mode.startswith("I;16") or (picture.mode == "I" and picture.format == "PNG"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise ValueError("32-bit values, of which white is unknown: save it with 8 or 16 bits")
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture if picture.mode == mode else picture.convert(mode)


def _reason(error: Exception) -> str:
    """An exception's message in one line, without the path that it begins with."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
