"""From the recipe to the pairs: which rows are trained on, which are held out, and what a pair is made of."""

import re

import pytest
import torch

from strop.engine.config.judge_training import JudgeTrainingConfig
from strop.engine.config.training import JudgeConfig
from strop.engine.data.pair_cache import PairCache
from strop.engine.data.pair_files import open_source, resized
from strop.engine.data.pair_scan import Entries
from strop.engine.data.pair_sets import FilePairs, RelabelledPairs, choose, load_pairs, rank_batches, split_by_caption
from strop.engine.errors import UserError
from strop.engine.judge.find import load_labeller
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.runtime.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def recipe(source, judge="judge", steps=100, labeller=None, **data):
    tree = {
        "labeller": {"path": labeller},
        "model": {"path": "model"},
        "judge": {"path": str(judge)},
        "data": {"source": str(source), "heldout": 4} | data,
        "optim": {"steps": steps, "batch": 2},
        "run": {"dir": "run"},
    }
    return JudgeTrainingConfig.model_validate(tree)


def captions_of(chosen):
    return {chosen.source.captions[row] for row in chosen.rows}


def test_a_split_keeps_every_caption_on_one_side():
    captions = [f"caption {i % 40}" for i in range(100)]
    rest, heldout = split_by_caption(captions, 9, seed=3)
    assert len(heldout) == 9
    assert not {captions[row] for row in rest} & {captions[row] for row in heldout}
    lost = set(range(100)) - set(rest) - set(heldout)
    assert len(lost) <= 2
    assert {captions[row] for row in lost} <= {captions[row] for row in heldout}
    assert split_by_caption(captions, 9, seed=3) == (rest, heldout)
    assert split_by_caption(captions, 9, seed=4) != (rest, heldout)


def test_shares_deal_every_pair_once_per_epoch():
    two = [Ranks(rank, 2, ALONE.device) for rank in (0, 1)]
    dealt = [list(rank_batches(8, 2, 4, seed=3, ranks=ranks)) for ranks in two]
    for epoch in (slice(0, 2), slice(2, 4)):
        seen = [i for rank in dealt for batch in rank[epoch] for i in batch]
        assert sorted(seen) == list(range(8))
    assert dealt[0] != list(rank_batches(8, 2, 4, seed=4, ranks=two[0]))
    assert [len(batch) for batch in rank_batches(3, 5, 2, seed=0, ranks=ALONE)] == [5, 5]


def test_heldout_pairs_are_split_off_the_source(tmp_path, pair_files):
    folder = pair_files.parquet(tmp_path / "pairs", pair_files.rows(32))
    train, heldout = choose(recipe(folder), ALONE)
    assert train.source is heldout.source
    assert (len(train.rows), len(heldout.rows)) == (28, 4)
    assert not captions_of(train) & captions_of(heldout)
    assert len(choose(recipe(folder, train=5, steps=9), ALONE)[0].rows) == 5
    assert len(choose(recipe(folder, train=None, steps=3), ALONE)[0].rows) == 6  # 3 steps of 2 pairs see no more


def test_captions_of_another_heldout_source_are_not_trained_on(tmp_path, pair_files):
    folder = pair_files.parquet(tmp_path / "pairs", pair_files.rows(16))
    other = pair_files.jsonl(tmp_path / "other", pair_files.rows(8)[:3])
    train, heldout = choose(recipe(folder, heldout_source=str(other)), ALONE)
    assert heldout.rows == [0, 1, 2]
    assert captions_of(train) == {"d e", "a f", "b f", "c f", "d f"}
    assert (len(train.rows), train.source.left_out) == (10, 6)


def test_rows_that_are_broken_or_have_no_label(tmp_path, pair_files):
    """Up to the share they are left out; labels are not asked for where PickScore makes them."""
    path = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(16))
    path.write_text(path.read_text() + "{}\n")
    assert len(choose(recipe(path, max_broken=0.1), ALONE)[0].rows) == 12
    path.write_text(path.read_text().removesuffix("{}\n").replace('"label"', '"other"'))
    assert choose(recipe(path, labels="pickscore"), ALONE)[0].source.labels == [None] * 16
    with pytest.raises(UserError, match="16 of 16 pairs"):
        choose(recipe(path), ALONE)


