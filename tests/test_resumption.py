"""Going on with a run with other settings: each is free, told, refused unless meant, or refused."""

import shlex

import pytest
from absl import logging
from settings_drawn import keys, small_config, tiny_config, with_settings
from test_config_flag import parse

from mdt_jax import config as config_lib
from mdt_jax.training import resumption
from mdt_jax.training.remarks import value_of
from mdt_jax.training.resumption import CHANGES, FIXED, FREE, MEANT, TOLD, Change, changes

ALL = {"num_steps": 50, "schedule.name": "step", "schedule.boundaries": (5, 9), "eval_every": 5,
       "data.on_bad_image": "skip", "sample.every": 5, "keep_every": 2,
       "data.name": "npy"}  # fmt: skip


@pytest.fixture
def warned(monkeypatch):
    said = []
    monkeypatch.setattr(logging, "warning", lambda form, *rest: said.append(form % rest))
    return said


def every_setting_in_use():
    return with_settings(small_config(), ALL)


def other(value):
    """Another value of a setting; whether it would do is not asked here."""
    if isinstance(value, bool):
        return not value
    if value is None:
        return 3
    if isinstance(value, int | float):
        return value + type(value)(1)
    return value + "x" if isinstance(value, str) else (*value, 0.5)


def changed(key):
    """The change of one setting, of a run in which every setting is in use."""
    saved, now = every_setting_in_use(), every_setting_in_use()
    with_settings(now, {key: other(value_of(now, key))})
    return changes(saved, now)


def test_every_setting_has_its_kind():
    assert CHANGES.keys() == set(keys())
    assert sum(len(names.split()) for names in resumption._NAMES.values()) + 2 * len(
        resumption.SAMPLER_OPTIONS
    ) == len(CHANGES)


@pytest.mark.parametrize("key", keys())
def test_a_change_is_taken_told_or_refused_as_the_table_says(key, tmp_path, warned):
    found = changed(key)
    assert [change.key for change in found] == [key]
    (kind,) = [change.kind for change in found]
    assert kind == CHANGES[key] or (key, kind) == ("optimizer.name", FIXED)
    if kind in (MEANT, FIXED):
        with pytest.raises(ValueError, match=r"^[^\n]*$") as refusal:
            resumption.check_changes(found, tmp_path)
        said = str(refusal.value)
        assert said.startswith(f"{tmp_path} holds a run with other settings ({key}: ")
        assert "give this one another --workdir" in said
        assert said.endswith(f"add --allow_changes={key}") == (kind == MEANT)
        assert (f"--config.init_from={tmp_path}" in said) == (kind == FIXED)
    if kind == MEANT:
        resumption.check_allowed([key])
        resumption.check_changes(found, tmp_path, [key])
    if CHANGES[key] == FIXED:
        with pytest.raises(ValueError, match=rf"^--allow_changes {key}: no run can go on"):
            resumption.check_allowed([key])
    if kind in (FREE, TOLD):
        resumption.check_changes(found, tmp_path)
    resumption.tell_changes(found, tmp_path, 7)
    assert len(warned) == (kind != FREE)
    for line in warned:
        assert line.startswith(f"{tmp_path} goes on from step 7 with other settings")
        assert f"{key} {found[0].now!r} (was" in line


def test_all_that_is_told_is_one_line_whose_flags_undo_it(tmp_path, warned, monkeypatch):
    monkeypatch.chdir(config_lib.__file__.rpartition("/mdt_jax/")[0])
    monkeypatch.syspath_prepend(".")
    saved, now = parse(), parse()
    chosen = {"batch_size": 16, "num_steps": 7, "optimizer.betas": (0.9, 0.9, 0.99),
              "optimizer.clip_norm": None, "eval.reference": "a file.npz", "eval.steps": "ddim50",
              "sample.cfg_interval": (0.1, 0.7), "sample.clip": False}  # fmt: skip
    with_settings(now, chosen)
    found = changes(saved, now)
    assert {change.key for change in found} == set(chosen)
    resumption.tell_changes(found, tmp_path, 1)
    (line,) = warned
    undone = parse(*shlex.split(line.partition("stop it now and add ")[2]))
    assert changes(saved, undone) == []
    resumption.tell_changes(changes(now, saved), tmp_path, 1)
    done = parse(*shlex.split(warned[1].partition("stop it now and add ")[2]))
    assert changes(now, done) == []


@pytest.mark.parametrize(
    ("key", "before", "now", "kind"),
    [
        ("optimizer.name", "adamw", "adam", TOLD),
        ("optimizer.name", "adamw", "adan", FIXED),
        ("label_dropout", 0.1, 0.2, MEANT),
        ("label_dropout", 0.1, 0.0, FIXED),
        ("label_dropout", 0.0, 0.1, FIXED),
    ],
)
def test_a_change_of_the_arrays_is_refused_for_good(key, before, now, kind):
    found = changes(with_settings(tiny_config(), {key: before}),
                    with_settings(tiny_config(), {key: now}))  # fmt: skip
    assert found == [Change(key, before, now, kind)]


def test_what_neither_has_a_use_for_is_no_change():
    idle = {"schedule.boundaries": (5, 9), "masking.ratio": 0.7, "model.decoder_depth": 2}
    assert changes(tiny_config(), with_settings(tiny_config(), idle)) == []


@pytest.mark.parametrize(
    ("key", "said"),
    [("seeed", "--allow_changes seeed is no setting; it takes seed, init_from, "), ("", "")],
)
def test_an_unknown_key_is_refused_with_those_that_there_are(key, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        resumption.check_allowed([key])
