"""Images as users get them: 8-bit arrays, grids, and PNG and NPZ files that say what made them."""

import io
import json
import math
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Array, Bool, Float, Integer, Shaped, UInt8
from numpy.lib.format import dtype_to_descr, write_array, write_array_header_1_0
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.places import open_file

_NOT_FINITE = "the model's output is not finite; sample an earlier checkpoint, or in float32"


def to_uint8(
    x: Float[Array | np.ndarray, "n h w c"], first_index: int = 0
) -> UInt8[np.ndarray, "n h w c"]:
    """(x + 1) * 127.5 in float32, clamped to 0..255 and truncated, as DiT and MDT save samples.

    Args:
      x: (N, H, W, C) images in [-1, 1]; values beyond are clamped.
      first_index: the index of the first image, for errors, where `x` is part of a larger batch.

    Returns:
      (N, H, W, C) in 0..255.

    Raises:
      ValueError: `x` holds NaN or infinite values, which have no colour.
    """
    x = np.asarray(x).astype(np.float32)
    check_finite(x, first_index, "images")
    return np.clip((x + 1) * np.float32(127.5), 0, 255).astype(np.uint8)


def check_finite(
    x: Float[Array | np.ndarray, "n h w c"],
    first_index: int = 0,
    what: str = "samples",
    cause: str = _NOT_FINITE,
) -> None:
    """Refuses samples, latents too, that hold NaN or infinite values.

    Args:
      x: (N, H, W, C) samples.
      first_index: the index of the first, where `x` is part of a larger batch.
      what: what the message calls them.
      cause: why, and what to do about it.

    Raises:
      ValueError: some do; says how many, and the index of the first.
    """
    is_bad = ~is_finite(x)
    if is_bad.any():
        hold = "NaN" if np.isnan(np.asarray(x)[is_bad]).any() else "infinite values"
        raise ValueError(
            f"{is_bad.sum()} of {len(x)} {what} hold {hold}, the first at index "
            f"{first_index + is_bad.argmax()}: {cause}"
        )


def is_finite(x: Float[Array | np.ndarray, "n h w c"]) -> Bool[np.ndarray, " n"]:
    """Which samples hold neither NaN nor infinite values."""
    return np.isfinite(np.asarray(x)).all(axis=(1, 2, 3))


def image_grid(
    images: UInt8[np.ndarray, "n h w c"],
    columns: int | None = None,
    *,
    padding: int = 2,
    min_cell: int = 64,
) -> UInt8[np.ndarray, "gh gw 3"]:
    """Lays images out row by row, on white, for a person to look at.

    Args:
      images: (N, H, W, C), N at least 1, C 1 (grey) or 3 (RGB).
      columns: images in a row; by default as many as make the grid nearly square.
      padding: white pixels between images and around them.
      min_cell: images narrower than this are enlarged, by the smallest whole factor that makes
        them at least this wide, each pixel becoming a square (8x8 digits become 64x64).

    Returns:
      (GH, GW, 3) RGB.

    Raises:
      ValueError: there is no image, C is neither 1 nor 3, or `columns` is below 1.
    """
    count, height, width, channels = images.shape
    if count == 0 or channels not in (1, 3):
        raise ValueError(
            f"a grid needs at least one image of 1 or 3 channels, not an array of {images.shape}"
        )
    if columns is None:
        columns = math.ceil(math.sqrt(count))
    elif columns < 1:
        raise ValueError(f"columns is {columns}; give at least 1, or None for a square grid")
    factor = max(1, math.ceil(min_cell / width))
    height, width = height * factor, width * factor
    rows = math.ceil(count / columns)
    grid = np.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, 3),
        255,
        np.uint8,
    )
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        top, left = padding + row * (height + padding), padding + column * (width + padding)
        enlarged = image.repeat(factor, axis=0).repeat(factor, axis=1)
        grid[top : top + height, left : left + width] = enlarged  # grey fills all three channels
    return grid


def provenance(
    *,
    model: str,
    step: int | None = None,
    seed: int | None = None,
    labels: Sequence[int] | Integer[Array | np.ndarray, "n"] | None = None,
    **settings: str | int | float | bool | tuple[float, ...] | None,
) -> dict[str, str]:
    """The metadata of a file of samples, for `save_png` and `save_npz`.

    Args:
      model: the model's name or the checkpoint's path.
      step: the training step of its weights.
      seed: the seed of the sampling noise.
      labels: class labels of the images, in their order; an NPZ holds them already.
      **settings: settings of guidance and sampler, under the names that `mdt_jax.sample` has.

    Returns:
      The arguments given, as text under their own names, after "Content", which says that the
      images are synthetic, and "Software". None leaves an entry out.
    """
    given = {
        "model": model,
        "step": step,
        "seed": seed,
        "labels": None if labels is None else ",".join(str(int(label)) for label in labels),
        **settings,
    }
    return {
        "Content": "synthetic: generated by a diffusion model",
        "Software": "mdt_jax",
    } | {name: str(value) for name, value in given.items() if value is not None}


