"""Images as files: the exact rounding, grids, and metadata that comes back."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mdt_jax.sampling.images import (
    check_finite,
    image_grid,
    provenance,
    read_metadata,
    save_npz,
    save_png,
    stream_npz,
    to_uint8,
)

METADATA = {"Content": "synthetic", "model": "MDT-S/2", "note": "größer 数字", "line": "a\nb"}


def test_to_uint8_clamps_and_truncates():
    x = np.array([-9, -1, -0.5, 0, 0.5, 0.9999, 1, 9], np.float32).reshape(1, 2, 4, 1)
    assert to_uint8(x).ravel().tolist() == [0, 0, 63, 127, 191, 254, 255, 255]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, np.float64])
def test_to_uint8_computes_in_float32_whatever_comes_in(dtype):
    x = np.linspace(-1.1, 1.1, 4 * 8 * 8).reshape(4, 8, 8, 1)
    x = x.astype(dtype) if dtype is np.float64 else jnp.asarray(x, dtype)
    x32 = np.asarray(x).astype(np.float32)
    expected = np.trunc(np.clip((x32 + np.float32(1)) * np.float32(127.5), 0, 255))
    np.testing.assert_array_equal(to_uint8(x), expected)


@pytest.mark.torch
def test_to_uint8_is_what_the_authors_compute():
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
    theirs = ((torch.from_numpy(x) + 1) * 127.5).clamp(0, 255).to(torch.uint8)
    np.testing.assert_array_equal(to_uint8(x), theirs.numpy())


def test_to_uint8_names_the_image_that_is_nan():
    x = np.zeros((4, 2, 2, 1), np.float32)
    x[2, 0, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 4 images hold NaN, the first at index 2"):
        to_uint8(x)
    with pytest.raises(ValueError, match="the first at index 102"):
        to_uint8(x, first_index=100)


def test_a_grid_shows_images_row_by_row_on_white():
    images = np.stack([np.full((64, 64, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = image_grid(images, columns=2, padding=2)
    assert grid.shape == (2 * 66 + 2, 2 * 66 + 2, 3)
    assert [grid[40, 40, 0], grid[40, 100, 0], grid[100, 40, 0], grid[100, 100, 0]] == [
        10,
        20,
        30,
        255,
    ]
    assert (grid[:2] == 255).all() and (grid[:, 66:68] == 255).all() and (grid[-2:] == 255).all()


def test_a_grid_enlarges_digits_to_squares_of_64_pixels():
    digit = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    grid = image_grid(digit, padding=0)
    assert grid.shape == (64, 64, 3)
    np.testing.assert_array_equal(grid[3::8, 5::8], digit[0].repeat(3, axis=-1))


@pytest.mark.parametrize(("width", "shown"), [(8, 64), (33, 66), (64, 64), (100, 100)])
def test_a_grid_enlarges_by_the_smallest_whole_factor(width, shown):
    grid = image_grid(np.zeros((1, 10, width, 1), np.uint8), padding=0)
    assert grid.shape == (10 * shown // width, shown, 3)


def test_a_grid_is_square_unless_told_otherwise():
    images = np.zeros((10, 64, 64, 3), np.uint8)
    assert image_grid(images, padding=0).shape == (3 * 64, 4 * 64, 3)
    assert image_grid(images, columns=10, padding=0).shape == (64, 640, 3)


@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (4, 8, 8, 4)])
def test_a_grid_refuses_what_it_cannot_show(shape):
    with pytest.raises(ValueError, match="1 or 3 channels"):
        image_grid(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_gives_back_pixels_and_metadata(tmp_path, channels):
    path = tmp_path / "new" / "folder" / "image.png"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, channels), np.uint8)
    save_png(path, pixels, METADATA)
    with Image.open(path) as image:
        np.testing.assert_array_equal(np.asarray(image).reshape(5, 7, channels), pixels)
    assert read_metadata(path) == METADATA


@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_has_the_layout_of_adms_evaluator_and_metadata(tmp_path, channels):
    path = tmp_path / "new" / "samples.npz"
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, channels), np.uint8)
    save_npz(path, images, jnp.arange(4), METADATA)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(arrays["arr_0"], images)
        np.testing.assert_array_equal(arrays["arr_1"], range(4))
    assert read_metadata(path) == METADATA


def test_an_npz_can_be_written_in_pieces_cut_anywhere(tmp_path):
    images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    data, cuts = images.tobytes(), [0, 1, 70, 70, 2000, images.nbytes]
    pieces = (data[start:stop] for start, stop in zip(cuts, cuts[1:], strict=False))
    labels, path = np.arange(4), tmp_path / "pieces.npz"
    stream_npz(path, images.shape, images.dtype, pieces, labels, {"metadata": METADATA})
    save_npz(tmp_path / "whole.npz", images, labels, METADATA)
    assert path.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    np.testing.assert_array_equal(np.load(path)["arr_0"], images)


@pytest.mark.parametrize("missing", [1, -1])
def test_an_npz_in_pieces_that_lacks_a_byte_is_not_written(tmp_path, missing):
    with pytest.raises(ValueError, match=f"lack {missing} bytes"):
        pieces = [bytes(4 - missing)]
        stream_npz(tmp_path / "a.npz", (4, 1, 1, 1), np.dtype("u1"), pieces, np.arange(4), {})
    assert list(tmp_path.iterdir()) == []


def test_an_npz_needs_a_label_per_image(tmp_path):
    # Without the shapes checked, the function's own error is what a user meets.
    unchecked = getattr(save_npz, "__wrapped__", save_npz)
    with pytest.raises(ValueError, match="4 images need as many labels, not 3"):
        unchecked(tmp_path / "a.npz", np.zeros((4, 8, 8, 1), np.uint8), np.arange(3), {})


def test_a_file_whose_writing_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "image.png"
    pixels = np.zeros((5, 7, 3), np.uint8)
    save_png(path, pixels, {"step": "1"})
    with pytest.raises(OSError), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Image.Image, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        save_png(path, pixels, {"step": "2"})
    assert [file.name for file in tmp_path.iterdir()] == ["image.png"]
    assert read_metadata(path) == {"step": "1"}


def test_files_of_others_have_no_metadata_and_other_files_are_refused(tmp_path):
    Image.fromarray(np.zeros((2, 2), np.uint8)).save(tmp_path / "a.png")
    np.savez(tmp_path / "a.npz", np.zeros(3))
    (tmp_path / "a.txt").write_text("hello")
    assert read_metadata(tmp_path / "a.png") == read_metadata(tmp_path / "a.npz") == {}
    with pytest.raises(ValueError, match="a.txt.*PNG or NPZ"):
        read_metadata(tmp_path / "a.txt")


def test_provenance_says_synthetic_and_what_was_asked():
    said = provenance(
        model="MDTv2-S/2",
        step=100,
        seed=0,
        labels=np.array([3, 1]),
        cfg_scale=3.8,
        sampler="ddpm",
        steps=250,
    )
    assert said["Content"] == "synthetic: generated by a diffusion model"
    assert said["Software"] == "mdt_jax"
    assert {key: said[key] for key in list(said)[2:]} == {
        "model": "MDTv2-S/2",
        "step": "100",
        "seed": "0",
        "labels": "3,1",
        "cfg_scale": "3.8",
        "sampler": "ddpm",
        "steps": "250",
    }


def test_provenance_leaves_out_what_is_unknown():
    assert list(provenance(model="x", seed=0)) == ["Content", "Software", "model", "seed"]


@pytest.mark.parametrize("channels", [1, 3, 4, 16])
@pytest.mark.parametrize(
    ("value", "said"), [(np.nan, "NaN"), (np.inf, "infinite values"), (-np.inf, "infinite values")]
)
def test_samples_that_are_not_finite_are_refused_by_index(value, said, channels):
    x = np.zeros((4, 2, 2, channels), np.float32)
    check_finite(x)
    x[2:, 1, 1, -1] = value
    with pytest.raises(
        ValueError, match=f"2 of 4 samples hold {said}, the first at index 102: the"
    ):
        check_finite(x, 100)
    with pytest.raises(ValueError, match=f"2 of 4 images hold {said}, the first at index 2: the"):
        to_uint8(x)
    with pytest.raises(ValueError, match="index 2: such and such$"):
        check_finite(x, cause="such and such")
