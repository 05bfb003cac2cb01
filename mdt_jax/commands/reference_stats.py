"""Makes a reference to evaluate against, in ADM's layout, of any source of images.

    mdt reference-stats --data_name folder --data_path DIR --image_size 256 --num_images 10000 \\
        --inception DIR --output REF.npz

It crops images as training does, and writes an npz with `arr_0`, a random choice of --num_images of
them, for precision and recall; `arr_1`, their labels where there are classes; and the moments of
the features of all images (or of --stats_images), `mu` and `sigma` for FID, `mu_s` and `sigma_s`
for sFID. The same seed makes the same choice. `metadata` says how it was made, with a digest of
Inception's weights, so that `mdt_jax.evaluate` refuses samples' features of other weights.

Images are read once and never held, so memory does not grow with their number.
"""

from __future__ import annotations

import functools

from absl import flags

from mdt_jax.basics.atomic import check_writable
from mdt_jax.basics.help_page import Page
from mdt_jax.basics.names import printable
from mdt_jax.data.source_flags import (
    FLAGS_OF_KEYS,
    SOURCE_FLAGS,
    define_source_flags,
    source_of_flags,
)
from mdt_jax.parallel.command import command_ending, one_line
from mdt_jax.parallel.flag_parsing import run_command

PAGE = Page(
    "mdt reference-stats",
    "python -m mdt_jax.commands.reference_stats",
    "--data_path DIR --inception DIR --output REF.npz [OPTION ...]",
    __doc__,
    {
        "The images": (*SOURCE_FLAGS, "image_size", "seed"),
        "The reference": ("num_images", "stats_images", "inception", "batch_size", "output"),
    },
)


def main(_: list[str]) -> None:
    """The command."""
    f = flags.FLAGS
    with command_ending(f, message=functools.partial(one_line, flags_of_keys=FLAGS_OF_KEYS)):
        from mdt_jax.evaluation.extractors import load_inception  # imports JAX
        from mdt_jax.evaluation.reference import choose_images, make_reference

        source = source_of_flags(f)
        choose_images(source, f.image_size, f.num_images, f.stats_images, f.seed)
        check_writable(f.output)  # all is checked before hours of work
        make_reference(
            source,
            load_inception(f.inception, f.batch_size),
            f.output,
            image_size=f.image_size,
            num_images=f.num_images,
            stats_images=f.stats_images,
            seed=f.seed,
            batch_size=f.batch_size,
            progress=True,
        )
        print(printable(f.output))


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    define_source_flags(f)
    flags.DEFINE_integer("image_size", 256, "Pixels that images are cropped to.", flag_values=f)
    flags.DEFINE_integer(
        "num_images", 10_000, "Images kept, for precision and recall.", flag_values=f
    )
    flags.DEFINE_integer(
        "stats_images", None, "Images of the moments; all by default.", flag_values=f
    )
    flags.DEFINE_integer("seed", 0, "Seed of the choice of images.", flag_values=f)
    flags.DEFINE_integer("batch_size", 64, "Images through Inception at a time.", flag_values=f)
    flags.DEFINE_string("inception", None, "Weights of Inception-v3.", required=True, flag_values=f)
    flags.DEFINE_string("output", None, "The npz to write.", required=True, flag_values=f)


if __name__ == "__main__":
    run_command(main, define_flags, PAGE)
