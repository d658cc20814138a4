"""Makes the paper's tables at laptop scale: `python -m strop.bench.tinyworld.tables`.

It is run from the root of the repository, takes hours, and goes on where it was cut: every finished cell is kept in
bench/results/tables/. `--quick` makes a small version beside its runs: one seed, a seventh of the budget, no search,
few prompts, and of the ablations one next state alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path

import torch
from diffusers.utils.logging import disable_progress_bar

from strop.bench.tinyworld.runs import ROOT, run_all
from strop.bench.tinyworld.tables import cells, counting, page, plots, search
from strop.bench.tinyworld.tables.cells import Study
from strop.bench.tinyworld.tables.examination import Examination
from strop.bench.tinyworld.tables.results import Results
from strop.bench.tinyworld.tables.rows import ABLATED, ABLATIONS, METHODS, SEEDS, Row
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.models.base_model import quiet_libraries
from strop.engine.runtime.lock import lock

ROWS = {row.name: row for row in (*METHODS, *ABLATED)}
QUICK_ROWS = (*(row for row in METHODS if not row.changes), ABLATIONS["next state (random)"][0])
Task = Callable[[], Path]


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Makes the missing cells, then the page and its plots of all cells that are there."""
    args = arguments(argv)
    quiet_libraries()
    disable_progress_bar()
    torch.set_num_threads(1)
    if args.count:
        for name in args.only or ROWS:
            tflop = counting.tflop(ROWS[name])
            print(f"{name}: {counting.iterations(tflop)} iterations of {tflop:.3f} TFLOP", flush=True)
        return
    study, target, seeds, jobs = plan(args)
    rows = [ROWS[name] for name in args.only or ([row.name for row in QUICK_ROWS] if args.quick else ROWS)]
    if not args.page:
        study.runs.mkdir(parents=True, exist_ok=True)
        with lock(study.runs):
            make_cells(rows, seeds, study, jobs)
    print(write_page(study, target, seeds))


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.tinyworld.tables", description=main.__doc__)
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"rows to make, of {', '.join(ROWS)}")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help=f"of the training (default: {SEEDS})")
    parser.add_argument("--jobs", type=int, help="runs at once, each on one thread (default: 1, with --quick 2)")
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/tables, or runs/tables_quick)")
    parser.add_argument("--cells", type=Path, help="folder of the cells (default: bench/results/tables)")
    parser.add_argument("--quick", action="store_true", help="a small version in minutes, which keeps to --out")
    parser.add_argument("--page", action="store_true", help="run nothing: write the page of the cells that are there")
    parser.add_argument("--count", action="store_true", help="run nothing: count what an iteration of the rows costs")
    args = parser.parse_args(argv)
    if args.jobs is not None and args.jobs < 1:
        raise UserError(f"--jobs: found {args.jobs}, expected 1 or more")
    return args


def plan(args: argparse.Namespace) -> tuple[Study, Path, Sequence[int], int]:
    """Returns the study, the page's file, the seeds, and the runs at once."""
    if args.quick:
        out = args.out or Path("runs/tables_quick")
        study = Study(args.cells or out / "cells", out, share=1 / 7, prompts=32, inner=8, tasks=2, searched=False)
        return study, out / "tables.md", args.seeds or SEEDS[:1], args.jobs or 2
    study = Study(args.cells or ROOT / "bench" / "results" / "tables", args.out or Path("runs/tables"))
    return study, ROOT / "docs" / "tables.md", args.seeds or SEEDS, args.jobs or 1


def make_cells(rows: Sequence[Row], seeds: Sequence[int], study: Study, jobs: int) -> None:
    """Runs the search for the methods among the rows, then seed by seed all rows; what is finished is left alone."""
    for row in rows:
        if not row.iterations:
            print(f"{row.name}: left out, because its cost has not been counted (--count)", flush=True)
    rows = [row for row in rows if row.iterations]
    examination = cache(lambda: Examination(cells.heldout(study)))
    of_search = cache(lambda: Examination(search.prompts()))
    measure = partial(cells.along, examination, study)
    cells.measure_base(examination, study)
    if study.searched:
        search.measure_base(of_search, study)
        while tasks := list(search_tasks([row for row in rows if row in METHODS], measure, of_search, study)):
            run_all(tasks, jobs)
    tuned = [search.tuned(row, study) if row in METHODS else row for row in rows]
    own = [row for row in rows if row in ABLATED and row not in tuned]  # the ablations' default keeps its own rate
    todo = [(row, seed) for seed in seeds for row in (*tuned, *own) if cells.read(row, seed, study) is None]
    run_all([partial(cells.make, row, seed, study, measure) for row, seed in todo], jobs)


def search_tasks(
    rows: Sequence[Row], measure: cells.Measure, examination: Callable[[], Examination], study: Study
) -> Iterator[Task]:
    """Yields the next run of the search of each row whose search is not over."""

    def both(row: Row, run: Path) -> dict:
        return measure(row, run) | search.at_the_end(examination, run)

    for row in rows:
        lr = search.missing(row, study)
        if lr is not None:
            yield partial(cells.make, search.tried(row, lr), SEEDS[0], study, both)


def write_page(study: Study, target: Path, seeds: Sequence[int]) -> Path:
    """Writes the page and its plots of the finished cells; returns its path."""
    results, text = page_of(study, target, seeds)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    plots.curves(results, known(study), study.inner, target.with_name(f"{target.stem}_curves.png"))
    plots.ablations(results, target.with_name(f"{target.stem}_ablations.png"))
    return target


def page_of(study: Study, target: Path, seeds: Sequence[int]) -> tuple[Results, str]:
    """Returns the finished cells and the page of them."""
    every = {row.name: row for row in (*ABLATED, *known(study))}
    found = {name: {seed: cells.read(row, seed, study) for seed in seeds} for name, row in every.items()}
    finished = {name: {seed: cell for seed, cell in by.items() if cell} for name, by in found.items()}
    results = Results(cells.base(study), finished)
    return results, page.write(results, study, target)


def known(study: Study) -> list[Row]:
    """Returns the methods whose cost is counted, at the chosen rate or, before the search, at their recipe's."""
    return [search.tuned(row, study) or row for row in METHODS if row.iterations]


if __name__ == "__main__":
    main()
