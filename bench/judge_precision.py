"""Measures what half precision does to a judge's order: `python -m strop.bench.judge_precision`, on tinyworld.

The base policy's branches are scored by each judge in float32, float16 and bfloat16, all in one rollout, so that every
judge sees the same pools of k. On a CPU, in a few minutes. precision.py measures the policy's half precision.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from strop.engine.config.find import load
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.config.training import JudgeConfig
from strop.engine.data.prompts import read_prompts
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.judge.candidates import Candidates
from strop.engine.judge.find import AnyJudge, load_judge
from strop.engine.methods.protocol import finite_mean
from strop.engine.methods.spo.audit import kendall_tau
from strop.engine.methods.spo.pairs import is_sure
from strop.engine.methods.spo.rollout import Rollout, choose
from strop.engine.models.base_model import DTYPES, load_unet, quiet_libraries
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy

ROOT = Path(__file__).parents[1]
WEIGHTS = ROOT / "bench" / "tinyworld" / "weights"
RESULT = ROOT / "bench" / "results" / "judge_precision_tinyworld.json"
CPU = torch.device("cpu")
AT_ONCE = 16  # prompts


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Measures how often judges in half precision order the base policy's branches as in float32."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.judge_precision", description=main.__doc__)
    parser.add_argument("--prompts", type=int, default=32, help="of the training prompts, at least 1")
    args = parser.parse_args(argv)
    quiet_libraries()
    config = load(ROOT / "configs" / "tinyworld.yaml")
    prompts = read_prompts(config.prompts.train, "prompts.train")
    if not 1 <= args.prompts <= len(prompts):
        raise UserError(f"--prompts: found {args.prompts}, expected 1 to {len(prompts)}, which tinyworld has")
    judges = {
        "step-aware": config.judge,
        "PickScore": JudgeConfig(path=str(WEIGHTS / "pickscore"), kind="pickscore"),
        "latent": JudgeConfig(path=str(WEIGHTS / "judge_latent"), kind="latent"),
    }
    record = measure(config, judges, prompts[: args.prompts])
    RESULT.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{table(record)}\n\nwritten to {RESULT}")


@dataclass(frozen=True, slots=True)
class Panel:
    """A judge for a rollout that has several score the same candidates; the first one's scores are used.

    texts: what each judge's `encode` made of the prompts; scores: for each judge, a tensor (K, B) of each event.
    """

    judges: dict[tuple[str, str], AnyJudge]
    texts: dict[tuple[str, str], Tensor]
    scores: dict[tuple[str, str], list[Tensor]]

    def score(self, candidates: Candidates, cond: Conditioning) -> Tensor:
        for name, judge in self.judges.items():
            self.scores[name].append(judge.score(candidates, replace(cond, judge=self.texts[name])))
        return next(iter(self.scores.values()))[-1]


def measure(config: SPOConfig, judges: dict[str, JudgeConfig], prompts: Sequence[str]) -> dict:
    """Returns the record: agreement with float32 by judge and dtype, over the judged events of the base policy."""
    diffusion = LatentDiffusion.load(config.model, CPU)
    lora, rollout = config.lora, config.rollout
    unet = load_unet(config.model, CPU)  # of which a judge that is a LoRA is a part
    policy = Policy(load_unet(config.model, CPU), lora.rank, lora.target_modules, 0, diffusion.latent_shape)
    schedule, rng = diffusion.schedule(rollout.num_steps, rollout.eta, rollout.guidance), torch.Generator()
    loaded = {
        (name, dtype): load_judge(judge.model_copy(update={"dtype": dtype}), config.model, diffusion, unet)
        for name, judge in judges.items()
        for dtype in DTYPES
    }
    scores = {name: [] for name in loaded}
    for start in range(0, len(prompts), AT_ONCE):
        part = prompts[start : start + AT_ONCE]
        panel = Panel(loaded, {name: judge.encode(part) for name, judge in loaded.items()}, scores)
        Rollout(policy, diffusion, panel, schedule, rollout)(diffusion.encode(part), rng.manual_seed(start))
        print(f"{start + len(part)} of {len(prompts)} prompts", flush=True)
    pools = {name: torch.cat(parts, dim=1) for name, parts in scores.items()}  # (K, N)
    return {
        "recipe": "tinyworld",
        "torch": torch.__version__,
        "k": rollout.k,
        "threshold": rollout.threshold,
        "pools": next(iter(pools.values())).shape[1],
        "judges": {
            name: {
                dtype: agreement(pools[name, dtype], pools[name, "float32"], rollout.threshold)
                for dtype in ("float16", "bfloat16")
            }
            for name in judges
        },
    }


def agreement(scores: Tensor, exact: Tensor, threshold: float) -> dict[str, float]:
    """Compares scores of N pools of K with those in float32, both (K, N).

    best, worst: share of pools in which they are the same branch; tau: mean of Kendall's tau over pools; kept: share
    of pools whose pair is above the threshold by `exact`; kept_pair: of these, the share in which both branches of the
    pair are the same.
    """
    mean = lambda same: same.double().mean().item()
    chosen = choose(exact, "best_worst", None)  # (2, N)
    same, kept = choose(scores, "best_worst", None) == chosen, is_sure(exact, chosen, threshold)
    return {
        "best": mean(same[0]),
        "worst": mean(same[1]),
        "tau": finite_mean(kendall_tau(scores, exact)).item(),
        "kept": mean(kept),
        "kept_pair": mean(same.all(0)[kept]),
    }


def table(record: dict) -> str:
    """Returns the record as a table in Markdown."""
    kept = f"pair the same, of those kept at {record['threshold']:g}"
    lines = [
        f"| judge | dtype | best the same | worst the same | Kendall's tau | {kept} |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_dtype in record["judges"].items():
        for dtype, row in by_dtype.items():
            shares = " | ".join(f"{row[key]:.1%}" for key in ("best", "worst"))
            lines.append(f"| {name} | {dtype} | {shares} | {row['tau']:.4f} | {row['kept_pair']:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
