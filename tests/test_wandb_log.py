"""A run at Weights & Biases, offline: every line once over kills, and no fault of it ends a run."""

import contextlib
import functools
import json
import sys
import time
import types

import numpy as np
import pytest
from absl import logging
from settings_drawn import small_config

from mdt_jax.parallel import sharding
from mdt_jax.training import checks, wandb_log
from mdt_jax.training.metrics import MetricsWriter
from mdt_jax.training.wandb_log import WandbLog, project_of

Record = pytest.importorskip("wandb.proto.wandb_internal_pb2").Record


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No network, no key, and none of the settings of whoever runs the tests."""
    for name in [name for name in wandb_log.os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of the log."""
    said = []
    monkeypatch.setattr(logging, "warning", lambda form, *rest: said.append(form % rest))
    return said


def config_for(project="digits"):
    config = small_config()
    config.log.wandb = project
    return config


def run(workdir, steps, resume_step=0, config=None, images=(), judged=()):
    """Logs steps as a run does, and ends as one that is killed: nothing is closed in order."""
    log = WandbLog.asked_for(config or config_for(), workdir)
    writer = MetricsWriter(workdir, total_steps=100, resume_step=resume_step, wandb=log)
    for step in steps:
        writer.write(step, {"loss": 1 / step, "learning_rate": 0.5})
        if step in images:
            writer.image(step, "samples", np.full((8, 8, 3), step, np.uint8))
        if step in judged:
            writer.write(step, {"eval_fid": float(step)}, {"evaluator": "classifier"})
    writer.close()
    return log


def records(folder):
    """The ids of the offline runs in a folder, and their records, once W&B has written all."""
    found = {}
    for path in sorted(folder.glob("offline-run-*/run-*.wandb")):
        kept, deadline = [], time.monotonic() + 120
        while not any(record.WhichOneof("record_type") == "exit" for record in kept):
            assert time.monotonic() < deadline, f"{path} does not end"
            time.sleep(0.02)
            kept = list(read(path))
        found[path.stem.removeprefix("run-")] = kept
    return found


def read(path):
    """The records of a .wandb file: LevelDB's log, in blocks of 32 KiB, after a head of 7 bytes."""
    data, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:  # the rest of a block is padding
            place += room
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def history(folder):
    """The lines in a folder's offline runs, without W&B's own entries."""
    lines = []
    for record in [record for run in records(folder).values() for record in run]:
        if record.WhichOneof("record_type") == "history":
            line: dict = {}
            for item in record.history.item:
                *above, key = [item.key] if item.key else item.nested_key
                holder = functools.reduce(lambda d, name: d.setdefault(name, {}), above, line)
                holder[key] = json.loads(item.value_json)
            lines.append({key: value for key, value in line.items() if not key.startswith("_")})
    return lines


def parted(workdir, name):
    """What W&B has of a workdir so far, put aside: its offline runs are named by the second."""
    (workdir / "wandb" / "latest-run").unlink()
    return (workdir / "wandb").rename(workdir / name)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was killed at 70, gone on with from 40; the folders of before and after."""
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        run(workdir, range(10, 71, 10), images=(40, 60), judged=(40, 60))
        before = parted(workdir, "before")
        run(workdir, range(50, 101, 10), resume_step=40, images=(60, 80), judged=(60, 80))
    return workdir, before, parted(workdir, "after")


def test_a_resumed_run_is_the_same_run_and_has_every_line_once(resumed):
    workdir, before, after = resumed
    (name,) = records(before)
    assert [*records(after)] == [name] == [json.loads((workdir / "wandb.json").read_text())["id"]]
    sent = history(before) + history(after)
    assert [line["step"] for line in sent if "loss" in line] == list(range(10, 101, 10))
    assert [line["step"] for line in sent if "eval_fid" in line] == [40, 60, 80]
    assert [line["step"] for line in sent if "samples" in line] == [40, 60, 80]


def test_lines_and_settings_have_the_names_of_the_run(resumed):
    workdir, before, _ = resumed
    sent = history(before)
    assert sent[0] == {"step": 10, "loss": 0.1, "learning_rate": 0.5}
    assert {"step": 40, "eval_fid": 40.0, "evaluator": "classifier"} in sent
    (image,) = [line["samples"] for line in sent if "samples" in line and line["step"] == 40]
    assert (image["_type"], image["height"], image["width"]) == ("image-file", 8, 8)
    assert image["caption"] == "step 40, synthetic"
    (kept,) = records(before).values()
    (told,) = [r.run for r in kept if r.WhichOneof("record_type") == "run"]
    settings = {entry.key: json.loads(entry.value_json) for entry in told.config.update}
    assert (told.project, told.display_name) == ("digits", "digits")
    assert settings["model"]["hidden_size"] == 16 and settings["log"] == {"wandb": "digits"}
    metrics = [r.metric for r in kept if r.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "*" and m.step_metric == "step" for m in metrics)


def test_a_run_that_began_without_it_is_caught_up_with(tmp_path):
    run(tmp_path, (10, 20, 30), config=config_for(False))
    assert not (tmp_path / "wandb.json").exists() and not (tmp_path / "wandb").exists()
    run(tmp_path, (30, 40), resume_step=20)
    sent = history(parted(tmp_path, "after"))
    assert [(line["step"], line["loss"]) for line in sent] == [
        (step, 1 / step) for step in (10, 20, 30, 40)
    ]


@pytest.fixture
def broken(monkeypatch):
    """Puts something else in the place of the library."""

    def replace(**names):
        fake = types.SimpleNamespace(
            Settings=dict, login=lambda **_: True, Image=lambda *_, **__: None, **names
        )
        monkeypatch.setitem(sys.modules, "wandb", fake)

    return replace


class Run:
    """A run of W&B's whose connection breaks when it has taken two lines."""

    id, offline, lines = "1", True, 0

    def define_metric(self, *_, **__):
        pass

    def log(self, _):
        self.lines += 1
        if self.lines > 2:
            raise BrokenPipeError("the service\nis gone")

    def finish(self, exit_code):
        raise RuntimeError("nor does it end")


