"""How `--help` of every command looks: usage, examples, what it does, its options by group."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence

SHORT = ("-h", "-?", "-help", "--help", "-helpshort", "--helpshort")
FULL = ("-helpfull", "--helpfull")
VERSION = ("-version", "--version")
_INDENT, _COLUMN = 2, 26
# An option: how it is written, such as "--workdir DIR", and what it does.
Option = tuple[str, str]


@dataclasses.dataclass(frozen=True)
class Page:
    """What `--help` of a command says, beside what its parser knows of the options.

    Attributes:
      command: how it is called, such as "mdt train".
      also: another way, such as "python -m mdt_jax.train"; empty if there is none.
      usage: what follows at the least, such as "--config NAME --workdir DIR".
      text: the module's docstring: a sentence, examples indented by four spaces, details.
      groups: the names of the options by the titles under which they stand, in order; an option
        that the parser does not know stands there itself.
    """

    command: str
    also: str
    usage: str
    text: str
    groups: Mapping[str, Sequence[str | Option]] = dataclasses.field(default_factory=dict)


def asked_for(argv: Iterable[str], words: Sequence[str]) -> bool:
    """Whether a command line, without the program's name, holds one of these flags."""
    for argument in argv:
        if argument == "--":
            return False
        if argument in words:
            return True
    return False


def render(page: Page, sections: Mapping[str, Sequence[Option]]) -> str:
    """The text of `--help`.

    Args:
      page: what it says, beside the options.
      sections: the options by title; sections without any are left out.
    """
    width = max(60, min(shutil.get_terminal_size((100, 24)).columns, 100))
    lines = ["\n".join(_wrap(f"usage: {page.command} {page.usage}", width, "       "))]
    if page.also:
        lines[0] += f"\n   or: {page.also} ..."
    examples, details = _split(page.text)
    lines += [*examples, *details]
    for title, options in sections.items():
        if options:
            lines.append("\n".join([f"{title}:", *_rows(options, width)]))
    return "\n\n".join(lines) + "\n"


def _split(text: str) -> tuple[list[str], list[str]]:
    """A docstring's first block of examples, which stands above, and its other paragraphs."""
    blocks = [block.strip("\n") for block in text.strip().split("\n\n")]
    first = next((block for block in blocks if block.startswith("    ")), None)
    examples = [first] if first else []
    return examples, [block for block in blocks if block is not first]


def _wrap(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _rows(options: Sequence[Option], width: int) -> Iterable[str]:
    for written, text in options:
        head = " " * _INDENT + written
        said = textwrap.wrap(text, width - _COLUMN, break_on_hyphens=False) or [""]
        if len(head) > _COLUMN - 2:
            yield head
        else:
            yield f"{head:<{_COLUMN}}{said.pop(0)}".rstrip()
        for line in said:
            yield " " * _COLUMN + line
