"""Images in Parquet files as the Hugging Face hub has them, for `prepare.prepare_dataset`."""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdt_jax.data.prepare import InputImage, InputImages


def from_parquet(
    pattern: str, image_column: str = "image", label_column: str | None = None
) -> InputImages:
    """The images of Parquet files as Hugging Face lays them out, file by file in sorted order.

    Args:
      pattern: a pattern for the files' paths, as in a shell.
      image_column: the column of encoded images, as bytes or as structs with `bytes`.
      label_column: the column of labels; "" for no classes; None for "label" where there is one.

    Raises:
      FileNotFoundError: no such files.
      ValueError: one that is not Parquet, columns that are missing or of another kind, labels
        without a class, or no package to read them with.
    """
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("--parquet needs the package pyarrow: pip install pyarrow") from error
    pattern = os.path.expanduser(pattern)
    paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
    if not paths:
        raise FileNotFoundError(
            f"--parquet {pattern}: no such files; give a pattern in quotes, 'data/train-*.parquet'"
        )
    wanted = "label" if label_column is None else label_column
    labelled = [_has_labels(path, image_column, wanted) for path in paths]
    if label_column and not labelled[0]:
        raise ValueError(f"{paths[0]}: no column {wanted!r}; give another --label_column")
    if len(set(labelled)) > 1:
        unlike = paths[labelled.index(not labelled[0])]
        raise ValueError(
            f"{paths[0]} and {unlike}: one has a column {wanted!r} and one has none; give a "
            "--parquet pattern for files that are alike"
        )
    names = _parquet_classes(paths, wanted) if labelled[0] else ()
    columns = [image_column] + ([wanted] if names else [])

    def records() -> Iterator[InputImage]:
        for path in paths:
            row = 0
            with _parquet_errors(path), parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=64, columns=columns):
                    for example in batch.to_pylist():
                        yield _parquet_record(f"{path}: row {row}", example, *columns)
                        row += 1

    return InputImages(pattern, records, sum(path.stat().st_size for path in paths), names)


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: is not a Parquet file, or a damaged one") from error


def _has_labels(path: Path, image_column: str, label_column: str) -> bool:
    """Whether a Parquet file has labels.

    Raises:
      ValueError: it is damaged, or its columns are not images and labels.
    """
    import pyarrow
    from pyarrow import parquet

    with _parquet_errors(path):
        schema = parquet.read_schema(path)
    if image_column not in schema.names:
        raise ValueError(
            f"{path}: no column {image_column!r}; it has {', '.join(schema.names)}: name that of "
            "the images with --image_column"
        )
    kind = schema.field(image_column).type
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not (pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)):
        raise ValueError(
            f"{path}: column {image_column!r} is of type {kind}; images must be binary, or structs "
            "with 'bytes': name another column with --image_column"
        )
    if label_column not in schema.names:
        return False
    kind = schema.field(label_column).type
    if not pyarrow.types.is_integer(kind):
        raise ValueError(
            f"{path}: column {label_column!r} is of type {kind}; labels must be integers: name "
            "another column with --label_column, or '' for none"
        )
    return True


def _parquet_classes(paths: list[Path], label_column: str) -> tuple[str, ...]:
    """The class names in the first file's metadata; without any, the labels' numbers.

    Raises:
      ValueError: a row without a label, or with one that has no name.
    """
    from pyarrow import compute, parquet

    metadata = parquet.read_schema(paths[0]).metadata or {}
    try:
        described = json.loads(metadata.get(b"huggingface", b"{}")).get("info", {})
        names = described.get("features", {}).get(label_column, {}).get("names") or ()
        names = tuple(map(str, names))
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{paths[0]}: its metadata are damaged; write it again") from error
    largest = -1
    for path in paths:
        with _parquet_errors(path):
            column = parquet.read_table(path, columns=[label_column])[label_column]
        low, high = compute.min_max(column).as_py().values()
        if column.null_count or (low is not None and low < 0):
            raise ValueError(
                f"{path}: rows without a label (column {label_column!r}); a test set's often "
                "have none: give --label_column '' to prepare images without classes"
            )
        if names and high is not None and high >= len(names):
            raise ValueError(f"{path}: label {high}, but its metadata name {len(names)} classes")
        largest = max(largest, -1 if high is None else high)
    return names or tuple(str(label) for label in range(largest + 1))


def _parquet_record(
    place: str, example: dict[str, Any], image_column: str, label_column: str = ""
) -> InputImage:
    image = example[image_column]
    data, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, "")
    # A row without bytes becomes a bad image, which Pillow cannot read; its place names the row.
    return InputImage(place, name or place, data or b"", example.get(label_column, 0))
