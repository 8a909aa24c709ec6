"""Test images."""

from PIL import Image


def square(size=64) -> Image.Image:
    """Red, green above; blue, white below."""
    image = Image.new("RGB", (size, size), "white")
    half = size // 2
    for colour, corner in (("red", (0, 0)), ("lime", (half, 0)), ("blue", (0, half))):
        image.paste(colour, (*corner, corner[0] + half, corner[1] + half))
    return image
