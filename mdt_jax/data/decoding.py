"""From an encoded picture to pixels: one way, for every source whose images Pillow decodes."""

import io
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

_ORIENTATION = 0x0112  # the EXIF tag, and what shows a picture of each value upright
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
    """The pixels of `decode_picture`, whose arguments these are, and errors."""
    pixels = np.asarray(decode_picture(file, name, channels))
    return pixels.reshape(*pixels.shape[:2], channels)


def decode_picture(file: str | Path | bytes, name: str, channels: int = 3) -> Image.Image:
    """The picture in a file, or in the bytes of one, as a person would see it.

    The format is what the contents say, whatever the file is called. Colours are as ADM's loader
    has them: gray and palette pictures become RGB, CMYK is converted without its colour profile,
    and other profiles are not heeded. Where ADM's would surprise:

    - A camera's orientation (EXIF) is heeded, so that photographs stand upright. ADM leaves them
      lying; pictures without that tag are the same either way.
    - Transparent parts are white, as on a page. ADM shows whatever colour was stored below.
    - 16 bits a channel keep the upper 8, gray pictures as well; Pillow's own conversion of those
      clips nearly everything to white.
    - Of an animation, the first frame.

    Args:
      file: path or contents.
      name: how messages call it.
      channels: 3 for RGB, 1 for gray.

    Returns:
      Of mode "RGB" or "L", all of it in memory.

    Raises:
      BadImage: missing, cut off or damaged, of an unknown format, of more pixels than Pillow
        opens (`PIL.Image.MAX_IMAGE_PIXELS`, twice), or of values without a known white.
    """
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as picture:
            picture.load()
            return _flatten(_turn_upright(picture), "RGB" if channels == 3 else "L")
    except MemoryError:  # no fault of the picture's
        raise
    # Damage surfaces in Pillow's decoders as nearly any exception: struct.error, IndexError, ...
    except Exception as error:
        raise BadImage(
            f"{name}: cannot be decoded ({_reason(error)}); replace the image or remove it"
        ) from error


def _turn_upright(picture: Image.Image) -> Image.Image:
    try:
        method = _UPRIGHT.get(picture.getexif().get(_ORIENTATION))
    except Exception:  # damaged EXIF, which some of ImageNet's pictures have, says nothing
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
    """What an exception says, in one line, without the path that the message begins with."""
    if isinstance(error, UnidentifiedImageError):
        return "no image of a format that Pillow knows"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
