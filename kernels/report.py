"""Reports how every kernel is compiled, on any machine without a GPU: `python -m strop.kernels.report`.

It asks the launchers for the launches that they would make for the engine's calls in SHAPES, compiles each one ahead of
time for sm_80 (A100) and sm_90 (H100, H200) as Triton would at the first call, and reads registers, spills and shared
memory from the machine code and the widest access to global memory from the PTX. It runs no kernel and measures no
time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from . import adaln_backward_triton, adaln_triton, ddim_triton
from .backend import Launch, recording

ARCHITECTURES = (80, 90)
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
HEADER = ("kernel", "shape", "type", "sm", "warps", "registers", "spilled", "shared", "load", "store")


class Row(NamedTuple):
    """One compiled launch. spilled: bytes of a thread in local memory; shared: bytes of a program; load, store: the
    widest access to global memory, in bytes of a thread."""

    kernel: str
    shape: str
    dtype: str
    sm: int
    warps: int
    registers: int
    spilled: int
    shared: int
    load: int
    store: int


def adaln_launches(dtype: torch.dtype, shape: tuple[int, int, int], gated: bool, frozen: bool = False) -> None:
    """Launches the forward of adaln_modulate, or of gated_residual_adaln, at x of shape (B, L, D).

    Each row has a modulation, a slice of six, and there is a backward, as in training; frozen: all rows share one, and
    there is no backward, as in a rollout.
    """
    batch, _, width = shape
    draw = lambda *size: torch.empty(size, dtype=dtype, device="meta")
    modulation = draw(1 if frozen else batch, 6 * width).expand(batch, -1).chunk(6, dim=-1)
    x, weight, bias, (shift, scale, gate, *_) = draw(*shape), draw(width), draw(width), modulation
    branch, gate = (x, gate) if gated else (None, None)
    h, y, stats = adaln_triton._forward(x, branch, gate, weight, bias, shift, scale, 1e-5)
    if not frozen:
        adaln_backward_triton.adaln_backward(y, h, x, branch, gate, weight, bias, scale, stats)


def ddim_launches(dtype: torch.dtype, shape: tuple[int, int, int, int], k: int, guided: bool = True) -> None:
    """Launches a step of the rollout: k branches of N latents of shape (N, C, H, W), or x0_hat where k = 0."""
    eps = torch.empty((2, *shape), dtype=dtype, device="meta")
    table = torch.empty((5, 20), device="meta")[:, 7:8].expand(5, shape[0])  # all rows at one step
    guidance, uncond = (5.0, eps[0]) if guided else (1.0, None)
    ddim_triton._branch(eps[0], uncond, eps[1], guidance, table, eps.new_empty((k, *shape)))


TOWER, TOKEN = (40, 257, 1280), (40, 1, 1280)  # ViT-H's vision tower, and its class token alone
LATENTS = (10, 4, 128, 128)  # a rollout of SDXL's at 1024 pixels
SHAPES: tuple[tuple[str, Callable[[torch.dtype], None]], ...] = (
    (f"{TOWER}", partial(adaln_launches, shape=TOWER, gated=False)),
    (f"{TOWER}", partial(adaln_launches, shape=TOWER, gated=True)),
    (f"{TOWER} frozen", partial(adaln_launches, shape=TOWER, gated=False, frozen=True)),
    (f"{TOWER} frozen", partial(adaln_launches, shape=TOWER, gated=True, frozen=True)),
    (f"{TOKEN}", partial(adaln_launches, shape=TOKEN, gated=True)),
    (f"{TOKEN} frozen", partial(adaln_launches, shape=TOKEN, gated=True, frozen=True)),
    *((f"{LATENTS} k={k}", partial(ddim_launches, shape=LATENTS, k=k)) for k in (4, 2, 1, 0)),
    (f"{LATENTS} k=1", partial(ddim_launches, shape=LATENTS, k=1, guided=False)),
)


def launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Yields (shape, launch) of every kernel, at tensors of this type."""
    for shape, call in SHAPES:
        with recording() as recorded:
            call(dtype)
        yield from ((shape, launch) for launch in recorded)


def name_of(launch: Launch) -> str:
    """Returns the kernel's name and the flags that it is compiled with."""
    flags = [key.lower() for key, value in launch.constants.items() if value is True]
    return " ".join([launch.kernel.__name__.strip("_").removesuffix("_kernel"), *flags])


def compiled(launch: Launch, sm: int, real: str = "fp32") -> CompiledKernel:
    """Compiles the kernel as Triton would at this launch, for a GPU of compute capability sm / 10.

    real: the type of Python's floats, which is "fp64" within torch.compile.
    """
    options = {"num_warps": launch.constants["num_warps"]}
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = arguments[name]
        if i >= len(launch.args) or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = real
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        place = value.storage_offset() * value.itemsize if isinstance(value, Tensor) else value
        if isinstance(place, int) and place % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def read(shape: str, dtype: torch.dtype, launch: Launch, sm: int) -> Row:
    """Compiles a launch and returns its row of the table. Raises CalledProcessError where cuobjdump fails."""
    kernel = compiled(launch, sm)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    load, store = (widest(kernel.asm["ptx"], kind) for kind in ("ld", "st"))
    spilled, warps = max(used["STACK"], used["LOCAL"]), launch.constants["num_warps"]
    shared = kernel.metadata.shared
    return Row(name_of(launch), shape, NAMES[dtype], sm, warps, used["REG"], spilled, shared, load, store)


def widest(ptx: str, kind: str) -> int:
    """Returns the bytes of the widest access to global memory of a kind, "ld" or "st"; 0 where there is none."""
    accesses = re.findall(rf"\b{kind}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    return max((int(many or 1) * int(bits) // 8 for many, bits in accesses), default=0)


def table(rows: Sequence[Row]) -> str:
    """Returns the rows below HEADER, in columns."""
    lines = [HEADER, *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    print(
        table(
            [
                read(shape, dtype, launch, sm)
                for dtype in (torch.bfloat16, torch.float32)
                for shape, launch in launches(dtype)
                for sm in ARCHITECTURES
            ]
        )
    )
