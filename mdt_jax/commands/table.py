"""Every command of `mdt` in one table: what it is called, which module it is, what it does."""

from __future__ import annotations

from typing import NamedTuple


class Command(NamedTuple):
    """A command: the module that `python -m` runs, and what it does in a few words."""

    module: str
    summary: str


# By the titles under which `mdt` lists them.
COMMANDS: dict[str, dict[str, Command]] = {
    "Train, sample, judge": {
        "train": Command("mdt_jax.train", "train a model, or go on with a run"),
        "sample": Command("mdt_jax.sample", "samples of a run or of PyTorch weights; inpainting"),
        "evaluate": Command("mdt_jax.evaluate", "FID, Inception Score, precision, recall"),
        "demo": Command("mdt_jax.demo", "a page on which a model is tried"),
        "checkpoints": Command("mdt_jax.checkpoints", "list a run's checkpoints, verify them"),
        "plot": Command("mdt_jax.commands.plot_runs", "a metric of several runs, as a picture"),
        "compare": Command(
            "mdt_jax.commands.compare_runs", "how far a run is from a published curve"
        ),
        "samples-report": Command(
            "mdt_jax.commands.samples_report", "do samples of Fashion-MNIST show their class?"
        ),
        "digits-report": Command("mdt_jax.digits_report", "judge the quick start's digits"),
    },
    "Data": {
        "prepare-dataset": Command(
            "mdt_jax.commands.prepare_dataset", "ImageNet, a folder, LSUN or Parquet, for training"
        ),
        "encode-latents": Command(
            "mdt_jax.commands.encode_latents", "a data set's latents, encoded once"
        ),
        "reference-stats": Command(
            "mdt_jax.commands.reference_stats", "a reference to evaluate against, of your data"
        ),
        "profile-input": Command(
            "mdt_jax.commands.profile_input", "does reading keep up with the model?"
        ),
    },
    "Weights": {
        "convert": Command(
            "mdt_jax.commands.convert_checkpoint", "weights and runs from PyTorch, and to it"
        ),
        "export": Command("mdt_jax.commands.export_params", "a run's averaged weights alone"),
        "publish": Command("mdt_jax.commands.push_to_hub", "a run on the Hugging Face hub"),
    },
    "Before there is a machine": {
        "compile-tpu": Command("mdt_jax.commands.compile_tpu", "memory and time on a TPU slice"),
        "compile-gpu": Command("mdt_jax.commands.compile_gpu", "memory and time on GPUs"),
    },
}


def modules() -> dict[str, str]:
    """Every command's module by the command's name."""
    return {name: command.module for part in COMMANDS.values() for name, command in part.items()}
