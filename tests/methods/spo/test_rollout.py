"""methods/spo/rollout: the golden rollouts draw for draw, and a plain sampler without shortcuts, value by value."""

import contextlib
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from strop.engine.config.training import ModelConfig, RolloutConfig
from strop.engine.judge.candidates import Candidates
from strop.engine.methods.spo.rollout import Rollout, choose, go_on, segments
from strop.engine.models.base_model import load_unet
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.schedules.draws import Replay
from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients

IMAGES = 4e-5  # absolute
# Absolute, after 20 steps at values up to 60 and 152; every kind of CPU rounds otherwise, seen to 6.3e-5 and 6.0e-4.
LATENTS, SCORES = 1e-4, 1e-3
CPU = torch.device("cpu")


def settings(schedule, branch_from=4, **changes):
    """The section `rollout` of a recipe that judges from step `branch_from` on."""
    keys = {"k": 4, "threshold": 0.3, "t_range": (0, schedule.t[branch_from])} | changes
    return RolloutConfig(num_steps=schedule.num_steps, guidance=schedule.guidance, **keys)


class GoldenJudge:
    """The scoring function of the golden rollout: linear in the image, sharper towards t = 0. It keeps what it saw."""

    def __init__(self, weights):
        self.weights = weights
        self.t, self.scores, self.images = [], [], []

    def score(self, candidates, cond):
        return self.score_images(candidates.images, cond.judge, candidates.t)

    def score_images(self, images, text, t):
        sharpness = 1 + 20 * (1 - t / 1000) ** 6 + 60 * torch.tensor(-t / 20).exp()
        scores = (images.flatten(2) @ self.weights) * sharpness + text[:, 0]  # (K, B)
        self.t.append(t)
        self.scores.append(scores)
        self.images.append(images)
        return scores


class CountingPolicy:
    """A policy that keeps the number of UNet rows of each forward, and what went in and came out."""

    def __init__(self, policy):
        self.policy = policy
        self.latent_shape = policy.latent_shape
        self.rows, self.forwards = [], []

    def eps(self, x, *args):
        out = self.policy.eps(x, *args)
        self.rows.append(out.shape[0] * out.shape[1])
        self.forwards.append((x, out))
        return out


@pytest.fixture(scope="module")
def replayed(golden, alphas, tiny_folder):
    """The golden rollout, run once."""
    return replay(golden("case6_sd15_k4_b3"), alphas, tiny_folder)


def replay(case6, alphas, folder, **changes):
    """A golden rollout on the models of `folder`, with its recorded draws in place of torch's."""
    tape = Replay(case6[name] for name in sorted(case6) if name.startswith("rand/"))
    schedule = Schedule(DDIMCoefficients.build(alphas, 20, 1.0), 5.0)
    cond = Conditioning(
        text=case6["in/prompt_embeds"],
        null=case6["in/negative_prompt_embeds"][:1],
        judge=case6["in/score_E"][case6["in/preference_model_input_ids"][:, 1]].unsqueeze(1),
    )
    if "in/pooled_prompt_embeds" in case6:
        cond = replace(
            cond,
            pooled=case6["in/pooled_prompt_embeds"],
            null_pooled=case6["in/negative_pooled_prompt_embeds"][:1],
            time_ids=torch.tensor([[16.0, 16, 0, 0, 16, 16]]),
        )
    model = ModelConfig(path=str(folder))
    diffusion, judge = LatentDiffusion.load(model, CPU), GoldenJudge(case6["in/score_W"])
    policy = CountingPolicy(Policy(load_unet(model, CPU), 4, ("to_q", "to_v"), seed=0))
    outcome = Rollout(policy, diffusion, judge, schedule, settings(schedule, **changes))(cond, tape)
    return SimpleNamespace(
        rollout=outcome,
        judge=judge,
        schedule=schedule,
        cond=cond,
        rows=policy.rows,
        forwards=policy.forwards,
        left=tape,
        diffusion=diffusion,
    )


