"""strop.bench.readme: what it says of a record with rounds and thresholds, and where it puts it."""

import pytest

from strop.bench import readme
from strop.bench.readme import BEGIN, END, renewed, step_rows
from strop.engine.errors import UserError

RECORD = {
    "recipe": "sd15",
    "machine": "NVIDIA H200",
    "dtype": "float16",
    "compile": False,
    "threshold": 0.0,
    "rounds": 3,
    "sides": {"published": {"peak_bytes": 56e9}, "exact": {"peak_bytes": 29.1e9}},
    "faster_per_prompt": {"exact": 1.5, "fast": 3.0},
    "faster_per_run": {"exact": 1.5, "fast": 6.0},
    "thresholds": {
        "0": {"rounds": {"exact": [1.5, 1.44, 1.6], "fast": [3.0, 3.0, 3.0]}, "kept": {"published": 1.0}},
        "0.3": {"rounds": {"exact": [1.2, 1.2, 1.2], "fast": [2.0, 2.0, 1.9]}, "kept": {"published": 0.25}},
    },
}


def test_rows_have_spread_threshold_card_and_what_rests_on_quality():
    (prompt, prompt_figures), (kept, kept_figures), (run, run_figures), (peak, peaks) = step_rows(RECORD)
    assert "`sd15` on NVIDIA H200, float16" in prompt
    assert "median of 3 rounds" in prompt
    assert prompt_figures == "exact 1.50x (±7%), fast 3.00x (±0%)"
    assert "threshold 0.3, which keeps 25% of the pairs" in kept
    assert kept_figures == "exact 1.20x (±0%), fast 2.00x (±5%)"
    assert "quality result" in run
    assert (run_figures, peaks) == ("fast 6.00x", "published 56.0 GB, exact 29.1 GB")
    assert "NVIDIA H200" in peak


def test_a_record_of_before_has_neither_spread_nor_thresholds():
    old = {key: value for key, value in RECORD.items() if key != "thresholds"} | {"rounds": 1}
    rows = list(step_rows(old))
    assert len(rows) == 3
    assert rows[0][0].endswith("one round")
    assert rows[0][1] == "exact 1.50x, fast 3.00x"


def test_figures_stand_between_the_comments_and_a_page_without_them_is_refused():
    assert renewed(f"a\n{BEGIN}old\n{END}z", "new\n") == f"a\n{BEGIN}new\n{END}z"
    for page in ("a", BEGIN, END + BEGIN, BEGIN + END + END):
        with pytest.raises(UserError, match=r"README\.md: expected .*measured.*each once"):
            renewed(page, "new\n")


def test_another_page_is_said_and_written_only_when_asked(tmp_path, monkeypatch, capsys):
    page = tmp_path / "README.md"
    page.write_text(f"a\n{BEGIN}1\n{END}z")
    monkeypatch.setattr(readme, "README", page)
    with pytest.raises(SystemExit, match="2"):
        readme.main([])
    assert "--write" in capsys.readouterr().err
    assert page.read_text() == f"a\n{BEGIN}1\n{END}z"
    readme.main(["--write"])
    readme.main([])
    assert page.read_text().startswith(f"a\n{BEGIN}| what | result |\n")
