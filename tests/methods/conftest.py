"""What the whole iterations of methods are compared with: one latent, one step, one guidance half at a time."""

import functools
import math

import pytest
import torch

from strop.engine.config.factory import resolve
from strop.engine.config.find import load
from strop.engine.runtime.ranks import Ranks
from strop.engine.runtime.session import Session
from strop.engine.training import build

ALONE = Ranks(0, 1, torch.device("cpu"))


class Run:
    """The parts of a run of a recipe, built as training does, whose LoRA is moved off its start.

    PLAIN_STEPS: keys with which a step of Adam is nearly linear in the gradient.
    """

    PLAIN_STEPS = ("optim.eps=1", "optim.lr=20", "optim.weight_decay=0", "optim.max_grad_norm=null")

    def __init__(self, arguments, moved=True):
        """moved: whether the LoRA is."""
        self.config = load(arguments[0], arguments[1:])
        self.parts = build(Session(self.config, ALONE))
        self.method, self.policy = self.parts.method, self.parts.models.policy
        self.cond = self.method.prompts.mine(0) if self.config.prompts_per_iteration else None
        rng = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.policy.parameters if moved else ():
                parameter += 0.05 * torch.randn(parameter.shape, generator=rng)

    def iterate(self):
        """Runs the first iteration; returns its facts and the last stats."""
        rows, facts = self.method.collect(0)
        return facts, self.update(rows)

    def update(self, rows):
        """Learns from the rows of an iteration; returns the last stats."""
        for batch in self.method.batches(rows):
            loss, stats = self.method.loss(batch)
            self.parts.optimizer.backward(loss)
            self.parts.optimizer.step()
        return stats

    def lora(self):
        return {name: value.clone() for name, value in self.policy.lora_state().items()}

    def adamw(self):
        self.parts.optimizer.gate.judge(torch.zeros(()), True)  # its hooks then pass gradients on
        optim = self.config.optim
        return torch.optim.AdamW(
            self.policy.parameters, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
        )

    def eps(self, x, t, prompt):
        """The guided prediction at one latent (C, H, W): two forwards of one row."""
        cond, t = self.cond[torch.tensor([prompt])], torch.tensor([t])
        without, text = (self.policy.eps(x[None], t, c, guided=False)[0, 0] for c in (cond.unprompted(), cond))
        guidance = self.config.rollout.guidance
        return without + guidance * (text - without)

    def mean_and_sigma(self, x, eps, step):
        """Of p(x_prev | x_t) at one latent, by formulas 12 and 16 of DDIM (arXiv 2010.02502), eta 1."""
        alphas, count = self.parts.models.diffusion.scheduler.alphas_cumprod.double(), self.config.rollout.num_steps
        t = 1000 // count * (count - 1 - step) + 1
        a, before = alphas[t], alphas[max(0, t - 1000 // count)]
        sigma = ((1 - before) / (1 - a) * (1 - a / before)).sqrt()
        x0_hat = (x.double() - (1 - a).sqrt() * eps.double()) / a.sqrt()
        return before.sqrt() * x0_hat + (1 - before - sigma**2).clamp(min=0).sqrt() * eps.double(), sigma

    def t(self, step):
        count = self.config.rollout.num_steps
        return 1000 // count * (count - 1 - step) + 1

    def log_prob(self, x_prev, x, step, prompt):
        """The log-density of one step under the policy as it is now, a mean over C, H, W, in float64."""
        mean, sigma = self.mean_and_sigma(x, self.eps(x, self.t(step), prompt), step)
        return (-((x_prev.double() - mean) ** 2) / (2 * sigma**2) - sigma.log() - math.log(2 * math.pi) / 2).mean()

    @torch.no_grad()
    def trajectory(self, x, noises, prompt):
        """The T + 1 states of one trajectory from x (C, H, W), with recorded noises (T, C, H, W)."""
        states = [x]
        for step, noise in enumerate(noises):
            mean, sigma = self.mean_and_sigma(states[-1], self.eps(states[-1], self.t(step), prompt), step)
            states.append((mean + sigma * noise.double()).float())
        return states

    def decided_pairs(self):
        """The pairs that the recipe's factory makes, without the ties."""
        pairs = resolve(self.config.data.source, "data.source")(self.config.run.seed, self.config.data.train)
        return [pair for pair in pairs if pair["label_0"] != 0.5]

    def pair_errors(self):
        """For each pair of the first iteration a function of a side, 0 the winner, that gives its error."""
        optim, seed, pairs = self.config.optim, self.config.run.seed, self.decided_pairs()
        rng = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed)).tolist()
        for number in range(optim.accumulate):
            draws = self.pair_draws(rng)
            for i in range(optim.micro_batch):
                pair = pairs[order[number * optim.micro_batch + i]]
                yield functools.partial(self.pair_error, pair, [draw[..., i, :] for draw in draws])

    def pair_draws(self, rng):
        """All of a micro-batch of N pairs: t, the emptied prompts, flips, noises of latents and noise of pairs.

        Each has the pairs on its last axis but one, and the sides, where there are two, before it.
        """
        count, shape, data = self.config.optim.micro_batch, self.policy.latent_shape, self.config.data
        t = torch.randint(1000, (count, 1), generator=rng)
        emptied = torch.rand(count, 1, generator=rng) < getattr(data, "drop_prompts", 0)
        flips = torch.rand(2 if data.flip == "independent" else 1, count, 1, generator=rng).expand(2, -1, -1) < 0.5
        noises = (torch.randn(*sides, count, *shape, generator=rng).flatten(-3) for sides in ((2,), ()))
        return t, emptied, flips, *noises

    def pair_error(self, pair, draws, side):
        """The policy's mean squared error at one image of a pair, by one forward of one latent."""
        (t, emptied, flips, sampled, noise), diffusion = draws, self.parts.models.diffusion
        side = side if pair["label_0"] > 0.5 else 1 - side
        image = pair[f"image_{side}"].flip(-1) if flips[side] else pair[f"image_{side}"]
        with torch.no_grad():
            posterior = diffusion.vae.encode(image[None]).latent_dist
        sampled, noise = (value.view(1, *self.policy.latent_shape) for value in (sampled[side], noise))
        clean = (posterior.mean + posterior.std * sampled) * diffusion.vae.config.scaling_factor
        a = diffusion.scheduler.alphas_cumprod[t]
        x, v = a.sqrt() * clean + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * clean
        cond = diffusion.encode(["" if emptied else pair["caption"]])
        target = v if diffusion.scheduler.config.prediction_type == "v_prediction" else noise
        return (self.policy.eps(x, t, cond, guided=False)[0] - target).square().mean()

    def check_moved_as(self, other, before):
        """Both have moved away from a LoRA, and to the same one."""
        for name, value in other.lora().items():
            moved = (value - before[name]).norm()
            assert moved > 1e-5, name
            assert (self.lora()[name] - value).norm() <= 2e-3 * moved, name


@pytest.fixture(scope="session")
def unrolled():
    """The class Run."""
    return Run
