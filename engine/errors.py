"""How a command ends early: in one sentence on stderr, never a traceback. Errors of the user's exit with code 2."""

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]


class UserError(Exception):
    """Says in one sentence the file or key, what was found, what was expected and, where possible, what to do."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the program, with a sentence that says what of it is kept; no `except Exception` stops it."""

    def __init__(self, number: int, sentence: str = ""):
        self.number, self.name = number, signal.Signals(number).name
        super().__init__(sentence or f"ended by {self.name}")


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


@contextmanager
def signals_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Hands SIGINT, SIGTERM and SIGHUP to a handler within the block; one that is ignored, as by nohup, stays so."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if threading.current_thread() is not threading.main_thread():
        before = {}  # only the main thread may set handlers
    taken = {number: former for number, former in before.items() if former not in (None, signal.SIG_IGN)}
    for number in taken:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, former in taken.items():
            signal.signal(number, former)


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raises Interrupted: the handler of a program that has nothing to keep."""
    raise Interrupted(number)


def end_at_ctrl_c() -> None:
    """Lets Ctrl-C end a script without a traceback while its modules are imported, which takes seconds."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def exit_on_user_error(main: Callable[[Sequence[str]], None]) -> Callable[..., None]:
    """Wraps an entry point `main(argv)`; argv defaults to the command line.

    Exit codes are 2 for UserError, 128 + its number for a signal, and silently 141 where nobody reads stdout any more.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> None:
        try:
            with signals_to(interrupt):
                try:
                    main(sys.argv[1:] if argv is None else argv)
                finally:
                    sys.stdout.flush()  # what a closed pipe refuses is refused here, and not as Python exits
        except UserError as error:
            print(f"strop: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as end:
            print(f"strop: {str(end) or 'interrupted'}", file=sys.stderr)
            sys.exit(128 + getattr(end, "number", signal.SIGINT))
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)  # 128 + SIGPIPE, as of other commands

    return wrapper
