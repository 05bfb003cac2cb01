"""The demo without its page: the same bits as the commands, hostile requests, and the line."""

import base64
import dataclasses
import io
import itertools
import struct
import subprocess
import sys
import threading
import time
import zlib

import jax
import numpy as np
import pytest
from absl import flags
from demo_runs import ROOT, data_url
from PIL import Image
from test_sample import command as sample
from test_sample import latent_model, random_params  # noqa: F401 - a fixture

import mdt_jax
from mdt_jax import config as config_lib
from mdt_jax import sampling
from mdt_jax.demo import command, limits, markup, requests
from mdt_jax.demo.defaults import default_steps, first_requests
from mdt_jax.demo.engine import Engine, Pace
from mdt_jax.demo.flags import define_flags
from mdt_jax.demo.limits import Limits
from mdt_jax.demo.line import Busy, Line, Stopped
from mdt_jax.demo.requests import ALL_CLASSES, Surroundings
from mdt_jax.parallel import sharding
from mdt_jax.parallel.command import UserError
from mdt_jax.sampling import images, inpainting

NAMES = ("cat", "catfish", "dog", "gold{fish}")
# The values of the page's controls, by tab.
SAMPLE = {"label": 2, "count": 3, "sampler": "ddpm", "steps": 8, "scale": 2.0, "power": 0,
          "low": 0, "high": 1, "seed": 5}  # fmt: skip
PAINT = {"picture": None, "mask": "01" * 32, "label": 1, "count": 2, "sampler": "ddim", "steps": 4,
         "scale": 2.0, "resamples": 2, "masked_share": 0.5, "seed": 5}  # fmt: skip
HIDDEN = {"picture": None, "of_the_data": -1, "label": ALL_CLASSES, "share": 0.5, "time": 0.5,
          "seed": 1}  # fmt: skip


@pytest.fixture(scope="module")
def picture():
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))


@pytest.fixture(scope="module")
def loaded():
    config = config_lib.default_config()
    config.model.update(name="MDTv2", input_size=8, in_channels=1, num_classes=4, patch_size=2)
    config.model.update(hidden_size=8, depth=3, num_heads=2, decoder_depth=1)
    config.sample.update(steps=20, cfg_scale=2.0, cfg_power=None, guided_channels=None, clip=True)
    model = sampling.DiffusionModel.from_config(config, NAMES, step=7)
    return model, random_params(model.network, 0)


@pytest.fixture(scope="module")
def around(loaded, picture):
    return Surroundings(loaded[0], None, Limits(), ((np.asarray(picture)[..., None], 3),))


@pytest.fixture(scope="module")
def engine(loaded, around):
    about = {"model": loaded[0].name, "step": 7, "ema_rate": None, "vae": None}
    return Engine(around, loaded[1], sharding.create_mesh(), about)


@pytest.fixture(scope="module")
def drawn(engine, around):
    """All updates of SAMPLE."""
    return list(engine.updates(requests.sample_request(around, **SAMPLE)))


# The bits.


def test_a_seed_gives_the_bits_of_sample(loaded, drawn):
    expected = mdt_jax.sample(*loaded, labels=[2] * 3, key=5, steps=8, cfg_scale=2.0)
    made = np.stack([picture.pixels for picture in drawn[-1].result])
    np.testing.assert_array_equal(made, images.to_uint8(expected))
    assert len(np.unique(made.reshape(3, -1), axis=0)) == 3


def test_pictures_stream_in_while_the_model_denoises(drawn):
    steps = [update.done for update in drawn if update.note == "denoising"]
    assert steps == sorted(steps) and steps[-1] == drawn[-2].total == 8 and len(steps) > 2
    previews = [update.previews for update in drawn if update.previews]
    assert previews and all(p.shape == (8, 8, 1) for p in previews[0]) and len(previews[0]) == 3


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_a_samplers_bits_do_not_depend_on_how_its_steps_are_divided(loaded, around, sampler):
    model, params = loaded
    options = requests.sample_request(around, **SAMPLE | {"sampler": sampler}).options
    run = sampling.compile_sampler(model, sharding.create_mesh(), 8, options)
    labels, key = np.arange(8) % 4, jax.random.key(3)
    whole = run(params, labels, key)
    for sizes in ([1], [5, 2], [12]):
        pace = itertools.cycle(sizes).__next__
        done, x = list(run.states(params, labels, key, pace=pace))[-1]
        assert done == 8
        np.testing.assert_array_equal(np.asarray(x), whole)


