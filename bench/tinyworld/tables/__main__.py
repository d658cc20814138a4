"""Makes the paper's tables at laptop scale: `python -m strop.bench.tinyworld.tables`.

It is run from the root of the repository, takes hours, and goes on where it was cut: every finished cell is kept in
bench/results/tables/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from strop.bench.tinyworld.runs import ROOT, run_all
from strop.bench.tinyworld.tables import cells
from strop.bench.tinyworld.tables.examination import Examination
from strop.bench.tinyworld.tables.rows import ABLATED, SEEDS
from strop.engine.errors import exit_on_user_error
from strop.engine.models.base_model import quiet_libraries

ROWS = {row.name: row for row in ABLATED}


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Makes the missing cells."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.tinyworld.tables", description=main.__doc__)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=tuple(ROWS), metavar="ROW", help="rows to make")
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS, metavar="SEED", help="of the training")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on one thread")
    parser.add_argument("--out", type=Path, default=Path("runs/tables"), help="folder of the runs")
    parser.add_argument("--cells", type=Path, default=ROOT / "bench" / "results" / "tables", help="folder of the cells")
    args = parser.parse_args(argv)
    quiet_libraries()
    torch.set_num_threads(1)
    study = cells.Study(args.cells, args.out)
    rows = [row for row in ROWS.values() if row.name in args.only]
    missing = [(row, seed) for seed in args.seeds for row in rows if cells.read(row, seed, study) is None]
    examination = Examination(cells.heldout(study))
    cells.base(examination, study)
    measure = partial(cells.along, examination, study)
    run_all([partial(cells.make, row, seed, study, measure) for row, seed in missing], args.jobs)


if __name__ == "__main__":
    main()
