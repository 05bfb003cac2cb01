"""Any value of any flag of any command: taken, or refused in one line that names the flag."""

import contextlib
import math
import re

import pytest
from command_flags import Accepted, commands, flags_of, stop_at_work
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mdt_jax.basics import ranges
from mdt_jax.basics.ranges import RANGES
from mdt_jax.parallel.flag_parsing import NONE, PLACES

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


# Flags that name a place, beside `PLACES`.
MORE_PLACES = ("data_path", "vae")
URLS = {"gs://bucket/x": "mount the bucket (gcsfuse)",
        "s3://bucket/x": "mount the bucket (mount-s3)",
        "https://x.y/z.pt": "download the file", "file:///x": "give the path alone"}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_that_is_a_place_says_what_to_do_about_a_url(name, monkeypatch):
    command = COMMANDS[name]
    places = (*PLACES, *MORE_PLACES)
    own = [f for f in flags_of(command, monkeypatch) if f.name in places and f.kind is str]
    stop_at_work(monkeypatch)
    monkeypatch.chdir("/")
    for flag in own:
        # prepare_dataset takes one of several inputs.
        needed = () if flag.name in ("imagenet", "lmdb", "parquet") else command.needed
        for url, way_out in URLS.items():
            with pytest.raises(SystemExit) as end:
                command.run((*needed, f"--{flag.name}={url}"))
            said = str(end.value.code)
            assert said.startswith(f"error: --{flag.name} {url} is a URL: {way_out[:5]}"), said
            tool = way_out.partition("(")[2].strip(")")
            assert tool in said, said


@pytest.mark.parametrize("key", ["data.path", "init_from", "eval.inception", "eval.reference",
                                 "eval.vae"])  # fmt: skip
def test_every_setting_that_is_a_place_says_what_to_do_about_a_url(key):
    command = COMMANDS["train"]
    for url, way_out in URLS.items():
        with pytest.raises(SystemExit) as end:
            command.run((*command.needed, f"--config.{key}={url}"))
        assert str(end.value.code).startswith(f"error: --config.{key} {url} is a URL: {way_out}")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_is_taken_as_a_config_takes_it(name, monkeypatch):
    command = COMMANDS[name]
    own = [f for f in flags_of(command, monkeypatch) if f.kind in (int, float)]
    stop_at_work(monkeypatch)
    monkeypatch.chdir("/")
    parsed, check = [], ranges.check_flags
    monkeypatch.setattr(
        ranges, "check_flags", lambda values: (parsed.append(dict(values)), check(values))
    )

    def run(*arguments):
        parsed.clear()
        with contextlib.suppress(Accepted, SystemExit):  # or refused after it was parsed
            command.run((*command.needed, *arguments))
        return parsed[0]

    defaults = run()
    for flag in own:
        range_ = RANGES[f"--{flag.name}"]
        value = 10 if range_.fault([10] if range_.counts else 10) == "" else range_.low
        value = 0.5 if range_.above and value == range_.low else value
        for text in (str(float(value)), f"{value / 10}e1"):
            found = run(f"--{flag.name}={text}")[flag.name]
            (found,) = found if isinstance(found, list) else (found,)
            assert found == value and type(found) is flag.kind, (flag, text, found)
        refused = ["abc"]
        if flag.kind is int:
            refused.append("1.5")
        if defaults.get(flag.name) is not None:
            refused.append("None")
        else:
            assert run(f"--{flag.name}=None")[flag.name] in (None, NONE), flag
        for text in refused:
            with pytest.raises(SystemExit) as end:
                command.run((*command.needed, f"--{flag.name}={text}"))
            said = str(end.value.code)
            assert said.startswith("error: ") and "\n" not in said, said
            assert f"--{flag.name}" in said and text in said, said
