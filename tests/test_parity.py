"""The table of parity.py: every row within its tolerance, and docs/parity.md shows the same rows."""

import importlib
from pathlib import Path

import pytest
import torch

PAGE = Path(__file__).parents[1] / "docs" / "parity.md"


@pytest.fixture(scope="module")
def parity():
    """The script, imported from beside its neighbours, as `python tests/parity.py` finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        return importlib.import_module("parity")


@pytest.fixture(scope="module")
def rows(parity):
    return parity.all_rows()


def test_every_row_is_within_its_tolerance(rows):
    assert [row.cells() for row in rows if not row.agrees()] == []
    assert [row.cells() for row in rows if row.f32 is None and row.f64 is None] == []
    assert {row.case.split()[0] for row in rows} == {"1", "2", "3", "4", "5", "5b", "6", "7", "8"}


def test_the_page_shows_these_rows(rows):
    """The same values and tolerances in the same order; the digits of an error belong to the machine."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    shown = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines]
    assert [without_digits(cells) for cells in shown[2:]] == [without_digits(row.cells()) for row in rows]


def without_digits(cells):
    return (*cells[:3], *cells[5:])


def test_what_is_too_far_is_marked_and_fails_the_script(parity, capsys):
    rows, zero = parity.Rows(), torch.zeros(3)
    rows.see("a case", "near", parity.LATENTS, zero + 3e-5, zero, zero.double())
    assert parity.main(rows.values()) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "| a case | near | 3 | 3.0e-05 | 3.0e-05 | 4e-05 absolute |"
    rows.see("a case", "far from float64", parity.LATENTS, zero, zero, zero.double() - 5e-5)
    rows.see("a case", "another", parity.EXACT, torch.tensor([1, 2]), torch.tensor([1, 3]))
    rows.see("a case", "one too many", parity.EXACT, torch.tensor([1, 2]), torch.tensor([1]))
    assert parity.main(rows.values()) == 1
    marked = [line.endswith("**exceeded** |") for line in capsys.readouterr().out.splitlines()[2:]]
    assert marked == [False, True, True, True]
