"""The picture of bench/tinyworld/frontier.py: compute against quality gain, every seed a small dot beside the means."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from matplotlib.transforms import Bbox

from strop.engine.figures import FAINT, INK, LIMIT, LINE

CONTROL = ("exact", "control", "half")  # less of the same: what any saving has to beat


def plot(record: dict, path: Path) -> None:
    """record: what frontier.summarise returns. Writes a PNG."""
    figure = Figure(figsize=(9, 6), dpi=130, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = {}
    for name, variant in record["variants"].items():
        colour = FAINT if name in CONTROL else LIMIT if name.startswith("recipe") else LINE
        seeds = variant["seeds"].values()
        compute = [seed["relative"]["flop"] for seed in seeds]
        axes.scatter(compute, [seed["quality"] for seed in seeds], s=12, color=colour, alpha=0.45, linewidths=0)
        points[name] = variant["mean"]["relative"]["flop"], variant["mean"]["quality"]
        axes.scatter(*points[name], s=60, color=colour, edgecolors="white", zorder=3)
    line = sorted(points[name] for name in CONTROL if name in points)
    axes.plot(*zip(*line, strict=True), color=FAINT, linewidth=1, linestyle="--", zorder=1)
    axes.set_xlim(0, 1.12)
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("compute of the training loop, of the exact recipe's", color=INK)
    axes.set_ylabel("quality gain on held-out prompts", color=INK)
    axes.set_title("Large dots are means over seeds, small ones the seeds; dashed: fewer prompts", color=FAINT, size=10)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    label(axes, points, {name: variant["title"] for name, variant in record["variants"].items()})
    figure.savefig(path)


def label(axes: Axes, points: dict[str, tuple[float, float]], titles: dict[str, str]) -> None:
    """Writes each point's title as near to it as it finds room, with a thin line where that is not beside it."""
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in pixels.values()]
    spots = [(side, rise) for rise in (0, 16, -16, 32, -32, 48, -48, 64, -64, 80, -80) for side in (12, -12)]
    for name in sorted(points, key=lambda name: -points[name][1]):
        text = axes.annotate(titles[name], points[name], textcoords="offset pixels", color=INK, size=9, va="center")
        for side, rise in spots:
            text.set_position((side, rise))
            text.set_ha("left" if side > 0 else "right")
            box = text.get_window_extent()
            inside = axes.bbox.x0 < box.x0 and box.x1 < axes.figure.bbox.x1 and axes.bbox.y0 < box.y0
            if inside and not any(box.overlaps(other) for other in taken):
                break
        taken.append(text.get_window_extent())
        if rise:
            x, y = pixels[name]
            ends = axes.transData.inverted().transform([(x, y), (x + side, y + rise)])
            axes.plot(*ends.T, color=FAINT, linewidth=0.6, zorder=2)
