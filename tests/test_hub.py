"""Models on the hub: a run becomes a folder, a folder a model again, with the same samples."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from absl import flags
from fake_hub import TOKEN, serving
from flax import linen as nn
from PIL import Image
from safetensors.numpy import load_file, save_file

import mdt_jax
from mdt_jax import checkpoints
from mdt_jax import config as config_lib
from mdt_jax.commands import convert_checkpoint, push_to_hub
from mdt_jax.convert.architecture import BUFFER, UnknownWeights, state_dict_shapes
from mdt_jax.evaluate import command as evaluate_command
from mdt_jax.evaluate import flags as evaluate_flags
from mdt_jax.models.latent_space import STABLE_DIFFUSION
from mdt_jax.parallel import sharding
from mdt_jax.sample import command as sample_command
from mdt_jax.sample import flags as sample_flags
from mdt_jax.sampling import images
from mdt_jax.training import model_card, publishing
from mdt_jax.training.finetune import initial_parameters
from mdt_jax.weights import descriptions, hub, hub_config, hub_folder, pretrained
from mdt_jax.weights.errors import WeightsError

NAMES = ("cat", "cat|fish", "dog", "*gold* fish")
PRIVATE = "/home/somebody/secret"  # a place on the machine that trained
LINES = [
    {"step": 5, "loss": 2.0},
    {"step": 7, "loss": 1.5},
    {"step": 7, "eval_fid": 3.25, "eval_samples": 50_000.0, "evaluator": "inception 0123"},
    {"step": 9, "loss": 0.5},
    {"step": 9, "eval_fid": 0.25, "eval_samples": 50_000.0, "evaluator": "inception 0123"},
]


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """One device, and XLA without its expensive passes, which tiny models do not repay."""
    jax.config.update("jax_disable_most_optimizations", True)
    create = functools.partial(sharding.create_mesh, devices=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "create_mesh", create)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


def push(*arguments):
    push_to_hub.main([str(argument) for argument in arguments])


def refusal(*arguments):
    """The line with which the command refuses its arguments."""
    with pytest.raises(SystemExit) as end:
        push(*arguments)
    said = str(end.value.code)
    assert said.startswith("error: ") and "\n" not in said
    return said.removeprefix("error: ")


def random_params(network, seed):
    """Parameters that no layer starts at zero, so that every input moves the output."""
    x, zero = jnp.zeros((1, *network.image_shape)), jnp.zeros(1, jnp.int32)
    abstract = nn.unbox(jax.eval_shape(network.init, jax.random.key(0), x, zero, zero))["params"]
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(0, 0.3, a.shape).astype(np.float32), abstract)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run at step 7 whose settings differ from the defaults, with a grid and metrics."""
    path = tmp_path_factory.mktemp("run")
    config = config_lib.default_config()
    config.model.update(name="MDT", input_size=8, in_channels=1, num_classes=4, patch_size=4)
    config.model.update(hidden_size=8, depth=2, num_heads=2, decoder_depth=1)
    config.diffusion.update(schedule="squared_cosine", prediction="velocity", min_snr=3.0)
    config.update(ema_rates=(0.9, 0.99), label_dropout=0.2, batch_size=32, seed=5)
    config.data.update(path=PRIVATE, split="heldout", flip=False)
    config.optimizer.betas = (0.9, 0.95, 0.99)
    config.sample.update(steps=8, cfg_scale=2.0, cfg_power=None, guided_channels=None, clip=True)
    config.sample.cfg_interval = (0.1, 0.7)
    network = config_lib.create_network(config)
    params, *averages = (random_params(network, seed) for seed in range(3))
    with checkpoints.Checkpoints(path) as store:
        store.save(
            7,
            {"state": {"params": params}, "ema_0.9": averages[0], "ema_0.99": averages[1]},
            {
                "config": config_lib.to_json(config),
                "class_names": list(NAMES),
                "num_examples": 299,
                "latents": None,
            },
        )
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    for step in (5, 7, 9):
        said = images.provenance(model="MDT", step=step, cfg_scale=2.0)
        pixels = np.full((8, 8, 1), step, np.uint8)
        images.save_png(path / "samples" / f"{step:08d}.png", pixels, said)
    return path


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory):
    """The run's folder, as the command writes it."""
    path = tmp_path_factory.mktemp("hub") / "folder"
    push("--input", workdir, "--output", path, "--license", "mit")
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


