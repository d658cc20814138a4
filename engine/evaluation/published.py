"""Rows that the authors of SPO have published. They were not measured here, and by a protocol that differs in details.

Source: arXiv 2406.04314, tables of SD-1.5, SDXL and GenEval. Scorers of other papers differ by more than models do:
which version of HPSv2, which images, which guidance. Beside one's own base row they say how comparable the two are.
"""

from __future__ import annotations

SOURCE = "arXiv 2406.04314; published, not measured here"
COLUMNS = ("PickScore", "HPSv2", "ImageReward", "Aesthetic")
ROWS = {  # by family: method, then COLUMNS
    "sd15": (
        ("base", 20.53, 23.79, -0.1628, 5.365),
        ("DDPO", 21.06, 24.91, 0.0817, 5.591),
        ("D3PO", 20.76, 23.97, -0.1235, 5.527),
        ("Diffusion-DPO", 20.98, 25.05, 0.1115, 5.505),
        ("SPO", 21.43, 26.45, 0.1712, 5.887),
    ),
    "sdxl": (
        ("base", 21.95, 26.95, 0.5380, 5.950),
        ("Diffusion-DPO", 22.64, 29.31, 0.9436, 6.015),
        ("MaPO", 22.11, 28.22, 0.7165, 6.096),
        ("SPO", 23.06, 31.80, 1.0803, 6.364),
    ),
}
GENEVAL = {"SDXL": 53.43, "SDXL, Diffusion-DPO": 59.58, "SDXL, SPO": 55.20}  # overall, in per cent


def published(family: str) -> dict:
    """Returns the published rows of a family of base models, as results.json holds them."""
    return {"source": SOURCE, "columns": list(COLUMNS), "rows": [list(row) for row in ROWS[family]]}