def test_the_golden_rollout_draw_for_draw(replayed, golden):
    case6, pairs = golden("case6_sd15_k4_b3"), replayed.rollout.pairs
    t = torch.tensor(replayed.schedule.t)[pairs.step]
    assert len(replayed.left) == 0
    assert len(pairs) == 35
    assert torch.equal(t, case6["f32/out/timesteps"][:, 0])  # also says that they come in the published order
    assert torch.equal(replayed.cond.text[pairs.prompt], case6["f32/out/prompt_embeds"][:, 0])
    for precision in ("f32", "f64"):
        x_t, x_prev = case6[f"{precision}/out/current_latents"], case6[f"{precision}/out/next_latents"]
        torch.testing.assert_close(pairs.x_t[0].double(), x_t[:, 0].double(), rtol=0, atol=LATENTS)
        torch.testing.assert_close(pairs.x_prev.transpose(0, 1).double(), x_prev.double(), rtol=0, atol=LATENTS)


def test_the_golden_rollout_is_judged_as_published(replayed, golden):
    case6, judge = golden("case6_sd15_k4_b3"), replayed.judge
    assert judge.t == [701, 651, 601, 551, 501, 451, 401, 351, 301, 251, 201, 151, 101, 51, 1, 0]
    for event, (t, scores) in enumerate(zip(judge.t, judge.scores, strict=True)):
        recorded = f"event/{event:02d}"
        assert case6[f"f32/{recorded}/timesteps"].tolist() == [t] * 12
        for precision in ("f32", "f64"):
            expected = case6[f"{precision}/{recorded}/scores"].view(4, 3)
            torch.testing.assert_close(scores.double(), expected.double(), rtol=0, atol=SCORES)
    for event in (0, 1, 14, 15):
        expected = case6[f"f32/event/{event:02d}/image"].unflatten(0, (4, 3))
        torch.testing.assert_close(judge.images[event], expected, rtol=0, atol=IMAGES)
    torch.testing.assert_close(replayed.rollout.score, torch.stack(judge.scores).mean())


def test_the_golden_rollout_counts_what_it_kept(replayed, golden):
    case6 = golden("case6_sd15_k4_b3")
    valid = [case6[f"f32/event/{event:02d}/valid"].sum().item() for event in range(16)]
    assert replayed.rollout.pairs_per_step.tolist() == [0] * 4 + valid
    assert sum(valid) == 35


def test_the_golden_rollout_takes_one_forward_a_step(replayed):
    assert replayed.rows == [2 * 3] * 5 + [2 * 4 * 3] * 15


def naive_rollout(unet, vae, judge, alphas, cond, k, branch_from, num_steps, guidance, threshold, seed):
    """SPO's sampler in the plainest form: one prompt, one branch, one guidance half at a time, nothing used twice.

    Returns rows of (step, prompt, x_t, x_prev of the winner, x_prev of the loser) and the mean score. It draws as the
    fused one does, because the numbers of one generator depend on the shape asked for.
    """
    rng = torch.Generator().manual_seed(seed)
    batch, distance = len(cond), 1000 // num_steps
    t = [1 + distance * i for i in reversed(range(num_steps))]

    def predict(x, i, prompt):
        half = lambda text: unet(x.unsqueeze(0), t[i], encoder_hidden_states=text).sample[0]
        uncond = half(cond.null)
        return uncond + guidance * (half(cond.text[prompt : prompt + 1]) - uncond)

    def predicted_clean(x, i, prompt):
        a = alphas[t[i]].double()
        return ((x - (1 - a).sqrt() * predict(x, i, prompt)) / a.sqrt()).float()

    def step_down(x, i, prompt, noise):
        a, a_prev = alphas[t[i]].double(), alphas[max(t[i] - distance, 0)].double()
        eps = predict(x, i, prompt)
        clean = (x - (1 - a).sqrt() * eps) / a.sqrt()
        sigma = ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        return (a_prev.sqrt() * clean + (1 - a_prev - sigma**2).sqrt() * eps + sigma * noise).float()

    x = torch.randn((batch, 4, 8, 8), generator=rng)
    for i in range(branch_from):
        noise = torch.randn((batch, 4, 8, 8), generator=rng)
        x = torch.stack([step_down(x[b], i, b, noise[b]) for b in range(batch)])
    rows, all_scores = [], []
    for i in range(branch_from, num_steps):
        noise = torch.randn((k, batch, 4, 8, 8), generator=rng)
        last = i + 1 == num_steps
        after = []
        for b in range(batch):
            branches = [step_down(x[b], i, b, noise[j, b]) for j in range(k)]
            scores = []
            for branch in branches:
                clean = branch if last else predicted_clean(branch, i + 1, b)
                image = vae.decode(clean.unsqueeze(0) / 0.18215).sample
                scores.append(judge.score_images(image[None], cond.judge[b : b + 1], 0 if last else t[i + 1]).item())
            best, worst = scores.index(max(scores)), scores.index(min(scores))
            p_best = 1 / (1 + math.exp(scores[worst] - scores[best]))
            if p_best - (1 - p_best) > threshold:
                rows.append((i, b, x[b], branches[best], branches[worst]))
            all_scores += scores
            after.append(branches)
        if not last:
            choice = torch.randint(0, k, (batch,), generator=rng).tolist()
            x = torch.stack([after[b][choice[b]] for b in range(batch)])
    return rows, sum(all_scores) / len(all_scores)


