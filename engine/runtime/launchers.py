"""What started this process: the launchers above it, and the command that starts all of it again."""

from __future__ import annotations

import shlex
import sys
from itertools import takewhile
from pathlib import Path

import psutil

NAMES = {"deepspeed", "deepspeed.launcher.launch", "torchrun", "torch.distributed.run", "torch.distributed.launch"}


def launchers() -> list[psutil.Process]:
    """Returns the processes of `deepspeed` or `torchrun` above this one, the nearest first; [] without a launcher."""
    try:
        return list(takewhile(_launches, psutil.Process().parents()))
    except psutil.Error:  # one ended while it was asked
        return []


def command() -> str:
    """Returns the command line of the outermost launcher, or of this process, as one would type it."""
    above = launchers()
    words = above[-1].cmdline() if above else sys.orig_argv
    if len(words) > 1 and Path(words[1]).is_absolute() and Path(words[0]).parent == Path(words[1]).parent:
        words = [Path(words[1]).name, *words[2:]]  # bin/python bin/strop
    return shlex.join(words)


def _launches(process: psutil.Process) -> bool:
    return any(Path(word).name in NAMES for word in process.cmdline())
