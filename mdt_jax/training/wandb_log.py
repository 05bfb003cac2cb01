"""A run at Weights & Biases: the lines of metrics.jsonl and the grids of samples, once each.

`WORKDIR/wandb.json` keeps the id of the run there, and the last step that each metric was sent of.
So a resumed run goes on in the same run, steps that are done again after a kill are not sent twice,
and what was not sent (a run that began without it, a network that was away) is sent with the next
start. Nothing that goes wrong there ends the training: one line says it.

The step is a metric like others, "step", by which all are drawn: W&B's own count of lines can only
grow, and a line of a step that came before would be lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jaxtyping import UInt8
from ml_collections import ConfigDict

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.names import printable
from mdt_jax.basics.places import read_text

RECORD = "wandb.json"  # in the workdir
DEFAULT_PROJECT = "mdt_jax"
# Seconds for W&B to answer at the start, and to take what is left at the end: a scheduler that
# stops a run does not wait for longer.
START_SECONDS, END_SECONDS = 60.0, 20.0
_PROJECT = re.compile(r"[^/\\#?%:]{1,128}")


def project_of(config: ConfigDict) -> str:
    """The project that a run is to be in, empty if it is not to be at W&B.

    Raises:
      ValueError: a name that W&B does not take.
    """
    project = config.log.wandb
    if not project:
        return ""
    if project is True:
        return DEFAULT_PROJECT
    good = isinstance(project, str) and _PROJECT.fullmatch(project)
    if not (good and project.strip() and project.isprintable()):
        raise ValueError(
            f"log.wandb {printable(repr(project))} is no name of a project of Weights & Biases: it "
            "takes 1 to 128 characters, none of them / \\ # ? % or :, or True, or False"
        )
    return project


class WandbLog:
    """The run at Weights & Biases of one workdir.

    WANDB_MODE (offline), WANDB_ENTITY, WANDB_NAME, WANDB_TAGS and the others are W&B's own.
    """

    def __init__(self, config: ConfigDict, workdir: str | os.PathLike):
        """Begins the run, or goes on with the workdir's.

        Args:
          config: the run's settings, which W&B shows.
          workdir: its folder.
        """
        self._path = Path(workdir) / RECORD
        project = project_of(config)
        record = _read(self._path)
        if record.get("project") != project:  # ids are a project's
            record = {"project": project, "id": uuid.uuid4().hex[:12], "logged": {}}
        self._record = record
        self._run: Any = None
        # The id is kept before the run has it: after a kill in between, the next start takes it.
        self._keep()
        self._attempt(lambda: self._begin(config, Path(workdir)), "is not used")

    @classmethod
    def asked_for(cls, config: ConfigDict, workdir: str | os.PathLike) -> WandbLog | None:
        """The log of a run; None if its config asks for none, or on processes other than 0."""
        return cls(config, workdir) if project_of(config) and jax.process_index() == 0 else None

    def catch_up(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Sends the lines of metrics.jsonl that were not sent."""
        for line in lines:
            values = {name: value for name, value in line.items() if name != "step"}
            self.write(line["step"], {name: _number(value) for name, value in values.items()})

    def write(self, step: int, values: Mapping[str, float | str]) -> None:
        """Sends the metrics of a step, and texts, but for those that were sent.

        Args:
          step: steps done.
          values: by name.
        """
        self._send(step, values)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "h w c"]) -> None:
        """Sends an image of a step, C 1 (grey) or 3 (RGB), if it was not sent."""

        def made() -> Any:
            import wandb

            pixels = image[..., 0] if image.shape[-1] == 1 else image
            return wandb.Image(np.ascontiguousarray(pixels), caption=f"step {step}, synthetic")

        self._send(step, {name: made})

    def close(self) -> None:
        """Ends the run there, for now; may be called twice."""
        run, self._run = self._run, None
        if run is None:
            return
        failed = sys.exc_info()[0] is not None
        self._attempt(lambda: run.finish(exit_code=int(failed)), "did not end as it should")

    def _begin(self, config: ConfigDict, workdir: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise RuntimeError("it is not installed: pip install -e '.[wandb]'") from None
        mode = os.environ.get("WANDB_MODE", "online")
        # Without a key it would ask for one, and the run would wait for an answer.
        if mode == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError(
                "there is no key: run wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline"
            )
        self._run = wandb.init(
            project=self._record["project"],
            id=self._record["id"],
            name=os.environ.get("WANDB_NAME") or workdir.resolve().name,
            config=json.loads(config.to_json()),
            dir=workdir,
            resume="allow",
            reinit="create_new",  # beside a run that this process may have already, as a notebook
            allow_val_change=True,
            settings=wandb.Settings(
                console="off", silent=True, init_timeout=START_SECONDS, finish_timeout=END_SECONDS
            ),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        place = f"offline, in {workdir}/wandb; wandb sync sends it"
        if not self._run.offline:
            place = f"at {self._run.url}"
        logging.info("Weights & Biases: run %s, %s", self._run.id, place)

    def _send(self, step: int, values: Mapping[str, Any]) -> None:
        logged = self._record["logged"]
        new = {name: value for name, value in values.items() if step > logged.get(name, -1)}
        if self._run is None or not new:
            return

        def send() -> None:
            made = {name: value() if callable(value) else value for name, value in new.items()}
            self._run.log({"step": step} | made)
            logged.update(dict.fromkeys(new, step))
            self._keep()

        self._attempt(send, "takes no more")

    def _keep(self) -> None:
        """Writes the record; on a full disk the next one is written."""
        with contextlib.suppress(OSError), whole_file(self._path) as file:
            file.write(json.dumps(self._record, indent=2).encode() + b"\n")

    def _attempt(self, call: Callable[[], None], what: str) -> None:
        """Calls W&B; an error is told in one line, and ends the logging there, not the run."""
        try:
            call()
        except Exception as error:  # its own, and those of its connections
            self._run = None
            _leave()
            said = printable(" ".join(str(error).split())) or type(error).__name__
            logging.warning(
                "Weights & Biases %s: %s; training goes on, and metrics.jsonl has all",
                *(what, said[:300]),
            )


def _leave() -> None:
    """Takes leave of a W&B that failed, which would print a traceback when the process ends.

    Not where the process has another run there, which may be well.
    """
    library: Any = sys.modules.get("wandb")
    with contextlib.suppress(Exception):
        if library.run is None:
            library.teardown(exit_code=1)


def _number(value: Any) -> Any:
    """A value of metrics.jsonl, where numbers that are not finite are texts."""
    return float(value) if value in ("nan", "inf", "-inf") else value


def _read(path: Path) -> dict[str, Any]:
    """The record of a workdir, {} where there is none that can be read."""
    try:
        record = json.loads(read_text(path))
        good = isinstance(record["id"], str) and isinstance(record["project"], str)
        good = good and re.fullmatch(r"[\w-]{1,64}", record["id"], re.ASCII)
        steps = record["logged"].items()
        if good and all(isinstance(step, int) for _, step in steps):
            return record
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    logging.warning("%s cannot be read; a new run of Weights & Biases begins", path)
    return {}
