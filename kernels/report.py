"""Reports how every kernel is compiled, on any machine without a GPU: `python -m strop.kernels.report`.

It asks the launchers for the launches that they would make at the shapes of SHAPES, compiles each one ahead of time for
sm_80 (A100) and sm_90 (H100, H200) as Triton would at the first call, and reads registers, spills and shared memory
from the machine code and the widest access to global memory from the PTX. It runs no kernel and measures no time.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from . import adaln_triton, ddim_triton, log_prob_triton
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


def adaln_launches(dtype: torch.dtype, shape: tuple[int, int, int], gated: bool) -> None:
    """Launches forward and backward of adaln_modulate, or of gated_residual_adaln, at x of shape (B, L, D)."""
    batch, _, width = shape
    draw = lambda *size: torch.empty(size, dtype=dtype, device="meta")
    modulation = draw(batch, 6 * width).chunk(6, dim=-1)  # as the engine has them: not dense
    x, weight, bias, (shift, scale, gate, *_) = draw(*shape), draw(width), draw(width), modulation
    branch, gate = (x, gate) if gated else (None, None)
    h, y, stats = adaln_triton._forward(x, branch, gate, weight, bias, shift, scale, 1e-5)
    adaln_triton._backward(y, h, x, branch, gate, weight, bias, scale, stats)


def ddim_launches(dtype: torch.dtype, shape: tuple[int, int, int, int], k: int) -> None:
    """Launches the branches, log-probability, log-ratio and backward of N latents of shape (N, C, H, W)."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    table = torch.empty((5, shape[0]), device="meta")
    ddim_triton._branch(x, x, x, 5.0, table, x.expand(k, *shape))
    x_prev, shared = x.expand(2, *shape), x.unsqueeze(0)
    density = log_prob_triton._log_prob(x_prev, shared, shared, shared, None, None, 5.0, table)
    log_prob_triton._log_prob(x_prev, shared, shared, shared, shared, shared, 5.0, table)
    log_prob_triton._log_prob_backward(density, x_prev, shared, shared, shared, 5.0, table)


SHAPES: tuple[
    tuple[str, Callable[[torch.dtype], None]], ...
] = (  # ViT-H's vision tower; latents of SDXL at 1024 pixels
    ("(40, 257, 1280)", lambda dtype: adaln_launches(dtype, (40, 257, 1280), gated=False)),
    ("(40, 257, 1280)", lambda dtype: adaln_launches(dtype, (40, 257, 1280), gated=True)),
    ("(10, 4, 128, 128) k=4", lambda dtype: ddim_launches(dtype, (10, 4, 128, 128), 4)),
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


def compiled(launch: Launch, sm: int) -> CompiledKernel:
    """Compiles the kernel as Triton would at this launch, for a GPU of compute capability sm / 10."""
    options = {"num_warps": launch.constants["num_warps"]}
    arguments = dict(zip(launch.kernel.arg_names, launch.args, strict=False)) | launch.constants
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = arguments[name]
        if i >= len(launch.args) or (not isinstance(value, Tensor) and value == 1):
            signature[name], constants[name] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
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
