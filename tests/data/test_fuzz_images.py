"""Images with altered bytes: read, or refused in one line."""

import io

from fuzz_helpers import BYTES, altered, fuzz, survives
from hypothesis import strategies as st
from PIL import Image

from data.image_file import read_picture


def encoded(kind):
    image = Image.linear_gradient("L").resize((24, 20)).convert("P" if kind == "GIF" else "RGB")
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


IMAGES = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}


@fuzz(150, kind=st.sampled_from(sorted(IMAGES)), changes=BYTES, header=st.booleans())
def test_images(tmp_path_factory, kind, changes, header):
    path = tmp_path_factory.getbasetemp() / "image.png"
    path.write_bytes(altered(IMAGES[kind], changes, within=80 if header else None))
    survives(lambda: read_picture(path, 16))
