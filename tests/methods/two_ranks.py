"""What test_two_ranks.py runs in two processes: `deepspeed --num_accelerators 2 two_ranks.py OUT RECIPE...`.

For each recipe each rank writes what it has collected to OUT/<method>-<rank>.safetensors, and the first one the LoRA
after the update to OUT/<method>.safetensors.
"""

import argparse
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from strop.engine.config.find import load
from strop.engine.runtime.ranks import start
from strop.engine.runtime.session import Session
from strop.engine.training import build


def update(parts, batches):
    """Learns from the micro-batches of an iteration, as loop.py does."""
    for batch in batches:
        loss, _ = parts.method.loss(batch)
        parts.optimizer.backward(loss)
        parts.optimizer.step()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("recipes", nargs="+")
    parser.add_argument("--local_rank")
    args = parser.parse_args()
    ranks = start("cpu")
    for recipe in args.recipes:
        config = load(recipe)
        parts = build(Session(config, ranks))
        rows, _ = parts.method.collect(0)
        batches = list(parts.method.batches(rows))
        rows = rows if is_dataclass(rows) else batches[0]  # of a data set: noised when asked for
        tensors = {f.name: value for f in fields(rows) if isinstance(value := getattr(rows, f.name), torch.Tensor)}
        save_file(
            {k: v.contiguous() for k, v in tensors.items()}, args.out / f"{config.method}-{ranks.rank}.safetensors"
        )
        update(parts, batches)
        if ranks.first:
            save_file(parts.models.policy.lora_state(), args.out / f"{config.method}.safetensors")


if __name__ == "__main__":
    main()
