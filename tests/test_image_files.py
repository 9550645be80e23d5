"""Image files: of every kind, each upright and in 8-bit RGB; and none that is damaged or no image."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from cadetlib import data, image_files


def picture(height=12, width=12):
    """A smooth picture that is the same neither mirrored nor turned: red grows rightwards, green downwards, blue is flat."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([20 + 200 * x // width, 20 + 200 * y // height, np.full_like(x, 90)], axis=-1).astype(np.uint8)


def luma(array):
    return np.repeat((array @ [0.299, 0.587, 0.114])[..., None], 3, axis=-1)


def save_rgb(path):
    Image.fromarray(picture()).save(path, lossless=True)  # WebP's choice
    return picture()


def save_grey(path):
    Image.fromarray(picture()).convert("L").save(path)
    return luma(picture())


def save_grey_alpha(path):
    Image.fromarray(picture()).convert("LA").save(path)
    return luma(picture())


def save_16_bit(path):
    Image.fromarray((luma(picture())[..., 0] * 257).astype(np.uint16)).save(path)
    return luma(picture())


def save_palette(path):
    Image.fromarray(picture()).quantize(256).save(path)
    return picture()


def save_rgba(path):
    Image.fromarray(np.dstack([picture(), np.full((12, 12), 130, np.uint8)])).save(path)
    return picture()


def save_two_levels(path):
    Image.fromarray(picture()[..., 0] > 120).save(path)
    return np.repeat(np.where(picture()[..., :1] > 120, 255, 0), 3, axis=-1)


def save_cmyk(path):
    Image.fromarray(picture()).convert("CMYK").save(path, quality=100)
    return picture()


def save_cmyk_plain(path):
    Image.fromarray(picture()).convert("CMYK").save(path)
    return picture()


def save_palette_alpha(path):
    Image.fromarray(picture()).quantize(256).save(path, transparency=0)
    return picture()


def save_turned(path):
    """As a camera held upright writes it: lying on its side, with EXIF orientation 6."""
    turned = Image.fromarray(picture()).transpose(Image.Transpose.ROTATE_90)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(path, exif=exif, quality=100, subsampling=0)
    return picture()


TURNS = {  # EXIF orientation -> how the pixels lie in the file, so that turning as it tells sets them upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize(("pixels", "mode"), [(np.full((12, 12), 200, np.int32), "I"), (np.full((12, 12), 0.8, np.float32), "F")])
def test_pixels_of_32_bits_are_refused_since_nobody_knows_their_white(tmp_path, pixels, mode):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"a\.tif: .*32-bit pixels \(TIFF, mode {mode}\), expected 8 or 16 bits"):
        image_files.read_image(tmp_path / "a.tif", 12)


@pytest.mark.parametrize("orientation", TURNS)
def test_every_exif_orientation_comes_upright(tmp_path, orientation):
    turned = Image.fromarray(picture()).transpose(TURNS[orientation])
    exif = turned.getexif()
    exif[0x0112] = orientation
    turned.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(image_files.read_image(tmp_path / "a.png", 12).permute(1, 2, 0), picture())


@pytest.mark.parametrize(
    ("save", "name", "tolerance"),
    [
        (save_rgb, "a.png", 0),
        (save_rgb, "a.bmp", 0),
        (save_rgb, "a.webp", 0),
        (save_grey, "a.png", 1),
        (save_grey, "a.JPG", 3),
        (save_grey_alpha, "a.png", 1),
        (save_16_bit, "a.png", 1),
        (save_16_bit, "a.TIFF", 1),
        (save_palette, "a.png", 4),
        (save_palette, "a.gif", 4),
        (save_rgba, "a.png", 0),
        (save_two_levels, "a.png", 0),
        (save_cmyk, "a.jpg", 8),
        (save_cmyk_plain, "a.tif", 1),
        (save_palette_alpha, "a.png", 4),
        (save_turned, "a.jpeg", 4),
    ],
)
def test_image_files_of_every_kind_are_read(tmp_path, save, name, tolerance):
    expected = save(tmp_path / name)
    found = image_files.read_image(tmp_path / name, 12)
    assert found.shape == (3, 12, 12) and found.dtype == torch.uint8
    np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=tolerance)


def test_a_long_picture_is_cut_to_its_centre(tmp_path):
    wide = np.concatenate([np.zeros((12, 12, 3), np.uint8), picture(), np.zeros((12, 12, 3), np.uint8)], axis=1)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    np.testing.assert_array_equal(image_files.read_image(tmp_path / "wide.png", 12).permute(1, 2, 0), picture())


def test_a_line_of_pixels_takes_no_gigabytes(tmp_path, monkeypatch):
    """Of 6,000 pixels to one, brought to 224, the middle 64 squares are resized and the middle one is kept."""
    line = np.zeros((1, 6000, 3), np.uint8)
    line[0, 2990:3010] = 200
    asked, resize = [], image_files.resize_to
    monkeypatch.setattr(image_files, "resize_to", lambda images, size: asked.append(images.shape) or resize(images, size))
    for name, pixels in {"wide.png": line, "high.png": line.transpose(1, 0, 2)}.items():
        Image.fromarray(pixels).save(tmp_path / name)
        assert image_files.read_image(tmp_path / name, 224).unique().tolist() == [200]
    assert asked == [(1, 3, 1, 64), (1, 3, 64, 1)]


def test_an_odd_exif_is_no_reason_not_to_read_an_image(tmp_path):
    """The orientation counts; what else a camera wrote, and wrote wrongly, does not."""
    turned, unit = (
        struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0),
        struct.pack("<HHI4s", 0x0128, 2, 3, b"cm"),
    )  # which should be a number
    exif = b"II*\0" + struct.pack("<IH", 8, 2) + turned + unit + bytes(4)
    Image.fromarray(picture()).transpose(TURNS[6]).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(image_files.read_image(tmp_path / "a.png", 12).permute(1, 2, 0), picture())


def test_a_link_that_leads_nowhere_is_a_file_that_cannot_be_read(tmp_path):
    for name, target in {
        "circle.png": "circle.png",
        "through.png": "a.png/b.png",
        "long.png": "x" * 300,
        "gone.png": "n.png",
    }.items():
        (tmp_path / name).symlink_to(target)
    Image.fromarray(picture()).save(tmp_path / "a.png")
    assert list(image_files.images_below(tmp_path)) == ["a.png", "circle.png", "gone.png", "long.png", "through.png"]


@pytest.mark.parametrize("content", [b"", b"no image at all", None], ids=["empty", "text", "truncated"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(ValueError, match=r"broken.png: found no readable image .*; replace or remove it"):
        data.folder_images(tmp_path, 8)
