"""Runs the published recipe as a baseline: the same SPO as strop's, in the way of its authors' code.

It has all the work that strop saves: a second UNet as reference; winner and loser in separate calls, four UNet calls a
minibatch; the LoRA in float32 under autocast; prompts encoded in every iteration, and by the judge's text tower for
every candidate at every event; the judge's modulation for every image; a copy of its prompt's embedding with every
pair, gathered and indexed with it; four separate log-probabilities; means read by the host for every minibatch; the
cache emptied after every rollout. Everything runs eagerly in plain PyTorch. Networks, prompts and draws are the
caller's and the same as strop's, and so, to rounding, are pairs, losses and gradients. One process: no exchange.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from strop.engine.config.methods.spo import SPOConfig, SPOOptimConfig
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy

Pairs = dict[str, Tensor]  # N rows each: t, x_t (N, R, C, h, w), x_prev (N, 2, C, h, w), text and, of SDXL, pooled
Clock = Callable[[str], AbstractContextManager]


class Published:
    """Policy, reference, base model and judge, with the optimizer of the policy's LoRA."""

    def __init__(
        self, unet: UNet2DConditionModel, diffusion: LatentDiffusion, judge: StepAwarePreferenceModel, config: SPOConfig
    ):
        """Takes `unet` for the policy and a copy of it as reference; the LoRA starts as strop's from run.seed does."""
        lora, optim, rollout = config.lora, config.optim, config.rollout
        self.reference = copy.deepcopy(unet).requires_grad_(False).eval()
        self.policy = Policy(unet, lora.rank, lora.target_modules, config.run.seed, diffusion.latent_shape)
        self.diffusion, self.judge, self.config = diffusion, judge, config
        self.dtype, self.device = self.reference.dtype, diffusion.device
        schedule = diffusion.schedule(rollout.num_steps, rollout.eta, rollout.guidance)
        self.t = schedule.t[:-1]
        first = schedule.steps_within(*rollout.t_range).start
        self.starts = list(range(first, rollout.num_steps, rollout.inner_steps))
        if rollout.merge_last and len(self.starts) > 1 and self.starts[-1] == rollout.num_steps - 1:
            self.starts.pop()
        self.alphas = diffusion.scheduler.alphas_cumprod.to(self.device)
        self.parameters = self.policy.parameters
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.waiting = 0  # minibatches since the last optimizer step

    def eps(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Computes the policy's guided output (N, C, h, w) in float32. x (N, C, h, w); t (N,); cond of N prompts."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            halves = both_halves(self.policy.unet, x, t, cond)
        return self._guided(halves.float())

    @torch.no_grad()
    def reference_eps(self, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Does as `eps` with the reference: no autocast, and guidance in the type of the UNet."""
        return self._guided(both_halves(self.reference, x, t, cond))

    def _guided(self, halves: Tensor) -> Tensor:
        null, text = halves.chunk(2)
        return null + self.config.rollout.guidance * (text - null)

    def numbers(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gathers alpha_t, alpha_prev and sigma of each row's timestep, (N, 1, 1, 1), from the schedule anew."""
        prev = (t - len(self.alphas) // self.config.rollout.num_steps).clamp(0, len(self.alphas) - 1)
        alpha, alpha_prev = self.alphas[t].view(-1, 1, 1, 1), self.alphas[prev].view(-1, 1, 1, 1)
        variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
        return alpha, alpha_prev, self.config.rollout.eta * variance.sqrt()

    def x0_and_mean(self, x: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Computes clean latent, mean and sigma of the DDIM step (formulas 12 and 16 of arXiv 2010.02502)."""
        alpha, alpha_prev, sigma = self.numbers(t)
        if self.diffusion.scheduler.config.prediction_type == "v_prediction":
            x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * eps
            eps = alpha.sqrt() * eps + (1 - alpha).sqrt() * x
        else:
            x0 = (x - (1 - alpha).sqrt() * eps) / alpha.sqrt()
        return x0, alpha_prev.sqrt() * x0 + (1 - alpha_prev - sigma**2).sqrt() * eps, sigma

    def log_prob(self, x_prev: Tensor, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Computes the mean log-density (N,) of drawing x_prev (N, C, h, w) from x (N, C, h, w)."""
        _, mean, sigma = self.x0_and_mean(x, eps, t)
        density = -((x_prev - mean) ** 2) / (2 * sigma**2) - sigma.log() - math.log(math.sqrt(2 * math.pi))
        return density.mean((1, 2, 3))


def both_halves(unet: UNet2DConditionModel, x: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """Computes the output (2N, C, h, w) of one forward: without the prompt, then with it."""
    text, added = torch.cat([cond.null.expand_as(cond.text), cond.text]), None
    if cond.pooled is not None:  # SDXL
        pooled = torch.cat([cond.null_pooled.expand_as(cond.pooled), cond.pooled])
        added = {"text_embeds": pooled, "time_ids": cond.time_ids.repeat(len(text), 1)}
    x = torch.cat([x, x]).to(text.dtype)
    return unet(x, torch.cat([t, t]), encoder_hidden_states=text, added_cond_kwargs=added).sample


def iteration(
    models: Published,
    prompts: Sequence[str],
    rng: torch.Generator,
    shuffle: torch.Generator,
    clock: Clock = nullcontext,
) -> tuple[Pairs, list[list[float]]]:
    """Runs rollout, shuffle and one pass. Returns the shuffled pairs, and the logged means of each minibatch."""
    with clock("text"), torch.no_grad():
        cond, ids = models.diffusion.encode(prompts), token_ids(models.judge, prompts)
    pairs = rollout(models, cond, ids, rng, clock)
    if models.device.type == "cuda":
        torch.cuda.empty_cache()
    logged = []
    with clock("update"):
        order = torch.randperm(len(pairs["t"]), generator=shuffle, device=models.device)
        pairs = {name: value[order] for name, value in pairs.items()}
        size = models.config.optim.micro_batch
        for start in range(0, len(order), size):
            batch = {name: value[start : start + size] for name, value in pairs.items()}
            logged.append(update(models, batch, cond, clock))
    return pairs, logged


@torch.no_grad()
def rollout(models: Published, cond: Conditioning, ids: Tensor, rng: torch.Generator, clock: Clock) -> Pairs:
    """Samples as both published samplers do: SD-1.5's with segments of one step, SDXL's with longer ones.

    ids: the judge's tokens (B, L). Each step draws which candidate goes on, where they are judged, then the noise.
    """
    config, starts, device = models.config.rollout, models.starts, models.device
    rows, pairs, path = cond, [], []
    draw = lambda count: torch.randn(
        (count, *models.diffusion.latent_shape), generator=rng, device=device, dtype=cond.text.dtype
    )
    x = draw(len(cond))
    for step, t in enumerate(models.t):
        t = torch.full((len(x),), t, device=device)
        with clock("rollout/trunk" if step <= starts[0] else "rollout/branches"):
            eps = models.eps(x, t, rows)
        if step in starts[1:]:
            x0 = models.x0_and_mean(x, eps, t)[0]
            pairs += winners_and_losers(models, path, score(models, x0, ids, t, clock), cond, step - len(path) + 1)
            choice = torch.randint(0, config.k, (len(cond),), generator=rng, device=device)
            candidate = choice * len(cond) + torch.arange(len(cond), device=device)
            x, eps = x[candidate], eps[candidate]
        if step in starts:
            x, eps, t, rows = x.repeat(config.k, 1, 1, 1), eps.repeat(config.k, 1, 1, 1), t[:1], cond.repeat(config.k)
            path = [x]
        _, mean, sigma = models.x0_and_mean(x, eps, t)
        x = (mean + sigma * draw(len(x))).to(x.dtype)
        path.append(x)
    t = torch.zeros(len(x), dtype=torch.int64, device=device)
    pairs += winners_and_losers(models, path, score(models, x, ids, t, clock), cond, len(models.t) - len(path) + 1)
    return {name: torch.cat([part[name] for part in pairs]) for name in pairs[0]}


def token_ids(judge: StepAwarePreferenceModel, prompts: Sequence[str]) -> Tensor:
    """Returns the token ids (B, L) of the prompts for the judge."""
    length = judge.clip.config.text_config.max_position_embeddings
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return judge.tokenizer(list(prompts), **options).input_ids.to(judge.device)


def score(models: Published, latents: Tensor, ids: Tensor, t: Tensor, clock: Clock) -> Tensor:
    """Scores (K, B) of latents (K*B, C, h, w), all decoded at once, for ids (B, L) at t (K*B,)."""
    vae, judge = models.diffusion.vae, models.judge
    with clock("rollout/decode"):
        images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    with clock("text"):
        text = F.normalize(judge.clip.text_features(ids.repeat(len(latents) // len(ids), 1)), dim=-1)
    with clock("rollout/judge"):
        return judge.compare(judge.pixels(images), text, t).view(-1, len(ids))


def winners_and_losers(
    models: Published, path: list[Tensor], scores: Tensor, cond: Conditioning, first: int
) -> list[Pairs]:
    """Returns a segment's pairs of the prompts whose best and worst candidate differ enough, with their embeddings.

    path: states (K*B, C, h, w) from step `first`, at which they are the same for all candidates, to the segment's end.
    """
    values, order = scores.sort(dim=0, descending=True)
    probability = values[[0, -1]].softmax(0)
    valid = probability[0] - probability[1] > models.config.rollout.threshold  # (B,)
    prompts = torch.arange(scores.shape[1], device=scores.device)
    of_both = lambda states: states.unflatten(0, scores.shape)[order[[0, -1]], prompts].transpose(0, 1)[valid]
    pairs = []
    for step, (before, after) in enumerate(pairwise(path), first):
        x_t, x_prev = of_both(before), of_both(after)  # (N, 2, C, h, w)
        x_t = x_t if models.config.rollout.inner_steps > 1 else x_t[:, :1]
        t = torch.full((len(x_t),), models.t[step], device=scores.device)
        pairs.append({"t": t, "x_t": x_t, "x_prev": x_prev, "text": cond.text[valid]})
        if cond.pooled is not None:
            pairs[-1]["pooled"] = cond.pooled[valid]
    return pairs


def update(models: Published, batch: Pairs, cond: Conditioning, clock: Clock) -> list[float]:
    """Trains on a minibatch, perhaps with an optimizer step. Returns the means of the loss and of both ratios."""
    optim, t = models.config.optim, batch["t"]
    batch_cond = Conditioning(batch["text"], cond.null, None, batch.get("pooled"), cond.null_pooled, cond.time_ids)
    ratios = []
    for side in (0, 1):
        x, x_prev = batch["x_t"][:, min(side, batch["x_t"].shape[1] - 1)], batch["x_prev"][:, side]
        log_prob = models.log_prob(x_prev, x, models.eps(x, t, batch_cond), t)
        log_prob_ref = models.log_prob(x_prev, x, models.reference_eps(x, t, batch_cond), t)
        low, high = (1 - optim.clip, 1 + optim.clip) if optim.clip else (0.0, math.inf)
        ratios.append((log_prob - log_prob_ref).exp().clamp(low, high))
    loss = -F.logsigmoid(optim.beta * (ratios[0].log() - ratios[1].log())).mean()
    models.scaler.scale(loss / optim.accumulate).backward()
    with clock("update/optimizer"):
        learn(models, optim)
    return [value.mean().item() for value in (loss, *ratios)]


def learn(models: Published, optim: SPOOptimConfig) -> None:
    """Takes an optimizer step once `accumulate` minibatches wait."""
    models.waiting += 1
    if models.waiting < optim.accumulate:
        return
    if optim.max_grad_norm:
        models.scaler.unscale_(models.optimizer)
        torch.nn.utils.clip_grad_norm_(models.parameters, optim.max_grad_norm)
    models.scaler.step(models.optimizer)
    models.scaler.update()
    models.optimizer.zero_grad()
    models.waiting = 0
