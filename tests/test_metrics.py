"""A run's metrics: one line per step over kills, exact means, and known peaks."""

import json
import math
import resource
import struct
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import logging
from tensorboardX.proto import event_pb2

from mdt_jax.parallel.devices import mfu, peak_flops
from mdt_jax.training.clock import RunProgress, Stopwatch
from mdt_jax.training.metrics import MetricsWriter, Window, steps_with


def run(workdir, steps, resume_step=0):
    """Logs the loss 1 / step at `steps`, then stops as a killed run would: without close()."""
    writer = MetricsWriter(workdir, total_steps=100, resume_step=resume_step)
    for step in steps:
        writer.write(step, {"loss": 1 / step})
    lines = (Path(workdir) / "metrics.jsonl").read_text()
    writer.close()
    return lines


def steps_in(text):
    return [json.loads(line)["step"] for line in text.splitlines()]


def events_in(workdir):
    """The TensorBoard events of every run in `workdir`, oldest first (TFRecord framing)."""
    events = []
    for path in sorted((Path(workdir) / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return events


def test_a_line_is_the_step_then_the_metrics_in_order_and_is_there_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, total_steps=10)
    writer.write(1, {"loss": 0.5, "images_per_second": 3, "a": np.float32(2)})
    text = (tmp_path / "metrics.jsonl").read_text()
    writer.close()
    assert text == '{"step": 1, "loss": 0.5, "images_per_second": 3.0, "a": 2.0}\n'


def test_floats_round_trip_to_the_same_bits(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, float(np.float32(0.1))]
    writer = MetricsWriter(tmp_path, total_steps=10)
    writer.write(1, {str(index): value for index, value in enumerate(values)})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    read = [line[str(index)] for index in range(len(values))]
    assert [value.hex() for value in read] == [value.hex() for value in values]


def test_values_that_are_not_finite_are_strings_in_valid_json(tmp_path):
    writer = MetricsWriter(tmp_path, total_steps=10)
    writer.write(1, {"a": math.nan, "b": math.inf, "c": jax.numpy.float32(-math.inf)})
    writer.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}


def test_a_resumed_run_has_one_line_per_logged_step(tmp_path):
    whole = run(tmp_path / "whole", range(10, 101, 10))
    run(tmp_path / "killed", range(10, 71, 10))
    resumed = run(tmp_path / "killed", range(50, 101, 10), resume_step=40)
    assert resumed == whole


def test_a_run_without_a_checkpoint_starts_its_file_again(tmp_path):
    run(tmp_path, [10, 20])
    assert steps_in(run(tmp_path, [10])) == [10]


def test_a_resume_between_log_lines_keeps_the_earlier_ones(tmp_path):
    run(tmp_path, [10, 20])
    assert steps_in(run(tmp_path, [20], resume_step=15)) == [10, 20]


@pytest.mark.parametrize("length", range(1, len('{"step": 20, "loss": 0.05}')))
def test_a_torn_last_line_is_removed(tmp_path, length):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 0.1}\n' + '{"step": 20, "loss": 0.05}'[:length])
    assert steps_in(run(tmp_path, [30], resume_step=20)) == [10, 30]


def test_a_last_line_that_lacks_only_its_newline_is_whole(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 0.1}\n{"step": 20, "loss": 0.05}')
    assert steps_in(run(tmp_path, [30], resume_step=20)) == [10, 20, 30]


def test_a_damaged_line_in_the_middle_is_removed_with_a_warning(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 10}\n\0\0\xff\n3\n{"step": 20}\n')
    with caplog.at_level("WARNING", logger="absl"):
        assert steps_in(run(tmp_path, [], resume_step=20)) == [10, 20]
    assert [f"{path}:{n} " in caplog.text for n in (1, 2, 3, 4)] == [False, True, True, False]


def test_being_killed_while_lines_are_removed_loses_none(tmp_path, monkeypatch):
    before = run(tmp_path, [10, 20, 30])

    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        MetricsWriter(tmp_path, total_steps=100, resume_step=10)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_tensorboard_gets_the_scalars_and_hides_those_of_steps_done_again(tmp_path):
    run(tmp_path, [10, 20, 30])
    run(tmp_path, [30], resume_step=20)
    shown = []
    for event in events_in(tmp_path):
        if event.HasField("session_log"):  # TensorBoard drops these at a session's start
            shown = [scalar for scalar in shown if scalar[0] < event.step]
        shown += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    assert shown == [(step, "loss", np.float32(1 / step)) for step in (10, 20, 30)]


