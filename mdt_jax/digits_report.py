"""Measures a model's samples of digits against scikit-learn's 8x8 scans.

    mdt digits-report --workdir runs/digits

It draws 50 samples of each class twice, with guidance and without, prints what `mdt samples-report`
does, with DDPM's 250 steps, and exits with status 1 when a requirement is not met.
"""

import argparse
import functools

from absl import app

from mdt_jax.basics.help_page import Page
from mdt_jax.commands import samples_report

PAGE = Page(
    "mdt digits-report", "python -m mdt_jax.digits_report", "--workdir RUN [OPTION ...]", __doc__
)


def parse_report_flags(argv: list[str]) -> argparse.Namespace:
    """The command's settings. No flag is defined by importing this module."""
    return samples_report.parse_report_flags(argv, PAGE, "ddpm", 250)


main = functools.partial(samples_report.main, only="digits")


if __name__ == "__main__":
    from mdt_jax.parallel.command import ending_quietly

    with ending_quietly():
        app.run(main, flags_parser=parse_report_flags)
