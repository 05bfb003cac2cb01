"""Which labels are taken for classes, in Python and from --labels, and what is said of the rest."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from command_flags import Accepted, commands, stop_at_work

import mdt_jax
from mdt_jax import sampling
from mdt_jax.config import default_config

RESOLVERS = (sampling.resolve_labels, sampling.draw_labels, sampling.class_numbers)


@pytest.fixture(scope="module")
def model():
    config = default_config()
    config.model.update(name="DiT-S/8", num_classes=4)
    return sampling.DiffusionModel.from_config(config, ("cat", "dog", "12", "catfish"))


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ([3, 0], [3, 0]),
        ((1,), [1]),
        (np.array([3, 1], np.uint8), [3, 1]),
        (jnp.array([2]), [2]),
        ([np.int64(2), jnp.int32(1)], [2, 1]),
        ([2.0], [2]),
        (["3", " 1", "dog", np.str_("cat")], [3, 1, 1, 0]),
        (["12"], [2]),  # a name comes before a number
        (range(2), [0, 1]),
    ],
)
def test_what_is_taken(labels, classes, model):
    assert sampling.class_numbers(model, labels).tolist() == classes


REFUSED = [
    ([None], r"label None is no class: classes are whole numbers, 0 to 3, or names"),
    ([3.7], r"label 3.7 is no class"),
    ([math.nan], r"label nan is no class"),
    ([math.inf], r"label inf is no class"),
    ([True], r"label True is no class"),
    ([1, None, 2], r"label None is no class"),
    (np.array([True, False]), r"label True is no class"),
    (np.array([0.5]), r"label 0.5 is no class"),
    ([np.float32(1.5)], r"label .*1.5.* is no class"),
    ([object], r"label <class 'object'> is no class"),
    ([b"cat"], r"label b'cat' is no class"),
    ([1j], r"label 1j is no class"),
    (3, r"labels 3 is one label; give a list of them, \[3\]"),
    (np.int64(3), r"labels 3 is one label"),
    (jnp.int32(3), r"labels 3 is one label"),
    ("cat", r"labels 'cat' is one label; give a list of them, \['cat'\]"),
    ("12", r"labels '12' is one label"),
    ("", r"labels '' is one label"),
    (2.5, r"labels 2.5 is one label"),
    ([[1, 2], [3, 0]], r"labels hold \[1, 2\]; give a flat list"),
    (np.zeros((2, 2), int), r"labels hold \[0, 0\]; give a flat list"),
    ([np.array([1, 2])], r"labels hold \[1 2\]; give a flat list"),
    ({1, 2}, r"labels \{1, 2\} have no order; give a list, a class for each sample"),
    (frozenset({1}), r"labels .* have no order; give a list"),
    ({1: 2}, r"labels \{1: 2\} have no order; give a list"),
    ([""], r"labels hold an empty name"),
    (["cat", "  "], r"labels hold an empty name"),
    (["3.0"], r"no class is named '3.0'"),
    (["nan"], r"no class is named 'nan'"),
    (["1_0"], r"no class is named '1_0'"),
    (["٣"], r"no class is named '٣'"),
    (["9" * 30], r"no class is named '9999"),
    ([4], r"label 4 is outside 0 to 3"),
    (["-1"], r"label -1 is outside 0 to 3"),
]


@pytest.mark.parametrize(("labels", "said"), REFUSED)
def test_what_is_refused_in_one_line(labels, said, model):
    for resolve in RESOLVERS:
        with pytest.raises(ValueError, match=rf"^{said}[^\n]*$"):
            resolve(model, labels)
    with pytest.raises(ValueError, match=said):
        mdt_jax.sample(model, {}, labels=labels)


@pytest.mark.parametrize("labels", [None, (), [], np.zeros(0, int)])
def test_no_labels_are_all_classes_in_turn(labels, model):
    assert sampling.resolve_labels(model, labels, 6).tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize("resolve", RESOLVERS)
def test_labels_are_read_once(resolve, model):
    found = resolve(model, iter([1, 2]))
    assert len(found) == 2 and set(found.tolist()) <= {1, 2}
    assert len(resolve(model, (label for label in ["cat"]))) == 1


@pytest.mark.parametrize("count", [0, -1, 99_999_999_999_999])
def test_a_number_of_samples_that_cannot_be_is_refused(count, model):
    for resolve in RESOLVERS[:2]:
        with pytest.raises(ValueError, match=f"^num_samples {count} "):
            resolve(model, [0], count)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("cfg_scale", math.nan, "cfg_scale nan is outside -1000 to 1000"),
        ("cfg_scale", math.inf, "cfg_scale inf is outside"),
        ("cfg_scale", "2", "cfg_scale '2' is a text, no number"),
        ("cfg_scale", True, "cfg_scale True is no number"),
        ("cfg_power", -1, "cfg_power -1 is outside 0 to 100"),
        ("cfg_power", math.nan, "cfg_power nan is outside"),
        ("eta", 2.0, "eta 2.0 is outside 0 to 1"),
        ("eta", math.nan, "eta nan is outside 0 to 1"),
        ("guided_channels", 0, "guided_channels 0 is below 1"),
        ("guided_channels", 2.5, "guided_channels 2.5 is no whole number"),
        ("steps", 0, "steps 0 is below 1"),
        ("steps", -5, "steps -5 is below 1"),
        ("steps", 2.5, "steps 2.5 is no whole number"),
        ("clip", "False", "clip 'False' is neither True nor False; it takes one of them"),
        ("clip", "no", "clip 'no' is neither True nor False"),
        ("clip", 2, "clip 2 is neither True nor False"),
        ("clip", np.array([True]), r"clip \[True\] is neither True nor False"),
        ("sampler", ["ddim"], r"sampler \['ddim'\] is unknown; known: ddpm"),
        ("steps", np.array([2]), r"steps \[2\] is no whole number"),
        ("steps", "-5", "steps '-5' is no number and no such text; it takes a whole number from 1"),
        ("steps", "", "steps '' is no number and no such text; it takes a whole number"),
        ("steps", "10,2000", "steps 10,2000: respacing '10,2000' asks for 2000"),
        ("cfg_interval", (math.nan, 1), r"cfg_interval \(nan, 1\) is not \(low, high\)"),
        ("cfg_interval", 0.5, r"cfg_interval 0.5 is not \(low, high\)"),
        ("cfg_interval", ("0", "1"), r"cfg_interval \('0', '1'\) is not \(low, high\)"),
    ],
)
def test_options_out_of_their_range_are_refused_by_their_own_names(option, value, said, model):
    with pytest.raises(ValueError, match=rf"^{said}[^\n]*$"):
        sampling.resolve_options(model, **{option: value})


@pytest.mark.parametrize(
    ("option", "value", "taken"),
    [
        ("steps", jnp.int32(2), 2),
        ("steps", np.int64(2), 2),
        ("eta", np.float32(0.5), 0.5),
        ("clip", np.bool_(True), True),
        ("guided_channels", jnp.int32(2), 2),
        ("cfg_power", jnp.float32(2), 2.0),
        ("cfg_interval", np.array([0.1, 0.7]), (0.1, 0.7)),
        ("cfg_interval", [0.1, 0.7], (0.1, 0.7)),
        ("cfg_interval", np.array([0.0, 1.0]), None),
        ("cfg_interval", (), None),
    ],
)
def test_options_of_arrays_are_taken_as_pythons_own(option, value, taken, model):
    options = sampling.resolve_options(model, **{option: value})
    assert getattr(options, option) == taken and hash(options) is not None


COMMANDS = commands()


@pytest.mark.parametrize("command", ["sample", "evaluate"])
@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--labels=,", "--labels , holds an empty name; give classes by number or name, such as 0"),
        ("--labels=1,,2", "--labels 1,,2 holds an empty name"),
        ("--labels= ,1", "--labels ,1 holds an empty name"),
        ("--cfg_scale=nan", "--cfg_scale nan is outside -1000 to 1000"),
        ("--cfg_scale=inf", "--cfg_scale inf is outside -1000 to 1000"),
        ("--cfg_scale=-1e9", "--cfg_scale -1000000000.0 is outside -1000 to 1000"),
        ("--cfg_power=-1", "--cfg_power -1.0 is outside 0 to 100"),
        ("--cfg_power=inf", "--cfg_power inf is outside 0 to 100"),
        ("--eta=nan", "--eta nan is outside 0 to 1"),
        ("--cfg_interval=nan,1", "--cfg_interval [nan, 1.0] holds nan, which is outside 0 to 1"),
        ("--cfg_interval=0.7,0.1", "--cfg_interval [0.7, 0.1] is not in ascending order"),
        ("--seed=-1", "--seed -1 is below 0; it takes a whole number from 0 to 9,223,372"),
        ("--seed=9223372036854775808", "--seed 9223372036854775808 is outside 0 to 9,223,372"),
        ("--num_samples=99999999999999", "--num_samples 99999999999999 is outside 1 to 100,000,0"),
        ("--num_samples=0", "--num_samples 0 is below 1"),
        ("--ema_rate=nan", "--ema_rate nan is outside 0 to 0.999999"),
        ("--step=-1", "--step -1 is below 0"),
        ("--mesh_fsdp=0", "--mesh_fsdp 0 is below 1"),
        ("--mesh_fsdp=-1", "--mesh_fsdp -1 is below 1; it takes a whole number from 1 to 1,048"),
        ("--mesh_tensor=-1", "--mesh_tensor -1 is below 1; it takes a whole number"),
        ("--vae_batch_size=0", "--vae_batch_size 0 is below 1"),
        ("--steps=", "--steps '' is no number and no such text; it takes a whole number from 1"),
        ("--steps=0", "--steps '0' is no number and no such text; it takes"),
        ("--seed=None", "flag --seed=None: None is no value of it; it takes a whole number from 0"),
        (
            "--num_samples=1.5",
            "flag --num_samples=1.5: it takes a whole number, such as 256 or 1e6",
        ),
        ("--output=", "--output is empty; give a path"),
        ("--workdir=", "--workdir is empty; give a path"),
        ("--num_samples=many", "flag --num_samples=many: "),
        ("--num_sample=3", "Unknown command line flag 'num_sample'. Did you mean: num_samples"),
        ("--sampler=euler", "flag --sampler=euler: value should be one of <ddpm|ddim"),
    ],
)
def test_flags_of_sampling_are_refused_by_their_own_names(command, argument, said, monkeypatch):
    stop_at_work(monkeypatch)
    one = COMMANDS[command]
    with pytest.raises(Accepted):
        one.run(one.needed)
    with pytest.raises(SystemExit) as end:
        one.run((*one.needed, argument))
    assert str(end.value.code).startswith(f"error: {said}"), end.value.code
    assert "\n" not in str(end.value.code)


@pytest.mark.parametrize("argument", ["--resamples=0", "--masked_share=nan", "--masked_share=2"])
def test_flags_of_painting_are_refused(argument, monkeypatch):
    stop_at_work(monkeypatch)
    with pytest.raises(SystemExit) as end:
        COMMANDS["sample"].run(("--workdir=w", "--inpaint=a.png", "--mask=b.png", argument))
    assert str(end.value.code).startswith(f"error: {argument.partition('=')[0]} ")
