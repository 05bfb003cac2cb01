"""Serves a page on which a model is tried.

    mdt demo --workdir runs/digits
    mdt demo --checkpoint mdt_xl2_v2_ckpt.pt --vae ema

It needs the extra `demo`. The page samples, paints into pictures, and shows what the masked pass
makes of hidden tokens. It is served to this machine alone, unless --host says otherwise; Ctrl-C or
SIGTERM ends it.
"""

from mdt_jax.basics.help_page import Page
from mdt_jax.demo.flags import GROUPS, define_flags
from mdt_jax.parallel.flag_parsing import run_command

PAGE = Page(
    "mdt demo",
    "python -m mdt_jax.demo",
    "--workdir RUN [OPTION ...]",
    __doc__,
    GROUPS,
)


def main(arguments: list[str]) -> None:
    """The command, which imports what it needs when its work begins."""
    from mdt_jax.demo import command

    command.main(arguments)


if __name__ == "__main__":
    run_command(main, define_flags, PAGE)
