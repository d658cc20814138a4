"""Times the ops of strop.kernels, forward and backward: plain PyTorch, torch.compile of it, and Triton, side by side.

`make bench` runs this. On a GPU, LAUNCHES calls go into one CUDA graph, over copies of the inputs that together exceed
the L2 cache, and the closing table gives the time of a call and, of Triton's, the rate of the fewest bytes that the op
can move as a share of a device-to-device copy's, timed in the same way in the same run. bench/results/ gets each
figure as it comes, in the card's folder. Without a GPU the first two are compared on small shapes, and there is no
bandwidth to give. Values are checked before anything is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import strop.kernels as kernels
from strop.bench.machine import machine, write
from strop.kernels import adaln, ddim

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
LAUNCHES, ROUNDS = 48, 30
COPY = 256 << 20  # bytes of the copy whose bandwidth the table compares with
CODES = ("triton", "compiled", "reference")


class Case(NamedTuple):
    """One op at one size. inputs(seed) are its arguments, `trained` the places of those that get a gradient; bytes are
    the fewest to move: every input read once and every output written once."""

    function: Callable
    reference: Callable
    inputs: Callable[[int], list]
    trained: tuple[int, ...]
    forward_bytes: int
    backward_bytes: int


def draw(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE).to(dtype)


def modulated(shape: tuple[int, int, int], gated: bool, dtype: torch.dtype) -> Case:
    def inputs(seed: int) -> list[Tensor]:
        batch, _, width = shape
        shift, scale, gate, *_ = draw(seed, dtype, batch, 6 * width).chunk(6, dim=-1)
        weight, bias = draw(seed + 1, dtype, width) + 1, draw(seed + 2, dtype, width)
        x, branch = draw(seed + 3, dtype, *shape), draw(seed + 4, dtype, *shape)
        return [x, branch, gate, weight, bias, shift, scale] if gated else [x, weight, bias, shift, scale]

    size = math.prod(shape) * dtype.itemsize
    if gated:
        op, reference = kernels.gated_residual_adaln, adaln.gated_residual_adaln_ref
        return Case(op, reference, inputs, tuple(range(7)), 4 * size, 6 * size)
    return Case(kernels.adaln_modulate, adaln.adaln_modulate_ref, inputs, tuple(range(5)), 2 * size, 3 * size)


def table(rows: int) -> Tensor:
    coefficients = kernels.DDIMCoefficients.build(torch.linspace(0.999, 0.005, 1000), 20, 1.0)
    return coefficients.table[:, torch.arange(rows) % 20].to(DEVICE)


def branches(shape: tuple[int, int, int, int], k: int, dtype: torch.dtype) -> Case:
    def inputs(seed: int) -> list:
        x, uncond, text = (draw(seed + i, dtype, *shape) for i in range(3))
        return [x, uncond, text, 5.0, table(shape[0]), draw(seed + 3, dtype, k, *shape)]

    size = math.prod(shape)
    bytes_moved = size * ((3 + 2 * k) * dtype.itemsize + 4)
    return Case(kernels.ddim_branch, ddim.ddim_branch_ref, inputs, (), bytes_moved, 0)


def cases() -> dict[str, Case]:
    half, single = torch.bfloat16 if GPU else torch.float32, torch.float32
    rows = [(40, 257, 1280), (8, 257, 1280)] if GPU else [(2, 17, 64)]
    latents = {"SD-1.5": (10, 4, 64, 64), "SDXL": (10, 4, 128, 128)} if GPU else {"tiny": (2, 4, 8, 8)}
    by_name = {f"adaln_modulate {shape}": modulated(shape, False, half) for shape in rows}
    by_name |= {f"gated_residual_adaln {shape}": modulated(shape, True, half) for shape in rows}
    for name, shape in latents.items():
        by_name |= {f"ddim_branch {name} k={k}": branches(shape, k, single) for k in (1, 4)}
    return by_name


CASES = cases()
WHAT = [(name, what) for name, case in CASES.items() for what in ("forward", "backward")[: 1 + bool(case.trained)]]


def several(size: int) -> int:
    """Returns how many copies of inputs of this many bytes are twice the L2 cache; one on the CPU."""
    return min(LAUNCHES, math.ceil(2 * torch.cuda.get_device_properties(0).L2_cache_size / size)) if GPU else 1


def seconds(benchmark, make: Callable[[int], Callable], count: int) -> float:
    """Returns the median seconds of one call, of the calls make(0) to make(count - 1) taken in turn."""
    if not GPU:
        benchmark.pedantic(make(0), rounds=ROUNDS, iterations=10, warmup_rounds=2)
        return benchmark.stats.stats.median
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # the forward too: a backward runs on its forward's stream
        calls = [make(i) for i in range(count)]
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for i in range(LAUNCHES):
            calls[i % len(calls)]()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.pedantic(replay, rounds=ROUNDS, iterations=1, warmup_rounds=3)
    return benchmark.stats.stats.median / LAUNCHES


def prepared(case: Case, run: Callable, what: str, seed: int) -> Callable:
    """Returns a call without arguments: the forward, or the backward after a forward."""
    arguments = case.inputs(seed)
    if what == "forward":
        return lambda: run(*arguments)
    leaves = [arguments[i].detach().requires_grad_() for i in case.trained]
    for place, tensor in zip(case.trained, leaves, strict=True):
        arguments[place] = tensor
    results = run(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    grads = [draw(seed + 50 + i, result.dtype, *result.shape) for i, result in enumerate(results)]
    return lambda: torch.autograd.grad(results, leaves, grads, retain_graph=True)


def check(case: Case, run: Callable, what: str) -> None:
    """Raises AssertionError where this code and the op's `_ref` disagree."""
    results, expected = (prepared(case, code, what, 0)() for code in (run, case.reference))
    for ours, theirs in zip(*(r if isinstance(r, tuple) else (r,) for r in (results, expected)), strict=True):
        off = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert off < 4 * torch.finfo(ours.dtype).eps + 1e-5, f"differs from the reference by {off:.1e}"


