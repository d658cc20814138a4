"""data/pair_scan: broken pairs are found, results are cached, damaged entries are computed anew."""

from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from strop.engine.config.training import JudgeConfig, ModelConfig
from strop.engine.data.pair_cache import PairCache
from strop.engine.data.pair_files import open_source, resized
from strop.engine.data.pair_scan import FLIPPED, PLAIN, Entries, PairScan, ProgressLine, labels_by
from strop.engine.errors import UserError
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.runtime.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))
SIZE = (16, 16)


@pytest.fixture(scope="module")
def models(tiny_folder, clip_folder):
    """Its own, for tests here change their weights."""
    diffusion = LatentDiffusion.load(ModelConfig(path=str(tiny_folder)), ALONE.device)
    judge = StepAwarePreferenceModel.load(JudgeConfig(path=str(clip_folder)), ALONE.device, torch.Generator())
    return SimpleNamespace(diffusion=diffusion, judge=judge)


@pytest.fixture
def pair_scan(tmp_path, models, monkeypatch):
    """pair_scan(scored=True) -> a PairScan with a cache; `encoded` lists the images per call of the VAE's encoder."""

    def make(scored=False, cache=True, workers=0):
        cache = PairCache(tmp_path / "cache") if cache else None
        entries = Entries.of(cache, models.diffusion, models.judge) if cache else None
        return PairScan(models.diffusion, models.judge if scored else None, SIZE, entries, 3, workers, ALONE)

    make.encoded = []
    posterior = models.diffusion.posterior
    monkeypatch.setattr(models.diffusion, "posterior", lambda x: make.encoded.append(x.shape[1]) or posterior(x))
    return make


@pytest.fixture
def source(tmp_path, pair_files):
    return open_source(str(pair_files.jsonl(tmp_path / "pairs", pair_files.rows(7))), "data.source", True)


@pytest.mark.parametrize("workers", [0, 2])
def test_posteriors_are_kept_for_every_pair_and_made_once(pair_scan, source, models, workers):
    here = pair_scan(workers=workers)
    actual = here.scan(source, range(7), "data.source", 0.0, encode=(PLAIN,))
    assert (list(actual.scores), actual.broken, pair_scan.encoded) == (list(range(7)), [], [3, 3, 1])
    images = torch.stack([resized(image, *SIZE) for image in source.images(5)]).unsqueeze(1)
    mean, std = models.diffusion.posterior(images)
    entry = here.entries.cache.read(here.entries.of_images(source, 5, SIZE))
    for name, exact in (("mean", mean), ("std", std)):
        assert entry[name].dtype == torch.float16
        assert (entry[name] - exact[:, 0]).abs().max() < 5e-4 * exact.abs().max()
    pair_scan.encoded.clear()
    again = pair_scan().scan(source, range(7), "data.source", 0.0, encode=(PLAIN,))
    assert (again, pair_scan.encoded) == (actual, [])


def test_flipped_images_have_entries_of_their_own_beside_those_that_are_there(pair_scan, source, models):
    here = pair_scan()
    here.scan(source, range(7), "data.source", 0.0, (PLAIN,))
    pair_scan.encoded.clear()
    here.scan(source, range(7), "data.source", 0.0, (PLAIN, FLIPPED))
    assert pair_scan.encoded == [3, 3, 1]  # the flipped ones alone
    images = torch.stack([resized(image, *SIZE) for image in source.images(5)]).unsqueeze(1)
    mean, _ = models.diffusion.posterior(images.flip(-1))
    entry = here.entries.cache.read(here.entries.of_images(source, 5, SIZE, FLIPPED))
    assert (entry["mean"] - mean[:, 0]).abs().max() < 5e-4 * mean.abs().max()


def test_only_what_is_damaged_or_has_changed_is_made_anew(pair_scan, source, pair_files):
    here = pair_scan()
    here.scan(source, range(7), "data.source", 0.0, encode=(PLAIN,))
    here.entries.of_images(source, 2, SIZE).write_bytes(b"half an entry")
    (source.folder / source.paths[4][1]).write_bytes(pair_files.jpeg(0.4, 77))
    pair_scan.encoded.clear()
    here.scan(source, range(7), "data.source", 0.0, encode=(PLAIN,))
    assert pair_scan.encoded == [2]
    assert here.entries.cache.read(here.entries.of_images(source, 2, SIZE)) is not None


