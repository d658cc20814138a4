"""Columns: what a method reports, each quantity described in one place.

metrics.jsonl, TensorBoard, the lines on the terminal, the curves and the verdict of a report are all made from these
descriptions, so that a new quantity is one line in its method's columns and one value in what the method returns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


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
    """A sign of trouble: at the end of a run (the last fifth of its records), `when` holds for the mean of a quantity.

    text: the sentence, in which {} stands for that mean. after: iterations before which it means nothing.
    """

    when: Callable[[float], bool]
    text: str
    after: int = 0


@dataclass(frozen=True, slots=True)
class Column:
    """A quantity that a method reports.

    name: in metrics.jsonl and TensorBoard. kind: weighted `mean` of the values added since the last record, their
    `sum`, or the `total`, their sum since the run began. labels: of a vector, the keys of its values. heading, form: on
    the terminal, which leaves out a column with an empty form. not_drawn: why a quantity that a reader expects has no
    curve. trend: its name in the sentence of the verdict that says whether it rose.
    """

    name: str
    kind: Literal["mean", "sum", "total"] = "mean"
    labels: Sequence[int | str] = ()
    heading: str = ""
    form: str = ""
    drawn: Curve | Heatmap | None = None
    not_drawn: str = ""
    signs: tuple[Sign, ...] = ()
    trend: str = ""


PROMPTS = Column("prompts", "total")
GRAD_NORM = Column(
    "grad_norm",
    heading="grad norm",
    form="{:.3g}",
    drawn=Curve("Gradient norm", "healthy: no growth, no repeated spikes", from_zero=True),
)
