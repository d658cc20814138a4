"""Decides which code answers a call: Triton's kernels for CUDA tensors, the op's `_ref` in plain PyTorch for others.

No other file decides that, or touches torch's and Triton's launching. Triton is optional:
without it every call goes to the `_ref`. Under TRITON_INTERPRET=1 (read when this is imported) the kernels run on
CPU tensors too, in Triton's interpreter, which is slow and meant for tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton

try:
    import triton
except ImportError:
    triton = None

TRITON = triton is not None
INTERPRETED = TRITON and triton.knobs.runtime.interpret
NARROW = (torch.float32, torch.bfloat16, torch.float16)  # the types of the kernels, which compute in float32
WIDEST = 4096  # numbers to a row: the backward of adaLN holds a row in registers, which wider ones overflow
_choice = SimpleNamespace(reference=False, record=None)


class Launch(NamedTuple):
    """One launch of a kernel: its programs, its arguments in order, and its constants with num_warps among them."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]


def use_reference(forced: bool) -> None:
    """Makes every later call in this process go to the `_ref` (True), or again by the rule above (False)."""
    _choice.reference = forced


def on_triton(*tensors: Tensor, width: int = 1) -> bool:
    """Whether a call with these tensors, checked to be on one device, goes to Triton; width: numbers to sum at once."""
    if not TRITON or _choice.reference or width > WIDEST or not all(tensor.dtype in NARROW for tensor in tensors):
        return False
    return tensors[0].is_cuda or (tensors[0].device.type == "cpu" and INTERPRETED)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Opens a context in which kernels are not launched but appended to the list that it yields; on any device."""
    _choice.record = launches = []
    try:
        yield launches
    finally:
        _choice.record = None


class _Recorder:
    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **constants: self.launches.append(Launch(self.kernel, grid, args, constants))


class _OnItsDevice:
    """Launches a kernel on the device of its first argument, where Triton would take the current one."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]):
        def run(first: Tensor, *args, **constants) -> None:
            elsewhere = first.is_cuda and first.device.index != torch.cuda.current_device()
            with torch.cuda.device(first.device) if elsewhere else nullcontext():
                self.kernel[grid](first, *args, **constants)

        return run


def launch(kernel):
    """Prepares a kernel for `launch(kernel)[grid](*args, **constants)`, in eager mode and within torch.compile, whose
    graphs set the device by themselves."""
    if _choice.record is not None:
        return _Recorder(kernel, _choice.record)
    traced = kernel if INTERPRETED else wrap_triton(kernel)
    return _OnItsDevice(kernel) if traced is kernel else traced


def check_alike(like: Tensor, name: str, **others: Tensor | None) -> None:
    """Raises ValueError for the first of `others` that is on another device, or of another type, than `like`."""
    for key, value in others.items():
        if value is None:
            continue
        if value.device != like.device:
            raise ValueError(f"{key} is on {value.device}, expected {like.device} like {name}")
        if value.dtype != like.dtype:
            raise ValueError(f"{key} is {value.dtype}, expected {like.dtype} like {name}")


def rows_of(tensor: Tensor) -> Tensor:
    """Returns the tensor if its last dimension is dense, else a dense copy; kernels take any stride between rows."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def wide(*tensors: Tensor | None) -> torch.dtype:
    """Returns the type in which a `_ref` computes: float32, or float64 where a tensor is."""
    types = [tensor.dtype for tensor in tensors if tensor is not None]
    return torch.float64 if torch.float64 in types else torch.float32


def outside_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Casts the tensors to float32 under autocast, as F.layer_norm does; returns them unchanged otherwise."""
    device = tensors[0].device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return tuple(tensor.float() for tensor in tensors)
    return tensors
