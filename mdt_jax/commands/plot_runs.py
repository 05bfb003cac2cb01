"""Plots a metric of several runs into one PNG: distance against steps, seconds or images.

    mdt plot runs/mdtv2 runs/dit --x seconds --metric eval_fid --log y \\
        --output plot.png

A run is given by its workdir or its metrics.jsonl. The legend shows the model's name, from the
config.json beside it, and the workdir too if two runs have one model; `--labels A,B` gives other
names. Seconds are `train_seconds`: those of the training loop, without compilation, evaluation,
grids and saving. Images are steps times the batch size. Needs matplotlib: pip install matplotlib.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from mdt_jax.basics.atomic import whole_file
from mdt_jax.basics.help_page import Page
from mdt_jax.basics.places import read_text
from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser

PAGE = Page(
    "mdt plot",
    "python -m mdt_jax.commands.plot_runs",
    "RUN ... --output PLOT.png [OPTION ...]",
    __doc__,
)
AXES = {"steps": "training steps", "seconds": "seconds of training", "images": "images seen"}
METRIC_LABELS = {"eval_fid": "Fréchet distance"}
# A curve of at most so many points has a mark at each; more marks would hide it.
MARKED = 60


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run's line of the plot.

    Attributes:
      label: its name in the legend.
      x, y: its points in the order of their steps.
      judges: (evaluator, number of samples) of its points, empty for metrics of the training loop.
    """

    label: str
    x: list[float]
    y: list[float]
    judges: frozenset[tuple[str, int]] = frozenset()


def read_curve(place: str | Path, metric: str, x: str) -> Curve:
    """A metric of a run against "steps", "seconds" or "images".

    Values that are not finite are left out.

    Raises:
      FileNotFoundError: no run there.
      ValueError: a run without that metric, naming those it has; one without seconds or batch size.
    """
    from mdt_jax.training.metrics import METRICS_FILE, read_lines  # imports JAX

    path = Path(place)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give a run's workdir or its {METRICS_FILE}")
    lines = read_lines(path)
    config = _config(path)
    found = [line for line in lines if metric in line]
    points = [(_position(path, line, config, x), float(line[metric])) for line in found]
    points = [point for point in points if math.isfinite(point[1])]
    if not points:
        if found:
            raise ValueError(f"{path}: no value of {metric} is finite")
        there = sorted({name for line in lines for name in line} - {"step", "evaluator"})
        raise ValueError(
            f"{path}: no {metric}; it has {', '.join(there) or 'no metrics'}"
            + ("; config.eval_every has a run judged" if metric.startswith("eval_") else "")
        )
    judges = frozenset(
        (line["evaluator"], int(line["eval_samples"])) for line in found if "evaluator" in line
    )
    label = config.get("model", {}).get("name") or str(place)
    return Curve(label, *map(list, zip(*points, strict=True)), judges)


def _config(path: Path) -> dict[str, Any]:
    """The config.json beside a metrics.jsonl, {} without one."""
    try:
        return json.loads(read_text(path.parent / "config.json"))
    except FileNotFoundError:
        return {}


def _position(path: Path, line: dict[str, Any], config: dict[str, Any], x: str) -> float:
    if x == "steps":
        return float(line["step"])
    if x == "images":
        if "batch_size" not in config:
            raise ValueError(f"{path}: no config.json beside it, whose batch_size --x images needs")
        return float(line["step"] * config["batch_size"])
    if "train_seconds" not in line:
        raise ValueError(f"{path}: no train_seconds at step {line['step']}; use --x steps")
    return float(line["train_seconds"])


def named(curves: list[Curve], places: list[str], labels: list[str]) -> list[Curve]:
    """The curves under labels that tell them apart.

    Raises:
      ValueError: another number of labels than curves.
    """
    if labels and len(labels) != len(curves):
        raise ValueError(f"--labels has {len(labels)} names for {len(curves)} runs")
    models = [curve.label for curve in curves]
    if not labels:
        labels = [
            model if models.count(model) == 1 else f"{model} ({place})"
            for model, place in zip(models, places, strict=True)
        ]
    pairs = zip(curves, labels, strict=True)
    return [dataclasses.replace(curve, label=label) for curve, label in pairs]


def warning(curves: list[Curve]) -> str | None:
    """The reason why the curves cannot be compared, None if they can."""
    judges = frozenset().union(*(curve.judges for curve in curves))
    if len(judges) <= 1:
        return None
    listed = "; ".join(f"{count:,} samples by {name}" for name, count in sorted(judges))
    return f"not comparable: judged by different evaluators or numbers of samples ({listed})"


def draw_plot(curves: list[Curve], metric: str, x: str, log: str, output: str | Path) -> None:
    """Writes the plot.

    Args:
      curves: the curves, with labels of their own.
      metric: the vertical axis.
      x: the horizontal axis, "steps", "seconds" or "images".
      log: which axes are logarithmic: "", "x", "y" or "xy".
      output: the PNG.

    Raises:
      ValueError: values that a logarithmic axis cannot show; no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error

    for axis in log:
        if any(value <= 0 for curve in curves for value in getattr(curve, axis)):
            raise ValueError(f"--log {log}: values on {axis} are not all above 0; leave {axis} out")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for curve in curves:
        mark = "o" if len(curve.x) <= MARKED else None
        axes.plot(curve.x, curve.y, marker=mark, markersize=4, label=curve.label)
    axes.set_xlabel(AXES[x])
    axes.set_ylabel(METRIC_LABELS.get(metric, metric))
    judges = frozenset().union(*(curve.judges for curve in curves))
    if len(judges) == 1:
        ((name, count),) = judges
        axes.set_title(f"{count:,} samples, judged by {name.rpartition(' ')[0]}", fontsize="medium")
    for name in log:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(LogFormatter())  # 90, not 9 × 10¹
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    with whole_file(output) as file:
        figure.savefig(file, format="png", dpi=150)


def parse_plot_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's settings."""
    parser = ArgumentParser(page=PAGE)
    parser.add_argument("runs", nargs="+", help="workdirs, or their metrics.jsonl")
    parser.add_argument("--x", choices=AXES, default="steps", help="the horizontal axis")
    parser.add_argument("--metric", default="eval_fid", help="a name in metrics.jsonl")
    parser.add_argument("--log", choices=("", "x", "y", "xy"), default="", help="log axes")
    parser.add_argument("--labels", default="", help="names of the runs, joined by commas")
    parser.add_argument("--output", required=True, help="the PNG")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    arguments = parse_plot_flags(argv)
    with command_ending(arguments):
        curves = [read_curve(run, arguments.metric, arguments.x) for run in arguments.runs]
        labels = arguments.labels.split(",") if arguments.labels else []
        curves = named(curves, arguments.runs, labels)
        if text := warning(curves):
            print(f"warning: {text}", file=sys.stderr)
        draw_plot(curves, arguments.metric, arguments.x, arguments.log, arguments.output)
        for curve in curves:
            print(f"{curve.label}: {len(curve.x)} points, the last {curve.y[-1]:.4g}")
        print(arguments.output)


if __name__ == "__main__":
    with ending_quietly():
        main()
