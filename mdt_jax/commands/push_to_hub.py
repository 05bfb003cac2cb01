"""Publishes a run's average on the Hugging Face hub, or writes the folder for it.

    mdt publish --input runs/digits --output digits_hub --license mit
    mdt publish --input runs/digits --repo OWNER/digits --license mit

The folder holds `model.safetensors` under the authors' names, `config.json`, a card (README.md)
made of the run, and a grid of samples (docs/hub.md). `mdt_jax.load` and `--checkpoint` take it as
it is, or by its address, hf://OWNER/digits. With --output alone nothing leaves this machine. With
--repo, the token is that of `hf auth login` or HF_TOKEN; a repository that is there gets one more
commit, if it is one of ours. `--input digits_hub --repo OWNER/digits` sends a folder as it is.
"""

from __future__ import annotations

import os

from mdt_jax.basics.help_page import Page
from mdt_jax.commands.convert_checkpoint import DTYPES
from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser

PAGE = Page(
    "mdt publish",
    "python -m mdt_jax.commands.push_to_hub",
    "--input RUN --output FOLDER | --repo OWNER/REPO [OPTION ...]",
    __doc__,
)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(page=PAGE)
    parser.add_argument("--input", required=True, help="the run's workdir, or weights")
    parser.add_argument("--output", help="a new folder to write")
    parser.add_argument("--repo", help="OWNER/REPO on the hub")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--dtype", choices=DTYPES, help="as saved if not given")
    parser.add_argument("--license", help="apache-2.0, mit, other, …; unknown if not given")
    parser.add_argument("--data", help="the training data in words; the config's name if not given")
    parser.add_argument("--samples", help="a PNG for the card; the run's newest grid if not given")
    parser.add_argument(
        "--ema_rate", type=float, help="which average; the run's first if not given"
    )
    parser.add_argument("--step", type=int, help="which checkpoint; the newest if not given")
    args = parser.parse_args(argv)
    with command_ending(args):
        from mdt_jax.commands import publication  # imports JAX, which --help should not

        publication.publish(args)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"  # at most a grid of samples is computed
    with ending_quietly():
        main()
