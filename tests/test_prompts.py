"""Prompt files and the order of prompts."""

import pytest

from strop.engine.errors import UserError
from strop.engine.prompts import batch_of, read_prompts


def test_lines_are_stripped_and_blank_ones_passed_over(tmp_path):
    (tmp_path / "p.txt").write_text(" a cat \r\n\n a dog\n", encoding="utf-8")
    assert read_prompts(str(tmp_path / "p.txt"), "prompts.train") == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(None, "cannot be read"), (b"\n \n", "holds no prompt"), (b"\xff\xfe\xff", "is not UTF-8")],
)
def test_bad_files_name_the_key(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"^prompts.heldout: .*{complaint}"):
        read_prompts(str(tmp_path / "p.txt"), "prompts.heldout")


def test_every_epoch_is_a_permutation_of_its_own():
    prompts = list("abcdefg")
    drawn = [p for i in range(7) for p in batch_of(prompts, i, 3, seed=0)]
    epochs = [drawn[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(epoch) == prompts for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_an_iteration_does_not_depend_on_those_before():
    prompts = list("abcdefg")
    assert batch_of(prompts, 5, 4, seed=3) == batch_of(prompts, 5, 4, seed=3)
    assert batch_of(prompts, 5, 4, seed=3) != batch_of(prompts, 5, 4, seed=4)
