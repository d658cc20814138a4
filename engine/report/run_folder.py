"""Makes the report of a run, curves.png and report.html, from the run folder alone, at any time and again.

A report holds only numbers that were measured; in place of others it says "not measured". Its sentences come from
verdict.py, its page from report/html.py, its pictures from report/pictures.py.
"""

import json
from pathlib import Path

import yaml

from ..errors import UserError, one_line
from ..runtime.metrics import finite, read_records, write_atomically
from .html import page
from .pictures import curves
from .run import Run
from .tables import closing_table


def make_report(run_dir: Path | str) -> Path:
    """Writes curves.png and report.html from the files of the run folder, and returns the path of report.html.

    Raises UserError as `read_run`.
    """
    run = read_run(run_dir)
    curves(run.records, run.columns, run.dir / "curves.png", run.t_range)
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
    summary_file, config_file = run_dir / "summary.json", run_dir / "config.yaml"
    try:
        records = finite(read_records(run_dir / "metrics.jsonl"))
        summary = finite(json.loads(summary_file.read_text(encoding="utf-8"))) if summary_file.exists() else {}
        text = config_file.read_text(encoding="utf-8") if config_file.exists() else ""
        tree = yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{summary_file}: not valid JSON ({error}); delete it to see the report without it") from None
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise UserError(f"{run_dir}: cannot be read ({one_line(error)})") from None
    if not isinstance(summary, dict):
        raise UserError(f"{summary_file}: found {type(summary).__name__}, expected an object")
    if text and not isinstance(tree, dict):
        raise UserError(f"{config_file}: found {type(tree).__name__}, expected sections such as `model:` and `run:`")
    return Run(run_dir, records, summary, text)


def write_summary(run_dir: Path | str, summary: dict) -> Path:
    """Writes summary.json whole or not at all; NaN and infinity become null. Returns its path."""
    path = Path(run_dir) / "summary.json"
    write_atomically(path, json.dumps(finite(summary), indent=2, allow_nan=False) + "\n")
    return path


def close_run(run_dir: Path, summary: dict) -> None:
    """Writes summary.json and the report of a finished run, and prints its closing table."""
    write_summary(run_dir, summary)
    make_report(run_dir)
    print(f"\n{closing_table(summary)}")
