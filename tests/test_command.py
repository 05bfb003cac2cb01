"""How commands end: one line and status 1 for what a user can mend, a traceback for the rest."""

import pytest
from absl import logging

from mdt_jax.checkpoints import CheckpointError
from mdt_jax.parallel.command import command_ending, one_line
from mdt_jax.training.step_log import NonFiniteLoss


def end(error, **settings):
    """The status that a command whose body raises an error ends with."""
    with pytest.raises(SystemExit) as caught, command_ending(**settings):
        raise error
    return caught.value.code


@pytest.mark.parametrize("kind", [ValueError, OSError, CheckpointError, NonFiniteLoss])
def test_what_a_user_can_mend_ends_in_one_line(kind):
    assert end(kind("no run in\n  runs/digits")) == "error: no run in runs/digits"


def test_a_fault_of_the_code_keeps_its_traceback():
    for kind in (KeyError, RuntimeError, TypeError):
        with pytest.raises(kind), command_ending():
            raise kind("x")


def test_a_command_may_count_more_as_a_users():
    assert end(RuntimeError("no GPU"), also=(RuntimeError,)) == "error: no GPU"


def test_debugging_shows_the_traceback():
    before = logging.get_verbosity()
    logging.set_verbosity(logging.DEBUG)
    try:
        with pytest.raises(ValueError, match="x"), command_ending():
            raise ValueError("x")
    finally:
        logging.set_verbosity(before)


def test_a_body_that_ends_well_or_by_itself_is_left_alone():
    with command_ending():
        pass
    with pytest.raises(SystemExit) as caught, command_ending():
        raise SystemExit(3)
    assert caught.value.code == 3


def test_an_interruption_is_told_and_ends_with_130(capsys):
    assert end(KeyboardInterrupt(), interrupted="interrupted; it goes on") == 130
    assert capsys.readouterr().err == "interrupted; it goes on\n"
    with pytest.raises(KeyboardInterrupt), command_ending():
        raise KeyboardInterrupt


def test_a_line_holds_the_notes_and_the_commands_own_flags():
    error = ValueError("data.path DIR/data.path is empty")
    error.add_note("in the\nfirst example")
    assert one_line(error) == "data.path DIR/data.path is empty in the first example"
    assert one_line(error, {"data.path": "--folder"}).startswith("--folder DIR/data.path is empty")
    assert end(error, message=lambda error: "said otherwise") == "error: said otherwise"
