"""Images as users have them: what is seen of each kind, and what is refused before it is decoded."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from strop.engine.data.image_files import MOST_BYTES, BrokenImage, decoded, image_size, read_image

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def two(mode="RGB", left=RED, right=BLUE):
    """An image of 32x16 pixels, one colour beside another."""
    image = Image.new(mode, (32, 16), right)
    image.paste(left, (0, 0, 16, 16))
    return image


def saved(image, form="PNG", **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def rotated():
    exif = Image.Exif()
    exif[274] = 6  # "turn me clockwise", as a phone writes it
    return saved(two().rotate(90, expand=True), "JPEG", exif=exif.tobytes(), quality=95)


def deep(transparency=None):
    """A grey PNG of 16 bits."""
    levels = np.array([[0x4000] * 16 + [0xC000] * 16] * 16, dtype=np.uint16)
    return saved(Image.fromarray(levels), **({"transparency": transparency} if transparency else {}))


def palette():
    image = two().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)
    return saved(image, transparency=image.getpixel((0, 0)))


SEEN = {  # the bytes of a file, the colours of its left and right half
    "jpeg": (lambda: saved(two(), "JPEG", quality=95, subsampling=0), RED, BLUE),
    "webp": (lambda: saved(two(), "WEBP", lossless=True), RED, BLUE),
    "bmp": (lambda: saved(two(), "BMP"), RED, BLUE),
    "rotated by EXIF": (rotated, RED, BLUE),
    "transparent": (lambda: saved(two("RGBA", (*RED, 0), (*BLUE, 255))), WHITE, BLUE),
    "half transparent": (lambda: saved(two("RGBA", (0, 0, 0, 128), (*BLUE, 255))), (127, 127, 127), BLUE),
    "transparent grey": (lambda: saved(two("LA", (9, 0), (9, 255))), WHITE, (9, 9, 9)),
    "transparent webp": (lambda: saved(two("RGBA", (*RED, 0), (*BLUE, 255)), "WEBP", lossless=True), WHITE, BLUE),
    "palette": (lambda: saved(two().convert("P", palette=Image.Palette.ADAPTIVE, colors=2)), RED, BLUE),
    "palette with transparency": (palette, WHITE, BLUE),
    "one colour transparent": (lambda: saved(two(), transparency=RED), WHITE, BLUE),
    "grey": (lambda: saved(two("L", 40, 200)), (40,) * 3, (200,) * 3),
    "black and white": (lambda: saved(two("1", 0, 1)), (0,) * 3, WHITE),
    "16 bits": (deep, (64,) * 3, (192,) * 3),
    "16 bits, one level transparent": (lambda: deep(0x4000), WHITE, (192,) * 3),
    "CMYK": (lambda: saved(two("CMYK", (0, 255, 255, 0), (255, 255, 0, 0)), "JPEG", quality=95), RED, BLUE),
    "animated png": (lambda: saved(two(), save_all=True, append_images=[two(left=BLUE)]), RED, BLUE),
    "animated webp": (
        lambda: saved(two(), "WEBP", save_all=True, append_images=[two(left=BLUE)], lossless=True),
        RED,
        BLUE,
    ),
}


@pytest.mark.parametrize("kind", SEEN)
def test_an_image_is_what_a_viewer_shows(kind):
    make, left, right = SEEN[kind]
    image = decoded(make(), "a")
    assert (image.mode, image.size) == ("RGB", (32, 16))
    assert np.abs(np.subtract(image.getpixel((4, 8)), left)).max() <= 3
    assert np.abs(np.subtract(image.getpixel((27, 8)), right)).max() <= 3


def png_of(width, height):
    """A PNG that is whole but for what its pixels are: a few bytes that say how many there would be."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


BROKEN = {  # what lies at the path, words of the sentence
    "EPS": (lambda p: p.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"), "no image"),
    "GIF": (lambda p: p.write_bytes(saved(two(), "GIF")), "no image"),
    "TIFF": (lambda p: p.write_bytes(saved(two(), "TIFF")), "no image"),
    "text": (lambda p: p.write_text("almost"), "no image"),
    "nothing": (lambda p: p.write_bytes(b""), "empty"),
    "cut PNG": (lambda p: p.write_bytes(saved(two())[:60]), "damaged"),
    "cut JPEG": (lambda p: p.write_bytes(saved(two(), "JPEG")[:-60]), "damaged"),
    "cut WebP": (lambda p: p.write_bytes(saved(two(), "WEBP")[:-20]), "damaged"),
    "strip": (lambda p: p.write_bytes(png_of(1, 60_000)), "1x60000 pixels"),
    "poster": (lambda p: p.write_bytes(png_of(9_000, 9_000)), "9000x9000 pixels"),
    "bomb": (lambda p: p.write_bytes(png_of(60_000, 60_000)), "bomb"),
    "pipe": (os.mkfifo, "a pipe"),
    "endless": (lambda p: p.symlink_to("/dev/zero"), "a device"),
    "folder": (lambda p: p.mkdir(), "Is a directory"),
    "gone": (lambda p: None, "No such file"),
    "large": (lambda p: p.touch() or os.truncate(p, MOST_BYTES + 1), "134,217,729 bytes"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_image_is_named(kind, tmp_path, recwarn):
    make, words = BROKEN[kind]
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(BrokenImage) as broken:
        read_image(path)
    assert words in str(broken.value)
    assert str(path) in str(broken.value)
    assert not recwarn.list


def test_the_size_is_read_without_the_pixels(tmp_path):
    (tmp_path / "a.png").write_bytes(png_of(5_000, 9_000))
    assert image_size(tmp_path / "a.png") == (5_000, 9_000)
