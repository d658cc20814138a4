"""Measures which attention is fastest for a recipe: `python -m strop.bench.bench_attention sd15`, or sdxl, tinyworld.

The attention calls of the UNet, of the VAE decoder and of the judge are read off a forward of each on the meta device,
at the number of rows that the recipe has in one call, and timed with every backend of PyTorch's SDPA that this machine
has and, where it is installed, xformers; those of the update with their backward pass. `auto` is what PyTorch chooses,
which is what strop runs unless `model.attention` says otherwise. The record is written to bench/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.benchmark import Timer

from strop.bench.machine import machine, start_bench, write
from strop.engine.config.find import load
from strop.engine.config.training import Config
from strop.engine.errors import exit_on_user_error
from strop.engine.models.base_model import quiet_libraries
from strop.engine.plan.meta_models import ModelBuilder
from strop.engine.plan.row_counts import count_rows
from strop.engine.plan.unit_costs import scoring

ROOT = Path(__file__).parents[1]
BACKENDS = {
    "auto": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True, slots=True)
class Call:
    """An attention call that a forward of a stage makes `times` times; learns: whether with its backward pass."""

    stage: str
    rows: int
    heads: int
    queries: int
    keys: int
    width: int
    dtype: str
    learns: bool
    times: int

    def tensors(self, device: torch.device) -> list[Tensor]:
        """Draws query, key, value (rows, heads, S or L, width) and the output's gradient, with heads side by side."""
        draw = lambda length: torch.randn(self.rows, length, self.heads, self.width, device=device).transpose(1, 2)
        tensors = [draw(self.queries), draw(self.keys), draw(self.keys), draw(self.queries)]
        tensors = [tensor.to(getattr(torch, self.dtype)) for tensor in tensors]
        return [tensor.requires_grad_(self.learns) for tensor in tensors[:3]] + tensors[3:]


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Times the attention calls of a recipe with every backend there is."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.bench_attention", description=main.__doc__)
    parser.add_argument("recipe", help="tinyworld, sd15 or sdxl: of configs/, NAME.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.dtype=bfloat16")
    parser.add_argument("--out", type=Path, help="folder of the record (default: the machine's in bench/results/)")
    args = parser.parse_intermixed_args(argv)
    quiet_libraries()
    config = load(ROOT / "configs" / f"{args.recipe}.yaml", args.overrides)
    device = start_bench("bench_attention", config)
    record = {"recipe": args.recipe, "machine": machine(device), "torch": torch.__version__}
    record["calls"], target = [], None
    for measured in measure(calls(config), device):
        record["calls"].append(measured)
        target = write(record, f"attention-{args.recipe}", args.out)
    print(f"\n{table(record)}\n\nwritten to {target}")


def calls(config: Config) -> list[Call]:
    """Returns the attention calls of one forward of each stage, at the rows of the recipe's largest forward."""
    builder = ModelBuilder.of(config)
    policy, decoder, judge = builder.policy(), builder.decoder() or builder.diffusion(), builder.judge()
    largest = count_rows(config, builder.schedule("cpu")).largest
    latent = torch.empty(1, *builder.latent_shape, device="meta")
    cond, t = builder.conditioning(1), torch.zeros(1, dtype=torch.int64, device="meta")
    forward = lambda: policy.eps(latent, t, cond, guided=False)
    stages = {
        "branches": (forward, max(largest["guided"], largest["unguided"]), False),
        "update": (forward, largest["train"], True),
        "decode": (lambda: decoder.decode(latent), largest["decode"], False),
        "judge": (scoring(builder, judge), largest["judge"], False),
    }
    stage_calls = []
    for stage, (work, rows, learns) in stages.items():
        if not rows:  # a rollout whose judge reads latents decodes nothing
            continue
        with torch.no_grad(), AttentionCalls() as attention:
            work()
        for (heads, queries, keys, width, dtype), times in attention.calls.items():
            stage_calls.append(Call(stage, rows, heads, queries, keys, width, dtype, learns, times))
    return stage_calls


class AttentionCalls(TorchFunctionMode):
    """Counts how often this thread calls PyTorch's SDPA, by (heads, queries, keys, width, dtype)."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            query, key = args[:2]
            sizes = query.shape[1], query.shape[2], key.shape[2], query.shape[3]
            self.calls[(*sizes, str(query.dtype).removeprefix("torch."))] += 1
        return function(*args, **(kwargs or {}))


def measure(attention_calls: Sequence[Call], device: torch.device) -> Iterator[dict]:
    """Yields every call with its seconds by backend: None where it has no kernel for it or too little memory."""
    names = [*BACKENDS] + ["xformers"] * (device.type == "cuda" and importlib.util.find_spec("xformers") is not None)
    for done, call in enumerate(attention_calls, 1):
        seconds = {name: seconds_of(call, name, device) for name in names}
        print(f"{done} of {len(attention_calls)}: {call.stage}, {call.queries} x {call.keys}", flush=True)
        yield asdict(call) | {"seconds": seconds}


def seconds_of(call: Call, backend: str, device: torch.device) -> float | None:
    """Returns the median seconds of one call; None where the backend cannot run it."""
    query, key, value, grad = call.tensors(device)
    attend = F.scaled_dot_product_attention if backend in BACKENDS else of_xformers

    def work() -> None:
        out = attend(query, key, value)
        if call.learns:
            torch.autograd.grad(out, (query, key, value), grad)

    sdpa = BACKENDS.get(backend)
    with sdpa_kernel(sdpa) if sdpa else nullcontext():
        return timed(work)


def timed(work: Callable[[], None]) -> float | None:
    try:
        work()
    except (RuntimeError, ValueError):  # no kernel for these tensors, or out of memory, which is a RuntimeError too
        return None
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).median


def of_xformers(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Computes attention with xformers for tensors laid out as SDPA has them, heads before positions."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def table(record: dict) -> str:
    """Writes the record in Markdown: microseconds of a call, the fastest in bold."""
    names = [*record["calls"][0]["seconds"]]
    lines = [
        f"{record['recipe']} on {record['machine']}, PyTorch {record['torch']}: microseconds of an attention call",
        "",
        "| stage | times | rows x heads | queries x keys x width | dtype | " + " | ".join(names) + " |",
        "|---|---|---|---|---|" + "---|" * len(names),
    ]
    for call in record["calls"]:
        best = min((s for name, s in call["seconds"].items() if s and name != "auto"), default=None)
        cells = [cell(call["seconds"][name], best) for name in names]
        sizes = f"{call['rows']} x {call['heads']} | {call['queries']} x {call['keys']} x {call['width']}"
        lines.append(f"| {call['stage']} | {call['times']} | {sizes} | {call['dtype']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(seconds: float | None, best: float | None) -> str:
    if seconds is None:
        return "none"
    return f"**{1e6 * seconds:.0f}**" if seconds == best else f"{1e6 * seconds:.0f}"


if __name__ == "__main__":
    main()