# ---- There and back ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def samples(workdir):
    """The run's samples of the classes in turn, twice, key 3."""
    return mdt_jax.sample(*mdt_jax.load(workdir), num_samples=8, key=3)


def test_samples_of_the_folder_are_those_of_the_run_to_the_bit(workdir, folder, samples):
    ours, theirs = mdt_jax.load(workdir), mdt_jax.load(folder)
    told = [(m.name, m.step, m.class_names, m.defaults, m.latents) for m, _ in (ours, theirs)]
    assert told[0] == told[1]
    assert ours[0].network == theirs[0].network
    jax.tree.map(np.testing.assert_array_equal, *(params for _, params in (ours, theirs)))
    assert samples.dtype == np.float32 and len({one.tobytes() for one in samples}) == 8
    np.testing.assert_array_equal(mdt_jax.sample(*theirs, num_samples=8, key=3), samples)


def test_the_settings_of_the_process_and_of_training_come_back(workdir, folder):
    _, meta = checkpoints.read_meta(workdir)
    before, after = config_lib.from_json(meta["config"]), hub_folder.open_folder(folder).config
    for part in ("diffusion", "masking", "optimizer", "schedule"):
        assert before[part] == after[part], part
    for key in ("seed", "batch_size", "label_dropout"):
        assert before[key] == after[key], key
    assert (after.ema_rates, after.data.split, after.data.path) == ((0.9,), "heldout", "")


@pytest.mark.parametrize(("rate", "item"), [(None, "ema_0.9"), (0.99, "ema_0.99")])
def test_the_average_that_is_asked_for_is_written(workdir, tmp_path, rate, item):
    publishing.write_folder(workdir, tmp_path / "out", ema_rate=rate)
    _, params = mdt_jax.load(tmp_path / "out")
    saved = checkpoints.restore_item(workdir, item)
    jax.tree.map(np.testing.assert_array_equal, params, saved)
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["training"]["ema_rate"] == float(item.partition("_")[2])


def test_weights_have_the_authors_names_and_leave_for_pytorch_as_they_left_the_run(
    workdir, folder, tmp_path
):
    convert = convert_checkpoint.main
    for source in (workdir, folder):
        out = tmp_path / f"{source.name}.safetensors"
        convert(["to-torch", "--input", str(source), "--output", str(out)])
    a, b = (load_file(tmp_path / f"{source.name}.safetensors") for source in (workdir, folder))
    architecture = pretrained.read_pretrained(folder).architecture
    assert list(b) == list(a) and set(b) == set(state_dict_shapes(architecture))
    assert set(load_file(folder / "model.safetensors")) == set(b)
    assert all(a[name].tobytes() == b[name].tobytes() for name in a)
    with pytest.raises(SystemExit, match="holds one set of weights; --params raw, --ema_rate"):
        convert(["to-torch", "--input", str(folder), "--output", "x.pt", "--params", "raw"])


def test_bfloat16_is_half_of_it_and_loads(workdir, folder, tmp_path):
    push("--input", workdir, "--output", tmp_path / "half", "--dtype", "bfloat16")
    sizes = [
        sum(a.nbytes for n, a in load_file(f / "model.safetensors").items() if BUFFER not in n)
        for f in (folder, tmp_path / "half")
    ]
    assert sizes[0] == 2 * sizes[1]
    _, params = mdt_jax.load(tmp_path / "half")
    rounded = jax.tree.map(
        lambda a: np.asarray(a).astype(jnp.bfloat16).astype(np.float32), mdt_jax.load(folder)[1]
    )
    jax.tree.map(np.testing.assert_array_equal, params, rounded)
    assert json.loads((tmp_path / "half/config.json").read_text())["weights"]["dtype"] == "bfloat16"


