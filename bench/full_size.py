"""Times an iteration of SD-1.5 or SDXL at full size on a GPU: `python -m strop.bench.full_size sdxl --dtype bfloat16`.

Weights are drawn on the device, so nothing is downloaded; the cost of an iteration does not depend on them. It prints
and writes to bench/results/: seconds by stage, peak memory, and how far the log-ratio in this dtype is from that in
float32 on the same weights and pairs, which decides whether margin and implicit accuracy mean anything in it. Text
encoders, which run once per prompt and run, are left out. Images are noise; bench/tinyworld measures quality.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from strop.bench.machine import machine, write
from strop.bench.precision import halve, noise
from strop.engine.config.find import load
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.config.settings import varied
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.judge.clip import TimeConditionedCLIP
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.judge.pickscore import PICKSCORE
from strop.engine.methods.spo.rollout import Rollout
from strop.engine.methods.spo.update import Learner
from strop.engine.models.base_model import DTYPES, configure_unet
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.families.base import Family
from strop.engine.models.families.find import FAMILIES, family_named
from strop.engine.models.guided_unet import Savings
from strop.engine.models.latent_diffusion import LatentDiffusion, TextEncoding
from strop.engine.models.policy import Policy
from strop.engine.runtime.optimizer import AdamWSettings, build_optimizer
from strop.engine.runtime.ranks import Ranks
from strop.engine.runtime.stopwatch import Stopwatch
from strop.engine.speed.apply import prepare

ROOT = Path(__file__).parents[1]
# Text features are drawn at random, so one layer stands for the text tower.
JUDGE = PICKSCORE | {"text_config": PICKSCORE["text_config"] | {"num_hidden_layers": 1}}
NOISE_PAIRS = 16


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Times one iteration at full size and measures the noise of the log-ratio."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.full_size", description=main.__doc__)
    parser.add_argument("family", choices=[family.name for family in FAMILIES])
    parser.add_argument("--dtype", default="float16", choices=tuple(DTYPES))
    parser.add_argument("--out", type=Path, help="folder of the record (default: the machine's in bench/results/)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("full_size: PyTorch sees no GPU, and at full size an iteration on a CPU takes hours")
    config = load(ROOT / "configs" / f"{args.family}.yaml", [f"model.dtype={args.dtype}"])
    family = family_named(args.family)
    record = measure(config, family, family.architecture | {"judge": JUDGE}, torch.device("cuda"))
    target = write(record, f"full_size-{args.family}-{args.dtype}", args.out)
    print(f"{json.dumps(record, indent=2)}\n\nwritten to {target}")


def measure(config: SPOConfig, family: Family, architecture: dict, device: torch.device) -> dict:
    """Returns the record of one warm iteration and of the log-ratio's noise; all pairs are trained on."""
    config = varied(config, {"rollout.threshold": 0.0})
    model, lora = config.model, config.lora
    torch.manual_seed(0)
    with device:
        unet = configure_unet(UNet2DConditionModel.from_config(architecture["unet"]), model)
    precise = Policy(unet, lora.rank, lora.target_modules, seed=0)
    move(precise)
    policy = copy.deepcopy(precise)
    policy.savings = Savings.of(model, config.optim.micro_batch)
    halve(policy, DTYPES[model.dtype])
    diffusion, judge = surroundings(config, family, architecture, device)
    for each in (precise, policy):
        prepare(model, each.unet, diffusion.vae, judge.clip)
    schedule = diffusion.schedule(config.rollout.num_steps, config.rollout.eta, config.rollout.guidance)
    settings = replace(AdamWSettings.of(config), lr=1e-30)  # both policies stay alike
    optimizer = build_optimizer(policy.unet, settings, Ranks(0, 1, device))
    cond = conditioning(architecture, diffusion, config.rollout.prompts, DTYPES[model.dtype])
    rng = torch.Generator(device).manual_seed(0)
    learner = Learner(policy, schedule, config.optim)
    for warm in (False, True):
        clock = Stopwatch(device)
        rollout = Rollout(policy, diffusion, judge, schedule, config.rollout, clock)
        if warm and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with clock("rollout"), policy.sampling(cond, config.rollout.text_kv) as sampling_cond:
            pairs = rollout(sampling_cond, rng).pairs
        with clock("update"):
            for batch in learner.batches(pairs.shuffle(rng), cond, rng):
                optimizer.backward(learner.loss(batch)[0])
                optimizer.step()
    return {
        "family": family.name,
        "dtype": model.dtype,
        "machine": machine(device),
        "torch": torch.__version__,
        "prompts": config.rollout.prompts,
        "k": config.rollout.k,
        "inner_steps": config.rollout.inner_steps,
        "pairs": len(pairs),
        "seconds": clock.seconds(),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "log_ratio": noise(learner, replace(learner, policy=precise), pairs[:NOISE_PAIRS], cond),
    }


def move(policy: Policy) -> None:
    """Sets the LoRA's B to small random numbers, so that the policy differs about as after some optimizer steps."""
    rng = torch.Generator().manual_seed(1)
    for name, parameter in policy.unet.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(1e-3 * torch.randn(parameter.shape, generator=rng))


def surroundings(
    config: SPOConfig, family: Family, architecture: dict, device: torch.device
) -> tuple[LatentDiffusion, StepAwarePreferenceModel]:
    """Builds the VAE with its noise schedule, and the judge, with random weights."""
    dtype = DTYPES[config.model.dtype]
    with device:
        vae = AutoencoderKL.from_config(architecture["vae"]).to(dtype)
        clip = TimeConditionedCLIP(CLIPModel(CLIPConfig(**architecture["judge"])))
    unet = architecture["unet"]
    latent_shape = (unet["in_channels"], unet["sample_size"], unet["sample_size"])
    scheduler = DDIMScheduler.from_config(architecture["scheduler"])
    diffusion = LatentDiffusion(family, TextEncoding(), vae, scheduler, latent_shape, config.model.decode_rows)
    clip.freeze()
    return diffusion, StepAwarePreferenceModel(clip, None, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def conditioning(architecture: dict, diffusion: LatentDiffusion, prompts: int, dtype: torch.dtype) -> Conditioning:
    """Draws random embeddings of the right shapes."""
    unet, device = architecture["unet"], diffusion.device
    rng = torch.Generator(device).manual_seed(2)
    draw = lambda *shape: torch.randn(shape, generator=rng, device=device).to(dtype)
    width, features = unet["cross_attention_dim"], architecture["judge"]["projection_dim"]
    judge = torch.nn.functional.normalize(draw(prompts, features).float(), dim=-1)
    cond = Conditioning(draw(prompts, 77, width), draw(1, 77, width), judge)
    pooled = diffusion.family.pooled_width(unet)
    time_ids = diffusion.family.time_ids(*(side * diffusion.factor for side in diffusion.latent_shape[1:]))
    if pooled is not None:
        cond = replace(cond, pooled=draw(prompts, pooled), null_pooled=draw(1, pooled))
    if time_ids is not None:
        cond = replace(cond, time_ids=torch.tensor([time_ids], dtype=dtype, device=device))
    return cond


if __name__ == "__main__":
    main()
