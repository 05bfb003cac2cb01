"""Compilation: programs are kept on disk, and one that takes minutes is no alarm.

Kept, so that a command's second start compiles almost nothing. This is JAX's own persistent cache,
turned on by default. Its keys depend on the program, XLA's flags and version, and the devices: on
no workdir, host or process, so that hosts which share the folder share the programs. On GPUs they
depend on the folder's path, too. Process 0 alone writes it. CPUs are an exception: JAX's
description of a job's CPUs, a part of the key, differs from process to process, and the others find
nothing.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_FATAL = 3  # in absl's numbers for C++
_SECONDS_VARIABLE = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
# JAX's names of events: a program was asked of the compiler or the cache, it was in the cache.
_ASKED, _READ = "/jax/core/compile/backend_compile_duration", "/jax/compilation_cache/cache_hits"
_heard: Counter[str] = Counter()
MIN_COMPILE_SECONDS = 0.2  # programs that compile in less are not kept: reading takes as long


def use_compilation_cache(environment: Mapping[str, str] = os.environ) -> None:
    """Keeps compiled programs in `cache_folder()`, or in the folder of JAX_COMPILATION_CACHE_DIR.

    Set to "", the variable turns the cache off. Call this after `initialize_distributed` and before
    the first compilation. Several processes on CPUs, which only tests run, keep no programs:
    process 0 would read what the others compile (see above), which may differ in the last bit.

    Args:
      environment: the environment variables.
    """
    silence_alarm()
    _listen()
    if jax.default_backend() != "gpu":
        # Where the compiler for GPUs would keep its timings, in this folder, is a part of all keys.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    on_cpus = jax.default_backend() == "cpu" and jax.process_count() > 1
    if environment.get(VARIABLE) == "" or on_cpus:
        jax.config.update("jax_enable_compilation_cache", False)
        return
    try:
        folder = environment.get(VARIABLE) or str(cache_folder(environment))
    except RuntimeError:
        logging.info("no home folder: compiled programs are not kept; %s names one", VARIABLE)
        return
    jax.config.update("jax_compilation_cache_dir", folder)
    if _SECONDS_VARIABLE not in environment:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_listener(_hear)
    jax.monitoring.register_event_duration_secs_listener(_hear_duration)


def folder_in_use() -> str:
    """The folder of `use_compilation_cache`; empty where no programs are kept."""
    known = jax.config.values
    kept = known["jax_enable_compilation_cache"] and known["jax_compilation_cache_dir"]
    return str(kept or "")


def programs() -> tuple[int, int]:
    """How many programs this process has compiled since `use_compilation_cache`, and read instead.

    Programs that were too quick to compile to be kept are compiled again at each start.
    """
    return _heard[_ASKED] - _heard[_READ], _heard[_READ]


def _hear(event: str, **_: Any) -> None:
    _heard[event] += event == _READ


def _hear_duration(event: str, seconds: float, **_: Any) -> None:
    _heard[event] += event == _ASKED


def silence_alarm() -> None:
    """Keeps from people that XLA, after two minutes of compiling, logs "Very slow compile?".

    It logs that as an error, and minutes are usual for large models. Of XLA on CPUs in a process
    alone, whose other errors JAX raises; in a job, and on devices whose plugins log themselves,
    what XLA logs says why a peer or a device was lost.
    """
    from jax._src.lib import utils  # the level of C++'s log has no public name

    if jax.default_backend() == "cpu" and jax.process_count() == 1:
        utils.absl_set_min_log_level(_FATAL)


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """The folder of compiled programs: ~/.cache/mdt_jax/xla/PROCESSOR, or under XDG_CACHE_HOME.

    Programs for CPUs are machine code for one kind of processor, and JAX's keys say only "cpu". So
    each kind has its own folder, where several machines share a home.

    Raises:
      RuntimeError: there is no home folder.
    """
    home = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mdt_jax" / "xla" / processor_digest()


def processor_digest(cpuinfo: str | Path = "/proc/cpuinfo") -> str:
    """A short name for this kind of processor, from its architecture and instruction sets."""
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = ("model name", "flags", "Features")
    features = [next((line for line in lines if line.startswith(name)), "") for name in names]
    text = "\n".join([platform.machine(), *features])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
