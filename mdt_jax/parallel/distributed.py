"""The processes of a job: joining them, agreeing among them, and ending all when one fails.

JAX ends every process within `HEARTBEAT_TIMEOUT` of one falling silent. This module adds what JAX
leaves to its users: a process that fails and can say why tells the others.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from absl import logging as absl_logging
from orbax.checkpoint import multihost

from mdt_jax.parallel.command import UNREAD

# Seconds after which a silent peer counts as dead; JAX's default of 100 is slow to notice one.
HEARTBEAT_TIMEOUT = 30
_GATHER_TIMEOUT_MS = 20 * 60 * 1000  # one process may verify a large checkpoint meanwhile
_FAILURE = "mdt_jax/failure"  # the key under which the first process to fail says why
_WATCH_SECONDS = 1.0
_TELL_SECONDS = 5.0
_WAIT_MS = 2 * 60 * 60 * 1000  # the others' wait while process 0 reads or joins tens of gigabytes
_MEETINGS = itertools.count()
_gathers = Counter()  # how often each name was used, since a key can be written only once


def is_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this process is one of several."""
    for variable in ("OMPI_COMM_WORLD_SIZE", "JAX_NUM_PROCESSES"):
        if int(environment.get(variable) or 1) > 1:
            return True
    # A command in an allocation that srun did not start is alone.
    if "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS") or 1) > 1:
        return True
    # One or several Cloud TPU slices of several hosts.
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return len(workers) > 1 or "MEGASCALE_COORDINATOR_ADDRESS" in environment


