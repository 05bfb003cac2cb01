"""The pipeline's blocks: how records are read, what bad images do, and that crops and processes
change nothing else."""

from __future__ import annotations

import itertools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mdt_jax import data
from mdt_jax.models.latent_space import STABLE_DIFFUSION_SCALE
from mdt_jax.training.step import model_inputs


class Numbered:
    """Records whose image is their number, of sides that vary; some cannot be used.

    Attributes:
      blocks: the sequences of indices that were asked for at once.
    """

    def __init__(self, count: int, bad: tuple[int, ...] = (), by_block: bool = True):
        self.count, self.bad, self.blocks = count, bad, []
        if by_block:
            self.__getitems__ = self.read_block

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        if index in self.bad:
            raise data.BadImage(f"{index}.jpg: cannot be decoded")
        rng = np.random.default_rng(index)
        image = rng.integers(0, 256, (9 + index % 4, 12, 3), np.uint8)
        return image, index

    def read_block(self, indices) -> list[tuple[np.ndarray, int]]:
        self.blocks.append(list(indices))
        return [self[index] for index in indices]


def numbered(count: int, **settings) -> data.Source:
    names = tuple(str(i) for i in range(count))
    return data.Source("numbered", Numbered(count, **settings), (None, None, 3), names)


def open_batches(source, batch_size=6, **changes) -> data.BatchIterator:
    settings = {"seed": 0, "process_index": 0, "process_count": 1, "flip": True, "image_size": 8}
    return data.create_batches(source, global_batch_size=batch_size, **(settings | changes))


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    with batches:
        return list(itertools.islice(batches, count))


def joined(batches: list) -> dict[str, np.ndarray]:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def assert_equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


# Blocks


def test_a_batchs_rows_are_read_at_once():
    source = numbered(25)
    batches = take(open_batches(source, process_index=1, process_count=2, read_ahead=1), 3)
    assert [batch["label"].tolist() for batch in batches] == source.records.blocks[:3]


@pytest.mark.parametrize("crop", ["center", "random"])
def test_blocks_are_the_examples_one_by_one(crop):
    source = numbered(10)
    stream = data.ExampleStream(source, seed=3, image_size=8, flip=True, crop=crop)
    one_by_one = [stream[i] for i in range(5, 35)]  # over the ends of epochs
    expected = {name: np.stack([e[name] for e in one_by_one]) for name in ("image", "label")}
    assert_equal(joined(take(open_batches(source, seed=3, position=5, crop=crop), 5)), expected)
    plain = numbered(10, by_block=False)
    assert_equal(joined(take(open_batches(plain, 15, seed=3, position=5, crop=crop), 2)), expected)


@pytest.mark.parametrize("changes", [{"crop": "random"}, {}], ids=["random crops", "centre crops"])
def test_any_number_of_processes_and_a_restart_give_the_same_examples(changes):
    source = numbered(31)
    whole = joined(take(open_batches(source, 12, **changes), 10))
    for before, after in ((1, 2), (2, 3), (3, 4), (4, 1)):
        parts = []
        for process_count, position, count in ((before, 0, 4), (after, 48, 6)):
            rows = [
                take(
                    open_batches(
                        source,
                        12,
                        process_index=p,
                        process_count=process_count,
                        position=position,
                        **changes,
                    ),
                    count,
                )
                for p in range(process_count)
            ]
            parts += [rows[p][k] for k in range(count) for p in range(process_count)]
        assert_equal(joined(parts), whole)


def test_four_processes_lose_and_double_nothing_over_two_epochs():
    rows = [
        take(open_batches(numbered(30), 12, process_index=p, process_count=4), 5) for p in range(4)
    ]
    labels = [label for k in range(5) for p in range(4) for label in rows[p][k]["label"].tolist()]
    assert sorted(labels[:30]) == sorted(labels[30:]) == list(range(30))


