"""Decoding: pictures of every kind become RGB as people see them, or are refused by name."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from mdt_jax.data import BadImage, decode_image


def encode(picture: Image.Image, file_format: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, file_format, **options)
    return file.getvalue()


def row(values, dtype=np.uint8) -> Image.Image:
    """A picture one pixel high."""
    return Image.fromarray(np.array([values], dtype))


def decoded_row(data: bytes) -> list:
    return decode_image(data, "x")[0].tolist()


GRAY, WHITE = [10, 10, 10], [255, 255, 255]


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_rgb_is_given_back_as_it_was(file_format):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    options = {"lossless": True} if file_format == "WEBP" else {}
    image = decode_image(encode(Image.fromarray(pixels), file_format, **options), "x")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, pixels)


def test_a_jpeg_is_what_pillow_makes_of_it():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    data = encode(Image.fromarray(pixels), "JPEG")
    np.testing.assert_array_equal(decode_image(data, "x"), np.asarray(Image.open(io.BytesIO(data))))


def test_gray_becomes_three_equal_channels_or_one():
    data = encode(row([10, 255]), "PNG")
    assert decoded_row(data) == [GRAY, WHITE]
    assert decode_image(data, "x", channels=1).tolist() == [[[10], [255]]]
    assert decoded_row(encode(row([False, True], bool), "PNG")) == [[0, 0, 0], WHITE]


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_16_bit_gray_keeps_its_upper_8_bits(file_format):
    data = encode(row([0, 255, 256, 10 * 256 + 200, 65535], np.uint16), file_format)
    assert decoded_row(data) == [[0] * 3, [0] * 3, [1] * 3, GRAY, WHITE]


def png(bit_depth: int, color: int, width: int, rows: bytes) -> bytes:
    """A PNG one pixel high, of kinds that Pillow does not write."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + checksum

    header = struct.pack(">IIBBBBB", width, 1, bit_depth, color, 0, 0, 0)
    body = (
        chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" + rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def test_16_bit_rgb_keeps_its_upper_8_bits():
    pixels = np.array([[0, 255, 256], [2760, 2760, 2760], [65535, 65535, 65535]], ">u2")
    assert decoded_row(png(16, 2, 3, pixels.tobytes())) == [[0, 0, 1], GRAY, WHITE]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_values_whose_white_is_unknown_are_refused(dtype):
    with pytest.raises(
        BadImage, match="^x: cannot be decoded .32-bit values, of which white is un"
    ):
        decode_image(encode(row([0, 1], dtype), "TIFF"), "x")


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb(file_format):
    picture = Image.new("CMYK", (8, 8), (0, 128, 255, 0))
    (color,) = np.unique(decode_image(encode(picture, file_format), "x").reshape(-1, 3), axis=0)
    np.testing.assert_allclose(color, [255, 127, 0], atol=2)


def palette() -> Image.Image:
    picture = row([0, 1, 2]).convert("P")
    picture.putpalette([10, 10, 10, 4, 5, 6, 7, 8, 9])
    return picture


@pytest.mark.parametrize("file_format", ["PNG", "GIF", "BMP", "TIFF"])
def test_palettes_become_their_colours(file_format):
    assert decoded_row(encode(palette(), file_format)) == [GRAY, [4, 5, 6], [7, 8, 9]]


@pytest.mark.parametrize(
    ("picture", "file_format", "options"),
    [
        (row([[10, 10, 10, 255], [4, 5, 6, 0]]), "PNG", {}),
        (row([[10, 10, 10, 255], [4, 5, 6, 0]]), "WEBP", {"lossless": True, "exact": True}),
        (row([[10, 255], [4, 0]]), "PNG", {}),
        (palette(), "PNG", {"transparency": 1}),
        (palette(), "PNG", {"transparency": bytes([255, 0, 255])}),
        (palette(), "GIF", {"transparency": 1}),
        (row([10, 4]), "PNG", {"transparency": 4}),
        (row([[10, 10, 10], [4, 5, 6]]), "PNG", {"transparency": (4, 5, 6)}),
    ],
    ids=["RGBA", "WebP", "LA", "palette", "palette alpha", "GIF", "gray key", "RGB key"],
)
def test_what_is_transparent_is_white(picture, file_format, options):
    assert decoded_row(encode(picture, file_format, **options))[:2] == [GRAY, WHITE]


def test_what_is_half_transparent_is_mixed_with_white():
    ((color,),) = decode_image(encode(row([[55, 155, 255, 51]]), "PNG"), "x").tolist()
    np.testing.assert_allclose(color, [0.2 * c + 0.8 * 255 for c in (55, 155, 255)], atol=1)


def test_an_opaque_alpha_channel_changes_nothing():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    pixels[..., 3] = 255
    image = decode_image(encode(Image.fromarray(pixels), "PNG"), "x")
    np.testing.assert_array_equal(image, pixels[..., :3])


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_taken(file_format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    data = encode(frames[0], file_format, save_all=True, append_images=frames[1:])
    image = decode_image(data, "x")
    assert image.shape == (8, 8, 3) and image[..., 0].min() > 250 and image[..., 2].max() < 5


# How a picture is stored that is upright once shown as its orientation says.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_photographs_stand_upright(orientation, file_format):
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :16] = 255
    picture = Image.fromarray(pixels)
    if STORED[orientation] is not None:
        picture = picture.transpose(STORED[orientation])
    exif = picture.getexif()
    exif[0x0112] = orientation
    image = decode_image(encode(picture, file_format, exif=exif), "x")
    assert image.shape == (32, 48, 3)
    np.testing.assert_allclose(image.astype(int), pixels, atol=20)


@pytest.mark.parametrize("value", [0, 9, 700])
def test_an_orientation_that_is_none_is_not_heeded(value):
    picture = Image.new("RGB", (6, 5))
    exif = picture.getexif()
    exif[0x0112] = value
    assert decode_image(encode(picture, "JPEG", exif=exif), "x").shape == (5, 6, 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_spoils_no_picture():
    picture = Image.new("RGB", (6, 5))
    exif = picture.getexif()
    exif[0x0112] = 6
    whole = exif.tobytes()
    for length in range(6, len(whole)):
        assert decode_image(encode(picture, "JPEG", exif=whole[:length]), "x").size == 90


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_pictures_one_pixel_wide_are_decoded(size):
    assert decode_image(encode(Image.new("RGB", size), "PNG"), "x").shape == (*size[::-1], 3)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_files_cut_off_anywhere_are_refused_in_one_line(file_format):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    whole = encode(Image.fromarray(pixels), file_format)
    for length in range(0, len(whole) * 3 // 4, 7):
        with pytest.raises(BadImage, match="^x: cannot be decoded .*; replace the image") as caught:
            decode_image(whole[:length], "x")
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_damaged_files_are_decoded_or_refused_but_nothing_else(file_format):
    rng = np.random.default_rng(0)
    whole = encode(Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)), file_format)
    for _ in range(100):
        damaged = np.frombuffer(whole, np.uint8).copy()
        damaged[rng.integers(0, min(len(whole), 80), 3)] = rng.integers(0, 256, 3)
        try:
            assert decode_image(damaged.tobytes(), "x").shape[2] == 3
        except BadImage as error:
            assert str(error).startswith("x: ") and "\n" not in str(error)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(BadImage, match=r"^x: cannot be decoded \(No such file or directory\)"):
        decode_image(tmp_path / "gone.png", "x")


def test_more_pixels_than_any_photograph_has_are_refused():
    with pytest.raises(BadImage, match="^x: cannot be decoded .Image size .* exceeds limit"):
        decode_image(png(8, 0, 2**31 - 1, b""), "x")
