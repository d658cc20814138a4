"""data/embeddings: every prompt is encoded once, and found again with what base model and judge know of it."""

import pytest
import torch

from strop.engine.config.training import JudgeConfig, ModelConfig
from strop.engine.data.embeddings import Embeddings, TrainingPrompts
from strop.engine.data.prompts import batch_of
from strop.engine.judge.model import StepAwarePreferenceModel
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.runtime.ranks import Ranks

CPU = torch.device("cpu")
TRAIN, HELDOUT = [f"{a} {b}" for a in "abcdefgh" for b in "ijklmnopq"], ["x", "y z"]  # 72 are more than one batch


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def models(request, tiny_folder, tiny_sdxl_folder, clip_folder):
    folder = tiny_folder if request.param == "sd15" else tiny_sdxl_folder
    judge = StepAwarePreferenceModel.load(JudgeConfig(path=str(clip_folder), kind="pickscore"), CPU)
    return LatentDiffusion.load(ModelConfig(path=str(folder)), CPU), judge


def test_rows_are_those_of_their_prompts_in_the_order_asked_for(models):
    diffusion, judge = models
    embeddings = Embeddings(diffusion, judge, [TRAIN, HELDOUT])
    asked = ["y z", TRAIN[70], TRAIN[3], TRAIN[3]]
    actual, expected = embeddings[asked], diffusion.encode(asked)
    assert len(embeddings) == 74
    torch.testing.assert_close(actual.text, expected.text, rtol=0, atol=1e-5)
    torch.testing.assert_close(actual.judge, judge.encode(asked), rtol=0, atol=1e-6)
    assert torch.equal(actual.null, expected.null)
    if expected.pooled is not None:
        torch.testing.assert_close(actual.pooled, expected.pooled, rtol=0, atol=1e-5)
        assert torch.equal(actual.time_ids, expected.time_ids)


def test_one_group_does_not_change_the_bits_of_another(models):
    alone, beside = Embeddings(*models, [TRAIN[:64]]), Embeddings(*models, [TRAIN, HELDOUT])
    for name in ("text", "judge"):
        assert torch.equal(getattr(alone[TRAIN[:64]], name), getattr(beside[TRAIN[:64]], name))


def test_the_text_encoders_are_not_needed_any_more(tiny_folder, clip_folder):
    diffusion = LatentDiffusion.load(ModelConfig(path=str(tiny_folder)), CPU)
    judge = StepAwarePreferenceModel.load(JudgeConfig(path=str(clip_folder), kind="pickscore"), CPU)
    embeddings = Embeddings(diffusion, judge, [HELDOUT])
    diffusion.release_text_encoders()
    judge.release_text_tower()
    assert len(embeddings[["x"]]) == 1
    for gone in (diffusion, judge):
        with pytest.raises(RuntimeError):
            gone.encode(["x"])


def test_embeddings_leave_the_device_batch_by_batch(models):
    diffusion, _ = models
    actual = diffusion.encode(TRAIN, onto=torch.device("meta"))  # where nothing could be encoded
    assert actual.text.is_meta
    assert actual.text.shape[0] == len(TRAIN)
    assert actual.pooled is None or actual.pooled.is_meta


class Named:
    """In place of embeddings: the prompts themselves."""

    def __getitem__(self, prompts):
        return list(prompts)


def test_ranks_share_the_prompts_of_an_iteration():
    prompts = [str(i) for i in range(12)]
    two = [TrainingPrompts(prompts, Named(), 3, 7, Ranks(rank, 2, CPU)) for rank in range(2)]
    mine = [each.mine(1) for each in two]
    assert mine[0] + mine[1] == batch_of(prompts, 1, 6, 7), "in rank order, as pairs of all ranks name them"
    assert two[0].everyone(1) == two[1].everyone(1) == mine[0] + mine[1]
    alone = TrainingPrompts(prompts, Named(), 6, 7, Ranks(0, 1, CPU))
    assert sorted(mine[0] + mine[1] + alone.mine(0), key=int) == prompts
