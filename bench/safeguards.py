"""Measures what the safeguards of a run cost: `python -m strop.bench.safeguards [key=value ...]`.

It is run from the root of the repository. In a run of tinyworld's recipe, shortened to six iterations, the time within
each safeguard is summed, and divided by that of the loop. On a CPU nothing runs beside the host, so the shares are
whole; on a GPU the gate's kernels would be missing in them.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from pathlib import Path
from unittest.mock import patch

from strop.engine import training
from strop.engine.config.command_line import recipe_of
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.errors import exit_on_user_error
from strop.engine.runtime import checkpoint, metrics
from strop.engine.runtime.diagnosis import Diagnosis
from strop.engine.runtime.finite import Gate
from strop.engine.runtime.stop import Stop

KEYS = ("run.iterations=6", "run.save_every=3", "evaluate.prompts=8", "evaluate.pictures=2", "evaluate.num_steps=2")
SAFEGUARDS = {
    "numbers that are not finite are kept out": [
        (Gate, "judge"),
        (Gate, "_passed"),
        (Gate, "admits"),
        (Diagnosis, "after_step"),
    ],
    "ranks agree on a signal": [(Stop, "agreed")],
    "records are on the disk": [(metrics.os, "fsync")],
    "checkpoints have digests and are on the disk": [(checkpoint, "_seal"), (checkpoint, "sync")],
}
LOOP = "the loop"


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Prints the share of the loop's time that each safeguard takes."""
    folder = Path(tempfile.mkdtemp(prefix="safeguards-"))
    config = recipe_of(
        ["tinyworld", *KEYS, f"run.dir={folder / 'run'}", *argv], "safeguards", main.__doc__, "", SPOConfig
    )
    seconds: Counter[str] = Counter()
    open_spans: list[str] = []

    def timed(name: str, function: Callable) -> Callable:
        @wraps(function)
        def wrapper(*args, **keywords):
            if name in open_spans:  # one safeguard's function within another's
                return function(*args, **keywords)
            open_spans.append(name)
            begun = time.perf_counter()
            try:
                return function(*args, **keywords)
            finally:
                seconds[name] += time.perf_counter() - begun
                open_spans.remove(name)

        return wrapper

    with ExitStack() as patches:
        for name, places in {**SAFEGUARDS, LOOP: [(training, "train")]}.items():
            for owner, function in places:
                patches.enter_context(patch.object(owner, function, timed(name, getattr(owner, function))))
        try:
            training.run(config)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{LOOP} took {seconds[LOOP]:.1f} s; of that")
    for name in SAFEGUARDS:
        print(f"  {name:<46}{seconds[name] / seconds[LOOP]:8.3%}")
    print(f"  {'in all':<46}{sum(seconds[name] for name in SAFEGUARDS) / seconds[LOOP]:8.3%}")


if __name__ == "__main__":
    main(sys.argv[1:])
