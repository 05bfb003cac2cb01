"""Steps that are compiled while training goes on: the same bits, failures told, a prompt end."""

import contextlib
import json
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
from test_train import bits, changed, load_config, logged, tiny_config  # noqa: F401 - a fixture

from mdt_jax import checkpoints
from mdt_jax.checkpoints import Checkpoints
from mdt_jax.models.masking import KeptTokens
from mdt_jax.parallel.command import UserError
from mdt_jax.train import loop
from mdt_jax.training import programs, transfer
from mdt_jax.training.programs import StepPrograms, leaving_compilations
from mdt_jax.training.run import Run


class Compiler:
    """Compiles a number to a function that gives it, when it is let."""

    def __init__(self, *failing: int):
        self.order, self.failing, self.gate = [], failing, threading.Event()

    def __call__(self, count):
        if self.order:
            self.gate.wait(10)
        self.order.append(count)
        if count in self.failing:
            raise RuntimeError("out of\nregisters")
        return lambda: count


def test_the_first_is_there_at_once_and_the_others_when_they_are_compiled():
    compiler = Compiler()
    steps = StepPrograms(compiler, [5, 3, 4])
    assert compiler.order == [5] and steps[5]() == 5 and list(steps) == [5, 3, 4]
    assert steps.wait(5, 0.0) and not steps.wait(3, 0.01)
    threading.Timer(0.05, compiler.gate.set).start()
    assert steps[4]() == 4 and compiler.order == [5, 3, 4]  # it waited for both
    with pytest.raises(KeyError):
        steps[6]


def test_a_step_that_cannot_be_compiled_ends_whoever_asks_next():
    compiler = Compiler(3)
    steps = StepPrograms(compiler, [5, 3, 4])
    compiler.gate.set()
    message = "^the step that keeps 3 tokens could not be compiled: out of registers$"
    for count in (4, 3, 5):
        with pytest.raises(UserError, match=message):
            steps[count]
    assert compiler.order == [5, 3]
    with pytest.raises(RuntimeError, match="out of"):
        StepPrograms(Compiler(5), [5, 3])


def test_a_process_that_still_compiles_is_left_with_the_commands_status(monkeypatch, capsys):
    left = []
    monkeypatch.setattr(programs, "leave", left.append)
    compiler = Compiler()
    steps = StepPrograms(compiler, [5, 3])
    with leaving_compilations():
        pass
    for code in ("error: no room", 3, 0, None):
        with leaving_compilations():
            raise SystemExit(code)
    assert left == [0, 1, 3, 0, 0] and capsys.readouterr().err == "error: no room\n"
    for error in (KeyboardInterrupt, ZeroDivisionError):
        with leaving_compilations():
            raise error
    assert left[5:] == [130, 1] and "ZeroDivisionError" in capsys.readouterr().err
    compiler.gate.set()
    steps[3]
    for _ in range(100):  # the thread ends soon after
        if not programs._is_compiling():
            break
        time.sleep(0.01)
    with pytest.raises(SystemExit), leaving_compilations():
        raise SystemExit(1)
    assert len(left) == 7


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """XLA without its expensive passes, which the tiny models here do not repay."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def config(tiny_config):  # noqa: F811
    """Of 16 tokens, whose masked passes keep 8 to 11 of them."""
    found = changed(load_config(tiny_config), model__patch_size=2, masking__ratio_span=0.2)
    found.num_steps, found.log_every, found.checkpoint_every = 10, 5, 5
    return found


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The run with all steps compiled before its first, and those steps."""
    compiled = {}
    with pytest.MonkeyPatch.context() as patch:
        compile_steps = Run.compile_steps

        def compile_all(run, source):
            compiled.update(compile_steps(run, source))
            return compiled

        patch.setattr(Run, "compile_steps", compile_all)
        workdir = tmp_path_factory.mktemp("whole")
        loop.train(config, workdir)
    return workdir, compiled


def test_a_run_whose_steps_come_late_has_the_bits_of_one_whose_steps_were_there(
    config, whole, tmp_path, monkeypatch
):
    workdir, compiled = whole
    waited = []

    def compile_slowly(run, _):
        def compile_step(count):
            time.sleep(0.05)
            waited.append(count)
            return compiled[count]

        return StepPrograms(compile_step, run.kept_tokens.in_order(run.config.seed, run._first))

    monkeypatch.setattr(Run, "compile_steps", compile_slowly)
    loop.train(config, tmp_path)
    run = Run(config, "")
    drawn = [run.kept(step) for step in range(config.num_steps)]
    assert waited[: len(set(drawn))] == list(dict.fromkeys(drawn))  # in the order of their use
    assert logged(tmp_path) == logged(workdir)
    items = ["state", f"ema_{config.ema_rates[0]}"]
    assert bits(tmp_path, items) == bits(workdir, items)


