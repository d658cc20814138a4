"""The GPUs that plan knows, by their datasheets, and what share of one was measured where bench/results has it.

Public figures of the makers, dense (without sparsity) and with sums in float32, as PyTorch has them: SXM modules for
the A100, H100, H200 and V100, else the PCIe card. The V100 has no TF32 and does such convolutions in float32. Nothing
here was measured.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .meter import Flops

ASSUMED = 0.4  # of the peak: about what the published runs used of theirs


@dataclass(frozen=True, slots=True)
class Card:
    """half, tf32, float32: TFLOP/s of matrix products; memory in GB; power in W.

    link: GB/s to other cards of the machine, one way (half of what is called bidirectional).
    """

    name: str
    half: float
    tf32: float
    float32: float
    memory: float
    watts: float
    link: float
    link_name: str

    def seconds(self, flops: Flops, share: float) -> float:
        """At this share of the peak of whichever unit does the work."""
        return (flops.half / self.half + flops.tf32 / self.tf32 + flops.float32 / self.float32) / 1e12 / share


@dataclass(frozen=True, slots=True)
class Pace:
    """A card at a share of its peak."""

    card: Card
    share: float

    def seconds(self, flops: Flops) -> float:
        """For so many operations."""
        return self.card.seconds(flops, self.share)


CARDS = {
    "a10": Card("A10", 125, 62.5, 31.2, 24, 150, 32, "PCIe 4"),
    "a100": Card("A100 80 GB", 312, 156, 19.5, 80, 400, 300, "NVLink"),
    "a100-40": Card("A100 40 GB", 312, 156, 19.5, 40, 400, 300, "NVLink"),
    "h100": Card("H100", 989, 495, 67, 80, 700, 450, "NVLink"),
    "h200": Card("H200", 989, 495, 67, 141, 700, 450, "NVLink"),
    "l40s": Card("L40S", 362, 183, 91.6, 48, 350, 32, "PCIe 4"),
    "rtx3080": Card("RTX 3080", 59.5, 29.8, 29.8, 10, 320, 32, "PCIe 4"),
    "rtx3090": Card("RTX 3090", 71, 35.6, 35.6, 24, 350, 32, "PCIe 4"),
    "rtx4090": Card("RTX 4090", 165, 82.6, 82.6, 24, 450, 32, "PCIe 4"),
    "rtx5090": Card("RTX 5090", 209, 105, 105, 32, 575, 64, "PCIe 5"),
    "v100": Card("V100", 125, 15.7, 15.7, 32, 300, 150, "NVLink"),
}


def card(key: str) -> Card:
    """The card of this key, whatever its case. Raises UserError that lists them all."""
    known = key.lower().replace("_", "-")
    if known in CARDS:
        return CARDS[known]
    near = difflib.get_close_matches(known, CARDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--gpu: found {key!r}, expected one of {', '.join(CARDS)}{hint}")


def card_called(name: str) -> Card | None:
    """The card that CUDA calls so, such as "NVIDIA A100-SXM4-80GB"; None for one that is not in the list."""
    key = re.sub(r"nvidia|tesla|geforce|sxm\d*|hbm3e?|\d+gb|[^a-z0-9]", "", name.lower())
    return CARDS.get("a100" if key == "a100pcie" else key)  # whose peak is that of the module


def measured_share(results: Path, key: str, recipe: str) -> tuple[float, Path] | None:
    """(share of peak, the file that says so), of this recipe on this card if it was measured, else of another one.

    A file of bench/results tells of it where it holds "gpu", a key of CARDS, "recipe", the stem of a recipe's file, and
    "share_of_peak": operations done, recomputed ones too, over seconds times the card's peak, each operation on its own
    unit as Card.seconds has it.
    """
    found = []
    for file in sorted(results.glob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        share = record.get("share_of_peak") if isinstance(record, dict) and record.get("gpu") == key else None
        if isinstance(share, float) and 0 < share <= 1:
            found.append((record.get("recipe") == recipe, share, file))
    return max(found)[1:] if found else None
