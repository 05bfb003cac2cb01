"""The README tells the truth: its Python runs as written, and the files it names are there."""

import re
from pathlib import Path

from configs import digits
from mdt_jax import config as config_lib
from mdt_jax.checkpoints import Checkpoints
from mdt_jax.training.run import Run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_ten_lines_of_python_run_on_a_run_of_the_digits_config(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    run = Run(digits.get_config(), "runs/digits")
    store = Checkpoints("runs/digits")
    meta = {
        "config": config_lib.to_json(run.config),
        "class_names": [str(d) for d in range(10)],
        "position": 0,
        "window": {"metrics": []},
    }
    run.save(store, run.trainer.create_state(), 7, meta)
    store.close()
    names = {}
    exec(code, names)
    assert "(5, 8, 8, 1) MDTv2 7" in capsys.readouterr().out
    assert names["out"].shape == (5, 8, 8, 2)


def test_every_file_that_the_readme_names_is_there():
    named = set(re.findall(r"(?:configs|tests|mdt_jax|docs)/[\w/]+\.(?:py|txt|png)", README))
    assert len(named) > 5
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_map_of_the_code_lists_every_module():
    code_map = README[README.index("## Map of the code") :]
    modules = {path.name for path in (ROOT / "mdt_jax").rglob("*.py")} - {"__init__.py"}
    assert [name for name in sorted(modules) if name not in code_map] == []


def test_the_quick_start_is_the_first_two_bash_blocks():
    install, tests = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[:2]
    assert "mdt_jax.train --config configs/digits.py" in install and "digits_report" in install
    assert "pytest" in tests and "-c tests/constraints.txt" in tests
