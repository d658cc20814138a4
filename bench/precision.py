"""Measures the error of the log-ratio in half precision, which decides the recipes' dtype: `-m strop.bench.precision`.

Some iterations of tinyworld move the policy away from its base; on the pairs of one more rollout, the margin that the
loss sees and the gradient of the LoRA are then computed in float32, float16 and bfloat16. On a CPU, in a few minutes.
full_size.py measures the same of SD-1.5 and SDXL on a GPU, with random weights.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from strop.bench import ours
from strop.engine.config.find import load
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.data.embeddings import Embeddings
from strop.engine.data.prompts import read_prompts
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.methods.spo.update import Learner, micro_batches
from strop.engine.models.base_model import DTYPES, load_unet, quiet_libraries
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.runtime.optimizer import FLOAT16_SCALE

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Measures the noise that half precision puts on the log-ratio."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.precision", description=main.__doc__)
    parser.add_argument("--iterations", type=int, default=6, help="of training before it is measured, at least 1")
    args = parser.parse_args(argv)
    quiet_libraries()
    config = load(ROOT / "configs" / "tinyworld.yaml")
    most = len(read_prompts(config.prompts.train, "prompts.train")) // config.rollout.prompts - 1
    if not 1 <= args.iterations <= most:
        raise UserError(f"--iterations: found {args.iterations}, expected 1 to {most}, for which there are prompts")
    record = measure(config, args.iterations)
    target = ROOT / "bench" / "results" / "precision_tinyworld.json"
    target.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{table(record)}\n\nwritten to {target}")


def measure(config: SPOConfig, iterations: int) -> dict:
    """Returns the record: noise by dtype, on the pairs of a rollout after so many iterations."""
    networks = load_unet(config.model, CPU), LatentDiffusion.load(config.model, CPU)
    models = ours.Ours(*networks, StepAwarePreferenceModel.load(config.judge, CPU), config)
    count = config.rollout.prompts
    prompts = read_prompts(config.prompts.train, "prompts.train")[: count * (iterations + 1)]
    rng, shuffle = (torch.Generator().manual_seed(seed) for seed in (0, 1))
    for done in range(iterations):
        pairs = ours.iteration(models, prompts[count * done : count * (done + 1)], rng, shuffle)
        print(f"iteration {done + 1} of {iterations}: {len(pairs)} pairs", flush=True)
    cond = Embeddings(models.diffusion, models.judge, [prompts[-count:]])[prompts[-count:]]
    pairs = ours.roll(models, cond, rng)
    noise_by_dtype = {}
    for name in ("float32", "float16", "bfloat16"):
        policy = copy.deepcopy(models.policy)
        halve(policy, DTYPES[name])
        learner = replace(models.learner, policy=policy)
        noise_by_dtype[name] = noise(learner, models.learner, pairs, cond.to(DTYPES[name]))
        print(f"{name}: {noise_by_dtype[name]}", flush=True)
    return {"recipe": "tinyworld", "torch": torch.__version__, "iterations": iterations, "log_ratio": noise_by_dtype}


def table(record: dict) -> str:
    """Returns the record as a table in Markdown."""
    lines = ["| dtype | noise / signal | same sign | gradient's cosine |", "|---|---|---|---|"]
    for name, row in record["log_ratio"].items():
        signal, sign = f"{row['noise_to_signal']:.2g}", f"{row['same_sign']:.1%}"
        lines.append(f"| {name} | {signal} | {sign} | {row['gradient_cosine']:.6f} |")
    return "\n".join(lines)


def halve(policy: Policy, dtype: torch.dtype) -> None:
    """Casts the frozen weights to `dtype`; the LoRA stays in float32."""
    trained = {name: p.data for name, p in policy.unet.named_parameters() if p.requires_grad}
    policy.unet.to(dtype)
    for name, parameter in policy.unet.named_parameters():
        if name in trained:
            parameter.data = trained[name]


def noise(learner: Learner, precise: Learner, pairs: PreferencePairs, cond: Conditioning) -> dict[str, float]:
    """Measures how far the margin and the LoRA's gradient in the policy's dtype are from those in float32.

    precise: the same policy in float32; cond: in the policy's dtype. noise_to_signal: root mean square of the error of
    log_ratio[winner] - log_ratio[loser], over that of itself; same_sign: share of pairs for which implicit accuracy is
    the same; gradient_cosine: between the two gradients of the mean margin.
    """
    margin, gradient = margin_and_gradient(learner, pairs, cond)
    with without_tf32():
        exact, exact_gradient = margin_and_gradient(precise, pairs, cond.to(torch.float32))
    return {
        "pairs": len(pairs),
        "noise_to_signal": ((margin - exact).square().mean() / exact.square().mean()).sqrt().item(),
        "same_sign": (margin.sign() == exact.sign()).double().mean().item(),
        "gradient_cosine": torch.nn.functional.cosine_similarity(gradient, exact_gradient, dim=0).item(),
    }


@contextmanager
def without_tf32() -> Iterator[None]:
    """Opens a context in which TF32 is off in this process."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def margin_and_gradient(learner: Learner, pairs: PreferencePairs, cond: Conditioning) -> tuple[Tensor, Tensor]:
    """Returns (log_ratio of the winners minus that of the losers (N,), gradient of its mean by the LoRA) in float64."""
    margins, parameters = [], learner.policy.parameters
    scale = FLOAT16_SCALE  # a power of two, so that it changes no digit where it is not needed
    for parameter in parameters:
        parameter.grad = None
    for batch in micro_batches(pairs, learner.config.micro_batch, cond):
        eps, eps_ref = learner.predict(batch), learner.predict_reference(batch)
        part = batch.pairs
        log_ratio = learner.schedule.log_ratio(part.x_prev, part.x_t, eps, eps_ref, part.step)
        margin = log_ratio[0] - log_ratio[1]
        (scale * margin.sum() / len(pairs)).backward()
        margins.append(margin.detach().double())
    gradient = torch.cat([p.grad.flatten().double() for p in parameters]) / scale
    return torch.cat(margins), gradient


if __name__ == "__main__":
    main()
