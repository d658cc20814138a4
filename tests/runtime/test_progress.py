"""runtime/progress: values, widths, header, made from the columns of a method."""

import io

import pytest

from strop.engine.methods.judge_training import columns as judge_training
from strop.engine.methods.spo.columns import COLUMNS
from strop.engine.runtime.columns import Column
from strop.engine.runtime.progress import Progress, duration


def lines(records, columns=COLUMNS, iterations=200):
    stream = io.StringIO()
    progress = Progress(iterations, columns, stream)
    for record in records:
        progress.show(record)
    return stream.getvalue().splitlines()


def test_a_line_shows_what_was_measured():
    record = {"iteration": 12, "prompts_per_second": 2.314, "eta_seconds": 785, "judge": 21.4321, "pairs": 12345,
              "kept": 0.384, "margin": 0.0123, "accuracy": 0.57, "clipped": 0.12, "grad_norm": 0.3412}  # fmt: skip
    header, line, nothing = lines([record, {"iteration": 13}])
    assert line.split() == ["12/200", "2.31", "0:13:05", "21.43", "12,345", "38%", "+0.012", "57%", "12%", "0.341"]
    assert len(line) == len(header) <= 100
    assert nothing.split() == ["13/200"] + 9 * ["-"]


def test_a_vector_has_a_cell_for_each_label():
    measured = {"iteration": 6, "loss": 0.69, "heldout_accuracy": {"0": 0.75, "251": 0.5, "951": None}}
    header, with_it, without = lines([measured, {"iteration": 7, "heldout_accuracy": None}], judge_training.COLUMNS)
    assert header.split()[5:-2] == ["t=0", "t=251", "t=501", "t=701", "t=951"]
    assert with_it.split() == ["6/200", "-", "-", "0.6900", "-", "0.750", "0.500", "-", "-", "-", "-"]
    assert without.split() == ["7/200"] + 10 * ["-"]
    assert len({len(header), len(with_it), len(without)}) == 1


def test_a_column_without_a_form_is_not_shown():
    header, line = lines(
        [{"iteration": 1, "a": 1, "b": 2}], [Column("a", heading="a"), Column("b", heading="b", form="{}")]
    )
    assert header.split() == ["iteration", "prompts/s", "ETA", "b"]
    assert line.split() == ["1/200", "-", "-", "2"]


def test_the_header_is_repeated_and_nothing_coloured_in_a_file():
    shown = lines([{"iteration": iteration} for iteration in range(1, 42)])
    assert [i for i, line in enumerate(shown) if "accuracy" in line] == [0, 21, 42]
    assert not any("\033" in line for line in shown)


@pytest.mark.parametrize("seconds, text", [(0, "0:00:00"), (65.4, "0:01:05"), (90061, "1d 1:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text
