"""Times an update on tinyworld with one forward for winner and loser, and with two, in one run.

`make bench` runs this; the bracketed factors of its table are the ratio. "shared" has x_t (1, N, ...), as the pairs of
SPO do; "apart" has the same x_t twice, (2, N, ...), as published implementations run it. Pairs are random, since an
update of any pairs costs the same.
"""

from pathlib import Path

import pytest
import torch

from strop.engine.config.find import load
from strop.engine.methods.spo.pairs import PreferencePairs
from strop.engine.methods.spo.update import Learner, MicroBatch
from strop.engine.models.base_model import load_unet
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.runtime.optimizer import AdamWSettings, build_optimizer
from strop.engine.runtime.ranks import Ranks

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("forward", ["shared", "apart"])
def test_update(benchmark, forward, monkeypatch):
    monkeypatch.chdir(ROOT)  # the recipe's paths are relative to the repository
    config, device = load("configs/tinyworld.yaml"), torch.device("cpu")
    model, lora, rows = config.model, config.lora, config.optim.micro_batch
    diffusion = LatentDiffusion.load(model, device)
    policy = Policy(load_unet(model, device), lora.rank, lora.target_modules, seed=0)
    optimizer = build_optimizer(policy.unet, AdamWSettings.of(config), Ranks(0, 1, device))
    schedule = diffusion.schedule(config.rollout.num_steps, config.rollout.eta, config.rollout.guidance)
    rng = torch.Generator().manual_seed(0)
    x_t = torch.randn(1, rows, *policy.latent_shape, generator=rng)
    step = torch.arange(rows) % 16 + 4
    eps = torch.randn(1, rows, *policy.latent_shape, generator=rng)
    x_prev = torch.stack([schedule.branch(x_t[0], eps, step, 1, rng)[0] for _ in range(2)])
    shared = forward == "shared"
    x_t = x_t if shared else x_t.repeat(2, 1, 1, 1, 1)
    pairs = PreferencePairs(x_t, x_prev, step, torch.arange(rows) % 2, torch.full((rows,), shared))
    cond = diffusion.encode(["a red circle", "a blue square on a white background"])
    learner, batch = Learner(policy, schedule, config.optim), MicroBatch(pairs, shared * rows, cond)

    def update() -> None:
        optimizer.backward(learner.loss(batch)[0])
        optimizer.step()

    benchmark.group = f"update of {rows} pairs on tinyworld"
    benchmark(update)
