"""Compiled programs are kept between commands, by kind of processor, unless that is turned off."""

import os
import subprocess
import sys
from pathlib import Path

import jax
from jax._src.lib import utils

from mdt_jax.parallel import compilation_cache

ROOT = Path(__file__).parents[1]
PROGRAM = """
import jax
from jax import monitoring
from mdt_jax.parallel.compilation_cache import use_compilation_cache

hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name))
use_compilation_cache()
# What compiles fast is not kept; here everything is.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 3 + 1)(1.0)
print("/jax/compilation_cache/cache_hits" in hits)
"""


def run(**environment):
    inherited = {k: v for k, v in os.environ.items() if k != compilation_cache.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**inherited, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.split()[-1] == "True"


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    home = {"XDG_CACHE_HOME": str(tmp_path)}
    assert not run(**home)
    assert list(compilation_cache.cache_folder(home).iterdir())
    assert run(**home)


def test_the_variable_names_another_folder_or_none(tmp_path):
    variable = compilation_cache.VARIABLE
    home = {"XDG_CACHE_HOME": str(tmp_path / "home")}
    run(**home, **{variable: str(tmp_path / "other")})
    assert list((tmp_path / "other").iterdir())
    run(**home, **{variable: ""})
    assert not (tmp_path / "home").exists()


def test_processors_of_other_instruction_sets_have_other_folders(tmp_path):
    digests = []
    for flags in ("fpu avx2", "fpu avx2 avx512f", "fpu avx2"):
        file = tmp_path / "cpuinfo"
        file.write_text(
            f"processor\t: 0\nmodel name\t: X\ncpu MHz\t: {len(digests)}\nflags\t: {flags}\n"
        )
        digests.append(compilation_cache.processor_digest(file))
    assert digests[0] == digests[2] != digests[1]
    # Elsewhere than on Linux the architecture has to do.
    assert compilation_cache.processor_digest(tmp_path / "absent")


def test_several_processes_on_cpus_keep_none(monkeypatch):
    before = jax.config.jax_enable_compilation_cache, jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    try:
        compilation_cache.use_compilation_cache({})
        assert not jax.config.jax_enable_compilation_cache
        assert jax.config.jax_compilation_cache_dir == before[1]
    finally:
        jax.config.update("jax_enable_compilation_cache", before[0])


def test_a_long_compilation_is_no_error_of_a_process_alone(monkeypatch):
    """What XLA logs as errors stays where there are peers or devices to be lost."""
    levels = []
    monkeypatch.setattr(utils, "absl_set_min_log_level", levels.append)
    compilation_cache.silence_alarm()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    compilation_cache.silence_alarm()
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compilation_cache.silence_alarm()
    assert levels == [3]