def assert_same_model(one, other):
    """Two folders say and hold the same; the order of a file's metadata is drawn anew each time."""
    arrays = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert {n: a.tobytes() for n, a in arrays[0].items()} == {
        n: a.tobytes() for n, a in arrays[1].items()
    }
    said = [json.loads((folder / "config.json").read_text()) for folder in (one, other)]
    for described in said:
        del described["weights"]["sha256"]
    assert said[0] == said[1]


def test_a_folder_of_a_folder_is_the_same_model(folder, tmp_path):
    about = publishing.About(samples=str(folder / "samples.png"))
    publishing.write_folder(folder, tmp_path / "again", about=about)
    assert_same_model(folder, tmp_path / "again")


def test_the_file_of_weights_alone_is_the_same_model(folder):
    whole, alone = mdt_jax.load(folder)[0], mdt_jax.load(folder / "model.safetensors")[0]
    assert alone.network == whole.network and alone.defaults == whole.defaults
    assert alone.diffusion.prediction == whole.diffusion.prediction == "velocity"


# ---- Everywhere --------------------------------------------------------------------------------


def sample_with(*arguments):
    f = flags.FlagValues()
    sample_flags.define_flags(f)
    f(["sample", *map(str, arguments)])
    return f, sample_command.generate(f, sharding.create_mesh())


def test_the_sample_command_takes_the_folder_and_knows_what_is_done(folder, samples, tmp_path):
    given = ("--num_samples=8", "--seed=3", f"--output={tmp_path / 'out'}")
    f, (npz, _) = sample_with(f"--checkpoint={folder}", *given)
    np.testing.assert_array_equal(np.load(npz)["arr_0"], images.to_uint8(samples))
    before = npz.stat().st_mtime_ns
    sample_command.generate(f, sharding.create_mesh())  # it holds these samples already
    assert npz.stat().st_mtime_ns == before
    assert sample_command.check_model(f, sharding.create_mesh()) == (8, 8)


def test_evaluating_pixels_asks_for_no_autoencoder(folder):
    f = flags.FlagValues()
    evaluate_flags.define_flags(f)
    f(["evaluate", f"--checkpoint={folder}"])
    given = evaluate_command._sampling_flags(f, None)
    assert given.vae is None and given.output == "folder"


def test_a_run_starts_from_the_folder(folder):
    config = hub_folder.open_folder(folder).config
    config.init_from = str(folder)
    params, _ = initial_parameters(config, config_lib.create_network(config), lambda: 1 / 0)
    jax.tree.map(np.testing.assert_array_equal, params, mdt_jax.load(folder)[1])


def test_the_folder_is_inspected_and_becomes_a_run(folder, tmp_path, capsys):
    convert = convert_checkpoint.main
    convert(["inspect", "--input", str(folder)])
    said = capsys.readouterr().out
    assert re.search(r"^model +MDT$", said, re.M) and re.search(r'^license +"mit"$', said, re.M)
    assert "squared_cosine" in said and "x_embedder.proj.weight" in said
    convert(["to-jax", "--input", str(folder), "--output", str(tmp_path / "run")])
    _, meta = checkpoints.read_meta(tmp_path / "run")
    assert meta["config"]["ema_rates"] == [0.9] and meta["class_names"] == list(NAMES)


def test_a_folder_has_no_choice_of_averages_and_steps(folder):
    with pytest.raises(ValueError, match="ema_rate and step are a run's; .* is one set of weights"):
        mdt_jax.load(folder, ema_rate=0.9)


def test_a_folder_is_told_from_a_run(workdir, folder, tmp_path):
    there = ["hf://owner/repo", "hf://owner/repo@v1", "hf://o/r@refs/pr/3", folder]
    assert [source for source in there if not hub_folder.is_hub_folder(source)] == []
    (tmp_path / "begun").mkdir()
    run = config_lib.to_json(config_lib.default_config())
    (tmp_path / "begun" / "config.json").write_text(json.dumps(run))
    others = [workdir, tmp_path, tmp_path / "begun", "hf://owner", "hf://owner/repo/a.pt", "a.pt"]
    others += ["hf://owner/repo@v1/a.pt", "hf://o/r@refs/pr/3/a.pt", "", "x" * 5000]
    assert [source for source in others if hub_folder.is_hub_folder(source)] == []


