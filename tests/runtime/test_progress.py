"""runtime/progress: values, widths, header, made from the columns of a method; the line that moves meanwhile."""

import io
import time

import pytest

from strop.engine.methods.judge_training import columns as judge_training
from strop.engine.methods.spo import columns as spo
from strop.engine.runtime.columns import Column
from strop.engine.runtime.progress import LiveLine, Progress, duration

SPO = {"iteration": 12, "eta_seconds": 785, "judge": 21.4321, "pairs": 12345, "kept": 0.384, "margin": 0.0123,
       "accuracy": 0.57, "clipped": 0.12, "grad_norm": 0.3412}  # fmt: skip
JUDGE = {"iteration": 6, "loss": 0.69, "heldout_accuracy": {"0": 0.75, "251": 0.5, "951": None}}
LONG = {"iteration": 10_000, "eta_seconds": 99.9 * 86400}
WIDEST_SPO = LONG | {"judge": -0.1234, "pairs": 999_999, "kept": 1, "margin": -9.999, "grad_norm": 1.23e-05}
WIDEST_JUDGE = LONG | {"loss": 0.69, "accuracy": 0.5, "heldout_accuracy": dict.fromkeys("0", 0.5), "grad_norm": 1e-05}


def lines(records, columns=spo.COLUMNS, iterations=200):
    stream = io.StringIO()
    progress = Progress(iterations, columns, stream)
    for record in records:
        progress.show(record)
    return stream.getvalue().splitlines()


def test_a_line_shows_what_was_measured():
    header, line, nothing = lines([SPO, {"iteration": 13}])
    assert line.split() == ["12/200", "0:13:05", "21.43", "12,345", "38%", "+0.012", "57%", "12%", "0.341"]
    assert len(line) == len(header)
    assert nothing.split() == ["13/200"] + 8 * ["-"]


def test_a_vector_has_a_cell_for_each_label():
    header, with_it, without = lines([JUDGE, {"iteration": 7, "heldout_accuracy": None}], judge_training.COLUMNS)
    assert header.split()[4:-2] == ["t=0", "t=251", "t=501", "t=701", "t=951"]
    assert with_it.split() == ["6/200", "-", "0.6900", "-", "0.750", "0.500", "-", "-", "-", "-"]
    assert without.split() == ["7/200"] + 9 * ["-"]
    assert len({len(header), len(with_it), len(without)}) == 1


@pytest.mark.parametrize("method, record", [(spo, WIDEST_SPO), (judge_training, WIDEST_JUDGE)], ids=["spo", "judge"])
def test_the_widest_line_of_every_method_fits_into_80_columns(method, record):
    header, line = lines([record], method.COLUMNS, iterations=10_000)
    assert len(header) == len(line) <= 80
    assert line.split()[1:3] == ["99d", "21h"]
    assert len(line.split()) == len(lines([{}], method.COLUMNS)[1].split()) + 1, "no two cells touch"


def test_a_column_without_a_form_is_not_shown():
    header, line = lines(
        [{"iteration": 1, "a": 1, "b": 2}], [Column("a", heading="a"), Column("b", heading="b", form="{}")]
    )
    assert header.split() == ["iteration", "ETA", "b"]
    assert line.split() == ["1/200", "-", "2"]


def test_the_header_is_repeated_and_nothing_coloured_in_a_file():
    shown = lines([{"iteration": iteration} for iteration in range(1, 42)])
    assert [i for i, line in enumerate(shown) if "accuracy" in line] == [0, 21, 42]
    assert not any("\033" in line for line in shown)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def live_line(monkeypatch, stream, seconds, **options):
    """What is written while ten items of `seconds` each are counted, and then erased."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    live = LiveLine(stream=stream, **options)
    live.iteration = "3/14"
    for item in live.counted("abcdefghij", 10, "rollout"):
        assert item in "abcdefghij"
        now[0] += seconds
    live.erase()
    return stream.getvalue().split("\r\033[K")[1:]


def test_the_live_line_moves_twice_a_second_at_most_and_goes(monkeypatch):
    expected = ["3/14 rollout 4/10", "3/14 rollout 7/10", "3/14 rollout 10/10", ""]
    assert live_line(monkeypatch, Terminal(), 0.2) == expected


def test_there_is_no_live_line_in_a_file_on_another_rank_or_where_all_is_quick(monkeypatch):
    assert live_line(monkeypatch, io.StringIO(), 1.0) == []
    assert live_line(monkeypatch, Terminal(), 1.0, enabled=False) == []
    assert live_line(monkeypatch, Terminal(), 0.01) == []


@pytest.mark.parametrize("seconds, text", [(0, "0:00:00"), (65.4, "0:01:05"), (90061, "1d 1:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text
