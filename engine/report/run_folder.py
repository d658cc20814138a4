"""Makes the report of a run, curves.png and report.html, from the run folder alone, at any time and again.

A report holds only numbers that were measured; in place of others it says "not measured". Its sentences come from
verdict.py, its page from report/html.py, its pictures from report/pictures.py.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from torch import Tensor

from ..data.json_lines import read_objects
from ..errors import UserError, one_line
from ..models.model_files import read_json
from ..runtime.files import write_atomically
from ..runtime.metrics import finite, read_records
from .html import page
from .pictures import curves
from .run import Run
from .tables import closing_table
from .verdict import verdict


def make_report(run_dir: Path | str) -> Path:
    """Writes curves.png and report.html from the files of the run folder, and returns the path of report.html.

    Raises UserError as `read_run`.
    """
    run = read_run(run_dir)
    curves(run.records, run.columns, run.dir / "curves.png", run.judged_timesteps)
    write_atomically(run.dir / "report.html", page(run))
    return run.dir / "report.html"


def read_run(run_dir: Path | str) -> Run:
    """Reads a run folder. Only metrics.jsonl must be there; its last line may be cut off, as a killed run leaves it.

    Raises UserError if the folder or metrics.jsonl is missing, or if a file in it is broken.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: found no such folder, expected a run folder")
    if not (run_dir / "metrics.jsonl").is_file():
        raise UserError(f"{run_dir}: there is no metrics.jsonl, expected the folder of a run that has begun")
    config_file = run_dir / "config.yaml"
    try:
        records = finite(read_records(run_dir / "metrics.jsonl"))
        text = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
        tree = yaml.safe_load(text)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise UserError(f"{run_dir}: cannot be read ({one_line(error)})") from None
    if text and not isinstance(tree, dict):
        raise UserError(f"{config_file}: found {type(tree).__name__}, expected sections such as `model:` and `run:`")
    file, heldout = run_dir / "summary.json", run_dir / "heldout.jsonl"
    summary = read_json(file, "report") if file.exists() else {}
    expected = "the scores of held-out prompts; delete it to see the report without it"
    prompts = [row for _, row in read_objects(heldout, str(heldout), expected)] if heldout.exists() else []
    return Run(run_dir, records, finite(summary), text, finite(prompts))


def write_summary(run_dir: Path | str, summary: dict) -> Path:
    """Writes summary.json whole or not at all; NaN and infinity become null. Returns its path."""
    path = Path(run_dir) / "summary.json"
    write_atomically(path, json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")
    return path


def write_heldout(
    run_dir: Path | str, prompts: Sequence[str], base: Mapping[str, Tensor], tuned: Mapping[str, Tensor]
) -> None:
    """Writes heldout.jsonl, a line for each of N held-out prompts with its scores under the base and the tuned model.

    base, tuned: scores (N,) by name, in the order of the prompts.
    """
    lines = []
    for row, prompt in enumerate(prompts):
        scores = {name: {"base": base[name][row].item(), "tuned": tuned[name][row].item()} for name in base}
        lines.append(json.dumps(finite({"prompt": prompt, "scores": scores}), ensure_ascii=False) + "\n")
    write_atomically(Path(run_dir) / "heldout.jsonl", "".join(lines))


def close_run(run_dir: Path, summary: dict) -> None:
    """Writes summary.json and the report of a finished run, and prints its closing table and its verdict."""
    write_summary(run_dir, summary)
    make_report(run_dir)
    run = read_run(run_dir)
    print(f"\n{closing_table(run)}\n\n{said(run)}")


def said(run: Run) -> str:
    """Returns the headline of a run's verdict for the terminal, in lines of at most 80 columns."""
    return textwrap.fill(verdict(run).headline, 80)
