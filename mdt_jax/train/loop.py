"""A run from its start, or its newest checkpoint, to its last step."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import logging
from ml_collections import ConfigDict

from mdt_jax import config as config_lib
from mdt_jax.basics import ranges
from mdt_jax.basics.atomic import whole_file
from mdt_jax.checkpoints import Checkpoints
from mdt_jax.checkpoints.goodput import Goodput
from mdt_jax.data import BatchIterator, Source, create_batches, create_source, prefetch_to_device
from mdt_jax.parallel import compilation_cache, sharding
from mdt_jax.parallel.preemption import Stop
from mdt_jax.sampling.suggestion import sampling_command
from mdt_jax.training import checks, run_evaluation
from mdt_jax.training.actions import Action, CheckpointSaver, GridSampler, SampleJudge
from mdt_jax.training.profiling import StepProfiler
from mdt_jax.training.programs import StepPrograms, closing
from mdt_jax.training.remarks import log_remarks
from mdt_jax.training.run import Run
from mdt_jax.training.run_evaluation import RunEvaluator
from mdt_jax.training.step import TrainState
from mdt_jax.training.step_log import StepLog

_ASK_SECONDS = 0.3  # between questions whether to stop, while a step is being compiled
# `StepPrograms`, or any mapping of compiled steps by their number of kept tokens. A check of the
# types of its entries, as tests make, would wait for them.
Steps = Any


def train(
    config: ConfigDict,
    workdir: str | Path,
    max_hours: float | None = None,
    allowed_changes: Collection[str] = (),
    given: Collection[str] = (),
    *,
    began: float | None = None,
) -> TrainState:
    """Starts or resumes a run, trains it to config.num_steps and returns the final state.

    If asked to stop before (see `mdt_jax.parallel.preemption`), it saves the state and returns it.
    If asked before the first step, when there is nothing to save, it does not return: the process
    ends, with status 0.

    Args:
      config: the settings.
      workdir: the folder of checkpoints, metrics and samples.
      max_hours: hours after which to stop; None for no limit.
      allowed_changes: keys of settings that may be others than a run in the workdir has, beside
        those that always may (`training.resumption`).
      given: keys that a person gave on the command line, to be told if they are of no use.
      began: when the account of the run's time begins, by `time.monotonic`; None for now.

    Raises:
      ValueError: settings cannot work, the workdir is of another run, or processes differ.
      CheckpointError: no checkpoint of the workdir can be used, another run is using it, or the
        last checkpoint could not be written.
      NonFiniteLoss: the loss or the gradient norm is not finite.
    """
    ranges.check_config(config)
    with Stop(max_hours) as stop, contextlib.closing(Goodput(began)) as account:
        run, source = _set_up(config, workdir, allowed_changes, given)
        keep = {"keep_last": run.config.keep_last, "keep_every": run.config.keep_every}
        with Checkpoints(workdir, **keep) as store, run.keeping_local(store):
            account.open(workdir)
            if (store.latest_step() or 0) < run.config.num_steps:
                account.keep()
            return _train(run, source, store, stop, account)


def compile_only(config: ConfigDict) -> None:
    """Compiles all that a new run of a config needs, to be kept on disk, and trains nothing.

    Raises:
      ValueError, OSError: settings or data cannot be used.
      UserError: a program cannot be compiled.
    """
    ranges.check_config(config)
    with (
        tempfile.TemporaryDirectory() as workdir,
        Stop() as stop,
        contextlib.closing(Goodput()) as account,
    ):
        run, source = _set_up(config, workdir)
        if not config.init_from:
            run.trainer.create_state()
        steps, *_ = _prepare(run, source, stop, account)
        for count in steps:
            steps[count]
    compiled, read = compilation_cache.programs()
    where = compilation_cache.folder_in_use() or "no folder: the cache is off"
    logging.info(
        "%d programs were compiled, %d were there before; kept in %s", compiled, read, where
    )


def _set_up(
    config: ConfigDict,
    workdir: str | Path,
    allowed_changes: Collection[str] = (),
    given: Collection[str] = (),
) -> tuple[Run, Source]:
    """The run of a config and its data, checked and told in the log; writes nothing."""
    config = checks.with_classes_of_data(config)
    run = Run(config, workdir, allowed_changes)
    source = create_source(config.data)
    checks.check_data(config, source)
    checks.check_processes_agree(config, source)
    run_evaluation.check_evaluation(config, source)
    log_remarks(config, given)
    logging.info("%s", "\n" + run.describe())
    logging.info("data           %s", source.describe())
    logging.info("epoch          %s steps", f"{len(source) / config.batch_size:,.1f}")
    return run, source


def _train(
    run: Run, source: Source, store: Checkpoints, stop: Stop, account: Goodput
) -> TrainState:
    """Trains from the newest checkpoint to the last step, or until asked to stop."""
    state, meta, owed = _restore(run, source, store, account)
    first, last, position = int(state.step), run.config.num_steps, meta.get("position", 0)
    if first >= last and not owed:
        logging.info("%s is trained already: step %d of %d", run.workdir, first, last)
        return state
    steps, grids, judge, seconds = _prepare(run, source, stop, account)
    stop.ready()
    if stop.requested():
        return state
    with (
        contextlib.closing(StepLog(run, first, store, meta, seconds, account)) as log,
        contextlib.closing(StepProfiler(run.workdir, run.config.profile_steps)) as trace,
        _batches(run, source, position) as (batches, on_device),
        closing(steps),
    ):
        save = CheckpointSaver(run, source, store, stop, first_step=first, position=position)
        actions: list[Action] = [a for a in (trace, grids, save, judge) if a is not None]
        if owed and judge:
            judge(first, state, log)
            if stop.stopping:
                return state
        for step in range(first + 1, last + 1):
            with log.waiting():
                batch = next(on_device)
            with log.handing_over(), trace.step(step):
                state, values = steps[run.kept(step - 1)](state, batch)
            log.add(step, values, batches.num_skipped)
            save.check()
            _ask_to_stop(run, steps, step, log, stop)
            for action in actions:
                if action.due(step):
                    action(step, state, log)
            if stop.stopping:
                break
    store.wait()
    if stop.stopping:
        logging.info("stopped at step %d, saved; the same command resumes", step)
    else:
        _tell_how_to_sample(run)
    return state


def _tell_how_to_sample(run: Run) -> None:
    channels, vae = run.config.model.in_channels, run.config.eval.vae
    place = run.workdir / "picture"
    how = sampling_command(run.workdir, place, channels, run.latents, vae)
    logging.info("done; to sample: %s", how)


def _ask_to_stop(run: Run, steps: Steps, step: int, log: StepLog, stop: Stop) -> None:
    """Asks whether to stop, and waits for the next step if it is still being compiled.

    The run's clock stands meanwhile. A single process goes on asking. Several ask once a step, all
    alike: one that waits hears of a stop when the step is compiled.
    """
    if stop.requested() or step == run.config.num_steps or not isinstance(steps, StepPrograms):
        return
    count = run.kept(step)
    if steps.wait(count, 0.0):
        return
    alone = jax.process_count() == 1
    with log.paused("compile"):
        while not steps.wait(count, _ASK_SECONDS) and not (alone and stop.requested()):
            pass


def _restore(
    run: Run, source: Source, store: Checkpoints, account: Goodput
) -> tuple[TrainState, dict[str, Any], bool]:
    """The state to train from, and whether its samples have yet to be judged.

    Returns:
      The state; the meta data of its checkpoint, empty for a fresh run; whether the run was stopped
      before its samples were judged.
    """
    state, meta = run.restore(store, source.latent_space)
    checks.check_data_unchanged(meta, source, run.workdir)
    step = int(state.step)
    account.resume(step, meta.get("goodput"))
    owed = run_evaluation.judgement_is_owed(run.config, run.workdir, step)
    if 0 < step < run.config.num_steps or owed:
        logging.info("resuming %s from step %d", run.workdir, step)
    return state, meta, owed


def _prepare(
    run: Run, source: Source, stop: Stop, account: Goodput
) -> tuple[Steps, GridSampler | None, SampleJudge | None, float]:
    """Writes the run's config, and compiles what it needs for its first step.

    Returns:
      The step for each number of kept tokens; the sampler of grids and the judge of samples, None
      if the config asks for none; the seconds that compiling took.
    """
    _write_config(run)
    config = run.config
    evaluator = RunEvaluator(run, source) if config.eval_every else None
    began = time.perf_counter()
    count = len(run.kept_tokens.programs)
    logging.info("compiling %d step(s), one for each number of kept tokens, in turn", count)
    # One compilation does not use all processors.
    with account.spent_on("compile"), ThreadPoolExecutor(1) as background:
        compiling = background.submit(run.compile_steps, source)
        grids = GridSampler.asked_for(run, source, stop)
        if evaluator:
            evaluator.compile()
        steps = compiling.result()
    seconds = time.perf_counter() - began
    logging.info("compiled in %.1f s", seconds)
    return steps, grids, SampleJudge(run, evaluator, stop) if evaluator else None, seconds


def _write_config(run: Run) -> None:
    if jax.process_index() == 0:
        with whole_file(run.workdir / "config.json") as file:
            file.write(json.dumps(config_lib.to_json(run.config), indent=2).encode())


@contextlib.contextmanager
def _batches(
    run: Run, source: Source, position: int
) -> Iterator[tuple[BatchIterator, Iterator[dict[str, jax.Array]]]]:
    """The run's batches from an example on: their iterator, and the same batches on the devices."""
    config = run.config
    parts, num_parts = sharding.batch_parts(run.mesh)
    batches = create_batches(
        source,
        global_batch_size=config.batch_size,
        seed=config.seed,
        process_index=parts,
        process_count=num_parts,
        flip=config.data.flip,
        image_size=checks.image_size(config, source),
        position=position,
        num_workers=config.data.num_workers,
        read_ahead=config.data.read_ahead,
        crop=config.data.crop,
        on_bad_image=config.data.on_bad_image,
        max_bad_fraction=config.data.max_bad_fraction,
    )
    with batches, prefetch_to_device(batches, sharding.batch_sharding(run.mesh)) as on_device:
        yield batches, on_device
