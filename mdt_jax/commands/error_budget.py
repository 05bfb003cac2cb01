"""The error budget of a distance: how far it moves with each choice of how a run is judged.

One choice is changed at a time, all else as in the row "as judged": the run's first average, its
settings of judging, one seed, the training images as reference. Distances are in the features of
the run's own classifier. What a row says of a full-size FID is its direction, not its size.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mdt_jax import checkpoints, sampling
from mdt_jax import config as config_lib
from mdt_jax.basics.atomic import check_writable, whole_file
from mdt_jax.sampling import images
from mdt_jax.training import run_evaluation
from mdt_jax.training.judges import Judge

SEED = 1
SEEDS = (2, 3)
SAMPLERS = (("ddpm", 250), ("ddim", 50), ("dpm++", 10))
SCALES = (1.25, 1.5, 2.0)
SHARES = (0.2, 0.5)
# What to expect of FID-50K on ImageNet, by the choice.
EXPECTED = {
    "EMA rate": (
        "while a run is short, a high rate lags behind: 0.9999 averages 10,000 steps. Late, the "
        "higher rate is nearer; at some hundred thousand steps 0.9999 is what was published"
    ),
    "sampler": (
        "DDPM's 250 steps are what was published. Fewer steps are farther, most for DDPM; 20 to 25 "
        "of DPM-Solver++ are near 250 of DDPM, on either side"
    ),
    "guidance": (
        "a little is much nearer, far more so than here: XL/2 goes from 6 to 2 at some 1.5, or the "
        "power-cosine 3.8; much is farther again. Compare unguided with unguided"
    ),
    "samples": "fewer are farther, by a bias that grows as one over their number; 50,000 are usual",
    "seed": "either way; with 50,000 samples some hundredths to a tenth",
    "reference": (
        "either way: use ADM's batch, whose statistics are of the whole training set. Fewer images "
        "of your own are farther, and so is another crop or resize"
    ),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      choice: what was changed, a key of `EXPECTED`; empty for the base.
      value: what to.
      distance: the Fréchet distance.
    """

    choice: str
    value: str
    distance: float


def measure(
    workdir: Path, num_samples: int, batch_size: int, tell: Any = lambda row: None
) -> list[Row]:
    """Measures every choice on a run; the first row is the base.

    Args:
      workdir: a run that a classifier judges.
      num_samples: samples of each row.
      batch_size: samples at a time.
      tell: is called with each row as it is known.

    Raises:
      CheckpointError: no run there.
      ValueError: a run that no classifier judges.
    """
    step, meta = checkpoints.read_meta(workdir)
    config = config_lib.from_json(meta["config"])
    judge = Judge(config, workdir / run_evaluation.CLASSIFIER_FILE)
    rates = list(config.ema_rates)
    own = sampling.judging_options(config)
    rows: list[Row] = []

    def add(choice: str, value: Any, distance: float) -> None:
        rows.append(Row(choice, str(value), distance))
        tell(rows[-1])

    def draw(rate: float = rates[0], seed: int = SEED, **changed: Any) -> np.ndarray:
        model, params = sampling.load(workdir, ema_rate=rate, step=step)
        drawn = sampling.sample(
            model,
            params,
            num_samples=num_samples,
            key=seed,
            batch_size=batch_size,
            **own | changed,
        )
        return images.to_uint8(drawn)

    base = draw()
    add("", "as judged", judge.distance([base]))
    for split, name in (("train", "every other training image"), ("heldout", "held-out images")):
        real = _reference(judge, config, split)
        add("reference", name, judge.distance([base], judge.describe([real])))
    for share in SHARES:
        count = max(2, int(share * num_samples))
        add("samples", f"{count:,}", judge.distance([base[:count]]))
    for seed in SEEDS:
        add("seed", seed, judge.distance([draw(seed=seed)]))
    for rate in rates[1:]:
        add("EMA rate", rate, judge.distance([draw(rate)]))
    for scale in SCALES:
        add("guidance", scale, judge.distance([draw(cfg_scale=scale)]))
    for sampler, steps in SAMPLERS:
        add("sampler", f"{sampler} {steps}", judge.distance([draw(sampler=sampler, steps=steps)]))
    return rows


def _reference(judge: Judge, config: Any, split: str) -> np.ndarray:
    """Other real images to compare with: half of the training images, or held-out ones."""
    if split == "train":
        return judge.real.images[::2]
    return judge.images({"fashion_mnist": "test"}.get(config.data.name, "heldout")).images


def table(rows: list[Row]) -> str:
    """The budget in Markdown."""
    base = rows[0].distance
    out = ["| changed | to | distance | change | expect at full size |", "|" + " --- |" * 5]
    seen: set[str] = set()
    for row in rows:
        moved = f"{row.distance / base - 1:+.1%}" if row.choice else ""
        expect = EXPECTED[row.choice] if row.choice and row.choice not in seen else ""
        seen.add(row.choice)
        out.append(f"| {row.choice} | {row.value} | {row.distance:.4f} | {moved} | {expect} |")
    return "\n".join(out)


def run(workdir: Path, num_samples: int, batch_size: int, output: Path | None) -> None:
    """Measures a run's budget, prints it, and writes it as JSON."""
    if output:
        check_writable(output)
    rows = measure(
        workdir,
        num_samples,
        batch_size,
        lambda row: print(f"{row.choice} {row.value}: {row.distance:.4f}".strip(), flush=True),
    )
    print(f"\n{table(rows)}")
    if output:
        step, meta = checkpoints.read_meta(workdir)
        about = {
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
            "model": meta["config"]["model"]["name"],
            "data": meta["config"]["data"]["name"],
            "step": step,
            "num_samples": num_samples,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        with whole_file(output) as file:
            file.write(json.dumps(about, indent=1).encode() + b"\n")
