"""Draws the two pictures of a run: curves.png from the records, before_after.png from held-out images.

They show what was measured and how it looks in a good run; verdict.py judges it in words. The loss has no curve: that
of SPO stays near ln 2 in good runs and in bad ones.
"""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ..runtime.columns import Column, Curve, Heatmap

INK, FAINT, LINE, LIMIT = "#22262b", "#6b7280", "#1f6f8b", "#b4532a"
SHADES = colormaps["viridis"]  # of the lines of one curve
COLUMNS_OF_CURVES = 3
PLACES = "strop:places"  # the text in before_after.png that says where its pictures are


def curves(
    records: Sequence[dict], columns: Sequence[Column], path: Path | str, timesteps: Sequence[int] | None = None
) -> None:
    """Draws a run's records over its iterations into a PNG: small curves, and below them heatmaps over timesteps.

    columns: of the run's method. timesteps: the rows of heatmaps, noise first; None draws all. Thin lines are the
    values as logged; where there are enough of them, a thick line is their running mean.
    """
    drawn = [column for column in columns if isinstance(column.drawn, Curve)]
    maps = [column for column in columns if isinstance(column.drawn, Heatmap)]
    rows = -(-len(drawn) // COLUMNS_OF_CURVES)
    heights = [1.0] * rows + [1.15] * len(maps)
    figure = _figure(12, 3.05 * sum(heights))
    grid = figure.add_gridspec(len(heights), COLUMNS_OF_CURVES, height_ratios=heights, hspace=0.06, wspace=0.04)
    for index, column in enumerate(drawn):
        axes = figure.add_subplot(grid[index // COLUMNS_OF_CURVES, index % COLUMNS_OF_CURVES])
        _headline(axes, column.drawn.title, column.drawn.healthy)
        _draw(figure, axes, records, column, timesteps)
    for index, column in enumerate(maps):
        axes = figure.add_subplot(grid[rows + index, :])
        _headline(axes, column.drawn.title, column.drawn.healthy)
        _draw(figure, axes, records, column, timesteps)
    figure.savefig(path, pad_inches=0.2, bbox_inches="tight")


def curve(records: Sequence[dict], column: Column, timesteps: Sequence[int] | None = None) -> bytes:
    """Returns one curve or heatmap of `curves` as a PNG for the width of a phone, without its title."""
    figure = _figure(4, 2.6)
    _draw(figure, figure.add_subplot(), records, column, timesteps)
    png = io.BytesIO()
    figure.savefig(png, format="png", pad_inches=0.06, bbox_inches="tight", transparent=True)
    return png.getvalue()


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Returns the mean of the up to `width` measured values around each of values (N,); NaN means not measured."""
    half = width // 2
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return np.array([np.nanmean(w) if np.isfinite(w).any() else np.nan for w in windows])


def before_after(base: Tensor, tuned: Tensor, prompts: Sequence[str], path: Path | str) -> None:
    """Draws two rows of pictures into a PNG, base above tuned; column n shows prompt n from the same noise in both.

    base, tuned: (N, 3, H, W) in [-1, 1], on any device. Images are brought to 160 to 288 pixels of width so that small
    ones can be looked at. Raises ValueError if the shapes or the number of prompts differ.
    """
    if base.shape != tuned.shape or base.dim() != 4 or base.shape[1] != 3 or len(prompts) != len(base) or not prompts:
        raise ValueError(
            f"before_after needs two batches (N, 3, H, W) and N >= 1 prompts, got {tuple(base.shape)}, "
            f"{tuple(tuned.shape)} and {len(prompts)} prompts"
        )
    rows, columns, width = 2, len(base), min(max(base.shape[3], 160), 288)
    height = round(width * base.shape[2] / base.shape[3])
    gap, size = 6, max(13, width // 16)
    font, large = ImageFont.load_default(size), ImageFont.load_default(size + 4)
    side = round(large.getlength("tuned")) + 4 * gap
    captions = [_wrapped(prompt, font, width, max_lines=5) for prompt in prompts]
    text_height = max(caption.count("\n") + 1 for caption in captions) * (size + 4) + 2 * gap
    canvas = Image.new("RGB", (side + columns * (width + gap), gap + rows * (height + gap) + text_height), "white")
    draw = ImageDraw.Draw(canvas)
    for row, (label, images) in enumerate((("base", base), ("tuned", tuned))):
        top = gap + row * (height + gap)
        draw.text((side - 2 * gap, top + height // 2), label, INK, large, anchor="rm")
        for column, picture in enumerate(_pictures(images)):
            enlarged = picture.resize((width, height), Image.Resampling.BICUBIC)
            canvas.paste(enlarged, (side + column * (width + gap), top))
    for column, caption in enumerate(captions):
        corner = side + column * (width + gap), 2 * gap + rows * (height + gap)
        draw.multiline_text(corner, caption, INK, font, spacing=4)
    about = PngImagePlugin.PngInfo()
    places = {"left": side, "top": gap, "width": width, "height": height, "gap": gap, "columns": columns}
    about.add_text(PLACES, json.dumps(places))
    canvas.save(path, pnginfo=about)


class BeforeAfter(NamedTuple):
    """The two pictures of a held-out prompt, as PNG."""

    base: bytes
    tuned: bytes


def cut_apart(path: Path) -> list[BeforeAfter]:
    """Returns the pictures in a file of `before_after`, by prompt; none where it is missing or does not say where."""
    if not path.is_file():
        return []
    with Image.open(path, formats=["PNG"]) as sheet:
        sheet.load()
        if PLACES not in sheet.info:
            return []
        at = json.loads(sheet.info[PLACES])
    cuts = []
    for column in range(at["columns"]):
        left = at["left"] + column * (at["width"] + at["gap"])
        tops = (at["top"], at["top"] + at["height"] + at["gap"])
        boxes = [(left, top, left + at["width"], top + at["height"]) for top in tops]
        cuts.append(BeforeAfter(*(_png(sheet.crop(box)) for box in boxes)))
    return cuts


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, format="png")
    return file.getvalue()


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _draw(figure: Figure, axes: Axes, records: Sequence[dict], column: Column, timesteps: Sequence[int] | None) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#c5cad0")
    axes.tick_params(colors=FAINT, labelsize=9, length=0)
    if isinstance(column.drawn, Curve):
        _curve(axes, records, column)
    else:
        _heatmap(figure, axes, records, column, timesteps)


def _curve(axes: Axes, records: Sequence[dict], column: Column) -> None:
    curve = column.drawn
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    iterations = np.array([record["iteration"] for record in records])
    axes.set_xlim(iterations.min(initial=1) - 0.5, iterations.max(initial=1) + 0.5)
    lines = _lines(records, column)
    if not any(np.isfinite(values).any() for values in lines.values()):
        _say_not_measured(axes)
        return
    if curve.limit is not None:
        axes.axhline(curve.limit, color=LIMIT, linewidth=1, linestyle=(0, (4, 3)))
    for place, (label, values) in enumerate(lines.items()):
        color = LINE if len(lines) == 1 else SHADES(0.25 + 0.7 * place / len(lines))
        _line(axes, iterations, values, color, label)
    if len(lines) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=FAINT)
    if curve.percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    if curve.from_zero:
        axes.set_ylim(0, max(axes.get_ylim()[1], 0.1))
    axes.grid(axis="y", color="#e7e9ec", linewidth=0.8)


def _lines(records: Sequence[dict], column: Column) -> dict[str, np.ndarray]:
    """Returns the lines to draw of a column, (N,) by name: its values or those of each label, NaN if not measured."""
    values = [record.get(column.name) for record in records]
    if not column.labels:
        return {"": np.array(values, dtype=float)}  # None becomes NaN
    by_label = {str(label): [(each or {}).get(str(label)) for each in values] for label in column.labels}
    return {column.heading.format(label): np.array(line, dtype=float) for label, line in by_label.items()}


def _line(axes: Axes, iterations: np.ndarray, values: np.ndarray, color: object, label: str) -> None:
    """Draws values as logged, where they are finite, and a running mean where there are many."""
    finite = np.isfinite(values)
    smooth = finite.sum() >= 15
    axes.plot(iterations[finite], values[finite], color=color, linewidth=1 if smooth else 1.8, label=label,
              alpha=0.35 if smooth else 1, marker="o" if finite.sum() < 30 else None, markersize=3)  # fmt: skip
    if smooth:
        axes.plot(iterations, running_mean(values, max(3, len(values) // 12)), color=color, linewidth=2.2)


def _heatmap(
    figure: Figure, axes: Axes, records: Sequence[dict], column: Column, timesteps: Sequence[int] | None
) -> None:
    """Draws a vector over training timesteps (noise at the top) against iterations."""
    rows = [record for record in records if record.get(column.name)]
    steps = sorted({int(t) for record in rows for t in record[column.name]}, reverse=True)
    steps = steps if timesteps is None else [t for t in timesteps if t in steps]
    if not steps:
        _say_not_measured(axes)
        return
    counts = np.array([[record[column.name].get(str(t), 0) for record in rows] for t in steps], dtype=float)
    ends = np.array([record["iteration"] for record in rows], dtype=float)
    starts = np.concatenate([[ends[0] - (ends[1] - ends[0] if len(ends) > 1 else 1)], ends[:-1]])
    edges = np.concatenate([starts[:1], ends]) + 0.5  # a record covers the iterations after the one before
    mesh = axes.pcolormesh(edges, np.arange(len(steps) + 1), counts, cmap="GnBu", vmin=0, rasterized=True)
    every = -(-len(steps) // 9)
    axes.set_yticks(np.arange(len(steps))[::every] + 0.5, [str(t) for t in steps[::every]])
    axes.invert_yaxis()
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_ylabel("timestep t, noise at the top", color=FAINT, fontsize=9)
    axes.set_xlabel("iteration", color=FAINT, fontsize=9)
    bar = figure.colorbar(mesh, ax=axes, pad=0.01, aspect=14)
    bar.set_label(column.drawn.unit, color=FAINT, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=FAINT, labelsize=9, length=0)


def _headline(axes: Axes, title: str, healthy: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=INK, pad=22)
    axes.annotate(healthy, (0, 1), (0, 7), "axes fraction", "offset points", color=FAINT, fontsize=9.5)


def _say_not_measured(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not measured", ha="center", va="center", color=FAINT, transform=axes.transAxes)


def _pictures(images: Tensor) -> list[Image.Image]:
    """Converts images (N, 3, H, W) in [-1, 1] to RGB pictures; NaN becomes black."""
    pixels = ((images.detach().float().nan_to_num(-1.0).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]  # (N, H, W, 3)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int) -> str:
    """Breaks a text into at most `max_lines` lines of at most `width` pixels; an ellipsis stands for what is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > max_lines:
        lines = lines[:max_lines]
        lines[-1] += " …"
    return "\n".join(_cut(line, font, width) for line in lines)


def _cut(line: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" …")
    while len(line) > 1 and font.getlength(line + "…") > width:
        line = line[:-1]
    return line + "…"
