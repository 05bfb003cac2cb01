"""Kills a run of several processes again and again, and compares its end with an undisturbed one.

    python tools/kill_test.py --workdir /tmp/kills --kills 20 --processes 2 --seed 0

Each time the run is started, one of its processes or all are killed (SIGKILL) or preempted
(SIGTERM), while it compiles, restores, trains, or writes a checkpoint. After the last kill it runs
to its end, and must then hold the bits of an undisturbed run: parameters, optimiser, averages, data
position, logged losses. No process may outlive a kill by 60 s, or a SIGTERM by 30 s. The signals
are drawn by the seed; their exact moments depend on the machine. Exit status 1 if anything differs.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mdt_jax import checkpoints
from mdt_jax.basics.help_page import Page
from mdt_jax.parallel.command import UserError, command_ending
from mdt_jax.parallel.flag_parsing import run_command

CHECKPOINT_EVERY, STEPS_PER_KILL = 5, 30
START_SECONDS = 300  # the longest from the start of a run to its signal, or to its end
END_SECONDS = {"SIGKILL": 60, "SIGTERM": 30}  # from the first signal to the last exit
CONFIG = """
from mdt_jax.config import apply_recipe, default_config

def get_config():
    config = default_config()
    config.model.update(name="DiT", input_size=8, in_channels=1, num_classes=4, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    apply_recipe(config)
    config.optimizer.update(name="adan", learning_rate=1e-2)
    config.schedule.name = "cosine"
    # Few timesteps, so that the losses seen decide which are drawn before the run ends.
    config.diffusion.update(schedule="squared_cosine", num_timesteps=4)
    config.diffusion.timestep_sampler = "loss_second_moment"
    config.ema_rates = (0.9, 0.99)
    config.data.update(name="npy", path={data!r})
    config.mesh.fsdp = 2
    config.num_steps, config.batch_size, config.log_every = {steps}, 8, 3
    config.checkpoint_every, config.keep_last = {every}, 2
    config.sample.update(every=0, guided_channels=None, steps=4)
    return config
"""
# `python -m mdt_jax.train`, which signals itself at the moment that its first argument describes.
DRIVER = """
import importlib, json, os, runpy, signal, sys, threading, time
from pathlib import Path
plan = json.loads(sys.argv.pop(1))
calls = {}

def strike():
    root = Path(plan["workdir"]) / "checkpoints"
    steps = [path for path in root.glob("*") if path.name[0].isdecimal()]
    seen = {"time": time.time(), "step": calls.get("Window.add", 0)}
    seen["writing"] = [p.name for p in steps if not (p / "manifest.json").exists()]
    Path(plan["log"] + os.environ["JAX_PROCESS_ID"]).write_text(json.dumps(seen))
    os.kill(os.getpid(), getattr(signal, plan["signal"]))

def wrap(module, method, when, count, pause=0.0):
    owner = getattr(importlib.import_module(module), method.split(".")[0])
    name = method.split(".")[1]
    original = getattr(owner, name)

    def note():
        calls[method] = calls.get(method, 0) + 1
        if calls[method] == count:
            threading.Timer(plan["delay"], strike).start() if plan["delay"] else strike()

    def wrapped(*args, **kwargs):
        time.sleep(pause)
        if when == "began":
            note()
        result = original(*args, **kwargs)
        if when == "returned":
            note()
        return result

    setattr(owner, name, wrapped)

mine = plan["who"] in ("all", os.environ["JAX_PROCESS_ID"])
moments = {
    "compiling": ("mdt_jax.training.run", "Run.compile_steps", "began"),
    "restoring": ("mdt_jax.checkpoints", "Checkpoints.restore", "began"),
    "saving": ("mdt_jax.checkpoints", "Checkpoints.save", "returned"),
    "training": ("mdt_jax.training.metrics", "Window.add", "began"),
}
for phase, moment in moments.items():
    count = plan["count"] if mine and phase == plan["phase"] else None
    # Steps take their time, so that a run has not ended before a signal is acted on.
    wrap(*moment, count, pause=0.1 if phase == "training" else 0.0)
runpy.run_module("mdt_jax.train", run_name="__main__", alter_sys=True)
"""

PAGE = Page(
    "python tools/kill_test.py",
    "",
    "--workdir DIR [OPTION ...]",
    __doc__,
    {"Options": ("workdir", "kills", "processes", "seed", "json")},
)


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    text = "A folder to work in, new or empty."
    flags.DEFINE_string("workdir", None, text, required=True, flag_values=f)
    flags.DEFINE_integer("kills", 20, "How often the run is killed.", flag_values=f)
    text = "How many processes it has."
    flags.DEFINE_integer("processes", 2, text, lower_bound=2, flag_values=f)
    flags.DEFINE_integer("seed", 0, "The seed of the kills.", flag_values=f)
    flags.DEFINE_string("json", None, "A file for the kills and the outcome.", flag_values=f)


def plan_kills(number: int, processes: int, seed: int) -> list[dict[str, Any]]:
    """A plan for each start of the run: moment, signal and processes.

    Kills before the first checkpoint come first.
    """
    rng = random.Random(seed)
    first = [("compiling", "SIGTERM"), ("training", "SIGKILL")]
    rest = ["saving"] * 7 + ["restoring"] * 4 + ["training"] * 5 + ["compiling"] * 2
    if number < 5:  # too few for all kinds
        first, rest = [], ["saving", "training", "restoring", "compiling"][:number]
    while len(first) + len(rest) < number:
        rest.append(rng.choice(["saving", "restoring", "training", "compiling"]))
    rest = rest[: number - len(first)]
    signals = [("SIGKILL", "SIGTERM")[i % 2] for i in range(len(rest))]
    kills = [*first, *zip(rest, signals, strict=True)]
    if number >= 5:
        later = kills[len(first) :]
        rng.shuffle(later)
        kills = [*first, *later]
    who = [str(process) for process in range(processes)] + ["all"]
    return [
        {
            "phase": phase,
            "signal": name,
            "who": rng.choice(who),
            # For the first kills, before the first checkpoint; later, anywhere between two.
            "count": rng.randint(1, CHECKPOINT_EVERY - 1) if phase == "training" else 1,
            "delay": 0.0 if phase == "training" else rng.uniform(0, 0.03),
        }
        for phase, name in kills
    ]


def start_job(
    command: Sequence[str], processes: int, cache: Path, log: Path
) -> list[subprocess.Popen]:
    """Starts one job of `processes`, whose output is appended to `log` and the process's number."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(processes),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    job = []
    for process in range(processes):
        with open(f"{log}.{process}", "a") as output:
            environment["JAX_PROCESS_ID"] = str(process)
            job.append(
                subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    return job


def wait(job: Sequence[subprocess.Popen], until: float) -> list[int | None]:
    """Waits for processes; their exit statuses, None for one killed here at the time `until`."""
    statuses = []
    for process in job:
        try:
            statuses.append(process.wait(max(until - time.time(), 0.1)))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            statuses.append(None)
    return statuses


def sealed(workdir: Path) -> int | None:
    """The newest sealed step of a run, None if there is none."""
    seals = workdir.glob("checkpoints/*/manifest.json")
    return max((int(s.parent.name) for s in seals if s.parent.name.isdecimal()), default=None)


def strike(kill: dict[str, Any], run: list[str], workdir: Path, folder: Path) -> dict[str, Any]:
    """Starts the run once, waits for its end, and returns a row of the table.

    The row has an entry "problem" if the run did not end as it should.
    """
    seen = folder / "seen."
    for old in folder.glob("seen.*"):
        old.unlink()
    before = sealed(workdir)
    plan = kill | {"workdir": str(workdir), "log": str(seen)}
    command = [sys.executable, "-c", DRIVER, json.dumps(plan), *run]
    job = start_job(command, flags.FLAGS.processes, folder / "cache", folder / "log")
    until = time.time() + START_SECONDS
    while not list(folder.glob("seen.*")) and any(p.poll() is None for p in job):
        if time.time() > until:
            break
        time.sleep(0.05)
    limit = END_SECONDS[kill["signal"]]
    statuses = wait(job, time.time() + limit)
    ended = time.time()
    struck = [json.loads(path.read_text()) for path in sorted(folder.glob("seen.*"))]
    row = {
        **kill,
        "before": before,
        "after": sealed(workdir),
        "writing": sorted({name for one in struck for name in one["writing"]}),
        "statuses": statuses,
        "seconds": round(ended - min((one["time"] for one in struck), default=ended), 1),
    }
    victims = range(len(job)) if kill["who"] == "all" else [int(kill["who"])]
    if not struck:
        row["problem"] = "the run ended before its signal"
    elif None in statuses:
        row["problem"] = f"a process was still there {limit} s after the signal"
    elif kill["signal"] == "SIGTERM" and any(statuses):
        row["problem"] = "a process did not exit with status 0"
    # If several are killed, one may die of another's death before its own signal comes.
    elif kill["signal"] == "SIGKILL" and (
        0 in statuses or -signal.SIGKILL not in [statuses[victim] for victim in victims]
    ):
        row["problem"] = "a process did not fail"
    elif (row["after"] or 0) < (before or 0):
        row["problem"] = "a checkpoint went"
    return row


def contents(workdir: Path) -> dict[str, Any]:
    """The contents of a finished run by name: arrays as bytes, logged lines without times."""
    import jax

    from mdt_jax.training import metrics

    step, meta = checkpoints.read_meta(workdir)
    found = {"step": step, "meta": {k: v for k, v in meta.items() if k not in metrics.CLOCK}}
    for name in ("state", "ema_0.9", "ema_0.99"):
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            checkpoints.restore_item(workdir, name)
        ):
            found[name + jax.tree_util.keystr(path)] = np.asarray(leaf).tobytes()
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        found[f"log {line['step']}"] = {k: v for k, v in line.items() if k not in metrics.CLOCK}
    return found


def table_line(number: int, row: dict[str, Any]) -> str:
    """A row as a line of the printed table."""
    who = "all" if row["who"] == "all" else f"process {row['who']}"
    phase = row["phase"]
    if row["before"] is None and row["after"] is None:
        phase += ", nothing saved yet"
    if row["writing"]:
        phase += f" ({row['writing'][-1]} being written)"
    steps = f"{row['before'] or '-'} -> {row['after'] or '-'}"
    statuses = " ".join(map(str, row["statuses"]))
    return (
        f"{number:>3}  {row['signal']}  {who:<9}  {steps:<12} {row['seconds']:>5.1f} s  "
        f"{statuses:<10} {phase}{'  PROBLEM: ' + row['problem'] if 'problem' in row else ''}"
    )


def run_to_end(run: list[str], workdir: Path, folder: Path, processes: int) -> None:
    """Runs to the end. Raises UserError if that fails."""
    command = [sys.executable, "-m", "mdt_jax.train", *run, "--workdir", str(workdir)]
    job = start_job(command, processes, folder / "cache", folder / f"log.{workdir.name}")
    statuses = wait(job, time.time() + START_SECONDS)
    if statuses != [0] * processes:
        raise UserError(f"{workdir} ended with {statuses}; see {folder}/log.{workdir.name}.*")


def main(_: list[str]) -> None:
    """The command."""
    with command_ending(flags.FLAGS):
        passed = kill_again_and_again(Path(flags.FLAGS.workdir).absolute())
    sys.exit(0 if passed else 1)


def kill_again_and_again(folder: Path) -> bool:
    """Makes the two runs in a folder and prints a line a kill; returns whether nothing differs.

    Raises:
      ValueError: the folder is not empty.
      UserError: an undisturbed run fails.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"--workdir {folder} is not empty; give a new folder")
    rng = np.random.default_rng(0)
    np.save(folder / "images.npy", rng.integers(0, 256, (20, 8, 8, 1)).astype(np.uint8))
    np.save(folder / "labels.npy", np.arange(20) % 4)
    kills = plan_kills(flags.FLAGS.kills, flags.FLAGS.processes, flags.FLAGS.seed)
    settings = {"data": str(folder), "every": CHECKPOINT_EVERY}
    config = CONFIG.format(steps=STEPS_PER_KILL * (len(kills) + 1), **settings)
    (folder / "config.py").write_text(config)
    run = ["--config", str(folder / "config.py")]

    whole, killed = folder / "whole", folder / "killed"
    run_to_end(run, whole, folder, flags.FLAGS.processes)
    print("  #  signal   to         checkpoints     ended  statuses   while", flush=True)
    rows = []
    for number, kill in enumerate(kills, start=1):
        rows.append(strike(kill, [*run, "--workdir", str(killed)], killed, folder))
        print(table_line(number, rows[-1]), flush=True)
    run_to_end(run, killed, folder, flags.FLAGS.processes)
    expected, found = contents(whole), contents(killed)
    different = [k for k in expected | found if expected.get(k) != found.get(k)]
    problems = [row["problem"] for row in rows if "problem" in row]
    print(kill_summary(rows, expected, different, problems))
    if flags.FLAGS.json:
        outcome = {"kills": rows, "different": different, "problems": problems}
        Path(flags.FLAGS.json).write_text(json.dumps(outcome, indent=1))
    return not different and not problems


def kill_summary(rows: list, expected: dict, different: list, problems: list) -> str:
    """The outcome in a few lines."""
    phases = [row["phase"] for row in rows]
    early = sum(row["before"] is None and row["after"] is None for row in rows)
    slowest = {
        name: max((row["seconds"] for row in rows if row["signal"] == name), default=0.0)
        for name in END_SECONDS
    }
    arrays = sum(isinstance(value, bytes) for value in expected.values())
    lines = sum(key.startswith("log ") for key in expected)
    return "\n".join(
        [
            f"{len(rows)} kills: {sum(bool(row['writing']) for row in rows)} while a checkpoint "
            f"was being written, {phases.count('restoring')} while restoring, {early} before the "
            "first checkpoint",
            "all processes ended within "
            + ", ".join(f"{seconds} s of a {name}" for name, seconds in slowest.items()),
            f"problems: {'; '.join(problems) or 'none'}",
            f"final bits ({arrays} arrays, {lines} logged lines, position): "
            + (f"DIFFERENT in {different[:5]}" if different else "those of the undisturbed run"),
        ]
    )


if __name__ == "__main__":
    run_command(main, define_flags, PAGE)
