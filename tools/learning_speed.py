"""How much faster does MDT learn than DiT: one study of several arms and seeds, on real pictures.

    python tools/learning_speed.py --workdir runs/speed --output benchmarks/learning_speed.json
    python tools/learning_speed.py --workdir DIR --only MDTv2:0 --output OUT.json
    python tools/learning_speed.py --report benchmarks/learning_speed.json --plots docs

The first trains every arm with its seeds on Fashion-MNIST (configs/fashion.py), one run after
another, a seed of all arms before the next. The same command goes on where it was stopped, and
several machines may take runs each (`--only`). Runs of a seed see the same pictures in the same
order. Along the way 1,000 samples are judged, at the end 5,000 of each average, of which the nearer
one counts. Samples are unguided, by 25 steps of DPM-Solver++. The judge is a small classifier of
the real pictures (`evaluation.classifier`), one for all runs: distances can be compared with one
another and with that of the held-out pictures, the floor, but with no published FID.

The report has a table, plots of the distance against steps, FLOPs and seconds, and how many times
the steps, FLOPs and seconds of one arm another needs to reach its last judged distance, in pairs of
runs of one seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import importlib.util
import json
import math
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mdt_jax import sampling
from mdt_jax.basics.atomic import make_folder, whole_file, whole_path
from mdt_jax.commands.benchmarking import processor_name
from mdt_jax.data import create_source
from mdt_jax.evaluation import classifier
from mdt_jax.evaluation.batches import ArrayImages
from mdt_jax.evaluation.descriptions import describe_images
from mdt_jax.evaluation.evaluator import evaluate
from mdt_jax.evaluation.extractors import Extractor
from mdt_jax.parallel.command import UserError, command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser
from mdt_jax.sampling import images
from mdt_jax.train import train
from mdt_jax.training import metrics, run_evaluation
from mdt_jax.training.run import Run

BASELINE, BEST = "DiT", "MDTv2"
_MDTV2_RECIPE = {
    "optimizer.name": "adan",
    "optimizer.clip_norm": 1.0,
    "diffusion.min_snr": 5.0,
}
# Each arm: its model, settings beside its family's recipe, and how many seeds it gets.
ARMS: dict[str, tuple[str, dict[str, Any], int]] = {
    BASELINE: ("DiT", {}, 5),
    BEST: ("MDTv2", {}, 5),
    "MDT": ("MDT", {}, 3),
    "MDTv2 without masking": ("MDTv2", {"masking.masked_pass": False}, 3),
    "DiT with MDTv2's recipe": ("DiT", _MDTV2_RECIPE, 3),
}
# Settings of all runs, in place of those of configs/fashion.py.
SETTINGS: dict[str, Any] = {
    "model.hidden_size": 64,
    "num_steps": 3_000,
    "batch_size": 64,
    "eval_every": 300,
    "checkpoint_every": 300,
    "sample.every": 0,
    "eval.num_samples": 1_000,
    "eval.batch_size": 250,
}
FINAL_SAMPLES = 5_000
AXES = {"steps": "training steps", "flops": "training FLOPs", "seconds": "seconds of training"}


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run's distances.

    Attributes:
      steps: the steps after which samples were judged.
      distances: the distance at each.
      seconds: the training time at each.
      flops_per_step: model FLOPs of a step.
      final: the distance of more samples at the end, by the average's rate.
    """

    steps: tuple[int, ...]
    distances: tuple[float, ...]
    seconds: tuple[float, ...]
    flops_per_step: float
    final: dict[str, float]

    def places(self, axis: str) -> list[float]:
        """Where the points are along an axis of `AXES`."""
        if axis == "seconds":
            return list(self.seconds)
        factor = self.flops_per_step if axis == "flops" else 1.0
        return [step * factor for step in self.steps]

    @property
    def last(self) -> float:
        """The distance of more samples at the end, of the better average."""
        return min(self.final.values())

    def reaches(self, distance: float, axis: str) -> float | None:
        """Where the curve first is at a distance or below; None if it never is.

        Between two points the logarithm of the distance is taken to be linear.
        """
        places = self.places(axis)
        for i, (place, found) in enumerate(zip(places, self.distances, strict=True)):
            if found <= distance:
                if i == 0:
                    return place
                before = self.distances[i - 1]
                share = math.log(before / distance) / math.log(before / found)
                return places[i - 1] + share * (place - places[i - 1])
        return None


