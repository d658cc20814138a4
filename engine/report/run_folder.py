"""The report of a run: curves.png and report.html, made from the run folder alone, at any time and again.

A report holds only numbers that were measured; the others read "not measured".
What they say is verdict.py's, the page is report/html.py's, the pictures are report/pictures.py's.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ..errors import UserError
from ..runtime.metrics import finite, read_records, write_atomically
from .html import page
from .pictures import curves


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder as read: records of metrics.jsonl; {} for a summary.json not yet written, "" for no config.yaml."""

    dir: Path
    records: list[dict]
    summary: dict
    config: str

    @property
    def t_range(self) -> tuple[int, int]:
        """Lowest and highest timestep that is judged, all when the configuration does not say."""
        low, high = ((yaml.safe_load(self.config) or {}).get("rollout") or {}).get("t_range", (0, 999))
        return low, high


def make_report(run_dir: Path | str) -> Path:
    """Write curves.png and report.html from what lies in the run folder, and return the path of report.html.

    UserError as `read_run`.
    """
    run = read_run(run_dir)
    curves(run.records, run.dir / "curves.png", run.t_range)
    write_atomically(run.dir / "report.html", page(run.dir, run.records, run.summary, run.config))
    return run.dir / "report.html"


def read_run(run_dir: Path | str) -> Run:
    """Read a run folder. Only metrics.jsonl must be there; its last line may be cut off, as a killed run leaves it.

    UserError, in one sentence, when the folder or metrics.jsonl is missing, or when a file in it is broken.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: there is no such run folder")
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir}: there is no metrics.jsonl, so this is not the folder of a run that has begun")
    summary, config = run_dir / "summary.json", run_dir / "config.yaml"
    try:
        records = finite(read_records(run_dir / "metrics.jsonl"))
        found = finite(json.loads(summary.read_text(encoding="utf-8"))) if summary.exists() else {}
        text = config.read_text(encoding="utf-8") if config.exists() else ""
        tree = yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{summary}: not valid JSON ({error}); delete it to see the report without it") from None
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise UserError(f"{run_dir}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(found, dict):
        raise UserError(f"{summary}: found {type(found).__name__}, expected an object")
    if text and not isinstance(tree, dict):
        raise UserError(f"{config}: found {type(tree).__name__}, expected sections such as `model:` and `run:`")
    return Run(run_dir, records, found, text)


def write_summary(run_dir: Path | str, summary: dict) -> Path:
    """Write summary.json whole or not at all; NaN and infinity become null. Returns its path."""
    path = Path(run_dir) / "summary.json"
    write_atomically(path, json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")
    return path


def paired_delta(base: Tensor | Sequence[float], tuned: Tensor | Sequence[float]) -> dict:
    """Means of base (N,) and tuned (N,), their difference and its 95% interval; entry n of both is one prompt.

    With d = tuned - base: delta = mean(d), ci95 = delta -+ 1.96 * sd(d) / sqrt(N), sd with N - 1 in the denominator
    (normal approximation). One pair alone has no interval: ci95 is None. ValueError unless both are (N,) with N >= 1.
    """
    base, tuned = (torch.as_tensor(scores).detach().to("cpu", torch.float64) for scores in (base, tuned))
    if base.shape != tuned.shape or base.dim() != 1 or not len(base):
        raise ValueError(f"paired scores need one shape (N,), N >= 1, got {tuple(base.shape)} and {tuple(tuned.shape)}")
    difference = tuned - base
    delta = difference.mean().item()
    interval = None
    if len(base) > 1:
        half = 1.96 * difference.std().item() / math.sqrt(len(base))
        interval = [delta - half, delta + half]
    return {"base": base.mean().item(), "tuned": tuned.mean().item(), "delta": delta, "ci95": interval}
