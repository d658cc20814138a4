"""One iteration of SD-1.5 or SDXL at full size: `python -m strop.bench.full_size sdxl --dtype bfloat16`, on a GPU.

Weights are random and made on the device, so nothing is downloaded; what an iteration costs does not depend on them.
Printed, and kept in bench/results/: seconds by stage, peak memory, and how far the log-ratio in this dtype is from that
in float32 on the same weights and pairs, which decides whether margin and implicit accuracy mean anything in it. Text
encoders, which run once per prompt and run, are left out. Images are noise; quality is bench/tinyworld's matter.
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

from strop.bench.precision import halve, noise
from strop.engine.config.training import Config, load
from strop.engine.errors import UserError, exit_on_user_error
from strop.engine.judge.clip import TimeConditionedCLIP
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.methods.spo.rollout import forking_steps, rollout
from strop.engine.methods.spo.update import learn
from strop.engine.models.architectures import FAMILIES, PICKSCORE
from strop.engine.models.base_model import DTYPES, equip
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.runtime import optimizer as zero
from strop.engine.runtime.metrics import Metrics, Stopwatch
from strop.engine.runtime.ranks import Ranks
from strop.engine.speed.apply import prepare

ROOT = Path(__file__).parents[1]
# Text features are drawn, not made: one layer stands for the text tower.
JUDGE = PICKSCORE | {"text_config": PICKSCORE["text_config"] | {"num_hidden_layers": 1}}
NOISE_PAIRS = 16


@exit_on_user_error
def main(argv: Sequence[str]) -> None:
    """Times one iteration at full size and measures the noise of the log-ratio."""
    parser = argparse.ArgumentParser(prog="python -m strop.bench.full_size", description=main.__doc__)
    parser.add_argument("family", choices=("sd15", "sdxl"))
    parser.add_argument("--dtype", default="float16", choices=tuple(DTYPES))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise UserError("full_size: PyTorch sees no GPU, and at full size an iteration on a CPU takes hours")
    config = load(ROOT / "configs" / f"{args.family}.yaml", [f"model.dtype={args.dtype}"])
    architecture = FAMILIES[args.family] | {"judge": JUDGE}
    record = measure(config, args.family, architecture, torch.device("cuda"))
    card = torch.cuda.get_device_name().replace(" ", "-")
    target = ROOT / "bench" / "results" / f"full_size-{card}-{args.family}-{args.dtype}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{json.dumps(record, indent=2)}\n\nwritten to {target}")


def measure(config: Config, family: str, architecture: dict, device: torch.device) -> dict:
    """The record of one warm iteration and of the log-ratio's noise; every pair is kept, as if the judge were sure."""
    rollout_config = config.rollout.model_copy(update={"threshold": 0.0})
    torch.manual_seed(0)
    with device:
        unet = equip(UNet2DConditionModel.from_config(architecture["unet"]), config.model)
    settings = zero.AdamWSettings.of(config.optim, 1, config.model.dtype)
    precise = Policy(unet, config.lora.rank, config.lora.target_modules, seed=0)
    move(precise)
    policy = copy.deepcopy(precise)
    policy.unet_rows, policy.merge_lora = config.model.unet_rows, config.model.merges_lora
    policy.share_halves = config.model.share_halves
    halve(policy, DTYPES[config.model.dtype])
    diffusion, judge = surroundings(config, family, architecture, device)
    for each in (precise, policy):
        prepare(config.model, each.unet, diffusion.vae, judge.clip)
        each.multiple = config.optim.micro_batch if config.model.compile else 1
    schedule = diffusion.schedule(config.rollout.num_steps, config.rollout.eta, config.rollout.guidance)
    optimizer = zero.build(policy.unet, replace(settings, lr=1e-30), Ranks(0, 1, device))  # both policies stay alike
    cond = conditioning(architecture, diffusion, config.rollout.prompts, DTYPES[config.model.dtype])
    rng = torch.Generator(device).manual_seed(0)
    forks = forking_steps(schedule, config.rollout)
    for warm in (False, True):
        clock = Stopwatch(device)
        if warm and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with clock("rollout"), policy.sampling(cond, config.rollout.text_kv) as known:
            pairs = rollout(policy, diffusion, judge, schedule, known, rollout_config, rng, clock).pairs
        with clock("update"):
            metrics = Metrics(ROOT, device, False, start=0, iterations=1)
            learn(pairs.shuffle(rng), forks, cond, policy, schedule, optimizer, config.optim, rng, metrics)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {
        "family": family,
        "dtype": config.model.dtype,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "prompts": config.rollout.prompts,
        "k": config.rollout.k,
        "inner_steps": config.rollout.inner_steps,
        "pairs": len(pairs),
        "seconds": clock.seconds(),
        "peak_bytes": peak,
        "log_ratio": noise(policy, precise, pairs[:NOISE_PAIRS], forks, schedule, cond, config),
    }


def move(policy: Policy) -> None:
    """Takes the LoRA's B away from zero, so that policy and reference differ about as after some optimizer steps."""
    rng = torch.Generator().manual_seed(1)
    for name, parameter in policy.unet.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(1e-3 * torch.randn(parameter.shape, generator=rng))


def surroundings(
    config: Config, family: str, architecture: dict, device: torch.device
) -> tuple[LatentDiffusion, StepAwarePreferenceModel]:
    """VAE, noise schedule and judge."""
    dtype = DTYPES[config.model.dtype]
    with device:
        vae = AutoencoderKL.from_config(architecture["vae"]).to(dtype)
        clip = TimeConditionedCLIP(CLIPModel(CLIPConfig(**architecture["judge"])))
    unet = architecture["unet"]
    latent_shape = (unet["in_channels"], unet["sample_size"], unet["sample_size"])
    scheduler = DDIMScheduler.from_config(architecture["scheduler"])
    diffusion = LatentDiffusion(family, [], [], vae, scheduler, latent_shape, decode_rows=config.model.decode_rows)
    clip.freeze()
    return diffusion, StepAwarePreferenceModel(clip, None, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)


def conditioning(architecture: dict, diffusion: LatentDiffusion, prompts: int, dtype: torch.dtype) -> Conditioning:
    """Random embeddings of the right shapes."""
    unet, device = architecture["unet"], diffusion.device
    rng = torch.Generator(device).manual_seed(2)
    made = lambda *shape: torch.randn(shape, generator=rng, device=device).to(dtype)
    width, features = unet["cross_attention_dim"], architecture["judge"]["projection_dim"]
    judge = torch.nn.functional.normalize(made(prompts, features).float(), dim=-1)
    cond = Conditioning(made(prompts, 77, width), made(1, 77, width), judge)
    if diffusion.family == "sd15":
        return cond
    pooled = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    sides = [side * diffusion.factor for side in diffusion.latent_shape[1:]]
    time_ids = torch.tensor([[*sides, 0, 0, *sides]], dtype=dtype, device=device)
    return replace(cond, pooled=made(prompts, pooled), null_pooled=made(1, pooled), time_ids=time_ids)


if __name__ == "__main__":
    main()
