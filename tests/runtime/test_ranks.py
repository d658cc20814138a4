"""Several ranks: exchange and balance of pairs, ZeRO's update and its state, over gloo with the deepspeed launcher."""

import json
from pathlib import Path

import pytest
import torch

from strop.engine.config.methods.spo import SPOOptimConfig
from strop.engine.config.training import ModelConfig
from strop.engine.errors import UserError
from strop.engine.methods.spo.pairs import PreferencePairs, balance
from strop.engine.methods.spo.update import Learner, micro_batches
from strop.engine.models.base_model import load_unet
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.runtime.optimizer import AdamWSettings, build_optimizer
from strop.engine.runtime.ranks import Ranks, rank_slice, start

MICRO_BATCH = 6  # of all ranks together
PROMPTS = 2  # of each rank
CPU = torch.device("cpu")


def all_pairs(inner_steps=1):
    """Twelve pairs of two prompts, the same on every rank; of two inner steps, every second has two x_t."""
    rng = torch.Generator().manual_seed(5)
    step = torch.arange(12) % 10 + 4
    shared = (step % 2 == 0) | (inner_steps == 1)
    x_t = torch.randn(inner_steps, 12, 4, 8, 8, generator=rng)
    x_t[-1, shared] = x_t[0, shared]
    return PreferencePairs(
        x_t=x_t,
        x_prev=torch.randn(2, 12, 4, 8, 8, generator=rng),
        step=step,
        prompt=torch.arange(12) % 2,
        shared=shared,
    )


def new_policy(model):
    """A policy away from its reference, so that the first gradients say something."""
    policy = Policy(load_unet(ModelConfig(path=str(model)), CPU), 4, ("to_q", "to_k", "to_v", "to_out.0"), seed=0)
    rng = torch.Generator().manual_seed(1)
    for parameter in policy.parameters:
        parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=rng))
    return policy


def settings(stage, micro_batch, accumulate=1):
    return AdamWSettings(
        lr=1e-3, weight_decay=1e-4, max_grad_norm=1.0, accumulate=accumulate, micro_batch=micro_batch, stage=stage
    )


def lora_after(model, policy, optimizer, ranks, inner_steps=1):
    """One pass over all pairs, each micro-batch cut into as many parts as there are ranks. Returns gradient norms."""
    diffusion = LatentDiffusion.load(ModelConfig(path=str(model)), CPU)
    cond = diffusion.encode(["a b", "c"])
    learner = Learner(policy, diffusion.schedule(20, 1.0, 5.0), SPOOptimConfig(beta=10.0, clip=0.1))
    norms = []
    for batch in all_pairs(inner_steps).split(MICRO_BATCH):
        rank_slice = MICRO_BATCH // ranks.size
        part = batch[slice(ranks.rank * rank_slice, (ranks.rank + 1) * rank_slice)]
        [mine] = micro_batches(part, len(part), cond)
        optimizer.backward(learner.loss(mine)[0])
        norm = optimizer.step()
        norms += [] if norm is None else [float(norm)]
    return norms


