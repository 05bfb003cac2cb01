"""What the command `mdt publish` does: a folder is written, and sent to the hub."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mdt_jax.training import publishing
from mdt_jax.weights import hub, hub_config, hub_folder


def publish(args: argparse.Namespace) -> None:
    """Writes the folder, and sends it if --repo says where."""
    if not (args.output or args.repo):
        raise ValueError("give --output DIR, a new folder, or --repo OWNER/REPO, or both")
    if args.private and not args.repo:
        raise ValueError("--private is of a repository; give --repo OWNER/REPO")
    if args.repo:
        hub.check_sending(args.repo)
    about = publishing.About(
        args.license or hub_config.NO_LICENSE, args.data or "", args.samples or ""
    )
    address = f"hf://{hub.check_repository(args.repo)}" if args.repo else None
    with _place(args) as (folder, is_written):
        if not is_written:
            publishing.write_folder(
                args.input,
                folder,
                ema_rate=args.ema_rate,
                step=args.step,
                dtype=args.dtype,
                about=about,
                address=address,
            )
        if args.output:
            print(folder)
        if args.repo:
            print(_send(folder, args))
    print(f'to load: mdt_jax.load("{address or args.output}")')


@contextlib.contextmanager
def _place(args: argparse.Namespace) -> Iterator[tuple[Path, bool]]:
    """The folder, and whether it is written already.

    It is --output, or --input if that is such a folder, or one that is removed when it was sent.
    """
    if args.output:
        yield Path(args.output), False
    elif os.path.isdir(args.input) and hub_folder.is_hub_folder(args.input) and not args.dtype:
        hub_folder.check_digest(hub_folder.open_folder(args.input))
        yield Path(args.input), True
    else:
        with tempfile.TemporaryDirectory(prefix="mdt_jax_hub_") as folder:
            yield Path(folder) / "model", False


def _send(folder: Path, args: argparse.Namespace) -> str:
    return hub.send(
        folder,
        args.repo,
        is_ours=hub_folder.is_published,
        message=f"Weights of step {hub_folder.open_folder(folder).step}, by mdt_jax",
        files=hub_folder.FILES,
        private=args.private,
    )
