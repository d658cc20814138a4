"""runtime/digests and runtime/files: what of an input is compared, and which errors of writing are a user's."""

import errno
import os
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from strop.engine.errors import UserError
from strop.engine.runtime import digests
from strop.engine.runtime.digests import input_digests
from strop.engine.runtime.files import writing


@pytest.fixture(params=[1 << 26, 10_000], ids=["read whole", "by samples"])
def weights(tmp_path, request, monkeypatch):
    """A file of three tensors of 40 kB."""
    monkeypatch.setattr(digests, "WHOLE", request.param)
    rng = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(10_000, generator=rng) for name in "abc"}
    save_file(tensors, tmp_path / "weights.safetensors")
    return tmp_path / "weights.safetensors", tensors


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_swapped_file_of_the_same_size_and_date_is_noticed(weights, name):
    file, tensors = weights
    before, date = input_digests(file), file.stat()
    save_file(tensors | {name: tensors[name] * 1.001}, file)
    os.utime(file, ns=(date.st_atime_ns, date.st_mtime_ns))
    assert file.stat().st_size == date.st_size
    assert input_digests(file) != before


def test_a_copy_counts_as_the_file_and_of_a_folder_every_file_that_is_read(weights, tmp_path):
    file, _ = weights
    copy = shutil.copy(file, tmp_path / "other.bin")
    os.utime(copy, (1, 1))
    if file.stat().st_size < digests.WHOLE:
        assert input_digests(file) == input_digests(tmp_path / "other.bin")
    shutil.copytree(tmp_path, tmp_path / "model" / "unet", ignore=lambda *_: {"model", "other.bin"})
    (tmp_path / "model" / "README.md").write_text("not read")
    assert input_digests(tmp_path / "model") == {"unet/weights.safetensors": input_digests(file)[""]}
    assert list(input_digests(tmp_path / "model" / "unet" / "w*.safetensors")) == ["weights.safetensors"]
    assert input_digests(tmp_path / "none") == {}


def test_of_a_large_file_without_tensors_distant_samples_count(tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "WHOLE", 10_000)
    file = tmp_path / "train.parquet"
    file.write_bytes(bytes(1_000_000))
    before = input_digests(file)
    file.write_bytes(bytes(500_000) + b"1" * 1000 + bytes(499_000))
    assert input_digests(file) != before


@pytest.mark.parametrize(
    "error, words",
    [
        (OSError(errno.ENOSPC, "", "a/file"), ("a/file", "No space left")),
        (OSError(errno.EDQUOT, ""), ("run", "quota")),
        (PermissionError(errno.EACCES, "", "a/file"), ("a/file", "Permission denied")),
        (OSError(errno.EROFS, "", "a/file"), ("a/file", "Read-only")),
        (SafetensorError("Error while serializing: I/O error: full (os error 28)"), ("run", "No space left")),
    ],
    ids=str,
)
def test_a_full_disk_and_the_like_are_a_users_to_put_right(tmp_path, error, words):
    with pytest.raises(UserError) as raised, writing(tmp_path / "run"):
        raise error
    assert [word for word in words if word not in str(raised.value)] == []


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "", "gone"), SafetensorError("bad header")], ids=str)
def test_other_errors_stay_what_they_are(tmp_path, error):
    with pytest.raises(type(error)), writing(tmp_path):
        raise error