def test_a_crop_changes_nothing_but_the_crop():
    source = numbered(10)
    center, random = (joined(take(open_batches(source, crop=c), 4)) for c in ("center", "random"))
    assert center["label"].tolist() == random["label"].tolist()
    assert not np.array_equal(center["image"], random["image"])
    other = joined(take(open_batches(source, crop="random", flip=False), 4))["image"]
    mirrored = [np.array_equal(a, b[:, ::-1]) for a, b in zip(random["image"], other, strict=True)]
    same = [np.array_equal(a, b) for a, b in zip(random["image"], other, strict=True)]
    assert all(np.logical_xor(mirrored, same)) and any(mirrored) and any(same)


@pytest.mark.parametrize("image_size", [8, None])
def test_the_spec_is_that_of_a_batchs_examples(image_size):
    source = data.digits() if image_size is None else numbered(10)
    (batch,) = take(open_batches(source, image_size=image_size), 1)
    for name, spec in data.example_spec(source, image_size).items():
        assert (spec.shape, spec.dtype) == (batch[name].shape[1:], batch[name].dtype)


def test_the_step_scales_pixels_draws_latents_and_takes_inputs_as_they_are():
    step, pixels = jnp.int32(0), np.arange(8 * 4 * 4 * 2).reshape(8, 4, 4, 2).astype(np.uint8)
    inputs = data.to_unit_range(pixels)
    kinds = data.ExampleKind
    for kind, images in ((kinds.PIXELS, pixels), (kinds.INPUTS, inputs)):
        made = model_inputs(kind, 0, step, jnp.asarray(images))
        np.testing.assert_array_equal(made, inputs)
    certain = np.concatenate([inputs, np.zeros_like(inputs)], -1).astype(np.float16)
    latents = model_inputs(kinds.POSTERIORS, 0, step, jnp.asarray(certain))
    scaled = certain[..., :2].astype(np.float32) * np.float32(STABLE_DIFFUSION_SCALE)
    np.testing.assert_array_equal(latents, scaled)


def test_posteriors_are_told_from_inputs_by_their_kind_not_by_their_shape():
    images = jnp.ones((2, 4, 4, 8))
    inputs = model_inputs(data.ExampleKind.INPUTS, 0, jnp.int32(0), images)
    np.testing.assert_array_equal(inputs, images)
    latents = model_inputs(data.ExampleKind.POSTERIORS, 0, jnp.int32(0), images)
    assert latents.shape == (2, 4, 4, 4)


def test_images_of_another_kind_than_the_steps_are_refused():
    pixels = jnp.zeros((2, 4, 4, 3), jnp.uint8)
    for kind in (data.ExampleKind.INPUTS, data.ExampleKind.POSTERIORS):
        with pytest.raises(ValueError, match=f"takes {kind.value}, the batch holds uint8 images"):
            model_inputs(kind, 0, jnp.int32(0), pixels)
    with pytest.raises(ValueError, match="takes pixels, the batch holds float32 images"):
        model_inputs(data.ExampleKind.PIXELS, 0, jnp.int32(0), pixels.astype(jnp.float32))


def test_an_image_is_cropped_anew_each_epoch():
    source = numbered(1)
    images = joined(take(open_batches(source, crop="random", flip=False), 2))["image"]
    assert len(np.unique(images.reshape(12, -1), axis=0)) > 6


# Bad images


@pytest.mark.parametrize(
    ("by_block", "place"),
    [(True, "numbered, example 0 ... 9"), (False, "record 4 of numbered, example 6")],
)
def test_a_bad_image_ends_the_run_naming_it_and_the_example_in_its_message(by_block, place):
    source = numbered(10, bad=(4,), by_block=by_block)
    with pytest.raises(data.BadImage) as error:
        take(open_batches(source, 10), 1)
    assert str(error.value) == f"4.jpg: cannot be decoded (in {place} of the run)"


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (OSError(5, "Input/output error", "a.png"), "[Errno 5] Input/output error ({}): 'a.png'"),
        (ValueError("torn"), "torn ({})"),
    ],
)
def test_where_a_record_could_not_be_read_is_in_the_message_from_a_worker_too(raised, message):
    class Torn(Numbered):
        def __getitem__(self, index):
            raise raised

    source = data.Source("torn", Torn(1, by_block=False), (4, 4, 3), ("a",))
    with pytest.raises(type(raised)) as error:
        data.ExampleStream(source, seed=0)[5]
    # Pickled, as it travels from a worker.
    told = str(pickle.loads(pickle.dumps(error.value)))
    assert told == message.format("in record 0 of torn, example 5 of the run")


