"""The terminal's lines: values, widths, header."""

import io

import pytest

from strop.engine.runtime.progress import Progress, duration, progress_header, progress_line


def test_progress_line_shows_what_was_measured():
    record = {"iteration": 12, "prompts_per_second": 2.314, "eta_seconds": 785, "judge": 21.4321, "pairs": 12345,
              "kept": 0.384, "margin": 0.0123, "accuracy": 0.57, "clipped": 0.12, "grad_norm": 0.3412}  # fmt: skip
    line = progress_line(record, 200)
    assert line.split() == ["12/200", "2.31", "0:13:05", "21.43", "12,345", "38%", "+0.012", "57%", "12%", "0.341"]
    assert len(line) == len(progress_header()) <= 100
    assert progress_line({"iteration": 1}, 2).split() == ["1/2"] + 9 * ["-"]


def test_progress_repeats_its_header_and_colours_nothing_in_a_file():
    stream = io.StringIO()
    progress = Progress(50, stream)
    for iteration in range(1, 42):
        progress.show({"iteration": iteration})
    shown = stream.getvalue().splitlines()
    assert [i for i, line in enumerate(shown) if "accuracy" in line] == [0, 21, 42]
    assert "\033" not in stream.getvalue()


@pytest.mark.parametrize("seconds, text", [(0, "0:00:00"), (65.4, "0:01:05"), (90061, "1d 1:01:01")])
def test_duration(seconds, text):
    assert duration(seconds) == text
