"""Lists the GPUs that plan knows, by their datasheets, and reads measured shares of their peaks from bench/results.

Rates are the makers', dense (without sparsity) and with sums in float32, as PyTorch has them: those of SXM modules for
the A100, H100, H200 and V100, PCIe boards for the others. The V100 has no TF32 and does such convolutions in float32.
Nothing here was measured.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:
    from .meter import Flops

RESULTS = Path(__file__).parents[2] / "bench" / "results"
ASSUMED_SHARE = 0.4  # of the peak: about what the published runs used of theirs


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU's datasheet. half, tf32, float32: TFLOP/s of matrix products; memory in GB; watts: rated power; link: GB/s
    to other GPUs of the machine, one way (half of what is called bidirectional). share: of its peak that it reaches;
    share_source: where that number comes from."""

    name: str
    half: float
    tf32: float
    float32: float
    memory: float
    watts: float
    link: float
    link_name: str
    share: float = 1.0
    share_source: str = "its peak"

    def seconds(self, flops: Flops) -> float:
        """Returns the seconds of these operations, each on the unit that does them."""
        return (flops.half / self.half + flops.tf32 / self.tf32 + flops.float32 / self.float32) / 1e12 / self.share


GPUS = {
    "a10": Gpu("A10", 125, 62.5, 31.2, 24, 150, 32, "PCIe 4"),
    "a100": Gpu("A100 80 GB", 312, 156, 19.5, 80, 400, 300, "NVLink"),
    "a100-40": Gpu("A100 40 GB", 312, 156, 19.5, 40, 400, 300, "NVLink"),
    "h100": Gpu("H100", 989, 495, 67, 80, 700, 450, "NVLink"),
    "h200": Gpu("H200", 989, 495, 67, 141, 700, 450, "NVLink"),
    "l40s": Gpu("L40S", 362, 183, 91.6, 48, 350, 32, "PCIe 4"),
    "rtx3080": Gpu("RTX 3080", 59.5, 29.8, 29.8, 10, 320, 32, "PCIe 4"),
    "rtx3090": Gpu("RTX 3090", 71, 35.6, 35.6, 24, 350, 32, "PCIe 4"),
    "rtx4090": Gpu("RTX 4090", 165, 82.6, 82.6, 24, 450, 32, "PCIe 4"),
    "rtx5090": Gpu("RTX 5090", 209, 105, 105, 32, 575, 64, "PCIe 5"),
    "v100": Gpu("V100", 125, 15.7, 15.7, 32, 300, 150, "NVLink"),
}


def find_gpu(key: str) -> Gpu:
    """Returns the GPU of this key, whatever its case. Raises UserError, which lists all keys, for another key."""
    lower = key.lower().replace("_", "-")
    if lower in GPUS:
        return GPUS[lower]
    near = difflib.get_close_matches(lower, GPUS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"--gpu: found {key!r}, expected one of {', '.join(GPUS)}{hint}")


def gpu_at_share(key: str, asked: float | None, recipe: str, results: Path = RESULTS) -> Gpu:
    """Returns the GPU of a key at the share of its peak that is asked for; None takes a measured one, or assumes.

    Measured is what was measured on this GPU with this recipe or else with another one. A file in the folder `results`
    counts where it is JSON that has "gpu", a key of GPUS; "recipe", the stem of a recipe's file; and "share_of_peak":
    seconds at the peak, of all operations done including recomputed ones, over the seconds measured.
    """
    gpu, measured = find_gpu(key), []
    if asked is not None:
        return replace(gpu, share=asked, share_source="given")
    for file in sorted(results.rglob("*.json")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        of_gpu = isinstance(record, dict) and GPUS.get(str(record.get("gpu"))) is gpu
        share = record.get("share_of_peak") if of_gpu else None
        if isinstance(share, float) and 0 < share <= 1:
            measured.append((record.get("recipe") == recipe, share, f"measured, {file.name}"))
    assumed = False, ASSUMED_SHARE, "assumed: no measurement of this GPU in bench/results"
    _, share, source = max(measured, default=assumed)
    return replace(gpu, share=share, share_source=source)


def gpu_of_cuda_name(name: str) -> Gpu | None:
    """Returns the GPU with CUDA's name, such as "NVIDIA A100-SXM4-80GB"; None if GPUS lacks it."""
    key = re.sub(r"nvidia|tesla|geforce|sxm\d*|hbm3e?|\d+gb|[^a-z0-9]", "", name.lower())
    return GPUS.get("a100" if key == "a100pcie" else key)  # whose peak is that of the module
