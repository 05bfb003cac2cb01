"""How far a run is from a published curve, or from another run, at the same step.

    mdt compare runs/s2 MDTv2-S/2
    mdt compare runs/mine runs/theirs
    mdt compare --error_budget runs/fashion --output budget.json

RUN is a workdir or its metrics.jsonl, judged while it trained (`eval_every`); REFERENCE is another,
or a model with published figures (`evaluation.published`). Wherever one of the two has a point
between the first and the last of the other, it says both distances there. Between two points the
logarithm of the distance is taken to be linear; beyond them nothing is said, and a pair without a
step in common is an error. Differences in how the two were judged are listed before.

`--error_budget` measures how much a run's distance moves with the average's rate, the sampler and
its steps, guidance, the number and seed of samples and the reference, one at a time. It takes a run
that a small classifier judges, such as one of configs/fashion.py (docs/reproduce.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mdt_jax.basics.help_page import Page
from mdt_jax.basics.names import printable
from mdt_jax.basics.places import read_text
from mdt_jax.evaluation import published
from mdt_jax.evaluation.curves import distance_at, first_place
from mdt_jax.parallel.command import command_ending, ending_quietly
from mdt_jax.parallel.flag_parsing import ArgumentParser

PAGE = Page(
    "mdt compare",
    "python -m mdt_jax.commands.compare_runs",
    "RUN REFERENCE | --error_budget RUN [OPTION ...]",
    __doc__,
)
CONFIG_KEYS = {
    "model": ("model", "name"),
    "batch": ("batch_size",),
    "EMA rate": ("ema_rates",),
    "sampler": ("eval", "sampler"),
    "sampling steps": ("eval", "steps"),
    "guidance": ("eval", "cfg_scale"),
}
# Settings of judging that are those of sampling where they are None.
_OF_SAMPLING = ("sampler", "steps", "cfg_scale")


@dataclasses.dataclass(frozen=True)
class JudgedCurve:
    """A run's or a paper's distances.

    Attributes:
      name: the workdir or the model.
      steps, distances: the points, by growing step.
      about: how they were made and judged, by what people call it; what is not known is not there.
      source: the paper; empty for a run.
    """

    name: str
    steps: tuple[int, ...]
    distances: tuple[float, ...]
    about: Mapping[str, Any]
    source: str = ""


def published_curve(name: str) -> JudgedCurve:
    """The published curve of a model, a key of `published.CURVES`."""
    found = published.CURVES[name]
    about = {
        "model": name,
        "evaluator": "inception-2015-12-05",
        "samples": published.SAMPLES,
        "batch": published.BATCH_SIZE,
        "EMA rate": published.EMA_RATE,
        "sampler": published.SAMPLER,
        "sampling steps": published.SAMPLING_STEPS,
        "guidance": 1.0,
    }
    return JudgedCurve(name, found.steps, found.fids, about, found.source)


def run_curve(place: str | Path) -> JudgedCurve:
    """The judgements of a run in its metrics.jsonl.

    Raises:
      FileNotFoundError: no run there.
      ValueError: a run that was never judged, or by several evaluators or numbers of samples.
    """
    from mdt_jax.training.metrics import METRICS_FILE, read_lines

    path = Path(place)
    path = path / METRICS_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(
            f"{printable(path)}: no such file; give a run's workdir or its {METRICS_FILE}, or one "
            f"of {', '.join(published.CURVES)}"
        )
    lines = {line["step"]: line for line in read_lines(path) if "eval_fid" in line}
    points = {step: float(lines[step]["eval_fid"]) for step in sorted(lines)}
    points = {step: fid for step, fid in points.items() if math.isfinite(fid) and fid > 0}
    if not points:
        raise ValueError(
            f"{printable(path)}: no judged samples (eval_fid); config.eval_every has a run judged"
        )
    judges = {(lines[s].get("evaluator"), int(lines[s].get("eval_samples", 0))) for s in points}
    if len(judges) > 1:
        listed = "; ".join(f"{count:,} by {name}" for name, count in sorted(judges, key=str))
        raise ValueError(
            f"{printable(path)}: judged in several ways ({listed}), whose distances are no one "
            "curve; leave lines of one alone in a copy"
        )
    ((evaluator, samples),) = judges
    about = {"evaluator": evaluator, "samples": samples} | _settings(path.parent / "config.json")
    known = {key: value for key, value in about.items() if value}
    return JudgedCurve(str(place), tuple(points), tuple(points.values()), known)


def _settings(path: Path) -> dict[str, Any]:
    """What a run's config.json says of `CONFIG_KEYS`; empty without the file."""
    try:
        config = json.loads(read_text(path))
    except FileNotFoundError:
        return {}
    found = {}
    for name, keys in CONFIG_KEYS.items():
        value = config
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if value is None and keys[-1] in _OF_SAMPLING:
            value = config.get("sample", {}).get(keys[-1])
        found[name] = value[0] if isinstance(value, list) and value else value
    return found


