"""Opens the images that users name. All of strop reads them here, so that all see one picture of a file.

A file's content decides its format, not its name; only FORMATS are tried, because some of PIL's others start programs.
Nothing is decoded that is beyond the limits below.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import one_line
from ..user_files import read_bytes

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
MOST_BYTES = 2**27
MOST_PIXELS = 50_000_000
MOST_ASPECT = 16  # long side / short side
WHITE = 255


class BrokenImage(ValueError):
    """Says which file is no image, or none that is read, and why."""


def read_image(path: Path, name: str | None = None) -> Image.Image:
    """Reads the image of a file as `decoded` does. Raises BrokenImage; name: that of the file in it, or its path."""
    return decoded(_content(path), name or str(path))


def image_size(path: Path) -> tuple[int, int]:
    """Returns (width, height) of an image that `read_image` would try to decode. Raises BrokenImage."""
    return _opened(_content(path), str(path)).size


def decoded(content: bytes, name: str) -> Image.Image:
    """Decodes an image file's bytes to 8-bit RGB as a viewer shows them on a white page. Raises BrokenImage.

    EXIF's rotation is done, what is transparent becomes white, and of an animation the first frame is taken.
    """
    image = _opened(content, name)
    try:
        return _on_white(ImageOps.exif_transpose(image))
    except Exception as error:  # PIL's decoders raise many kinds for damaged files
        raise BrokenImage(f"{name} is damaged ({one_line(error)})") from None


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path, MOST_BYTES)
    except OSError as error:
        raise BrokenImage(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BrokenImage(f"{str(path)!r} is no path ({error})") from None


def _opened(content: bytes, name: str) -> Image.Image:
    """Reads the header of an image and checks its size; no pixel is decoded."""
    if not content:
        raise BrokenImage(f"{name} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limits below are lower
            image = Image.open(BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise BrokenImage(f"{name} is no image ({', '.join(FORMATS)})") from None
    except Exception as error:  # as above, and a size that PIL itself refuses
        raise BrokenImage(f"{name} is damaged ({one_line(error)})") from None
    short, long = sorted(image.size)
    if short * long > MOST_PIXELS or long > MOST_ASPECT * short:
        raise BrokenImage(
            f"{name} has {image.width}x{image.height} pixels, expected at most {MOST_PIXELS:,} and a long side of at "
            f"most {MOST_ASPECT} times the short one"
        )
    return image


def _on_white(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB: 16 bits to their upper 8, what is transparent to white."""
    if image.mode.startswith("I"):  # grey of 16 bits, which PIL would clip at 255
        values = np.asarray(image)
        transparent = values == image.info.get("transparency", -1)
        image = Image.fromarray(np.where(transparent, WHITE, values >> 8).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    ground = Image.new("RGB", image.size, (WHITE,) * 3)
    ground.paste(image, mask=image.getchannel("A"))
    return ground
