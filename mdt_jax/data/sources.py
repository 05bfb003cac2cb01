"""The sources that a configuration can name.

A new data set is one function in this package that returns a `Source`, and one line in `SOURCES`.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from mdt_jax.basics.places import refuse_url
from mdt_jax.data.array_sources import digits, npy_directory
from mdt_jax.data.folders import folder_source
from mdt_jax.data.idx import fashion_mnist
from mdt_jax.data.latent_cache import latents_source
from mdt_jax.data.missing import NoDataPath
from mdt_jax.data.source import Source
from mdt_jax.data.tfds import tfds_source

# `data.name`, and the function that makes the source of the `data` settings. A name that ends in
# :NAME stands for every name that begins so.
SOURCES: dict[str, Callable[[ConfigDict], Source]] = {
    "digits": lambda data: digits(_split(data)),
    "fashion_mnist": lambda data: fashion_mnist(data.get("path") or "", _split(data)),
    "folder": lambda data: folder_source(
        _folder(data, "images"), data.get("class_order") or "string", data.get("labels") or "auto"
    ),
    "latents": lambda data: latents_source(
        _folder(data, "latents, which mdt encode-latents makes")
    ),
    "npy": lambda data: npy_directory(_folder(data, "images.npy or latents.npy")),
    "tfds:NAME": lambda data: tfds_source(
        data.name.removeprefix("tfds:"), _split(data), data.get("path")
    ),
}


def create_source(data_config: ConfigDict) -> Source:
    """The source that the `data` part of an experiment's configuration names.

    Args:
      data_config: `name`, one of
        "digits": `split` is "train" (the default), "heldout" or "all";
        "fashion_mnist": `path` is the folder of its IDX files (Debian's by default), `split` is
          "train" (the default) or "test";
        "folder": `path` is a folder of images, with `class_order` and `labels` as
          `folders.read_folder` has them;
        "latents": `path` is a folder that `mdt encode-latents` made;
        "npy": `path` is a folder of .npy files;
        "tfds:NAME": `split` as TFDS writes it ("train" by default), `path` TFDS's data folder
          or the dataset's own.
        A "folder", "latents" or "npy" is one split, called "train".

        `class_order` and `labels` other than the defaults are refused where there are no such
        choices, and so is `crop` "random" where the data are latents.

    Raises:
      NoDataPath: no path where one is needed.
      ValueError: an unknown name or split, a setting that the data have no use for, or data that
        are damaged or do not fit each other.
      MissingData: the data are not where the configuration says.
    """
    _check_use(data_config, "class_order", "string")
    _check_use(data_config, "labels", "auto")
    name, path = data_config.name, data_config.get("path") or ""
    refuse_url(path, "data.path")
    key = f"{name.partition(':')[0]}:NAME" if ":" in name else name
    if key not in SOURCES:
        *others, last = map(repr, SOURCES)
        raise ValueError(f"data.name is {name!r}; known are {', '.join(others)} and {last}")
    source = SOURCES[key](data_config)
    if source.latents and data_config.get("crop") == "random":
        raise ValueError(
            f"data.crop is 'random', but {source.name} holds latents, of images that were cropped "
            "when they were encoded; set it to 'center', or train on the images"
        )
    return source


def _check_use(data_config: ConfigDict, key: str, default: str) -> None:
    """Refuses, with ValueError, a choice of classes where there is none."""
    value = data_config.get(key)
    if value not in (None, default) and data_config.name != "folder":
        raise ValueError(
            f"data.{key} is {value!r}, but data.name {data_config.name!r} has classes of its own; "
            f"set it to {default!r}: only a 'folder' can choose"
        )


def _split(data_config: ConfigDict) -> str:
    return data_config.get("split") or "train"


def _folder(data_config: ConfigDict, contents: str) -> str:
    """`data.path`, the folder of a data set that is one split.

    Args:
      data_config: the `data` settings.
      contents: the contents of such a folder, for messages.

    Raises:
      NoDataPath: no path.
      ValueError: another split than "train".
    """
    name, path, split = data_config.name, data_config.get("path"), _split(data_config)
    if not path:
        raise NoDataPath(f"data.name {name!r} needs data.path, the folder of {contents}")
    if split != "train":
        raise ValueError(
            f"data.split is {split!r}, but a folder is one split, 'train': name another folder "
            "in data.path instead"
        )
    return path
