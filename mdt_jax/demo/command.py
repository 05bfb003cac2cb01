"""The command `python -m mdt_jax.demo`, from its flags to the page that is served."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from absl import flags, logging

from mdt_jax import checkpoints, sampling
from mdt_jax import config as config_lib
from mdt_jax.data.sources import create_source
from mdt_jax.data.transforms import center_crop
from mdt_jax.demo.defaults import first_requests
from mdt_jax.demo.engine import Engine
from mdt_jax.demo.flags import LOOPBACK
from mdt_jax.demo.limits import Limits
from mdt_jax.demo.line import Line
from mdt_jax.demo.requests import Surroundings
from mdt_jax.parallel import sharding
from mdt_jax.parallel.command import UserError, command_ending, one_line
from mdt_jax.parallel.compilation_cache import use_compilation_cache
from mdt_jax.parallel.distributed import initialize_distributed
from mdt_jax.sample.command import FLAGS_OF_KEYS, load_models

# Data sets that are small and at hand, of which the page shows real pictures.
_AT_HAND = ("digits", "fashion_mnist")
_DATA_PICTURES = 20
_END_SECONDS = 4.0  # that the line has to end in, before the process leaves it
_TELL_SECONDS = 1.0  # in which Gradio sends those who wait why they are left


def main(_: list[str]) -> None:
    """The command."""
    f = flags.FLAGS
    line = functools.partial(one_line, flags_of_keys=FLAGS_OF_KEYS)
    with command_ending(f, message=line, interrupted="stopped"):
        serve(f)


def serve(f: flags.FlagValues) -> None:
    """Loads the model, compiles its programs, and serves the page until it is told to stop.

    Raises:
      ValueError, CheckpointError: flags or a model that cannot be.
      UserError: Gradio is not installed.
    """
    check_installed()
    port = free_port(f.host, f.port)
    initialize_distributed()
    if jax.process_count() > 1:
        raise ValueError("the demo is one process; this job has more")
    use_compilation_cache()
    engine = load_engine(f, sharding.create_mesh(fsdp=f.mesh_fsdp, tensor=f.mesh_tensor))
    engine.warm_up(first_requests(engine.around), lambda text: print(text, file=sys.stderr))
    with told_to_stop() as stop, gradio_folder():
        line = Line(engine.around.limits.waiting)
        page = open_page(engine, line, f.host, port)
        stop.wait()
        print("stopping", file=sys.stderr)
        line.close("the server is stopping", _END_SECONDS)
        time.sleep(_TELL_SECONDS)
        page.close(verbose=False)
    _leave()


def check_installed() -> None:
    """Refuses to begin without Gradio, with UserError; says how to install it."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            'the page needs Gradio: pip install "mdt-jax[demo]" (in a clone: ".[demo]")'
        )


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0.

    Raises:
      OSError: the port or the address cannot be had; one line.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            held.bind((host, port))
        except OSError as error:
            why = error.strerror or str(error)
            raise OSError(
                f"--host {host} --port {port} cannot be served ({why}); give others, such as "
                "--port 0, which takes one that is free"
            ) from None
        return held.getsockname()[1]


def load_engine(f: flags.FlagValues, mesh: jax.sharding.Mesh) -> Engine:
    """The flags' model with its autoencoder, as the engine."""
    if bool(f.workdir) == bool(f.checkpoint):
        raise ValueError("give --workdir, a run, or --checkpoint, a file of PyTorch weights")
    model, params, autoencoder = load_models(f, mesh)
    if autoencoder is None and model.network.in_channels not in (1, 3):
        raise ValueError(
            f"{f.workdir or f.checkpoint}: {model.name} makes latents, of "
            f"{model.network.in_channels} channels; give "
            "--vae, the autoencoder that makes pictures of them (--vae ema)"
        )
    limits = Limits(f.most_pictures, f.most_steps, waiting=f.most_waiting)
    around = Surroundings(model, autoencoder, limits, data_pictures(f, model))
    about = {"model": model.name, "step": model.step, "ema_rate": f.ema_rate, "vae": f.vae}
    return Engine(around, params, mesh, about)


def data_pictures(
    f: flags.FlagValues, model: sampling.DiffusionModel
) -> tuple[tuple[np.ndarray, int], ...]:
    """Some of a run's own data, if they are pixels and at hand; their absence is no fault."""
    if not f.workdir:
        return ()
    _, meta = checkpoints.read_meta(f.workdir, model.step)
    config = config_lib.from_json(meta["config"])
    if config.data.name not in _AT_HAND or f.vae:
        return ()
    try:
        source = create_source(config.data)
        # Spread over the data, which may be sorted by class.
        rows = np.linspace(0, len(source) - 1, _DATA_PICTURES).astype(int).tolist()
        examples = [source[row] for row in rows]
    except (ValueError, OSError) as error:
        logging.warning("no pictures of the data are shown: %s", one_line(error))
        return ()
    size = model.network.input_size
    return tuple((center_crop(e["image"], size), int(e["label"])) for e in examples)


def open_page(engine: Engine, line: Line, host: str, port: int) -> Any:
    """Serves the page; says where, and who can see it."""
    from starlette.middleware import Middleware

    from mdt_jax.demo import guard
    from mdt_jax.demo.page import build_page, launch

    limits = engine.around.limits
    page = build_page(engine, line)
    address = launch(page, host, port, [Middleware(guard.Guard, limits.body_bytes)])
    if host not in LOOPBACK:
        print(
            f"--host {host}: whoever reaches port {port} of this machine can use the page and its "
            "devices; there is no password and no encryption",
            file=sys.stderr,
        )
    print(f"ready: {address}", flush=True)
    return page


@contextmanager
def told_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set; a second Ctrl-C ends the process at once."""
    stop = threading.Event()
    before = {}

    def handle(number: int, _: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            os._exit(130)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def gradio_folder() -> Iterator[str]:
    """A folder of Gradio's own files, which it writes nowhere else, removed at the end."""
    from mdt_jax.demo.guard import quiet_environment

    folder = tempfile.mkdtemp(prefix="mdt_jax_demo_")
    quiet_environment(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _leave() -> None:
    """Ends the process with status 0, also where a thread is compiling, which nothing stops."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
