"""Defines the grammar of tinyworld: what a caption can say; render.py says how it looks.

A scene is one object with an optional size ("a large red circle on a yellow background") or two objects in a relation
("a blue square left of a green triangle on a white background"). A background that is not named is grey, so that the
caption determines every colour. Position, exact size and the quality q are never said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch

# RGB in [0, 1]. No channel above 0.84 or below 0.10, so that shading and noise around a colour are not clipped.
PALETTE = {
    "red": (0.80, 0.12, 0.14),
    "yellow": (0.82, 0.74, 0.14),
    "green": (0.14, 0.56, 0.20),
    "cyan": (0.20, 0.74, 0.80),
    "blue": (0.14, 0.24, 0.78),
    "purple": (0.60, 0.18, 0.70),
    "white": (0.83, 0.83, 0.83),
    "black": (0.13, 0.13, 0.13),
    "grey": (0.47, 0.47, 0.47),
}
OBJECT_COLOURS = ("red", "yellow", "green", "cyan", "blue", "purple")
BACKGROUNDS = (*OBJECT_COLOURS, "white", "black", "grey")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("", "small", "large")  # "": the caption does not say
LAYOUTS = ("single", "left of", "above")
WORDS = ("a", *BACKGROUNDS, *SHAPES, "small", "large", "left", "of", "above", "on", "background")
MAX_TOKENS = 16  # the longest caption has 12 words, plus begin and end

_COLOUR, _SHAPE = "|".join(OBJECT_COLOURS), "|".join(SHAPES)
_GRAMMAR = re.compile(
    rf"a (?:(?P<size>small|large) )?(?P<colour_a>{_COLOUR}) (?P<shape_a>{_SHAPE})"
    rf"(?: (?P<relation>left of|above) a (?P<colour_b>{_COLOUR}) (?P<shape_b>{_SHAPE}))?"
    rf"(?: on a (?P<background>{'|'.join(BACKGROUNDS)}) background)?"
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What a caption says. `layout` "single" has no object b; pairs have no size word; `named` is false when the
    caption leaves the (grey) background out."""

    layout: str
    colour_a: str
    shape_a: str
    background: str
    size: str = ""
    colour_b: str = ""
    shape_b: str = ""
    named: bool = True


def caption(scene: Scene) -> str:
    """Returns the only caption of a scene."""
    words = ["a", scene.size, scene.colour_a, scene.shape_a] if scene.size else ["a", scene.colour_a, scene.shape_a]
    if scene.layout != "single":
        words += [scene.layout, "a", scene.colour_b, scene.shape_b]
    if scene.named:
        words += ["on a", scene.background, "background"]
    return " ".join(words)


def parse(text: str) -> Scene:
    """Returns the scene of a caption, as the inverse of `caption`. Raises ValueError outside the grammar."""
    match = _GRAMMAR.fullmatch(text)
    if match is None or (match["size"] and match["relation"]):
        raise ValueError(f"not a tinyworld caption: {text!r}")
    scene = Scene(
        layout=match["relation"] or "single",
        colour_a=match["colour_a"],
        shape_a=match["shape_a"],
        background=match["background"] or "grey",
        size=match["size"] or "",
        colour_b=match["colour_b"] or "",
        shape_b=match["shape_b"] or "",
        named=match["background"] is not None,
    )
    if not is_valid(scene):
        raise ValueError(f"not a tinyworld caption, two of its colours are the same: {text!r}")
    return scene


def is_valid(scene: Scene) -> bool:
    """Whether both objects differ in colour from the background and from each other."""
    if scene.colour_a == scene.background or scene.colour_b == scene.background:
        return False
    return scene.colour_a != scene.colour_b


def _choice(options: tuple[str, ...], rng: torch.Generator) -> str:
    return options[int(torch.randint(len(options), (), generator=rng))]


def sample_scene(rng: torch.Generator) -> Scene:
    """Draws a scene: 40 % singles, 60 % pairs, three backgrounds in four named."""
    u = torch.rand(2, generator=rng).tolist()
    named = u[1] < 0.75
    background = _choice(BACKGROUNDS, rng) if named else "grey"
    colour_a = _choice(tuple(c for c in OBJECT_COLOURS if c != background), rng)
    shape_a = _choice(SHAPES, rng)
    if u[0] < 0.4:
        return Scene("single", colour_a, shape_a, background, size=_choice(SIZES, rng), named=named)
    colour_b = _choice(tuple(c for c in OBJECT_COLOURS if c not in (background, colour_a)), rng)
    layout = _choice(LAYOUTS[1:], rng)
    return Scene(layout, colour_a, shape_a, background, colour_b=colour_b, shape_b=_choice(SHAPES, rng), named=named)


def sample_scenes(n: int, rng: torch.Generator) -> list[Scene]:
    """Draws n independent scenes."""
    return [sample_scene(rng) for _ in range(n)]


def sample_quality(n: int, rng: torch.Generator) -> torch.Tensor:
    """Draws qualities (n,) over all of [0, 1] with mean 0.45: the base model must leave room above its mean."""
    return torch.rand(n, generator=rng) ** 1.2


def break_scene(scene: Scene, rng: torch.Generator) -> Scene:
    """Returns the scene with one attribute changed, so that its picture no longer fits the caption of `scene`."""
    fields = ["colour_a", "shape_a", "background"]
    if scene.layout != "single":
        fields += ["colour_b", "shape_b", "layout"]
    if scene.size:
        fields += ["size"]
    field = _choice(tuple(fields), rng)
    if field == "layout":
        return replace(scene, layout="above" if scene.layout == "left of" else "left of")
    if field == "size":
        return replace(scene, size="small" if scene.size == "large" else "large")
    options = {"background": BACKGROUNDS, "shape_a": SHAPES, "shape_b": SHAPES}.get(field, OBJECT_COLOURS)
    changed = [replace(scene, **{field: option}) for option in options if option != getattr(scene, field)]
    changed = [s for s in changed if is_valid(s)]
    return changed[int(torch.randint(len(changed), (), generator=rng))]


def write_prompts(folder: Path, seed: int, n_train: int = 600, n_heldout: int = 512) -> None:
    """Writes train.txt and heldout.txt, one caption a line, all of them different."""
    rng = torch.Generator().manual_seed(seed)
    captions: dict[str, None] = {}
    while len(captions) < n_train + n_heldout:
        captions[caption(sample_scene(rng))] = None
    lines = list(captions)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n".join(lines[:n_train]) + "\n")
    (folder / "heldout.txt").write_text("\n".join(lines[n_train:]) + "\n")
