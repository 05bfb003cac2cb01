"""How much faster does MDT learn than DiT: one study of several arms and seeds, on real pictures.

    python tools/learning_speed.py --workdir runs/speed --output benchmarks/learning_speed.json
    python tools/learning_speed.py --workdir DIR --only MDTv2:0 --output OUT.json
    python tools/learning_speed.py --time_steps --output benchmarks/learning_speed.json
    python tools/learning_speed.py --report benchmarks/learning_speed.json --plots docs \\
        --write README.md

The first trains every arm with its seeds on Fashion-MNIST (configs/fashion.py), one run after
another, a seed of all arms before the next: 19 runs, hours of two CPU cores. The results' file has
all that the report needs after each run. The same command goes on where it was stopped, also on
another machine, from the results and the judge beside them: finished runs are not done again.
Several machines may take runs each (`--only`).

Runs of a seed see the same pictures in the same order. Along the way 1,000 samples are judged, at
the end 5,000 of each average, of which the nearer one counts. Samples are unguided, by 25 steps of
DPM-Solver++. The judge is a small classifier of the real pictures (`evaluation.classifier`), one
for all runs, `..._judge.npy` beside the results: distances can be compared with one another and
with that of the held-out pictures, the floor, but with no published FID.

The report has tables, plots of the distance against steps, FLOPs and seconds, and how many times
the steps, FLOPs and seconds of one arm another needs to reach its last judged distance, in pairs of
runs of one seed. It says how many runs there are. `--write` puts it into a document's part for it.

A run's own clock also counts what else the machine does. So the axis of seconds is steps times the
seconds of a step, which `--time_steps` measures, all arms by turns, when nothing else is running.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import importlib.util
import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import learning_curves
from learning_curves import ARMS, BASELINE, Curve, planned_runs, read_json, results_of
from ml_collections import ConfigDict

from mdt_jax import sampling
from mdt_jax.basics.atomic import check_writable, make_folder, whole_file, whole_path
from mdt_jax.commands.benchmarking import Workloads, processor_name, time_by_turns
from mdt_jax.parallel.command import UserError, command_ending, ending_quietly
from mdt_jax.parallel.compilation_cache import use_compilation_cache
from mdt_jax.parallel.flag_parsing import ArgumentParser
from mdt_jax.sampling import images
from mdt_jax.train import train
from mdt_jax.training import metrics, run_evaluation
from mdt_jax.training.judges import Judge
from mdt_jax.training.run import Run

# Settings of all runs. Those that configs/fashion.py has, too, are here so that a change there does
# not reach runs that are compared with others made before it.
SETTINGS: dict[str, Any] = {
    "model.hidden_size": 64,
    "model.depth": 6,
    "model.num_heads": 4,
    "model.patch_size": 4,
    "optimizer.learning_rate": 1e-3,
    "schedule.warmup_steps": 100,
    "num_steps": 3_000,
    "batch_size": 64,
    "ema_rates": (0.995, 0.999),
    "eval_every": 250,
    "checkpoint_every": 250,
    "sample.every": 0,
    "eval.num_samples": 1_000,
    "eval.batch_size": 250,
    "eval.sampler": "dpm++",
    "eval.steps": 25,
    "eval.cfg_scale": 1.0,
}
FINAL_SAMPLES = 5_000
ROUNDS = 15  # of timing


def study_config(arm: str, seed: int, changes: dict[str, Any]) -> ConfigDict:
    """The config of an arm's run.

    Args:
      arm: a key of `ARMS`.
      seed: the run's seed, which the order of the data follows.
      changes: settings in place of `SETTINGS`.
    """
    model, settings, _ = ARMS[arm]
    path = Path(__file__).parents[1] / "configs" / "fashion.py"
    spec = importlib.util.spec_from_file_location("fashion", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(model)
    config.update_from_flattened_dict(SETTINGS | settings | changes)
    config.seed = seed
    return config


def run_study(
    folder: Path, output: Path, runs: list[tuple[str, int]], changes: dict[str, Any] | None = None
) -> None:
    """Trains those of some runs that have no results yet; adds each as soon as it has ended.

    Args:
      folder: where the runs go, a folder each.
      output: the results' JSON; the judge goes beside it.
      runs: (arm, seed) of each.
      changes: settings in place of `SETTINGS`.

    Raises:
      ValueError: the results are of other settings.
      UserError: they are of another judge, or a run was stopped.
    """
    changes = changes or {}
    check_writable(output)
    for arm, seed in runs:
        name = f"{arm}:{seed}"
        check_settings(output, changes)
        if name in read_json(output)["runs"]:
            continue
        judge = judge_of(output, changes)
        workdir = make_workdir(folder, arm, seed, output)
        curve = run_arm(study_config(arm, seed, changes), workdir, judge)
        floor = read_json(output).get("floor")
        floor = judge.distance([judge.images("test").images]) if floor is None else floor

        def add(results: dict[str, Any], name: str = name, curve: Curve = curve) -> None:
            results["runs"][name] = vars(curve)

        about = {"settings": settings_of(changes), "floor": floor}
        _change(output, add, about | {"judge": judge.digest, "real_images": judge.real.count})
        print(f"{name}: distance {curve.last:.3f}", flush=True)


def settings_of(changes: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide the results, as JSON has them; not where the data are."""
    kept = {key: value for key, value in (SETTINGS | changes).items() if key != "data.path"}
    return json.loads(json.dumps(kept))


