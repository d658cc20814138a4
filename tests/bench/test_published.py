"""bench/published.py against strop: a whole iteration, pair by pair, loss by loss, gradient by gradient.

Both sides are float32, and round differently: the baseline subtracts log-probabilities that strop never forms.
"""

from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPModel

from strop.bench import ours, published
from strop.engine.config.methods.spo import SPOConfig
from strop.engine.judge.clip import TimeConditionedCLIP
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.methods.spo.rollout import judged_segments
from strop.engine.models.base_model import load_unet
from strop.engine.models.latent_diffusion import LatentDiffusion

LATENTS = 1e-4  # absolute, at values up to 60, after 20 steps
LOSSES = 5e-6  # absolute, at values about ln 2
GRADIENTS = 1e-3  # of the largest entry of the matrix
LORA = 1e-4  # absolute, where each optimizer step moves an entry by up to 1e-3, however small its gradient
CPU = torch.device("cpu")
PROMPTS = ["a b c", "d", "e f"]
CASES = {
    "sd15": ({"k": 4, "t_range": (0, 701)}, {"clip": 1e-4}),
    "sdxl": (
        {"k": 2, "inner_steps": 4, "merge_last": True, "t_range": (0, 701)},
        {"accumulate": 2, "max_grad_norm": None},
    ),
    "sdxl-merged": ({"k": 3, "inner_steps": 3, "merge_last": True, "t_range": (0, 601)}, {}),
}


@pytest.fixture(scope="module", params=CASES)
def sides(request, tiny_folder, tiny_sdxl_folder, spm, tokenizer):
    """An iteration of each side on the same models with the same draws: see `run`."""
    rollout, optim = CASES[request.param]
    folder = tiny_folder if "sd15" in request.param else tiny_sdxl_folder
    config = SPOConfig.model_validate(
        {
            "model": {"path": str(folder)},
            "judge": {"path": "none"},
            "prompts": {"train": "none"},
            "rollout": {"num_steps": 10, "threshold": 0.01} | rollout,
            "optim": {"lr": 1e-3, "micro_batch": 5} | optim,
            "run": {"dir": "none", "iterations": 1},
        }
    )
    return SimpleNamespace(
        config=config,
        ours=run(ours.Ours, ours.iteration, config, spm, tokenizer),
        theirs=run(published.Published, published.iteration, config, spm, tokenizer),
    )


def run(kind, iteration, config, spm, tokenizer):
    """What an iteration returns, and besides: the models; the LoRA's gradients at each optimizer step; calls."""
    clip = TimeConditionedCLIP(CLIPModel(spm.config))
    clip.load_state_dict(spm.state)
    judge = StepAwarePreferenceModel(clip.freeze(), tokenizer, spm.mean, spm.std)
    models = kind(load_unet(config.model, CPU), LatentDiffusion.load(config.model, CPU), judge, config)
    rng = torch.Generator().manual_seed(1)
    for name, parameter in models.policy.unet.named_parameters():
        if ".lora_B." in name:  # away from zero, so that policy and reference differ from the first minibatch on
            parameter.data.copy_(1e-2 * torch.randn(parameter.shape, generator=rng))
    gradients, parameters = [], models.policy.parameters
    optimizer = getattr(models.optimizer, "optimizer", models.optimizer)  # of LocalAdamW, the one inside
    optimizer.register_step_pre_hook(lambda *_: gradients.append([p.grad.clone() for p in parameters]))
    stats = record_stats(models) if kind is ours.Ours else None
    networks = {"policy": models.policy.unet, "reference": getattr(models, "reference", None), "text": clip.text_model}
    calls = {name: count_rows(network) for name, network in networks.items() if network is not None}
    made = iteration(models, PROMPTS, torch.Generator().manual_seed(3), torch.Generator().manual_seed(4))
    return SimpleNamespace(models=models, made=made, gradients=gradients, stats=stats, calls=calls)


