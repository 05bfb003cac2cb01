"""--config and its keys as flags: None, 1e6, and one line for each thing that can be wrong."""

import json
import os
import sys
from pathlib import Path

import pytest
from absl import flags

from mdt_jax import config as config_lib
from mdt_jax.basics import ranges
from mdt_jax.basics.ranges import RANGES
from mdt_jax.train.flags import define_flags
from mdt_jax.training import checks
from mdt_jax.training.config_flag import parse_config_flags

ROOT = Path(__file__).parents[1]
BEGIN = (
    "from mdt_jax.config import default_config\ndef get_config():\n    config = default_config()\n"
)
DIGITS = "configs/digits.py"


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)


def parse(*arguments, config=DIGITS):
    """The config of the train command with these arguments."""
    f = flags.FlagValues()
    sys.modules.pop("config_config", None)  # as ml_collections calls the file that it read last
    argv = ["train", *([f"--config={config}"] if config is not None else []), *arguments]
    define_flags(f, argv)
    parse_config_flags(argv, f, required=True)
    return f.config


def refusal(*arguments, config=DIGITS):
    """The line with which the command refuses them."""
    with pytest.raises(SystemExit) as end:
        parse(*arguments, config=config)
    said = str(end.value.code)
    assert said.startswith("error: ") and "\n" not in said
    return said.removeprefix("error: ")


def lookup(config, key):
    section, _, name = key.rpartition(".")
    return (config[section] if section else config)[name]


def optional_keys():
    defaults = config_lib.default_config()
    keys = [key for key, range_ in RANGES.items() if range_.none and not key.startswith("--")]
    keys += [f"eval.{name}" for name in defaults.eval if defaults.eval[name] is None]
    return sorted(set(keys))


@pytest.mark.parametrize("none", ["None", "none"])
def test_none_turns_off_every_setting_that_can_be(none):
    keys = optional_keys()
    assert {"diffusion.min_snr", "optimizer.clip_norm", "optimizer.betas", "sample.cfg_power",
            "sample.guided_channels", "keep_every", "model.decoder_depth", "model.patch_size",
            "eval.steps", "eval.sampler", "eval.clip", "eval.cfg_interval"} <= {*keys}  # fmt: skip
    config = parse(*(f"--config.{key}={none}" for key in keys))
    assert [key for key in keys if lookup(config, key) is not None] == []


def test_what_was_none_is_set_again_by_a_flag():
    config = parse("--config.keep_every=1e3", "--config.optimizer.betas=0.9,0.9,0.99",
                   "--config.eval.clip=true", "--config.eval.cfg_interval=0.1,0.7",
                   "--config.eval.sampler=ddim", "--config.diffusion.min_snr=2")  # fmt: skip
    assert (config.keep_every, config.optimizer.betas) == (1000, (0.9, 0.9, 0.99))
    assert (config.eval.clip, config.eval.sampler) == (True, "ddim")
    assert (config.eval.cfg_interval, config.diffusion.min_snr) == ((0.1, 0.7), 2.0)


@pytest.mark.parametrize(
    ("text", "value"), [("1e6", 10**6), ("2.0", 2), ("1.5e3", 1500), ("20_000", 20_000), ("7", 7)]
)
def test_a_whole_number_can_be_written_as_one_likes(text, value):
    found = parse(f"--config.num_steps={text}", "--config.num_steps", text).num_steps
    assert found == value and isinstance(found, int)


@pytest.mark.parametrize("key", ["sample.steps", "eval.steps"])
@pytest.mark.parametrize(
    ("text", "value"), [("ddim50", "ddim50"), ("10,20", "10,20"), ("40", 40), ("1e2", 100)]
)
def test_steps_are_a_number_or_a_respacing(key, text, value):
    assert lookup(parse(f"--config.{key}={text}"), key) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("my runs", "my runs"), ("true", True), ("False", False), ("None", False), ("", False)],
)
def test_a_project_of_weights_and_biases_is_a_name_or_a_switch(text, value):
    found = parse(f"--config.log.wandb={text}").log.wandb
    assert found == value and type(found) is type(value)


def test_whole_numbers_of_a_sequence_can_be_written_as_one_likes():
    found = parse("--config.schedule.boundaries=1e5,2e5", "--config.profile_steps=1e1,12")
    assert (found.schedule.boundaries, found.profile_steps) == ((100_000, 200_000), (10, 12))
    assert all(type(number) is int for number in (*found.schedule.boundaries, *found.profile_steps))


WHOLE = [key for key, range_ in RANGES.items() if range_.whole and not key.startswith("--")]


def whole_values(key):
    """A value of a whole number or a sequence of them, as people write it, and what it is."""
    low = max(RANGES[key].low, 4)
    return ((float(low), low + 1.0), (low, low + 1)) if RANGES[key].counts else (float(low), low)


def in_a_file(tmp_path, key, value):
    path = tmp_path / "mine.py"
    path.write_text(BEGIN + f"    config.{key} = {value!r}\n    return config\n")
    return path


