"""Work between two training steps: when it is due, and what it saves and writes."""

import contextlib

import numpy as np
import pytest

from mdt_jax import data
from mdt_jax.checkpoints import Checkpoints
from mdt_jax.config import default_config
from mdt_jax.models.masking import NO_MASKED_PASS
from mdt_jax.parallel.preemption import Stop
from mdt_jax.sampling import DiffusionModel, SamplerOptions
from mdt_jax.training.actions import CheckpointSaver, GridSampler, SampleJudge
from mdt_jax.training.run import Run
from mdt_jax.training.run_evaluation import Judgement, RunEvaluator
from mdt_jax.training.step import TrainState
from mdt_jax.training.step_log import StepLog

STATE = TrainState(step=0, params={}, opt_state=(), ema={}, loss_history=None)


class FakeRun(Run):
    """In the place of `run.Run`: keeps what is saved."""

    def __init__(self):
        self.config = default_config()
        self.config.update(num_steps=12, batch_size=8, checkpoint_every=5, eval_every=4)
        self.saved, self.kept_tokens, self.latents = [], NO_MASKED_PASS, None

    def save(self, store, state, step, meta):
        self.saved.append((step, meta))


class FakeLog(StepLog):
    """In the place of `StepLog`: keeps the lines, and whether the clock stood still for each."""

    def __init__(self):
        self.lines, self.is_paused = [], False

    @contextlib.contextmanager
    def paused(self, kind):
        self.is_paused = True
        yield
        self.is_paused = False

    def state(self):
        return {"train_seconds": 3.0}

    def write(self, step, line, texts):
        self.lines.append((step, line, texts, self.is_paused))


class FakeStop(Stop):
    """In the place of `Stop`: was asked to stop, or not."""

    def __init__(self, stopping):
        self._agreed = stopping


class FakeEvaluator(RunEvaluator):
    """In the place of `RunEvaluator`: finds what it was made with."""

    def __init__(self, found):
        self.found = found

    def judge(self, state, should_stop):
        return self.found


class FakeStore(Checkpoints):
    """In the place of `Checkpoints`: writes nothing."""

    def __init__(self):
        pass

    def wait(self):
        pass


def saver(run, stopping=False, **settings):
    source = data.arrays(np.zeros((4, 8, 8, 1), np.uint8), np.arange(4) % 2, ("cat", "dog"))
    return CheckpointSaver(run, source, FakeStore(), FakeStop(stopping), **settings)


def judge(run, stopping=False, found=None):
    return SampleJudge(run, FakeEvaluator(found), FakeStop(stopping))


def due(action):
    return [step for step in range(1, 13) if action.due(step)]


def test_a_state_is_saved_periodically_before_each_judgement_and_at_the_end():
    assert due(saver(FakeRun())) == [4, 5, 8, 10, 12]
    assert due(judge(FakeRun())) == [4, 8, 12]


def test_a_run_that_stops_early_is_saved_at_once_and_not_judged():
    assert due(saver(FakeRun(), stopping=True)) == list(range(1, 13))
    assert due(judge(FakeRun(), stopping=True)) == []


@pytest.mark.parametrize(("first_step", "position"), [(0, 0), (5, 40), (5, 7)])
def test_a_checkpoint_says_where_in_the_data_the_run_goes_on(first_step, position):
    run, log = FakeRun(), FakeLog()
    saver(run, first_step=first_step, position=position)(10, STATE, log)
    ((step, meta),) = run.saved
    assert step == 10 and meta["position"] == position + (10 - first_step) * 8
    assert meta["class_names"] == ["cat", "dog"] and meta["num_examples"] == 4
    assert meta["train_seconds"] == 3.0


def test_a_judgement_is_a_line_written_while_the_clock_stands_still():
    log = FakeLog()
    metrics = {"eval_fid": 1.0, "eval_samples": 8.0, "eval_seconds": 0.0}
    judge(FakeRun(), found=Judgement(metrics, "classifier"))(4, STATE, log)
    assert log.lines == [(4, metrics, {"evaluator": "classifier"}, True)]


def test_a_judgement_that_was_cut_short_leaves_no_line():
    log = FakeLog()
    judge(FakeRun(), found=None)(4, STATE, log)
    assert log.lines == []


@pytest.mark.parametrize("channels", [1, 4])
def test_a_grid_of_samples_that_are_not_finite_is_told_and_not_drawn(channels, tmp_path, caplog):
    grids = object.__new__(GridSampler)
    run = FakeRun()
    run.workdir, run.rates = tmp_path, ["0.9"]
    run.config.sample.update(num_samples=2, every=1)
    grids._run, grids._options = run, SamplerOptions()
    grids._model = DiffusionModel.from_config(run.config)
    samples = np.zeros((2, 8, 8, channels), np.float32)
    samples[1, 0] = np.nan
    grids._sampler = lambda *_: samples
    log = FakeLog()
    grids(1, STATE.replace(ema={"0.9": {"w": np.ones(2)}}), log)
    assert "step 1: 1 of 2 samples hold NaN, the first at index 1" in caplog.text
    assert "no grid is drawn" in caplog.text and not list(tmp_path.iterdir())
