"""Inpainting: known pixels are kept, unknown ones are predicted from them, and what is refused.

The model is a small MDTv2 of the digits, trained once (18 minutes of CPU time) by

    python -m mdt_jax.train --config configs/digits_inpainting.py --workdir runs/inpainting

whose average of the weights, as float16 under the authors' names, is
tests/data/inpainting_digits.safetensors. From the clone's root,
`PYTHONPATH=. python tests/test_inpainting.py docs/inpainting.png` draws held-out scans, their holes
and what it paints.

How good a painting is: its RMSE at the unknown pixels of held-out scans, over the RMSE of the mean
of the class's training scans there; at most 0.7 is asked. One sample cannot give that. A sample's
expected squared error is twice the conditional variance, and of that the best kernel regression of
the unknown pixels on the known ones and the class, its settings chosen on the held-out scans
themselves, leaves an RMSE ratio of 0.52 for a hole of 2 × 2 pixels, 0.57 for every other token,
0.66 for 4 × 4 pixels and 0.74 for the lower half: times √2, all are above 0.7. So it is the mean of
8 samples that is held to 0.7, at the first two masks; for the lower half even the conditional mean
is out of reach. Measured over 100 scans, 25 steps, 4 times each but the last:

    mask                        one sample   mean of 8
    2 × 2 in the centre               0.74        0.56
    every other token, half           0.77        0.59
    2 × 8, a row of tokens            0.90        0.67
    3 × 3 in the centre               0.96        0.71
    4 × 4 in the centre               1.01        0.76
"""

import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fixtures import reference
from PIL import Image

from configs.digits_inpainting import get_config
from mdt_jax import sampling
from mdt_jax.convert.transformers import from_torch
from mdt_jax.data import digits
from mdt_jax.diffusion import GaussianDiffusion, NoiseSchedule
from mdt_jax.models import MDTv2
from mdt_jax.parallel import sharding
from mdt_jax.sampling import images as images_lib
from mdt_jax.sampling import inpainting
from mdt_jax.weights import files as weight_files

DATA = Path(__file__).parent / "data"
NUM_SCANS, NUM_PAINTINGS = 40, 8


def square(size):
    mask = np.zeros((8, 8), bool)
    start = (8 - size) // 2
    mask[start : start + size, start : start + size] = True
    return mask


# The first touches the four tokens in the centre, the second hides every other token.
MASKS = {
    "centre": square(2),
    "checkerboard": np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((2, 2))).astype(bool),
}


@cache
def digits_model():
    config = get_config()
    model = sampling.DiffusionModel.from_config(config, [str(i) for i in range(10)])
    network = model.network
    weights = weight_files.read_weights(DATA / "inpainting_digits.safetensors")
    tree = from_torch(
        {name: weights[name].astype(np.float32) for name in weights},
        family="MDTv2",
        depth=network.depth,
        num_heads=network.num_heads,
        decoder_depth=network.decoder_depth,
    )
    return model, jax.tree.map(jnp.asarray, tree)


@cache
def scans(split):
    source = digits(split)
    examples = [source[i] for i in range(len(source))]
    pixels = np.stack([example["image"] for example in examples])
    labels = np.array([example["label"] for example in examples])
    return pixels.astype(np.float32) / np.float32(127.5) - 1, labels


def paint(images, mask, labels, num_samples, **settings):
    settings = {"steps": 12, "cfg_scale": 1.0, "batch_size": NUM_SCANS * NUM_PAINTINGS} | settings
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    return inpainting.inpaint(
        *digits_model(), images, mask, labels=labels, num_samples=num_samples, mesh=mesh, **settings
    )


def paint_scans(mask, **settings):
    """(paintings, scans, 8, 8, 1) of the first held-out scans."""
    images, labels = (array[:NUM_SCANS] for array in scans("heldout"))
    hidden = np.where(mask[..., None], np.nan, images)
    painted = paint(hidden, mask, labels, NUM_SCANS * NUM_PAINTINGS, **settings)
    return painted.reshape(NUM_PAINTINGS, *images.shape)


def error_ratio(painted, mask):
    """RMSE at unknown pixels of the mean painting, over that of the class's training mean."""
    images, labels = (array[:NUM_SCANS] for array in scans("heldout"))
    train, train_labels = scans("train")
    class_means = np.stack([train[train_labels == label].mean(axis=0) for label in range(10)])
    rmse = lambda x: np.sqrt(np.mean((x - images)[:, mask] ** 2))  # noqa: E731
    return rmse(painted.mean(axis=0)) / rmse(class_means[labels])


@cache
def painted(name):
    return paint_scans(MASKS[name])


@pytest.mark.parametrize("name", MASKS)
def test_known_pixels_are_kept_bit_for_bit(name):
    known = ~MASKS[name]
    images = scans("heldout")[0][:NUM_SCANS]
    for images_of_one_draw in painted(name):
        np.testing.assert_array_equal(images_of_one_draw[:, known], images[:, known])


@pytest.mark.parametrize("name", MASKS)
def test_unknown_pixels_are_predicted_far_better_than_by_the_class(name):
    assert error_ratio(painted(name), MASKS[name]) <= 0.7


