import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from a3tune.data import images
from a3tune.data.images import content_hash, load_image
from a3tune.data.window import window
from a3tune.errors import DataError
from orientations import UPRIGHT, oriented

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def grey(data: bytes) -> np.ndarray:
    image = load_image(data)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int) -> bytes:
    """Header of a PNG that claims a size, with next to no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in chunks)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "BMP"])
def test_eight_bit_images_keep_their_values(form):
    colour = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(load_image(encoded(Image.fromarray(colour), form))), colour)
    assert np.array_equal(grey(encoded(Image.fromarray(colour[..., 0]), form)), colour[..., 0])


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
@pytest.mark.parametrize(("low", "high"), [(0, 65535), (1000, 1400), (30000, 60000)])
def test_sixteen_bit_grey_is_scaled_by_its_own_range(form, low, high):
    pixels = grey(encoded(Image.fromarray((low + RAMP * (high - low)).astype(np.uint16)), form))
    assert np.abs(pixels - 255 * RAMP).max() <= 4
    assert (np.diff(pixels.ravel().astype(int)) >= 0).all()


def test_a_hot_pixel_does_not_darken_a_sixteen_bit_image():
    values = (1000 + 400 * RAMP).astype(np.uint16)
    values[0, 0] = 65535
    assert np.median(grey(encoded(Image.fromarray(values)))) == pytest.approx(127, abs=3)


def test_float_tiff_with_nan_and_infinity():
    values = (RAMP * 3 - 1).astype(np.float32)
    values[0, :3] = np.nan, np.inf, -np.inf
    pixels = grey(encoded(Image.fromarray(values), "TIFF"))
    assert pixels[0, :3].tolist() == [0, 255, 0]
    assert np.abs(pixels[1:] - 255 * RAMP[1:]).max() <= 5
    with pytest.raises(DataError, match="finite"):
        load_image(encoded(Image.fromarray(np.full((4, 4), np.nan, np.float32)), "TIFF"))


@settings(deadline=None)
@given(arrays(np.float64, array_shapes(min_dims=1, max_dims=2, max_side=12), elements=st.floats(-1e30, 1e30)))
def test_window_keeps_the_order_of_the_values(values):
    grey = window(values)
    order = np.argsort(values, axis=None)
    assert (np.diff(grey.ravel()[order].astype(int)) >= 0).all()
    assert values.min() == values.max() or (grey.min(), grey.max()) == (0, 255)


def test_a_sixteen_bit_mask_stays_visible():
    values = np.zeros((100, 100), np.uint16)
    values[3:6, 3:6] = 1
    assert np.array_equal(grey(encoded(Image.fromarray(values))), values * 255)


def test_other_colour_modes():
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    for data in (encoded(red.convert("CMYK"), "JPEG", quality=95), encoded(red.convert("P")), encoded(red, "JPEG")):
        assert np.abs(np.asarray(load_image(data)).astype(int) - (255, 0, 0)).max() <= 3
    assert np.asarray(load_image(encoded(Image.new("1", (2, 2), 1)))).min() == 255


DEEP = np.stack([RAMP, 1 - RAMP, RAMP * 0.5], axis=-1)
"""Colours between 0 and 1; files hold them in the lower 12 of 16 bits."""


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits per channel, which Pillow cannot write; grey, with opacity, RGB, RGBA."""
    height, width, channels = values.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def tiff(values: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


RGB_TIFFS = {
    "little": {},
    "big": {"byteorder": ">"},
    "deflated": {"compression": "deflate"},
    "planes": {"planarconfig": "separate"},
}


@pytest.mark.parametrize("kind", ["png", *RGB_TIFFS])
def test_deep_colour_is_scaled_as_deep_grey_is(kind):
    values = (DEEP * 4095).astype(np.uint16)
    options = RGB_TIFFS.get(kind, {})
    laid = np.moveaxis(values, -1, 0) if "planes" in kind else values
    data = deep_png(values) if kind == "png" else tiff(laid, photometric="rgb", **options)
    assert np.abs(np.asarray(load_image(data)) - 255 * DEEP).max() <= 4


def test_a_kind_of_tiff_that_nobody_reads_rightly_is_refused():
    planes = np.moveaxis((DEEP * 4095).astype(np.uint16), -1, 0)
    with pytest.raises(DataError, match="not compressed: save it so"):
        load_image(tiff(planes, photometric="rgb", planarconfig="separate", compression="deflate"))


@pytest.mark.parametrize("kind", ["la", "rgba", "la tiff", "rgba tiff", "premultiplied"])
def test_opacity_of_sixteen_bits(kind):
    colours = (DEEP if "rgba" in kind or kind == "premultiplied" else DEEP[..., :1]) * 4095
    opacity = np.full((*RAMP.shape, 1), 65535)
    opacity[:4] = 0
    stored = colours * (opacity > 0) if kind == "premultiplied" else colours
    values = np.concatenate([stored, opacity], axis=-1).astype(np.uint16)
    if kind in ("la", "rgba"):
        data = deep_png(values)
    else:
        extra = "assocalpha" if kind == "premultiplied" else "unassalpha"
        data = tiff(values, photometric="minisblack" if kind == "la tiff" else "rgb", extrasamples=[extra])
    shown = np.asarray(load_image(data))
    assert not shown[:4].any()
    assert np.abs(shown[4:] - 255 * (colours[4:] / 4095)).max() <= 5


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int16, np.float32, np.float64])
def test_white_may_be_the_least_value_at_any_depth(kind, order):
    data = tiff((RAMP * 255).astype(kind), photometric="miniswhite", byteorder=order)
    shown = grey(data)
    assert (shown[0, 0], shown[-1, -1]) == (255, 0)
    assert np.abs(shown - 255 * (1 - RAMP)).max() <= 3


