"""Draws the picture of bench/tinyworld/frontier.py: compute against quality gain, seeds as small dots beside means."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox

from strop.engine.report.pictures import FAINT, INK, LIMIT, LINE

Point = tuple[float, float]
CONTROL = ("control", "half")  # less of the same: what any saving has to beat


def plot(record: dict, path: Path) -> None:
    """Draws the record of frontier.summarise into a PNG."""
    axes, figure = new_axes((9, 6))
    place = lambda row: (row["relative"]["flop"], row["quality"])
    points = {name: place(variant["mean"]) for name, variant in record["variants"].items()}
    seeds = []
    for name, variant in record["variants"].items():
        colour = FAINT if name in ("exact", *CONTROL) else LIMIT if "recipe" in name else LINE
        dots = [place(row) for row in variant["seeds"].values()]
        axes.scatter(*zip(*dots, strict=True), s=12, color=colour, alpha=0.45, linewidths=0)
        axes.scatter(*points[name], s=60, color=colour, edgecolors="white", zorder=3)
        seeds += dots
    for name in CONTROL:
        if name in points:
            ends = zip(points[name], points["exact"], strict=True)
            axes.plot(*ends, color=FAINT, linewidth=1, linestyle="--", zorder=1)
    axes.set_xlim(0, 1.12)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("compute of rollouts and updates, relative to the exact recipe", color=INK)
    axes.set_ylabel("quality gain on held-out prompts", color=INK)
    caption = "Large dots are means over seeds, small ones the seeds; dashed: less of the same"
    axes.set_title(caption, color=FAINT, size=10)
    figure.canvas.draw()
    label(axes, points, {name: titled(variant) for name, variant in record["variants"].items()}, seeds)
    figure.savefig(path)


def new_axes(size: tuple[float, float]) -> tuple[Axes, Figure]:
    """Returns empty axes over a thin grid, and the figure of this size in inches that they fill."""
    figure = Figure(figsize=size, dpi=130, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    return axes, figure


def titled(variant: dict) -> str:
    """Returns a variant's title, which says so where there is only one seed."""
    return variant["title"] + (" (one seed)" if len(variant["seeds"]) == 1 else "")


def label(axes: Axes, points: dict[str, Point], titles: dict[str, str], others: Sequence[Point] = ()) -> None:
    """Writes each point's title where there is room near it, with a thin line to a title that is not beside it.

    others: points without a title, over which nothing is written.
    """
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in pixels.values()]
    taken += [Bbox.from_bounds(x - 3, y - 3, 6, 6) for x, y in map(axes.transData.transform, others)]
    spots = [(side, rise) for rise in (0, 16, -16, 32, -32, 48, -48, 64, -64, 80, -80) for side in (14, -14)]

    def crowding(box: Bbox) -> tuple[bool, int]:
        inside = axes.bbox.x0 < box.x0 and box.x1 < axes.figure.bbox.x1 and axes.bbox.y0 < box.y0
        return not inside, sum(map(box.overlaps, taken))

    for name in sorted(points, key=lambda name: -points[name][1]):
        text = axes.annotate(titles[name], points[name], (0, 0), textcoords="offset pixels", color=INK, size=9)
        text.set(va="center", path_effects=[withStroke(linewidth=3, foreground="white")])
        boxes = {spot: placed(text, *spot) for spot in spots}
        side, rise = min(spots, key=lambda spot: crowding(boxes[spot]))
        taken.append(placed(text, side, rise))
        if rise:
            x, y = pixels[name]
            ends = axes.transData.inverted().transform([(x, y), (x + side, y + rise)])
            axes.plot(*ends.T, color=FAINT, linewidth=0.6, zorder=2)


def placed(text: Annotation, side: int, rise: int) -> Bbox:
    """Puts a text so many pixels beside and above its point, and returns the box that it then takes."""
    text.set_position((side, rise))
    text.set_ha("left" if side > 0 else "right")
    return text.get_window_extent()
