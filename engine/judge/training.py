"""What a step-aware preference model learns from: what it is shown, its loss, and how often it is right.

An image is shown as SPO's judge will meet it: noised to timestep t, predicted clean by the frozen base model with
guidance, decoded. The loop is train_judge.py; the judge itself is model.py. No labels are made here: they come with
the data or from pair_survey.py. Nor are there in-batch negatives, which the published code has but leaves switched off.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.utils.data import Dataset

from ...kernels import DDIMCoefficients
from ..errors import UserError
from ..models.conditioning import Conditioning
from ..models.latent_diffusion import LatentDiffusion
from ..models.policy import unet_eps
from ..runtime.ranks import Ranks
from ..schedules.ddim import DDIMSchedule
from .model import StepAwarePreferenceModel


class Denoiser:
    """The frozen base model as a lens: what it takes an image for when it sees it noised to timestep t."""

    def __init__(self, diffusion: LatentDiffusion, unet: UNet2DConditionModel, guidance: float):
        """guidance: the scale of classifier-free guidance; 1 switches it off."""
        self.diffusion = diffusion
        self.unet = unet.eval().requires_grad_(False)
        self.alphas = diffusion.scheduler.alphas_cumprod.float().to(diffusion.device)
        self.timesteps = len(self.alphas)  # 1000
        prediction = diffusion.scheduler.config.prediction_type
        coefficients = DDIMCoefficients.build(self.alphas, self.timesteps, 1.0, prediction, steps_offset=0)
        self.schedule = DDIMSchedule(coefficients, guidance, diffusion.device)  # step s stands for t = 999 - s

    def __call__(self, images: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator) -> Tensor:
        """Decoded x0_hat of both images of each pair; the two are noised alike, so that only the images differ.

        images (2, N, 3, H, W) in [-1, 1]; cond of N prompts; t (N,) int64 in 0..999. Returns (2, N, 3, H, W), about
        [-1, 1].
        """
        return self.show(*self.posterior(images), cond, t, rng)

    @torch.no_grad()
    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (2, N, C, h, w) of the VAE's latents of images (2, N, 3, H, W), not scaled."""
        vae = self.diffusion.vae
        sides = [vae.encode(side.to(vae.dtype)).latent_dist for side in images]
        return torch.stack([side.mean for side in sides]), torch.stack([side.std for side in sides])

    @torch.no_grad()
    def show(self, mean: Tensor, std: Tensor, cond: Conditioning, t: Tensor, rng: torch.Generator) -> Tensor:
        """As a call, for what `posterior` gave.

        Draws from rng the sample of each image, then one noise for each pair. One UNet forward for all; the VAE takes
        one side after the other, which halves its memory.
        """
        noise = torch.randn((2 * len(t), *mean.shape[2:]), generator=rng, device=mean.device, dtype=mean.dtype)
        latents = (mean.flatten(0, 1) + std.flatten(0, 1) * noise) * self.diffusion.vae.config.scaling_factor
        latents = latents.float()  # (2N, C, h, w)
        noise = torch.randn((len(t), *latents.shape[1:]), generator=rng, device=latents.device)
        t = t.repeat(2)  # (2N,)
        x = self.add_noise(latents, noise.repeat(2, 1, 1, 1), t)
        eps = unet_eps(self.unet, x, t, cond.repeat(2), guided=self.schedule.guidance != 1)  # (1 or 2, 2N, C, h, w)
        return torch.stack([self.diffusion.decode(side).float() for side in self.x0_hat(x, eps, t).chunk(2)])

    def release_encoders(self) -> None:
        """Frees the device of the text encoders and of the VAE's encoder, once all that they make is in the cache."""
        self.diffusion.release_text_encoders()
        self.diffusion.vae.encoder.to("cpu")

    def add_noise(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """sqrt(a_t) latents + sqrt(1 - a_t) noise (DDPM, arXiv 2006.11239, formula 4). latents, noise (N, C, h, w)."""
        alpha = self.alphas[t].view(-1, 1, 1, 1)
        return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise

    def x0_hat(self, x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Predicted clean latents at training timesteps t (N,). x (N, C, h, w), eps (G, N, C, h, w) -> (N, C, h, w)."""
        return self.schedule.x0_hat(x, eps, self.timesteps - 1 - t)


def training_pixels(judge: StepAwarePreferenceModel, images: Tensor) -> Tensor:
    """Images (..., 3, H, W) in about [-1, 1] -> normalised pixels (..., 3, S, S), as the published training has them.

    Clamp, bicubic to a square, clamp. Scoring (StepAwarePreferenceModel.pixels) clamps only after the resize and crops
    what is not square: the same for square images without overshoot.
    """
    flat = (images.flatten(0, -4).float() / 2 + 0.5).clamp(0, 1)
    flat = F.interpolate(flat, size=(judge.size, judge.size), mode="bicubic", align_corners=False).clamp(0, 1)
    return ((flat - judge.mean) / judge.std).unflatten(0, images.shape[:-3])


def preference_scores(judge: StepAwarePreferenceModel, pixels: Tensor, text: Tensor, t: Tensor) -> Tensor:
    """Scores (2, N) of both images of each pair in one forward, with gradients.

    pixels (2, N, 3, S, S), normalised; text (N, E) from judge.encode; t (N,).
    """
    return judge.compare(pixels.flatten(0, 1), text.repeat(2, 1), t.repeat(2)).view(2, -1)


def preference_loss(scores: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Weighted sum over the pairs of KL(labels || softmax(scores)): cross-entropy whose minimum is 0, ties included.

    scores, labels (2, N), labels of a pair sum to 1, a tie is 0.5 / 0.5; weights (N,), see `example_weights`. Returns
    the loss and, without gradient, `loss`, `accuracy` (of the pairs that are no ties) and `decided` (their number).
    Source: SPO (arXiv 2406.04314), section 3.2 and the published SPMCriterion, which adds log 0.5 to ties.
    """
    each = -(labels * scores.log_softmax(0)).sum(0) - torch.special.entr(labels).sum(0)  # (N,)
    loss = (weights * each).sum()
    right, decided = agreement(scores.detach(), labels)
    return loss, {"loss": loss.detach(), "accuracy": right / decided.clamp(min=1), "decided": decided}


def agreement(scores: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(pairs whose preferred image scores higher, pairs that are no ties), as scalars. scores, labels (2, N)."""
    decided = labels[0] != labels[1]
    right = decided & ((scores[0] - scores[1]) * (labels[0] - labels[1]) > 0)
    return right.sum(), decided.sum()


def labels_of(batch: dict, device: torch.device) -> Tensor:
    """(2, N) float32, of a batch of pairs."""
    return torch.stack([batch["label_0"], batch["label_1"]]).float().to(device)


def example_weights(num_examples: Tensor, ranks: Ranks) -> Tensor:
    """1 / num_examples of each pair (N,), divided by the sum over all ranks and multiplied by their number.

    num_examples: how many training pairs have the prompt of this one, so that a prompt counts once however often it
    occurs. Gradients are averaged over the ranks, hence the factor: the mean of the ranks' losses is the weighted mean
    over all their pairs.
    """
    weights = num_examples.float().reciprocal()
    total = weights.sum()
    if ranks.size > 1:
        dist.all_reduce(total)
    return weights * ranks.size / total


def learning_rate(step: int, steps: int, warmup: int, peak: float, shape: str = "linear") -> float:
    """Warm-up over `warmup` steps to the peak, then linear decay that would reach 0 at `steps`. step from 0.

    shape: of the warm-up, "linear" or "log": log(1 + step) / log(warmup), as DeepSpeed's WarmupDecayLR has it.
    """
    if shape == "log" and step < warmup:
        return peak * math.log(1 + step) / math.log(max(2, warmup))
    return peak * min((step + 1) / max(1, warmup), (steps - step) / (steps - warmup))


def load_pairs(factory: Callable[[int, int], Dataset], spec: str, seed: int, size: int) -> Dataset:
    """factory(seed, size), its first pair checked. spec: the entry point data.source, where factory comes from.

    Raises UserError where the pairs are not as SpmDataConfig describes them.
    """
    pairs = factory(seed, size)
    if len(pairs) < 1:
        raise UserError(f"data.source: {spec} gives no pair, expected {size}")
    first = pairs[0]
    missing = [name for name in ("image_0", "image_1", "caption", "label_0", "label_1") if name not in first]
    if missing:
        raise UserError(f"data.source: the pairs of {spec} lack {', '.join(missing)}; found {', '.join(first)}")
    shapes = [tuple(first[name].shape) for name in ("image_0", "image_1")]
    if shapes[0] != shapes[1] or len(shapes[0]) != 3 or shapes[0][0] != 3:
        raise UserError(
            f"data.source: the images of {spec} have shapes {shapes[0]} and {shapes[1]}, expected (3, H, W)"
        )
    if abs(first["label_0"] + first["label_1"] - 1) > 1e-6:
        raise UserError(
            f"data.source: the labels of {spec} are {first['label_0']} and {first['label_1']}, expected sum 1"
        )
    return pairs


def shares(count: int, batch: int, steps: int, seed: int, ranks: Ranks) -> Iterator[list[int]]:
    """`steps` lists of `batch` indices of this rank: one shuffle of all `count` after the other, dealt to the ranks."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(order) < batch * ranks.size:
            order = torch.cat([order, torch.randperm(count, generator=rng)])
        dealt, order = order[: batch * ranks.size], order[batch * ranks.size :]
        yield dealt[ranks.rank * batch : (ranks.rank + 1) * batch].tolist()
