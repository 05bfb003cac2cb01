"""The flags of `python -m mdt_jax.evaluate`, most of which are those of `mdt_jax.sample`."""

from __future__ import annotations

from absl import flags

from mdt_jax.evaluation import SPLIT_SIZE
from mdt_jax.sample import flags as sample_flags

# Flags of `mdt_jax.sample` that have no meaning here.
_NOT_SAMPLING = ("inpaint", "mask", "resamples", "masked_share", "output", "keep_parts")
SAMPLING_FLAGS = tuple(flag for flag in sample_flags.SAMPLE_FLAGS if flag[1] not in _NOT_SAMPLING)
EVALUATE_FLAGS = (
    (flags.DEFINE_string, "reference", None, "An npz in ADM's layout, or images as --samples."),
    (flags.DEFINE_string, "samples", None, "Npz (several: A,B), folder of them or images, run."),
    (flags.DEFINE_string, "inception", None, "Weights of Inception-v3: a folder or a file."),
    (flags.DEFINE_string, "output", None, "Where the JSON goes; nowhere by default."),
    (flags.DEFINE_integer, "feature_batch_size", 64, "Images through Inception at a time."),
    (flags.DEFINE_integer, "split_size", SPLIT_SIZE, "Images in a split."),
    (flags.DEFINE_integer, "neighbours", 3, "k of precision and recall."),
    (flags.DEFINE_bool, "recompute_reference", False, "Pass over stored mu and sigma."),
)

GROUPS = {
    "The images": ("reference", "recompute_reference", "samples"),
    "The judgement": ("inception", "feature_batch_size", "split_size", "neighbours", "output"),
} | {
    f"Sampling first: {title[0].lower()}{title[1:]}": kept
    for title, names in sample_flags.GROUPS.items()
    if (kept := tuple(name for name in names if name not in _NOT_SAMPLING))
}


def define_flags(f: flags.FlagValues) -> None:
    """The command's flags."""
    sample_flags.define_all(f, (*EVALUATE_FLAGS, *SAMPLING_FLAGS))
