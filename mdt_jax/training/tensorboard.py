"""A run's metrics and images as events for TensorBoard, in `WORKDIR/tensorboard`."""

import functools
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from absl import logging
from jaxtyping import UInt8
from tensorboardX import SummaryWriter


class EventLog:
    """Writes events for TensorBoard; a thread brings them to the disk within a second.

    Events that find no room are let go, with one warning: metrics.jsonl has the numbers.
    """

    def __init__(self, workdir: str | os.PathLike, resume_step: int = 0):
        """Begins a file of events.

        Args:
          workdir: the run's folder.
          resume_step: steps done; events of later steps are hidden, as this run writes them again.
        """
        self._events = SummaryWriter(
            os.path.join(workdir, "tensorboard"),
            # TensorBoard hides earlier events whose step is at least this one.
            purge_step=resume_step + 1,
            # TensorBoard names files by the second and overwrites them: without a suffix a run
            # resumed within a second would erase the file of the run before.
            filename_suffix=f".{time.time_ns()}",
            flush_secs=1,
        )
        _let_events_go(self._events)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a scalar for each of the values by name."""
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Adds an image, C 1 (grey) or 3 (RGB)."""
        self._events.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Writes pending events and closes the file."""
        self._events.close()


def _let_events_go(events: SummaryWriter) -> None:
    """Lets TensorBoard's events go where they find no room, with one warning.

    Their thread would end at the first error, and `add_scalar` wait for it for ever.
    """
    writer = getattr(events.file_writer.event_writer, "_ev_writer", None)  # tensorboardX's own
    warned = []

    def tolerant(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def attempt(*arguments: Any) -> Any:
            try:
                return call(*arguments)
            except OSError as error:
                if not warned:
                    warned.append(error)
                    logging.warning("TensorBoard's events cannot be written: %s", error)

        return attempt

    for name in ("write_event", "flush", "close") if writer else ():
        setattr(writer, name, tolerant(getattr(writer, name)))
