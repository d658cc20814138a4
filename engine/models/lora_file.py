"""Reads and writes LoRA files, low-rank updates by the names of a UNet's layers, in two formats.

diffusers: `unet.<layer>.lora.down.weight`, for `pipeline.load_lora_weights`; alpha stands in the header.
kohya: `lora_unet_<layer with _ for .>.lora_down.weight` with an `.alpha` beside it, for ComfyUI, A1111 and diffusers.
Both name the layers of a UNet as diffusers does; ComfyUI and A1111 know these names too.
(One exception: add_embedding, which attention LoRAs do not touch, goes by kohya's name in ComfyUI alone.)
policy.py decides which layers have a LoRA and trains it.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config.training import Config
from ..errors import UserError, one_line, short
from ..user_files import parse_json, public_name
from .families.base import Family
from .weight_files import check_finite, save_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
ADAPTER = "lora_adapter_metadata"  # the header key from which diffusers takes rank and alpha
ALPHA, PATTERNS = "unet.lora_alpha", "unet.alpha_pattern"
PLAIN_NAME = re.compile(r"[\w.]{1,200}")
Format = Literal["diffusers", "kohya"]

TOP = "down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding|add_embedding"
DIFFUSERS_NAME = re.compile(rf"(?:unet\.)?((?:{TOP})\b.*)\.(lora\.down|lora\.up|lora_A|lora_B)\.weight")
KOHYA_NAME = re.compile(rf"lora_unet_((?:{TOP})_[^.]+|conv_in|conv_out)\.(lora_down\.weight|lora_up\.weight|alpha)")
# Parts of layer names in which kohya's `_` is a `_` and does not stand for a dot.
WORDS = re.compile(
    rf"({TOP}|transformer_blocks|to_q|to_k|to_v|to_out|proj_in|proj_out|conv_shortcut|time_emb_proj|linear_1|linear_2)|_"
)
DOWN, UP = ("lora.down", "lora_A", "lora_down.weight"), ("lora.up", "lora_B", "lora_up.weight")


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adds alpha / rank * up @ down to each layer's weight.

    down (rank, in) or (rank, in, h, w), up (out, rank) or (out, rank, 1, 1) and alpha are keyed by layer name. facts:
    entries of the file's header.
    """

    down: dict[str, Tensor]
    up: dict[str, Tensor]
    alpha: dict[str, float]
    facts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_state(cls, state: Mapping[str, Tensor], alpha: float, facts: Mapping[str, str]) -> Lora:
        """Builds a LoRA from tensors under PEFT's names, with one alpha for all layers."""
        down = {name.removesuffix(".lora_A.weight"): value for name, value in state.items() if ".lora_A." in name}
        return cls(
            down, {layer: state[f"{layer}.lora_B.weight"] for layer in down}, dict.fromkeys(down, float(alpha)), facts
        )

    def state(self) -> dict[str, Tensor]:
        """Returns the tensors under PEFT's names."""
        down = {f"{layer}.lora_A.weight": value for layer, value in self.down.items()}
        return down | {f"{layer}.lora_B.weight": value for layer, value in self.up.items()}

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each layer's LoRA."""
        return {layer: len(value) for layer, value in self.down.items()}

    def delta(self, layer: str) -> Tensor:
        """Computes what the LoRA adds to a layer's weight: (out, in, ...) in float32."""
        up, down = self.up[layer].float().flatten(1), self.down[layer].float()
        return (self.alpha[layer] / len(down) * up @ down.flatten(1)).unflatten(1, down.shape[1:])


def facts(config: Config, family: Family, iteration: int) -> dict[str, str]:
    """Returns header entries that name a LoRA's base model, recipe and iteration; family: of the base model.

    A path of this machine is there by its last name alone, because such a file is published. Besides strop's own keys
    these are the keys by which user interfaces sort LoRAs: kohya's `ss_` and Stability's `modelspec.`
    (github.com/Stability-AI/ModelSpec).
    """
    model, base = config.model, public_name(config.model.path)
    return {
        "strop.version": version("strop"),
        "strop.base_model": base,
        "strop.family": family.name,
        "strop.iteration": str(iteration),
        "strop.config": json.dumps(_without_paths(config.model_dump(mode="json"))),
        **family.lora_header,
        "ss_sd_model_name": base,
        "ss_v2": "False",
        "ss_seed": str(config.run.seed),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": "diffusers",
        "modelspec.resolution": f"{model.width or family.size}x{model.height or family.size}",
        "modelspec.title": Path(config.run.dir).resolve().name,
        "modelspec.date": datetime.now().isoformat(timespec="seconds"),
    }