@pytest.fixture
def small(golden, alphas):
    """Two prompts and a schedule of 6 steps."""
    case6 = golden("case6_sd15_k4_b3")
    text, null = case6["in/prompt_embeds"][:2], case6["in/negative_prompt_embeds"][:1]
    cond = Conditioning(text, null, judge=torch.tensor([[0.0], [3.0]]))
    schedule = Schedule(DDIMCoefficients.build(alphas, 6, 1.0), 3.0)
    return SimpleNamespace(cond=cond, schedule=schedule, judge=lambda: GoldenJudge(case6["in/score_W"]))


@pytest.mark.parametrize("branch_from", [0, 4])
@pytest.mark.parametrize("k", [2, 4])
@torch.no_grad()
def test_it_is_the_plain_sampler(small, policy, diffusion, alphas, k, branch_from):
    rng = torch.Generator().manual_seed(10 * k + branch_from)
    config = settings(small.schedule, k=k, branch_from=branch_from)
    outcome = Rollout(policy, diffusion, small.judge(), small.schedule, config)(small.cond, rng)
    with policy.reference():  # as fresh, policy and base model are equal; the plain sampler takes the base model
        rows, score = naive_rollout(
            policy.unet,
            diffusion.vae,
            small.judge(),
            alphas,
            small.cond,
            k=k,
            branch_from=branch_from,
            num_steps=6,
            guidance=3.0,
            threshold=0.3,
            seed=10 * k + branch_from,
        )
    steps, prompts, x_t, winners, losers = zip(*rows, strict=True)
    assert outcome.pairs.step.tolist() == list(steps)
    assert outcome.pairs.prompt.tolist() == list(prompts)
    torch.testing.assert_close(outcome.pairs.x_t[0], torch.stack(x_t), rtol=0, atol=LATENTS)
    torch.testing.assert_close(outcome.pairs.x_prev[0], torch.stack(winners), rtol=0, atol=LATENTS)
    torch.testing.assert_close(outcome.pairs.x_prev[1], torch.stack(losers), rtol=0, atol=LATENTS)
    assert outcome.pairs_per_step.tolist() == [steps.count(i) for i in range(6)]
    assert outcome.score.item() == pytest.approx(score, abs=SCORES)


def test_the_same_seed_gives_the_same_bits(small, policy, diffusion):
    def run(seed):
        rng, config = torch.Generator().manual_seed(seed), settings(small.schedule, threshold=0.0)
        return Rollout(policy, diffusion, small.judge(), small.schedule, config)(small.cond, rng)

    torch.manual_seed(1)
    first = run(5)
    torch.manual_seed(2)  # the global generator has no part in it
    again, other = run(5), run(6)
    for name in ("x_t", "x_prev", "step", "prompt", "shared"):
        assert torch.equal(getattr(first.pairs, name), getattr(again.pairs, name))
    assert torch.equal(first.score, again.score)
    assert not torch.equal(first.pairs.x_prev, other.pairs.x_prev)


