"""GPU-hours, energy, utilisation, clocks and throttling of a run's GPUs, and the share of their peak that it reaches.

A separate thread reads NVML about once a second beside the computation: no stream is touched, nothing waits. Without a
GPU or without NVML there is no thread and nothing else changes; values that a card, or a part of one (MIG), does not
report are None. Not here: seconds by stage (stopwatch.py), the seconds that the work would take at the peak
(plan/peak.py), the rows that a person reads (report/tables.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from threading import Event, Thread
from typing import Any, NamedTuple

import pynvml
import torch
import torch.distributed as dist
from torch import Tensor

from .columns import Column
from .metrics import Metrics

EVERY = 1.0  # seconds between two readings; NVML's utilisation covers 1/6 to 1 second
NOT_AVAILABLE = "not available"
REASONS = {  # why clocks are lowered, as NVML's "clocks event reasons" have it; idling is not counted
    "power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "heat": pynvml.nvmlClocksEventReasonSwThermalSlowdown | pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
    "hardware_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "clock_setting": pynvml.nvmlClocksEventReasonApplicationsClocksSetting,
}
MEANS = ("share_of_peak", "utilisation", "sm_mhz", "memory_mhz")
NAMES = ("seconds", "joules", *MEANS, *REASONS)
# The columns of a record: sums over all GPUs since the run began, then means over them since the last record.
# share_of_peak is that of the GPU's matrix arithmetic, utilisation the share of time in which a kernel ran, throttled
# the share of readings by reason.
COLUMNS = (
    Column("gpu_hours", "total"),
    Column("energy_wh", "total"),
    *map(Column, MEANS),
    Column("throttled", labels=tuple(REASONS)),
)
SECONDS, SHARE = NAMES.index("seconds"), NAMES.index("share_of_peak")


class Reading(NamedTuple):
    """The state of a GPU at one moment; a value that NVML did not report is None."""

    time: float  # s
    joules: float | None  # since the driver was loaded
    watts: float | None
    utilisation: float | None  # share of NVML's last sample period in which a kernel ran
    sm_mhz: float | None
    memory_mhz: float | None
    reasons: int | None  # bits


class Ledger:
    """Measures the GPU of one process: `with Ledger(device) as ledger:` around all that is to be counted.

    before: `totals` of the checkpoint from which the run goes on, {} for a new run. at_peak: seconds that the GPU would
    need at its peak for one prompt, pair or the like, by the name of the column that counts them; {} where unknown.
    """

    def __init__(self, device: torch.device):
        self.before: Mapping[str, list[float]] = {}
        self.at_peak: Mapping[str, float] = {}
        self._new_peak_seconds = 0.0  # seconds that the work since the last record would take at the peak
        self._work = torch.zeros(2, dtype=torch.float64)  # seconds of work, and at the peak, up to the last record
        self._device, self._begun = device, time.perf_counter()
        self._sums = torch.zeros(2, len(NAMES), dtype=torch.float64)  # number of readings, their sum; never in place
        self._at_last_record = self._sums
        self._last: Reading | None = None
        self._ended = Event()
        self._handle = gpu(device)
        self._thread = None if self._handle is None else Thread(target=self._watch, name="ledger", daemon=True)

    def __enter__(self) -> Ledger:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        """Stops the thread; a driver that no longer answers is waited for at most 10 seconds."""
        self._ended.set()
        if self._thread:
            self._thread.join(timeout=10 * EVERY)

    def work(self, done: Mapping[str, Any]) -> None:
        """Counts work; done: how many prompts, pairs and the like, by the names of `at_peak`; others are ignored."""
        self._new_peak_seconds += sum(each * done.get(name, 0) for name, each in self.at_peak.items())

    def add_to(self, metrics: Metrics, work_seconds: float = 0.0) -> None:
        """Adds the readings since the last call to the next record; work_seconds: how long the counted work took."""
        if self.at_peak:
            self._work[0] += work_seconds
            self._work[1] += self._new_peak_seconds
            self._new_peak_seconds = 0.0
        sums = self._so_far()
        counts, values = sums - self._at_last_record
        self._at_last_record = sums
        count, value = (dict(zip(NAMES, row.tolist(), strict=True)) for row in (counts, values))
        for name, column in (("seconds", "gpu_hours"), ("joules", "energy_wh")):
            if count[name]:
                metrics.add({column: value[name] / 3600})
        for name in MEANS:
            if count[name]:
                metrics.add({name: value[name] / count[name]}, count[name])
        if count[NAMES[-1]]:
            metrics.add({"throttled": (values / counts)[-len(REASONS) :]}, count[NAMES[-1]])

    def totals(self) -> dict[str, list[float]]:
        """Returns [number of readings, their sum] by name, of all processes and the whole run. A collective call."""
        sums = self._so_far()
        if dist.is_initialized():
            sums = sums.to(self._device)
            dist.all_reduce(sums)
        return {
            name: [now + then for now, then in zip(column, self.before.get(name, (0.0, 0.0)), strict=True)]
            for name, column in zip(NAMES, sums.T.tolist(), strict=True)
        }

    def _so_far(self) -> Tensor:
        """Returns the number of readings and their sums (2, N), N as in NAMES, of this process since it began."""
        sums = self._sums.clone()
        if self._device.type == "cuda":
            sums[:, SECONDS] = time.perf_counter() - self._begun
        sums[:, SHARE] = self._work
        return sums

    def _watch(self) -> None:
        self._read()
        while not self._ended.wait(EVERY):
            self._read()
        self._read()

    def _read(self) -> None:
        now, last = read(self._handle), self._last
        joules = energy(last, now) if last else None
        slowed = [None if now.reasons is None else bool(now.reasons & bits) for bits in REASONS.values()]
        values = [None, joules, None, now.utilisation, now.sm_mhz, now.memory_mhz, *slowed]
        row = [[value is not None for value in values], [value or 0.0 for value in values]]
        self._sums = self._sums + torch.tensor(row, dtype=torch.float64)
        self._last = now


def gpu(device: torch.device) -> Any | None:
    """Returns NVML's handle of a CUDA device; None where there is none, and for a part of a card (MIG).

    The UUID matches them: NVML counts all cards of the machine, CUDA those of CUDA_VISIBLE_DEVICES, in another order.
    """
    if device.type != "cuda":
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None
    divided, _ = _ask(pynvml.nvmlDeviceGetMigMode, handle) or (False, False)  # now, after the next reset
    return None if divided else handle


def read(handle: Any) -> Reading:
    """Reads a GPU: energy in J, power in W, clocks in MHz, utilisation in [0, 1]."""
    joules = _ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)  # mJ
    watts = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)  # mW
    rates = _ask(pynvml.nvmlDeviceGetUtilizationRates, handle)  # .gpu in per cent
    return Reading(
        time=time.perf_counter(),
        joules=None if joules is None else joules / 1000,
        watts=None if watts is None else watts / 1000,
        utilisation=None if rates is None else rates.gpu / 100,
        sm_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        memory_mhz=_ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_MEM),
        reasons=_ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle),
    )


def energy(before: Reading, after: Reading) -> float | None:
    """Returns the joules between two readings: by the card's counter, else power over time (trapezoid), else None."""
    if before.joules is not None and after.joules is not None:
        return max(0.0, after.joules - before.joules)  # smaller only where the counter began anew
    if before.watts is not None and after.watts is not None:
        return (before.watts + after.watts) / 2 * (after.time - before.time)
    return None


def summarise(totals: Mapping[str, list[float]]) -> dict[str, Any] | str:
    """Makes the ledger of summary.json from `Ledger.totals`: sums over GPUs, means over readings, None for values not
    measured; "not available" where there was no GPU at all."""
    if not totals["seconds"][0]:
        return NOT_AVAILABLE
    mean = {name: value / count if count else None for name, (count, value) in totals.items()}
    return {
        "gpu_hours": totals["seconds"][1] / 3600,
        "energy_kwh": totals["joules"][1] / 3.6e6 if totals["joules"][0] else None,
        **{name: mean[name] for name in MEANS},
        "throttled": {name: mean[name] for name in REASONS} if totals[NAMES[-1]][0] else None,
    }


def _ask(query: Callable[..., Any], *arguments: Any) -> Any | None:
    """Returns NVML's answer, None where the driver or the card has none."""
    try:
        return query(*arguments)
    except pynvml.NVMLError:
        return None
