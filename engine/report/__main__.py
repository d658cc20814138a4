"""Remakes the report of a run: `python -m strop.engine.report RUN_DIR`."""

import argparse
from collections.abc import Sequence

from ..errors import exit_on_user_error
from ..user_files import user_path
from .run_folder import make_report, read_run, said
from .tables import closing_table


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Remakes curves.png and report.html of a run, finished or not, and prints its closing table and verdict."""
    parser = argparse.ArgumentParser(prog="python -m strop.engine.report", description=main.__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=user_path, help="folder of a run")
    path = make_report(parser.parse_args(argv).run_dir)
    run = read_run(path.parent)
    if run.summary:
        print(f"{closing_table(run)}\n")
    print(f"{path} is new\n\n{said(run)}")


if __name__ == "__main__":
    main()
