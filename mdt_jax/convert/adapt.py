"""Fitting a network's parameters to one of other classes, resolution, patches or decoder depth.

Parameters that keep their meaning keep their bits, those that depend on the resolution are
resampled, and those without a counterpart are freshly initialised. A report names everything that
changed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from einops import rearrange

from mdt_jax.convert import trees
from mdt_jax.convert.architecture import Architecture
from mdt_jax.convert.trees import Tree

# Settings of the blocks themselves: weights that differ in one of these cannot be fitted.
_FIXED = ("family", "hidden_size", "depth", "num_heads", "mlp_ratio")
_UNUSED_BIAS_ROWS = 3  # at the end of every bias table; no model uses them


@dataclasses.dataclass
class AdaptationReport:
    """The changes of an adaptation: by kind, pairs of a parameter's path and the change's text.

    Attributes:
      loaded: parameters with the source's bits.
      resplit: parameters with the source's bits, but in other stacks.
      resized: parameters resampled to another grid of tokens.
      redrawn: parameters freshly initialised, in whole or in the part that the text names.
      left: parameters of the source, or the parts of them that the text names, that the new network
        has no place for.
    """

    loaded: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    resplit: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    resized: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    redrawn: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    left: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        """One line for all loaded parameters, then one for each other change."""
        lines = [f"loaded    {len(self.loaded)} arrays unchanged"]
        for kind, label in (
            ("resplit", "re-split"),
            ("resized", "resized"),
            ("redrawn", "re-drawn"),
            ("left", "left"),
        ):
            lines += [f"{label:<9} {path}: {what}" for path, what in getattr(self, kind)]
        return "\n".join(lines)


# An adapted array, the name of the report's list it belongs to, and its text there.
_Fitted = tuple[np.ndarray, str, str]


def adapt(
    source: Tree, have: Architecture, want: Architecture, fresh: Callable[[str], np.ndarray]
) -> tuple[Tree, AdaptationReport]:
    """The parameters of one network, fitted to another.

    Args:
      source: parameter tree of NumPy arrays, float32, float16 or bfloat16.
      have: the source's network.
      want: the network to fit it to. Classes, input and patch size, channels, the learned variance
        and MDT v1's decoder depth may differ.
      fresh: returns the freshly initialised array of `want`'s parameter at a path, such as
        "label_embed"; called only for those re-drawn. To adapt parameters and their EMA alike, it
        must return the same for both.

    Returns:
      The tree, of `want`'s structure and shapes, and the report. Arrays that need no change are the
      very objects of `source`. Resized ones are float32. Partly re-drawn ones have the source's
      dtype, so that the part they keep has its bits; wholly re-drawn ones have the dtype of
      `fresh`.

    Raises:
      ValueError: networks too different, naming the setting, both values and the way out; or an
        array of `source` that is not of `have`'s shape.
    """
    _refuse_other_networks(have, want)
    report = AdaptationReport()
    arrays = dict(trees.flatten(source))
    if have.family == "MDT" and have.decoder_depth != want.decoder_depth:
        arrays = _resplit(arrays, have, want, report)
    fitted = {}
    for path, array in arrays.items():
        fitted[path], kind, what = _fit(path, array, have, want, fresh)
        if array.shape != fitted[path].shape:
            what = f"{array.shape} -> {fitted[path].shape}, {what}"
        getattr(report, kind).append((path, what))
    return trees.nest(fitted), report


def resize_position_table(table: np.ndarray, grid_size: int) -> np.ndarray:
    """A position table on another grid, by bicubic interpolation.

    Equals PyTorch's `interpolate(mode="bicubic", align_corners=False)` without antialiasing: the
    cubic convolution kernel with a = -0.75, its taps clamped at the edges.

    Args:
      table: (G², width), tokens row by row.
      grid_size: side of the new grid.

    Returns:
      (grid_size², width) float32.

    Raises:
      ValueError: the number of rows is no square.
    """
    old = round(len(table) ** 0.5)
    if old**2 != len(table):
        raise ValueError(f"a position table of {len(table)} rows is not of a square grid")
    weights = _bicubic_weights(old, grid_size)
    grid = rearrange(table.astype(np.float64), "(r c) d -> r c d", r=old)
    resized = np.einsum("xr,yc,rcd->xyd", weights, weights, grid, optimize=True)
    return rearrange(resized, "x y d -> (x y) d").astype(np.float32)


def resize_relative_bias(table: np.ndarray, grid_size: int) -> np.ndarray:
    """A relative-position bias table for another grid of the same picture.

    An offset of o tokens on the new grid spans o·G/grid_size tokens of the old one. The table is
    interpolated there, linearly between offsets and linearly continued beyond the outermost, so
    that a table linear in the offset stays so, and offset 0 keeps its value. A grid of one token
    has offset 0 alone, whose value all offsets then take.

    Args:
      table: (..., (2G - 1)² + 3, heads), the rows of `positions.relative_position_index`;
        the three last, which no model uses, are copied.
      grid_size: side of the new grid.

    Returns:
      (..., (2·grid_size - 1)² + 3, heads) float32.

    Raises:
      ValueError: no grid has that number of rows.
    """
    span = round((table.shape[-2] - _UNUSED_BIAS_ROWS) ** 0.5)
    if span**2 + _UNUSED_BIAS_ROWS != table.shape[-2] or span % 2 == 0:
        raise ValueError(f"a relative-position bias table of {table.shape[-2]} rows fits no grid")
    weights = _offset_weights((span + 1) // 2, grid_size)
    offsets = table[..., :-_UNUSED_BIAS_ROWS, :].astype(np.float64)
    offsets = rearrange(offsets, "... (r c) h -> ... r c h", r=span)
    resized = np.einsum("xr,yc,...rch->...xyh", weights, weights, offsets, optimize=True)
    resized = rearrange(resized, "... x y h -> ... (x y) h")
    return np.concatenate([resized, table[..., -_UNUSED_BIAS_ROWS:, :]], axis=-2, dtype=np.float32)


def _bicubic_weights(old: int, new: int) -> np.ndarray:
    """(new, old) float64 weights of the old samples in each new one, along one axis."""
    a = -0.75
    positions = (np.arange(new) + 0.5) * old / new - 0.5
    lower = np.floor(positions).astype(int)
    weights = np.zeros((new, old))
    for tap in range(-1, 3):
        x = np.abs(positions - (lower + tap))
        near = ((a + 2) * x - (a + 3)) * x**2 + 1
        far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
        # Taps clamped to the same edge sample add up.
        clamped = np.clip(lower + tap, 0, old - 1)
        np.add.at(weights, (np.arange(new), clamped), np.where(x <= 1, near, far))
    return weights


def _offset_weights(old: int, new: int) -> np.ndarray:
    """(2·new - 1, 2·old - 1) float64 weights of the old offsets in each new one, linear.

    `old` and `new` are the sides of the grids in tokens.
    """
    if old == 1:
        return np.ones((2 * new - 1, 1))
    positions = np.arange(1 - new, new) * old / new + (old - 1)
    lower = np.clip(np.floor(positions).astype(int), 0, 2 * old - 3)
    upper_share = positions - lower  # below 0 or above 1 where the table is continued
    weights = np.zeros((2 * new - 1, 2 * old - 1))
    rows = np.arange(2 * new - 1)
    weights[rows, lower] = 1 - upper_share
    weights[rows, lower + 1] = upper_share
    return weights


def _refuse_other_networks(have: Architecture, want: Architecture) -> None:
    for setting in _FIXED:
        old, new = getattr(have, setting), getattr(want, setting)
        if setting == "mlp_ratio" and int(have.hidden_size * old) == int(want.hidden_size * new):
            continue  # a ratio that was read off the weights is a quotient of whole numbers
        if old != new:
            raise ValueError(
                f"{setting} is {old} in the weights and {new} in the model, and blocks cannot be "
                f"fitted to that; set the model's {setting} to {old}, or start from weights of "
                f"{setting} {new}"
            )
    old, new = have.decoder_depth, want.decoder_depth
    if have.family == "MDTv2" and old != new:
        raise ValueError(
            f"decoder_depth is {old} in the weights and {new} in the model, and MDTv2's shortcuts "
            f"make in-, out- and decoder blocks different layers; set the model's decoder_depth to "
            f"{old}, or start from weights of decoder_depth {new} (MDT v1's blocks can be re-split)"
        )


def _resplit(
    arrays: dict[str, np.ndarray], have: Architecture, want: Architecture, report: AdaptationReport
) -> dict[str, np.ndarray]:
    """MDT v1's blocks, which are all of one kind, divided at another depth between its stacks."""
    cut = want.depth - want.decoder_depth
    resplit = dict(arrays)
    for path, decoder in arrays.items():
        stack, _, leaf = path.partition("/")
        if stack != "decoder_blocks":
            continue
        blocks = np.concatenate([arrays[f"encoder_blocks/{leaf}"], decoder])
        if len(blocks) != have.depth:
            raise ValueError(f"{leaf} is of {len(blocks)} blocks, not of depth {have.depth}")
        resplit[f"encoder_blocks/{leaf}"], resplit[path] = blocks[:cut], blocks[cut:]
    what = (
        f"{have.depth - have.decoder_depth} + {have.decoder_depth} -> "
        f"{cut} + {want.decoder_depth} blocks, all of them kept, "
        f"decoder_depth {have.decoder_depth} -> {want.decoder_depth}"
    )
    report.resplit.append(("encoder_blocks, decoder_blocks", what))
    return resplit


