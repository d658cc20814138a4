"""The rows of the table of agreement: how an error is measured, what is tolerated, how it is printed. See parity.py."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from conftest import part
from torch import Tensor

HEAD = ("case", "what", "values", "against float32", "against float64", "tolerance")


def absolute(found: Tensor, expected: Tensor) -> float:
    return (found.double() - expected.double()).abs().max().item()


def relative(found: Tensor, expected: Tensor) -> float:
    """2-norm of the difference over that of `expected`."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def differing(found: Tensor, expected: Tensor) -> float:
    return float((found != expected).sum())


@dataclass(frozen=True)
class Tolerance:
    """The largest error against the published code; `f32`: against its float32 run, where that has an error of its own
    as large as the limit."""

    measure: Callable[[Tensor, Tensor], float]
    limit: float
    f32: float | None = None

    def __str__(self) -> str:
        if self.measure is differing:
            return "none differs"
        return f"{self.limit:g} {self.measure.__name__}" + (f", float32 {self.f32:g}" if self.f32 else "")


EXACT = Tolerance(differing, 0)
LATENTS = Tolerance(absolute, 4e-5)  # at values up to 60
# After 20 steps, at values up to 60 and 152. Every kind of CPU rounds convolutions in its way: to 6.5e-5 and 6.0e-4.
ROLLED_OUT, ROLLOUT_SCORES = Tolerance(absolute, 1e-4), Tolerance(absolute, 1e-3)
ENCODINGS = Tolerance(absolute, 2e-6)
SCORERS = Tolerance(relative, 1e-5)  # PickScore times 100 a cosine, its float32 1e-6 from its float64
SCORES = Tolerance(absolute, 1e-5)  # seen to 6.3e-6
FEATURES = LOSS = LOG_PROBS = Tolerance(absolute, 5e-6)
GRADIENTS = Tolerance(relative, 2e-5)
STEP_GRADIENTS = Tolerance(relative, 6e-5)  # two float32 runs, each 1e-5 to 3e-5 from float64
SCALE_GRADIENT = Tolerance(relative, 2e-4)  # a sum of terms that nearly cancel
HALF = Tolerance(relative, 1e-3)  # a float16 may round to its neighbour


@dataclass
class Row:
    """One quantity of one case: the largest error over its tensors, None against what was not recorded."""

    case: str
    what: str
    tolerance: Tolerance
    values: int = 0
    f32: float | None = None
    f64: float | None = None

    def agrees(self) -> bool:
        errors = ((self.f32, self.tolerance.f32 or self.tolerance.limit), (self.f64, self.tolerance.limit))
        return all(error is None or error <= limit for error, limit in errors)

    def cells(self) -> tuple[str, ...]:
        """As the table has them, under HEAD."""
        errors = ["" if e is None else f"{e:.1e}" if e % 1 else f"{e:g}" for e in (self.f32, self.f64)]
        mark = "" if self.agrees() else " **exceeded**"
        return (self.case, self.what, str(self.values), *errors, f"{self.tolerance}{mark}")


class Rows(dict[tuple[str, str], Row]):
    """Row by (case, what), in the order in which they were first seen."""

    def see(
        self, case: str, what: str, tolerance: Tolerance, found: Tensor, f32: Tensor | None, f64: Tensor | None = None
    ) -> None:
        """Takes one more tensor into a row. A shape that is not the published one is an infinite error."""
        row = self.setdefault((case, what), Row(case, what, tolerance))
        row.values += found.numel()
        for name, expected in (("f32", f32), ("f64", f64)):
            if expected is not None:
                alike = found.shape == expected.shape
                error = tolerance.measure(found.detach(), expected) if alike else float("inf")
                setattr(row, name, max(error, getattr(row, name) or 0.0))


def both(tensors: dict[str, Tensor], key: str, f32: str = "f32", f64: str = "f64") -> Callable[[str], tuple]:
    """name -> (published in float32, published in float64 or None), of what lies under `key`."""
    narrow, wide = part(tensors, f"{f32}/{key}"), part(tensors, f"{f64}/{key}")
    return lambda name: (narrow[name], wide.get(name))


def markdown(rows: Iterable[Row]) -> str:
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
