"""Lists the checkpoints of a run, and verifies them.

    mdt checkpoints runs/digits
    mdt checkpoints runs/digits --noverify

Every file is read and compared with its checksum; --noverify only lists. Nothing is changed, so the
command may run beside a job, whose save in progress it calls unsealed. Exit status 1 if a
checkpoint is damaged.
"""

from absl import flags

from mdt_jax.basics.help_page import Page
from mdt_jax.parallel.flag_parsing import run_command

PAGE = Page(
    "mdt checkpoints",
    "python -m mdt_jax.checkpoints",
    "WORKDIR [OPTION ...]",
    __doc__,
    {"Options": ("verify",)},
)


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    flags.DEFINE_bool("verify", True, "Read every file and compare its checksum.", flag_values=f)


def main(arguments: list[str]) -> None:
    """The command, which imports what it needs when its work begins."""
    from mdt_jax.checkpoints import listing

    listing.main(arguments, flags.FLAGS.verify)


if __name__ == "__main__":
    run_command(main, define_flags, PAGE)
