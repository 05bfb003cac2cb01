"""Measures the input pipeline beside the rate that a model needs, and shows its slowest part.

    mdt profile-input
    mdt profile-input --data_name folder --data_path PICTURES --image_size 256
    mdt profile-input --data_name latents --data_path LATENTS \\
        --model MDTv2-XL/2 --device "NVIDIA H200" --num_devices 8 --processes 1 --mfu 0.4

Without data it makes both kinds in a temporary folder: 256-pixel crops of JPEG photographs of
ImageNet's usual size, and a cache of 32 x 32 x 4 latents in float16. Each line is a number of
workers (0: threads), in examples a second of this process.

For a folder of images, Pillow alone is measured on the same cores in turns with the pipeline: it
decodes and crops the same files in the same order to the same pixels, and drops them. A pipeline's
rate is also given as a part of Pillow's best one, with threads or with processes, in the same
round. Numbers are medians of the rounds.

Every measurement begins with the run's first example, so all but the first read files that the
page cache holds, unless they exceed the memory. A slow disk shows in the first round alone, which
is in the last line: all numbers as JSON.
"""

from __future__ import annotations

import argparse

from mdt_jax.basics.help_page import Page
from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser

PAGE = Page(
    "mdt profile-input", "python -m mdt_jax.commands.profile_input", "[OPTION ...]", __doc__
)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = ArgumentParser(page=PAGE)
    images = parser.add_argument_group("The data")
    how = parser.add_argument_group("How they are read")
    need = parser.add_argument_group("What the model needs")
    images.add_argument("--data_name", help="as config.data.name; both kinds are made without")
    images.add_argument("--data_path", default="", help="as config.data.path")
    images.add_argument("--data_split", default="train", help="as config.data.split")
    images.add_argument("--labels", default="auto", help="as config.data.labels")
    images.add_argument("--class_order", default="string", help="as config.data.class_order")
    how.add_argument("--crop", default="center", help="as config.data.crop")
    how.add_argument("--image_size", type=int, default=256, help="side of the crops")
    how.add_argument(
        "--batch_size", type=int, help="examples in this process's batch; 256 latents, 32 images"
    )
    how.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[0, 1, 2, 4],
        help="numbers of processes that read, by turns; 0: threads",
    )
    how.add_argument("--read_ahead", type=int, default=4, help="as config.data.read_ahead")
    how.add_argument("--seconds", type=float, default=5.0, help="length of each measurement")
    how.add_argument(
        "--rounds", type=int, default=3, help="rounds of measurements, for the medians"
    )
    need.add_argument("--model", default="MDTv2-XL/2", help="the model whose need is compared")
    need.add_argument(
        "--images_per_second", type=float, help="rate the model trains at, where known"
    )
    need.add_argument(
        "--device", default="NVIDIA H200", help="devices it trains on, in JAX's words"
    )
    need.add_argument("--num_devices", type=int, default=1, help="devices of all processes")
    need.add_argument("--processes", type=int, default=1, help="processes that share the reading")
    need.add_argument("--mfu", type=float, default=0.4, help="model FLOP/s utilisation")
    images.add_argument("--examples", type=int, default=4096, help="latents to make")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = parse_arguments(argv)
    with command_ending(arguments):
        from mdt_jax.commands import input_rates  # imports JAX and Grain, which --help should not

        input_rates.measure(arguments)


if __name__ == "__main__":
    with ending_quietly():
        main()
