"""Prompt files and the order of prompts."""

import json

import pytest

from strop.engine.data.prompts import batch_of, first_used, read_prompts, split_prompts
from strop.engine.errors import UserError


def test_every_epoch_is_a_permutation_of_its_own():
    prompts = list("abcdefg")
    drawn = [p for i in range(7) for p in batch_of(prompts, i, 3, seed=0)]
    epochs = [drawn[i : i + 7] for i in range(0, 21, 7)]
    assert all(sorted(epoch) == prompts for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert drawn == [p for i in range(7) for p in batch_of(prompts, i, 3, seed=0)]
    assert drawn != [p for i in range(7) for p in batch_of(prompts, i, 3, seed=1)]


@pytest.mark.parametrize(
    "name, content",
    [
        ("p.txt", " a cat \n\n a dog\r\na fish"),
        ("p.json", '[{"caption": " a cat ", "trainset_idx": 3}, {"caption": ""}, {"prompt": "a dog"}, "a fish"]'),
        ("p.jsonl", '{"caption": "a cat"}\n\n{"tag": "x", "prompt": "a dog"}\n"a fish"\n'),
        ("p.jsonl", '"a cat"\n"a\u2028dog"\n{"prompt": "a fish"}'),
        ("p.JSON", '\ufeff["a cat", "a dog", "a fish"]'),
        ("p.txt", "\ufeffa cat\r\na dog\ra fish\r\n"),
        ("p.csv", "\ufeffid,Prompt\r\n1,a cat\r\n2,a dog\r\n\r\n3,a fish\r\n"),
        ("p.csv", 'caption\n"a cat"\na dog\n""\n a fish'),
        ("p.TSV", "id\tcaption\n1\ta cat\n2\ta dog\n3\ta fish\n"),
    ],
)
def test_prompts_of_text_json_and_json_lines(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_prompts(str(tmp_path / name), "prompts.train") == [
        "a cat",
        "a\u2028dog" if "\u2028" in content else "a dog",
        "a fish",
    ]


def test_no_character_but_the_end_of_a_line_ends_a_prompt(tmp_path):
    prompt = "a cat\u2028sits\x85on\x0ba\x0cmat\x1c, it\u2029seems"
    contents = {"p.txt": prompt, "p.jsonl": json.dumps({"prompt": prompt}, ensure_ascii=False)}
    contents |= {"p.csv": f'prompt\n"{prompt}"', "p.tsv": f"prompt\n{prompt}"}
    for name, content in contents.items():
        (tmp_path / name).write_text(f"{content}\n", encoding="utf-8")
        assert read_prompts(str(tmp_path / name), "prompts.train") == [prompt]


def test_a_cell_of_a_table_may_hold_commas_quotes_and_lines(tmp_path):
    (tmp_path / "p.csv").write_text('prompt,n\n"a cat, a ""dog""\nand a fish",1\n')
    assert read_prompts(str(tmp_path / "p.csv"), "prompts.train") == ['a cat, a "dog"\nand a fish']


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.csv", b"a cat\na dog\n", "'a cat'"),
        ("p.csv", b"prompt,caption\na,b\n", "'prompt, caption'"),
        ("p.csv", b"id;prompt\n1;a\n", "'id;prompt'"),
        ("p.csv", b"id,prompt\n1,a cat, a dog\n", "line 2 has 3 cells, expected the 2"),
        ("p.csv", b"", "columns"),
        ("p.csv", b'prompt\n"' + b"a" * 200_000, "line 2"),
        ("p.csv", b"\xff\xfei\0d\0", "UTF-8"),
        ("p.txt", b'[\n{"caption": "a cat"}\n]', "a name in .json"),
        ("p.txt", b'\n{"caption": "a cat"}\n{"caption": "a dog"}\n', "a name in .jsonl"),
        ("p.json", b'["a", "\\ud83d"]', "entry 2: found '\\ud83d'"),
        ("p.jsonl", b'{"prompt": "a \\ud83d cat"}', "line 1: found"),
        ("p.jsonl", b"[" * 100_000, "nested"),
        ("p.jsonl", b"9" * 5000, "limit"),
        ("p.txt", b"\xff\xfe\xff", "UTF-8"),
        ("p.json", b"[{", "JSON"),
        ("p.json", b'{"caption": "a"}', "dict"),
        ("p.json", b'["a", {"text": "b"}]', "entry 2 has no caption; found keys text"),
        ("p.json", b"[]", "no prompt"),
        ("p.jsonl", b'{"caption": "a"}\n{"caption": ', "line 2"),
        ("p.jsonl", b'{"caption": 3}', "line 1 has no caption; found keys caption"),
        ("p.jsonl", b"7", "line 1 has no caption; found 7"),
    ],
)
def test_an_unfit_file_is_refused_by_key_and_entry(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as refused:
        read_prompts(str(tmp_path / name), "prompts.train")
    assert str(refused.value).startswith(f"prompts.train: {tmp_path / name}")
    assert words in str(refused.value)


def test_held_out_prompts_are_taken_whole_and_by_the_seed():
    prompts = ["a", "b", "a", "c", "d", "b"]
    train, heldout = split_prompts(prompts, 2, seed=0)
    assert len(heldout) == 2
    assert train == [prompt for prompt in prompts if prompt not in heldout]
    assert split_prompts(prompts, 2, seed=0) == (train, heldout)
    assert {tuple(split_prompts(prompts, 2, seed)[1]) for seed in range(20)} != {tuple(heldout)}


def test_prompts_of_a_longer_run_begin_with_those_of_a_shorter_one():
    prompts = [str(i) for i in range(40)] + ["7", "8"]
    drawn = [p for i in range(6) for p in batch_of(prompts, i, 3, seed=1)]
    short, long = first_used(prompts, 9, seed=1, multiple=4), first_used(prompts, 18, seed=1, multiple=4)
    assert set(drawn[:9]) <= set(short)
    assert set(drawn) <= set(long)
    assert len(short) == 12
    assert long[:12] == short
    assert len(first_used(prompts, 1000, seed=1, multiple=4)) == 40
