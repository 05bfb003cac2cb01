"""The .json files of a latent cache as they may be: damaged, or changed by hand."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mdt_jax.basics.names import printable
from mdt_jax.basics.places import read_text

CACHE_MANIFEST = "manifest.json"
ENCODING = "encoding.json"  # takes the manifest's place while a cache is being made
TOOL = "mdt encode-latents"
# The types of a description's fields, and of lists' entries, as JSON gives them.
_TYPES = {
    "str": (str,), "int": (int,), "float": (float, int), "bool": (bool,),
    "tuple[str, ...]": (str,), "tuple[int, int, int]": (int,),
    "tuple[float, ...]": (float, int),
}  # fmt: skip
_ENTRY = {"file": str, "bytes": int, "records": int, "sha256": str}


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in one of a cache's .json files, None if there is no such file.

    Raises:
      ValueError: it is damaged; the message says what to do.
    """
    try:
        values = json.loads(read_text(path))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise unusable(path, f"is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise unusable(path, f"holds a {type(values).__name__}, not an object")
    return values


def check_fields(description: type, values: dict[str, Any]) -> None:
    """Refuses a description whose fields are of other types than they should be.

    Args:
      description: the dataclass that has the fields.
      values: what a .json file says of them.

    Raises:
      KeyError: a field is not there.
      ValueError: a field is of another type.
    """
    for field in dataclasses.fields(description):
        value, several = values[field.name], str(field.type).startswith("tuple")
        entries = value if several and isinstance(value, list) else [value]
        known = _TYPES.get(str(field.type))
        wrong = several != isinstance(value, list) or not {*map(type, entries)} <= {*(known or ())}
        wrong |= str(field.type) == "tuple[int, int, int]" and len(entries) != 3
        if known and wrong:
            raise ValueError(f"{field.name} is {str(value)[:40]}")


def check_entries(entries: Any) -> list[dict[str, Any]]:
    """The entries of shards, if they are such.

    Raises:
      KeyError: an entry lacks something.
      TypeError, ValueError: they are of another type.
    """
    for entry in entries:
        for key, kind in _ENTRY.items():
            if not isinstance(entry, dict) or type(entry[key]) is not kind:
                raise ValueError(f"{str(entry)[:40]} is no entry of a shard")
    return list(entries)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Makes the errors of what a .json file says, and lacks, those of a damaged file."""
    try:
        yield
    except KeyError as error:
        raise unusable(path, f"lacks {error}") from error
    except (TypeError, ValueError, ArithmeticError, IndexError) as error:
        raise unusable(path, " ".join(str(error).split())) from error


def unusable(path: Path, why: str) -> ValueError:
    """The error of a cache's .json file that is damaged, with the way out."""
    if path.name in (CACHE_MANIFEST, ENCODING):
        way_out = f"restore it from a copy, or remove the folder and run {TOOL} again"
    else:
        way_out = f"remove it, and run the {TOOL} command again, which makes that shard anew"
    return ValueError(f"{printable(path)}: is damaged ({printable(why)}); {way_out}")
