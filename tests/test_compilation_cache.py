"""Compiled programs are kept between commands, by kind of processor, unless that is turned off."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
from jax._src.lib import utils
from jobs import outcomes, start_job

from mdt_jax.config import apply_recipe, default_config
from mdt_jax.parallel import compilation_cache

ROOT = Path(__file__).parents[1]
PROGRAM = """
import jax
from jax import monitoring
from mdt_jax.parallel.compilation_cache import programs, use_compilation_cache

hits = []
monitoring.register_event_listener(lambda name, **_: hits.append(name))
use_compilation_cache()
# What compiles fast is not kept; here everything is.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.jit(lambda x: x * 3 + 1)(1.0)
compiled, read = programs()
assert (read > 0) == ("/jax/compilation_cache/cache_hits" in hits) == (compiled == 0)
print(read > 0)
"""
# Prints the parts of the key of a training step, by which JAX looks for it in the cache.
KEYS = """
import json, os, sys
sys.path.insert(0, "tests")
from mdt_jax.parallel.distributed import initialize_distributed
initialize_distributed()
import hashlib
from unittest import mock
import jax
from jax._src import cache_key
from mdt_jax.parallel.compilation_cache import use_compilation_cache
from mdt_jax.training.run import Run
from test_compilation_cache import small_config

parts = {}

def note(hash_so_far, name, part):
    alone = hashlib.sha256()
    part(alone)
    parts[name] = alone.hexdigest()

os.chdir(sys.argv[1 + jax.process_index()])
use_compilation_cache()
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", os.getcwd())
run = Run(small_config(), os.getcwd())
with mock.patch.object(cache_key, "_log_cache_key_hash", note):
    with mock.patch("jax._src.compiler.backend_compile_and_load", side_effect=StopIteration):
        try:
            run.compile_steps()
        except StopIteration:
            pass
print("KEY", json.dumps(parts), flush=True)
"""


def small_config():
    """A DiT of one block, of pixels, in a mesh over all devices."""
    config = apply_recipe(default_config())
    config.model.update(name="DiT", input_size=8, in_channels=1, num_classes=4, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    config.sample.guided_channels, config.batch_size, config.mesh.fsdp = None, 8, 2
    return config


def test_the_key_of_a_step_holds_no_workdir_host_or_process(tmp_path):
    """But for JAX's description of a job's CPUs, by which they alone keep no programs."""
    folders = [tmp_path / "a", tmp_path / "elsewhere" / "b"]
    for folder in folders:
        folder.mkdir(parents=True)
    found = outcomes(start_job([sys.executable, "-c", KEYS, *folders], 2, 2), timeout=400)
    keys = [
        json.loads(line.removeprefix("KEY"))
        for _, text in found
        for line in text.splitlines()
        if line.startswith("KEY")
    ]
    assert len(keys) == 2, found
    first, second = keys
    assert first.keys() == second.keys() and {"computation", "compile_options"} <= first.keys()
    different = {name for name in first if first[name] != second[name]}
    assert different == {"accelerator_config"}


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
