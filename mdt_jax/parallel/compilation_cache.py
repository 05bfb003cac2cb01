"""Compilation: programs are kept on disk, and one that takes minutes is no alarm.

Kept, so that a command's second start compiles almost nothing. This is JAX's own persistent cache,
turned on by default. Its keys depend on the program, XLA's flags and version, and the devices.
Process 0 alone writes it.
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import jax
from absl import logging

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_FATAL = 3  # in absl's numbers for C++
MIN_COMPILE_SECONDS = 0.2  # programs that compile in less are not kept: reading takes as long


def use_compilation_cache(environment: Mapping[str, str] = os.environ) -> None:
    """Keeps compiled programs in `cache_folder()`, or in the folder of JAX_COMPILATION_CACHE_DIR.

    Set to "", the variable turns the cache off. Call this after `initialize_distributed` and before
    the first compilation. Several processes on CPUs, which only tests run, keep no programs: one
    that a process reads and one that another compiles may differ in the last bit.

    Args:
      environment: the environment variables.
    """
    silence_alarm()
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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)


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
