"""Cycles of a Pallas kernel, from the TPU compiler's final schedule of it.

The compiler gives no estimate for a kernel, but writes its schedule: very long instruction words
("bundles"), one for each cycle, waits included. The text tells how deep in loops a bundle is and
how often they turn. A region guarded by a comparison with a constant, such as the work of the first
or the last step, is counted once for each turn of the outer grid, unless it holds most of the
bundles: then it is the kernel's body. Regions with other guards are counted in every turn.
"""

from __future__ import annotations

import dataclasses
import math
import re

_BUNDLE = re.compile(
    r"^\s*(?:0x)?([0-9a-f]+)\s+(LB:|LH:|LE:|PB:|PF:|CT:)?\s*:?\s*(>*)\s*:?\s*\{(.*)$"
)
_BRANCH = re.compile(r"sbr\.rel \((!?)(%p\w+)\) target = \$region(\d+)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %s\w+, (\d+) /\* loop exit test \*/")
_COMPARISON = re.compile(r"(%p\w+) = scmp\.(?:ne|eq)\.s32\.totalorder %s\w+, \d+")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One instruction word.

    Attributes:
      opens_loop: whether it is the first of a loop's body.
      depth: the number of loops around it.
      text: its instructions.
    """

    opens_loop: bool
    depth: int
    text: str


def parse_bundles(text: str) -> list[Bundle]:
    """Reads the bundles of a dump's `final_bundles` file, in order."""
    bundles = []
    for line in text.splitlines():
        found = _BUNDLE.match(line)
        if found:
            bundles.append(Bundle(found[2] == "LB:", len(found[3]), found[4]))
        elif bundles:  # the rest of a bundle whose comments hold line breaks
            last = bundles[-1]
            bundles[-1] = dataclasses.replace(last, text=f"{last.text} {line}")
    return bundles


def cycles(text: str, grid: tuple[int, ...], steps: int | None = None) -> int:
    """The cycles of a kernel on one core.

    Args:
      text: the contents of its `final_bundles` file.
      grid: the sizes of the kernel's grid.
      steps: the turns of the grid on this core; all by default.

    Raises:
      ValueError: a text without bundles.
    """
    bundles = parse_bundles(text)
    if not bundles:
        raise ValueError("the schedule has no bundles; the compiler's dump may have changed")
    steps = math.prod(grid) if steps is None else steps
    turns = _turns(bundles, steps)
    once = _guarded(bundles)
    inner = grid[-1] if grid else 1
    total = 0.0
    for i, times in enumerate(turns):
        total += times / inner if once[i] and bundles[i].depth else times
    return round(total)


def _turns(bundles: list[Bundle], steps: int) -> list[int]:
    """How often each bundle runs: the grid's loop `steps` times, inner ones by their exit tests."""
    counts: list[int] = []
    # The turns of the loops around a bundle, outermost first; loops of one depth may follow.
    stack: list[int] = []
    for i, bundle in enumerate(bundles):
        del stack[bundle.depth :]
        if bundle.opens_loop and bundle.depth:
            del stack[bundle.depth - 1 :]
        while len(stack) < bundle.depth:
            stack.append(_loop_turns(bundles, i, len(stack) + 1) if stack else steps)
        counts.append(math.prod(stack))
    return counts


def _loop_turns(bundles: list[Bundle], first: int, depth: int) -> int:
    """The turns of a loop that starts at a bundle, from its exit test; 1 without such a test."""
    for i in range(first, len(bundles)):
        bundle = bundles[i]
        if bundle.depth < depth or (i > first and bundle.opens_loop and bundle.depth == depth):
            break
        if bundle.depth == depth and (found := _EXIT.search(bundle.text)):
            return int(found[1])
    return 1


def _guarded(bundles: list[Bundle]) -> list[bool]:
    """For each bundle, whether a comparison with a constant guards it."""
    guards = {name for bundle in bundles for name in _COMPARISON.findall(bundle.text)}
    guarded = [False] * len(bundles)
    for i, bundle in enumerate(bundles):
        for _, predicate, region in _BRANCH.findall(bundle.text):
            if predicate not in guards:
                continue
            target = re.compile(rf"region {region}\b")
            end = next((j for j in range(i + 1, len(bundles)) if target.search(bundles[j].text)), i)
            if end - i < len(bundles) / 2:
                guarded[i + 1 : end] = [True] * max(end - i - 1, 0)
    return guarded
