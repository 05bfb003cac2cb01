"""A page on which a model is tried: `python -m mdt_jax.demo --workdir runs/digits`.

Or PyTorch weights, `--checkpoint mdt_xl2_v2_ckpt.pt --vae ema`. It needs the extra `demo`. The page
samples, paints into pictures, and shows what the masked pass makes of hidden tokens. It is served
to this machine alone, unless --host says otherwise; Ctrl-C or SIGTERM ends it.
"""

from absl import app, flags

from mdt_jax.demo.flags import define_flags
from mdt_jax.parallel.command import ending_quietly
from mdt_jax.parallel.flag_parsing import parse_flags


def main(arguments: list[str]) -> None:
    """The command, whose modules are imported when it has work to do."""
    from mdt_jax.demo.command import main as serve

    serve(arguments)


if __name__ == "__main__":
    define_flags(flags.FLAGS)
    with ending_quietly():
        app.run(main, flags_parser=parse_flags)
