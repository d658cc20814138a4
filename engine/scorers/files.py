"""Fills networks of transformers from files whose tensors have their authors' names, and reads heads of linear layers.

Sizes are read off the tensors. What no tensor tells, the number of attention heads, is known of published widths, or
stands in a configuration beside the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.model_files import read_json
from ..models.weight_files import fill, read_weights, shortened

HEADS = {768: 12, 1024: 16, 1280: 16}  # by width, of BERT and ViT-B; of ViT-L, BERT and CLIP text; of ViT-H
LAYERS = (0, 2, 4, 6, 7)  # of the authors' heads; what lies between is dropout
Source = Callable[[str], tuple[str, Callable[[Tensor], Tensor]]]
KINDS = {  # a tensor that tells what a file holds
    "visual.conv1.weight": "a CLIP of open_clip, such as HPSv2",
    "blip.visual_encoder.cls_token": "ImageReward",
    "layers.7.weight": "an aesthetic head",
    "visual_projection.weight": "a CLIP of transformers, such as PickScore",
}


@dataclass(frozen=True, slots=True)
class Weights:
    """The tensors of a file of weights by name; key is the scorer, expected what it needs, both for messages."""

    state: dict[str, Tensor]
    file: Path
    key: str
    expected: str

    @classmethod
    def read(cls, file: Path, key: str, expected: str) -> Weights:
        """Reads a file. Raises UserError that names it if it holds no tensors."""
        return cls(read_weights(file, key), file, key, expected)

    def size(self, name: str, axis: int) -> int:
        """Returns a tensor's size along one axis. Raises UserError if there is no such tensor, or no such axis."""
        value = self.state.get(name)
        if value is None or value.dim() <= axis:
            raise self._misfit([name])
        return value.shape[axis]

    def count(self, pattern: str) -> int:
        """Counts the layers that are there: `pattern` names a tensor of each, with {} for the number."""
        number = 0
        while pattern.format(number) in self.state:
            number += 1
        if not number:
            raise self._misfit([pattern.format(0)])
        return number

    def beside(self, config: str, *keys: str) -> int | None:
        """Returns the positive integer under nested `keys` of a JSON file in the file's folder; None without it."""
        value: object = read_json(path, self.key) if (path := self.file.parent / config).is_file() else None
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        return value if isinstance(value, int) and value > 0 else None

    def heads(self, width: int, given: int | None, config: str) -> int:
        """Returns the attention heads of a published width; of another, those `given` by `config` beside the file."""
        if width in HEADS:
            return HEADS[width]
        if not given or width % given:
            raise UserError(
                f"{self.key}: {self.file} has a width of {width}, and how many attention heads that are is not known; "
                f"expected a width of {', '.join(map(str, HEADS))}, or a number that divides it in {config} beside it"
            )
        return given

    def fill(self, network: nn.Module, source: Source) -> None:
        """Fills a network on the meta device; source: its name -> the name in the file, and what is done to that.

        Raises UserError that lists the tensors that are missing or misshapen, by their names in the file, or names one
        that is not finite. What the network does not have is left, as the authors' own code leaves it.
        """
        state, missing, misshapen = {}, [], []
        for name, expected in network.state_dict().items():
            published, change = source(name)
            if published not in self.state:
                missing.append(published)
            elif (value := change(self.state[published])).shape == expected.shape:
                state[name] = value
            else:
                misshapen.append(f"{published} of {tuple(self.state[published].shape)} for {tuple(expected.shape)}")
        if missing or misshapen:
            raise self._misfit(missing, misshapen)
        fill(network, state, (), f"{self.key}: {self.file}")

    def head(self, prefix: str, width: int) -> nn.Sequential:
        """Returns the linear layers `prefix`layers.{0,2,4,6,7}, without activations, from `width` to one number."""
        with torch.device("meta"):
            layers = []
            for number in LAYERS:
                out = self.size(f"{prefix}layers.{number}.weight", 0) if number != LAYERS[-1] else 1
                layers.append(nn.Linear(width, out))
                width = out
        network = nn.Sequential(*layers)

        def source(name: str) -> tuple[str, Callable[[Tensor], Tensor]]:
            number, kind = name.split(".")
            return f"{prefix}layers.{LAYERS[int(number)]}.{kind}", lambda value: value

        self.fill(network, source)
        return network

    def _misfit(self, missing: list[str], misshapen: list[str] = ()) -> UserError:
        lists = {"missing": list(dict.fromkeys(missing)), "of the wrong shape": list(dict.fromkeys(misshapen))}
        faults = [f"{len(names)} {fault} ({shortened(names)})" for fault, names in lists.items() if names]
        found = described(self.state)
        return UserError(f"{self.key}: {self.file} holds {found}, expected {self.expected}: {'; '.join(faults)}")


def described(state: dict[str, Tensor]) -> str:
    """Says what a file of weights holds, by a tensor that tells, or else by the first names in it."""
    return next((kind for name, kind in KINDS.items() if name in state), shortened(state, 3) or "no tensor")
