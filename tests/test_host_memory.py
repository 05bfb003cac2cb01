"""A command on a Linux CPU keeps what a step frees, unless the user or the machine disagrees."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mdt_jax.parallel import host_memory

ROOT = Path(__file__).parents[1]
# Prints whether the main heap is used, whether memory is kept, and the pages that the last of
# several runs of a program touched anew: it has a piece of 64 MiB, 16,384 small pages.
PROGRAM = """
import resource
import jax
import jax.numpy as jnp
from mdt_jax.parallel.host_memory import keep_memory, use_main_heap

def product(x):
    y = jax.lax.optimization_barrier(jnp.exp(x[:, None] * x[None]))
    return (y + y[:1]).sum(0)

heap = use_main_heap()
x = jnp.zeros(4096)
program = jax.jit(product).lower(x).compile()
piece = program.memory_analysis().temp_size_in_bytes
assert piece >= 4096 * 4096 * 4
kept = keep_memory(piece)
touched = []
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    touched.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(heap, kept, min(touched[8:]))
"""


def run(**environment):
    clean = {k: v for k, v in os.environ.items() if not host_memory.users_settings({k: v})}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**clean, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=900,
        check=True,
    )
    heap, kept, touched = done.stdout.split()
    return heap == "True", kept == "True", int(touched)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_the_memory_of_a_step_is_there_for_the_next():
    heap, kept, touched = run()
    assert (heap, kept) == (True, True) and touched < 1000


@pytest.mark.parametrize("name, value", [(host_memory.VARIABLE, "0"), ("MALLOC_TOP_PAD_", "4096")])
def test_it_is_left_to_the_system_where_the_user_says_so(name, value):
    heap, kept, touched = run(**{name: value})
    assert (heap, kept) == (False, False) and touched > 1000


@pytest.mark.parametrize(
    "environment, expected",
    [
        (
            {
                "PATH": "/bin",
                "LD_PRELOAD": "libx.so",
                "GLIBC_TUNABLES": "glibc.rtld.dynamic_sort=2",
            },
            None,
        ),
        ({"MALLOC_ARENA_MAX": "2"}, "MALLOC_ARENA_MAX"),
        ({"GLIBC_TUNABLES": "glibc.rtld.x=1:glibc.malloc.hugetlb=1"}, "GLIBC_TUNABLES"),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, "LD_PRELOAD"),
    ],
)
def test_what_counts_as_a_users_own_setting(environment, expected):
    assert host_memory.users_settings(environment) == expected


class Asked(list):
    def __call__(self, settings):
        self.append(settings)
        return True


@pytest.fixture
def asked(monkeypatch):
    asked = Asked()
    monkeypatch.setattr(host_memory, "_mallopt", asked)
    monkeypatch.setattr(host_memory._Heap, "main", False)
    monkeypatch.setattr(host_memory._Heap, "kept", False)
    return asked


def test_a_program_that_is_imported_leaves_the_allocator_alone(asked):
    assert not host_memory.keep_memory(1000) and asked == []


def test_an_accelerators_command_leaves_it_alone(asked, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "tpu")
    monkeypatch.setattr("jax.config.update", lambda name, value: None)
    assert not host_memory.use_main_heap({}) and asked == []


@pytest.mark.parametrize(
    "environment",
    [{"JAX_NUM_PROCESSES": "2"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}],
)
def test_several_processes_and_devices_stay_as_they_are(environment, asked):
    assert not host_memory.use_main_heap(environment) and not host_memory.keep_memory(1000)
    assert asked == []


def test_pieces_too_large_to_hold_several_of_are_given_back(asked, monkeypatch):
    monkeypatch.setattr(host_memory._Heap, "main", True)
    assert not host_memory.keep_memory(None)
    assert not host_memory.keep_memory(host_memory.memory() // 2)
    assert asked == []
    assert host_memory.keep_memory(1000) and host_memory.keep_memory(2000)
    assert len(asked) == 1


def test_a_containers_limit_counts_as_its_memory(tmp_path):
    limit, unlimited = tmp_path / "limit", tmp_path / "unlimited"
    limit.write_text("1048576\n")
    unlimited.write_text("max\n")
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert host_memory.memory([tmp_path / "none", unlimited, limit]) == 1048576
    assert host_memory.memory([unlimited]) == machine
