"""The flags by which tools are told where their images are."""

from __future__ import annotations

from absl import flags

from mdt_jax.data.source import Source

# The keys of `data`, which messages contain, and the flags of tools that take data by flags.
FLAGS_OF_KEYS = {
    "data.name": "--data_name",
    "data.path": "--data_path",
    "data.split": "--data_split",
    "data.class_order": "--class_order",
    "data.labels": "--labels",
}
SOURCE_FLAGS = tuple(flag.removeprefix("--") for flag in FLAGS_OF_KEYS.values())


def define_source_flags(f: flags.FlagValues) -> None:
    """Defines the flags that `source_of_flags` reads."""
    flags.DEFINE_string(
        "data_name", "folder", "As config.data.name: folder, tfds:NAME, ...", flag_values=f
    )
    flags.DEFINE_string(
        "data_path", "", "As config.data.path: where the images are.", flag_values=f
    )
    flags.DEFINE_string("data_split", "train", "As config.data.split.", flag_values=f)
    flags.DEFINE_string("class_order", "string", "As config.data.class_order.", flag_values=f)
    flags.DEFINE_string("labels", "auto", "As config.data.labels.", flag_values=f)


def source_of_flags(f: flags.FlagValues) -> Source:
    """The images that the flags name.

    Raises:
      ValueError, MissingData: as `create_source`; messages hold a config's keys, which
        `FLAGS_OF_KEYS` turns into flags.
    """
    import ml_collections

    from mdt_jax.data.sources import create_source  # which reads them all

    config = {
        key.removeprefix("data."): f[flag.removeprefix("--")].value
        for key, flag in FLAGS_OF_KEYS.items()
    }
    return create_source(ml_collections.ConfigDict(config))
