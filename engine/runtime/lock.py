"""Locks a run folder, so that one run at a time writes in it."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import TextIO

from ..errors import UserError, warn

LOCK = ".lock"  # in the run folder; it stays there, because only the lock on it means anything


def lock(run_dir: Path) -> TextIO:
    """Locks a run folder until the file that is returned is closed, or the process ends, however it ends.

    Raises UserError if another process has the lock, and OSError where the file cannot be made. Where the file system
    has no locks there is a warning instead.
    """
    file = open(run_dir / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (it stays open)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise UserError(
            f"run.dir: {run_dir} is written by {holder}; wait until that run has ended, or choose another folder"
        ) from None
    except OSError as error:
        warn(f"run.dir: {run_dir} cannot be locked ({error.strerror}); see to it that no second run writes there")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