@pytest.mark.parametrize("channels", [1, 3])
def test_tensorboard_gets_images(tmp_path, channels):
    writer = MetricsWriter(tmp_path, total_steps=100)
    writer.image(7, "samples", np.zeros((4, 6, channels), np.uint8))
    writer.close()
    images = [(e.step, v.tag, v.image) for e in events_in(tmp_path) for v in e.summary.value]
    assert [(step, tag, i.height, i.width) for step, tag, i in images] == [(7, "samples", 4, 6)]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = MetricsWriter(tmp_path / "run", total_steps=10)
    writer.write(1, {"loss": 1.0})
    writer.image(1, "samples", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"resume_step 11 .*total_steps \(10\)"):
        MetricsWriter(tmp_path, total_steps=10, resume_step=11)


def test_a_url_is_refused_and_not_taken_for_a_directory():
    with pytest.raises(
        ValueError, match="^workdir gs://bucket/run is a URL: mount the .* .gcsfuse"
    ):
        MetricsWriter("gs://bucket/run", total_steps=10)


def test_a_metric_cannot_take_the_place_of_the_step(tmp_path):
    writer = MetricsWriter(tmp_path, total_steps=10)
    with pytest.raises(ValueError, match='"step"'):
        writer.write(1, {"step": 2.0})
    writer.close()


def test_window_means_are_over_the_steps_that_had_a_value():
    window = Window()
    window.add({"loss": 1.0, "quartile": math.nan, "never": math.nan})
    window.add({"loss": np.float32(2.0), "quartile": 5.0, "never": math.nan})
    means = window.means()
    assert list(means) == ["loss", "quartile", "never"]
    assert (means["loss"], means["quartile"]) == (1.5, 5.0) and math.isnan(means["never"])
    window.reset()
    assert window.means() == {}


def test_a_window_saved_in_the_middle_ends_with_the_same_bits():
    values = np.random.default_rng(0).normal(size=(100, 2)) * [1, 1e-9]
    values[::7, 1] = math.nan
    steps = [dict(zip(("z", "a"), row, strict=True)) for row in values.tolist()]
    whole, interrupted = Window(), Window()
    for index, step in enumerate(steps):
        whole.add(step)
        interrupted.add(step)
        if index % 10 == 5:
            state = json.loads(json.dumps(interrupted.state(), sort_keys=True))
            interrupted = Window.from_state(state)
    assert list(interrupted.means().items()) == list(whole.means().items())


def test_a_window_with_an_infinite_sum_is_saved_as_valid_json():
    window = Window()
    window.add({"loss": math.inf})
    state = json.loads(json.dumps(window.state(), allow_nan=False))
    assert Window.from_state(state).means() == {"loss": math.inf}


def test_progress_off_a_terminal_is_one_line_per_log_step(caplog, capsys):
    with caplog.at_level("INFO", logger=logging.get_absl_logger().name):
        progress = RunProgress(200, first_step=100)
        for step in range(101, 151):
            progress.advance(step)
        progress.log(150, loss=0.12345, images_per_second=1234.56)
        progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "step 150/200 (75%), loss 0.1235, 1,234.6 images/s, 00:00 left"
    ]
    assert "it/s" not in capsys.readouterr().err


def test_progress_on_a_terminal_is_a_bar(monkeypatch, capsys, caplog):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    progress = RunProgress(200, first_step=100)
    progress.advance(150)
    progress.log(150, loss=0.12345, images_per_second=1234.56)
    progress.close()
    shown = capsys.readouterr().err.split("\r")[-1]
    assert "150/200" in shown and "loss 0.1235, 1,234.6 images/s" in shown
    assert not caplog.records


def test_progress_of_other_processes_shows_nothing(monkeypatch, capsys, caplog):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    progress = RunProgress(200)
    progress.advance(50)
    progress.log(50, loss=1.0, images_per_second=1.0)
    progress.close()
    assert not caplog.records and not capsys.readouterr().err