def _fit(
    path: str,
    array: np.ndarray,
    have: Architecture,
    want: Architecture,
    fresh: Callable[[str], np.ndarray],
) -> _Fitted:
    """One parameter, fitted by the rule for its path."""
    if path == "label_embed":
        return _fit_labels(path, array, have, want, fresh)
    if path in ("pos_embed", "decoder_pos_embed") or path.endswith("attn/relative_bias"):
        return _fit_grid(path, array, have, want)
    if path.startswith("patch_embed/proj/"):
        changes = _changes(have, want, "patch_size", "in_channels")
        return (fresh(path), "redrawn", changes) if changes else (array, "loaded", "")
    if path.startswith("final_layer/linear/"):
        return _fit_output(path, array, have, want, fresh)
    return array, "loaded", ""


def _fit_labels(
    path: str,
    table: np.ndarray,
    have: Architecture,
    want: Architecture,
    fresh: Callable[[str], np.ndarray],
) -> _Fitted:
    """The label table: class rows are re-drawn for other classes, and the last, null row is kept.

    The single row of an unconditional network is its null row: the label where there is none.
    """
    had_null, wants_null = (a.null_class or a.num_classes == 0 for a in (have, want))
    if len(table) != have.num_classes + had_null:
        raise ValueError(
            f"{path} has {len(table)} rows, not those of {have.num_classes} classes"
            + (" and the null class" if had_null else "")
        )
    same_classes = have.num_classes == want.num_classes
    if same_classes and had_null == wants_null:
        return table, "loaded", ""

    redraws_classes = not same_classes and want.num_classes > 0
    redraws_null = wants_null and not had_null
    drawn = fresh(path).astype(table.dtype) if redraws_classes or redraws_null else table
    classes = (drawn if redraws_classes else table)[: want.num_classes]
    null = (drawn if redraws_null else table)[-1:] if wants_null else table[:0]
    done = [] if same_classes else [f"num_classes {have.num_classes} -> {want.num_classes}"]
    if redraws_classes:
        done.append("class rows re-drawn")
    elif not same_classes:
        done.append("class rows left")
    else:
        done.append("class rows kept")
    if redraws_null:
        done.append("null row re-drawn, the weights have none")
    elif wants_null:
        done.append("null row kept")
    elif had_null:
        done.append("null row left")
    kind = "redrawn" if redraws_classes or redraws_null else "left"
    return np.concatenate([classes, null]), kind, ", ".join(done)


