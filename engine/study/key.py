"""The key of a study: which system stands behind each image of each comparison. Raters never see it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import UserError, one_line
from ..models.model_files import read_json
from .balance import DEGRADED, Item

FORMAT = "strop-study-key/1"


@dataclass(frozen=True, slots=True)
class Key:
    """What the page does not say.

    manifest: hash of the page's manifest. seed: of all that was drawn. systems: their S names. prompts: P texts.
    questions: {id: title}. too_fast_ms: milliseconds below which an answer is too fast. images: {(prompt, system):
    file in the page's folder}; the degraded twin of a system's image stands under (prompt, DEGRADED - 1 - system).
    items: {rater: {token: Item}}.
    """

    manifest: str
    seed: int
    systems: list[str]
    prompts: list[str]
    questions: dict[str, str]
    too_fast_ms: int
    images: dict[tuple[int, int], str]
    items: dict[str, dict[str, Item]]

    def write(self, path: Path) -> None:
        """Writes the key as JSON."""
        images = [{"prompt": p, "system": s, "file": file} for (p, s), file in self.images.items()]
        items = {rater: [asdict(item) for item in items.values()] for rater, items in self.items.items()}
        plain = {name: getattr(self, name) for name in PLAIN}
        path.write_text(json.dumps({"format": FORMAT, **plain, "images": images, "items": items}, indent=1), "utf-8")

    @classmethod
    def read(cls, path: Path) -> Key:
        """Reads a key. Raises UserError where the file is none."""
        content = read_json(path, "the key of a study")
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            images = {(image["prompt"], image["system"]): image["file"] for image in content["images"]}
            plans = {rater: [Item(**item) for item in items] for rater, items in content["items"].items()}
            items = {rater: {item.token: item for item in items} for rater, items in plans.items()}
            return cls(**{name: content[name] for name in PLAIN}, images=images, items=items)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no key of a study ({one_line(error)}); expected its key.json") from None


PLAIN = ("manifest", "seed", "systems", "prompts", "questions", "too_fast_ms")


def twin(system: int) -> int:
    """The place under which the degraded twin of a system's image stands."""
    return DEGRADED - 1 - system
