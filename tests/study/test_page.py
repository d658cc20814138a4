"""`strop study make`: what it reads, what it refuses, and that nothing in the page names a system."""

import json
import re

import pytest
from PIL import Image, ImageChops, ImageStat

from strop.engine.study.balance import SENTINEL
from strop.engine.study.key import Key, twin
from strop.engine.study.systems import read_systems
from strop.engine.user_study import main

NAMES = ("zebra-v2", "quokka", "numbat")


@pytest.fixture(scope="module")
def study(new_study, tmp_path_factory):
    """(folder, key) of a study of three systems. Not to be written to."""
    folder = tmp_path_factory.mktemp("study")
    return folder, new_study(folder, NAMES, 12, "--raters", "anna", "ben", "--seed", 7)


def chunks(content):
    """The names of the chunks of a PNG."""
    place, names = 8, []
    while place < len(content):
        size = int.from_bytes(content[place : place + 4], "big")
        names.append(content[place + 4 : place + 8].decode())
        place += 12 + size
    return names


def test_nothing_that_raters_get_names_a_system_or_a_kind(study):
    folder, key = study
    files = [path for path in (folder / "study" / "page").rglob("*") if path.is_file()]
    told = [*map(str.encode, NAMES), b"drawn by", b"sentinel", b'repeat"', b"seed"]
    for path in files:
        content = path.read_bytes() + str(path.relative_to(folder)).encode()
        assert not [word for word in told if word in content], path
        if path.suffix == ".png":
            assert set(chunks(path.read_bytes())) == {"IHDR", "IDAT", "IEND"}
            assert re.fullmatch(r"[0-9a-f]{20}\.png", path.name)
    assert len({path.stat().st_mtime for path in files if path.suffix == ".png"}) == 1
    assert len(files) == 1 + len(key.images)
    page = (folder / "study" / "page" / "index.html").read_text()
    assert "http" not in page.replace("<!doctype html>", "")
    assert "{{" not in page


def test_the_manifest_shows_the_images_of_the_key(study):
    folder, key = study
    page = (folder / "study" / "page" / "index.html").read_text()
    digest, text = re.search(r'data-hash="(\w+)">(.*?)</script>', page, re.DOTALL).groups()
    manifest = json.loads(text)
    assert (digest, manifest["prompts"]) == (key.manifest, key.prompts)
    assert key.prompts == [f"text <{n}> & more" for n in range(12)]
    for rater, items in key.items.items():
        assert [shown[0] for shown in manifest["raters"][rater]] == list(items)
        for token, prompt, *images in manifest["raters"][rater]:
            item = items[token]
            assert prompt == item.prompt
            for side, other, image in ((item.left, item.right, images[0]), (item.right, item.left, images[1])):
                place = side if side >= 0 else twin(other)
                assert manifest["images"][image] == f"images/{key.images[prompt, place]}"


def test_images_keep_their_pixels_and_a_twin_is_plainly_worse(study):
    folder, key = study
    shown = folder / "study" / "page" / "images"
    for (prompt, place), file in key.images.items():
        image = Image.open(shown / file)
        if place >= 0:
            assert image.tobytes() == Image.open(folder / NAMES[place] / f"{prompt}.png").tobytes()
        else:
            intact = Image.open(shown / key.images[prompt, twin(place)])
            assert max(ImageStat.Stat(ImageChops.difference(image, intact)).mean) > 8
    controls = {(i.prompt, i.left, i.right) for i in key.items["anna"].values() if i.kind == SENTINEL}
    assert len(controls) == 2 == sum(place < 0 for _, place in key.images)


def test_a_seed_makes_the_same_study_and_other_images_another(study, draw, tmp_path):
    folder, key = study
    sources = [str(folder / name) for name in NAMES]
    again = ["--raters", "anna", "ben", "--seed", "7"]
    main(["make", *sources, "--out", str(tmp_path / "same"), *again])
    assert Key.read(tmp_path / "same" / "key.json") == key
    other = draw(tmp_path, NAMES, 12)
    Image.new("RGB", (32, 24)).save(tmp_path / NAMES[1] / "3.png")
    main(["make", *other, "--out", str(tmp_path / "other"), *again])
    assert Key.read(tmp_path / "other" / "key.json").manifest != key.manifest


def test_a_list_of_an_evaluation_and_prompts_in_order(draw, tmp_path):
    draw(tmp_path, NAMES[:2], 11)
    lines = [
        {"prompt": f"p {n}", "scores": 1, "images": {name: f"{name}/{n}.png" for name in NAMES[:2]}} for n in range(11)
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    listed = read_systems([str(tmp_path / "list.jsonl")], None)
    (tmp_path / "prompts.txt").write_text("".join(f"p {n}\n" for n in range(11)))
    folders = read_systems([f"{name}={tmp_path / name}" for name in NAMES[:2]], tmp_path / "prompts.txt")
    assert (listed.names, listed.prompts, listed.files) == (folders.names, folders.prompts, folders.files)
    assert [path.name for path in folders.files[0]] == [f"{n}.png" for n in range(11)]  # 2 before 10


REFUSALS = [
    ("{zebra-v2} --out new", "zebra-v2", "two or more"),
    ("{zebra-v2} {zebra-v2} --out new", "NAME=FOLDER"),
    ("{zebra-v2} nowhere --out new", "nowhere"),
    ("{zebra-v2} {short} --out new", "{short}", "11", "one of 1"),
    ("{quokka} {zebra-v2} --out new", "{quokka}", "prompts.jsonl", "--prompts"),
    ("{zebra-v2} {quokka} --prompts {few} --out new", "--prompts", "{few}", "2 prompts", "12"),
    ("{zebra-v2} {quokka} --prompts nowhere.jsonl --out new", "--prompts", "nowhere.jsonl"),
    ("{zebra-v2} {broken} --out new", "{broken}", "3.png"),
    ("{few.jsonl} --out new", "few.jsonl", "line 2", "images"),
    ("{zebra-v2} {quokka} --out {quokka}", "--out", "{quokka}"),
    ("{zebra-v2} {quokka} --out new --repeats 5", "--repeats", "5.0", "0.5"),
    ("{zebra-v2} {quokka} --out new --raters a a", "--raters", "'a', 'a'"),
    ("{zebra-v2} {quokka} --out new --raters 0", "--raters"),
]


@pytest.mark.parametrize("row", REFUSALS, ids=lambda row: row[0])
def test_a_mistake_gets_one_sentence(row, draw, tmp_path, monkeypatch, capsys):
    draw(tmp_path, [*NAMES, "broken"], 12)
    draw(tmp_path / "of-eleven", ["short"], 11)
    (tmp_path / "broken" / "3.png").write_bytes(b"no image")
    (tmp_path / "few").write_text("a\nb\n")
    line = json.dumps({"prompt": "a", "images": {"a": "a.png", "b": "b.png"}})
    (tmp_path / "few.jsonl").write_text(f'{line}\n{{"prompt": "b", "images": {{"a": "a.png"}}}}')
    places = {name: str(tmp_path / name) for name in (*NAMES, "broken", "few", "few.jsonl")}
    places["short"] = str(tmp_path / "of-eleven" / "short")
    monkeypatch.chdir(tmp_path)
    fill = lambda text: re.sub(r"\{(.*?)\}", lambda name: places[name[1]], text)
    command, *words = row
    with pytest.raises(SystemExit) as stopped:
        main(["make", *map(fill, command.split())])
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2
    assert sentence.startswith("strop: ")
    assert sentence.count("\n") == 1
    assert [word for word in map(fill, words) if word not in sentence] == []
    assert not (tmp_path / "new").exists()
