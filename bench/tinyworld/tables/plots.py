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
from strop.engine.report.pictures import FAINT, INK, LINE

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
    """Draws how far the quality of every ablation is from the default's, at the seeds that both have.

    The line is the interval over prompts; small dots are seeds.
    """
    rows = [(f"{changed}: {row.title}", row) for changed, group in ABLATIONS.items() for row in group]
    axes, figure = new_axes((8, 6))
    axes.axvline(0, color=FAINT, linewidth=0.8, linestyle="--", zorder=1)
    for place, (_, row) in enumerate(rows):
        less = results.against(row, DEFAULT, "quality")
        if less is None:
            continue
        axes.scatter(less.seeds, [place] * len(less.seeds), s=14, color=LINE, alpha=0.5, linewidths=0)
        axes.plot(less.interval or (less.mean, less.mean), (place, place), color=LINE, linewidth=1.6)
        axes.scatter(less.mean, place, s=50, color=LINE, edgecolors="white", zorder=3)
    axes.set_yticks(range(len(rows)), [title for title, _ in rows], color=INK)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("quality on held-out prompts, less the default's", color=INK)
    figure.savefig(path)
