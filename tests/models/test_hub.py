"""models/hub: local paths as they are, hub ids from a cache, and one sentence where there is neither."""

import pytest

from strop.engine.errors import UserError
from strop.engine.models.hub import fetch


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache that holds owner/name, and no network."""
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "abc"
    (snapshot / "unet").mkdir(parents=True)
    (snapshot / "unet" / "config.json").write_text("{}")
    (snapshot / "judge.v1.bin").write_text("weights")
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def test_a_local_path_is_taken_as_it_is(tmp_path):
    assert fetch(str(tmp_path), None, "model.path", ["*"]) == tmp_path


def test_a_revision_is_of_the_hub_alone(tmp_path):
    with pytest.raises(UserError, match=r"^model\.path: .* revision v1 "):
        fetch(str(tmp_path), "v1", "model.path", ["*"])


def test_a_repository_and_a_file_of_it(cache):
    assert fetch("owner/name", None, "model.path", ["unet/*"]).samefile(cache)
    assert fetch("owner/name/judge.v1.bin", None, "judge.path", ["*"]).read_text() == "weights"


@pytest.mark.parametrize(
    "path, words",
    [
        ("nowhere", ("nowhere", "owner/name")),
        ("a/b/c", ("a/b/c",)),
        ("owner/other", ("owner/other", "hub")),
        ("owner/name/other.bin", ("repository owner/name", "file other.bin")),
    ],
)
def test_what_is_nowhere_is_said_in_one_sentence(cache, path, words):
    with pytest.raises(UserError, match=r"^judge\.path: .*$") as stopped:
        fetch(path, None, "judge.path", ["*"])
    assert [word for word in words if word not in str(stopped.value)] == []
