"""Errors that a user can put right, as one sentence on stderr with exit code 2, never a traceback; and warnings."""

import functools
import sys
from collections.abc import Callable, Sequence


class UserError(Exception):
    """Says in one sentence the file or key, what was found, what was expected and, where possible, what to do."""


def warn(sentence: str) -> None:
    """Prints one line on stderr that a user should know of; the run goes on."""
    print(f"strop: {sentence}", file=sys.stderr)


def one_line(error: BaseException) -> str:
    """Joins the lines of a library's error message to one, for a UserError that quotes it."""
    return " ".join(str(error).split())


def short(value: object) -> str:
    """Writes a value that was found as Python does, cut at 80 characters, for a message."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} of too many digits"
    return text if len(text) <= 80 else f"{text[:79]}…"


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
