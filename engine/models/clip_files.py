"""Reads the parts of a CLIP from its files: configuration, tokenizer, mean and std of images.

They may lie beside the weights or, where a repository holds weights alone, in a second folder. models/weight_files.py
reads the weights themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from ..errors import UserError, one_line
from .model_files import read_json

PICKSCORE_CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # has the tokenizer and preprocessor that PickScore_v1 lacks
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")


@dataclass(frozen=True, slots=True)
class ClipFolders:
    """Where the parts of a CLIP may lie: folders, or a file of weights, by the configuration key that names each.

    advice: what a user does where a part is in none of them, "KEY: ...; ADVICE". missing_key: that KEY.
    """

    paths: dict[str, Path]
    missing_key: str
    advice: str

    def first(self, *names: str) -> tuple[str, Path]:
        """Finds the first of the named files: (configuration key, file). Raises UserError where there is none."""
        for key, folder in self.paths.items():
            for name in names:
                if (folder / name).is_file():
                    return key, folder / name
        missing_file = "tokenizer" if "tokenizer.json" in names else names[0]
        folders = " and ".join(map(str, self.paths.values()))
        has = "have" if len(self.paths) > 1 else "has"
        raise UserError(f"{self.missing_key}: {folders} {has} no {missing_file}; {self.advice}")

    def lack(self, *names: str) -> bool:
        """Whether none of the folders has any of the named files."""
        return not any((folder / name).is_file() for folder in self.paths.values() for name in names)


def clip_network(folders: ClipFolders) -> CLIPModel:
    """Builds the plain CLIP of config.json on the meta device, which spares initialising a billion parameters."""
    key, file = folders.first("config.json")
    config = read_json(file, key)
    kind = config.get("model_type", config.get("_class_name"))
    if kind != "clip":
        raise UserError(f"{key}: {file} is of a model of type {kind}, expected clip")
    try:
        with torch.device("meta"):
            return CLIPModel(CLIPConfig.from_pretrained(file.parent))
    except Exception as error:  # transformers and torch raise many kinds for bad values
        raise UserError(f"{key}: {file} describes no CLIP ({one_line(error)})") from None


def clip_tokenizer(folders: ClipFolders, vocab_size: int) -> CLIPTokenizer:
    """Reads a CLIP's tokenizer; UserError where it has more tokens than the network has embeddings, `vocab_size`."""
    # Where one of these files is missing, transformers makes a tokenizer of three words or of letters and says nothing.
    key, file = folders.first("tokenizer.json", "vocab.json")
    if file.name == "vocab.json":
        ClipFolders({key: file.parent}, folders.missing_key, folders.advice).first("merges.txt")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(file.parent)
    except Exception as error:  # the parser of tokenizer.json raises Exception itself
        raise UserError(f"{key}: the tokenizer in {file.parent} cannot be read ({one_line(error)})") from None
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"{key}: the tokenizer in {file.parent} has {len(tokenizer)} tokens, "
            f"but the network has embeddings of {vocab_size}"
        )
    return tokenizer


def mean_and_std(folders: ClipFolders) -> tuple[list[float], list[float]]:
    """Reads mean and std, three numbers each, of images in [0, 1] from preprocessor_config.json."""
    key, file = folders.first("preprocessor_config.json")
    config = read_json(file, key)
    mean, std = config.get("image_mean"), config.get("image_std")
    for values in (mean, std):
        if not (isinstance(values, list) and len(values) == 3 and {*map(type, values)} <= {int, float}):
            raise UserError(f"{key}: {file} has image_mean {mean} and image_std {std}, expected three numbers each")
    return mean, std