def test_whoever_asks_for_no_more_states_stops_the_devices(loaded, around, monkeypatch):
    model, params = loaded
    options = requests.sample_request(around, **SAMPLE).options
    run = sampling.compile_sampler(model, sharding.create_mesh(), 8, options)
    taken, own = [], run._run
    monkeypatch.setattr(run, "_run", lambda *args: taken.append(int(args[-1])) or own(*args))
    states = run.states(params, np.arange(8) % 4, jax.random.key(0), pace=lambda: 2)
    next(states)
    states.close()
    assert taken == [2]


def test_a_painting_has_the_bits_of_inpaint_and_the_known_pixels_of_the_picture(
    loaded, engine, around, picture
):
    asked = PAINT | {"picture": data_url(picture)}
    *_, last = engine.updates(requests.paint_request(around, **asked))
    levels, mask = np.asarray(picture)[..., None], np.tile([False, True], (8, 4))
    expected = inpainting.inpaint(
        *loaded, inpainting.to_unit_range(levels), mask, labels=[1], num_samples=2, key=5,
        resamples=2, masked_share=0.5, sampler="ddim", steps=4, cfg_scale=2.0,
    )  # fmt: skip
    made = np.stack([picture.pixels for picture in last.result])
    np.testing.assert_array_equal(made, images.to_uint8(expected))
    np.testing.assert_array_equal(made[0][~mask], levels[~mask])
    assert (made[0] != made[1]).any()


def test_hidden_tokens_are_grey_where_they_are_and_predicted(engine, around, picture):
    *_, last = engine.updates(requests.hidden_request(around, **HIDDEN | {"of_the_data": 0}))
    given, seen, masked, full = (one.pixels for one in last.result)
    np.testing.assert_array_equal(given[..., 0], np.asarray(picture))
    tokens = seen[..., 0].reshape(4, 2, 4, 2).swapaxes(1, 2).reshape(16, -1)
    assert (tokens == 127).all(axis=1).sum() == 8
    assert (masked != full).any()
    assert "8 of 16 tokens hidden" in last.result[1].caption


def test_every_picture_that_is_made_says_that_it_is_synthetic_and_what_made_it(drawn, tmp_path):
    file = tmp_path / drawn[-1].result[1].name
    file.write_bytes(drawn[-1].result[1].png)
    said = images.read_metadata(file)
    assert said["Content"].startswith("synthetic")
    wanted = {"model": "MDTv2", "step": "7", "seed": "5", "labels": "2", "index": "1",
              "steps": "8", "cfg_scale": "2.0", "num_samples": "3"}  # fmt: skip
    assert wanted.items() <= said.items()


def test_the_requests_of_the_controls_as_they_stand_are_ready_after_warming_up(engine, around):
    first = first_requests(around)
    assert [type(request).__name__ for request in first] == (
        ["SampleRequest"] * 3 + ["PaintRequest"] * 2 + ["HiddenRequest"] * 3
    )
    asked = [first[0]]
    engine.warm_up(asked)
    for request in asked:
        notes = [update.note for update in itertools.islice(engine.updates(request), 2)]
        assert "compiling for these settings" not in notes
    assert default_steps(around, "heun") == 10 and default_steps(around, "ddpm") == 20


def test_a_chunk_is_short_and_a_request_has_several():
    pace = Pace(100, tick=0.3)
    assert pace() == 1
    pace.end()
    assert 1 <= pace() <= 10
    slow = Pace(100, tick=0.01)
    for _ in range(2):
        assert slow() == 1
        time.sleep(0.05)
        slow.end()