@pytest.mark.parametrize("guided, halves", [(True, 2), (False, 1)], ids=["guided", "unguided"])
@pytest.mark.parametrize("branch_from", [0, 3, 5])
def test_k_branches_cost_one_fused_forward_a_step(small, policy, diffusion, alphas, branch_from, guided, halves):
    schedule = Schedule(DDIMCoefficients.build(alphas, 6, 1.0), 3.0 if guided else 1.0)
    counting = CountingPolicy(policy)
    config = settings(small.schedule, k=3, branch_from=branch_from)
    Rollout(counting, diffusion, small.judge(), schedule, config)(small.cond, torch.Generator())
    trunk, branching = branch_from + 1, 5 - branch_from
    assert counting.rows == [halves * 2] * trunk + [halves * 3 * 2] * branching


def test_a_judge_of_noisy_latents_costs_neither_forward_nor_image(small, policy):
    """Of each step, the fork's own forward alone; candidates are where the branches are."""
    seen = []

    def score(candidates, cond):
        seen.append((candidates.t, candidates.x))
        return candidates.x[:, :, 0, 0, 0]

    counting, config = CountingPolicy(policy), settings(small.schedule, k=3, branch_from=3, threshold=0.0)
    judge = SimpleNamespace(score=score)
    outcome = Rollout(counting, None, judge, small.schedule, config)(small.cond, torch.Generator())
    assert counting.rows == [2 * 2] * 6
    assert [t for t, _ in seen] == list(small.schedule.t[4:])
    best = torch.cat([x[:, :, 0, 0, 0].amax(0) for _, x in seen])
    assert torch.equal(outcome.pairs.x_prev[0, :, 0, 0, 0], best)


def test_nothing_is_computed_beyond_the_judged_steps(small, policy, diffusion):
    """Steps 2 and 3 of 6 are judged: the forward that scores step 3 is the last."""
    counting, judge = CountingPolicy(policy), small.judge()
    t_range = (small.schedule.t[3], small.schedule.t[2])
    config = settings(small.schedule, k=3, t_range=t_range)
    Rollout(counting, diffusion, judge, small.schedule, config)(small.cond, torch.Generator())
    assert counting.rows == [2 * 2] * 3 + [2 * 3 * 2] * 2
    assert judge.t == list(small.schedule.t[3:5])
    assert [len(images.flatten(0, 1)) for images in judge.images] == [3 * 2] * 2


@pytest.mark.parametrize("threshold, kept", [(0.0, 2.0), (1 - 1e-12, 0.0)], ids=["all", "none"])
def test_the_threshold_decides_what_is_kept(small, policy, diffusion, threshold, kept):
    judge = small.judge()
    judge.weights = 0.01 * judge.weights  # scores nearly equal, so that only the extreme thresholds are clear
    config = settings(small.schedule, k=2, branch_from=3, threshold=threshold)
    outcome = Rollout(policy, diffusion, judge, small.schedule, config)(small.cond, torch.Generator())
    assert outcome.pairs_per_step.tolist() == [0, 0, 0, kept, kept, kept]
    number = int(3 * kept)
    assert outcome.pairs.x_t.shape == (1, number, 4, 8, 8)
    assert outcome.pairs.x_prev.shape == (2, number, 4, 8, 8)
    assert outcome.pairs.step.tolist() == [3, 3, 4, 4, 5, 5][:number]
    assert outcome.pairs.prompt.tolist() == [0, 1, 0, 1, 0, 1][:number]


def test_stages_are_clocked(small, policy, diffusion):
    seen = []

    def clock(stage):
        seen.append(stage)
        return contextlib.nullcontext()

    config = settings(small.schedule, k=2, branch_from=4)
    Rollout(policy, diffusion, small.judge(), small.schedule, config, clock)(small.cond, torch.Generator())
    parts = ["trunk", "branches", "judge", "branches", "decode"]  # the judge asks for what comes after it
    assert seen == [f"rollout/{part}" for part in parts] * 2


def seen(branches, eps):
    """Candidates whose images a judge has asked for, so that eps is known."""
    candidates = Candidates(branches, 1, lambda: (eps, branches), lambda x0_hat: x0_hat)
    assert candidates.eps is None
    assert candidates.images is branches
    return candidates


