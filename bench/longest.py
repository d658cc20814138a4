"""Finds the longest operations of a call by PyTorch's profiler; on a GPU these are its kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

SHOWN = 12
NAME_LENGTH = 80  # a kernel's name has all of its template arguments


def longest(device: torch.device, call: Callable, *arguments) -> dict:
    """Profiles call(*arguments), which should be warm.

    Returns {"seconds": of all operations together, "longest": the first SHOWN, each {"name", "calls", "seconds"}}. An
    operation's seconds leave out those of others that it calls. On a GPU they are the device's, so that their sum is
    less than the time of the call by the time that the device waited.
    """
    on_gpu = device.type == "cuda"
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    with profile(activities=[ProfilerActivity.CPU] + on_gpu * [ProfilerActivity.CUDA]) as seen:
        call(*arguments)
        if on_gpu:
            torch.cuda.synchronize(device)
    events = [e for e in seen.key_averages() if e.device_type == kind and not e.is_user_annotation]
    seconds = lambda e: (e.self_device_time_total if on_gpu else e.self_cpu_time_total) / 1e6  # us
    rows = [{"name": e.key[:NAME_LENGTH], "calls": e.count, "seconds": seconds(e)} for e in events]
    rows.sort(key=lambda row: row["seconds"], reverse=True)
    return {"seconds": sum(row["seconds"] for row in rows), "longest": rows[:SHOWN]}


def table(record: dict) -> str:
    """Writes the result of `longest` in Markdown."""
    lines = ["| operation | calls | seconds | share |", "|---|---|---|---|"]
    for row in record["longest"]:
        share = row["seconds"] / record["seconds"]
        lines.append(f"| {row['name']} | {row['calls']} | {row['seconds']:.3g} | {share:.0%} |")
    return "\n".join(lines)
