"""Mistakes that a user can mend: one sentence on stderr and exit code 2, never a traceback; and warnings, one line."""

import functools
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """One clear sentence: the file or key, what was found, what was expected and, where possible, the mend."""


def warn(sentence: str) -> None:
    """One line on stderr, for what a user should know of and a run goes on in spite of."""
    print(f"strop: {sentence}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """The message of a library's error with its lines joined to one, for a UserError that quotes it."""
    return " ".join(str(error).split())


def exit_on_user_error(main: Callable[[Sequence[str]], None]) -> Callable[..., None]:
    """Wraps an entry point `main(argv)`; argv defaults to the command line."""

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> None:
        try:
            main(sys.argv[1:] if argv is None else argv)
        except UserError as error:
            print(f"strop: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("strop: interrupted", file=sys.stderr)
            sys.exit(130)

    return wrapper
