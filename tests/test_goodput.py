"""A run's wall time is accounted whole, over all its starts, with what a crash lost."""

import json
import os
import time
import types

import pytest

from mdt_jax.checkpoints import goodput
from mdt_jax.checkpoints.goodput import Goodput


class Clock:
    """A clock that stands until it is moved, for both kinds of time."""

    def __init__(self):
        self.now = 1000.0

    def move(self, seconds):
        self.now += seconds

    def monotonic(self):
        return self.now

    def time(self):
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(goodput, "time", found)
    return found


def start(workdir, clock, step=0, saved=None):
    """A run that took 10 s to start, of which 3 compiling."""
    account = Goodput()
    account.open(workdir)
    clock.move(7)
    account.resume(step, saved)
    with account.spent_on("compile"):
        clock.move(3)
    account.begin("steps")
    return account


def take(account, clock, steps, seconds=2.0, wait=1.0):
    """Takes steps, each after a wait for its input; returns the state after the last."""
    for step in steps:
        with account.spent_on("input"):
            clock.move(wait)
        clock.move(seconds)
        account.reached(step)
    return account.state()


def kill(account, workdir):
    """Ends a run without a word; its record was written a moment before."""
    (workdir / goodput.RECORD).write_text(json.dumps(account.record()))


def test_steps_done_again_after_a_crash_are_lost_and_all_adds_up(clock, tmp_path):
    began = clock.now
    account = start(tmp_path, clock)
    saved = take(account, clock, [1, 2, 3])
    with account.spent_on("checkpoint"):
        clock.move(4)
    take(account, clock, [4, 5])
    kill(account, tmp_path)
    clock.move(100)
    account = start(tmp_path, clock, 3, saved)
    take(account, clock, [4, 5, 6])
    found = account.record()
    assert found["seconds"] == {
        "steps": 12.0,  # six
        "input": 6.0,
        "lost": 6.0,  # two, with their input
        "start": 14.0,
        "compile": 6.0,
        "checkpoint": 4.0,
        "evaluate": 0.0,
    }
    assert found["starts"] == 2 and found["stopped_seconds"] == 100.0 and found["step"] == 6
    assert sum(found["seconds"].values()) == clock.now - began - 100


def test_a_run_that_stopped_in_order_has_lost_nothing(clock, tmp_path):
    account = start(tmp_path, clock)
    saved = take(account, clock, [1, 2])
    clock.move(1)  # the save
    kill(account, tmp_path)
    account = start(tmp_path, clock, 2, saved)
    assert account.record()["seconds"]["lost"] == 0


def test_an_older_checkpoint_loses_the_steps_of_several_starts(clock, tmp_path):
    """Step 4, saved by the second start, is damaged when the third begins."""
    account = start(tmp_path, clock)
    second = take(account, clock, [1, 2])
    take(account, clock, [3])
    kill(account, tmp_path)
    account = start(tmp_path, clock, 2, second)
    take(account, clock, [3, 4])
    kill(account, tmp_path)
    account = start(tmp_path, clock, 2, second)
    assert account.record()["seconds"]["lost"] == 3 * (1 + 2)
    assert account.seconds()["steps"] == 4


def test_a_start_that_is_killed_before_it_restores_is_accounted(clock, tmp_path):
    account = start(tmp_path, clock)
    take(account, clock, [1, 2])
    kill(account, tmp_path)
    early = Goodput()
    early.open(tmp_path)
    clock.move(5)
    kill(early, tmp_path)
    account = start(tmp_path, clock)
    found = account.record()
    assert found["starts"] == 3 and found["seconds"]["lost"] == 6
    assert sum(found["seconds"].values()) == 10 + 6 + 5 + 10


def test_the_record_is_written_while_the_run_goes_on_and_at_its_end(tmp_path, caplog):
    account = Goodput()
    account.open(tmp_path)
    assert not list(tmp_path.iterdir())
    account.keep()
    account.begin("steps")
    end = time.monotonic() + 60
    while (goodput.read_record(tmp_path) or {"seconds": {"steps": 0}})["seconds"]["steps"] < 0.2:
        assert time.monotonic() < end
        time.sleep(0.02)
    with caplog.at_level("INFO", logger="absl"):
        account.close()
    assert "in 1 start: steps" in caplog.text
    assert goodput.read_record(tmp_path)["seconds"]["steps"] > 0.2
    assert os.listdir(tmp_path) == [goodput.RECORD]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seconds": 3}', '{"seconds": {}, "starts": 1}'])
def test_a_record_that_cannot_be_read_is_told_and_no_error(text, tmp_path, caplog):
    (tmp_path / goodput.RECORD).write_text(text)
    account = Goodput()
    account.open(tmp_path)
    assert account.record()["starts"] == 1 and "goodput.json cannot be read" in caplog.text


def test_other_processes_keep_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(goodput, "jax", types.SimpleNamespace(process_index=lambda: 1))
    account = Goodput()
    account.open(tmp_path)
    account.keep()
    account.close()
    assert not list(tmp_path.iterdir())


def test_a_command_is_accounted_from_the_start_of_its_process():
    assert 0 < time.monotonic() - goodput.process_began() < 24 * 3600


def test_the_names_of_the_metrics_are_those_that_are_written():
    assert tuple(Goodput().metrics()) == goodput.METRICS


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (12.34, "12.3 s"),
        (59.96, "60.0 s"),
        (60.0, "1 min 00 s"),
        (245.0, "4 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7380.0, "2 h 03 min"),
        (273600.0, "3 d 04 h"),
    ],
)
def test_times_are_told_in_words(seconds, words):
    assert goodput.in_words(seconds) == words


def test_the_table_has_a_line_for_each_kind(clock, tmp_path):
    account = start(tmp_path, clock)
    take(account, clock, [1, 2])
    first, *rest = goodput.table(account.record()).splitlines()
    assert first == "wall time      16.0 s in 1 start" and len(rest) == len(goodput.KINDS)
    assert rest[0].split() == ["steps", "4.0", "s", "25.0%"]
