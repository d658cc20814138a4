"""Pairs in files: what is read of them, what is left out, and what each broken row is called."""

import io
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from strop.engine.data.pair_files import BrokenPair, is_factory, open_source, resized
from strop.engine.errors import UserError


def opened(path, labelled=True):
    return open_source(str(path), "data.source", labelled)


def decoded(content):
    return Image.open(io.BytesIO(content)).convert("RGB")


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_every_row_is_read_as_written(tmp_path, form, pair_files):
    rows = pair_files.rows(12)
    source = opened(getattr(pair_files, form)(tmp_path / "pairs", rows))
    assert source.captions == [row["caption"] for row in rows]
    assert source.labels == [(row["label_0"], row["label_1"]) for row in rows]
    assert source.num_examples == [2] * 8 + ([2] * 4 if form == "parquet" else [1] * 4)
    assert (source.broken, source.left_out) == ([], 0)
    for i in (11, 0, 7, 6):
        for side, image in enumerate(source.images(i)):
            assert image.tobytes() == decoded(rows[i][f"jpg_{side}"]).tobytes()


def test_rows_that_teach_nothing_are_left_out(tmp_path, pair_files):
    rows = pair_files.rows(10)
    rows[2]["has_label"] = rows[8]["are_different"] = False
    rows[2]["label_0"] = rows[2]["label_1"] = 0.0
    folder = pair_files.parquet(tmp_path / "pairs", rows)
    source = opened(folder)
    assert (len(source), source.left_out, source.broken) == (8, 2, [])
    assert source.images(2)[0].tobytes() == decoded(rows[3]["jpg_0"]).tobytes()
    assert len(opened(folder, labelled=False)) == 9  # PickScore labels those that nobody has
    assert opened(folder, labelled=False).labels == [None] * 9


def test_a_byte_order_mark_and_other_ends_of_lines(tmp_path, pair_files):
    path = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(3))
    lines = path.read_text(encoding="utf-8").replace('"a e"', '"a\u2028e\x85"').replace("\n", "\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + lines.encode())
    source = opened(path)
    assert (source.captions, source.broken) == (["a\u2028e\x85", "b e", "c e"], [])


def test_parquet_files_by_pattern_and_without_the_columns_that_may_lack(tmp_path, pair_files):
    folder = pair_files.parquet(tmp_path / "pairs", pair_files.rows(10))
    assert len(opened(folder / "train-*1.parquet")) == 5
    lean = parquet.read_table(folder / "train-00000.parquet").select(
        ["jpg_0", "jpg_1", "label_0", "label_1", "caption"]
    )
    (tmp_path / "lean").mkdir()
    parquet.write_table(pa.concat_tables([lean, lean]), tmp_path / "lean" / "a.parquet")
    assert opened(tmp_path / "lean").num_examples == [4, 2, 2, 2, 4] * 2


def test_a_row_group_is_read_once_for_its_neighbours(tmp_path, monkeypatch, pair_files):
    source = opened(pair_files.parquet(tmp_path / "pairs", pair_files.rows(20)))
    reads, read = [], parquet.ParquetFile.read_row_group
    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", lambda *a, **k: reads.append(a[1]) or read(*a, **k))
    for row in range(10):
        source.images(row)
    assert reads == [0, 1]
    assert [source.group(row) for row in (0, 4, 5, 10)] == [(0, 0), (0, 0), (0, 1), (1, 0)]


def test_jsonl_labels_and_counts(tmp_path, pair_files):
    path = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(3))
    line = json.loads(path.read_text().splitlines()[0]) | {"caption": "same"}
    del line["label"]
    labels = [{"label": 0}, {"label": 1}, {"label": "tie"}, {"label_0": 0.25, "label_1": 0.75}, {"label": "1"}]
    labels[1]["num_examples"] = 9
    path.write_text("\n\n".join(json.dumps(line | label) for label in labels))
    source = opened(path)
    assert source.labels == [(1, 0), (0, 1), (0.5, 0.5), (0.25, 0.75), (0, 1)]
    assert source.num_examples == [5, 9, 5, 5, 5]
    assert source.name(1) == "pairs.jsonl line 3"


MALFORMED = [  # what is done to a line, words that its sentence holds
    (lambda line: line[:25], "JSON"),
    (lambda line: "[1, 2]", "image_0, image_1, caption and label"),
    (lambda line: line.replace("image_1", "picture"), "image_1"),
    (lambda line: line.replace('"caption"', '"text"'), "caption"),
    (lambda line: line.replace('"label": ', '"label": 1'), "label is 1"),
    (lambda line: line.replace("{", '{"num_examples": 0, '), "num_examples is 0"),
    (lambda line: line.replace('"label"', '"winner"'), "labels are None and None"),
    (lambda line: line.replace('"caption": "', '"caption": "\\ud83d'), "caption is no text"),
    (lambda line: line.replace("{", '{"num_examples": 1' + "0" * 5000 + ", "), "limit"),
    (lambda line: "[" * 100_000, "nested"),
    (lambda line: '{"label_0": 0.7, "label_1": 0.7, ' + line.replace('"label"', '"x"')[1:], "are 0.7 and 0.7"),
]


@pytest.mark.parametrize("change, words", MALFORMED, ids=lambda value: value if isinstance(value, str) else "")
def test_a_malformed_line_is_named_and_passed_over(tmp_path, change, words, pair_files):
    path = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(3))
    lines = path.read_text().splitlines()
    lines[1] = change(lines[1])
    path.write_text("\n".join(lines))
    source = opened(path)
    assert len(source) == 2
    assert source.name(1) == "pairs.jsonl line 3"
    assert [words in line and "line 2: " in line for line in source.broken] == [True], source.broken