@pytest.fixture(scope="module")
def two_ranks(tiny_folder, tmp_path_factory, launch):
    """What each of two ranks found, see two_ranks.py. Building an op there would wait for ever on another's lock."""
    out, ops = tmp_path_factory.mktemp("two-ranks"), tmp_path_factory.mktemp("ops")
    lock = ops / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    with launch(Path(__file__).with_name("two_ranks.py"), tiny_folder, out, TORCH_EXTENSIONS_DIR=str(ops)) as started:
        assert started.exit_code() == 0, started.said()[-3000:]
    return out, [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_gathered_rows_come_in_rank_order_also_from_a_rank_without_any(two_ranks):
    _, ranks = two_ranks
    assert ranks[0]["gathered"] == ranks[1]["gathered"] == [10.0, 11.0, 12.0]
    assert ranks[0]["together"] == ranks[1]["together"] == [[10.0, 11.0, 12.0], [0.0], [-10.0, -11.0, -12.0]]


@pytest.mark.parametrize("counts", [[7, 5], [12, 0], [1, 0], [0, 0]], ids=str)
@pytest.mark.parametrize("inner_steps", [1, 2])
def test_every_rank_gets_as_many_pairs_and_each_pair_goes_once(two_ranks, counts, inner_steps):
    _, ranks = two_ranks
    numbers = [rank["balanced"][f"{counts} {inner_steps}"] for rank in ranks]
    assert [len(g) for g in numbers] == [sum(counts) // 2] * 2
    assert len(set(numbers[0] + numbers[1])) == sum(counts) // 2 * 2
    if counts == [7, 5]:
        assert numbers[0] != sorted(numbers[0]), "the pairs are shuffled"


UPDATES = [("stage-1-1", 1, 1), ("stage-1-2", 1, 2), ("stage-2-1", 1, 1), ("stage-2-2", 1, 2), ("inner-steps", 2, 1)]


@pytest.mark.parametrize("name, inner_steps, accumulate", UPDATES)
def test_two_ranks_make_the_update_of_one(two_ranks, tiny_folder, name, inner_steps, accumulate):
    out, ranks = two_ranks
    policy = new_policy(tiny_folder)
    start_state = {key: value.clone() for key, value in policy.lora_state().items()}
    alone = build_optimizer(policy.unet, settings(1, MICRO_BATCH, accumulate), Ranks(0, 1, CPU))
    lora_after(tiny_folder, policy, alone, Ranks(0, 1, CPU), inner_steps)
    one = {key: value.clone() for key, value in policy.lora_state().items()}
    assert max((one[key] - start_state[key]).abs().max() for key in one) > 9e-4  # Adam steps of lr 1e-3
    policy.load_lora(out / name)
    for key, value in policy.lora_state().items():
        torch.testing.assert_close(value, one[key], rtol=0, atol=2e-5, msg=key)
    for rank in ranks:  # two moments sharded; step counters and padding are all that is left over
        assert rank[f"{name} steps"] == alone.steps == 2 / accumulate
        assert rank[f"{name} bytes"] == pytest.approx(alone.state_bytes() / 2, rel=0.02)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stage", [1, 2], ids=["zero-1", "zero-2"])
def test_what_is_not_finite_on_one_rank_is_left_out_on_all(two_ranks, stage, accumulate):
    """One rank's bad loss counts as zero; steps of bad losses alone, or with a bad gradient, change no weight."""
    _, ranks = two_ranks
    one, other = (rank["not finite"][f"{stage} {accumulate}"] for rank in ranks)
    assert [row[:4] for row in one] == [row[:4] for row in other]
    weights, *counts = zip(*(row[:4] for row in one), strict=True)
    assert weights[:2] == pytest.approx((0.999, 0.998), abs=2e-4)  # Adam's steps of lr 1e-3, downhill
    assert weights[1] == weights[2] == weights[3]
    assert counts == [(1, 2, 2, 2), (0, accumulate, 2 * accumulate, 0), (0, 0, 1, 2)]
    assert [[row[4] for row in rank] for rank in (one, other)] == [
        [True, True, False, True],
        [True, False, False, True],
    ]


@pytest.mark.parametrize("stage", [1, 2], ids=["zero-1", "zero-2"])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_a_sharded_checkpoint_goes_on_bit_for_bit(two_ranks, tiny_folder, stage, accumulate):
    """Also with gradients that wait: of three to a step, two are in the checkpoint."""
    out, ranks = two_ranks
    name = f"stage-{stage}-{accumulate}"
    assert [rank[f"resumed {name}"] for rank in ranks] == [True, True]
    assert len(ranks[0][f"norms {name}"]) == {1: 2, 2: 1, 3: 1}[accumulate]
    saved = sum(file.stat().st_size for file in (out / name).rglob("*") if file.is_file())
    assert saved < (tiny_folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size, "no frozen base in it"


def test_one_rank_only_shuffles():
    pairs = all_pairs()
    shuffled = balance(pairs, PROMPTS, Ranks(0, 1, CPU), torch.Generator().manual_seed(0))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(shuffled.x_prev, pairs.x_prev[:, order])
    assert torch.equal(shuffled.prompt, pairs.prompt[order])


@pytest.mark.parametrize("count, size", [(5, 4), (4, 4), (384, 3), (7, 1)])
def test_shares_cover_all_rows_in_order_and_none_is_empty(count, size):
    rows = [list(range(count))[rank_slice(count, Ranks(rank, size, CPU))] for rank in range(size)]
    assert [row for part in rows for row in part] == list(range(count))
    assert all(rows)


def test_no_gpu_is_said_in_one_sentence():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match=r"^run.device: found cuda, but PyTorch sees no GPU"):
        start("cuda")


@pytest.mark.parametrize(
    "environment, words",
    [
        ("WORLD_SIZE=x", ("WORLD_SIZE: found 'x'",)),
        ("WORLD_SIZE=-1", ("WORLD_SIZE: found '-1'",)),
        ("WORLD_SIZE=0 RANK=0 LOCAL_RANK=0", ("WORLD_SIZE: found 0",)),
        ("WORLD_SIZE=10000000000 RANK=0 LOCAL_RANK=0", ("WORLD_SIZE: found '10000000000'",)),
        ("RANK=1", ("WORLD_SIZE: found none", "'1'")),
        ("WORLD_SIZE=1 RANK=1", ("RANK: found '1'", "below 1")),
        ("WORLD_SIZE=2", ("RANK: found none", "is 2")),
        ("WORLD_SIZE=2 RANK=2 LOCAL_RANK=0", ("RANK: found '2'", "below 2")),
        ("WORLD_SIZE=2 RANK=1", ("LOCAL_RANK: found none",)),
        ("WORLD_SIZE=2 RANK=1 LOCAL_RANK=2", ("LOCAL_RANK: found '2'", "below 2")),
    ],
)
def test_what_no_launcher_sets_is_refused_by_its_name(monkeypatch, environment, words):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for setting in environment.split():
        monkeypatch.setenv(*setting.split("="))
    with pytest.raises(UserError) as refused:
        start("cpu")
    assert [word for word in (*words, "deepspeed") if word not in str(refused.value)] == []


def test_a_process_alone_needs_no_environment(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "-1")  # as some launchers say it
    assert start("cpu") == Ranks(0, 1, CPU)