def check_settings(output: Path, changes: dict[str, Any]) -> None:
    """Refuses, with ValueError, to add runs of other settings to results."""
    before, now = read_json(output).get("settings"), settings_of(changes)
    for key in sorted(now.keys() | before.keys()) if before else ():
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{output}: holds runs of {key} {before.get(key)}, now {now.get(key)}; give "
                "another --output"
            )


def _change(
    output: Path, change: Callable[[dict[str, Any]], None], values: dict[str, Any] | None = None
) -> None:
    """Changes the results' file, and adds values to it, while no other process does."""
    with _alone(output):
        results = read_json(output) | (values or {})
        change(results)
        with whole_file(output) as file:
            file.write(json.dumps(results, indent=1, sort_keys=True).encode() + b"\n")


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keeps other processes from adding to the results meanwhile."""
    with open(output.with_name(f".{output.name}.lock"), "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def about_machine() -> dict[str, str]:
    """Today's date, the device, and JAX's version."""
    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "device": processor_name() if device.platform == "cpu" else device.device_kind,
        "jax": jax.__version__,
    }


def judge_of(output: Path, changes: dict[str, Any]) -> Judge:
    """The judge of all runs of some results: the one beside them, or without it a new one.

    Raises:
      UserError: the results are of another judge.
    """
    file = judge_file(output)
    judge = Judge(study_config(BASELINE, 0, changes), file)
    if read_json(output).get("judge", judge.digest) != judge.digest:
        raise UserError(
            f"{file}: another classifier than the one that judged {output}; runs that are "
            "compared need one: copy the file that was beside the results"
        )
    return judge


def judge_file(output: Path) -> Path:
    """Where the judge of some results is."""
    return output.with_name(f"{output.stem}_judge.npy")


def make_workdir(folder: Path, arm: str, seed: int, output: Path) -> Path:
    """A run's folder, with the judge in it."""
    words = "".join(c if c.isalnum() else "_" for c in arm)
    workdir = folder / f"{words}-{seed}"
    make_folder(workdir, "--workdir")
    with whole_path(workdir / run_evaluation.CLASSIFIER_FILE) as aside:
        shutil.copyfile(judge_file(output), aside)
    return workdir


