"""Measures whether a run's samples show the class asked for, vary, and are new.

    mdt samples-report --workdir runs/fashion --grid fashion.png

For runs on Fashion-MNIST (`configs/fashion.py`) and on the digits (`configs/digits.py`). It draws
50 samples of each class twice, with guidance and without, reads them with a classifier of the real
images, prints what `evaluation.samples_report` measures, and exits with status 1 when a requirement
is not met. The first time, training Fashion-MNIST's classifier takes about a minute on two CPU
cores; it is kept in the workdir. `--grid` shows ten guided samples of each class, a class to a row.
"""

import argparse
from pathlib import Path

import numpy as np
from absl import app

from mdt_jax.basics.help_page import Page

PAGE = Page(
    "mdt samples-report",
    "python -m mdt_jax.commands.samples_report",
    "--workdir RUN [OPTION ...]",
    __doc__,
)


def parse_report_flags(
    argv: list[str], page: Page = PAGE, sampler: str | None = None, steps: int | None = None
) -> argparse.Namespace:
    """The command's settings. No flag is defined by importing this module.

    Args:
      argv: the command line, the program's name first.
      page: what --help says.
      sampler, steps: the defaults; None for the run's own.
    """
    from mdt_jax.parallel.flag_parsing import AbslArgumentParser

    own = "the run's own" if sampler is None else f"{sampler}, {steps}"
    parser = AbslArgumentParser(page=page)
    parser.add_argument("--workdir", required=True, help="directory of the trained run")
    parser.add_argument(
        "--cfg_scale", type=float, default=2.0, help="guidance scale of the guided samples"
    )
    parser.add_argument(
        "--sampler", default=sampler, help=f"as for mdt_jax.sample ({own} by default)"
    )
    parser.add_argument("--steps", type=int, default=steps, help="sampling steps")
    parser.add_argument("--per_class", type=int, default=50, help="samples of each class, >= 2")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sampling noise")
    parser.add_argument("--grid", help="a PNG of ten guided samples of each class")
    return parser.parse_args(argv[1:])


def main(args: argparse.Namespace, only: str | None = None) -> int:
    """Samples the run in `args.workdir`, prints the table, and returns the exit status.

    Args:
      args: of `parse_report_flags`.
      only: the data set that the run must be of; None for any that is known.
    """
    # Here and not above, so that --help needs no JAX.
    from mdt_jax.basics.atomic import check_writable
    from mdt_jax.evaluation import samples_report
    from mdt_jax.parallel.command import command_ending
    from mdt_jax.parallel.distributed import initialize_distributed
    from mdt_jax.parallel.host_memory import use_main_heap

    with command_ending(args):
        initialize_distributed()
        use_main_heap()
        if args.grid:
            check_writable(args.grid, "--grid")
        kind, real, guided, plain, labels = _draw_samples(args, only)
        file = Path(args.workdir) / samples_report.CLASSIFIER_FILE
        result = samples_report.report(kind, guided, labels, plain, labels, real, file)
        print(f"{len(labels)} samples of {args.workdir} at guidance {args.cfg_scale:g} and 1\n")
        print(samples_report.report_table(kind, result))
        print(f"\n{samples_report.conclusion(kind, result)}")
    return 1 if result["failed"] else 0


def _draw_samples(args: argparse.Namespace, only: str | None) -> tuple:
    """Samples with guidance and without; writes the grid.

    Returns:
      The kind of data, its real images, guided samples, plain ones, the class asked for in each.

    Raises:
      CheckpointError: no run there.
      ValueError: a run of images that cannot be reported on.
    """
    from mdt_jax import checkpoints
    from mdt_jax import config as config_lib
    from mdt_jax.evaluation.samples_report import KINDS, RealImages
    from mdt_jax.sampling import images
    from mdt_jax.sampling.model import load
    from mdt_jax.sampling.sampler import sample

    step, meta = checkpoints.read_meta(args.workdir)
    data = config_lib.from_json(meta["config"]).data
    model, params = load(args.workdir, step=step)
    shape, classes = model.network.image_shape, model.network.num_classes
    known = [only] if only else list(KINDS)
    if data.name not in known or shape != KINDS[data.name].image_shape or classes != 10:
        raise ValueError(
            f"{args.workdir}: {classes} classes of {shape} of {data.name!r} are no "
            f"{' nor '.join(known)}"
        )
    kind = KINDS[data.name]
    labels = np.repeat(np.arange(classes), args.per_class)
    own = {"sampler": args.sampler, "steps": args.steps}
    settings = {"labels": labels, "key": args.seed} | {k: v for k, v in own.items() if v}
    guided, plain = (
        images.to_uint8(sample(model, params, cfg_scale=scale, **settings))
        for scale in (args.cfg_scale, 1.0)
    )
    if args.grid:
        shown = np.concatenate([np.flatnonzero(labels == k)[:10] for k in range(classes)])
        about = images.provenance(
            model=model.name, step=model.step, seed=args.seed, labels=labels[shown],
            cfg_scale=args.cfg_scale,
        )  # fmt: skip
        columns = min(10, args.per_class)
        images.save_png(args.grid, images.image_grid(guided[shown], columns), about)
    real = RealImages(*_images(data, "train"), *_images(data, kind.heldout))
    return kind, real, guided, plain, labels


def _images(data, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images of a split, and their classes."""
    from mdt_jax.data import create_source

    data = data.copy_and_resolve_references()
    data.split = split
    source = create_source(data)
    examples = [source[index] for index in range(len(source))]
    return (
        np.stack([example["image"] for example in examples]),
        np.array([example["label"] for example in examples]),
    )


if __name__ == "__main__":
    from mdt_jax.parallel.command import ending_quietly

    with ending_quietly():
        app.run(main, flags_parser=parse_report_flags)
