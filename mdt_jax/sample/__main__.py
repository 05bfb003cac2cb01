"""Samples from a run, or from PyTorch weights; or paints into a picture.

    mdt sample --workdir runs/digits --num_samples 64 --output out/digits
    mdt sample --checkpoint mdt_xl2_v2_ckpt.pt --vae ema --labels 207 --output out/dogs
    mdt sample --workdir runs/digits --inpaint IMAGE.png --mask MASK.png --output out/painted

Writes a PNG grid and an .npz in ADM's layout (`arr_0` uint8 NHWC images, `arr_1` labels, the number
of classes where there is none), both saying what made them. `import mdt_jax; mdt_jax.sample(...)`
does the same in Python.

Samples are written batch by batch into OUTPUT.parts/, then joined: the same command goes on where
it was killed, to the same bits, and does nothing when all is there.
"""

from mdt_jax.basics.help_page import Page
from mdt_jax.parallel.flag_parsing import run_command
from mdt_jax.sample.flags import GROUPS, define_flags

PAGE = Page(
    "mdt sample",
    "python -m mdt_jax.sample",
    "--workdir RUN --output OUTPUT [OPTION ...]",
    __doc__,
    GROUPS,
)


def main(arguments: list[str]) -> None:
    """The command, which imports what it needs when its work begins."""
    from mdt_jax.sample import command

    command.main(arguments)


if __name__ == "__main__":
    run_command(main, define_flags, PAGE)