def test_paintings_of_a_hole_vary():
    assert painted("checkerboard")[:, :, MASKS["checkerboard"]].std(axis=0).mean() > 0.05


def test_the_error_tells_when_known_pixels_are_not_shown():
    """The twin with a fault: samples of the class that see no known pixel."""
    blind = paint_scans(np.ones((8, 8), bool))
    for mask in MASKS.values():
        assert error_ratio(blind, mask) > 0.85


def test_the_error_tells_when_the_known_pixels_are_of_other_scans():
    """The twin with a fault: each scan is shown the known pixels of the next one of its class."""
    mask = MASKS["checkerboard"]
    labels = scans("heldout")[1][:NUM_SCANS]
    following = np.arange(NUM_SCANS)
    for label in range(10):
        following[labels == label] = np.roll(following[labels == label], 1)
    assert error_ratio(painted("checkerboard")[:, following], mask) > 0.85


@cache
def tiny_model(name):
    """A fixture's model, process and weights."""
    r = reference(name)
    schedule = NoiseSchedule.create()
    model = sampling.DiffusionModel(
        r.family,
        r.model(),
        GaussianDiffusion(schedule),
        defaults={"steps": 4, "clip": True, "guided_channels": 3},
    )
    return model, r.tree("param/")


@pytest.fixture
def tiny():
    """`tiny_model`, compiled quickly rather than well."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield tiny_model
    jax.config.update("jax_disable_most_optimizations", False)


def tiny_images(count):
    return np.random.default_rng(0).normal(0, 1, (count, 8, 8, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("mdt_v1", {}),
        ("mdt_v1", {"masked_share": 1.0}),
        ("dit", {"cfg_scale": 2.0, "sampler": "ddim", "resamples": 1}),
    ],
)
def test_every_family_paints_and_keeps(tiny, name, settings):
    images, mask = tiny_images(3), square(4)
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    settings = {"labels": [1, 2, 3], "mesh": mesh} | settings
    result = inpainting.inpaint(*tiny(name), images, mask, **settings)
    assert result.shape == images.shape and result.dtype == np.float32
    assert np.isfinite(result).all()
    np.testing.assert_array_equal(result[:, ~mask], images[:, ~mask])
    assert np.abs(result - images)[:, mask].max() > 0.1


def test_a_painting_depends_neither_on_its_batch_nor_on_what_was_in_the_hole(tiny):
    images, mask = tiny_images(11), square(4)
    paint_tiny = partial(inpainting.inpaint, *tiny("mdt_v2"), labels=[3], masked_share=1.0)
    whole = paint_tiny(images, mask)
    first = paint_tiny(np.where(mask[..., None], 7.0, images), mask, batch_size=8)
    np.testing.assert_allclose(first, whole, atol=1e-5)
    assert len({image[mask].tobytes() for image in whole}) == 11


def test_a_model_of_classes_paints_without_one_from_its_null_class(tiny):
    image, mask = tiny_images(1)[0], square(4)
    paint_tiny = partial(inpainting.inpaint, *tiny("mdt_v2"), masked_share=1.0, num_samples=11)
    without = paint_tiny(image, mask)
    assert without.shape == (11, 8, 8, 4)
    assert np.abs(without - paint_tiny(image, mask, labels=[3])).max() > 1e-3


def test_masked_passes_keep_the_known_tokens_and_come_first(tiny, monkeypatch):
    """The error alone would not tell: MDTv2's decoder sees all tokens whatever is kept."""
    kept = []

    def apply(self, variables, x, t, labels, ids_keep=None):
        ids = jnp.zeros(0, int) if ids_keep is None else ids_keep
        jax.debug.callback(lambda ids: kept.append(ids.tolist()), ids, ordered=True)
        return jnp.zeros((*x.shape[:3], 8))

    monkeypatch.setattr(MDTv2, "apply", apply)
    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    model, params = tiny("mdt_v2")
    settings = {"labels": [3, 4], "steps": 2, "resamples": 2, "mesh": mesh}
    inpainting.inpaint(model, params, tiny_images(2), square(4), **settings)
    jax.effects_barrier()
    border = [0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 14, 15]
    # The last step, at i = 0, is taken once.
    assert kept == [[border] * 2, [border] * 2, []]


def test_a_task_holds_what_will_be_done(tiny):
    model, _ = tiny("mdt_v2")
    without = inpainting.prepare_task(model, tiny_images(2), square(4))
    assert without.labels.tolist() == [10, 10] and without.options.cfg_scale == 1
    assert (without.resamples, without.masked_share) == (4, 0.5)
    guided = inpainting.prepare_task(model, tiny_images(2), square(4), labels=[3], cfg_scale=2.0)
    assert guided.labels.tolist() == [3, 3] and guided.options.cfg_scale == 2
    # No token is known here, so that a masked pass would see none.
    assert inpainting.prepare_task(model, tiny_images(2), square(8)).masked_share == 0