def test_a_model_of_latents_makes_the_commands_pictures(latent_model, tmp_path):  # noqa: F811
    source = f"--checkpoint={latent_model / 'model.safetensors'}"
    vae = f"--vae={latent_model / 'vae'}"
    with pytest.raises(ValueError, match="--vae"):
        command.load_engine(parsed(source), sharding.create_mesh())
    engine = command.load_engine(parsed(source, vae), sharding.create_mesh())
    around, own = engine.around, {"steps": 2, "scale": 3.8, "power": 4, "count": 2, "label": 1}
    *_, last = engine.updates(requests.sample_request(around, **SAMPLE | own))
    written = sample(source, vae, "--labels=1,1", "--steps=2", "--seed=5", f"--output={tmp_path}/o")
    expected = np.load(written[0])["arr_0"]
    np.testing.assert_array_equal(np.stack([p.pixels for p in last.result]), expected)
    assert last.result[0].pixels.shape == (32, 32, 3)

    photo = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    mask = np.tile(np.arange(32) >= 16, (32, 1))
    sent = {"picture": data_url(Image.fromarray(photo)), "steps": 2, "masked_share": 0, "count": 1}
    sent["mask"] = "".join("01"[int(one)] for one in mask.ravel())
    *_, last = engine.updates(requests.paint_request(around, **PAINT | sent))
    np.testing.assert_array_equal(last.result[0].pixels[~mask], photo[~mask])
    *_, last = engine.updates(
        requests.hidden_request(around, **HIDDEN | {"picture": sent["picture"]})
    )
    assert [p.pixels.shape for p in last.result] == [(32, 32, 3)] * 4


# What anyone may send.

NOT_NUMBERS = [None, "", "seven", float("nan"), float("inf"), 2.5, True, [1], {"a": 1}, -2, 10**9,
               10**30, -1e308]  # fmt: skip


@pytest.mark.parametrize("name", ["label", "count", "steps", "seed"])
@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_a_wrong_whole_number_is_refused_in_a_line(around, name, value):
    if name == "seed" and value == 10**9:
        return
    with pytest.raises(ValueError) as refused:
        requests.sample_request(around, **SAMPLE | {name: value})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@pytest.mark.parametrize("name", ["scale", "power", "low", "high"])