def _fit_grid(path: str, table: np.ndarray, have: Architecture, want: Architecture) -> _Fitted:
    """A table over the grid of tokens, of positions or relative positions, resized with the grid.

    DiT's fixed table is resized too. Its blocks learned to read sin-cos coordinates from 0 to
    G - 1. On a larger grid the formula would give coordinates they never saw; the resized table
    spreads the known ones over the same picture. Every checkpoint holds the table, so it need not
    follow the formula.
    """
    old, new = have.grid_size, want.grid_size
    is_bias = path.endswith("attn/relative_bias")
    rows = (2 * old - 1) ** 2 + _UNUSED_BIAS_ROWS if is_bias else old**2
    if table.shape[-2] != rows:
        raise ValueError(
            f"{path} has {table.shape[-2]} rows, not the {rows} of {old} x {old} tokens"
        )
    if old == new:
        return table, "loaded", ""
    grids = f"grid {old} x {old} -> {new} x {new}"
    if is_bias:
        return resize_relative_bias(table, new), "resized", f"{grids}, linear in the offset"
    return resize_position_table(table, new), "resized", f"{grids}, bicubic"


def _fit_output(
    path: str,
    array: np.ndarray,
    have: Architecture,
    want: Architecture,
    fresh: Callable[[str], np.ndarray],
) -> _Fitted:
    """The last linear layer, whose features are (p_row, p_col, channels), mean before variance."""
    changes = _changes(have, want, "patch_size", "in_channels")
    if changes:
        return fresh(path), "redrawn", changes
    if have.learn_variance == want.learn_variance:
        return array, "loaded", ""

    def per_channel(features: np.ndarray, learns_variance: bool) -> np.ndarray:
        channels = have.in_channels * (2 if learns_variance else 1)
        return rearrange(features, "... (pq c) -> ... pq c", c=channels)

    mean = per_channel(array, have.learn_variance)[..., : have.in_channels]
    changes = _changes(have, want, "learn_variance")
    if want.learn_variance:
        variance = per_channel(fresh(path), True)[..., have.in_channels :].astype(array.dtype)
        features = np.concatenate([mean, variance], axis=-1)
        kind, what = "redrawn", f"{changes}, variance outputs re-drawn, the mean's kept"
    else:
        features, kind, what = mean, "left", f"{changes}, variance outputs left, the mean's kept"
    return rearrange(features, "... pq c -> ... (pq c)"), kind, what


def _changes(have: Architecture, want: Architecture, *settings: str) -> str:
    """Those of the settings that differ, as "patch_size 2 -> 4, ..."; empty if none does."""
    pairs = [(s, getattr(have, s), getattr(want, s)) for s in settings]
    return ", ".join(f"{setting} {old} -> {new}" for setting, old, new in pairs if old != new)
