"""methods/spo/rollout: the golden rollouts draw for draw, and a plain sampler without shortcuts."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from strop.engine.config.methods.spo import RolloutConfig
from strop.engine.config.training import ModelConfig
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


GOLDEN = {  # file; the keys of its rollout; timesteps told to the judge; rows of the UNet's forwards
    "case6_sd15_k4_b3": (
        {},
        [701, 651, 601, 551, 501, 451, 401, 351, 301, 251, 201, 151, 101, 51, 1, 0],
        [2 * 3] * 5 + [2 * 4 * 3] * 15,
    ),
    "case6_sdxl_k2_b2_inner3": (
        {"k": 2, "threshold": 0.4, "inner_steps": 4},
        [551, 351, 151, 0],
        [2 * 2] * 5 + [2 * 2 * 2] * 15,
    ),
}


@pytest.fixture(scope="module", params=GOLDEN)
def replayed(request, golden, alphas, tiny_folder, tiny_sdxl_folder):
    """(a golden rollout of each family, run once; its tensors; the timesteps judged; the rows)"""
    (changes, t, rows), case6 = GOLDEN[request.param], golden(request.param)
    folder = tiny_folder if "sd15" in request.param else tiny_sdxl_folder
    return replay(case6, alphas, folder, **changes), case6, t, rows


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


def test_the_golden_rollout_draw_for_draw(replayed):
    """One forward a step, all draws used, and the pairs in the published order."""
    run, case6, _, rows = replayed
    pairs = run.rollout.pairs
    assert run.rows == rows
    assert len(run.left) == 0
    assert torch.equal(torch.tensor(run.schedule.t)[pairs.step], case6["f32/out/timesteps"][:, 0])
    assert torch.equal(run.cond.text[pairs.prompt], case6["f32/out/prompt_embeds"][:, 0])
    if run.cond.pooled is not None:
        assert torch.equal(run.cond.pooled[pairs.prompt], case6["f32/out/add_text_embeds"][:, 0])
    for precision in ("f32", "f64"):
        x_t, x_prev = case6[f"{precision}/out/current_latents"], case6[f"{precision}/out/next_latents"]
        torch.testing.assert_close(pairs.x_t.transpose(0, 1).double(), x_t.double(), rtol=0, atol=LATENTS)
        torch.testing.assert_close(pairs.x_prev.transpose(0, 1).double(), x_prev.double(), rtol=0, atol=LATENTS)


def test_the_golden_rollout_is_judged_as_published(replayed):
    run, case6, t, _ = replayed
    judge, steps = run.judge, 16 // len(t)
    assert judge.t == t
    for event, scores in enumerate(judge.scores):
        recorded = f"event/{event:02d}"
        assert case6[f"f32/{recorded}/timesteps"].tolist() == [t[event]] * scores.numel()
        for precision in ("f32", "f64"):
            expected = case6[f"{precision}/{recorded}/scores"].view_as(scores)
            torch.testing.assert_close(scores.double(), expected.double(), rtol=0, atol=SCORES)
        if f"f32/{recorded}/image" in case6:
            expected = case6[f"f32/{recorded}/image"].view_as(judge.images[event])
            torch.testing.assert_close(judge.images[event], expected, rtol=0, atol=IMAGES)
        valid = case6[f"f32/{recorded}/valid"].sum().item()
        assert run.rollout.pairs_per_step[4 + steps * event : 4 + steps * (event + 1)].tolist() == [valid] * steps
    assert run.rollout.pairs_per_step[:4].tolist() == [0] * 4
    torch.testing.assert_close(run.rollout.score, torch.stack(judge.scores).mean())


@pytest.fixture
def small(golden, alphas):
    """Two prompts and a schedule of 6 steps."""
    case6 = golden("case6_sd15_k4_b3")
    text, null = case6["in/prompt_embeds"][:2], case6["in/negative_prompt_embeds"][:1]
    cond = Conditioning(text, null, judge=torch.tensor([[0.0], [3.0]]))
    schedule = Schedule(DDIMCoefficients.build(alphas, 6, 1.0), 3.0)
    return SimpleNamespace(cond=cond, schedule=schedule, judge=lambda: GoldenJudge(case6["in/score_W"]))


def test_the_same_seed_gives_the_same_bits(small, policy, diffusion):
    def run(seed):
        rng, config = torch.Generator().manual_seed(seed), settings(small.schedule, threshold=0.0, k=2)
        return Rollout(policy, diffusion, small.judge(), small.schedule, config)(small.cond, rng)

    torch.manual_seed(1)
    first = run(5)
    torch.manual_seed(2)  # the global generator has no part in it
    again, other = run(5), run(6)
    for name in ("x_t", "x_prev", "step", "prompt", "shared"):
        assert torch.equal(getattr(first.pairs, name), getattr(again.pairs, name))
    assert torch.equal(first.score, again.score)
    assert not torch.equal(first.pairs.x_prev, other.pairs.x_prev)


@pytest.mark.parametrize(
    "guidance, changes, rows",
    [
        (3.0, {"branch_from": 0}, [4] + [12] * 5),  # 2 halves of 2 prompts, then of 3 * 2 branches
        (3.0, {"branch_from": 5}, [4] * 6),
        (1.0, {}, [2] * 3 + [6] * 3),
        (3.0, {"t_range": (300, 700)}, [4] * 2 + [12] * 3),  # the last forward looks ahead, and nothing is walked after
        (3.0, {"look_ahead": "text"}, [4] * 3 + [6, 2] * 3),  # the text half of the branches, the other half of 2
        (3.0, {"judge_every": 2}, [4] * 3 + [12, 4, 12]),
        (3.0, {"judge_every": 2, "look_ahead": "text"}, [4] * 3 + [6, 2, 4, 6]),
    ],
    ids=str,
)
def test_k_branches_cost_one_fused_forward_a_step_and_approximations_less(
    small, policy, diffusion, alphas, guidance, changes, rows
):
    schedule = Schedule(DDIMCoefficients.build(alphas, 6, 1.0), guidance)
    counting, config = CountingPolicy(policy), settings(schedule, **{"k": 3, "branch_from": 2} | changes)
    Rollout(counting, diffusion, small.judge(), schedule, config)(small.cond, torch.Generator())
    assert counting.rows == rows


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


def test_a_threshold_that_no_pair_reaches_leaves_none(small, policy, diffusion):
    judge = small.judge()
    judge.weights = 0.01 * judge.weights  # scores nearly equal
    config = settings(small.schedule, k=2, branch_from=3, threshold=1 - 1e-12)
    outcome = Rollout(policy, diffusion, judge, small.schedule, config)(small.cond, torch.Generator())
    assert not outcome.pairs_per_step.any()
    assert (outcome.pairs.x_t.shape, outcome.pairs.x_prev.shape) == ((1, 0, 4, 8, 8), (2, 0, 4, 8, 8))
    assert len(outcome.pairs) == 0


def test_stages_are_clocked(small, policy, diffusion):
    seen = []

    def clock(stage):
        seen.append(stage)
        return contextlib.nullcontext()

    config = settings(small.schedule, k=2, branch_from=4)
    Rollout(policy, diffusion, small.judge(), small.schedule, config, clock)(small.cond, torch.Generator())
    parts = ["trunk", "branches", "judge", "branches", "decode"]  # the judge asks for what comes after it
    assert seen == [f"rollout/{part}" for part in parts] * 2


def looked_at(branches, eps):
    """Candidates whose images a judge has asked for, so that eps is known."""
    candidates = Candidates(branches, 1, 51, lambda prompts: (eps, branches), lambda x0_hat: x0_hat)
    assert candidates.eps is None
    assert candidates.images is branches
    return candidates


def test_the_next_state_is_a_branch_with_its_own_prediction():
    """Uniform over the branches, for each prompt by itself; eps goes with the branch it was predicted for."""
    k, rows = 4, 4000
    branches = torch.arange(k * rows).float().view(k, rows, 1, 1, 1)
    eps = torch.stack([branches, -branches])
    x, chosen = go_on(looked_at(branches, eps), torch.zeros(k, rows), "random", torch.Generator().manual_seed(0))
    assert torch.equal(x.flatten() % rows, torch.arange(rows).float())
    assert torch.equal(chosen, torch.stack([x, -x]))
    share = torch.bincount((x.flatten() // rows).long(), minlength=k) / rows
    assert share.tolist() == pytest.approx([0.25] * 4, abs=0.03)


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


SCORED = torch.tensor([[1.0, 5, 2], [4, 2, 2], [3, 9, 2], [2, 1, 2]])  # (K, B)


@pytest.mark.parametrize("rule, expected", [("winner", [10, 21]), ("loser", [0, 31])])
def test_the_trajectory_follows_winner_or_loser(rule, expected):
    """Each branch carries its number 10 * branch + prompt."""
    branches = (torch.arange(4)[:, None] * 10 + torch.arange(3)).float().view(4, 3, 1, 1, 1)
    x, eps = go_on(looked_at(branches, branches[None]), SCORED, rule, torch.Generator())
    assert x.flatten()[:2].tolist() == eps.flatten()[:2].tolist() == expected


def test_random_pairs_are_two_different_branches_and_the_better_wins():
    scores = SCORED[:, :1].expand(4, 6000)
    winner, loser = choose(scores, "random", torch.Generator().manual_seed(0))
    assert (winner != loser).all()
    assert (scores.gather(0, winner[None]) > scores.gather(0, loser[None])).all()
    pairs = torch.bincount(4 * torch.minimum(winner, loser) + torch.maximum(winner, loser), minlength=16)
    assert (pairs[pairs > 0] / 6000).tolist() == pytest.approx([1 / 6] * 6, abs=0.02)


@torch.no_grad()
def plain_rollout(policy, diffusion, judge, schedule, cond, config, cuts, rng):
    """A rollout over the segments `cuts`, by hand: every guided prediction that steps from a latent computed anew.

    With look_ahead "text" a branch is scored by the prediction with the prompt alone plus what guidance added a step
    before. Returns rows of (step, prompt, x_t of winner and loser, x_prev of winner and loser).
    """
    batch, k, threshold, rows, at = len(cond), config.k, config.threshold, [], 0
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
            if config.look_ahead == "text":
                without, with_prompt = guided(states[-2], at - 1)
                eps = (eps[1] + (schedule.guidance - 1) * (with_prompt - without)).unsqueeze(0)
            clean = schedule.x0_hat(states[-1], eps, at)
        scores = judge.score_images(diffusion.decode(clean).unflatten(0, (k, batch)), cond.judge, schedule.t[at])
        chosen = choose(scores, config.pair, rng)
        winner, loser = scores.gather(0, chosen)
        sides = chosen * batch + torch.arange(batch)  # (2, B)
        for i, before, after in zip(cut, states, states[1:], strict=False):
            each = [(i, b, before[sides[:, b]], after[sides[:, b]]) for b in range(batch)]
            rows += [row for row, p in zip(each, torch.sigmoid(winner - loser), strict=True) if 2 * p - 1 > threshold]
        if cut != cuts[-1]:
            follow = {"winner": scores.argmax(0), "loser": scores.argmin(0)}.get(config.next_state)
            follow = torch.randint(0, k, (batch,), generator=rng) if follow is None else follow
            x = states[-1][follow * batch + torch.arange(batch)]
    return rows


@pytest.mark.parametrize(
    "changes, cuts",
    [
        ({"threshold": 0.3}, [[2], [3], [4], [5]]),
        ({"branch_from": 0, "k": 2}, [[0], [1], [2], [3], [4], [5]]),
        ({"t_range": (300, 700)}, [[1], [2], [3]]),
        ({"next_state": "winner"}, [[2], [3], [4], [5]]),
        ({"next_state": "loser", "pair": "random"}, [[2], [3], [4], [5]]),
        ({"inner_steps": 2, "k": 2}, [[2, 3], [4, 5]]),
        ({"look_ahead": "text"}, [[2], [3], [4], [5]]),
        ({"look_ahead": "text", "inner_steps": 2}, [[2, 3], [4, 5]]),
        ({"judge_every": 3}, [[2], [5]]),
        ({"judge_every": 2, "inner_steps": 2, "k": 2}, [[2, 3]]),
        ({"judge_every": 2, "look_ahead": "text", "k": 2}, [[2], [4]]),
    ],
    ids=str,
)
def test_it_is_the_plain_sampler(small, policy, diffusion, changes, cuts):
    """Also where the text is kept, as it is in a run."""
    config = settings(small.schedule, **{"k": 3, "branch_from": 2, "threshold": 0.0} | changes)
    judges = small.judge(), small.judge()
    rollout = Rollout(policy, diffusion, judges[0], small.schedule, config)
    with policy.sampling(small.cond, text_kv=True) as known:
        outcome = rollout(known, torch.Generator().manual_seed(4))
    rng = torch.Generator().manual_seed(4)
    rows = plain_rollout(policy, diffusion, judges[1], small.schedule, small.cond, config, cuts, rng)
    assert (len(rows) < 2 * sum(map(len, cuts))) == (config.threshold > 0)
    assert judges[0].t == judges[1].t
    for one, other in zip(judges[0].scores, judges[1].scores, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=SCORES)
    steps, prompts, x_t, x_prev = zip(*rows, strict=True)
    assert outcome.pairs.step.tolist() == list(steps)
    assert outcome.pairs.prompt.tolist() == list(prompts)
    assert outcome.pairs.shared.tolist() == [step in {cut[0] for cut in cuts} for step in steps]
    assert outcome.pairs_per_step.tolist() == [steps.count(i) for i in range(6)]
    x_t = torch.stack(x_t, dim=1)
    torch.testing.assert_close(outcome.pairs.x_t.expand_as(x_t), x_t, rtol=0, atol=LATENTS)
    torch.testing.assert_close(outcome.pairs.x_prev, torch.stack(x_prev, dim=1), rtol=0, atol=LATENTS)