@pytest.mark.parametrize("value", [None, "a", float("nan"), float("inf"), [], -1e9, 1e9], ids=repr)
def test_a_wrong_number_is_refused_in_a_line(around, name, value):
    with pytest.raises(ValueError) as refused:
        requests.sample_request(around, **SAMPLE | {name: value})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"label": 10**9}, "class 1000000000"),
        ({"count": 17}, "number of pictures 17"),
        ({"steps": 251}, "steps 251"),
        ({"scale": float("nan")}, "guidance scale nan"),
        ({"sampler": "euler"}, "known: ddpm"),
        ({"sampler": ["ddpm"] * 10**5}, "sampler"),
        ({"low": 0.7, "high": 0.2}, "0.7 to 0.2"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_a_refusal_names_the_value(around, changed, said):
    with pytest.raises(ValueError, match=said) as refused:
        requests.sample_request(around, **SAMPLE | changed)
    assert len(str(refused.value)) < 200


def test_numbers_may_come_as_json_has_them(around):
    same = SAMPLE | {"count": 3.0, "seed": "5", "label": 2.0}
    assert requests.sample_request(around, **same).options.steps == 8
    guided = requests.sample_request(around, **SAMPLE | {"low": 0.1, "high": 0.7, "power": 4})
    assert guided.options.cfg_interval == (0.1, 0.7) and guided.options.cfg_power == 4
    plain = requests.sample_request(around, **SAMPLE | {"label": ALL_CLASSES})
    assert plain.labels.tolist() == [0, 1, 2] and plain.options.cfg_interval is None


def bomb(width, height):
    """A PNG of a few bytes that claims a size."""

    def chunk(kind, data):
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\0" * 10**6)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def in_base64(contents, kind="image/png"):
    return f"data:{kind};base64,{base64.b64encode(contents).decode()}"


PNG = io.BytesIO()
Image.new("L", (64, 64)).save(PNG, "PNG")
BAD_PICTURES = {
    "none": (None, "choose one first"),
    "a number": (7, "choose one first"),
    "a path": ("/etc/passwd", "no data URL"),
    "an address": ("http://127.0.0.1:1/a.png", "no data URL"),
    "no base 64": ("data:image/png;base64,a*b", "cannot be read"),
    "a text": (in_base64(b"hello"), "no picture of a known kind"),
    "a script": (in_base64(b"<svg onload='alert(1)'/>", "image/svg+xml"), "no picture of a known"),
    "PostScript": (in_base64(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "no picture"),
    "cut off": (in_base64(PNG.getvalue()[:-30]), "cannot be decoded"),
    "50 megapixels": (in_base64(bomb(10_000, 5_000)), "10000 × 5000"),
    "a bomb": (in_base64(bomb(100_000, 100_000)), "more than 20 million pixels"),
    "too many bytes": ("data:image/png;base64," + "A" * 14 * 2**20, "larger than 10 MiB"),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_what_is_no_picture_is_refused_in_a_line(around, kind):
    value, said = BAD_PICTURES[kind]
    with pytest.raises(ValueError, match=said) as refused:
        requests.paint_request(around, **PAINT | {"picture": value})
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_a_picture_of_any_size_is_cropped_to_its_middle_and_scaled(around):
    photo = Image.new("RGB", (300, 200), "white")
    read = limits.picture(data_url(photo, "JPEG"), around.limits, 8, 1)
    assert read.shape == (8, 8, 1) and (read >= 254).all()


BAD_MASKS = [None, 5, "", "0" * 64, "1" * 63, "x" * 64, "1" * 10**6, "１" * 64]


@pytest.mark.parametrize("mask", BAD_MASKS, ids=range(len(BAD_MASKS)))
def test_a_mask_of_another_form_is_refused(around, picture, mask):
    with pytest.raises(ValueError, match="mask|nothing is marked"):
        requests.paint_request(around, **PAINT | {"picture": data_url(picture), "mask": mask})


@pytest.mark.parametrize(
    "changed",
    [{"of_the_data": 1}, {"of_the_data": None}, {"share": 0}, {"share": float("nan")}, {"time": 1}],
)
def test_a_wrong_choice_of_hidden_tokens_is_refused(around, picture, changed):
    with pytest.raises(ValueError):
        requests.hidden_request(around, **HIDDEN | {"picture": data_url(picture)} | changed)


def test_names_of_classes_and_errors_are_text_in_the_page():
    said = markup.error("<script>${x}{{y}}</script>")
    assert "<script" not in said and "${" not in said and "{{" not in said


def test_a_model_without_masked_passes_hides_nothing(around, loaded):
    config = config_lib.default_config()
    config.model.update(name="DiT", input_size=8, in_channels=1, num_classes=0, patch_size=4)
    config.model.update(hidden_size=8, depth=1, num_heads=2)
    config.sample.guided_channels = None
    other = dataclasses.replace(around, model=sampling.DiffusionModel.from_config(config))
    with pytest.raises(ValueError, match="no masked pass"):
        requests.hidden_request(other, **HIDDEN)
    assert requests.sample_request(other, **SAMPLE).options.cfg_scale == 1
    assert [type(one).__name__ for one in first_requests(other)].count("HiddenRequest") == 0


# The line.


class Work:
    """Work that yields numbers, each when it is let."""

    def __init__(self, steps=3, failure=None):
        self.steps, self.failure = steps, failure
        self.let, self.begun, self.closed = threading.Semaphore(0), threading.Event(), False

    def __call__(self):
        self.begun.set()
        try:
            for step in range(self.steps):
                self.let.acquire(timeout=30)
                yield f"step {step}"
            if self.failure:
                raise self.failure
        finally:
            self.closed = True

    def go(self):
        self.let.release(100)
        return self


@pytest.fixture
def line():
    line = Line(most_waiting=2)
    yield line
    assert line.close("the test is over", 10)


def test_jobs_are_done_in_their_order_and_those_that_wait_are_told_their_place(line):
    first, second = Work(), Work().go()
    jobs = [line.submit(work, "a") for work in (first, second)]
    assert first.begun.wait(10) and not second.begun.is_set()
    updates = jobs[1].updates()
    assert next(updates) == 1
    first.go()
    assert [u for u in jobs[0].updates()][-1] == "step 2"
    assert list(updates)[-1] == "step 2"


def test_beyond_those_that_may_wait_the_line_is_busy(line):
    works = [Work() for _ in range(3)]
    jobs = [line.submit(works[0], "a")]
    assert works[0].begun.wait(10)
    jobs += [line.submit(work, "a") for work in works[1:]]
    with pytest.raises(Busy, match="busy: 2 requests"):
        line.submit(Work(), "b")
    for work in works:
        work.go()
    assert [list(job.updates())[-1] for job in jobs] == ["step 2"] * 3
    assert list(line.submit(Work().go(), "b").updates())[-1] == "step 2"


def test_a_cancelled_job_stops_after_its_step_and_the_next_one_begins(line):
    running, waiting, last = Work(steps=100), Work(), Work().go()
    jobs = [line.submit(running, "a"), line.submit(waiting, "a"), line.submit(last, "b")]
    assert running.begun.wait(10)
    running.let.release(2)
    assert line.cancel("a") and not line.cancel("nobody")
    running.let.release(1)
    for job in jobs[:2]:
        with pytest.raises(Stopped, match="cancelled"):
            list(job.updates())
    assert list(jobs[2].updates())[-1] == "step 2"
    assert running.closed and not waiting.begun.is_set()


def test_a_reader_that_goes_away_cancels_its_job(line):
    work = Work(steps=100)
    updates = line.submit(work, "a").updates()
    work.let.release(1)
    assert next(updates) == "step 0"
    updates.close()
    work.let.release(1)
    assert list(line.submit(Work().go(), "b").updates())[-1] == "step 2"
    assert work.closed and work.let.acquire(timeout=0.1) is False


def test_a_job_that_nobody_asks_for_is_left(line, monkeypatch):
    monkeypatch.setattr("mdt_jax.demo.line.GONE_AFTER", 1.0)
    work = Work(steps=10**6)
    job = line.submit(work, "a")
    work.let.release(10**6)
    assert work.begun.wait(30)
    deadline = time.monotonic() + 60
    while not work.closed and time.monotonic() < deadline:
        time.sleep(0.02)
    assert work.closed
    with pytest.raises(Stopped, match="nobody waits"):
        list(job.updates())


def test_an_error_reaches_whoever_asked_and_the_line_goes_on(line):
    for failure in (ValueError("not finite"), RuntimeError("out of memory")):
        job = line.submit(Work(failure=failure).go(), "a")
        with pytest.raises(type(failure), match=str(failure)):
            list(job.updates())
    assert list(line.submit(Work().go(), "a").updates())[-1] == "step 2"


def test_closing_tells_everyone_why():
    line, works = Line(most_waiting=4), [Work(steps=100), Work()]
    jobs = [line.submit(work, "a") for work in works]
    assert works[0].begun.wait(10)
    works[0].let.release(2)
    threading.Timer(0.1, works[0].let.release).start()
    assert line.close("the server is stopping", 10)
    for job in jobs:
        with pytest.raises(Stopped, match="the server is stopping"):
            list(job.updates())
    with pytest.raises(Stopped, match="the server is stopping"):
        line.submit(Work(), "a")


# The command.


def parsed(*arguments):
    values = flags.FlagValues()
    define_flags(values)
    values(["demo", *arguments])
    return values


def test_without_gradio_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*\[demo\]"):
        command.serve(parsed("--workdir=w"))


def test_this_machine_alone_is_served_unless_another_host_is_given():
    assert parsed().host == "127.0.0.1" and "no password" in parsed()["host"].help
    assert "share" not in parsed()


def test_a_port_that_is_taken_is_refused_in_a_line():
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        with pytest.raises(OSError, match="cannot be served .*--port 0"):
            command.free_port("127.0.0.1", held.getsockname()[1])
    assert command.free_port("127.0.0.1", 0) > 0
    with pytest.raises(OSError, match="--host nowhere.invalid"):
        command.free_port("nowhere.invalid", 0)


def test_help_ends_with_0():
    done = subprocess.run(
        [sys.executable, "-m", "mdt_jax.demo", "--help"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "--most_waiting" in done.stdout and "--[no]share" not in done.stdout
