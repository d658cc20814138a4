"""SPO post-training: `python engine/train.py RECIPE [key=value ...]`, on several ranks `deepspeed engine/train.py`."""

from __future__ import annotations

if not __package__:  # run as a script (PEP 366)
    __package__ = "strop.engine"
    from .errors import end_at_ctrl_c

    end_at_ctrl_c()

from collections.abc import Sequence

from .config.command_line import recipe_of
from .config.training import Config
from .errors import exit_on_user_error


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Trains by a recipe; the last lines on the terminal give the results and the paths of the files."""
    config = recipe_of(argv, "train.py", main.__doc__, "configs/tinyworld.yaml", Config)
    from . import training  # torch and diffusers take seconds: what is wrong with a recipe has been said by now

    training.run(config)


if __name__ == "__main__":
    main()
