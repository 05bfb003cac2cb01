"""Steps that are compiled while training goes on: the same bits, failures told, a prompt end."""

import json
import threading
import time

import jax
import numpy as np
import pytest
from test_train import bits, changed, load_config, logged, tiny_config  # noqa: F401 - a fixture

from mdt_jax import checkpoints, train
from mdt_jax.models.masking import KeptTokens
from mdt_jax.parallel.command import UserError
from mdt_jax.training import programs
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
    assert steps.is_ready(5) and not steps.is_ready(3)
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
    compiler.gate.set()
    steps[3]
    for _ in range(100):  # the thread ends soon after
        if not programs._is_compiling():
            break
        time.sleep(0.01)
    with pytest.raises(SystemExit), leaving_compilations():
        raise SystemExit(1)
    assert len(left) == 5


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
        train.train(config, workdir)
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
    train.train(config, tmp_path)
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
        train.train(config, tmp_path)


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
