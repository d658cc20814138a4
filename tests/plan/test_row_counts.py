"""plan/row_counts: the rows of the published schedules and of every method, counted by hand, and of the fast keys."""

from collections import Counter

import pytest
import torch

from strop.engine.config.online import SamplingConfig
from strop.engine.plan.row_counts import AUDIT, count_rows
from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients

TRUNK, BRANCHES = "rollout/trunk", "rollout/branches"


@pytest.fixture
def rows_of(alphas, make_config):
    """rows_of(rollout={}, optim={}) -> the counts of a recipe, SPO's for SD-1.5 where not said."""

    def count(model=(), **sections):
        config = make_config(model=dict(model), **sections)
        steps = getattr(config, "rollout", SamplingConfig())
        coefficients = DDIMCoefficients.build(alphas, steps.num_steps, steps.eta)
        return count_rows(config, Schedule(coefficients, steps.guidance))

    return count


def test_the_schedule_of_sd15(rows_of):
    state = torch.random.get_rng_state()
    counts = rows_of()
    assert counts.total("guided", TRUNK) == 10 * 2 * 5  # steps 0 to 4, both halves
    assert counts.total("guided", BRANCHES) == 10 * 4 * 2 * 15  # the last step is judged as it is
    assert counts.total("decode") == counts.total("judge") == 10 * 4 * 16
    assert counts.trained_rows == counts.pairs == 160
    assert (counts.x_t_per_row, counts.micro_batches) == (1, 16)
    assert counts.total("train") == counts.total("reference") == 160 * 2  # winner and loser share their latent
    assert counts.largest == {"guided": 80, "decode": 40, "judge": 40, "train": 20, "reference": 20}
    assert torch.equal(state, torch.random.get_rng_state())  # nothing global is drawn


def test_the_schedule_of_sdxl(rows_of):
    counts = rows_of(rollout={"prompts": 2, "k": 2, "inner_steps": 4, "merge_last": True}, optim={"micro_batch": 2})
    assert counts.total("guided", TRUNK) == 2 * 2 * 5
    assert counts.total("guided", BRANCHES) == 2 * 2 * 2 * 15
    assert counts.total("decode") == counts.total("judge") == 2 * 2 * 4
    assert (counts.trained_rows, counts.x_t_per_row) == (32, 2)
    assert counts.total("train") == counts.total("reference") == (8 * 1 + 24 * 2) * 2  # at a fork they share x_t


FAST = {  # keys, and the totals that they change from those of SD-1.5
    "no guidance": (
        {"rollout": {"guidance": 1.0}},
        {"guided": 0, "unguided": 10 * 5 + 10 * 4 * 15, "train": 160, "reference": 160},
    ),
    "text half looks ahead": (
        {"rollout": {"look_ahead": "text"}},
        {"guided": 10 * 2 * 5, ("unguided", BRANCHES): 10 * 4 * 15, ("unguided", TRUNK): 10 * 15},
    ),
    "judge every second step": (
        {"rollout": {"judge_every": 2}},
        {"judge": 10 * 4 * 8, "train": 80 * 2, ("guided", BRANCHES): 10 * 4 * 2 * 8},
    ),
    "two passes": ({"optim": {"passes": 2}}, {"train": 2 * 160 * 2, "reference": 160 * 2}),
    "half of the pairs": ({"optim": {"keep_pairs": 0.5}}, {"train": 80 * 2, "reference": 80 * 2}),
    "compiled": ({"optim": {"micro_batch": 100}, "model": {"compile": "all"}}, {"train": 2 * 200}),
    "not compiled": ({"optim": {"micro_batch": 100}}, {"train": 2 * 160}),
}


@pytest.mark.parametrize("keys, totals", FAST.values(), ids=FAST)
def test_what_a_key_changes(rows_of, keys, totals):
    counts = rows_of(**keys)
    assert {call: counts.total(*([call] if isinstance(call, str) else call)) for call in totals} == totals


AUDITED = {  # the kind of judge, that of the auditor, and the rows of an audit of 2 prompts with 4 branches at 16 forks
    "pixels by pixels": ("spm", "spm", {"auditor": 16 * 8}),
    "latents by pixels": ("latent", "spm", {"auditor": 16 * 8, "decode": 16 * 8, "guided": 15 * 8 * 2}),
    "pixels by latents": ("spm", "latent", {"auditor": 16 * 8}),
}