def test_the_next_state_is_a_branch_with_its_own_prediction():
    """Uniform over the branches, for each prompt by itself; eps goes with the branch it was predicted for."""
    k, rows = 4, 4000
    branches = torch.arange(k * rows).float().view(k, rows, 1, 1, 1)
    eps = torch.stack([branches, -branches])
    x, chosen = go_on(seen(branches, eps), torch.zeros(k, rows), "random", torch.Generator().manual_seed(0))
    assert torch.equal(x.flatten() % rows, torch.arange(rows).float())
    assert torch.equal(chosen, torch.stack([x, -x]))
    share = torch.bincount((x.flatten() // rows).long(), minlength=k) / rows
    assert share.tolist() == pytest.approx([0.25] * 4, abs=0.03)


@pytest.fixture(scope="module")
def replayed_sdxl(golden, alphas, tiny_sdxl_folder):
    """The golden SDXL rollout, run once."""
    return replay(golden("case6_sdxl_k2_b2_inner3"), alphas, tiny_sdxl_folder, k=2, threshold=0.4, inner_steps=4)


def test_the_golden_sdxl_rollout_draw_for_draw(replayed_sdxl, golden):
    case6, pairs = golden("case6_sdxl_k2_b2_inner3"), replayed_sdxl.rollout.pairs
    t = torch.tensor(replayed_sdxl.schedule.t)[pairs.step]
    assert len(replayed_sdxl.left) == 0
    assert len(pairs) == 20
    assert torch.equal(t, case6["f32/out/timesteps"][:, 0])  # also says that they come in the published order
    assert torch.equal(replayed_sdxl.cond.text[pairs.prompt], case6["f32/out/prompt_embeds"][:, 0])
    assert torch.equal(replayed_sdxl.cond.pooled[pairs.prompt], case6["f32/out/add_text_embeds"][:, 0])
    for precision in ("f32", "f64"):
        x_t, x_prev = case6[f"{precision}/out/current_latents"], case6[f"{precision}/out/next_latents"]
        torch.testing.assert_close(pairs.x_t.transpose(0, 1).double(), x_t.double(), rtol=0, atol=LATENTS)
        torch.testing.assert_close(pairs.x_prev.transpose(0, 1).double(), x_prev.double(), rtol=0, atol=LATENTS)


def test_the_golden_sdxl_rollout_is_judged_as_published(replayed_sdxl, golden):
    case6, judge = golden("case6_sdxl_k2_b2_inner3"), replayed_sdxl.judge
    assert judge.t == [551, 351, 151, 0]
    for event, (t, scores) in enumerate(zip(judge.t, judge.scores, strict=True)):
        recorded = f"event/{event:02d}"
        assert case6[f"f32/{recorded}/timesteps"].tolist() == [t] * 4
        for precision in ("f32", "f64"):
            expected = case6[f"{precision}/{recorded}/scores"].view(2, 2)
            torch.testing.assert_close(scores.double(), expected.double(), rtol=0, atol=SCORES)
        valid = case6[f"f32/{recorded}/valid"].sum()
        assert replayed_sdxl.rollout.pairs_per_step[4 + 4 * event : 8 + 4 * event].tolist() == [valid] * 4


def test_the_golden_sdxl_rollout_takes_one_forward_a_step(replayed_sdxl):
    assert replayed_sdxl.rows == [2 * 2] * 5 + [2 * 2 * 2] * 15


def published_segments(branch_from, num_steps, inner):
    """The control flow of the published SDXL sampler (inner = its num_inner_step), written down as it stands there."""
    cuts = [[branch_from]]
    for i in range(branch_from + 1, num_steps):
        if i == num_steps - 1:
            cuts[-1].append(i)  # "handle last step" comes before any scoring
        elif (i - branch_from) % (inner + 1) == 0:
            cuts.append([i])
        else:
            cuts[-1].append(i)
    return cuts


@pytest.mark.parametrize("inner", [0, 1, 2, 3, 4, 20])
@pytest.mark.parametrize("branch_from, num_steps", [(4, 20), (0, 20), (3, 10), (5, 6)])
def test_merged_segments_are_the_published_ones(branch_from, num_steps, inner):
    cuts = segments(range(branch_from, num_steps), inner + 1, merge_last=True)
    assert [list(cut) for cut in cuts] == published_segments(branch_from, num_steps, inner)


@pytest.mark.parametrize(
    "length, expected",
    [(1, [[4], [5], [6], [7], [8]]), (2, [[4, 5], [6, 7], [8]]), (3, [[4, 5, 6], [7, 8]]), (9, [[4, 5, 6, 7, 8]])],
)
def test_segments_cut_all_steps_in_order(length, expected):
    assert [list(cut) for cut in segments(range(4, 9), length, merge_last=False)] == expected


def test_branches_walk_alone_between_the_forks(small, policy, diffusion, alphas):
    """k = 2, one prompt after the other, by hand: two segments of two steps, the second judged clean."""
    config = settings(small.schedule, branch_from=2, k=2, threshold=0.0, inner_steps=2)
    rollout = Rollout(policy, diffusion, small.judge(), small.schedule, config)
    outcome = rollout(small.cond, torch.Generator().manual_seed(3))
    rng, schedule, cond = torch.Generator().manual_seed(3), small.schedule, small.cond

    def step(x, i):
        eps = policy.eps(x, schedule.timesteps(i, len(x)), cond[: len(x)] if len(x) == 2 else cond.repeat(2))
        return eps, schedule.branch(x, eps, i, 1, rng)[0]

    with torch.no_grad():
        x = torch.randn((2, 4, 8, 8), generator=rng)
        for i in range(2):
            x = step(x, i)[1]
        judge, rows = small.judge(), []
        for first in (2, 4):
            eps = policy.eps(x, schedule.timesteps(first, 2), cond)
            fork = schedule.branch(x, eps, first, 2, rng).flatten(0, 1)  # (K*B, ...)
            end = step(fork, first + 1)[1]
            if first == 2:
                ahead = policy.eps(end, schedule.timesteps(4, 4), cond.repeat(2))
                clean = schedule.x0_hat(end, ahead, 4)
            else:
                clean = end
            scores = judge.score_images(diffusion.decode(clean).unflatten(0, (2, 2)), cond.judge, schedule.t[first + 2])
            best, worst = scores.argmax(0), scores.argmin(0)
            for i, before, after in ((first, x.repeat(2, 1, 1, 1), fork), (first + 1, fork, end)):
                rows += [(i, b, *(z[2 * j[b] + b] for z in (before, after) for j in (best, worst))) for b in range(2)]
            choice = torch.randint(0, 2, (2,), generator=rng)
            x = torch.stack([end[2 * choice[b] + b] for b in range(2)])
    assert outcome.pairs.step.tolist() == [row[0] for row in rows]
    assert outcome.pairs.prompt.tolist() == [row[1] for row in rows]
    assert outcome.pairs.shared.tolist() == [row[0] in (2, 4) for row in rows]
    torch.testing.assert_close(outcome.pairs.x_t[0], torch.stack([row[2] for row in rows]), rtol=0, atol=LATENTS)
    torch.testing.assert_close(outcome.pairs.x_t[1], torch.stack([row[3] for row in rows]), rtol=0, atol=LATENTS)
    torch.testing.assert_close(outcome.pairs.x_prev[0], torch.stack([row[4] for row in rows]), rtol=0, atol=LATENTS)
    torch.testing.assert_close(outcome.pairs.x_prev[1], torch.stack([row[5] for row in rows]), rtol=0, atol=LATENTS)


def test_only_the_timesteps_of_the_range_are_judged_and_the_rest_is_not_walked(small, policy, diffusion):
    counting, judge = CountingPolicy(policy), small.judge()
    config = settings(small.schedule, k=2, threshold=0.0, t_range=(300, 700))
    outcome = Rollout(counting, diffusion, judge, small.schedule, config)(small.cond, torch.Generator())
    assert judge.t == [499, 333, 167]
    assert outcome.pairs_per_step.tolist() == [0, 2, 2, 2, 0, 0]
    assert counting.rows == [4, 4, 8, 8, 8]  # one forward more than steps: the last branches are looked ahead once


@pytest.fixture
def judged():
    """Scores (4, 3) and the branches and predictions they belong to, each carrying its number 10 * branch + prompt."""
    scores = torch.tensor([[1.0, 5, 2], [4, 2, 2], [3, 9, 2], [2, 1, 2]])
    branches = (torch.arange(4)[:, None] * 10 + torch.arange(3)).float().view(4, 3, 1, 1, 1)
    return scores, branches, branches.unsqueeze(0)


@pytest.mark.parametrize("rule, expected", [("winner", [10, 21]), ("loser", [0, 31])])
def test_the_trajectory_follows_winner_or_loser(judged, rule, expected):
    scores, branches, eps = judged
    x, chosen = go_on(seen(branches, eps), scores, rule, torch.Generator())
    assert x.flatten()[:2].tolist() == chosen.flatten()[:2].tolist() == expected


def test_random_pairs_are_two_different_branches_and_the_better_wins(judged):
    scores = judged[0][:, :1].expand(4, 6000)
    winner, loser = choose(scores, "random", torch.Generator().manual_seed(0))
    assert (winner != loser).all()
    assert (scores.gather(0, winner[None]) > scores.gather(0, loser[None])).all()
    pairs = torch.bincount(4 * torch.minimum(winner, loser) + torch.maximum(winner, loser), minlength=16)
    assert (pairs[pairs > 0] / 6000).tolist() == pytest.approx([1 / 6] * 6, abs=0.02)


def test_the_rules_of_a_recipe_reach_the_rollout(small, policy, diffusion):
    def run(**rules):
        config = settings(small.schedule, k=3, branch_from=3, threshold=0.0, **rules)
        rng = torch.Generator().manual_seed(1)
        return Rollout(policy, diffusion, small.judge(), small.schedule, config)(small.cond, rng).pairs

    plain = run()
    winner, loser, random_pair = run(next_state="winner"), run(next_state="loser"), run(pair="random")
    first = plain.step == 3
    for other in (winner, loser):
        assert torch.equal(other.x_prev[:, first], plain.x_prev[:, first])
        follows = 0 if other is winner else 1
        assert torch.equal(other.x_t[0][other.step == 4], other.x_prev[follows][other.step == 3])
    assert not torch.equal(random_pair.x_prev, plain.x_prev)


@torch.no_grad()
def plain_approximation(policy, diffusion, judge, schedule, cond, k, cuts, text, rng):
    """A rollout over the segments `cuts`, by hand: every guided prediction that steps from a latent computed anew.

    text: a branch is scored by the prediction with the prompt alone plus what guidance added a step before. Returns
    rows of (step, prompt, x_t of winner and loser, x_prev of winner and loser).
    """
    batch, rows, at = len(cond), [], 0
    guided = lambda x, i: policy.eps(x, schedule.timesteps(i, len(x)), cond.repeat(len(x) // batch))
    step = lambda x, i: schedule.branch(x, guided(x, i), i, 1, rng)[0]
    x = schedule.prior((batch, *policy.latent_shape), rng)
    for cut in cuts:
        while at < cut[0]:
            x, at = step(x, at), at + 1
        states = [x.repeat(k, 1, 1, 1), schedule.branch(x, guided(x, at), at, k, rng).flatten(0, 1)]  # (K*B, ...)
        for i in cut[1:]:
            states.append(step(states[-1], i))
        at = cut[-1] + 1
        clean = states[-1]
        if at < schedule.num_steps:
            eps = guided(states[-1], at)
            if text:
                without, with_prompt = guided(states[-2], at - 1)
                eps = (eps[1] + (schedule.guidance - 1) * (with_prompt - without)).unsqueeze(0)
            clean = schedule.x0_hat(states[-1], eps, at)
        scores = judge.score_images(diffusion.decode(clean).unflatten(0, (k, batch)), cond.judge, schedule.t[at])
        sides = torch.stack([scores.argmax(0), scores.argmin(0)]) * batch + torch.arange(batch)  # (2, B)
        for i, before, after in zip(cut, states, states[1:], strict=False):
            rows += [(i, b, before[sides[:, b]], after[sides[:, b]]) for b in range(batch)]
        if cut != cuts[-1]:
            x = states[-1][torch.randint(0, k, (batch,), generator=rng) * batch + torch.arange(batch)]
    return rows


@pytest.mark.parametrize(
    "changes, cuts",
    [
        ({"look_ahead": "text"}, [[2], [3], [4], [5]]),
        ({"look_ahead": "text", "inner_steps": 2}, [[2, 3], [4, 5]]),
        ({"judge_every": 2}, [[2], [4]]),
        ({"judge_every": 3}, [[2], [5]]),
        ({"judge_every": 2, "inner_steps": 2, "k": 2}, [[2, 3]]),
        ({"judge_every": 2, "look_ahead": "text", "k": 2}, [[2], [4]]),
    ],
    ids=str,
)
def test_an_approximation_is_what_it_says(small, policy, diffusion, changes, cuts):
    config = settings(small.schedule, **{"k": 3, "branch_from": 2, "threshold": 0.0} | changes)
    judges = small.judge(), small.judge()
    rollout = Rollout(policy, diffusion, judges[0], small.schedule, config)
    outcome = rollout(small.cond, torch.Generator().manual_seed(4))
    text, rng = config.look_ahead == "text", torch.Generator().manual_seed(4)
    arguments = (small.schedule, small.cond, config.k, cuts, text, rng)
    rows = plain_approximation(policy, diffusion, judges[1], *arguments)
    assert judges[0].t == judges[1].t
    for one, other in zip(judges[0].scores, judges[1].scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=SCORES)
    steps, prompts, x_t, x_prev = zip(*rows, strict=True)
    assert outcome.pairs.step.tolist() == list(steps)
    assert outcome.pairs.prompt.tolist() == list(prompts)
    assert outcome.pairs_per_step.tolist() == [steps.count(i) for i in range(6)]
    x_t = torch.stack(x_t, dim=1)
    torch.testing.assert_close(outcome.pairs.x_t.expand_as(x_t), x_t, rtol=0, atol=LATENTS)
    torch.testing.assert_close(outcome.pairs.x_prev, torch.stack(x_prev, dim=1), rtol=0, atol=LATENTS)


@pytest.mark.parametrize(
    "changes, rows",
    [
        ({"look_ahead": "text"}, [4] * 3 + [6, 2] * 3),  # the text half of 3 * 2 branches, the other half of 2
        ({"judge_every": 2}, [4] * 3 + [12, 4, 12]),  # nothing is walked after the last look ahead
        ({"judge_every": 2, "look_ahead": "text"}, [4] * 3 + [6, 2, 4, 6]),
    ],
    ids=str,
)
def test_an_approximation_costs_fewer_rows(small, policy, diffusion, changes, rows):
    counting = CountingPolicy(policy)
    config = settings(small.schedule, k=3, branch_from=2, **changes)
    Rollout(counting, diffusion, small.judge(), small.schedule, config)(small.cond, torch.Generator())
    assert counting.rows == rows


def test_a_text_look_ahead_with_the_text_kept_is_the_same(small, policy, diffusion):
    config = settings(small.schedule, k=3, branch_from=2, look_ahead="text", threshold=0.0)
    pairs = []
    for text_kv in (False, True):
        with policy.sampling(small.cond, text_kv) as known:
            judge, rng = small.judge(), torch.Generator().manual_seed(4)
            pairs.append(Rollout(policy, diffusion, judge, small.schedule, config)(known, rng).pairs)
    torch.testing.assert_close(pairs[1].x_prev, pairs[0].x_prev, rtol=0, atol=LATENTS)
    assert torch.equal(pairs[1].prompt, pairs[0].prompt)


def test_a_text_look_ahead_on_the_fork_itself_is_the_full_one(small, policy, diffusion):
    """Where the branch is the latent it came from, and the step the same, guidance adds the same."""
    x = small.schedule.prior((2, *policy.latent_shape), torch.Generator().manual_seed(0))
    eps = policy.eps(x, small.schedule.timesteps(3, 2), small.cond)
    rollout = Rollout(policy, diffusion, small.judge(), small.schedule, settings(small.schedule))
    ahead = lambda before: rollout.look_ahead(x.unsqueeze(0), 3, small.cond, before)
    (_, full), (text, approximate) = ahead(None), ahead(eps.unsqueeze(1))
    assert text.shape == (1, 1, 2, 4, 8, 8)
    torch.testing.assert_close(approximate, full, rtol=0, atol=LATENTS)