# ---- What config.json and the card say ---------------------------------------------------------


def test_no_place_of_the_machine_is_published(workdir, folder):
    for file in folder.iterdir():
        data = file.read_bytes()
        for place in (PRIVATE, str(workdir), str(folder), str(Path.home())):
            assert place.encode() not in data, (file.name, place)
    space = dataclasses.replace(STABLE_DIFFUSION, autoencoder=f"{PRIVATE}/vae")
    config = config_lib.default_config()
    config.init_from = f"{PRIVATE}/weights.pt"
    architecture = descriptions.architecture_of(config_lib.create_network(config))
    described = hub_config.describe(config, architecture, latents=space)
    assert described["latents"]["autoencoder"] == "vae"
    assert described["training"]["init_from"] == "weights.pt"
    assert PRIVATE not in json.dumps(described)


def test_the_latents_of_a_model_come_back(tmp_path):
    config = config_lib.default_config()
    architecture = descriptions.architecture_of(config_lib.create_network(config))
    space = dataclasses.replace(STABLE_DIFFUSION, scale=0.5, shift=0.25, digest="ab" * 32)
    described = hub_config.describe(config, architecture, latents=space)
    found = hub_config.parse(tmp_path, json.loads(json.dumps(described)))
    assert found[0] == architecture and found[3] == space
    assert found[1].model.name == "MDTv2-XL/2" and found[1].data.name == "digits"


def head_and_text(folder):
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), text


def test_the_card_says_what_the_run_is_and_no_more(folder):
    head, text = head_and_text(folder)
    assert head["license"] == "mit" and head["library_name"] == "mdt_jax"
    (result,) = head["model-index"][0]["results"]
    assert (result["metrics"][0]["type"], result["metrics"][0]["value"]) == ("fid", 3.25)
    for said in ("| training loss | 1.5000 | step 7 |", "| FID | 3.25 | 50,000 samples, step 7 |",
                 "| steps | 7 of 32 examples |", "| examples | 299 |", "split `heldout`",
                 "0.3 to 0.5 of them", "squared_cosine", "velocity",
                 "synthetic", "Complex spatial structure", "High-frequency", "Sampling is slow",
                 "![Samples, synthetic](samples.png)", "step 7, guidance 2", r"cat\|fish",
                 r"\*gold\* fish"):  # fmt: skip
        assert said in text, said
    assert "0.25" not in text.replace("3.25", "")  # a judgement of a later step
    assert (folder / "samples.png").read_bytes()[:4] == b"\x89PNG"
    assert np.asarray(Image.open(folder / "samples.png")).max() == 7


def test_numbers_of_a_classifier_are_not_published_as_fid(folder):
    described = json.loads((folder / "config.json").read_text())
    line = {"step": 7, "eval_fid": 0.5, "eval_samples": 300.0, "evaluator": "classifier 01"}
    card = model_card.model_card(
        described, address="hf://o/r", parameters=1, dtype="float32", lines=[line]
    )
    head = yaml.safe_load(card.split("---\n", 2)[1])
    assert "model-index" not in head
    assert "| Fréchet distance | 0.5 | 300 samples, step 7 |" in card
    assert "never compare with published FIDs" in card and "| FID |" not in card


def test_a_model_without_a_run_says_what_is_known(folder, tmp_path):
    shutil.copy(folder / "model.safetensors", tmp_path / "alone.safetensors")
    publishing.write_folder(tmp_path / "alone.safetensors", tmp_path / "out")
    head, text = head_and_text(tmp_path / "out")
    assert head["license"] == "unknown" and "not stated" in text
    assert "## Results" not in text and "| data |" not in text
    # Pixels need no autoencoder: a grid is drawn.
    assert images.read_metadata(tmp_path / "out" / "samples.png")["Content"].startswith("synthetic")


