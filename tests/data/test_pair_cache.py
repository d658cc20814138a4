"""The cache of what is computed once: an entry is found by all that it depends on, and trusted only when whole."""

import pytest
import torch
from torch import nn

from strop.engine.data.pair_cache import PairCache, fingerprint
from strop.engine.errors import UserError

ENTRY = {"mean": torch.arange(6.0).view(2, 3), "std": torch.tensor([1.5, 2.5], dtype=torch.float16)}


@pytest.fixture
def cache(tmp_path):
    return PairCache(tmp_path / "cache")


def test_an_entry_comes_back_bit_for_bit(cache):
    path = cache.path("latents", "model", (8, 8), ["a.jpg", 3, 4])
    assert cache.read(path) is None
    cache.write(path, ENTRY)
    back = PairCache(cache.folder).read(path)
    assert back.keys() == ENTRY.keys()
    assert all(torch.equal(back[name], value) and back[name].dtype == value.dtype for name, value in ENTRY.items())
    assert [p.name for p in cache.folder.rglob("*") if p.is_file()] == [path.name]  # and no draft


def test_whatever_an_entry_depends_on_names_it(cache):
    first, files = ("latents", "model", (8, 8)), ["a.jpg", 3, 4]
    entries = [(*first, files), ("scores", *first[1:], files), ("latents", "other", (8, 8), files)]
    entries += [("latents", "model", (8, 16), files)]
    entries += [(*first, other) for other in (["b.jpg", 3, 4], ["a.jpg", 3, 5], ["a.jpg", "3, 4"])]
    assert len({cache.path(*entry) for entry in entries}) == 7


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: b"something else",
    ],
    ids=["cut", "empty", "one bit", "checksum", "else"],
)
def test_a_damaged_entry_is_none(cache, damage):
    path = cache.path("latents", 1)
    cache.write(path, ENTRY)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.read(path) is None
    cache.write(path, ENTRY)
    assert cache.read(path) is not None


def test_fingerprints_tell_weights_types_and_names_apart():
    first, again = nn.Linear(2, 3), nn.Linear(2, 3)
    again.load_state_dict(first.state_dict())
    assert fingerprint([first]) == fingerprint([again])
    prints = {fingerprint([first]), fingerprint([first, first]), fingerprint([first], ["a"])}
    prints |= {fingerprint([first.half()])}
    with torch.no_grad():
        again.bias[1] += 1e-6
    prints |= {fingerprint([again]), fingerprint([again], leave_out=("bias",))}
    assert len(prints) == 6
    again.bias.data.zero_()
    assert fingerprint([again], leave_out=("bias",)) in prints


def test_a_folder_that_cannot_be_written(tmp_path, cache, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^data\.cache: .*Not a directory"):
        PairCache(tmp_path / "file" / "cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=r"^data\.cache: .*No space left on device"):
        cache.write(cache.path("latents", 1), ENTRY)
