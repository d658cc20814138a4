"""Training of the judge: `python engine/train_judge.py RECIPE [key=value ...]`, or with `deepspeed`."""

from __future__ import annotations

if not __package__:  # run as a script (PEP 366)
    __package__ = "strop.engine"
    from .errors import end_at_ctrl_c

    end_at_ctrl_c()

from collections.abc import Sequence

from .config.command_line import recipe_of
from .config.judge_training import JudgeTrainingConfig
from .errors import exit_on_user_error


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Trains a judge by a recipe; the last lines on the terminal give the results and the paths of the files."""
    config = recipe_of(argv, "train_judge.py", main.__doc__, "configs/judge_tinyworld.yaml", JudgeTrainingConfig)
    from . import judge_training  # torch and diffusers take seconds: what is wrong with a recipe has been said by now

    judge_training.run(config)


if __name__ == "__main__":
    main()