# Training


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


def planned_runs(only: Sequence[str]) -> list[tuple[str, int]]:
    """The runs as (arm, seed): those of `--only`, or a seed of all arms before the next.

    Raises:
      ValueError: an unknown arm, or a seed that is no number.
    """
    if only:
        return [_parse_run(text) for text in only]
    most = max(count for *_, count in ARMS.values())
    return [(arm, seed) for seed in range(most) for arm, (*_, n) in ARMS.items() if seed < n]


def _parse_run(text: str) -> tuple[str, int]:
    arm, _, seed = text.rpartition(":")
    if arm not in ARMS or not seed.isdecimal():
        raise ValueError(f"{text!r} is not ARM:SEED, such as {BEST}:0; arms are {', '.join(ARMS)}")
    return arm, int(seed)


def run_study(
    folder: Path, output: Path, runs: list[tuple[str, int]], changes: dict[str, Any] | None = None
) -> None:
    """Trains those of some runs that have no results yet; adds each as soon as it has ended.

    Args:
      folder: where the runs go, a folder each.
      output: the results' JSON.
      runs: (arm, seed) of each.
      changes: settings in place of `SETTINGS`.
    """
    changes = changes or {}
    for arm, seed in runs:
        name = f"{arm}:{seed}"
        check_settings(output, changes)
        if name in read_results(output)["runs"]:
            continue
        curve = run_arm(arm, seed, folder, changes)
        _, real, digest = _judge(folder, study_config(arm, seed, changes))
        floor = read_results(output).get("floor")
        floor = floor_distance(folder, changes) if floor is None else floor
        device = jax.devices()[0]
        about = {
            "date": datetime.date.today().isoformat(),
            "device": processor_name() if device.platform == "cpu" else device.device_kind,
            "jax": jax.__version__,
            "settings": SETTINGS | changes,
            "judge": digest,
            "real_images": real.count,
        }
        with _alone(output):  # another process may be adding to it
            results = read_results(output)
            if results.get("about", about)["judge"] != digest:
                raise UserError(
                    f"{output}: judged by another classifier than {folder}'s; runs that are "
                    f"compared need one: copy its {run_evaluation.CLASSIFIER_FILE} there first"
                )
            results["runs"][name] = dataclasses.asdict(curve)
            results |= {"floor": floor, "about": about}
            with whole_file(output) as file:
                file.write(json.dumps(results, indent=1, sort_keys=True).encode() + b"\n")
        print(f"{name}: distance {curve.last:.3f}", flush=True)


def check_settings(output: Path, changes: dict[str, Any]) -> None:
    """Refuses, with ValueError, to add runs of other settings to results."""
    before = read_results(output).get("about", {}).get("settings")
    now = json.loads(json.dumps(SETTINGS | changes))
    for key in sorted(now.keys() | (before or {}).keys()) if before else ():
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{output}: holds runs of {key} {before.get(key)}, now {now.get(key)}; give "
                "another --output"
            )


