"""The study of learning speed: its arms, the file of its results, and what is read off them.

`learning_speed.py` makes the results. Their report says how many runs of which arm there are, so
that it can be made of some of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mdt_jax.basics.atomic import make_folder, whole_file
from mdt_jax.evaluation.curves import first_place

BASELINE, BEST = "DiT", "MDTv2"
UNMASKED, TUNED = "MDTv2 without masking", "DiT with MDTv2's recipe"
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
    UNMASKED: ("MDTv2", {"masking.masked_pass": False}, 3),
    TUNED: ("DiT", _MDTV2_RECIPE, 3),
}
AXES = {"steps": "training steps", "flops": "training FLOPs", "seconds": "seconds of training"}
# The part of a document that `write_section` replaces.
BEGIN = "<!-- learning speed: written by tools/learning_speed.py --write -->"
END = "<!-- end of learning speed -->"


@dataclasses.dataclass(frozen=True)
class Curve:
    """One run's distances.

    Attributes:
      steps: the steps after which samples were judged.
      distances: the distance at each.
      flops_per_step: model FLOPs of a step.
      final: the distance of more samples at the end, by the average's rate.
      about: date, device and version of JAX.
    """

    steps: tuple[int, ...]
    distances: tuple[float, ...]
    flops_per_step: float
    final: dict[str, float]
    about: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def last(self) -> float:
        """The distance of more samples at the end, of the better average."""
        return min(self.final.values())


@dataclasses.dataclass(frozen=True)
class Results:
    """What a study has found so far.

    Attributes:
      curves: by arm, in the order of `ARMS`, and by seed.
      step_seconds: seconds of a step by arm, measured by turns; empty where they were not.
      floor: the held-out pictures' distance; None if unknown.
      timing: when and where `step_seconds` were measured.
    """

    curves: dict[str, dict[int, Curve]]
    step_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    floor: float | None = None
    timing: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def axes(self) -> list[str]:
        """The axes of `AXES` that all arms have: seconds only where all were measured."""
        timed = self.curves.keys() <= self.step_seconds.keys()
        return [axis for axis in AXES if axis != "seconds" or timed]

    def scale(self, arm: str, axis: str) -> float:
        """What a step of an arm counts on an axis."""
        if axis == "flops":
            return statistics.median(c.flops_per_step for c in self.curves[arm].values())
        return self.step_seconds[arm] if axis == "seconds" else 1.0


def parse_run(text: str) -> tuple[str, int]:
    """A run's arm and seed from "ARM:SEED"; ValueError for others."""
    arm, _, seed = text.rpartition(":")
    if arm not in ARMS or not seed.isdecimal():
        raise ValueError(f"{text!r} is not ARM:SEED, such as {BEST}:0; arms are {', '.join(ARMS)}")
    return arm, int(seed)


def planned_runs(only: Sequence[str] = ()) -> list[tuple[str, int]]:
    """The runs as (arm, seed): those of `only`, or a seed of all arms before the next.

    Raises:
      ValueError: an unknown arm, or a seed that is no number.
    """
    if only:
        return [parse_run(text) for text in only]
    most = max(count for *_, count in ARMS.values())
    return [(arm, seed) for seed in range(most) for arm, (*_, n) in ARMS.items() if seed < n]


