"""The command `mdt`: what it lists, what it runs, and the experiments that it knows by name."""

import ast
import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
from absl import flags

import mdt_jax
from mdt_jax import __main__ as mdt
from mdt_jax.commands.table import COMMANDS, modules
from mdt_jax.train.flags import define_flags
from mdt_jax.training import config_files
from mdt_jax.training.config_flag import parse_config_flags

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mdt", *arguments])
    mdt.main()


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",), ("help",)])
def test_it_lists_every_command_with_a_line(arguments, monkeypatch, capsys):
    run(monkeypatch, *arguments)
    said = capsys.readouterr().out
    for title, part in COMMANDS.items():
        for name, command in part.items():
            assert re.search(rf"^  {name} +{re.escape(command.summary)}$", said, re.MULTILINE)
        assert f"\n{title}:\n" in said


def test_every_command_is_a_module_that_python_runs():
    for name, module in modules().items():
        spec = importlib.util.find_spec(module)
        place = Path(spec.origin)
        place = place.with_name("__main__.py") if place.name == "__init__.py" else place
        assert '\nif __name__ == "__main__":' in place.read_text(), name
        assert re.fullmatch("[a-z]+(-[a-z]+)*", name)


def test_every_command_that_tools_runs_is_in_the_table():
    ran = {
        match[1]
        for path in (ROOT / "tools").glob("*.py")
        if (match := re.search(r'runpy\.run_module\("(mdt_jax\.commands[\w.]+)"', path.read_text()))
    }
    assert ran == {module for module in modules().values() if ".commands." in module}


def test_it_runs_a_command_with_its_arguments(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/checkpoints is no folder"):
        run(monkeypatch, "checkpoints", str(tmp_path))


def test_it_tells_its_version(monkeypatch, capsys):
    run(monkeypatch, "--version")
    assert capsys.readouterr().out == f"mdt_jax {mdt_jax.__version__}\n"


@pytest.mark.parametrize(
    ("given", "near"),
    [("trian", "train"), ("encode_latents", "encode-latents"), ("compile", "compile-")],
)
def test_an_unknown_command_is_refused_by_the_nearest(given, near, monkeypatch):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, given)
    assert end.value.code.startswith(
        f"error: mdt has no command '{given}'; did you mean mdt {near}"
    )


def test_types_are_told_to_type_checkers():
    assert (ROOT / "mdt_jax" / "py.typed").exists()
    assert "mdt_jax = py.typed" in (ROOT / "setup.cfg").read_text()


# ---- Experiments by name ------------------------------------------------------------------------


def parse(*arguments):
    f = flags.FlagValues()
    sys.modules.pop("config_config", None)  # as ml_collections calls the file that it read last
    argv = ["train", *arguments]
    define_flags(f, argv)
    parse_config_flags(argv, f, required=True)
    return f.config


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_is_known_by_name_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(ROOT))])
    for module in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, module)
    assert parse("--config", name, "--config.seed=7").seed == 7


def test_an_experiment_takes_its_argument_and_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse("--config=imagenet256:MDT-B/4").model.name == "MDT-B/4"
    assert parse("--config=digits:DiT", "--config.batch_size=3").batch_size == 3


def test_a_path_that_is_there_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = (
        (ROOT / "configs" / "digits.py").read_text().replace("num_steps = 1000", "num_steps = 77")
    )
    Path("digits").write_text(code)
    Path("mine.py").write_text(code)
    assert parse("--config=digits").num_steps == parse("--config=mine.py:DiT").num_steps == 77


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("imagnet256:MDT-B/2", "is not there; did you mean --config imagenet256:MDT-B/2?"),
        ("configs/digit.py", "is not there; did you mean --config digits?"),
        ("nothing-like-it", "is not there; It takes a file, or one of digits, "),
        (".", "is no file; It takes a file, or one of digits, "),
    ],
)
def test_an_unknown_experiment_is_refused_by_the_nearest(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        parse(f"--config={given}")
    assert end.value.code.startswith(f"error: --config {given.partition(':')[0]} {said}")
    assert "--config list" in end.value.code and "\n" not in end.value.code


def test_the_list_has_a_line_on_each(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--config", "list")
    said = capsys.readouterr().out
    assert end.value.code in (0, None) and str(config_files.config_folder()) in said
    for name in NAMES:
        assert re.search(rf"^{name} +\S.{{20,}}\.$", said, re.MULTILINE), name


def test_a_wheels_own_folder_comes_first(tmp_path, monkeypatch):
    (tmp_path / "mdt_jax" / "configs").mkdir(parents=True)
    (tmp_path / "mdt_jax" / "configs" / "only.py").write_text('"""One."""\n')
    monkeypatch.setattr(mdt_jax, "__file__", str(tmp_path / "mdt_jax" / "__init__.py"))
    assert list(config_files.config_names()) == ["only"]
    assert config_files.find_config("only:x") == f"{tmp_path}/mdt_jax/configs/only.py:x"


def test_experiments_build_on_those_beside_them_and_not_on_a_package_of_the_clone():
    for file in (ROOT / "configs").glob("*.py"):
        imported = [
            node.module if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        assert not [name for name in imported if name.partition(".")[0] == "configs"], file
    assert os.path.isfile(ROOT / "setup.py") and "configs" in (ROOT / "setup.py").read_text()