SKIP = {"on_bad_image": "skip", "max_bad_fraction": 0.3}


@pytest.mark.parametrize("by_block", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_skipping_puts_the_next_good_image_in_a_bad_ones_place(by_block, num_workers):
    good, bad = numbered(10), numbered(10, bad=(4, 5, 9), by_block=by_block)
    labels = joined(take(open_batches(good), 10))["label"]
    batches = open_batches(bad, num_workers=num_workers, **SKIP)
    with batches:
        got = np.concatenate([next(batches)["label"] for _ in range(10)])
        expected = np.select([np.isin(labels, (4, 5)), labels == 9], [6, 0], labels)
        assert got.tolist() == expected.tolist()
        # A bad 4 leads to 5, which is bad as well.
        times = [int(np.sum(labels == record)) for record in (4, 5, 9)]
        assert batches.num_skipped == 2 * times[0] + times[1] + times[2]
        assert batches.bad_records == {i: f"{i}.jpg: cannot be decoded" for i in (4, 5, 9)}


def test_a_substitute_is_cropped_and_mirrored_as_its_position_says():
    bad, settings = numbered(10, bad=(4,)), {"seed": 0, "image_size": 8, "flip": True}
    stream = data.ExampleStream(bad, **settings, crop="random", **SKIP)
    again = [
        joined(take(open_batches(bad, size, crop="random", **SKIP), 40 // size)) for size in (4, 10)
    ]
    assert_equal(*again)
    for i in range(40):
        np.testing.assert_array_equal(stream[i]["image"], again[0]["image"][i])


def test_how_many_were_skipped_can_be_read_while_a_thread_takes_the_batches():
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with (
        open_batches(numbered(10, bad=(4,)), 10, **SKIP) as batches,
        data.prefetch_to_device(batches, one_device, depth=1) as on_device,
    ):
        for epochs in range(1, 4):  # the bad image comes once in each
            next(on_device)
            assert epochs <= batches.num_skipped <= epochs + 1


def test_each_bad_image_is_told_once(caplog):
    with caplog.at_level("WARNING", logger="absl"):
        take(open_batches(numbered(10, bad=(4,)), **SKIP), 10)
    told = [record.getMessage() for record in caplog.records if "4.jpg" in record.getMessage()]
    assert told == ["skipping 4.jpg: cannot be decoded (1 bad so far)"]


@pytest.mark.parametrize("bad", [(1, 4, 6, 8), (3, 4, 5, 6), tuple(range(10))])
def test_too_many_bad_images_end_the_run(bad):
    message = r"^numbered: 4 of 10 images cannot be used, more than max_bad_fraction 0.3 allows; th"
    with pytest.raises(data.BadImage, match=message) as error:
        take(open_batches(numbered(10, bad=bad), **SKIP), 5)
    assert "\n" not in str(error.value)


def test_data_without_one_good_image_end_the_run_whatever_is_allowed():
    source = numbered(3, bad=(0, 1, 2))
    with pytest.raises(data.BadImage, match="numbered: 3 of 3 images cannot be used"):
        take(open_batches(source, on_bad_image="skip", max_bad_fraction=1.0), 1)


def test_damage_that_is_no_bad_image_is_not_skipped():
    class Away(Numbered):
        def __getitem__(self, index):
            raise OSError("the disk is away")

    source = data.Source("away", Away(5), (4, 4, 3), tuple("01234"))
    with pytest.raises(OSError, match="the disk is away"):
        take(open_batches(source, **SKIP), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "middle"}, "crop is 'middle'; known are 'center', 'random'"),
        ({"on_bad_image": "ignore"}, "on_bad_image is 'ignore'; known are 'error', 'skip'"),
        ({"max_bad_fraction": 1.5}, r"max_bad_fraction is 1.5; it must be in 0 \.\.\. 1"),
    ],
)
def test_unknown_words_and_fractions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        open_batches(numbered(5), **changes)