@pytest.mark.parametrize("key", WHOLE)
def test_every_whole_number_can_be_written_as_one_likes_in_a_file_and_as_a_flag(key, tmp_path):
    written, value = whole_values(key)
    for config in (
        parse(config=in_a_file(tmp_path, key, written)),
        parse(f"--config.{key}={written}"),
        config_lib.from_json(_nested(key, json.loads(json.dumps(written)))),
    ):
        found = lookup(config, key)
        assert found == value
        assert {type(one) for one in (found if isinstance(found, tuple) else (found,))} == {int}


def _nested(key, value):
    """A setting as a config's JSON has it."""
    section, _, name = key.rpartition(".")
    return {section: {name: value}} if section else {name: value}


@pytest.mark.parametrize("key", WHOLE)
def test_a_fraction_for_a_whole_number_is_refused_in_a_file_and_as_a_flag(key, tmp_path):
    value = (1.5, 3) if RANGES[key].counts else 1.5
    for said in (
        refusal(config=in_a_file(tmp_path, key, value)),
        refusal(f"--config.{key}={value}"),
    ):
        assert key.rpartition(".")[2] in said and "1.5" in said, said


def test_a_sequence_of_one_whole_number_in_a_file_is_whole(tmp_path):
    found = parse(config=in_a_file(tmp_path, "schedule.boundaries", (1e5,))).schedule.boundaries
    assert found == (100_000,) and type(found[0]) is int
    found = parse("--config.schedule.boundaries=(1e5,)").schedule.boundaries
    assert found == (100_000,) and type(found[0]) is int


def test_the_names_of_sequences_of_whole_numbers_are_of_those_alone():
    names = [key.rpartition(".")[2] for key in RANGES if not key.startswith("--")]
    assert {"boundaries", "profile_steps"} == ranges.WHOLE_SEQUENCES
    assert all(names.count(name) == 1 for name in ranges.WHOLE_SEQUENCES)


def test_a_schedule_of_another_name_needs_no_other_setting():
    config = parse("--config.schedule.name=constant", config="configs/imagenet256_step_decay.py")
    assert (config.schedule.name, config.schedule.boundaries) == ("constant", (100_000, 125_000))
    checks.check_schedule(config)


TEXTS = ["init_from", "data.path", "eval.inception", "eval.reference", "eval.vae"]


@pytest.mark.parametrize("none", ["None", "none"])
@pytest.mark.parametrize("key", TEXTS)
def test_none_is_an_empty_text_where_that_is_the_default(key, none):
    assert lookup(parse(f"--config.{key}={none}"), key) == ""
    assert parse(f"--config.data.split={none}").data.split == "train"


def test_repeated_flags_of_one_sequence_are_its_numbers():
    assert parse("--config.ema_rates=0.9", "--config.ema_rates=0.99").ema_rates == (0.9, 0.99)
    assert parse("--config.ema_rates=(0.9, 0.99)").ema_rates == (0.9, 0.99)


WRONG = {
    "--config.batch_size=abc": "--config.batch_size=abc: it takes a whole number",
    "--config.batch_size=2.5": "--config.batch_size=2.5: it takes a whole number",
    "--config.batch_size=1e400": "--config.batch_size=1e400: it takes a whole number",
    "--config.batch_size=nan": "--config.batch_size=nan: it takes a whole number",
    "--config.batch_size=": "--config.batch_size=: it takes a whole number",
    "--config.batch_size=None": "--config.batch_size=None: None is no value of it; it takes a wh",
    "--config.batch_size=0": "batch_size 0 is below 1; it takes a whole number from 1 to",
    "--config.batch_size=1e12": "batch_size 1000000000000 is outside 1 to 1,048,576",
    "--config.label_dropout=none": "--config.label_dropout=None: None is no value of it; it ta",
    "--config.label_dropout=some": "--config.label_dropout=some: it takes a number",
    "--config.optimizer.learning_rate=nan": "optimizer.learning_rate nan is outside 1.2e-38 to 1",
    "--config.diffusion.min_snr=inf": "diffusion.min_snr inf is outside 0.01 to 1e+06; it takes",
    "--config.optimizer.betas=0.9": "optimizer.betas (0.9,) holds 1 numbers; it takes numbers",
    "--config.optimizer.betas=a,b": "optimizer.betas ('a', 'b') holds a, which is no number; it ta",
    "--config.optimizer.betas=0.9,nan": "optimizer.betas (0.9, nan) holds nan, which is outside 0",
    "--config.sample.steps=many": "sample.steps 'many' is no number and no such text; it takes a",
    "--config.sample.steps=None": "--config.sample.steps=None: None is no value of it; it takes a",
    "--config.sample.steps=0": "sample.steps 0 is below 1; it takes a whole number from 1",
    "--config.schedule.boundaries=1e5,1.5": "schedule.boundaries (100000, 1.5) holds 1.5, which is",
    "--config.optimizer.betas=(0.9, 2": "--config.optimizer.betas=",
    "--config.optimizer.betas=(0.9, 2, 0.9)": "optimizer.betas (0.9, 2, 0.9) holds 2, which is out",
    "--config.data.flip=None": "--config.data.flip=None: None is no value of it; it takes true or",
    "--config.data.flip=perhaps": "--config.data.flip=perhaps: it takes true or false",
    "--config.ema_rates=None": "ema_rates (None,) holds None, which is no number; it takes numbers",
    "--config.model=5": "--config.model=5: ",
    "--config.batchsize=3": '--config has no such key: batchsize Did you mean "batch_size"',
    "--config.optimizer.eps.x=3": "--config has no such key: optimizer.eps.x; optimizer.eps is a v",
    "--config.=3": "--config has no such key: an empty one; a config has accumulation_steps, ",
    "--config.nope=3": "--config has no such key: nope; a config has accumulation_steps, ",
    "--config.model.nope=3": "--config has no such key: model.nope; model has decoder_depth, ",
    "--max_hours=nan": "--max_hours nan is outside (0, 1e+06]",
    "--max_hours=-1": "--max_hours -1.0 is outside (0, 1e+06]",
    "--max_hours=soon": "flag --max_hours=soon: ",
    "--workdir=": "--workdir is empty; give a path",
    "--dryrun": "Unknown command line flag 'dryrun'. Did you mean: dry_run",
}


