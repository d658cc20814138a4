"""runtime/ledger: NVML's numbers of the right card, what stays open, resumption, several ranks."""

import contextlib
import json
import threading
import time

import pynvml
import pytest
import torch
from torch import distributed as dist

from strop.engine.runtime import ledger
from strop.engine.runtime.ledger import COLUMNS, MEANS, REASONS, Ledger, gpu, read, summarise
from strop.engine.runtime.metrics import FIELDS, Metrics

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def now(monkeypatch):
    """now[0] is the time of the clock, in seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def watched(now, seconds):
    """A ledger that has read its GPU at the beginning and after each of these seconds, without its thread."""
    ledger = Ledger(GPU)
    ledger._read()
    for passed in seconds:
        now[0] += passed
        ledger._read()
    return ledger


def metrics_of(run_dir):
    return Metrics(run_dir, "cpu", True, COLUMNS, start=0, iterations=3)


def watching():
    return [thread for thread in threading.enumerate() if thread.name == "ledger"]


def test_a_reading_is_of_the_right_card_and_has_the_units_it_says(nvml, now):
    nvml.answers["CurrentClocksEventReasons"] = [4]
    assert read(gpu(GPU)) == (100.0, 7000.0, 300.0, 1.0, 1410, 1593, 4)


def test_energy_is_the_difference_of_the_counter_means_are_over_readings(nvml, now):
    cost = summarise(watched(now, [1, 2]).totals())
    assert cost == {
        "gpu_hours": pytest.approx(3 / 3600),
        "energy_kwh": pytest.approx(700 / 3.6e6),
        "share_of_peak": None,
        "utilisation": pytest.approx((1.0 + 0.4 + 0.4) / 3),
        "sm_mhz": pytest.approx((1410 + 1110 + 1110) / 3),
        "memory_mhz": 1593,
        "throttled": dict.fromkeys(REASONS, 0.0),
    }


def test_a_counter_that_begins_anew_takes_nothing_back(nvml, now):
    nvml.answers["TotalEnergyConsumption"] = [5_000_000, 5_100_000, 2_000, 52_000]
    assert watched(now, [1, 1, 1]).totals()["joules"] == [3, 100 + 0 + 50]


def test_without_a_counter_energy_is_power_over_time(nvml, now):
    nvml.missing.add("TotalEnergyConsumption")
    nvml.answers["PowerUsage"] = [100_000, 300_000, 400_000]
    assert watched(now, [1, 4]).totals()["joules"] == [2, (100 + 300) / 2 * 1 + (300 + 400) / 2 * 4]


def test_reasons_are_told_apart_and_idling_is_none(nvml, now):
    power = pynvml.nvmlClocksEventReasonSwPowerCap
    hot = pynvml.nvmlClocksEventReasonHwThermalSlowdown | pynvml.nvmlClocksEventReasonHwSlowdown
    warm, idle = pynvml.nvmlClocksEventReasonSwThermalSlowdown, pynvml.nvmlClocksEventReasonGpuIdle
    nvml.answers["CurrentClocksEventReasons"] = [power, power | warm, hot, idle]
    expected = {"power_cap": 0.5, "heat": 0.5, "power_brake": 0.0, "hardware_slowdown": 0.25, "clock_setting": 0.0}
    assert summarise(watched(now, [1, 1, 1]).totals())["throttled"] == expected


@pytest.mark.parametrize(
    "missing, open_value",
    [
        ({"TotalEnergyConsumption", "PowerUsage"}, "energy_kwh"),
        ({"UtilizationRates"}, "utilisation"),
        ({"ClockInfo 1"}, "sm_mhz"),
        ({"ClockInfo 2"}, "memory_mhz"),
        ({"CurrentClocksEventReasons"}, "throttled"),
        ({"MigMode"}, None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_card_does_not_answer_stays_open_and_the_rest_goes_on(nvml, now, tmp_path, missing, open_value):
    nvml.missing |= missing
    gpu_ledger = watched(now, [1, 1])
    gpu_ledger.at_peak = {"prompts": 1.0, "pairs": 1.0}
    metrics = metrics_of(tmp_path)
    gpu_ledger.add_to(metrics, 2.0)
    record = metrics.flush(1)
    cost = summarise(gpu_ledger.totals())
    assert [name for name, value in cost.items() if value is None] == [open_value] * (open_value is not None)
    named = {"energy_kwh": "energy_wh"}.get(open_value, open_value)
    fields = ("gpu_hours", "energy_wh", *MEANS, "throttled")
    assert [name for name in fields if record[name] is None] == [named] * (open_value is not None)


@pytest.mark.parametrize("case", ["no library", "unknown card", "part of a card"])
def test_without_nvml_hours_are_counted_and_no_thread_runs(nvml, now, case):
    nvml.here = case != "no library"
    if case == "unknown card":  # such as a part of a card, which has a UUID of its own
        torch.cuda.get_device_properties(GPU).uuid = "0000-another"
    if case == "part of a card":
        nvml.answers["MigMode"] = [[1, 1]]
    with Ledger(GPU) as gpu_ledger:
        assert not watching()
        now[0] += 36
    cost = summarise(gpu_ledger.totals())
    assert cost.pop("gpu_hours") == pytest.approx(0.01)
    assert set(cost.values()) == {None}


def test_on_a_cpu_nvml_is_not_asked(nvml, now, tmp_path):
    metrics = metrics_of(tmp_path)
    with Ledger(CPU) as gpu_ledger:
        assert not watching()
        now[0] += 36
    gpu_ledger.add_to(metrics)
    record = metrics.flush(1)
    assert summarise(gpu_ledger.totals()) == "not available"
    assert nvml.asked == {}
    assert {value for name, value in record.items() if name not in ("iteration", "eta_seconds")} == {None}


def test_records_cover_their_iterations_and_sums_run_on(nvml, now, tmp_path):
    nvml.answers["CurrentClocksEventReasons"] = [0, 4]
    gpu_ledger = watched(now, [1, 1])
    metrics = metrics_of(tmp_path)
    records = []
    for iteration in (1, 2, 3):
        gpu_ledger.add_to(metrics)
        records.append(metrics.flush(iteration))
        now[0] += 2
        if iteration == 1:
            nvml.answers |= {"TotalEnergyConsumption": [8_420_000], "ClockInfo 1": [900]}
            gpu_ledger._read()
    first, second, third = records
    assert set(first) == {*FIELDS, *(column.name for column in COLUMNS)}
    assert first["gpu_hours"] == pytest.approx(2 / 3600)
    assert [record["energy_wh"] for record in records] == pytest.approx([700 / 3600, 1420 / 3600, 1420 / 3600])
    assert (first["sm_mhz"], second["sm_mhz"]) == (pytest.approx(1210), 900)
    assert first["throttled"]["power_cap"] == pytest.approx(2 / 3)
    assert second["throttled"] == dict.fromkeys(REASONS, 0.0) | {"power_cap": 1.0}
    assert third["gpu_hours"] == pytest.approx(6 / 3600)
    assert third["utilisation"] is third["sm_mhz"] is None, "nothing was read meanwhile"


def test_the_share_of_the_peak_is_of_the_seconds_at_work(nvml, now, tmp_path):
    gpu_ledger = Ledger(GPU)
    gpu_ledger.at_peak = {"prompts": 0.5, "pairs": 0.125}
    metrics = metrics_of(tmp_path)
    now[0] += 500  # spent on something else
    gpu_ledger.work({"prompts": 4, "pairs": 8, "judge": 0.5})
    gpu_ledger.work({"prompts": 4})
    gpu_ledger.add_to(metrics, 10.0)
    first = metrics.flush(1)
    gpu_ledger.work({"prompts": 4, "pairs": 16})
    checkpoint = gpu_ledger.totals()  # between two records
    gpu_ledger.add_to(metrics, 8.0)
    second = metrics.flush(2)
    assert (first["share_of_peak"], second["share_of_peak"]) == ((2 + 1 + 2) / 10, (2 + 2) / 8)
    assert summarise(checkpoint)["share_of_peak"] == 5 / 10
    assert summarise(gpu_ledger.totals())["share_of_peak"] == (5 + 4) / (10 + 8)


def test_a_resumed_run_goes_on_counting(nvml, now):
    before = json.loads(json.dumps(watched(now, [1, 2]).totals()))
    now[0] += 1000  # until somebody resumes it
    resumed = watched(now, [3])
    resumed.before = before
    totals = resumed.totals()
    assert totals["seconds"][1] == 3 + 3
    assert totals["joules"] == [2 + 1, 700 + 0]  # the counter stands still by now
    assert totals["utilisation"] == [3 + 2, pytest.approx(1.8 + 0.8)]
    assert summarise(totals)["utilisation"] == pytest.approx(2.6 / 5)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_the_thread_reads_meanwhile_and_stops_whatever_happens(nvml, monkeypatch, error):
    monkeypatch.setattr(ledger, "EVERY", 0.001)
    gpu_ledger = Ledger(GPU)
    with pytest.raises(error) if error else contextlib.nullcontext(), gpu_ledger:
        assert [thread.daemon for thread in watching()] == [True]
        deadline = time.monotonic() + 20
        while nvml.asked.get("PowerUsage", 0) < 5 and time.monotonic() < deadline:
            time.sleep(0.001)
        if error:
            raise error
    assert not watching()
    totals = gpu_ledger.totals()
    assert totals["joules"] == [nvml.asked["PowerUsage"], 700]
    assert totals["sm_mhz"][0] == nvml.asked["PowerUsage"] + 1 >= 6


def test_a_short_run_is_read_at_its_beginning_and_its_end(nvml):
    with Ledger(GPU) as gpu_ledger:
        pass
    assert gpu_ledger.totals()["joules"] == [1, 300]


def test_a_driver_that_hangs_does_not_hold_up_the_end(nvml, monkeypatch):
    monkeypatch.setattr(ledger, "EVERY", 0.01)
    answered = threading.Event()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda handle: answered.wait(20))
    begin = time.monotonic()
    with Ledger(GPU) as gpu_ledger:
        (thread,) = watching()
    assert time.monotonic() - begin < 10
    assert summarise(gpu_ledger.totals())["energy_kwh"] is None
    answered.set()
    thread.join()


def test_the_totals_are_of_all_ranks_and_count_what_was_before_once(nvml, now, monkeypatch):
    gpu_ledger = watched(now, [1, 2])
    gpu_ledger.before = {"joules": [1.0, 1000.0]}
    other = gpu_ledger._so_far() * 2
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda sums: sums.add_(other))
    monkeypatch.setattr(gpu_ledger, "_device", CPU)  # where this test may add
    totals = gpu_ledger.totals()
    assert totals["joules"] == [2 + 4 + 1, 700 + 1400 + 1000]
    assert totals["utilisation"] == [9, pytest.approx(3 * 1.8)]
    assert gpu_ledger.totals() == totals


@pytest.mark.gpu
def test_a_real_card_is_read():
    matrix = torch.randn(8192, 8192, device=GPU)
    with Ledger(GPU) as gpu_ledger:
        end = time.monotonic() + 4
        while time.monotonic() < end:
            for _ in range(10):
                matrix @ matrix
            torch.cuda.synchronize()
    cost = summarise(gpu_ledger.totals())
    assert 3 / 3600 < cost["gpu_hours"] < 60 / 3600
    if gpu(GPU) is None:
        pytest.skip("NVML is not available, or the card is divided")
    watts = cost["energy_kwh"] * 1000 / cost["gpu_hours"]
    assert 20 < watts < 2000
    assert cost["utilisation"] > 0.3
    assert 100 < cost["sm_mhz"] < 5000