@pytest.fixture(scope="module")
def record(request):
    """Collects what is measured: the rows of the table, and the bandwidth of the copy in bytes/s under "copy"."""
    record = {"machine": machine(DEVICE), "torch": torch.__version__, "copy": None, "rows": []}
    yield record
    request.config.pluginmanager.get_plugin("terminalreporter").write_line(f"\n{table_of(record)}")


def keep(record: dict) -> None:
    """Writes what is measured so far to the results of this GPU; a CPU has no bandwidth worth keeping."""
    if GPU:
        write(record, "kernels")


def table_of(record: dict) -> str:
    """Returns the record as a table in Markdown: microseconds, and of Triton's the share of the copy's rate."""
    copy, measured = record["copy"], {}
    for row in record["rows"]:
        measured.setdefault((row["name"], row["what"]), {})[row["code"]] = row
    head = f"{record['machine']}, PyTorch {record['torch']}"
    head += f": microseconds of a call, and in brackets the share of a copy's {copy / 1e9:.0f} GB/s" if copy else ""
    lines = [head, "", "| op | | Triton | torch.compile | PyTorch |", "|---|---|---|---|---|"]
    for (name, what), codes in measured.items():
        cells = [f"{1e6 * codes[code]['seconds']:.1f}" if code in codes else "" for code in CODES]
        if copy and "triton" in codes:
            cells[0] += f" ({codes['triton']['bytes'] / codes['triton']['seconds'] / copy:.0%})"
        lines.append(f"| {name} | {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.skipif(not GPU, reason="there is no device memory to copy")
def test_copy(benchmark, record):
    pairs = [[torch.empty(COPY, dtype=torch.uint8, device=DEVICE) for _ in range(2)] for _ in range(several(2 * COPY))]
    record["copy"] = 2 * COPY / seconds(benchmark, lambda i: lambda: pairs[i][1].copy_(pairs[i][0]), len(pairs))
    keep(record)


@pytest.mark.parametrize("name, what", WHAT, ids=lambda value: str(value).replace(" ", "_"))
@pytest.mark.parametrize("code", ["triton", "reference", "compiled"])  # what is slow to compile comes last
def test_op(benchmark, record, code, name, what):
    if code == "triton" and not GPU:
        pytest.skip("needs a GPU: Triton compiles for no CPU")
    case = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(case.reference, fullgraph=True, dynamic=False) if code == "compiled" else None
    run = {"reference": case.reference, "compiled": compiled, "triton": case.function}[code]
    size = case.forward_bytes if what == "forward" else case.backward_bytes
    benchmark.group = f"{name} {what}"
    with torch._functorch.config.patch(donated_buffer=False):  # a backward is run many times here
        check(case, run, what)
        time = seconds(benchmark, lambda i: prepared(case, run, what, 100 * i), several(size))
    record["rows"].append({"name": name, "what": what, "code": code, "bytes": size, "seconds": time})
    keep(record)