@contextlib.contextmanager
def _alone(output: Path) -> Iterator[None]:
    """Keeps other processes from adding to the results meanwhile."""
    with open(output.with_name(f".{output.name}.lock"), "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        yield


def run_arm(arm: str, seed: int, folder: Path, changes: dict[str, Any]) -> Curve:
    """Trains a run to its end, or goes on with it, and judges it."""
    config = study_config(arm, seed, changes)
    words = "".join(c if c.isalnum() else "_" for c in arm)
    workdir = folder / f"{words}-{seed}"
    make_folder(workdir, "--workdir")
    # One judge for all runs: the folder's.
    _judge(folder, config)
    shared, own = folder / run_evaluation.CLASSIFIER_FILE, workdir / run_evaluation.CLASSIFIER_FILE
    if not own.exists():
        with whole_path(own) as aside:
            shutil.copyfile(shared, aside)
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
        tuple(float(line["train_seconds"]) for line in judged),
        Run(config, workdir).step_flops(),
        final_distances(workdir, config),
    )


def _judge(folder: Path, config: ConfigDict) -> tuple[Extractor, ArrayImages, str]:
    """A folder's classifier, the real pictures to compare samples with, and its digest."""
    source = create_source(config.data)
    real = run_evaluation.real_images(source, config)
    file = folder / run_evaluation.CLASSIFIER_FILE
    judge = classifier.load_or_train(file, real.images, real.labels, len(source.class_names))
    return judge, real, judge.digest


def _distance(judge: Extractor, *sets: ArrayImages) -> float:
    reference, others = (describe_images(one, judge, batch_size=500) for one in sets)
    return evaluate(reference, others).metrics["fid"]


def final_distances(workdir: Path, config: ConfigDict) -> dict[str, float]:
    """The distance of `FINAL_SAMPLES` samples of each average, by its rate."""
    judge, real, _ = _judge(workdir, config)
    found = {}
    for rate in config.ema_rates:
        model, params = sampling.load(workdir, ema_rate=rate)
        options = sampling.judging_options(config)
        drawn = sampling.sample(
            model,
            params,
            num_samples=min(FINAL_SAMPLES, 5 * config.eval.num_samples),
            key=1,
            batch_size=config.eval.batch_size,
            **options,
        )
        found[str(rate)] = _distance(judge, real, ArrayImages(images.to_uint8(drawn)))
    return found


def floor_distance(folder: Path, changes: dict[str, Any]) -> float:
    """The distance of the held-out pictures from those that samples are compared with."""
    config = study_config(BASELINE, 0, changes)
    judge, real, _ = _judge(folder, config)
    config.data.split = "test"
    heldout = run_evaluation.real_images(create_source(config.data), config)
    return _distance(judge, real, heldout)


# Reporting


