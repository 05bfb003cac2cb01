"""Any setting, with any value: refused in one line that names it, or trained with."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from settings_drawn import DRAWN, PAIRS, small_config, tiny_config, with_settings

from mdt_jax import config as config_lib
from mdt_jax.basics import ranges
from mdt_jax.data import create_source
from mdt_jax.data.stream import ExampleStream
from mdt_jax.diffusion.seeds import key_of
from mdt_jax.parallel import sharding
from mdt_jax.parallel.command import USER_ERRORS, one_line
from mdt_jax.training import checks, run_evaluation
from mdt_jax.training.run import Run
from mdt_jax.training.step import Trainer

# The same draws in every run; a failing one is told as it was drawn.
DRAWS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def traced_once():
    """Has each form of a model traced once: a trace is the same for other widths and averages."""
    trace, known = Trainer.abstract_state, {}

    def abstract_state(self):
        m = self.model
        form = (type(m), m.input_size, m.patch_size, m.depth, m.num_heads, m.null_class, m.remat)
        form += (getattr(m, "decoder_depth", None), self.timestep_sampler, self.mesh)
        if form not in known:
            known[form] = trace(self)
        return known[form]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "abstract_state", abstract_state)
        yield


@pytest.fixture(scope="module")
def one_device():
    """Has every run on one device, for which a step compiles faster than for eight."""
    create = functools.partial(sharding.create_mesh, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "create_mesh", create)
        yield


def prepare(config):
    """All that training does before it compiles: the run, and its data."""
    ranges.check_config(config)
    config = checks.with_classes_of_data(config)
    run = Run(config, "")
    source = create_source(config.data)
    checks.check_data(config, source)
    run_evaluation.check_evaluation(config, source)
    return run, source


def refusal(make, changes):
    """The line that refuses changed settings, empty if they are taken.

    Fails where it does not name one of them; if each of two would be taken alone, both.

    Args:
      make: makes the config that is changed.
      changes: the values by key.
    """
    try:
        prepare(with_settings(make(), changes))
    except USER_ERRORS as error:
        said = one_line(error)
        assert "\n" not in str(error), said
        # By its key, or the last part of it in words.
        names = {key: key.rpartition(".")[2] for key in changes}
        named = [k for k, name in names.items() if name in said or name.replace("_", " ") in said]
        assert named, (changes, said)
        if len(named) < len(changes) and len(changes) > 1:
            assert any(refusal(make, {key: changes[key]}) for key in changes), (changes, said)
        return said
    return ""


@settings(DRAWS, max_examples=2000)
@given(DRAWN)
def test_any_value_of_any_setting_is_taken_or_refused_in_a_line_that_names_it(traced_once, drawn):
    refusal(small_config, drawn)


@settings(DRAWS, max_examples=200)
@given(PAIRS)
def test_two_settings_that_only_together_cannot_be_are_refused_in_a_line_that_names_both(
    traced_once, drawn
):
    refusal(small_config, drawn)


STEPS = {"name": "step", "boundaries": (5, 9)}
NEVER = {
    "no boundaries": (
        STEPS | {"boundaries": ()},
        "schedule.name 'step' has no schedule.boundaries",
    ),
    "in the warm-up": (
        STEPS | {"warmup_steps": 6},
        r"schedule.boundaries \(5, 9\) begin before the end of the warm-up, .*; set the first to 6",
    ),
}


@pytest.mark.parametrize("what", NEVER)
def test_a_schedule_whose_steps_can_never_be_taken_is_refused(what):
    changes, said = NEVER[what]
    config = small_config()
    config.update(num_steps=50)
    config.schedule.update(STEPS)
    checks.check_settings(config, sharding.create_mesh())
    config.schedule.update(changes)
    with pytest.raises(ValueError, match=rf"^{said}[^\n]*$"):
        checks.check_settings(config, sharding.create_mesh())


@pytest.mark.parametrize("key", checks.DIFFUSION_CHOICES)
def test_an_unknown_choice_of_the_diffusion_is_refused_by_its_key(key):
    config = with_settings(small_config(), {f"diffusion.{key}": "sine"})
    known = ", ".join(checks.DIFFUSION_CHOICES[key])
    with pytest.raises(ValueError, match=rf"^diffusion.{key} 'sine' is unknown; known: {known}$"):
        checks.check_settings(config, sharding.create_mesh())


# What decides the programs of a run. Runs that differ in the rest are the same two steps.
PROGRAM = ("seed", "batch_size", "accumulation_steps", "ema_rates", "label_dropout", "model",
           "masking", "diffusion", "optimizer", "schedule", "num_steps")  # fmt: skip
# Compiled in a third of the time.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def train_two_steps(run, source, programs):
    """The losses of the first two steps of a run, and the state after them."""
    c = run.config
    trainer = dataclasses.replace(run.trainer, examples=source.kind)
    size = checks.image_size(c, source)
    stream = ExampleStream(source, c.seed, size, c.data.flip, c.data.crop, c.data.on_bad_image)
    block = stream.block(0, c.batch_size)
    batch = {name: block[name] for name in ("image", "label")}
    told = config_lib.to_json(c)
    unused = [] if run.model.supports_masking else ["masking"]
    unused += ["num_steps"] if c.schedule.name == "constant" else []
    program = json.dumps({key: told[key] for key in PROGRAM if key not in unused})
    key = key_of(trainer.seed)

    def compiled(name, function, *arguments):
        if name not in programs:
            lowered = jax.jit(function).lower(*arguments)
            programs[name] = lowered.compile(compiler_options=QUICKLY)
        return programs[name](*arguments)

    form = repr(run.model) + json.dumps([told["optimizer"]["name"], told["ema_rates"]])
    form += json.dumps([told["diffusion"]["timestep_sampler"], told["diffusion"]["num_timesteps"]])
    state = compiled(("init", form), lambda key: nn.unbox(trainer.init(key)), key)
    losses = []
    for step in range(2):
        kept = run.kept(step)
        take = functools.partial(trainer.step, num_kept=kept)
        state, metrics = compiled((program, kept, str(batch["image"].shape)), take, state, batch)
        losses.append(float(metrics["loss"]))
    return losses, state


PROGRAMS = {}


def trains(changes):
    """Whether settings are taken; fails if two steps with them do not end in finite numbers."""
    if refusal(tiny_config, changes):
        return False
    run, source = prepare(with_settings(tiny_config(), changes))
    losses, state = train_two_steps(run, source, PROGRAMS)
    assert np.isfinite(losses).all(), (changes, losses)
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.ema))
    bad = [jax.tree_util.keystr(path) for path, leaf in leaves if not np.isfinite(leaf).all()]
    assert bad == [], (changes, bad)
    return True


# One setting in three draws of four, two in the fourth.
ONE_OR_TWO = st.integers(0, 3).flatmap(lambda number: DRAWN if number else PAIRS)


@settings(DRAWS, max_examples=50)
@given(ONE_OR_TWO)
def test_settings_that_are_taken_train_to_finite_numbers(one_device, traced_once, drawn):
    trains(drawn)


@pytest.mark.slow
@settings(DRAWS, max_examples=500)
@given(ONE_OR_TWO)
def test_hundreds_of_settings_that_are_taken_train_to_finite_numbers(
    one_device, traced_once, drawn
):
    trains(drawn)