@pytest.mark.parametrize("argument", WRONG)
def test_a_wrong_value_ends_in_a_line_that_names_its_key(argument):
    said = refusal(argument)
    assert said.removeprefix("flag ").startswith(WRONG[argument].removeprefix("flag ")), said


@pytest.mark.parametrize(
    "arguments",
    [(), ("--config.batch_size=3",), ("--workdir=w",), ("--config=",), ("--config=:x",)],
)
def test_a_missing_config_is_named_with_those_that_there_are(arguments):
    said = refusal(*arguments, config=None)
    assert said.startswith("--config is missing: a file, or one of digits, digits_inpainting, ")


@pytest.mark.parametrize("place", ["configs", "configs/", "/dev/null"])
def test_a_config_that_is_there_and_no_file_is_told_so(place):
    said = refusal(config=place)
    assert said.startswith(f"--config {place} is no file; ") and "one of digits, " in said


@pytest.mark.parametrize("place", ["configs/digit.py", "digit", "configs/digits.py/"])
def test_a_config_that_is_no_file_is_named_with_those_that_there_are(place):
    said = refusal(config=place)
    assert said.startswith(f"--config {place} is not there; did you mean --config digits? ")


BROKEN = {  # the rest of the file, and what is said of it
    "an unknown key": ("    config.batchsize = 3\n    return config\n", "line 4: AttributeError: "),
    "an unknown item": ("    config['modell']['depth'] = 3\n", "line 4: KeyError: "),
    "a text for a number": ("    config.batch_size = '3'\n", "line 4: TypeError: "),
    "half a number": ("    config.batch_size = 2.5\n", "line 4: TypeError: "),
    "a wrong name": ("    return conf\n", "line 4: NameError: name 'conf' is not defined"),
    "a value error": ("    int('x')\n", "line 4: ValueError: invalid literal"),
    "a file that is not there": ("    open('gone')\n", "line 4: FileNotFoundError: "),
    "a slip of syntax": ("    return config)\n", "line 4: SyntaxError: unmatched ')'"),
    "a missing package": ("    import gone_package\n", "line 4: ModuleNotFoundError: "),
    "an import of a name": ("    from mdt_jax.config import x\n", "line 4: ImportError: "),
    "an index": ("    return [][1]\n", "line 4: IndexError: "),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("more", [(), ("--config.seed=1",)])
def test_an_error_in_a_config_is_told_with_the_files_line(what, more, tmp_path):
    code, expected = BROKEN[what]
    path = tmp_path / "mine.py"
    path.write_text(BEGIN + code)
    said = refusal(*more, config=path)
    assert said.startswith(f"--config {path}: {path} {expected}"), said


def test_the_line_is_that_of_the_config_that_another_imports(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "first_of_two.py").write_text(BEGIN + "    config.batchsize = 3\n")
    path = tmp_path / "second.py"
    path.write_text("from first_of_two import get_config\n")
    said = refusal(config=path)
    assert (
        f'{tmp_path / "first_of_two.py"} line 4: AttributeError: Key "batchsize" does not' in said
    )
    assert "batch_size" in said and len(said) < 400


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 3\n", " has no attribute 'get_config'"),
        ("def get_config():\n    pass\n", ": get_config() gives a NoneType, not a ConfigDict"),
        ("def get_config():\n    return {}\n", ": get_config() gives a dict, not a ConfigDict"),
    ],
)
def test_a_file_that_gives_no_config_is_told(code, expected, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(code)
    said = refusal(config=path)
    assert said.startswith(f"--config {path}: ") and said.endswith(expected), said


def test_an_argument_that_a_config_does_not_take_is_told():
    said = refusal(config="configs/digits_inpainting.py:MDT")
    assert said.startswith("--config configs/digits_inpainting.py:MDT: get_config() takes 0 posit")


def test_a_config_with_wrong_numbers_of_its_own_is_refused(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(BEGIN + "    config.batch_size = True\n    return config\n")
    assert refusal(config=path).startswith("batch_size True is no whole number; it takes a whole")
    assert os.getcwd() == str(ROOT)