# ---- Refusals ----------------------------------------------------------------------------------


def change(**values):
    """Changes entries of config.json, by their keys joined by two underscores."""

    def apply(folder):
        path = folder / "config.json"
        described = json.loads(path.read_text())
        for name, value in values.items():
            *parts, last = name.split("__")
            holder = described
            for part in parts:
                holder = holder[part]
            if value is None:
                del holder[last]
            else:
                holder[last] = value
        path.write_text(json.dumps(described))

    return apply


def weights(edit):
    """Changes the arrays, and the digest with them."""

    def apply(folder):
        path = folder / "model.safetensors"
        arrays = load_file(path)
        edit(arrays)
        save_file(arrays, path)
        change(weights__sha256=hub_folder.sha256(path))(folder)

    return apply


def flip(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    change(weights__sha256=hub_folder.sha256(path))(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json; give a folder"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), 'does not say "format": "mdt_jax"'),
    "diffusers'": (
        lambda f: (f / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}'),
        "it is of a DiTTransformer2DModel of diffusers'; give a folder that tools/push_to_hub.py",
    ),
    "newer": (change(format_version=2), "is of version 2 of the format, .* install a newer"),
    "version": (change(format_version="1"), "format_version '1' is no whole number"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no file model.safetensors"),
    "pointer": (lambda f: (f / "model.safetensors").write_text(POINTER), "run git lfs pull"),
    "a bit": (flip, "model.safetensors .* is damaged: its SHA-256 is"),
    "truncated": (truncate, "is truncated or not a safetensors file"),
    "missing": (weights(lambda a: a.pop("mask_token")), "mask_token .* is missing"),
    "surplus": (weights(lambda a: a.update(extra=np.zeros(2))), "extra .* is no weight of"),
    "shape": (
        weights(lambda a: a.update(mask_token=np.zeros((1, 1, 9), np.float32))),
        "mask_token has shape .1, 1, 9.; MDT has .1, 1, 8.",
    ),
    "other sizes": (change(architecture__depth=6), "config.json says depth 6, and model.safet.* 2"),
    "no part": (change(sampling=None), "sampling is missing"),
    "no key": (change(process__schedule=None), "process.schedule is missing"),
    "kind of part": (change(class_names="cat"), "class_names is 'cat', not a list"),
    "kind": (change(sampling__cfg_scale="much"), "sample.cfg_scale is 'much', which is no float"),
    "range": (change(sampling__cfg_scale=1e9), "sample.cfg_scale 1000000000.0 is outside"),
    "unknown option": (change(sampling__magic=1), "sampling.magic is unknown to this version"),
    "unknown size": (change(architecture__magic=1), "architecture.magic is unknown to this"),
    "no size": (change(architecture__depth=None), "architecture.depth is missing"),
    "kind of size": (change(architecture__depth=4.5), "architecture.depth is 4.5, which is no int"),
    "sampler": (change(sampling__sampler="euler"), "sampling.sampler 'euler' is unknown; known"),
    "schedule": (change(process__schedule="sine"), "noise schedule 'sine' is unknown"),
    "prediction": (change(process__prediction="flow"), "prediction 'flow' is unknown"),
    "variance": (change(process__variance="fixed_small"), "process.variance .* do not go together"),
    "dropout": (change(training__settings__label_dropout=0.0), "label_dropout is 0.0, and archite"),
    "names": (change(class_names=["a"]), "class_names has 1 names, and the model 4 classes"),
    "latents": (change(latents={"scale": -1}), "the latents' scale is -1"),
    "channels": (change(latents={"channels": 4}), "latents.channels is 4, and architecture.in_ch"),
    "steps": (change(training__step=-1), "training.step is below 0"),
    "type": (change(compute_dtype="float16"), "model.dtype 'float16' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(what, copy):
    damage, said = DAMAGES[what]
    damage(copy)
    with pytest.raises((WeightsError, UnknownWeights), match=said) as caught:
        pretrained.read_pretrained(copy)
    assert "\n" not in str(caught.value) and str(copy) in str(caught.value)


def test_what_tells_of_the_training_alone_may_be_newer(copy):
    change(training__settings__optimizer__flavour=1, training__mood="good", mood="good")(copy)
    assert pretrained.read_pretrained(copy).step == 7


def test_a_folder_that_tells_little_of_its_training_is_published_again(copy, tmp_path):
    change(training__settings={"optimizer": {"name": "adan"}}, training__data={})(copy)
    change(training__init_from=None, training__ema_rate=None)(copy)
    about = publishing.About(samples=str(copy / "samples.png"))
    publishing.write_folder(copy, tmp_path / "again", about=about)
    text = (tmp_path / "again" / "README.md").read_text()
    assert "| steps | 7 |" in text and "optimiser" not in text and "| data |" not in text


def test_a_sampler_option_that_is_younger_than_the_folder_has_its_default(copy):
    change(sampling__eta=None)(copy)
    assert mdt_jax.load(copy)[0].defaults["eta"] == 0.0


REFUSED = {
    "nowhere": ((), "give --output DIR, a new folder, or --repo OWNER/REPO, or both"),
    "private": (("--output=x", "--private"), "--private is of a repository; give --repo"),
    "repo": (("--repo=name",), "--repo name is no name of a repository; give OWNER/REPO"),
    "licence": (("--output=x", "--license=My Own"), "--license 'My Own' is no name of a licence"),
    "picture": (("--output=x", "--samples=no.png"), "--samples no.png is no file; give a PNG"),
    "average": (("--output=x", "--ema_rate=0.5"), "keeps no average of rate 0.5; it keeps 0.9, 0"),
    "step": (("--output=x", "--step=3"), "no checkpoint of step 3"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_command_that_cannot_be_meant_is_refused(what, workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    arguments, said = REFUSED[what]
    assert said in refusal("--input", workdir, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_there_is_not_written_over(workdir, folder):
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert "is there already; give a new folder" in refusal("--input", workdir, "--output", folder)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


# ---- The hub -----------------------------------------------------------------------------------


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A hub on this machine, in the place of the real one."""
    from huggingface_hub import constants

    with serving() as fake:
        monkeypatch.setattr(constants, "ENDPOINT", fake.endpoint)
        template = fake.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub_folder._fetch_config.cache_clear()
        yield fake
        hub_folder._fetch_config.cache_clear()


def test_a_run_goes_to_the_hub_and_comes_back(workdir, folder, fake, tmp_path, capsys):
    push("--input", workdir, "--repo", "me/cats", "--license", "mit", "--private")
    said = capsys.readouterr().out
    assert f"{fake.endpoint}/me/cats/commit/" in said and 'mdt_jax.load("hf://me/cats")' in said
    assert fake.repos["me/cats"]["private"]
    _, files = fake.files("me/cats")
    assert sorted(files) == sorted(hub_folder.FILES)
    (tmp_path / "fetched").mkdir()
    for name, data in files.items():
        (tmp_path / "fetched" / name).write_bytes(data)
    assert_same_model(tmp_path / "fetched", folder)
    assert b'mdt_jax.load("hf://me/cats")' in files["README.md"]
    model, params = mdt_jax.load("hf://me/cats")
    ours, expected = mdt_jax.load(workdir)
    assert (model.network, model.class_names, model.defaults) == (
        *(ours.network, NAMES, ours.defaults),
    )
    jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_a_folder_is_sent_as_it_is_and_what_it_lacks_goes(folder, copy, fake):
    push("--input", folder, "--repo", "me/cats")
    (copy / "samples.png").unlink()
    (copy / "README.md").write_text("---\nlicense: mit\n---\nby hand")
    (copy / "notes.txt").write_text("mine")
    fake.commit("me/cats", {"demo.gif": b"gif"})
    push("--input", copy, "--repo", "me/cats")
    _, files = fake.files("me/cats")
    assert sorted(files) == ["README.md", "config.json", "demo.gif", "model.safetensors"]
    assert files["README.md"].endswith(b"by hand")
    assert len(fake.repos["me/cats"]["commits"]) == 3


def test_both_files_are_of_one_revision(folder, fake, tmp_path):
    old = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    first = fake.commit("me/cats", old)
    hub_folder._fetch_config("hf://me/cats")
    fake.commit("me/cats", {"model.safetensors": b"newer", "config.json": b"{}"})
    for source in ("hf://me/cats", f"hf://me/cats@{first}"):
        assert pretrained.read_pretrained(source).step == 7
    assert not any("resolve/main/model" in asked for asked in fake.asked)
    hub_folder._fetch_config.cache_clear()
    with pytest.raises(WeightsError, match='does not say "format": "mdt_jax"'):
        mdt_jax.load("hf://me/cats")
    with pytest.raises(WeightsError, match="me/cats has no revision v3; give a branch, a tag"):
        mdt_jax.load("hf://me/cats@v3")


def test_repositories_of_others_are_refused_before_anything_large_is_fetched(fake):
    fake.commit("me/other", {"pytorch_model.bin": b"1" * 1000})
    fake.commit("me/half", {"config.json": b'{"format": "mdt_jax", "format_version": 9}'})
    for source, said in (
        ("hf://me/other", r"hf://me/other is no repository that mdt_jax wrote: it holds no config"),
        ("hf://me/half", "is of version 9 of the format"),
        ("hf://me/none", "the hub has no me/none, or HF_TOKEN gives no access to it"),
    ):
        with pytest.raises(WeightsError, match=said) as caught:
            mdt_jax.load(source)
        assert "\n" not in str(caught.value)
    assert not any(asked.startswith("GET") and ".bin" in asked for asked in fake.asked)


SENDING = {
    "the token": ({"refuses": (401, "no")}, "the hub does not take the token"),
    "the right to write": ({"refuses": (403, "no")}, "lets this token not write there"),
    "too many requests": ({"refuses": (429, "no")}, "takes no more requests for now"),
    "the card": ({"bad_yaml": "license must be one of"}, "does not take the folder: Invalid meta"),
}


@pytest.mark.parametrize("what", SENDING)
def test_what_the_hub_answers_is_one_line_and_the_folder_stays(what, folder, fake, tmp_path):
    answers, said = SENDING[what]
    for name, value in answers.items():
        setattr(fake, name, value)
    line = refusal("--input", folder, "--repo", "me/cats")
    assert line.startswith("--repo me/cats: ") and said in line and "--output DIR" in line


def test_what_is_there_is_not_written_over_and_not_taken_for_private(folder, fake):
    fake.commit("me/other", {"pytorch_model.bin": b"1"})
    said = refusal("--input", folder, "--repo", "me/other")
    assert "--repo me/other holds something else (pytorch_model.bin); give another name" in said
    said = refusal("--input", folder, "--repo", "me/other", "--private")
    assert "--private: me/other is there, and public" in said
    assert list(fake.files("me/other")[1]) == ["pytorch_model.bin"]


def test_without_a_token_or_a_network_nothing_is_sent(folder, fake, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")
    said = refusal("--input", folder, "--repo", "me/cats")
    assert "there is no token for the hub; run hf auth login or set HF_TOKEN" in said
    assert fake.asked == []
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in refusal("--input", folder, "--repo", "me/cats")
    with pytest.raises(WeightsError, match="run hf download me/cats --local-dir FOLDER, copy"):
        mdt_jax.load("hf://me/cats")


@pytest.mark.parametrize("repo", ["", "a", "a/b/c", "a/b.git", "a--b/c", "a/b c", "a/../b", "a/é"])
def test_names_that_no_repository_has_are_refused(repo):
    with pytest.raises(WeightsError, match="is no name of a repository; give OWNER/REPO"):
        hub.check_repository(repo)


def test_a_run_is_published_in_whole_or_not_at_all(workdir, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_folder, "write_config", fail)
    said = refusal("--input", workdir, "--output", tmp_path / "out")
    assert "could not be written: No space left on device; is the disk full?" in said
    assert list(tmp_path.iterdir()) == []
