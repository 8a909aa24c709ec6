"""Image files of every format, mode, depth and orientation."""

import numpy as np
import pytest
import torch
from picture_helpers import square
from PIL import Image

from data.image_file import read_picture

QUARTERS = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]


def quarters(path, size=32):
    """The colours in the middle of the four quarters, in the order of QUARTERS."""
    pixels = read_picture(path, size).pixels_CHW.int()
    assert pixels.shape == (3, size, size)
    near, far = size // 4, 3 * size // 4
    return [pixels[:, y, x].tolist() for y in (near, far) for x in (near, far)]


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.png", "RGB", {}),
        ("a.bmp", "RGB", {}),
        ("a.webp", "RGB", {"lossless": True}),
        ("a.tif", "CMYK", {}),
        ("a.png", "P", {}),
        ("a.gif", "P", {}),
        ("a.ico", "RGBA", {"sizes": [(64, 64)]}),
        ("a.tga", "RGBA", {}),
        ("a.ppm", "RGB", {}),
    ],
)
def test_every_format_and_mode_gives_the_same_image(tmp_path, name, mode, options):
    square().convert(mode).save(tmp_path / name, **options)
    assert np.abs(np.array(quarters(tmp_path / name)) - QUARTERS).max() <= 2


def test_the_centre_square_of_a_long_image_in_eight_orientations(tmp_path):
    wide = Image.new("RGB", (200, 64))
    wide.paste(square(), (68, 0))
    for orientation, turned in enumerate(
        [None, *(Image.Transpose(t) for t in (0, 3, 1, 5, 2, 6, 4))], start=1
    ):  # stored as a camera would that was held so: the inverse of what undoes it
        stored = wide if turned is None else wide.transpose(turned)
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored.save(tmp_path / "a.png", exif=exif)
        assert quarters(tmp_path / "a.png") == QUARTERS, orientation
        stored.save(tmp_path / "a.tif", exif=exif)
        assert quarters(tmp_path / "a.tif") == QUARTERS, orientation


def test_depth_transparency_and_colour(tmp_path):
    ramp = np.tile(np.linspace(0, 65535, 64, dtype=np.uint16), (64, 1))
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    deep = read_picture(tmp_path / "deep.png", 64)
    assert deep.pixels_CHW[0, 0].tolist() == (ramp[0] // 256).tolist()
    assert deep.notes == ("16 bits per pixel, scaled to 8",)
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "real.tif")
    assert read_picture(tmp_path / "real.tif", 64).pixels_CHW[0, 0, 32] == pytest.approx(129, abs=2)
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    assert read_picture(tmp_path / "clear.png", 8).pixels_CHW.min() == 255  # white, not the hidden red
    clear.quantize(4).save(tmp_path / "palette.png")
    assert read_picture(tmp_path / "palette.png", 8).pixels_CHW.min() == 255
    square().save(tmp_path / "colour.png")
    grey = read_picture(tmp_path / "colour.png", 8, grey=True).pixels_CHW
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2]) and grey.float().std() > 10
    frames = [square(), Image.new("RGB", (64, 64))]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "moving.gif", 32).notes == ("first of 2 frames",)
    assert np.abs(np.array(quarters(tmp_path / "moving.gif")) - QUARTERS).max() <= 2


def test_a_photo_of_100_megapixels_is_decoded_at_a_lower_resolution(tmp_path):
    image = Image.new("L", (10_000, 10_000))
    image.paste(255, (5_000, 0, 10_000, 10_000))
    image.save(tmp_path / "photo.jpg")
    pixels = read_picture(tmp_path / "photo.jpg", 32).pixels_CHW
    assert pixels[:, :, :15].max() < 10 and pixels[:, :, 17:].min() > 245


RAMP = np.tile(np.linspace(0, 1, 64), (64, 1))


@pytest.mark.parametrize(
    ("values", "note"),
    [
        (np.float32(RAMP), "1 taken as white"),
        (np.float32(RAMP * 255), "255 taken as white"),
        (np.float32(RAMP * 65535), "65535 taken as white"),
        (np.float32(RAMP * 1e6), "1e+06 taken as white"),
        (np.int32(RAMP * 255), "255 taken as white"),
        (np.int32(RAMP * 65535), "65535 taken as white"),
        (np.int32(RAMP * 2**30), "1.07374e+09 taken as white"),
        (np.uint16(RAMP * 65535), "scaled to 8"),
    ],
)
def test_numbers_of_any_range_show_a_ramp_and_a_note_says_what_is_white(tmp_path, values, note):
    Image.fromarray(values).save(tmp_path / "a.tif")
    picture = read_picture(tmp_path / "a.tif", 64)
    assert (picture.pixels_CHW[0, 0].int() - torch.linspace(0, 255, 64)).abs().max() <= 2
    assert note in picture.notes[0] and len(picture.notes) == 1
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo={262: 0})  # the same numbers, 0 declared white
    if values.dtype != np.int32:  # which Pillow does not read
        inverted = read_picture(tmp_path / "a.tif", 64).pixels_CHW[0, 0].int()
        assert (inverted - torch.linspace(255, 0, 64)).abs().max() <= 2


def test_nan_values_and_black_images(tmp_path):
    values = np.float32(RAMP * 65535)
    values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert read_picture(tmp_path / "a.tif", 64).pixels_CHW[0, 0, :4].tolist() == [0, 255, 0, 12]
    for empty in (np.zeros((9, 9), np.float32), np.full((9, 9), np.nan, np.float32), np.full((9, 9), -5, np.int32)):
        Image.fromarray(empty).save(tmp_path / "a.tif")
        assert not read_picture(tmp_path / "a.tif", 8).pixels_CHW.any()
