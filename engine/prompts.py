"""Prompt files, and which prompts belong to which iteration, which the seed alone decides: resuming needs no state."""

from __future__ import annotations

from pathlib import Path

import torch

from strop.engine.errors import UserError


def read_prompts(path: str, key: str) -> list[str]:
    """The prompts of a text file, one a line; blank lines are passed over. Raises UserError naming the key."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(
            f"{key}: {path} cannot be read ({error.strerror}); expected a text file, one prompt a line"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path} is not UTF-8 text; expected one prompt a line") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{key}: {path} holds no prompt; expected one a line")
    return prompts


def batch_of(prompts: list[str], iteration: int, size: int, seed: int) -> list[str]:
    """The `size` prompts of an iteration (from 0): every epoch is one permutation, drawn from seed and epoch."""
    first, beyond = iteration * size, (iteration + 1) * size
    epochs = range(first // len(prompts), (beyond - 1) // len(prompts) + 1)
    generators = [torch.Generator().manual_seed(seed * 100_003 + epoch) for epoch in epochs]
    order = torch.cat([torch.randperm(len(prompts), generator=generator) for generator in generators])
    begin = first - epochs[0] * len(prompts)
    return [prompts[place] for place in order[begin : begin + size].tolist()]
