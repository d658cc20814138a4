"""Columns: what a method reports, each quantity described in one place.

metrics.jsonl, TensorBoard, the lines on the terminal, the curves and the verdict of a report are all made from these
descriptions, so that a new quantity is one line in its method's columns and one value in what the method returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .signs import ends_above, ends_with_some, grows, spikes

SHORT = 5  # iterations; of a run with fewer nothing is concluded


@dataclass(frozen=True, slots=True)
class Curve:
    """How a quantity is drawn over the iterations; of a vector, a line for each of its labels.

    healthy: in words, how the curve of a good run looks. limit: a level drawn as a line. percent: values lie in [0, 1]
    and are shown in per cent. from_zero: the axis begins at 0.
    """

    title: str
    healthy: str
    limit: float | None = None
    percent: bool = False
    from_zero: bool = False


@dataclass(frozen=True, slots=True)
class Heatmap:
    """How a vector over timesteps is drawn: timesteps (noise at the top) against iterations."""

    title: str
    healthy: str
    unit: str


@dataclass(frozen=True, slots=True)
class Sign:
    """Something that the verdict looks for in the course of a quantity, and the sentence that says it was found.

    check: takes the logged values in order, (N,) with N >= 1, or by label where there are labels, {label: (N,)}; those
    not measured are left out. It returns what {} in `text` stands for, or None where there is nothing to say; signs.py
    has such checks. after: iterations before which it is not asked. normal: whether good runs may show it too; it is
    then told and explained, but is no warning.
    """

    check: Callable[[Any], float | str | None]
    text: str
    after: int = 0
    normal: bool = False


@dataclass(frozen=True, slots=True)
class Trend:
    """Which way a quantity is to go while training; the verdict says whether it went there beyond chance.

    It warns where the quantity went the other way, also after its middle. name: in the sentence.
    """

    name: str
    better: Literal["up", "down"]


@dataclass(frozen=True, slots=True)
class Column:
    """A quantity that a method reports.

    name: in metrics.jsonl and TensorBoard. kind: weighted `mean` of the values added since the last record, their
    `sum`, or the `total`, their sum since the run began. labels: of a vector, the keys of its values. heading, form: on
    the terminal, which leaves out a column with an empty form. not_drawn: why a quantity that a reader expects has no
    curve. signs, trend: what the verdict looks for; they check what the curve's `healthy` says.
    """

    name: str
    kind: Literal["mean", "sum", "total"] = "mean"
    labels: Sequence[int | str] = ()
    heading: str = ""
    form: str = ""
    drawn: Curve | Heatmap | None = None
    not_drawn: str = ""
    signs: tuple[Sign, ...] = ()
    trend: Trend | None = None


PROMPTS = Column("prompts", "total")
GRAD_NORM = Column(
    "grad_norm",
    heading="grad norm",
    form="{:.3g}",
    drawn=Curve("Gradient norm", "healthy: well below 100, no growth, no repeated spikes", from_zero=True),
    signs=(
        Sign(
            ends_above(100.0),
            "The gradient norm is {:,.0f} at the end, far above that of a healthy run: try a smaller optim.lr.",
        ),
        Sign(
            grows(4.0),
            "The gradient norm has grown, to {:,.1f} times what it was: the training may be about to diverge; try a "
            "smaller optim.lr.",
        ),
        Sign(
            spikes(5.0, 0.02),
            "The gradient norm has {} spikes of more than five times its level: try a smaller optim.lr, or "
            "optim.max_grad_norm if it is null.",
        ),
    ),
)
LEFT_OUT = Column(
    "left_out",
    "total",
    signs=(
        Sign(
            ends_with_some,
            "{:,} micro-batches were left out, because their loss was NaN or infinite: try a smaller optim.lr, or a "
            "model.dtype of more range.",
        ),
    ),
)
UNSCORED = Column(
    "unscored",
    "total",
    signs=(
        Sign(
            ends_with_some,
            "{:,} possible pairs have a score that is NaN or infinite and were not trained on: look at the judge, or "
            "try a model.dtype of more range.",
        ),
    ),
)