def read(file: Path) -> Lora:
    """Reads a LoRA file; tensor names tell its format. Raises UserError if it is not a LoRA that strop can read."""
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
        adapter = _adapter(header.pop(ADAPTER, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a LoRA ({one_line(error)}); expected a safetensors file") from None
    down, up, alpha = {}, {}, {}
    for name, value in tensors.items():
        layer, part = _layer_and_part(name)
        if part == "alpha" and value.numel() == 1:
            alpha[layer] = value.item()
        elif part in UP:
            up[layer] = value
        elif part in DOWN:
            down[layer] = value
        else:
            raise UserError(
                f"{file} is no LoRA of a Stable Diffusion UNet alone: found {name} among its {len(tensors)} tensors, "
                "expected names like unet.down_blocks. ... .lora.down.weight (diffusers) or "
                "lora_unet_down_blocks_ ... .lora_down.weight (kohya)"
            )
    for layer in down | up | alpha:
        both = [factor[layer] for factor in (down, up) if layer in factor]
        matrices = len(both) == 2 and all(value.dim() in (2, 4) and value.numel() for value in both)
        if not matrices or down[layer].shape[0] != up[layer].shape[1]:
            raise UserError(f"{file} is no whole LoRA: the two factors of {layer} are not both there, or do not fit")
    if not down or adapter.get("unet.use_rslora"):
        why = "it scales by the root of the rank (rsLoRA)" if down else "it holds no tensors"
        raise UserError(f"{file} is no LoRA that strop reads: {why}")
    check_finite(tensors, str(file))
    header.pop("format", None)
    return Lora(down, up, {layer: alpha.get(layer, _alpha(layer, adapter, len(down[layer]))) for layer in down}, header)


def write(lora: Lora, file: Path, form: Format, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a LoRA to `file`, whose folder is created. float32, the default, keeps the trained weights bit for bit."""
    rank, alpha = _most_common(lora.ranks), _most_common(lora.alpha)
    title = lora.facts.get("modelspec.title", file.stem) if file.name == LORA_FILE else file.stem
    header = {
        **lora.facts,
        "format": "pt",
        "strop.rank": str(rank),
        "strop.alpha": f"{alpha:g}",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        "ss_output_name": title,
        "modelspec.title": title,
    }
    if form == "diffusers":
        names = {layer: f"unet.{layer}.lora." for layer in lora.down}
        alphas = {}
        adapter = {
            "r": rank,
            "lora_alpha": alpha,
            "target_modules": sorted(lora.down),  # by full name, so that another UNet gets these layers and no others
            "rank_pattern": {layer: value for layer, value in lora.ranks.items() if value != rank},
            "alpha_pattern": {layer: value for layer, value in lora.alpha.items() if value != alpha},
        }
        header[ADAPTER] = json.dumps({f"unet.{key}": value for key, value in adapter.items()})
    else:
        names = {layer: f"{kohya_name(layer)}.lora_" for layer in lora.down}
        alphas = {f"{kohya_name(layer)}.alpha": torch.tensor(float(value)) for layer, value in lora.alpha.items()}
    down = {f"{names[layer]}down.weight": value for layer, value in lora.down.items()}
    up = {f"{names[layer]}up.weight": value for layer, value in lora.up.items()}
    tensors = {name: value.to("cpu", dtype).contiguous() for name, value in (down | up).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors | alphas, file, header)
    return file


def kohya_name(layer: str) -> str:
    """Converts a layer's name to kohya's, such as lora_unet_mid_block_attentions_0_proj_in."""
    return f"lora_unet_{layer.replace('.', '_')}"


def _layer_and_part(name: str) -> tuple[str, str]:
    """Splits a tensor's name into (layer, part); ("", "") if it is of neither format."""
    if match := DIFFUSERS_NAME.fullmatch(name):
        return match[1], match[2]
    if match := KOHYA_NAME.fullmatch(name):
        return WORDS.sub(lambda word: word[1] or ".", match[1]), match[2]
    return "", ""


def _adapter(text: str) -> dict:
    """Parses diffusers' header entry and checks what is read of it. Raises ValueError."""
    adapter = parse_json(text)
    patterns = adapter.get(PATTERNS, {}) if isinstance(adapter, dict) else None
    if not isinstance(patterns, dict):
        raise ValueError(f"its {ADAPTER} is {short(adapter)}, expected an object")
    for name, value in {"lora_alpha": adapter.get(ALPHA, 1), **patterns}.items():
        if not PLAIN_NAME.fullmatch(name):
            raise ValueError(f"its alpha_pattern holds {short(name)}, expected names of layers and no expressions")
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"its alpha of {short(name)} is {short(value)}, expected a number")
    return adapter


def _alpha(layer: str, adapter: Mapping, rank: int) -> float:
    """Returns a layer's alpha by diffusers' header; without one, its rank (scale 1).

    PEFT takes a pattern for a regular expression of the end of a layer's name. Those that say more than a name are
    refused, because one can be made that never comes to an end.
    """
    patterns = adapter.get(PATTERNS, {}).items()
    matching = (value for pattern, value in patterns if f".{layer}".endswith(f".{pattern}"))
    return float(next(matching, adapter.get(ALPHA, rank)))


def _without_paths(value: Any) -> Any:
    """Returns JSON values in which paths of this machine are their last names, also after name=."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    if (whole := public_name(value)) != value:
        return whole
    name, equals, path = value.partition("=")
    return f"{name}{equals}{public_name(path)}" if equals else value


def _most_common(by_layer: Mapping[str, float]) -> float:
    return Counter(by_layer.values()).most_common(1)[0][0]
