"""Any value of any flag of any command: taken, or refused in one line that names the flag."""

import math
import re

import pytest
from command_flags import Accepted, commands, flags_of, stop_at_work
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mdt_jax.basics.ranges import RANGES

COMMANDS = commands()
ODD = ["", " ", ",", "abc", "None", "nan", "inf", "-inf", "1e400", "1e6", "2.5", "0x10", "1_000",
       "-1", "0", "00", "true", "0,1", "9" * 40, str(2**31), str(2**63), str(-(2**63)), "a\nb", "é",
       "--", "-", "=", "'", "%s", "{}", "a b", "*", "٣"]  # fmt: skip


def texts(flag):
    """Texts of all kinds for a flag, of numbers in its range, too."""
    odd = st.sampled_from(ODD)
    free = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6)
    numbers = st.one_of(st.integers(), st.floats()).map(str)
    range_ = RANGES.get(f"--{flag.name}")
    if range_ is None:
        return st.one_of(odd, free, numbers)
    low, high = math.ceil(range_.low), math.floor(range_.high)
    inside = st.integers(low, high) if range_.whole else st.floats(range_.low, range_.high)
    return st.one_of(odd, numbers, inside.map(str), inside.map(str))


@pytest.mark.parametrize("name", COMMANDS)
def test_any_value_of_any_flag_is_taken_or_refused_in_a_line_that_names_it(name, monkeypatch):
    command = COMMANDS[name]
    own = flags_of(command, monkeypatch)
    stop_at_work(monkeypatch)
    monkeypatch.chdir("/")
    told = {"taken": 0, "refused": 0}

    @settings(
        max_examples=25 * len(own),
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    @given(st.sampled_from(own).flatmap(lambda flag: st.tuples(st.just(flag), texts(flag))))
    def try_one(drawn):
        flag, text = drawn
        try:
            command.run((*command.needed, f"--{flag.name}={text}"))
        except Accepted:
            told["taken"] += 1
        except SystemExit as end:
            said = str(end.code)
            assert said.startswith("error: ") and "\n" not in said, (drawn, said)
            assert re.search(rf"\b{flag.name}\b", said), (drawn, said)
            told["refused"] += 1

    try_one()
    assert min(told.values()) > 0 or len(own) < 2, told