FACTORY = "strop.bench.tinyworld.pairs:load"
REFUSED = {  # the source, keys of section data, how many processes, what the sentence names
    "nothing to train on": ("three.jsonl", {"heldout_source": "{}/three.jsonl"}, 1, "heldout_source: found 0 pairs"),
    "more processes than pairs": ("pairs", {}, 5, "expected at least 1 and 5"),
    "a broken row": ("broken.jsonl", {}, 1, "at least 1 of 4 pairs are broken, .* line 4: no text under"),
    "no labels": ("unlabelled", {}, 1, "source: .* but 16 rows without a label"),
    "no pair": ("none.jsonl", {}, 1, r"none\.jsonl holds no pair$"),
    "no size": (FACTORY, {}, 1, f"train: .* {FACTORY}"),
    "heldout": (FACTORY, {"train": 5, "heldout_source": "pairs.jsonl"}, 1, "heldout_source: .* module:factory"),
    "processes": (FACTORY, {"train": 5}, 5, "heldout: found 4, expected at least 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unfit_sources_are_refused_before_anything_is_loaded(tmp_path, pair_files, case):
    source, keys, processes, words = REFUSED[case]
    rows = pair_files.rows(16)
    lines = pair_files.jsonl(tmp_path / "images", rows[:3]).read_text().replace("images/", "images/images/")
    for name, text in (("three", lines), ("broken", lines + "{}\n"), ("none", "\n")):
        (tmp_path / f"{name}.jsonl").write_text(text)
    if source in ("pairs", "unlabelled"):
        pair_files.parquet(tmp_path / source, [row | {"has_label": source == "pairs"} for row in rows])
    keys = {name: str(value).format(tmp_path) if name == "heldout_source" else value for name, value in keys.items()}
    config = recipe(source if source == FACTORY else tmp_path / source, **keys)
    with pytest.raises(UserError, match=rf"^data\..*{words}"):
        choose(config, Ranks(0, processes, ALONE.device))


def test_a_factory_has_no_rows_to_choose_from():
    assert choose(recipe(FACTORY, train=5), ALONE) is None


def test_pickscores_labels_need_a_plain_pickscore(clip_folder):
    judge = StepAwarePreferenceModel.load(JudgeConfig(path=str(clip_folder)), ALONE.device, torch.Generator())
    assert load_labeller(recipe("a", labels="pickscore"), judge) is judge
    with torch.no_grad():
        judge.clip.vision_model.adaLN_modulation[1].weight[0, 0] = 1
    assert load_labeller(recipe("a"), judge) is None
    with pytest.raises(UserError, match=r"^data\.labels: pickscore .*judge\.path, and mine"):
        load_labeller(recipe("a", judge="mine", labels="pickscore"), judge)


def test_pairs_that_code_made_are_labelled_by_a_judges_probabilities(clip_folder):
    labeller = StepAwarePreferenceModel.load(JudgeConfig(path=str(clip_folder), kind="pickscore"), ALONE.device)
    images = torch.rand(5, 2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pairs = [{"image_0": a, "image_1": b, "caption": "ab", "label_0": 1.0, "label_1": 0.0} for a, b in images]
    data = recipe(FACTORY, train=5, labels="distilled", labeller="pickscore").data
    found = RelabelledPairs.of(pairs, labeller, data, batch=2)
    text = labeller.encode(["ab"])
    for pair, (a, b) in zip(found, images, strict=False):
        scores = labeller.score_images(torch.stack([a, b])[:, None], text, 0).flatten()
        expected = scores.double().softmax(0)
        assert (pair["label_0"], pair["label_1"]) == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(found) == 5


def test_pairs_of_files_hold_what_was_asked_for(tmp_path, pair_files):
    source = open_source(str(pair_files.parquet(tmp_path / "pairs", pair_files.rows(8))), "data.source", True)
    labels = {6: (0.25, 0.75), 2: (1, 0)}
    live = FilePairs(source, labels, (8, 12), images=True)
    assert len(live) == 2
    assert live[0].keys() == {"caption", "num_examples", "label_0", "label_1", "image_0", "image_1"}
    assert (live[0]["caption"], live[0]["label_0"], live[0]["label_1"]) == (source.captions[6], 0.25, 0.75)
    assert torch.equal(live[1]["image_1"], resized(source.images(2)[1], 8, 12))

    entries = Entries(PairCache(tmp_path / "cache"), "vae", "encoders", "judge")
    cached = FilePairs(source, labels, (8, 12), images=False, entries=entries)
    entries.cache.write(entries.of_images(source, 2, (8, 12)), {"mean": torch.ones(2, 4, 1, 1), "std": torch.ones(1)})
    entries.cache.write(entries.text("c e"), {"text": torch.full((3, 2), 5.0)})
    assert cached[1].keys() == {"caption", "num_examples", "label_0", "label_1", "mean", "std", "text"}
    assert cached[1]["text"].sum() == 30
    with pytest.raises(UserError, match=r"^data\.cache: "):
        cached[0]


def one_pair(**changes):
    pair = {f"image_{side}": torch.zeros(3, 8, 8) for side in (0, 1)} | {"caption": "", "label_0": 1.0, "label_1": 0.0}
    return lambda seed, size: [{name: value for name, value in (pair | changes).items() if value is not None}]


@pytest.mark.parametrize(
    "factory, words",
    [
        (lambda seed, size: [], "5"),
        (one_pair(caption=None, label_1=None), "caption, label_1; found image_0, image_1, label_0"),
        (one_pair(image_1=torch.zeros(3, 9, 8)), "(3, 8, 8) and (3, 9, 8)"),
        (one_pair(image_0=torch.zeros(8, 8), image_1=torch.zeros(8, 8)), "(3, H, W)"),
        (one_pair(label_1=1.0), "1.0 and 1.0"),
    ],
    ids=["empty", "keys", "unequal images", "no images", "labels"],
)
def test_bad_pairs_are_told_apart(factory, words):
    with pytest.raises(UserError, match=rf"^data\.source: .*mine:pairs.*{re.escape(words)}"):
        load_pairs(factory, "mine:pairs", 0, 5)
