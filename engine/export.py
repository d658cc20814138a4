"""`python -m strop.engine.export CHECKPOINT --format diffusers|kohya|merged --out PATH`: writes a LoRA for its use.

CHECKPOINT is a run folder, one of its checkpoints, a folder with a LoRA, or a LoRA file of either format. Nothing is
overwritten, and nothing is trained.
"""

from __future__ import annotations

if not __package__:  # run as a script (PEP 366)
    __package__ = "strop.engine"
    from .errors import end_at_ctrl_c

    end_at_ctrl_c()

import argparse
import stat
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from .config.training import ModelConfig
from .errors import UserError, exit_on_user_error
from .models.base_model import DTYPES, load_unet, quiet_libraries
from .models.lora_file import LORA_FILE, Lora, write
from .models.lora_source import add_lora, base_of, find_lora
from .user_files import user_path

FORMATS = ("diffusers", "kohya", "merged")


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Converts a LoRA to the diffusers or the kohya (ComfyUI, A1111) format, or merges it into its base's UNet."""
    parser = argparse.ArgumentParser(prog="python -m strop.engine.export", description=main.__doc__)
    parser.add_argument("checkpoint", type=user_path, help="run folder, checkpoint folder, LoRA folder or LoRA file")
    parser.add_argument("--format", required=True, help="diffusers, kohya or merged")
    parser.add_argument("--out", required=True, type=user_path, help="a new .safetensors file, or a folder for it")
    parser.add_argument("--dtype", default="float32", help="float32 (default; nothing is lost), bfloat16 or float16")
    parser.add_argument("--base", help="merged: model to merge into, where it is not the one named in the LoRA")
    parser.add_argument("--components", help="merged: as model.components, for a base that is one .safetensors file")
    args = parser.parse_args(argv)
    quiet_libraries()
    for name, choices in (("format", FORMATS), ("dtype", tuple(DTYPES))):
        if getattr(args, name) not in choices:
            raise UserError(f"--{name}: found {getattr(args, name)!r}, expected one of {', '.join(choices)}")
    target = target_of(args.out, args.format)
    source, lora = find_lora(args.checkpoint)
    dtype = DTYPES[args.dtype]
    if args.format == "merged":
        unet = merged(lora, source, base_of(lora, source, args.base, args.components), dtype)
        save = lambda: save_merged(unet, target)
    else:
        save = lambda: write(lora, target, args.format, dtype)
    try:
        save()
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out: {target} cannot be written ({error}); choose another place") from None
    print(closing(lora, source, target, args.format, args.dtype))


def target_of(out: Path, form: str) -> Path:
    """Returns the file or folder to be written. Raises UserError if it exists already."""
    is_file = out.suffix == ".safetensors"
    if form == "merged" and is_file:
        raise UserError(f"--out: found the file {out}, expected a folder, in which merged weights get a folder unet/")
    inside = {"diffusers": LORA_FILE, "kohya": f"{out.resolve().name}.safetensors", "merged": "unet"}[form]
    target = out if is_file else out / inside
    if target.exists():
        raise UserError(f"--out: {target} exists already and is not overwritten; choose another place")
    return target


def merged(lora: Lora, source: Path, base: ModelConfig, dtype: torch.dtype) -> torch.nn.Module:
    """Loads the base model's UNet and adds the LoRA to its weights, in float32 and then rounded to `dtype`.

    Raises UserError where the LoRA does not fit.
    """
    try:
        unet = load_unet(base, torch.device("cpu"))
    except UserError as error:
        raise UserError(f"{error}; --base names the model to merge into") from None
    add_lora(unet, lora, source, base.path)
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)
    return unet


def save_merged(unet: torch.nn.Module, target: Path) -> None:
    """Writes a UNet as diffusers does, the weights with the mode of config.json, which the umask gave."""
    unet.save_pretrained(target)
    mode = stat.S_IMODE((target / "config.json").stat().st_mode)
    for file in target.glob("*.safetensors"):
        file.chmod(mode)


def closing(lora: Lora, source: Path, target: Path, form: str, dtype: str) -> str:
    """Returns lines that say what was written and how to load it."""
    files = [target] if target.is_file() else sorted(target.iterdir())
    ranks = " and ".join(str(rank) for rank in sorted(set(lora.ranks.values())))
    iteration = lora.facts.get("strop.iteration")
    load = {
        "diffusers": f"pipeline.load_lora_weights({str(target)!r})",
        "kohya": "copy it to models/loras of ComfyUI or models/Lora of A1111",
        "merged": f"as a pipeline's unet: UNet2DConditionModel.from_pretrained({str(target)!r})",
    }[form]
    rows = {
        "from": f"{source}{f', iteration {iteration}' if iteration else ''}",
        "wrote": target,
        "holds": f"{'UNet merged with ' if form == 'merged' else ''}{len(lora.down)} layers of rank {ranks}, {dtype}, "
        f"{sum(file.stat().st_size for file in files) / 2**20:,.1f} MiB",
        "load it": load,
    }
    return "\n".join(f"{name:<10}{value}" for name, value in rows.items())


if __name__ == "__main__":
    main()
