"""FID, sFID, Inception Score, precision and recall, as ADM's evaluator computes them.

    python -m mdt_jax.evaluate --reference REF.npz --samples S.npz --inception DIR \\
        --output report.json

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

from absl import app, flags

from mdt_jax.evaluate.command import main
from mdt_jax.evaluate.flags import define_flags
from mdt_jax.parallel.command import ending_quietly
from mdt_jax.parallel.flag_parsing import parse_flags

if __name__ == "__main__":
    define_flags(flags.FLAGS)
    with ending_quietly():
        app.run(main, flags_parser=parse_flags)
