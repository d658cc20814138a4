"""An exponential moving average of a policy's LoRA, which can take its place and lies in checkpoints beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

AVERAGE = "average.safetensors"  # in a checkpoint


class Average:
    """An exponential moving average of parameters. waiting: micro-batches since it followed them last."""

    def __init__(self, parameters: list[nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = [parameter.detach().clone() for parameter in parameters]
        self.waiting = 0

    @torch.no_grad()
    def follow(self) -> None:
        """Takes a step towards the parameters."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.lerp_(parameter, 1 - self.decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Opens a context in which the parameters have the averaged values."""
        current = [parameter.data for parameter in self.parameters]
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.data = value
        try:
            yield
        finally:
            for parameter, value in zip(self.parameters, current, strict=True):
                parameter.data = value

    def save(self, folder: Path) -> None:
        """Writes folder/AVERAGE."""
        tensors = {f"{i}": value for i, value in enumerate(self.values)}
        save_file(tensors | {"waiting": torch.tensor(self.waiting)}, folder / AVERAGE)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote."""
        tensors = load_file(folder / AVERAGE)
        self.waiting = int(tensors["waiting"])
        for i, value in enumerate(self.values):
            value.copy_(tensors[f"{i}"])