def save_png(
    path: str | os.PathLike,
    image: UInt8[np.ndarray, "h w c"],
    metadata: Mapping[str, str],
) -> None:
    """Writes one image as PNG, with `metadata` in its text chunks.

    The file appears whole or not at all; missing parent directories are created.

    Args:
      path: the file to write.
      image: (H, W, C), C 1 (grey) or 3 (RGB).
      metadata: from `provenance`; keys are 1 to 79 Latin-1 characters.

    Raises:
      ValueError: C is neither 1 nor 3.
    """
    try:
        contents = encode_png(image, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    with whole_file(path) as file:
        file.write(contents)


def encode_png(image: UInt8[np.ndarray, "h w c"], metadata: Mapping[str, str]) -> bytes:
    """The contents of a PNG file; arguments and errors are those of `save_png`."""
    if image.shape[-1] not in (1, 3):
        raise ValueError(f"a PNG of {image.shape} needs 1 or 3 channels, not those")
    text = PngInfo()
    for key, value in metadata.items():
        text.add_text(key, value)  # tEXt, or iTXt if Latin-1 cannot hold the value
    file = io.BytesIO()
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    picture.save(file, format="PNG", pnginfo=text)
    return file.getvalue()


def save_npz(
    path: str | os.PathLike,
    images: Shaped[np.ndarray, "n h w c"],
    labels: Integer[Array | np.ndarray, "n"],
    metadata: Mapping[str, str],
) -> None:
    """Writes images in the layout of ADM's evaluator (openai/guided-diffusion, evaluations).

    `arr_0` is the images, `arr_1` the labels as int64, and `metadata`, which the evaluator does not
    read, a JSON string. The file appears whole or not at all; missing parent directories are
    created.

    Args:
      path: the file to write.
      images: (N, H, W, C), with the channels they have; the evaluator wants 3.
      labels: (N,) class labels.
      metadata: from `provenance`.

    Raises:
      ValueError: there are not as many labels as images.
    """
    rows = [np.ascontiguousarray(images).data]
    stream_npz(path, images.shape, images.dtype, rows, labels, {"metadata": metadata})


def stream_npz(
    path: str | os.PathLike,
    shape: tuple[int, int, int, int],
    dtype: np.dtype | type,
    pieces: Iterable[bytes | memoryview],
    labels: Integer[Array | np.ndarray, "n"],
    texts: Mapping[str, Mapping],
    folder: str | os.PathLike | None = None,
) -> None:
    """Writes the file of `save_npz` from images that never are in memory together.

    Args:
      path: the file to write.
      shape, dtype: the images' shape and type.
      pieces: the images' bytes in C order, cut anywhere.
      labels: (N,) class labels.
      texts: further members by name, each written as JSON.
      folder: where the file is until it is whole; by default beside `path`.

    Raises:
      ValueError: there are not as many labels as images, or not as many bytes as the shape says.
    """
    if shape[0] != len(labels):
        raise ValueError(f"{path}: {shape[0]} images need as many labels, not {len(labels)}")
    dtype = np.dtype(dtype)
    header = {"descr": dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    left = math.prod(shape) * dtype.itemsize
    with whole_file(path, folder) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            write_array_header_1_0(member, header)
            for piece in pieces:
                left -= memoryview(piece).nbytes
                member.write(piece)
        if left:
            raise ValueError(f"{path}: images of {shape} and {dtype} lack {left} bytes")
        small = {"arr_1": np.asarray(labels).astype(np.int64)}
        small |= {name: np.array(json.dumps(dict(text))) for name, text in texts.items()}
        for name, array in small.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                write_array(member, array, allow_pickle=False)


def read_metadata(path: str | os.PathLike) -> dict[str, str]:
    """The metadata of a file that `save_png` or `save_npz` wrote.

    Returns:
      The metadata that was given to it; empty for a file without, written by another program.

    Raises:
      ValueError: it is no file, or neither PNG nor NPZ.
    """
    with open_file(path) as file:
        start = file.read(4)
    if start == b"\x89PNG":
        with Image.open(path) as image:
            text = getattr(image, "text", {})  # PNG's chunks
            return {key: str(value) for key, value in text.items()}
    if start == b"PK\x03\x04":
        with np.load(path) as arrays:
            return json.loads(str(arrays["metadata"])) if "metadata" in arrays else {}
    raise ValueError(f"{path} starts with {start!r}: give a PNG or NPZ file that mdt_jax wrote")