def read_json(path: Path) -> dict[str, Any]:
    """The file of a study's results as it is; without runs if there is no file.

    Raises:
      ValueError: the file is no results of this study.
    """
    if not path.exists():
        return {"runs": {}}
    try:
        found = json.loads(path.read_text())
        results_of(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: holds no results of this study ({reason})") from error
    return found


def results_of(found: dict[str, Any]) -> Results:
    """The results in the file's JSON."""
    curves: dict[str, dict[int, Curve]] = {}
    for name, values in found["runs"].items():
        arm, seed = parse_run(name)
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        curves.setdefault(arm, {})[seed] = Curve(**fields)
    timing = found.get("timing", {})
    return Results(
        {arm: dict(sorted(curves[arm].items())) for arm in ARMS if arm in curves},
        timing.get("step_seconds", {}),
        found.get("floor"),
        {key: value for key, value in timing.items() if key != "step_seconds"},
    )


# What is read off the curves


def speed_up(ours: Curve, theirs: Curve, goal: float) -> tuple[float, str]:
    """How many times our steps another run needs to reach a distance that one of the two reaches.

    Returns:
      The ratio, and "" if both reach the distance. Else the ratio is of all the steps of the run
      that never does: "≥" where that is theirs, a lower bound, and "≤" where it is ours.
    """
    places = [first_place(c.steps, c.distances, goal) for c in (ours, theirs)]
    bound = "≤" if places[0] is None else "≥" if places[1] is None else ""
    first, needed = (
        c.steps[-1] if place is None else place
        for c, place in zip((ours, theirs), places, strict=True)
    )
    return needed / first, bound


def speed_ups(results: Results, arm: str, whose: str) -> list[tuple[float, str]]:
    """Speed-ups in steps of an arm over `BASELINE`, one for each seed that both have.

    Args:
      results: the study's.
      arm: the arm.
      whose: the arm whose last judged distance is to be reached: `arm` or `BASELINE`.
    """
    ours, theirs = results.curves.get(arm, {}), results.curves.get(BASELINE, {})
    pairs = [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
    return [speed_up(a, b, (a if whose == arm else b).distances[-1]) for a, b in pairs]


def on_axis(results: Results, arm: str, axis: str) -> float:
    """The factor from a speed-up in steps over `BASELINE` to one on another axis."""
    return results.scale(BASELINE, axis) / results.scale(arm, axis)


def describe(pairs: list[tuple[float, str]], factor: float) -> str:
    """Speed-ups in words: the median over the pairs, their range, and who never arrived."""
    if not pairs:
        return "no seed in common"
    ratios = sorted(ratio * factor for ratio, _ in pairs)
    bounds = [bound for _, bound in pairs if bound]
    text = f"{bounds[0]} " if bounds else ""
    text += f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    if not bounds:
        return text
    who = BASELINE if bounds[0] == "≥" else "the arm"
    return f"{text}, never reached by {who} in {len(bounds)} of {len(pairs)}"


# The report


def describe_runs(results: Results) -> str:
    """How many of the study's runs there are, by arm."""
    there = {arm: len(results.curves.get(arm, {})) for arm in ARMS}
    listed = ", ".join(f"{arm} {n} of {ARMS[arm][2]}" for arm, n in there.items())
    return f"{sum(there.values())} of {len(planned_runs())} runs are done: {listed}."


def verdict(results: Results) -> str:
    """The study's answer in a sentence or two: MDTv2 against DiT by steps and by FLOPs."""
    pairs = speed_ups(results, BEST, BASELINE)
    if not pairs:
        return f"No seed has been trained of both {BASELINE} and {BEST} yet."
    steps, work = (describe(pairs, on_axis(results, BEST, axis)) for axis in ("steps", "flops"))
    median = statistics.median(ratio for ratio, _ in pairs) * on_axis(results, BEST, "flops")
    said = "faster" if median > 1 else "not faster"
    text = (
        f"By FLOPs {BEST} is {said} than {BASELINE} here: to reach the distance at which "
        f"{BASELINE} ends, {BASELINE} needs {work} times {BEST}'s FLOPs and {steps} times its "
        f"steps, the median and range of {len(pairs)} pair{'s' if len(pairs) > 1 else ''} of seeds."
    )
    others = [
        f"{arm} {describe(found, on_axis(results, arm, 'flops'))}"
        for arm in (UNMASKED, TUNED, "MDT")
        if (found := speed_ups(results, arm, BASELINE))
    ]
    return text + (f" The other arms' by FLOPs: {'; '.join(others)}." if others else "")


def report_lines(results: Results) -> list[str]:
    """The report in Markdown: what there is, the answer, and the tables."""
    timed = "seconds" in results.axes
    header = ["arm", "seeds", "distance", "GFLOP a step", *(["seconds a step"] if timed else [])]
    out = [describe_runs(results), "", verdict(results)]
    if not results.curves:
        return out
    out += ["", f"| {' | '.join(header)} |", "|" + " --- |" * len(header)]
    for arm, seeds in results.curves.items():
        last = [curve.last for curve in seeds.values()]
        spread = f" ± {statistics.stdev(last):.3f}" if len(last) > 1 else ""
        cells = [arm, f"{len(last)} of {ARMS[arm][2]}", f"{statistics.fmean(last):.3f}{spread}"]
        cells.append(f"{results.scale(arm, 'flops') / 1e9:,.1f}")
        cells += [f"{results.step_seconds[arm]:.3f}"] if timed else []
        out.append(f"| {' | '.join(cells)} |")
    if results.floor is not None:
        out.append(f"| held-out pictures | | {results.floor:.3f} |" + " |" * (len(header) - 3))
    others = [arm for arm in results.curves if arm != BASELINE]
    if BASELINE not in results.curves or not others:
        return out
    for whose in ("the arm's", f"{BASELINE}'s"):
        title = f"{BASELINE} over the arm, to reach {whose} last distance"
        out += ["", f"| {title} | {' | '.join(results.axes)} |"]
        out.append("|" + " --- |" * (1 + len(results.axes)))
        for arm in others:
            pairs = speed_ups(results, arm, arm if whose == "the arm's" else BASELINE)
            cells = [describe(pairs, on_axis(results, arm, axis)) for axis in results.axes]
            out.append(f"| {arm} | {' | '.join(cells)} |")
    if timed:
        about = results.timing
        seconds = (
            f"Seconds are a step's, the arms by turns, medians of {about.get('rounds')} rounds on "
            f"{about.get('device')} ({about.get('date')}, load {about.get('load_average')}), times "
            "the steps: the clock of the runs themselves counted whatever else the machine did."
        )
    else:
        seconds = "Seconds have not been measured yet: `--time_steps` does, on a quiet machine."
    return [*out, "", seconds]


def draw_plots(results: Results, folder: Path) -> list[Path]:
    """Writes a plot of the distance against each axis: means over the seeds, and their range.

    Raises:
      ValueError: there is no matplotlib.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogFormatter
    except ImportError as error:
        raise ValueError('plots need matplotlib: pip install -e ".[plot]"') from error

    make_folder(folder, "--plots")
    written = []
    for name in results.axes:
        figure = Figure(figsize=(7, 4.5), layout="constrained")
        axes = figure.add_subplot()
        for arm, seeds in results.curves.items():
            columns = list(zip(*(curve.distances for curve in seeds.values()), strict=False))
            steps = next(iter(seeds.values())).steps[: len(columns)]
            places = [step * results.scale(arm, name) for step in steps]
            means = [statistics.fmean(column) for column in columns]
            label = f"{arm} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})"
            (line,) = axes.plot(places, means, marker="o", markersize=4, label=label)
            low, high = ([pick(column) for column in columns] for pick in (min, max))
            axes.fill_between(places, low, high, alpha=0.2, color=line.get_color())
        if results.floor is not None:
            axes.axhline(results.floor, color="grey", linestyle=":", label="held-out pictures")
        axes.set(xlabel=AXES[name], ylabel="Fréchet distance", xscale="log", yscale="log")
        for minor in (axes.xaxis, axes.yaxis) if name != "flops" else (axes.yaxis,):
            minor.set_major_formatter(LogFormatter())  # 90, not 9 × 10¹
            minor.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
        axes.grid(True, which="both", alpha=0.3)
        axes.legend()
        path = folder / f"learning_speed_{name}.png"
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=150)
        written.append(path)
    return written


def write_section(document: Path, lines: list[str], plots: Sequence[Path] = ()) -> None:
    """Replaces the part of a document between `BEGIN` and `END` by a report and its plots.

    Raises:
      ValueError: the document has no such part.
    """
    before = document.read_text()
    head, begin, rest = before.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{document}: has no part between {BEGIN} and {END}")
    places = (os.path.relpath(plot, document.parent) for plot in plots)
    shown = [f"![Distance by {Path(place).stem.rpartition('_')[2]}]({place})" for place in places]
    text = "\n".join([*lines, *(["", *shown] if shown else [])])
    with whole_file(document) as file:
        file.write(f"{head}{BEGIN}\n{text}\n{END}{tail}".encode())
