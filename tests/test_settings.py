"""Any setting, with any value: refused in one line that names it, or trained with."""

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from settings_drawn import keys, values, with_setting

from mdt_jax.basics import ranges
from mdt_jax.data import create_source
from mdt_jax.parallel.command import USER_ERRORS, one_line
from mdt_jax.training import checks, run_evaluation
from mdt_jax.training.run import Run
from mdt_jax.training.step import Trainer

DRAWN = st.sampled_from(keys()).flatmap(lambda key: st.tuples(st.just(key), values(key)))
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
    """Has each form of a model traced once: widths, which a trace is the same for, aside."""
    trace, known = Trainer.abstract_state, {}

    def abstract_state(self):
        m = self.model
        form = (type(m), m.input_size, m.patch_size, m.depth, m.num_heads, m.null_class, m.remat)
        form += (getattr(m, "decoder_depth", None), self.ema_rates, self.mesh)
        if form not in known:
            known[form] = trace(self)
        return known[form]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "abstract_state", abstract_state)
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


def refusal(key, value):
    """The line that refuses a setting, empty if it is taken; fails where it does not name it."""
    try:
        prepare(with_setting(key, value))
    except USER_ERRORS as error:
        said = one_line(error)
        assert "\n" not in str(error), said
        # By its key, or the last part of it in words.
        name = key.rpartition(".")[2]
        assert name in said or name.replace("_", " ") in said, (key, value, said)
        return said
    return ""


@settings(DRAWS, max_examples=2000)
@given(DRAWN)
def test_any_value_of_any_setting_is_taken_or_refused_in_a_line_that_names_it(traced_once, drawn):
    refusal(*drawn)
