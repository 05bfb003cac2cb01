"""FID, sFID, Inception Score, precision and recall, as ADM's evaluator computes them.

    mdt evaluate --reference REF.npz --samples S.npz --inception DIR --output report.json
    mdt evaluate --reference REF.npz --workdir runs/b2 --inception DIR --cfg_scale 1.5

`--samples` is an npz in ADM's layout, several joined by commas, a folder of npz files or of images,
or a run's workdir. With a workdir (there or as `--workdir`), or with PyTorch weights as
`--checkpoint`, it samples first, 50,000 images unless `--num_samples` says otherwise, with the
flags of `mdt_jax.sample`; the same command again goes on with samples that were interrupted, and
evaluates those that are there. Latents are decoded with `--vae ema` by default.

Prints a table, and writes the same and more as JSON: each class's precision, power spectra, what
could not be computed and why. Further metrics, not ADM's: precision by class of the sample and
within the class's own reference images, and the distance between radially averaged power spectra
(`evaluation/spectrum.py`). Several processes share the images.
"""

from mdt_jax.basics.help_page import Page
from mdt_jax.evaluate.flags import GROUPS, define_flags
from mdt_jax.parallel.flag_parsing import run_command

PAGE = Page(
    "mdt evaluate",
    "python -m mdt_jax.evaluate",
    "--reference REF.npz (--samples S.npz | --workdir RUN) --inception DIR [OPTION ...]",
    __doc__,
    GROUPS,
)


def main(arguments: list[str]) -> None:
    """The command, which imports what it needs when its work begins."""
    from mdt_jax.evaluate import command

    command.main(arguments)


if __name__ == "__main__":
    run_command(main, define_flags, PAGE)
