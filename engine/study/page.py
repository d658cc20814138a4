"""Makes the page of a study: one index.html and its images, and beside them the key that raters do not get.

The page opens from a folder, offline. No name of a system is in it: images are encoded anew, without metadata, under
names that are hashes of the seed and their pixels, and all have the same time of change.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from PIL import Image

from ..data.image_files import BrokenImage, read_image
from ..errors import UserError, warn
from .balance import DEGRADED, SENTINEL, Design, Item, plan
from .key import Key, twin
from .systems import Systems

QUESTIONS = (  # (id, title, text)
    ("general", "General preference", "Which image do you prefer, all in all?"),
    ("appeal", "Visual appeal", "Which image looks better, whatever its text says?"),
    ("alignment", "Prompt alignment", "Which image shows better what the text says?"),
)
IMAGES = "images"


def make_study(systems: Systems, design: Design, too_fast_s: float, out: Path) -> Key:
    """Writes out/page, which goes to the raters, and out/key.json, which does not; returns the key.

    too_fast_s: seconds below which the answers to a pair are marked as too fast. Raises UserError for an image that
    cannot be read.
    """
    folder = out / "page" / IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    items = plan(design)
    images = _write_images(systems, items, design.seed, folder)
    manifest = _manifest(systems, items, images, round(1000 * too_fast_s))
    text = json.dumps(manifest, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    digest = sha256(text.encode()).hexdigest()
    (out / "page" / "index.html").write_text(page(text, digest), encoding="utf-8")
    key = Key(
        manifest=digest,
        seed=design.seed,
        systems=systems.names,
        prompts=systems.prompts,
        questions={name: title for name, title, _ in QUESTIONS},
        too_fast_ms=manifest["too_fast_ms"],
        images=images,
        items={rater: {item.token: item for item in shown} for rater, shown in items.items()},
    )
    key.write(out / "key.json")
    return key


def page(manifest: str, digest: str) -> str:
    """The HTML of the page for a manifest (JSON in which no < stands) and its hash."""
    parts = {"style": _part("page.css"), "script": _part("page.js"), "hash": digest, "manifest": manifest}
    text = _part("page.html")
    for name, content in parts.items():
        text = text.replace("{{" + name + "}}", content, 1)
    return text


def degraded(image: Image.Image) -> Image.Image:
    """The twin of a sentinel: at most 16 pixels a side, enlarged again and a third greyer, so that it is plainly
    worse and still shows the same."""
    few = max(image.size) / 16
    small = image.resize([max(1, round(side / few)) for side in image.size], Image.Resampling.BOX)
    large = small.resize(image.size, Image.Resampling.BILINEAR)
    return Image.blend(large, Image.new("RGB", image.size, (128, 128, 128)), 1 / 3)


def _part(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _manifest(systems: Systems, items: dict[str, list[Item]], images: dict, too_fast_ms: int) -> dict:
    """All that the page knows. Images are listed in the order of their blinded names."""
    files = sorted(images.values())
    places = {file: place for place, file in enumerate(files)}

    def shown(item: Item) -> list:
        return [item.token, item.prompt, *(places[images[item.prompt, place]] for place in _places(item))]

    return {
        "format": "strop-study/1",
        "questions": [{"id": name, "title": title, "text": text} for name, title, text in QUESTIONS],
        "too_fast_ms": too_fast_ms,
        "prompts": systems.prompts,
        "images": [f"{IMAGES}/{file}" for file in files],
        "raters": {rater: [shown(item) for item in plan] for rater, plan in items.items()},
    }


def _places(item: Item) -> tuple[int, int]:
    """Where the images of an item stand among all: systems by their places, the degraded one by its twin's."""
    left, right = item.left, item.right
    return (twin(right) if left == DEGRADED else left), (twin(left) if right == DEGRADED else right)


def _write_images(systems: Systems, items: dict, seed: int, folder: Path) -> dict[tuple[int, int], str]:
    """Writes every image and the degraded twins; returns the names of the files by (prompt, place)."""
    every = [item for plan in items.values() for item in plan if item.kind == SENTINEL]
    controls = {(item.prompt, max(item.left, item.right)) for item in every}
    names, odd = {}, 0
    for prompt in range(len(systems.prompts)):
        sizes = set()
        for place, image in _images_of(systems, prompt, controls):
            content = image.tobytes()
            mark = f"{seed}/{prompt}/{place}/{image.size}/".encode()
            name = f"{sha256(mark + content).hexdigest()[:20]}.png"
            Image.frombytes("RGB", image.size, content).save(folder / name)  # nothing but pixels
            os.utime(folder / name, (0, 0))
            names[prompt, place] = name
            sizes.add(image.size)
        odd += len(sizes) > 1
    if odd:
        warn(f"the images of {odd} of {len(systems.prompts)} prompts differ in size; they are shown at the same size")
    return names


def _images_of(systems: Systems, prompt: int, controls: set) -> Iterator[tuple[int, Image.Image]]:
    for system in range(len(systems.names)):
        image = _read(systems.files[system][prompt])
        yield system, image
        if (prompt, system) in controls:
            yield twin(system), degraded(image)


def _read(path: Path) -> Image.Image:
    try:
        return read_image(path)
    except BrokenImage as error:
        raise UserError(
            f"study make: {error}; expected the image that its folder or list names, or make it anew"
        ) from None