def initialize_distributed(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the processes of a job with `jax.distributed.initialize`; does nothing if alone.

    It is every command's first call. JAX recognises SLURM, Open MPI and TPU slices. Elsewhere
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID describe the job.

    Raises:
      ValueError: JAX_NUM_PROCESSES without the two others.
    """
    # At absl's INFO level this logger lists at length the accelerators that are not there.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    if not is_cluster(environment):
        return
    explicit = {}
    if int(environment.get("JAX_NUM_PROCESSES") or 1) > 1:
        for variable in ("JAX_COORDINATOR_ADDRESS", "JAX_PROCESS_ID"):
            if not environment.get(variable):
                raise ValueError(f"JAX_NUM_PROCESSES is set, {variable} is not")
        explicit = {
            "coordinator_address": environment["JAX_COORDINATOR_ADDRESS"],
            "num_processes": int(environment["JAX_NUM_PROCESSES"]),
            "process_id": int(environment["JAX_PROCESS_ID"]),
        }
    jax.distributed.initialize(**explicit, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT)
    _start_watching()


def gather_json(name: str, value: Any) -> list[Any]:
    """The JSON values of all processes, in their order; `[value]` if there is one process.

    All processes call it with the same name, equally often, and wait for each other. The values
    travel through JAX's coordination service: nothing is compiled, and any thread may call it.

    Args:
      name: names the exchange.
      value: this process's JSON value.
    """
    if jax.process_count() == 1:
        return [value]
    client, count = _client(), jax.process_count()
    key = f"mdt_jax/gather/{name}/{_gathers[name]}"
    _gathers[name] += 1
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value))
    client.wait_at_barrier(key, _GATHER_TIMEOUT_MS)
    values = {path.rpartition("/")[2]: text for path, text in client.key_value_dir_get(key)}
    return [json.loads(values[str(process)]) for process in range(count)]


def check_agreement(value: Mapping[str, Any]) -> None:
    """Refuses, with ValueError, processes of one job that have different values.

    Args:
      value: this process's JSON values by key; nested mappings are compared key by key.
    """
    first, *others = gather_json("agreement", _flat(value))
    differences = [
        f"{key} is {_short(other.get(key))} on process {process}, {_short(first.get(key))} on "
        "process 0"
        for process, other in enumerate(others, start=1)
        for key in sorted(first.keys() | other.keys())
        if first.get(key) != other.get(key)
    ]
    if differences:
        more = f" ({len(differences)} differences)" if len(differences) > 3 else ""
        raise ValueError(
            f"the processes of this job differ: {'; '.join(differences[:3])}{more}; start all of "
            "them with the same flags, and give each the same data"
        )


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """A context for the body of a command: in a job, an error on one process ends all of them.

    See `end_the_others`.
    """
    try:
        yield
    except BaseException as error:
        end_the_others(error)
        raise


def end_the_others(error: BaseException) -> None:
    """Ends the job that this process is of, if it is of one, when an error ends this process.

    The others may wait for the failed process in a collective that nothing can interrupt, and on
    leaving it would wait for them. So it tells them why, and exits at once, with status 1.
    """
    # `sys.exit()` and `sys.exit(0)` are not failures.
    if not joined() or (isinstance(error, SystemExit) and not error.code):
        return
    if isinstance(error, SystemExit):
        message = str(error.code).removeprefix("error: ")
        message = "its output is no longer read" if error.code == UNREAD else message
    else:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    fail(message)


def leave(status: int = 0) -> NoReturn:
    """Ends this process with a status, from any thread; with 0 once all processes have called it.

    It waits for no thread of this process.
    """
    if joined() and status == 0:
        jax.distributed.shutdown()
    _exit(status)


def joined() -> bool:
    """Whether this process is one of a job of several that `initialize_distributed` joined."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _client() -> Any:
    """JAX's client of its coordination service, for which JAX has no public name."""
    from jax._src import distributed

    return distributed.global_state.client


def post(name: str, value: Any) -> None:
    """Leaves a JSON value for the other processes, in place of this process's last of that name.

    It waits for no other process, but for the service; any thread may call it, in a job of several.
    """
    path = f"mdt_jax/post/{name}/{jax.process_index()}"
    _client().key_value_set(path, json.dumps(value), allow_overwrite=True)


def posts(name: str) -> dict[int, Any]:
    """The last values of a name that processes have left with `post`, by process."""
    found = _client().key_value_dir_get(f"mdt_jax/post/{name}/")
    return {int(path.rpartition("/")[2]): json.loads(text) for path, text in found}


def fail(message: str) -> NoReturn:
    """Ends this process at once, from any thread, with status 1 and a message of one line.

    In a job it tells the others why, which end, too.
    """
    if not joined():
        print(f"error: {message}", file=sys.stderr)
        _exit(1)
    me, others = jax.process_index(), jax.process_count() - 1
    if _is_about_a_peer(message):
        # The peer's reason may be on its way here; then the watching thread ends this process.
        time.sleep(3 * _WATCH_SECONDS)
        message = f"lost another process of the job, which died or failed before ({message})"
    # A service that hangs must not keep this process.
    teller = threading.Thread(target=_tell, args=(f"{me} {message}",), daemon=True)
    teller.start()
    teller.join(_TELL_SECONDS)
    print(f"error: process {me}: {message}; ending the {others} other(s)", file=sys.stderr)
    if me == 0:
        # The service ends with this process: let the others read first.
        time.sleep(3 * _WATCH_SECONDS)
    _exit(1)


def _tell(failure: str) -> None:
    with contextlib.suppress(Exception):  # another was first, or the service is gone
        _client().key_value_set(_FAILURE, failure)


def _is_about_a_peer(message: str) -> bool:
    """Whether an error's text says that another process went away."""
    signs = ("closed by peer", "Connection reset", "Connection refused", "Broken pipe", "UNAVAILAB")
    return any(sign in message for sign in signs)


def _start_watching() -> None:
    """Starts a thread that ends this process when another fails; it ends before Python does."""
    done = threading.Event()
    thread = threading.Thread(
        target=_end_with_the_others, args=(done,), name="watch_for_failure", daemon=True
    )

    def stop_watching() -> None:
        done.set()
        thread.join()

    thread.start()
    atexit.register(stop_watching)


def _end_with_the_others(done: threading.Event) -> None:
    # A blocking read would be simpler, but nothing can interrupt it when this process ends.
    while not done.wait(_WATCH_SECONDS):
        try:
            failure = _client().key_value_try_get(_FAILURE)
        except Exception as error:
            if "NOT_FOUND" in str(error):
                continue
            return  # the service has ended, and JAX ends this process
        process, _, message = failure.partition(" ")
        if int(process) != jax.process_index():
            print(f"error: process {process} of the job failed: {message}", file=sys.stderr)
            _exit(1)
        return


def _exit(status: int) -> NoReturn:
    """Ends this process without waiting for threads or other processes, unlike `sys.exit`."""
    absl_logging.flush()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(status)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, inner in value.items():
        name = f"{prefix}{key}"
        flat |= _flat(inner, f"{name}.") if isinstance(inner, Mapping) else {name: inner}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def by_first_process(work: Callable[[], Any]) -> Any:
    """Has process 0 do work, and returns its result on every process.

    All processes call this in the same order, and wait for process 0.

    Args:
      work: returns a JSON value.

    Raises:
      ValueError: `work` failed; process 0 raises the error itself.
    """
    if jax.process_count() == 1:
        return work()
    outcome, failure = {}, None
    if jax.process_index() == 0:
        try:
            outcome = {"value": work()}
        except Exception as error:
            outcome, failure = {"error": str(error)}, error
    wait = multihost.get_barrier_sync_fn(processes=set(range(jax.process_count())))
    wait(key=f"by_first_process {next(_MEETINGS)}", timeout_ms=_WAIT_MS)
    outcome = gather_json("by_first_process", outcome)[0]
    if failure is not None:
        raise failure
    if "error" in outcome:
        raise ValueError(outcome["error"])
    return outcome["value"]
