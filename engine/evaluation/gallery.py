"""Makes gallery.html: one offline file with the tables and the images of some prompts, side by side for all systems.

Images are embedded as WebP of at most SIDE pixels, so that the page of thousands of prompts stays small: it shows the
prompts whose scores fell and rose most, and a sample that does not depend on any score.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from ..data.image_files import read_image
from .images import Images
from .result_text import HEADER, blocks, note, number
from .results import Scores

LIMIT, SAMPLE = 60, 12  # prompts shown, and how many of them are the sample
SIDE, SMALL = 512, 128  # pixels: the longest embedded side; up to SMALL without loss
HERE = Path(__file__).parent


def gallery(results: Mapping, table: Scores, prompts: Sequence[str], images: Images) -> str:
    """Returns the page. table: the scores by which prompts are chosen and sorted; of several images the first."""
    systems = list(results["systems"])
    shown = chosen(table, len(prompts))
    rows = [
        {
            "number": n,
            "prompt": prompts[n],
            "images": [_embedded(images.file(system, n, 0)) for system in systems],
            "values": {name: [by[system][n].mean().item() for system in systems] for name, by in table.items()},
        }
        for n in shown
    ]
    data = json.dumps({"systems": systems, "scores": list(table), "prompts": rows}, ensure_ascii=False)
    sample = (
        f"{len(shown)} of {len(prompts):,} prompts: those that fell and rose most, and {SAMPLE} evenly spaced ones."
    )
    if len(shown) == len(prompts):
        sample = f"All {len(prompts)} prompts."
    style, script = ((HERE / f"gallery.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    findings = "".join(f"<li>{escape(sentence)}</li>" for sentence in results["verdict"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>strop evaluate: {escape(', '.join(systems))}</title><style>{style}</style></head>\n<body><main>\n"
        f"<header><p>strop evaluate, protocol {escape(results['protocol_text'])}</p>"
        f"<h1>{escape(', '.join(systems[1:]))} against the base</h1><ul>{findings}</ul></header>\n"
        f'<section class="tables">{_tables(results)}</section><p class="note">{escape(note(results))}</p>\n'
        f'<section><h2>Images</h2><p class="note">{sample} A click enlarges.</p><form id="sort"></form>'
        f'<div id="rows"></div></section>\n</main><dialog id="zoom"></dialog>\n'
        f'<script type="application/json" id="data">{data.replace("<", chr(92) + "u003c")}</script>\n'
        f"<script>{script}</script></body></html>\n"
    )


def chosen(table: Scores, prompts: int) -> list[int]:
    """Returns at most LIMIT prompt numbers in order: an even sample, and of each score and system the extremes."""
    if prompts <= LIMIT:
        return list(range(prompts))
    numbers = {round(i * (prompts - 1) / (SAMPLE - 1)) for i in range(SAMPLE)}
    changes = []
    for by_system in table.values():
        base, *others = (values.mean(1) for values in by_system.values())
        changes += [(tuned - base).argsort(stable=True).tolist() for tuned in others]
    for place in range(prompts):  # the worst and the best of each, then the second worst and best, ...
        for order in changes:
            for number_ in (order[place], order[-1 - place]):
                if len(numbers) >= LIMIT:
                    return sorted(numbers)
                numbers.add(number_)
    return sorted(numbers)


def _tables(results: Mapping) -> str:
    """Returns a table for each score, and the published rows; a long name may break after a sign, a range may not."""
    tables = "".join(_table((name, *HEADER[1:]), rows) for name, rows in blocks(results))
    if published := results.get("published"):
        rows = [(row[0], *map(number, row[1:])) for row in published["rows"]]
        tables += _table(("published", *published["columns"]), rows, published["source"])
    return tables


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    head = "".join(f"<th>{escape(label)}</th>" for label in header)
    body = ""
    for name, *cells in rows:
        breakable = re.sub(r"([@_+-])", r"\1<wbr>", escape(name))
        unbroken = "".join(f"<td>{escape(cell).replace('-', '&#8209;')}</td>" for cell in cells)
        body += f"<tr><td>{breakable}</td>{unbroken}</tr>"
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<div><table>{top}<tr>{head}</tr>{body}</table></div>"


def _embedded(file: Path) -> str:
    image, out = read_image(file), io.BytesIO()
    lossless = max(image.size) <= SMALL
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    image.save(out, "WEBP", lossless=lossless, quality=80)
    return f"data:image/webp;base64,{base64.b64encode(out.getvalue()).decode()}"
