"""Programs compiled once are kept on disk: the second start of a command compiles next to nothing.

JAX's own persistent cache, on by default here. Its keys are of the program, the flags and versions
of XLA, and the devices; process 0 alone writes.
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
MIN_COMPILE_SECONDS = 0.2  # what compiles faster than it is read is not kept


def use_compilation_cache(environment: Mapping[str, str] = os.environ) -> None:
    """Keeps compiled programs in `cache_folder()`.

    JAX_COMPILATION_CACHE_DIR names another; set to "", it turns the cache off. To be called after
    `initialize_distributed`, before the first compilation. Several processes on CPUs, which only
    tests run, keep none: what one found there and another compiled would have to be the same to the
    last bit.
    """
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


def cache_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """~/.cache/mdt_jax/xla/PROCESSOR, or under XDG_CACHE_HOME.

    Programs for CPUs are machine code for the very processor, of which JAX's keys say only "cpu":
    in a home that several machines share, each kind has a folder of its own.
    """
    home = environment.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mdt_jax" / "xla" / processor_digest()


def processor_digest(cpuinfo: str | Path = "/proc/cpuinfo") -> str:
    """A short name for this kind of processor: of its architecture and instruction sets."""
    try:
        lines = Path(cpuinfo).read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = ("model name", "flags", "Features")
    features = [next((line for line in lines if line.startswith(name)), "") for name in names]
    text = "\n".join([platform.machine(), *features])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
