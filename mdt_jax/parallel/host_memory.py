"""On a Linux CPU, a command keeps the memory of one step for the next.

XLA asks for a program's temporary memory in one piece whenever the program runs, and gives it back
after. glibc passes both on to the system, which clears every page when it is touched again; on a
virtual machine the page may have to come from the host as well. Here glibc is told to keep what is
freed (mallopt(3)), if there is room for what it then holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
from absl import logging

from mdt_jax.parallel.distributed import is_cluster

VARIABLE = "MDT_JAX_KEEP_MEMORY"  # "0" leaves the allocator as it is
# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# A freed piece does not always hold the next one of its size: glibc 2.36 asks for some bytes more
# than it needs, to align it. Its heap was seen to grow to seven pieces before it grew no more.
_PIECES = 8
_SHARE = 0.5  # of the machine's memory, that those pieces may take
CONTAINERS_LIMITS = (
    "/sys/fs/cgroup/memory.max",  # "max" where there is none
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)


class _Heap:
    """What this process has asked of its allocator, which is one for the whole process."""

    main = False  # whether programs take their memory from the main thread's heap
    kept = False


def use_main_heap(environment: Mapping[str, str] = os.environ) -> bool:
    """Lets a command's programs take memory where `keep_memory` can keep it: in the main heap.

    A program that runs in the thread that calls it takes its memory from that thread's heap, and
    only the main thread's grows beyond 64 MiB. So calls return when a program is done, not before;
    the next batch is made ready in threads of its own anyway. Several processes, and one process's
    several devices, stay as they are.

    Commands call it after `initialize_distributed` and before anything asks for devices. It does
    nothing without a CPU's devices or glibc; where the user has set the allocator (MALLOC_*,
    glibc.malloc in GLIBC_TUNABLES, another one by LD_PRELOAD); or if MDT_JAX_KEEP_MEMORY is 0.

    Args:
      environment: the environment variables.

    Returns:
      Whether it was done.
    """
    if environment.get(VARIABLE) == "0" or _divided(environment) or _glibc() is None:
        return False
    if theirs := users_settings(environment):
        logging.info("memory: %s decides what is kept between steps", theirs)
        return False
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    _Heap.main = jax.default_backend() == "cpu"
    return _Heap.main


def keep_memory(temporaries: int | None) -> bool:
    """Keeps from now on what this process frees, if `use_main_heap` was done and there is room.

    The process then holds, until it ends, up to several times the temporary memory of a program.

    Args:
      temporaries: bytes of temporary memory of a program that runs again and again; None if
        unknown.

    Returns:
      Whether memory is kept.
    """
    if not _Heap.main or temporaries is None or _PIECES * temporaries > _SHARE * memory():
        return False
    if not _Heap.kept:
        # Pieces of any size come from the heap, and the heap is never made smaller.
        _Heap.kept = _mallopt({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1})
        if _Heap.kept:
            logging.info("memory that a step frees is kept for the next (%s=0: not)", VARIABLE)
    return _Heap.kept


def _divided(environment: Mapping[str, str]) -> bool:
    """Whether this process is one of several, or its CPU is asked to be several devices."""
    forced = "xla_force_host_platform_device_count" in environment.get("XLA_FLAGS", "")
    return is_cluster(environment) or forced or jax.config.jax_num_cpu_devices > 1


def users_settings(environment: Mapping[str, str]) -> str | None:
    """The first environment variable by which the user decides how memory is allocated."""
    for name, value in environment.items():
        if name.startswith("MALLOC_") or (name == "GLIBC_TUNABLES" and "glibc.malloc." in value):
            return name
        if name == "LD_PRELOAD" and "malloc" in value:  # jemalloc, tcmalloc, mimalloc
            return name
    return None


def memory(limits: Sequence[str | Path] = CONTAINERS_LIMITS) -> int:
    """The bytes of memory of this machine, or of the container that this process is in.

    Args:
      limits: files of which the first that holds a number is the container's limit.
    """
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in limits:
        with contextlib.suppress(OSError, ValueError):
            return min(machine, int(Path(file).read_text()))
    return machine


def _mallopt(settings: Mapping[int, int]) -> bool:
    """Sets parameters of glibc's allocator; False if there is none, or it refuses one."""
    library = _glibc()
    return library is not None and all(
        [library.mallopt(name, value) for name, value in settings.items()]
    )


def _glibc() -> ctypes.CDLL | None:
    """This process's C library, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "gnu_get_libc_version") else None