def record_stats(models):
    """A list that gets the stats of each micro-batch from now on."""
    stats, learner = [], models.learner

    def loss(batch):
        found = learner.loss(batch)
        stats.append(found[1])
        return found

    models.learner = SimpleNamespace(batches=learner.batches, loss=loss, schedule=learner.schedule)
    return stats


def count_rows(network):
    """A list that gets the number of rows of each forward from now on."""
    rows = []
    first = lambda args, kwargs: args[0] if args else kwargs["input_ids"]
    network.register_forward_pre_hook(lambda _, *given: rows.append(len(first(*given))), with_kwargs=True)
    return rows


def test_pairs_agree(sides):
    mine, theirs = sides.ours.made, sides.theirs.made[0]
    schedule = sides.ours.models.learner.schedule
    judged = len(schedule.steps_within(*sides.config.rollout.t_range))
    assert sides.config.optim.micro_batch < len(mine) < len(PROMPTS) * judged  # some pairs were not sure enough
    assert len(mine.x_t) == theirs["x_t"].shape[1] == (1 if sides.config.rollout.inner_steps == 1 else 2)
    assert torch.equal(torch.tensor(schedule.t)[mine.step], theirs["t"])
    torch.testing.assert_close(theirs["x_t"], mine.x_t.transpose(0, 1), rtol=0, atol=LATENTS)
    torch.testing.assert_close(theirs["x_prev"], mine.x_prev.transpose(0, 1), rtol=0, atol=LATENTS)
    cond = sides.ours.models.diffusion.encode(PROMPTS)[mine.prompt]
    torch.testing.assert_close(theirs["text"], cond.text)
    assert "pooled" not in theirs or torch.equal(theirs["pooled"], cond.pooled)


def test_losses_agree(sides):
    logged = torch.tensor(sides.theirs.made[1])
    losses, clipped = (torch.stack([stats[name] for stats in sides.ours.stats]) for name in ("loss", "clipped"))
    torch.testing.assert_close(logged[:, 0], losses, rtol=0, atol=LOSSES)
    assert len(set(losses.tolist())) > 1
    assert (clipped.sum() > 0) == (sides.config.optim.clip < 0.1)


def test_gradients_and_what_is_learned_agree(sides):
    assert len(sides.ours.gradients) == len(sides.ours.stats) // sides.config.optim.accumulate > 0
    assert any(a.abs().max() > 0 for gradients in sides.ours.gradients for a in gradients)
    for mine, theirs in zip(sides.ours.gradients, sides.theirs.gradients, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(b, a, rtol=0, atol=GRADIENTS * a.abs().max().item())
    mine, theirs = (side.models.policy.lora_state() for side in (sides.ours, sides.theirs))
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], rtol=0, atol=LORA)


def test_the_baseline_spends_what_strop_saves(sides):
    """Four UNet calls a minibatch instead of two, and the judge's text tower on every candidate at every event."""
    config, mine, theirs = sides.config.rollout, sides.ours, sides.theirs
    batches = len(mine.stats)
    rollout = theirs.calls["policy"][: -2 * batches]
    assert rollout == mine.calls["policy"][: len(rollout)]
    assert len(theirs.calls["reference"]) == 2 * batches
    assert len(mine.calls["policy"]) == len(rollout) + 2 * batches
    rows = sum(theirs.calls["policy"][len(rollout) :]) + sum(theirs.calls["reference"])
    assert rows == 8 * len(mine.made)
    forks = {cut.start for cut in judged_segments(mine.models.learner.schedule, config)}
    assert mine.made.shared.tolist() == [step in forks for step in mine.made.step.tolist()]
    assert sum(mine.calls["policy"][len(rollout) :]) == rows - 4 * mine.made.shared.sum()
    assert theirs.calls["text"] == [config.k * len(PROMPTS)] * len(forks)
    assert mine.calls["text"] == [len(PROMPTS)]