def differences(run: JudgedCurve, reference: JudgedCurve) -> list[str]:
    """What makes the two distances less comparable, a sentence each."""
    out = []
    for name, theirs in reference.about.items():
        ours = run.about.get(name)
        if name == "evaluator":
            # The digest after a run's evaluator has no counterpart in a paper.
            same = ours == theirs or (reference.source and str(ours).split(" ")[0] == theirs)
        else:
            same = ours == theirs or str(ours) == str(theirs)
        if not same:
            out.append(f"{name}: {'not known' if ours is None else ours}, reference {theirs}")
    return out


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two distances at one step.

    Attributes:
      step: the step.
      ours, theirs: the run's and the reference's distance.
      between: whose distance was read off between two of its points: "run", "reference" or "".
    """

    step: int
    ours: float
    theirs: float
    between: str

    @property
    def excess(self) -> float:
        """The run's distance over the reference's, less 1."""
        return self.ours / self.theirs - 1


def compare(run: JudgedCurve, reference: JudgedCurve) -> list[Comparison]:
    """Both distances at the reference's points and at the run's last, as far as both are known.

    Raises:
      ValueError: the curves have no step in common; the message says where each is.
    """
    found = []
    for step in sorted({*reference.steps, run.steps[-1]}):
        ours = distance_at(run.steps, run.distances, step)
        theirs = distance_at(reference.steps, reference.distances, step)
        if ours is not None and theirs is not None:
            between = "run" if step not in run.steps else ""
            between = between or ("reference" if step not in reference.steps else "")
            found.append(Comparison(step, ours, theirs, between))
    if not found:
        spans = " and ".join(
            f"{c.name} {'at' if len(c.steps) == 1 else 'from'} step {c.steps[0]:,}"
            + (f" to {c.steps[-1]:,}" if len(c.steps) > 1 else "")
            for c in (run, reference)
        )
        raise ValueError(
            f"no step in common: {spans} is known, and nothing is guessed beyond; judge the run at "
            "the reference's steps (config.eval_every)"
        )
    return found


def report(run: JudgedCurve, reference: JudgedCurve) -> str:
    """The comparison as text.

    Raises:
      ValueError: as in `compare`.
    """
    rows = compare(run, reference)
    out = [f"reference: {reference.name}{', ' + reference.source if reference.source else ''}"]
    if found := differences(run, reference):
        out += ["made or judged otherwise, so the figures below are no clean comparison:"]
        out += [f"  {text}" for text in found]
    out += [f"{'step':>12}  {'run':>10}  {'reference':>10}  {'run over it':>11}"]
    notes = {"": "", "run": "  run: between two judgements", "reference": "  reference: between"}
    notes["reference"] += " two points"
    for row in rows:
        out.append(
            f"{row.step:12,}  {row.ours:10.4g}  {row.theirs:10.4g}  {row.excess:+11.1%}"
            f"{notes[row.between]}"
        )
    for step, distance in zip(reference.steps, reference.distances, strict=True):
        place = first_place(run.steps, run.distances, distance)
        if place is None:
            text = f"not yet, at {min(run.distances):.4g} so far (step {run.steps[-1]:,})"
        elif place == run.steps[0]:
            text = f"by step {run.steps[0]:,} at the latest, where the run was first judged"
        else:
            text = f"at step {place:,.0f}, {place / step:.2f} of the reference's"
        out.append(f"the reference's {distance:.4g} of step {step:,}: reached {text}")
    return "\n".join(out)


def parse_compare_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's settings."""
    parser = ArgumentParser(page=PAGE)
    parser.add_argument("run", nargs="?", help="a workdir, or its metrics.jsonl")
    parser.add_argument(
        "reference", nargs="?", help="another, or one of " + ", ".join(published.CURVES)
    )
    parser.add_argument("--error_budget", type=Path, help="a workdir: measure what moves distances")
    parser.add_argument("--num_samples", type=int, default=5_000, help="samples of the budget")
    parser.add_argument("--batch_size", type=int, default=250, help="samples at a time")
    parser.add_argument("--output", type=Path, help="where the budget's JSON goes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args = parse_compare_flags(argv)
    with command_ending(args):
        if args.error_budget:
            # Here and not above: comparing needs no JAX.
            from mdt_jax.commands import error_budget

            error_budget.run(args.error_budget, args.num_samples, args.batch_size, args.output)
        elif args.run and args.reference:
            known = args.reference in published.CURVES
            reference = (published_curve if known else run_curve)(args.reference)
            print(report(run_curve(args.run), reference))
        else:
            raise ValueError("give RUN and REFERENCE, or --error_budget WORKDIR")


if __name__ == "__main__":
    with ending_quietly():
        main()
