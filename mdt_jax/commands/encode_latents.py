"""Encodes a data set once, for training on its latents.

    mdt encode-latents --data_name folder --data_path DIR --vae mse --image_size 256 \\
        --output LATENTS

It crops images as ADM does and writes the folder that `data.name=latents data.path=LATENTS` reads:
ArrayRecord shards of the posteriors' means and standard deviations, with labels, and a manifest
(see `mdt_jax/data/latent_cache.py`). With --mirror, the default, the mirrored images are encoded
too, and `data.flip=True` chooses between an image's two posteriors. With --nomirror, which is half
the work, it mirrors latents, which are nearly, but not exactly, those of the mirrored images.

The same command again goes on with a run that ended early, shard by shard. It does not encode
finished shards again, but damaged ones. Several processes, each with its --process_index and the
same --process_count and --output, encode shards of their own (the hosts of a TPU pod slice know
theirs), and the last of them writes the manifest. One that ended early can be started again, or one
process alone can do the rest when the others have ended. Two processes never write one shard: the
later is refused.
"""

from __future__ import annotations

import functools

from absl import flags

from mdt_jax.basics.help_page import Page
from mdt_jax.basics.names import printable
from mdt_jax.basics.places import expand
from mdt_jax.data.latent_cache import NORMALIZATIONS
from mdt_jax.data.source_flags import (
    FLAGS_OF_KEYS,
    SOURCE_FLAGS,
    define_source_flags,
    source_of_flags,
)
from mdt_jax.models.latent_space import AUTOENCODERS
from mdt_jax.parallel.command import command_ending, one_line
from mdt_jax.parallel.flag_parsing import run_command

PAGE = Page(
    "mdt encode-latents",
    "python -m mdt_jax.commands.encode_latents",
    "--data_path DIR --output LATENTS [OPTION ...]",
    __doc__,
    {
        "The images": (*SOURCE_FLAGS, "image_size", "mirror", "on_bad_image", "max_bad_fraction"),
        "The latents": ("vae", "normalize", "dtype", "output", "images_per_shard"),
        "The work": ("batch_size", "compute_dtype", "process_index", "process_count"),
    },
)


def main(_: list[str]) -> None:
    """The command."""
    f = flags.FLAGS
    with command_ending(
        f,
        message=functools.partial(one_line, flags_of_keys=FLAGS_OF_KEYS),
        interrupted="interrupted; the same command goes on from the last finished shard",
    ):
        import jax

        from mdt_jax.commands.latent_encoding import encode_latents, summary
        from mdt_jax.parallel import sharding
        from mdt_jax.weights.autoencoder import Autoencoder

        source = source_of_flags(f)
        mesh = sharding.create_mesh(devices=jax.local_devices())
        # Not joined by jax.distributed, whose first process to leave would end the others.
        index = jax.process_index() if f.process_index is None else f.process_index
        count = jax.process_count() if f.process_count is None else f.process_count
        if not 0 <= index < count:
            raise ValueError(f"--process_index {index} is outside 0 to --process_count {count} - 1")
        output = expand(f.output)
        finished = encode_latents(
            source,
            Autoencoder.load(str(expand(f.vae)), mesh, dtype=f.compute_dtype),
            output,
            image_size=f.image_size,
            mirror=f.mirror,
            dtype=f.dtype,
            batch_size=f.batch_size,
            images_per_shard=f.images_per_shard,
            on_bad_image=f.on_bad_image,
            max_bad_fraction=f.max_bad_fraction,
            normalize=f.normalize,
            process_index=index,
            process_count=count,
            progress=index == 0,
        )
        unfinished = f"{output}: other processes have not finished yet"
        print(printable(summary(output) if finished else unfinished))


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    define_source_flags(f)
    flags.DEFINE_string(
        "vae", "mse", f"The autoencoder: {', '.join(AUTOENCODERS)}, or a path.", flag_values=f
    )
    flags.DEFINE_integer("image_size", 256, "Pixels that images are cropped to.", flag_values=f)
    flags.DEFINE_string(
        "output", None, "The folder to make, or to go on with.", required=True, flag_values=f
    )
    flags.DEFINE_bool(
        "mirror", True, "Whether the mirrored images are encoded, too.", flag_values=f
    )
    flags.DEFINE_enum(
        "normalize",
        "autoencoder",
        list(NORMALIZATIONS),
        "What training normalises latents by: the autoencoder's numbers, or each channel's own.",
        flag_values=f,
    )
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "float16"], "Type of the stored numbers.", flag_values=f
    )
    flags.DEFINE_enum(
        "compute_dtype", "float32", ["float32", "bfloat16"], "Type computed in.", flag_values=f
    )
    flags.DEFINE_integer(
        "batch_size", 64, "Images at a time, over a process's devices.", flag_values=f
    )
    flags.DEFINE_integer("images_per_shard", 4096, "Images in a file.", flag_values=f)
    flags.DEFINE_integer(
        "process_index", None, "Which of several processes this is, from 0 on.", flag_values=f
    )
    flags.DEFINE_integer(
        "process_count", None, "How many there are; 1, or a TPU pod's hosts.", flag_values=f
    )
    flags.DEFINE_enum(
        "on_bad_image",
        "error",
        ["error", "skip"],
        "Stop at a bad image, or leave it out.",
        flag_values=f,
    )
    flags.DEFINE_float(
        "max_bad_fraction", 0.01, "With skip: stop when more of the images are bad.", flag_values=f
    )


if __name__ == "__main__":
    run_command(main, define_flags, PAGE)