def read_results(path: Path) -> dict[str, Any]:
    """The study's results so far; without runs if there is no file.

    Raises:
      ValueError: the file is no results of this study.
    """
    if not path.exists():
        return {"runs": {}}
    try:
        found = json.loads(path.read_text())
        curves_of(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: holds no results of this study ({reason})") from error
    return found


def curves_of(results: dict[str, Any]) -> dict[str, dict[int, Curve]]:
    """The curves of results, by arm, in the order of `ARMS`, and seed."""
    found: dict[str, dict[int, Curve]] = {}
    for name, values in results["runs"].items():
        arm, seed = _parse_run(name)
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        found.setdefault(arm, {})[seed] = Curve(**fields)
    return {arm: found[arm] for arm in ARMS if arm in found}


def speed_up(ours: Curve, theirs: Curve, axis: str) -> tuple[float, bool]:
    """How many times as much of an axis another run needs to reach our last judged distance.

    Returns:
      The ratio, and whether the other reaches the distance at all. If not, the ratio is of all
      that it spent: a lower bound.
    """
    goal = ours.distances[-1]
    needed, first = theirs.reaches(goal, axis), ours.reaches(goal, axis)
    assert first is not None
    return (theirs.places(axis)[-1] if needed is None else needed) / first, needed is not None


def describe_speed_up(ours: dict[int, Curve], theirs: dict[int, Curve], axis: str) -> str:
    """The speed-ups of the seeds that both arms have, in words: median, range, failures."""
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return "no seed in common"
    pairs = [speed_up(ours[seed], theirs[seed], axis) for seed in seeds]
    ratios = sorted(ratio for ratio, _ in pairs)
    never = sum(not reached for _, reached in pairs)
    text = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return text + (f", never reached by {never} of {len(pairs)}" if never else "")


def report_lines(results: dict[str, Any]) -> list[str]:
    """The tables of the report, in Markdown."""
    curves = curves_of(results)
    out = ["| arm | seeds | distance | GFLOP a step | seconds a step |", "|" + " --- |" * 5]
    for arm, seeds in curves.items():
        last = [curve.last for curve in seeds.values()]
        spread = f" ± {statistics.stdev(last):.3f}" if len(last) > 1 else ""
        cost = statistics.median(curve.seconds[-1] / curve.steps[-1] for curve in seeds.values())
        work = statistics.median(curve.flops_per_step for curve in seeds.values()) / 1e9
        cells = [arm, str(len(last)), f"{statistics.fmean(last):.3f}{spread}", f"{work:,.1f}"]
        out.append(f"| {' | '.join([*cells, f'{cost:.2f}'])} |")
    if "floor" in results:
        out.append(f"| held-out pictures | | {results['floor']:.3f} | | |")
    if BASELINE not in curves:
        return out
    others = [arm for arm in curves if arm != BASELINE]
    for title, turned in (
        (f"times as much as the arm, for {BASELINE} to reach the arm's last distance", False),
        (f"times as much as {BASELINE}, for the arm to reach {BASELINE}'s last distance", True),
    ):
        out += ["", f"| {title} | {' | '.join(AXES)} |", "|" + " --- |" * 4]
        for arm in others:
            pair = (curves[arm], curves[BASELINE])
            cells = [describe_speed_up(*(pair[::-1] if turned else pair), axis) for axis in AXES]
            out.append(f"| {arm} | {' | '.join(cells)} |")
    return out


def draw_plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Writes a plot of the distance against each axis: means over the seeds, and their range.

    Raises:
      ValueError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError('plots need matplotlib: pip install -e ".[plot]"') from error

    make_folder(folder, "--plots")
    written = []
    for axis, label in AXES.items():
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for arm, seeds in curves_of(results).items():
            columns = list(zip(*(curve.distances for curve in seeds.values()), strict=False))
            along = zip(*(curve.places(axis) for curve in seeds.values()), strict=False)
            places = [statistics.fmean(column) for column in along]
            means = [statistics.fmean(column) for column in columns]
            (line,) = axes.plot(places, means, marker="o", markersize=4, label=arm)
            low, high = ([pick(column) for column in columns] for pick in (min, max))
            axes.fill_between(places, low, high, alpha=0.2, color=line.get_color())
        if "floor" in results:
            axes.axhline(results["floor"], color="grey", linestyle=":", label="held-out pictures")
        axes.set(xlabel=label, ylabel="Fréchet distance", xscale="log", yscale="log")
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
        path = folder / f"learning_speed_{axis}.png"
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=150)
        written.append(path)
    return written


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, help="where the runs go, a folder each")
    parser.add_argument("--only", nargs="+", default=[], help="ARM:SEED, in place of all runs")
    parser.add_argument("--output", type=Path, help="the results' JSON, to which runs are added")
    parser.add_argument("--report", type=Path, help="such a JSON: print its tables, and stop")
    parser.add_argument("--plots", type=Path, help="the folder of the report's plots")
    args = parser.parse_args(argv)
    with command_ending(args):
        if args.report:
            if not args.report.is_file():
                raise ValueError(f"--report {args.report} is not there; --output makes it")
            results = read_results(args.report)
            print("\n".join(report_lines(results)))
            for path in draw_plots(results, args.plots) if args.plots else ():
                print(path)
        elif args.workdir and args.output:
            run_study(args.workdir, args.output, planned_runs(args.only))
        else:
            raise ValueError("give --workdir and --output, to train, or --report")


if __name__ == "__main__":
    with ending_quietly():
        main()
