"""Samples from a run: `python -m mdt_jax.sample --workdir runs/digits --num_samples 64 --output s`.

Or from PyTorch weights, `--checkpoint mdt_xl2_v2_ckpt.pt --vae ema`; `--inpaint IMAGE --mask MASK`
paints the white part of a mask into a picture. Writes a PNG grid and an .npz in ADM's layout
(`arr_0` uint8 NHWC images, `arr_1` labels, the number of classes where there is none), both saying
what made them. `import mdt_jax; mdt_jax.sample(...)` does the same in Python.

Samples are written batch by batch into OUTPUT.parts/ (`sampling/parts.py`), then joined: the same
command goes on where it was killed, to the same bits, and does nothing when all is there.
"""

from absl import app, flags

from mdt_jax.parallel.command import ending_quietly
from mdt_jax.parallel.flag_parsing import parse_flags
from mdt_jax.sample.command import main
from mdt_jax.sample.flags import define_flags

if __name__ == "__main__":
    define_flags(flags.FLAGS)
    with ending_quietly():
        app.run(main, flags_parser=parse_flags)
