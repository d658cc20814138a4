"""Draws the tables' pictures: quality against compute by method, and every ablation with its interval."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.ticker import PercentFormatter

from strop.bench.tinyworld.frontier_plot import new_axes
from strop.bench.tinyworld.tables.results import Results
from strop.bench.tinyworld.tables.rows import ABLATIONS, DEFAULT, Row
from strop.engine.report.pictures import FAINT, INK, LIMIT, LINE

QUALITY = "gain in quality on held-out prompts"


def curves(results: Results, methods: Sequence[Row], prompts: int, path: Path) -> None:
    """Draws the gain in quality against the share of the budget: means over seeds thick, the seeds thin."""
    axes, figure = new_axes((8, 5))
    colours = colormaps["tab10"].colors
    for row, colour in zip(methods, colours, strict=False):
        seeds = results.curves(row, "quality", prompts)
        if not seeds:
            continue
        for points in seeds:
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=0.8, alpha=0.4)
        thick = np.mean(np.array(seeds), axis=0)
        axes.plot(*thick.T, color=colour, linewidth=2.2, marker="o", markersize=4, label=row.title)
    if axes.lines:
        axes.legend(frameon=False)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("compute, share of the budget", color=INK)
    axes.set_ylabel(f"{QUALITY} (first {prompts})", color=INK)
    figure.savefig(path)


def ablations(results: Results, path: Path) -> None:
    """Draws the gain in quality of every ablation: the mean with its interval over prompts, the seeds as small dots."""
    rows = [("default", DEFAULT)]
    rows += [(f"{changed}: {row.title}", row) for changed, group in ABLATIONS.items() for row in group]
    axes, figure = new_axes((8, 6))
    for place, (_, row) in enumerate(rows):
        gain = results.gain(row, "quality")
        if gain is None:
            continue
        colour = LIMIT if row is DEFAULT else LINE
        axes.scatter(gain.seeds, [place] * len(gain.seeds), s=14, color=colour, alpha=0.5, linewidths=0)
        axes.plot(gain.interval or (gain.mean, gain.mean), (place, place), color=colour, linewidth=1.6)
        axes.scatter(gain.mean, place, s=50, color=colour, edgecolors="white", zorder=3)
        if row is DEFAULT:
            axes.axvline(gain.mean, color=FAINT, linewidth=0.8, linestyle="--", zorder=1)
    axes.set_yticks(range(len(rows)), [title for title, _ in rows], color=INK)
    axes.invert_yaxis()
    axes.set_xlabel(QUALITY, color=INK)
    figure.savefig(path)