def run_arm(config: ConfigDict, workdir: Path, judge: Judge) -> Curve:
    """Trains a run to its end, or goes on with it, and judges it.

    Raises:
      UserError: the run was stopped before its end.
    """
    step = int(train(config, workdir).step)
    if step < config.num_steps:
        raise UserError(
            f"{workdir} was stopped at step {step} of {config.num_steps}; the same command goes on"
        )
    lines = metrics.read_lines(workdir / metrics.METRICS_FILE)
    judged = [line for line in lines if "eval_fid" in line]
    return Curve(
        tuple(line["step"] for line in judged),
        tuple(float(line["eval_fid"]) for line in judged),
        Run(config, workdir).step_flops(),
        final_distances(workdir, config, judge),
        about_machine(),
    )


def final_distances(workdir: Path, config: ConfigDict, judge: Judge) -> dict[str, float]:
    """The distance of `FINAL_SAMPLES` samples of each average, by its rate."""
    found = {}
    for rate in config.ema_rates:
        model, params = sampling.load(workdir, ema_rate=rate)
        drawn = sampling.sample(
            model,
            params,
            num_samples=min(FINAL_SAMPLES, 5 * config.eval.num_samples),
            key=1,
            batch_size=config.eval.batch_size,
            **sampling.judging_options(config),
        )
        found[str(rate)] = judge.distance([images.to_uint8(drawn)])
    return found


def time_steps(
    output: Path, rounds: int = ROUNDS, changes: dict[str, Any] | None = None
) -> dict[str, float]:
    """Measures a step of each arm, by turns, at the kept tokens nearest to its mean.

    Args:
      output: the results' JSON, to which the medians are added.
      rounds: how often each is timed.
      changes: settings in place of `SETTINGS`.

    Returns:
      The median seconds by arm.
    """
    check_writable(output)
    check_settings(output, changes or {})
    workloads = {arm: Workloads(study_config(arm, 0, changes or {})) for arm in ARMS}
    calls = {arm: parts.train_step().call for arm, parts in workloads.items()}
    before = os.getloadavg()[0]
    taken = time_by_turns(calls, rounds, warm_up=3)
    medians = {arm: statistics.median(seconds) for arm, seconds in taken.items()}
    timing = about_machine() | {
        "cores": len(os.sched_getaffinity(0)),
        "load_average": round(before, 1),
        "rounds": rounds,
        "step_seconds": medians,
    }
    _change(output, lambda results: results.update(timing=timing))
    return medians


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, help="where the runs go, a folder each")
    parser.add_argument("--only", nargs="+", default=[], help="ARM:SEED, in place of all runs")
    parser.add_argument("--output", type=Path, help="the results' JSON, to which runs are added")
    parser.add_argument("--data_path", help="the folder of the IDX files, if not Debian's")
    parser.add_argument("--time_steps", action="store_true", help="time a step of each arm")
    parser.add_argument("--report", type=Path, help="such a JSON: print its tables, and stop")
    parser.add_argument("--plots", type=Path, help="the folder of the report's plots")
    parser.add_argument("--write", type=Path, help="a document with a part for the report")
    args = parser.parse_args(argv)
    with command_ending(args):
        changes = {"data.path": args.data_path} if args.data_path else {}
        if args.report:
            report(args.report, args.plots, args.write)
        elif args.time_steps and args.output:
            for arm, seconds in time_steps(args.output).items():
                print(f"{arm}: {seconds:.4f} s a step")
        elif args.workdir and args.output:
            use_compilation_cache()
            run_study(args.workdir, args.output, planned_runs(args.only), changes)
        else:
            raise ValueError("give --output with --workdir or --time_steps, or give --report")


def report(path: Path, plots: Path | None = None, document: Path | None = None) -> None:
    """Prints the report of results, draws its plots and writes it into a document.

    Raises:
      ValueError: there are no such results, or the document has no part for them.
    """
    if not path.is_file():
        raise ValueError(f"--report {path} is not there; --output makes it")
    results = results_of(read_json(path))
    lines = learning_curves.report_lines(results)
    print("\n".join(lines))
    drawn = learning_curves.draw_plots(results, plots) if plots else []
    for picture in drawn:
        print(picture)
    if document:
        learning_curves.write_section(document, lines, drawn)


if __name__ == "__main__":
    with ending_quietly():
        main()