def test_transparency_is_laid_on_black():
    half = Image.new("RGBA", (4, 4), (200, 100, 0, 128))
    assert np.abs(np.asarray(load_image(encoded(half))).astype(int) - (100, 50, 0)).max() <= 1
    assert not np.asarray(load_image(encoded(Image.new("LA", (4, 4), (200, 0))))).any()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([9, 99, 199])
    assert not np.asarray(load_image(encoded(palette, transparency=0))).any()


SCENE = np.zeros((48, 64, 3))
SCENE[:16, :32] = 1
SCENE[:16, :8, 1:] = 0.5
"""Colours between 0 and 1 that look otherwise in each of the eight orientations."""


def deep_planes(values: np.ndarray, orientation: int) -> bytes:
    """A TIFF whose 16-bit colours lie in planes, which Pillow does not read."""
    planes = np.moveaxis((values * 4095).astype(np.uint16), 2, 0)
    return tiff(planes, photometric="rgb", planarconfig="separate", extratags=[(274, "H", 1, orientation)])


def with_exif(values: np.ndarray, orientation: int, form: str, **options) -> bytes:
    return encoded(Image.fromarray((255 * values).astype(np.uint8)), form, exif=oriented(orientation), **options)


TURNED = {
    "PNG": lambda values, orientation: with_exif(values, orientation, "PNG"),
    "JPEG": lambda values, orientation: with_exif(values, orientation, "JPEG", quality=100, subsampling=0),
    "WEBP": lambda values, orientation: with_exif(values, orientation, "WEBP", lossless=True),
    "TIFF": lambda values, orientation: with_exif(values, orientation, "TIFF"),
    "TIFF, 16 bits": lambda values, orientation: tiff(
        (values * 4095).astype(np.uint16), photometric="rgb", extratags=[(274, "H", 1, orientation)]
    ),
    "TIFF, planes of 16 bits": deep_planes,
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("form", TURNED)
def test_images_are_turned_upright(form: str, orientation: int):
    found = np.asarray(load_image(TURNED[form](SCENE, orientation)))
    expected = UPRIGHT[orientation](255 * SCENE)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 8


def test_who_opens_images_turns_them_upright():
    """All of the package opens images by `load_image`, but for masks, which hold values and no colours."""
    package = Path(images.__file__).parent.parent
    opening = {str(file.relative_to(package)) for file in package.rglob("*.py") if "Image.open(" in file.read_text()}
    assert opening == {"data/pictures.py", "data/annotations/values.py"}


def test_smallest_and_large_images(tmp_path):
    assert load_image(encoded(Image.new("L", (1, 1), 7))).getpixel((0, 0)) == (7, 7, 7)
    path = tmp_path / "large.png"
    Image.new("L", (8000, 6000), 3).save(path)
    assert load_image(path).size == (8000, 6000)


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    for width, height in ((10_000, 8_001), (10_000, 9_500), (100_000, 100_000)):
        with pytest.raises(DataError, match="80,000,000 pixels"):
            load_image(png(width, height))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP"])
def test_truncated_images_name_the_file(tmp_path, form):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    for share in (0.05, 0.5, 0.9):
        path = tmp_path / f"cut{share}.img"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match=f"cut{share}.img"):
            load_image(path)


@settings(deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"II*\0\x08\0\0\0", b"\xff\xd8\xff"]),
)
def test_bytes_that_are_no_image_are_data_errors(data, magic):
    try:
        assert load_image(magic + data).mode == "RGB"
    except DataError as error:
        assert "image" in str(error)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    for name in ("missing.png", "empty.png", "text.png", "."):
        with pytest.raises(DataError, match=str(tmp_path / name)):
            load_image(tmp_path / name)
    for name in ("missing.png", "empty.png"):
        with pytest.raises(DataError, match=name):
            content_hash(tmp_path / name)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "zero.png", "zero.png#axial=1"):
        for read in (load_image, content_hash):
            with pytest.raises(DataError, match=f"{name}: .* a pipe or a device"):
                read(tmp_path / name)
    with pytest.raises(DataError, match=r"0 x 5|could not decode|not recognised"):
        load_image(png(0, 5))


def test_the_hash_names_the_content(tmp_path):
    data = encoded(Image.new("L", (2, 2)))
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(data)
    assert content_hash(tmp_path / "a.png") == content_hash(Path(tmp_path / "b.png")) == content_hash(data)
    assert content_hash(data) == hashlib.sha256(data).hexdigest() != content_hash(data + b"x")


def test_a_new_format_is_one_line(monkeypatch):
    decoder = (lambda data: data[:4] == b"MINE", lambda data, fragment: Image.new("RGB", (3, 2)))
    monkeypatch.setattr(images, "DECODERS", [decoder, *images.DECODERS])
    assert load_image(b"MINE!").size == (3, 2)
    assert load_image(encoded(Image.new("L", (1, 1)))).size == (1, 1)