@pytest.mark.parametrize(
    "content, why",
    [(None, "No such file"), (b"", "empty"), (b"GIF, almost", "no image"), ("cut", "damaged")],
    ids=["gone", "empty", "text", "truncated"],
)
def test_a_broken_image_is_named(tmp_path, content, why, pair_files):
    path = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(3))
    image = tmp_path / "pairs" / "images" / "1-1.jpg"
    image.unlink()
    if content is not None:
        image.write_bytes(pair_files.jpeg(0.5, 0, (64, 64))[:900] if content == "cut" else content)
    source = opened(path)
    with pytest.raises(BrokenPair, match=rf"^pairs\.jsonl line 2: .*images/1-1\.jpg.* ?{why}"):
        source.images(1)
    assert len(source.images(2)) == 2


def test_a_broken_parquet_row_is_named(tmp_path, pair_files):
    rows = pair_files.rows(8)
    rows[6]["jpg_1"] = b"no image"
    rows[1]["label_0"], rows[1]["label_1"] = 1.0, 0.7
    source = opened(pair_files.parquet(tmp_path / "pairs", rows, group=2))
    (broken,) = source.broken
    assert broken.startswith("train-00000.parquet row group 0 row 1: its labels are 1.0 and 0.7")
    with pytest.raises(BrokenPair, match=r"^train-00001\.parquet row group 1 row 0: jpg_1 is no image"):
        source.images(5)


def test_identity_changes_with_the_file(tmp_path, pair_files):
    path = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(2))
    before = opened(path).identity(0)
    assert opened(path).identity(0) == before != opened(path).identity(1)
    (tmp_path / "pairs" / "images" / "0-1.jpg").write_bytes(pair_files.jpeg(0.1, 99))
    assert opened(path).identity(0) != before
    folder = pair_files.parquet(tmp_path / "parquet", pair_files.rows(4))
    assert len({str(opened(folder).identity(row)) for row in range(4)}) == 4


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("place", ["beside", "in its place"])
def test_twins_of_name_size_and_time_are_told_apart(tmp_path, form, place, pair_files):
    rows, identities = pair_files.rows(4), []
    for row in rows:
        row["jpg_0"], row["jpg_1"] = (side.ljust(2000, b"\0") for side in (row["jpg_0"], row["jpg_1"]))
    swapped = [row | {"jpg_0": row["jpg_1"], "jpg_1": row["jpg_0"]} for row in rows]
    for name, content in (("a", rows), ("b", swapped)):
        folder = tmp_path / ("pairs" if place == "in its place" else name)
        shutil.rmtree(folder, ignore_errors=True)
        path = getattr(pair_files, form)(folder, content)
        for file in folder.rglob("*.*"):
            os.utime(file, (0, 0))
        identities.append([opened(path).identity(row) for row in range(4)])
    assert all(a != b for a, b in zip(*identities, strict=True))


def test_a_copy_elsewhere_is_the_same(tmp_path, pair_files):
    path = pair_files.jsonl(tmp_path / "a", pair_files.rows(2))
    copy = shutil.copytree(tmp_path / "a", tmp_path / "b") / path.name
    assert opened(copy).identity(1) == opened(path).identity(1)


NO_SOURCES = {  # the file that is opened, in a folder with broken files; words of the sentence
    "nowhere": (),
    "empty": ("parquet",),
    "latin.jsonl": ("UTF-8",),
    "few columns": ("caption, label_0",),
    "no parquet": ("a.parquet", "magic bytes"),
}


@pytest.mark.parametrize("name", NO_SOURCES)
def test_a_source_that_is_none(tmp_path, name, pair_files):
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.jsonl").write_bytes('{"caption": "é"}'.encode("latin-1"))
    pair_files.parquet(tmp_path / "few columns", [{"jpg_0": b"", "jpg_1": b"", "label_1": 1.0}] * 2)
    (tmp_path / "no parquet").mkdir()
    (tmp_path / "no parquet" / "a.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(UserError) as refused:
        opened(tmp_path / name)
    assert str(refused.value).startswith("data.source: ")
    assert [word for word in (name, *NO_SOURCES[name]) if word not in str(refused.value)] == []


def test_factories_are_told_from_files(tmp_path, monkeypatch, pair_files):
    monkeypatch.chdir(tmp_path)
    assert is_factory("strop.bench.tinyworld.pairs:load")
    assert not is_factory("pairs.jsonl")
    pair_files.parquet(tmp_path / "a:b", pair_files.rows(2))
    assert not is_factory("a:b")


@pytest.mark.parametrize("size", [(333, 500), (224, 224), (97, 64)], ids=str)
def test_images_are_resized_as_clip_does(size, pair_files):
    image = decoded(pair_files.jpeg(0.5, 3, size))
    processor = CLIPImageProcessorPil(do_normalize=False, size={"shortest_edge": 56}, crop_size=56)
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (resized(image, 56, 56) / 2 + 0.5 - expected).abs().max() < 1e-6


def test_images_cover_a_size_that_is_no_square(pair_files):
    image = decoded(pair_files.jpeg(0.5, 3, (40, 90)))
    assert resized(image, 32, 16).shape == (3, 32, 16)
    middle = image.resize((72, 32), Image.Resampling.BICUBIC).crop((28, 0, 44, 32))
    pixels = torch.frombuffer(bytearray(middle.tobytes()), dtype=torch.uint8).view(32, 16, 3).permute(2, 0, 1)
    assert torch.equal(resized(image, 32, 16), pixels.float() / 127.5 - 1)
