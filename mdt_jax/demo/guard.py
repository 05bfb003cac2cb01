"""What stands before the page's server: no large requests, and nothing from other hosts."""

from __future__ import annotations

import logging as std_logging
import os
import sys
from typing import Any

from absl import logging

from mdt_jax.parallel.command import one_line

# Gradio's services that the page has no use for: files and other hosts through the server.
CLOSED = (
    "/upload",
    "/file",
    "/proxy",
    "/stream",
    "/deep_link",
    "/custom_component",
    "/dev",
    "/run-history",
)
# The browser loads from this server alone. Gradio compiles a page's scripts by `eval`.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]


class Guard:
    """A layer of the server (ASGI) that refuses requests by their address and size.

    A body that is too large is not read to its end, whether or not it says its length.
    """

    def __init__(self, app: Any, most_bytes: int):
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix("/gradio_api")
        if path.startswith(CLOSED):
            await _answer(send, 404, "there is nothing here")
            return
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if not said.isdigit() or int(said) > self._most:
            await _answer(send, 413, self._too_large())
            return
        read, begun, over = 0, False, False

        async def receive_some() -> dict:
            nonlocal read, over
            message = await receive()
            if message["type"] == "http.request":
                read += len(message.get("body", b""))
                if read > self._most:
                    over = True
                    return {"type": "http.disconnect"}
            return message

        async def send_with_headers(message: dict) -> None:
            nonlocal begun
            if over:
                return
            if message["type"] == "http.response.start":
                begun = True
                message = message | {"headers": [*message["headers"], *_HEADERS]}
            await send(message)

        try:
            await self._app(scope, receive_some, send_with_headers)
        except Exception as failure:  # a malformed request's, of which the server prints a page
            if not over:
                logging.warning("a request failed: %s", one_line(failure)[:300])
        if over and not begun:
            await _answer(send, 413, self._too_large())
        elif not begun:
            await _answer(send, 500, "the server cannot answer this request")

    def _too_large(self) -> str:
        return f"the request is larger than {self._most / 2**20:.0f} MiB"


async def _answer(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *_HEADERS]})
    await send({"type": "http.response.body", "body": text.encode() + b"\n"})


class OneLine:
    """Stands for the module `traceback` in Gradio's, which print one for a malformed request."""

    @staticmethod
    def print_exc(*_: Any, **__: Any) -> None:
        """Logs the exception that is being handled, in one line."""
        failure = sys.exc_info()[1]
        if isinstance(failure, Exception):
            logging.warning("a request was refused: %s", one_line(failure)[:300])


def quiet_environment(folder: str) -> None:
    """Settings of Gradio's that it reads when it is imported: it asks nobody, and writes here.

    Args:
      folder: where its files go.
    """
    # Gradio asks itself whether it is there, which httpx reports.
    for name in ("httpx", "httpx2"):
        std_logging.getLogger(name).setLevel(std_logging.WARNING)
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=folder,
        GRADIO_CACHE_DIR=folder,
        GRADIO_NUM_PORTS="1",
        GRADIO_ANALYTICS_MAX_EVENTS="100",
        HF_HUB_DISABLE_TELEMETRY="1",
    )