def test_another_model_or_resolution_has_its_own_entries(pair_scan, source, models):
    entries = pair_scan().entries
    vae = models.diffusion.vae
    with torch.no_grad():
        next(vae.encoder.parameters()).view(-1)[0] += 1
        other = pair_scan().entries
        next(vae.encoder.parameters()).view(-1)[0] -= 1
    assert entries.of_images(source, 0, SIZE) != other.of_images(source, 0, SIZE)
    assert entries.of_images(source, 0, SIZE) != entries.of_images(source, 0, (16, 32))
    assert entries.text("a") == other.text("a") != entries.text("b")
    models.diffusion.text_encoders[0].half()
    other = pair_scan().entries
    models.diffusion.text_encoders[0].float()
    assert other.text("a") != entries.text("a")


def test_text_embeddings_are_those_of_the_encoder(pair_scan, models):
    here = pair_scan()
    here.encode_captions(["b", "a cat", "b", ""])
    assert len(list((here.entries.cache.folder / "text").rglob("*.entry"))) == 3
    for caption in ("a cat", ""):
        entry = here.entries.cache.read(here.entries.text(caption))
        assert entry.keys() == {"text"}
        assert torch.equal(entry["text"], models.diffusion.encode([caption]).text[0].half())


def test_scores_are_pickscores_own(pair_scan, source, clip_folder, tokenizer):
    here = pair_scan(scored=True)
    actual = here.scan(source, range(7), "data.source", 0.0)
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPImageProcessorPil.from_pretrained(clip_folder, size={"shortest_edge": 56}, crop_size=56)
    for row in (0, 6):
        ids = tokenizer([source.captions[row]], padding="max_length", max_length=16, return_tensors="pt").input_ids
        pixels = processor(source.images(row), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected = clip(input_ids=ids, pixel_values=pixels).logits_per_text[0]
        assert (torch.tensor(actual.scores[row]) - expected).abs().max() < 5e-5  # of about 100
    entry = here.entries.cache.read(here.entries.scores(source, 6))["scores"]
    assert entry.tolist() == actual.scores[6]
    assert pair_scan(scored=True).scan(source, range(7), "data.source", 0.0) == actual
    assert pair_scan(scored=True, cache=False).scan(source, range(7), "data.source", 0.0) == actual


@pytest.mark.parametrize("tie", [0.0, 0.1, 0.9])
def test_labels_are_by_the_published_rule(tie):
    scores = 3 * torch.randn(2, 200, generator=torch.Generator().manual_seed(0))
    scores[:, 0] = 1.0
    p = scores.double().exp() / scores.double().exp().sum(0)
    expected = [(1.0, 0.0) if a - b > tie else (0.0, 1.0) if b - a > tie else (0.5, 0.5) for a, b in p.T.tolist()]
    labels = labels_by(scores, SimpleNamespace(labels="pickscore", tie=tie))
    assert list(map(tuple, labels.T.tolist())) == expected
    assert set(labels[0].tolist()) == {0.0, 0.5, 1.0}
    distilled = labels_by(scores, SimpleNamespace(labels="distilled", tie=tie))
    torch.testing.assert_close(distilled.double(), p)


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "not cached"])
def test_broken_pairs_are_named_and_left_out_up_to_the_share(pair_scan, source, cache):
    (source.folder / source.paths[3][0]).write_bytes(b"not an image")
    (source.folder / source.paths[5][1]).unlink()
    here = pair_scan(cache=cache)
    actual = here.scan(source, range(7), "data.source", 0.3, encode=(PLAIN,) if cache else ())
    assert list(actual.scores) == [0, 1, 2, 4, 6]
    assert [line.split(": ")[0] for line in actual.broken] == ["pairs.jsonl line 4", "pairs.jsonl line 6"]
    words = r"2 of 7 pairs .*data\.max_broken = 0\.2; .*pairs\.jsonl line 4: images/3-0\.jpg"
    with pytest.raises(UserError, match=rf"^data\.source: .*{words}"):
        here.scan(source, range(7), "data.source", 0.2, encode=(PLAIN,) if cache else ())


def test_a_hopeless_source_is_given_up_early(pair_scan, source):
    for path in source.paths:
        (source.folder / path[0]).write_bytes(b"not an image")
    looked, images = [], type(source).images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(source), "images", lambda self, row: looked.append(row) or images(self, row))
        with pytest.raises(UserError, match="at least 2 of 7 pairs are broken"):
            pair_scan(cache=False).scan(source, range(7), "data.source", 0.2)
    assert looked == [0, 1]


def test_progress_is_printed_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 5.0, 20.0, 21.0])
    monkeypatch.setattr("strop.engine.data.pair_scan.time.monotonic", lambda: next(clock))
    progress = ProgressLine("pairs", 1000, enabled=True)
    for _ in range(3):
        progress.step(20)
    assert capsys.readouterr().out == "pairs 40/1,000, 2.0 a second, ETA 0:08:00\n"
