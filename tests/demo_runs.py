"""Runs and servers for the tests of the demo: a trained model of the digits, in a process."""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jobs import xla_flags
from PIL import Image

from configs.digits_inpainting import get_config
from mdt_jax import checkpoints
from mdt_jax import config as config_lib
from mdt_jax.convert.transformers import from_torch
from mdt_jax.weights import files as weight_files

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "tests" / "data" / "inpainting_digits.safetensors"


def save_digits_run(workdir: Path) -> None:
    """A run of configs/digits_inpainting.py with its trained average, as training leaves one."""
    config = get_config()
    config.sample.update(steps=50)
    network = config_lib.create_network(config)
    weights = weight_files.read_weights(WEIGHTS)
    params = from_torch(
        {name: weights[name].astype(np.float32) for name in weights},
        family="MDTv2",
        depth=network.depth,
        num_heads=network.num_heads,
        decoder_depth=network.decoder_depth,
    )
    averages = {f"ema_{rate:g}": params for rate in config.ema_rates}
    store = checkpoints.Checkpoints(workdir)
    meta = {"config": config_lib.to_json(config), "class_names": [str(d) for d in range(10)]}
    store.save(config.num_steps, {"state": {"params": params}} | averages, meta)
    store.close()


class Server:
    """`python -m mdt_jax.demo` in a process of its own, on a free port.

    Attributes:
      address: "http://127.0.0.1:PORT".
      folder: its TMPDIR, where it writes.
      lines: what it has said.
    """

    def __init__(self, workdir: Path, folder: Path, *arguments: str):
        folder.mkdir()
        self.folder, self.lines = folder, []
        environment = {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "TMPDIR": str(folder),
            "XLA_FLAGS": xla_flags(1),
            "JAX_COMPILATION_CACHE_DIR": os.environ.get(
                "JAX_COMPILATION_CACHE_DIR", str(workdir.parent / "compiled")
            ),
            "no_proxy": "*",
        }
        command = [sys.executable, "-m", "mdt_jax.demo", "--workdir", workdir, "--port", "0"]
        self.process = subprocess.Popen(
            [*map(str, command), *arguments],
            cwd=folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._ready = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._ready.wait(900) or self.process.poll() is not None:
            self.process.kill()
            raise AssertionError("\n".join(self.lines[-20:]))

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if found := re.search(r"^ready: (http://[\w.:]+)", line):
                self.address = found[1]
                self._ready.set()
        self._ready.set()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Sends a signal; the exit status, within 10 seconds."""
        self.process.send_signal(number)
        try:
            return self.process.wait(10)
        finally:
            self.process.kill()

    def memory(self) -> int:
        """Bytes of anonymous memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", text)[1]) * 1024

    def begin(self, name: str, values: list[Any]) -> str:
        """Sends a request to Gradio's API, and returns its id."""
        body = json.dumps({"data": values}).encode()
        return json.loads(self.post(f"/gradio_api/call/{name}", body))["event_id"]

    def post(self, path: str, body: bytes) -> bytes:
        """A POST of JSON; the answer's body."""
        request = urllib.request.Request(
            self.address + path, body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def events(self, name: str, event: str) -> Iterator[tuple[str, Any]]:
        """The kind and data of each of a request's messages, to the last."""
        url = f"{self.address}/gradio_api/call/{name}/{event}"
        with urllib.request.urlopen(url, timeout=120) as stream:
            kind = ""
            for line in stream:
                key, _, text = line.decode().rstrip("\n").partition(": ")
                if key == "event":
                    kind = text
                elif key == "data" and kind != "heartbeat":
                    yield kind, json.loads(text)
                    if kind in ("complete", "error"):
                        return

    def ask(self, name: str, values: list[Any]) -> tuple[str, str]:
        """Does a request: the last message's kind, and its text."""
        kind, text, seen = "lost", "", ["", ""]
        with contextlib.suppress(http.client.IncompleteRead, ConnectionError):
            for kind, data in self.events(name, self.begin(name, values)):
                if kind == "error":
                    return kind, json.dumps(data, ensure_ascii=False)
                seen = data
        return kind, "".join(str(part) for part in seen) or text


def pictures_of(page: str) -> list[bytes]:
    """The files of the finished pictures in a page's HTML."""
    found = re.findall(r'<img[^>]*src="data:image/png;base64,([^"]+)"', page)
    return [base64.b64decode(text) for text in found]


def pixels_of(png: bytes) -> np.ndarray:
    """The pixels of a PNG file."""
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture)


def data_url(picture: Image.Image | bytes, kind: str = "PNG") -> str:
    """A picture, or any bytes, as a browser sends them."""
    if not isinstance(picture, bytes):
        file = io.BytesIO()
        picture.save(file, kind)
        picture = file.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(picture).decode()}"