@pytest.mark.parametrize("judge, auditor, rows", AUDITED.values(), ids=AUDITED)
def test_an_audit_is_counted_apart(rows_of, judge, auditor, rows):
    sections = {"judge": {"path": "none", "kind": judge}}
    counts = rows_of(**sections, audit={"path": "none", "kind": auditor, "every": 5})
    assert counts.largest["auditor"] == 8
    plain = rows_of(**sections)
    assert counts.rows == plain.rows + Counter({(AUDIT, call): count for call, count in rows.items()})
    totals = lambda counts: [counts.pairs, *(counts.total(call) for call in rows)]
    assert totals(counts) == totals(plain)


def test_pairs_and_micro_batches_of_the_keys_of_the_update(rows_of):
    once, twice, half = rows_of(), rows_of(optim={"passes": 2}), rows_of(optim={"keep_pairs": 0.5})
    assert (twice.micro_batches, twice.trained_rows) == (2 * once.micro_batches, once.trained_rows)
    assert (half.pairs, half.trained_rows) == (160, 80)


SMALL = {"prompts": 3, "num_steps": 4}
UPDATE = ("train", "reference", "forward")
METHODS = {  # sections of a recipe, the totals of calls, and what else is counted
    "d3po": (
        {"rollout": SMALL, "optim": {"micro_batch": 2}},
        # two trajectories, both halves, four steps; in the update they share the first step's latent
        {"guided": 3 * 2 * 2 * 4, "decode": 3 * 2, "judge": 3 * 2, "train": 3 * 2 * 7, "reference": 3 * 2 * 7},
        {"trained_rows": 3 * 4, "micro_batches": 3 * 4 // 2, "x_t_per_row": 2, "pairs": 3},
        (2 * 3 * 5, 3),  # states; whether a pair is tied
    ),
    "d3po by a scorer": (
        {"rollout": SMALL, "optim": {"micro_batch": 2}, "reward": "aesthetic"},
        {"decode": 3 * 2, "judge": 3 * 2},
        {"trained_rows": 3 * 4},
        (2 * 3 * 5, 3),
    ),
    "ddpo": (
        {"rollout": {"prompts": 4, "num_steps": 3}, "optim": {"updates": 2, "micro_batch": 3}},
        {"guided": 4 * 2 * 3, "decode": 4, "judge": 4, "train": 4 * 2 * 3, "reference": 0},
        {"trained_rows": 4 * 3, "micro_batches": 2 * 2, "x_t_per_row": 1, "pairs": 0},
        (4 * 4, 4 * (4 * 3 + 4)),  # states; log-probabilities and advantages
    ),
    "gradspo": (
        {"rollout": SMALL | {"k": 2, "t_range": (0, 999)}},
        # the trunk is the first forward, and the last step is judged as it is
        {"guided": 3 * 2 + 3 * 2 * 2 * 3, "judge": 3 * 2 * 4} | dict.fromkeys(UPDATE, 3 * 4 * 2),
        {"trained_rows": 3 * 4, "lora_copies": 1, "exchanged": True, "kept": ("VAE encoder",)},
        (3 * 3 * 4, 3 * 4 * 21),  # x_t and two x_prev; as in SPO
    ),
    "diffusion_dpo": (
        {"optim": {"micro_batch": 3, "accumulate": 2}},
        {"train": 2 * 6, "reference": 2 * 6, "encode": 0, "text": 0, "guided": 0},
        {"trained_rows": 6, "micro_batches": 2, "x_t_per_row": 2, "pairs": 6, "kept": ()},
        (0, 0),
    ),
    "mapo of a factory": (  # whose pairs are not cached: images and captions are encoded in every step
        {"optim": {"micro_batch": 3, "accumulate": 2}, "data": {"source": "module:factory", "train": 5, "workers": 3}},
        {"train": 2 * 6, "reference": 0, "encode": 2 * 6, "text": 6, "empty text": 2},
        {"trained_rows": 6, "kept": ("text encoders", "VAE encoder"), "exchanged": False},
        (0, 0),
    ),
}


@pytest.mark.parametrize("name", METHODS)
def test_an_iteration_of_each_method(rows_of, capsys, name):
    sections, totals, facts, (latents, other_bytes) = METHODS[name]
    counts = rows_of(method=name.partition(" ")[0], **sections)
    assert {call: counts.total(call) for call in totals} == totals
    assert {fact: getattr(counts, fact) for fact in facts} == facts
    assert counts.collected_bytes(latent=10) == 4 * 10 * latents + other_bytes
    items = ("prompt", sections["rollout"]["prompts"]) if "rollout" in sections else ("pair", 6)
    assert (counts.item, counts.items) == items
    assert capsys.readouterr().out == ""