@pytest.mark.parametrize("unknown", [False, True])
def test_nothing_unknown_gives_the_images_and_nothing_known_gives_samples(tiny, unknown):
    model, params = tiny("mdt_v2")
    images = tiny_images(2)
    mask = np.full((8, 8), unknown)
    result = inpainting.inpaint(model, params, images, mask, labels=[3, 4], num_samples=11)
    assert np.isfinite(result).all()
    assert np.array_equal(result, images[np.arange(11) % 2]) == (not unknown)


def test_known_tokens_have_no_unknown_pixel(tiny):
    network = tiny("mdt_v2")[0].network
    mask = np.zeros((8, 8), bool)
    mask[1, 2] = mask[6:, 6:] = True
    assert inpainting.known_tokens(network, mask).tolist() == [
        i for i in range(16) if i not in (1, 15)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": square(4)[:6]}, r"mask of shape \(6, 8\).*\(8, 8\)"),
        ({"mask": square(4) * 255}, "mask holds 255"),
        ({"images": np.zeros((8, 8, 3), np.float32)}, r"\(1, 8, 8, 3\).*\(8, 8, 4\)"),
        ({"images": np.zeros((16, 16, 4), np.float32)}, r"\(1, 16, 16, 4\).*\(8, 8, 4\)"),
        ({"images": np.zeros((0, 8, 8, 4), np.float32)}, r"\(0, 8, 8, 4\)"),
        ({"images": np.zeros((8, 8, 4), np.uint8)}, "uint8"),
        ({"images": np.full((8, 8, 4), np.nan)}, "image 0 has known pixels that are not finite"),
        ({"images": tiny_images(3), "labels": [1, 2]}, "2 labels for 3 images"),
        ({"labels": [10]}, "label 10 is outside 0 to 9"),
        ({"cfg_scale": 2.0}, "cfg_scale 2.0 needs labels"),
        ({"resamples": 0}, "resamples 0"),
        ({"masked_share": 1.5}, "masked_share 1.5"),
        ({"num_samples": 0}, "num_samples 0"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, change, message):
    given = {"images": tiny_images(1), "mask": square(4)} | change
    with pytest.raises(ValueError, match=message) as caught:
        inpainting.inpaint(*tiny("mdt_v2"), **given)
    assert "\n" not in str(caught.value)


def test_masked_passes_are_refused_of_a_model_without_them(tiny):
    with pytest.raises(ValueError, match=r"masked_share 0\.5: DiT has no masked pass"):
        inpainting.inpaint(*tiny("dit"), tiny_images(1), square(4), masked_share=0.5)


def test_pictures_are_read_so_that_their_levels_come_back(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / "image.png")
    pixels = inpainting.read_image(tmp_path / "image.png", 1)
    assert pixels.min() >= -1 and pixels.max() <= 1
    np.testing.assert_array_equal(images_lib.to_uint8(pixels[None])[0, ..., 0], levels)
    with pytest.raises(ValueError, match=r"row 0, column 1 is grey \(1\)"):
        inpainting.read_mask(tmp_path / "image.png")
    Image.fromarray((levels > 9) * np.uint8(255)).save(tmp_path / "mask.png")
    np.testing.assert_array_equal(inpainting.read_mask(tmp_path / "mask.png"), levels > 9)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png: cannot be decoded \(no image of a format"):
        inpainting.read_mask(tmp_path / "text.png")


def test_a_picture_too_large_to_open_is_refused_by_name(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"huge\.png: cannot be decoded \(.*256 pixels") as caught:
        inpainting.read_image(tmp_path / "huge.png", 3)
    assert "\n" not in str(caught.value)


def test_a_photograph_stands_upright_as_its_mask_does(tmp_path):
    levels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    Image.fromarray(levels).save(tmp_path / "photo.png", exif=exif)
    pixels = inpainting.read_image(tmp_path / "photo.png", 1)
    upright = np.rot90(levels, -1)
    np.testing.assert_array_equal(images_lib.to_uint8(pixels[None])[0, ..., 0], upright)


def test_a_model_of_latents_reads_no_pictures(tmp_path):
    with pytest.raises(ValueError, match=r"a\.png: .* the model 4; .* its autoencoder"):
        inpainting.read_image(tmp_path / "a.png", 4)


def draw(path):
    """Rows of a picture: scans, then for two masks the scans with blue holes and two paintings."""
    images, labels = scans("heldout")
    chosen = np.array([np.flatnonzero(labels == label)[1] for label in range(10)])
    images, labels = images[chosen], labels[chosen]
    blue = np.array([-0.6, 0.0, 0.9], np.float32)
    rows = [images.repeat(3, axis=-1)]
    for mask in (square(4), MASKS["checkerboard"]):
        painted = paint(images, mask, labels, 20, steps=50, batch_size=20).repeat(3, axis=-1)
        rows += [np.where(mask[..., None], blue, rows[0]), painted[:10], painted[10:]]
    grid = images_lib.image_grid(images_lib.to_uint8(np.concatenate(rows)), columns=10)
    metadata = images_lib.provenance(
        model="MDTv2", step=4000, seed=0, labels=labels, steps=50, resamples=4, cfg_scale=1.0
    )
    images_lib.save_png(path, grid, metadata)


if __name__ == "__main__":
    draw(sys.argv[1])