def test_a_run_ends_with_the_message_of_a_step_that_cannot_be_compiled(
    config, whole, tmp_path, monkeypatch
):
    _, compiled = whole
    first, second, *_ = Run(config, "").kept_tokens.in_order(config.seed, 0)

    def compile_steps(run, _):
        def compile_step(count):
            if count == second:
                raise RuntimeError("RESOURCE_EXHAUSTED: 3 GiB")
            return compiled[count]

        return StepPrograms(compile_step, run.kept_tokens.in_order(config.seed, 0))

    monkeypatch.setattr(Run, "compile_steps", compile_steps)
    message = f"the step that keeps {second} tokens could not be compiled: RESOURCE_EXHAUSTED: 3 G"
    with pytest.raises(UserError, match=message):
        loop.train(config, tmp_path)


def test_a_run_that_waits_for_a_step_can_be_stopped(config, whole, tmp_path, monkeypatch):
    _, compiled = whole
    never, started = threading.Event(), threading.Event()
    add = loop.StepLog.add

    def add_and_tell(log, *arguments):
        started.set()  # before, a stop would end the process
        return add(log, *arguments)

    monkeypatch.setattr(loop.StepLog, "add", add_and_tell)
    order = Run(config, "").kept_tokens.in_order(config.seed, 0)

    def compile_steps(run, _):
        def compile_step(count):
            if count != order[0]:
                started.wait(60)
                os.kill(os.getpid(), signal.SIGTERM)
                never.wait(60)
            return compiled[count]

        return StepPrograms(compile_step, order)

    monkeypatch.setattr(Run, "compile_steps", compile_steps)
    began = time.monotonic()
    run = Run(config, "")
    last = next(step for step in range(10) if run.kept(step) != order[0])
    assert int(loop.train(config, tmp_path).step) == last and time.monotonic() - began < 50
    assert checkpoints.read_meta(tmp_path)[0] == last
    never.set()


@pytest.mark.parametrize("kept", [{"counts": [9, 10], "probabilities": [0.25, 0.75]}, None])
def test_a_checkpoint_decides_which_counts_are_drawn(config, whole, tmp_path, monkeypatch, kept):
    """None stands for a checkpoint from before they were kept."""
    _, compiled = whole
    save = Run.save

    def save_other(run, store, state, step, meta):
        meta = {key: value for key, value in meta.items() if key != "kept_tokens"}
        save(run, store, state, step, meta | ({"kept_tokens": kept} if kept else {}))

    monkeypatch.setattr(Run, "save", save_other)
    monkeypatch.setattr(Run, "compile_steps", lambda run, _: compiled)
    short = changed(config, num_steps=1)
    loop.train(short, tmp_path)
    run = Run(config, tmp_path)
    with contextlib.closing(Checkpoints(tmp_path)) as store:
        run.restore(store)
    ratio = (run.model.num_tokens, 0.3, 0.2)
    before = KeptTokens.of_ratio(*ratio, at_most=None)
    expected = KeptTokens((9, 10), (0.25, 0.75)) if kept else before
    assert [run.kept(step) for step in range(50)] == [expected.draw(0, step) for step in range(50)]


def test_whoever_trains_exported_weights_on_masks_as_the_config_says(config, whole, tmp_path):
    workdir, _ = whole
    exported = transfer.export_ema(workdir, tmp_path / "exported")
    for settings, counts in (
        ({"masking__masked_pass": False}, ()),
        ({"masking__ratio": 0.6, "masking__ratio_span": 0.0}, (6,)),
    ):
        run = Run(changed(config, **settings), exported)
        with contextlib.closing(Checkpoints(exported)) as store:
            run.restore(store)
        assert run.kept_tokens.counts == counts


def test_a_run_goes_on_with_the_counts_that_it_began_with(config, whole, tmp_path):
    workdir, _ = whole
    step, meta = checkpoints.read_meta(workdir)
    began = KeptTokens.from_json(meta["kept_tokens"])
    assert began == Run(config, "").kept_tokens and step == 10
    for kept, expected in (
        ({"counts": [9, 10], "probabilities": [0.25, 0.75]}, KeptTokens((9, 10), (0.25, 0.75))),
        (None, KeptTokens.of_ratio(64, 0.3, 0.2, at_most=None)),  # from before they were kept
    ):
        changed_meta = {key: value for key, value in meta.items() if key != "kept_tokens"}
        changed_meta |= {"kept_tokens": kept} if kept else {}
        run = Run(changed(config, model__patch_size=1), "")
        assert run._kept_tokens_of(json.loads(json.dumps(changed_meta))) == expected
    assert len(expected.counts) == 13
    assert np.isclose(sum(expected.probabilities), 1)
