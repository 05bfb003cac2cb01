"""`--help` and `--version` of every command and tool: status 0, quickly, with an example on top."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mdt_jax.commands.table import modules

ROOT = Path(__file__).parents[1]
HEAVY = ("jax", "flax", "grain", "tensorflow_datasets", "orbax", "torch", "sklearn")
# Tools that measure this repository; those that are not here share nothing with a user's commands.
TOOLS = ("kill_test", "benchmark_conversion", "benchmark_evaluation", "benchmark_startup")
# The name of each command and tool: the arguments before --help, if it has commands of its own.
INNER = {"convert": ("to-jax", "to-torch", "inspect")}
CASES = [
    *((name, *inner) for name in modules() for inner in [(), *((i,) for i in INNER.get(name, ()))]),
    *((f"tools/{name}.py",) for name in TOOLS),
]
# Asks every command for its help in one process, since none imports what takes long.
ASK = """
import contextlib, io, json, runpy, sys, time
from absl import app, flags, logging
from mdt_jax.commands.table import modules

app.define_help_flags()
before, told = set(flags.FLAGS), []
for words in json.loads(sys.argv[1]):
    name, *arguments = words
    sys.argv = [name, *arguments]
    said, began = io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(said):
        try:
            if name in modules():
                runpy.run_module(modules()[name], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(name, run_name="__main__")
        except SystemExit as end:
            status = end.code
    own = [flag for flag in flags.FLAGS if flag not in before]
    heavy = sorted(set(json.loads(HEAVY)) & set(sys.modules))
    told.append([status, said.getvalue(), own, heavy, time.process_time() - began])
    for flag in own:
        delattr(flags.FLAGS, flag)
print(json.dumps(told))
"""


def ask(cases):
    code = ASK.replace("HEAVY", repr(json.dumps(HEAVY)))
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(cases)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def told():
    """What every command says of itself."""
    answers = ask([[*case, "--help"] for case in CASES])
    return dict(zip(CASES, answers, strict=True))


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_help_is_a_page_with_an_example_on_top_and_every_option(case, told):
    status, said, own, heavy, seconds = told[case]
    assert status == 0 and heavy == [] and seconds < 2
    blocks = said.split("\n\n")
    assert blocks[0].startswith("usage: mdt " if not case[0].startswith("tools") else "usage: py")
    if case[0] in modules() and len(case) == 1:
        assert f"or: python -m {modules()[case[0]]} " in blocks[0]
        assert blocks[1].startswith(f"    mdt {case[0]}")
    assert blocks[2].rstrip().endswith((".", ":")) or len(case) > 1
    assert max(map(len, said.splitlines())) <= 100
    # absl's own flags are for --helpfull; a command's are under its titles, all of them.
    shown = {f"--{flag}" for flag in own if f"--{flag}" in said or f"--[no]{flag}" in said}
    listed = [flag for flag in own if flag != "config"]
    assert [flag for flag in listed if f"--{flag}" not in shown] == []
    assert len(own) < 8 or said.count(":\n  ") > 1, "one list of many options"


@pytest.mark.parametrize("word", ["-h", "-help", "--helpshort"])
def test_other_words_for_help_do_too(word):
    ((status, said, *_),) = ask([["sample", word]])
    assert status == 0 and said.startswith("usage: mdt sample")


def test_helpfull_lists_the_flags_of_all_modules():
    ((status, said, *_),) = ask([["checkpoints", "--helpfull"]])
    assert status == 0 and "--verbosity" in said and said.startswith("usage: mdt checkpoints")


def test_every_command_tells_its_version():
    answers = ask([[name, "--version"] for name in modules()])
    assert {(status, said.partition(" ")[0]) for status, said, *_ in answers} == {(0, "mdt_jax")}