def fail(*_, **__):
    raise RuntimeError("no\nserver")


def steps_of(workdir):
    return [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").open()]


def test_what_is_not_installed_is_one_line_and_the_run_goes_on(tmp_path, monkeypatch, warnings):
    monkeypatch.setitem(sys.modules, "wandb", None)
    run(tmp_path, (10, 20), images=(10,))
    assert steps_of(tmp_path) == [10, 20]
    (said,) = warnings
    assert said == (
        "Weights & Biases is not used: it is not installed: pip install -e '.[wandb]'; training "
        "goes on, and metrics.jsonl has all"
    )


def test_without_a_key_nobody_is_asked_for_one(tmp_path, monkeypatch, warnings):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run(tmp_path / "run", (10,))
    (said,) = warnings
    assert "there is no key: run wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline" in said
    assert steps_of(tmp_path / "run") == [10]


def test_a_server_that_does_not_answer_ends_no_run(tmp_path, broken, warnings):
    broken(init=fail)
    run(tmp_path, (10, 20))
    (said,) = warnings
    assert "is not used: no server; training goes on" in said
    assert steps_of(tmp_path) == [10, 20]


def test_a_connection_that_breaks_ends_no_run_and_its_lines_are_sent_later(
    tmp_path, broken, warnings
):
    broken(init=lambda **_: Run())
    run(tmp_path, (10, 20, 30, 40))
    (said,) = warnings
    assert said.startswith("Weights & Biases takes no more: the service is gone; training goes on")
    assert steps_of(tmp_path) == [10, 20, 30, 40]
    sent = []
    good = Run()
    good.log, good.finish = sent.append, (lambda exit_code: None)
    broken(init=lambda **_: good)
    run(tmp_path, (50,), resume_step=40)
    assert [line["step"] for line in sent] == [30, 40, 50]


def test_a_run_that_fails_is_told_so_and_a_failing_end_is_one_line(tmp_path, broken, warnings):
    codes = []
    good = Run()
    good.log, good.finish = (lambda _: None), (lambda exit_code: codes.append(exit_code))
    broken(init=lambda **_: good)
    run(tmp_path, (10,))
    with (
        pytest.raises(ZeroDivisionError),
        contextlib.closing(WandbLog.asked_for(config_for(), tmp_path)),
    ):
        1 / 0  # noqa: B018
    assert codes == [0, 1] and warnings == []
    broken(init=lambda **_: Run())
    WandbLog.asked_for(config_for(), tmp_path).close()
    assert [said.partition(";")[0] for said in warnings] == [
        "Weights & Biases did not end as it should: nor does it end"
    ]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"id": 3}', '{"id": "a/b", "project": "digits"}'])
def test_a_record_that_is_damaged_begins_a_new_run(text, tmp_path, broken, warnings):
    begun = []
    broken(init=lambda **given: begun.append(given) or Run())
    (tmp_path / "wandb.json").write_text(text)
    WandbLog(config_for(), tmp_path)
    assert "wandb.json cannot be read; a new run of Weights & Biases begins" in warnings[0]
    record = json.loads((tmp_path / "wandb.json").read_text())
    assert record["id"] == begun[0]["id"] and record["project"] == "digits"


def test_another_project_is_another_run(tmp_path, broken):
    begun = []
    broken(init=lambda **given: begun.append((given["project"], given["id"])) or Run())
    for project in ("digits", "digits", True):
        WandbLog(config_for(project), tmp_path)
    assert begun[0] == begun[1] and begun[2][0] == "mdt_jax" and begun[2][1] != begun[0][1]


def test_the_other_processes_of_a_run_log_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log.jax, "process_index", lambda: 1)
    assert WandbLog.asked_for(config_for(), tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "project"), [(False, ""), (True, "mdt_jax"), ("", ""), ("My runs", "My runs")]
)
def test_a_project_is_a_name_or_a_switch(value, project):
    assert project_of(config_for(value)) == project


@pytest.mark.parametrize("value", ["a/b", "a:b", "x" * 129, " ", "a\nb"])
def test_a_project_that_cannot_be_is_refused_by_its_key(value):
    with pytest.raises(ValueError, match=r"^log\.wandb .* is no name of a project") as caught:
        checks.check_settings(config_for(value), sharding.create_mesh())
    assert "\n" not in str(caught.value)