@pytest.mark.parametrize(
    ("device_kind", "bfloat16", "float32"),
    [
        ("TPU v4", 275e12, None),
        ("TPU v5 lite", 197e12, None),
        ("TPU v5", 459e12, None),
        ("TPU v6 lite", 918e12, None),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA H200", 989e12, 67e12),
        ("NVIDIA H200 MIG 1g.18gb", None, None),
        ("cpu", None, None),
    ],
)
def test_peak_flops_of_known_devices(device_kind, bfloat16, float32):
    assert peak_flops(device_kind, "bfloat16") == bfloat16
    assert peak_flops(device_kind, "float32") == float32


def test_peak_flops_of_an_unknown_dtype_is_an_error():
    with pytest.raises(ValueError, match="'bf16'.*bfloat16"):
        peak_flops("TPU v4", "bf16")


def test_mfu_is_the_share_of_all_devices_peak():
    assert mfu(275e12, 0.5, 8, "TPU v4", "bfloat16") == pytest.approx(0.25)
    assert mfu(1, 1.0, 1, "cpu", "bfloat16") is None


def test_texts_stand_last_in_a_line_and_not_in_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, total_steps=10)
    writer.write(5, {"loss": 0.5})
    writer.write(5, {"eval_fid": 2.0}, {"evaluator": "classifier 1a"})
    with pytest.raises(ValueError, match='"step"'):
        writer.write(5, {}, {"step": "six"})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text.splitlines()[1] == '{"step": 5, "eval_fid": 2.0, "evaluator": "classifier 1a"}'
    assert steps_with(tmp_path / "metrics.jsonl", "eval_fid") == {5}
    assert "evaluator" not in str(events_in(tmp_path))


def test_a_stopwatch_goes_on_from_what_is_on_it_and_stands_still_in_a_pause(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = Stopwatch(7.0)
    now[0] += 2
    with watch.paused():
        now[0] += 50
        assert watch.seconds == 9
    now[0] += 1
    assert watch.seconds == 10


@pytest.mark.parametrize("replaced", [False, True])
def test_a_metrics_file_that_goes_away_is_told_and_begun_anew(replaced, tmp_path, caplog):
    writer = MetricsWriter(tmp_path, total_steps=10)
    writer.write(1, {"loss": 1.0})
    content = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").unlink()
    if replaced:  # as an editor does
        (tmp_path / "metrics.jsonl").write_text(content)
    for step in (2, 3):
        writer.write(step, {"loss": 1.0})
    writer.close()
    assert steps_in((tmp_path / "metrics.jsonl").read_text()) == ([1, 2, 3] if replaced else [2, 3])
    assert caplog.text.count("metrics.jsonl was removed or replaced while this run writes") == 1


@pytest.fixture
def file_size_limit():
    """Sets the size beyond which no file can be written, as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=soft: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_lines_wait_whole_and_tensorboard_holds_nothing_up(
    tmp_path, caplog, file_size_limit
):
    writer = MetricsWriter(tmp_path, total_steps=100)
    for step in range(1, 4):
        writer.write(step, {"loss": 1.0})
    time.sleep(0.1)  # TensorBoard's thread
    file_size_limit((tmp_path / "metrics.jsonl").stat().st_size + 5)
    for step in range(4, 40):
        writer.write(step, {"loss": 1.0, "rate": 2.0})
    assert steps_in((tmp_path / "metrics.jsonl").read_text()) == [1, 2, 3]
    assert "metrics.jsonl: File too large; 36 line(s) are kept" in caplog.text
    file_size_limit()
    writer.write(40, {"loss": 1.0})
    writer.close()
    assert steps_in((tmp_path / "metrics.jsonl").read_text()) == [*range(1, 41)]


def test_lines_that_waited_are_written_at_the_end(tmp_path, file_size_limit):
    writer = MetricsWriter(tmp_path, total_steps=100)
    file_size_limit(5)
    writer.write(1, {"loss": 1.0})
    file_size_limit()
    writer.close()
    assert steps_in((tmp_path / "metrics.jsonl").read_text()) == [1]
