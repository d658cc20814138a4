"""What test_ranks.py runs in two processes: `deepspeed --num_accelerators 2 two_ranks.py MODEL_FOLDER OUT_FOLDER`.

Each rank writes what it has to OUT_FOLDER/rank-<rank>.json; its LoRA after the updates to OUT_FOLDER/stage-<stage>.
"""

import argparse
import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from test_ranks import MICRO_BATCH, PROMPTS, all_pairs, lora_after, new_policy, settings

from strop.engine.methods.spo.pairs import balance
from strop.engine.models.conditioning import Conditioning
from strop.engine.runtime.optimizer import build_optimizer
from strop.engine.runtime.ranks import gather, gather_rows, start


def balanced(ranks, counts, inner_steps=1):
    """Numbers of the pairs that this rank is given when rank r has counts[r] of them; checks that prompts follow."""
    begin = sum(counts[: ranks.rank])
    pairs = all_pairs(inner_steps)
    mine = pairs[begin : begin + counts[ranks.rank]]
    share = balance(mine, PROMPTS, ranks, torch.Generator().manual_seed(3))
    number = {float(x[0, 0, 0]): i for i, x in enumerate(pairs.x_prev[0])}
    numbers = [number[float(x[0, 0, 0])] for x in share.x_prev[0]]
    for row, i in enumerate(numbers):
        owner = 0 if i < counts[0] else 1
        assert share.prompt[row] == owner * PROMPTS + pairs.prompt[i]
        assert torch.equal(share.x_t[:, row], pairs.x_t[:, i])
        assert (share.step[row], share.shared[row]) == (pairs.step[i], pairs.shared[i])
    return numbers


def spent(name, optimizer):
    return {f"{name} steps": optimizer.steps, f"{name} bytes": optimizer.state_bytes()}


def not_finite(stage, accumulate, ranks):
    """What becomes of four optimizer steps: all well, one rank's loss NaN, both ranks' loss, one rank's gradient."""
    module = torch.nn.Linear(4, 1, bias=False)
    torch.nn.init.ones_(module.weight)
    optimizer = build_optimizer(module, replace(settings(stage, 1), accumulate=accumulate), ranks)
    found = []
    for bad_ranks, gradient in (((), False), ((1,), False), ((0, 1), False), ((1,), True)):
        for _ in range(accumulate):
            loss, bad = module(torch.ones(4)).sum(), ranks.rank in bad_ranks
            if bad and gradient:
                loss.register_hook(lambda grad: grad * torch.nan)
            finite = optimizer.backward(loss * torch.nan if bad and not gradient else loss)
            optimizer.step()
        gate = optimizer.gate
        found.append([module.weight[0, 0].item(), optimizer.steps, gate.left_out, gate.in_a_row, bool(finite)])
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--local_rank")
    args = parser.parse_args()
    ranks = start("cpu")
    rows = torch.arange(3.0 * ranks.rank)[:, None] + 10 * ranks.rank  # (0 or 3, 1)
    together = gather(Conditioning(text=rows[:, None], null=torch.zeros(1, 1, 1), judge=-rows), ranks)
    results = {
        "gathered": gather_rows(rows, ranks).flatten().tolist(),
        "together": [getattr(together, name).flatten().tolist() for name in ("text", "null", "judge")],
        "balanced": {
            f"{c} {inner}": balanced(ranks, c, inner) for c in ([7, 5], [12, 0], [1, 0], [0, 0]) for inner in (1, 2)
        },
    }
    for stage, accumulate in product((1, 2), (1, 2, 3)):
        name, adamw = f"stage-{stage}-{accumulate}", settings(stage, MICRO_BATCH // 2, accumulate)
        policy = new_policy(args.model)
        optimizer = build_optimizer(policy.unet, adamw, ranks)
        lora_after(args.model, policy, optimizer, ranks)
        results |= spent(name, optimizer)
        (args.out / name).mkdir(exist_ok=True)
        optimizer.save(args.out / name)
        if ranks.first:
            policy.save_lora(args.out / name)
        dist.barrier()
        again = new_policy(args.model)
        again.load_lora(args.out / name)
        resumed = build_optimizer(again.unet, adamw, ranks)
        resumed.load(args.out / name)
        norms = [lora_after(args.model, *each, ranks) for each in ((policy, optimizer), (again, resumed))]
        pairs = zip(policy.parameters, again.parameters, strict=True)
        results[f"resumed {name}"] = all(torch.equal(a, b) for a, b in pairs) and norms[0] == norms[1]
        results[f"norms {name}"] = norms[0]
    policy = new_policy(args.model)
    optimizer = build_optimizer(policy.unet, settings(1, MICRO_BATCH // 2), ranks)
    lora_after(args.model, policy, optimizer, ranks, inner_steps=2)
    results |= spent("inner-steps", optimizer)
    if ranks.first:
        policy.save_lora(args.out / "inner-steps")
    cases = ((1, 1), (2, 1), (1, 2), (2, 2))
    results["not finite"] = {f"{stage} {many}": not_finite(stage, many, ranks) for stage, many in cases}
    (args.out / f"rank-{ranks.rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
