"""`strop geneval`: the official folders and back, task means by hand, pairing, intervals, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import stdtrit

from strop.engine import cli
from strop.engine.evaluation import geneval_results
from strop.engine.evaluation.compare import paired_delta
from strop.engine.evaluation.geneval import find_images, read_metadata
from strop.engine.evaluation.geneval_results import (
    OVERALL,
    _change,
    _mean_of,
    _score,
    read_results,
    scores,
    sign_flip_p,
)
from strop.engine.evaluation.geneval_results import compare as compared
from strop.engine.evaluation.intervals import Z, wilson

DOG, CAT = {"class": "dog", "count": 1}, {"class": "cat", "count": 1}
ROWS = [
    {"tag": "single_object", "include": [DOG], "prompt": "a photo of a dog"},
    {"tag": "colors", "include": [CAT | {"color": "red"}], "prompt": "a photo of a red cat"},
    {
        "tag": "position",
        "include": [DOG, CAT | {"position": ["left of", 0]}],
        "prompt": "a photo of a cat left of a dog",
    },
    {"tag": "counting", "include": [CAT], "exclude": [CAT | {"count": 2}], "prompt": "a photo of one cat"},
]


def jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def results(path: Path, verdicts: dict[tuple[str, str], str]) -> Path:
    """Results by (tag, prompt): "101" are three images, the second of which is wrong."""
    rows = [
        {"filename": f"images/{number:05}/samples/{image:04}.png", "tag": tag, "prompt": prompt,
         "correct": right == "1", "reason": "", "metadata": "{}", "details": "{}"}
        for number, ((tag, prompt), images) in enumerate(verdicts.items())
        for image, right in enumerate(images)
    ]  # fmt: skip
    return jsonl(path, rows)


@pytest.fixture
def metadata(tmp_path):
    return jsonl(tmp_path / "evaluation_metadata.jsonl", ROWS)


def test_layout_there_and_back(metadata, tmp_path, capsys):
    prompts, flat = read_metadata(metadata), tmp_path / "flat"
    flat.mkdir()
    for prompt in range(4):
        for number in range(2):
            image = Image.new("RGB", (8, 8), (prompt, number, 7))
            image.save(
                flat / (f"seed42_{prompt:05}_{number}.png" if number else f"42-{prompt}-{number}.webp"), lossless=True
            )
    out = tmp_path / "out"
    cli.main(["geneval", "layout", "--metadata", str(metadata), "--images", str(flat), "--out", str(out)])
    assert "4 prompts with 2 images each" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [f"{number:05}" for number in range(4)]
    for number, files in enumerate(find_images(out, prompts)):
        assert json.loads((out / f"{number:05}" / "metadata.jsonl").read_text()) == ROWS[number]
        assert files == [out / f"{number:05}" / "samples" / f"{image:05}.png" for image in range(2)]
        assert [Image.open(file).getpixel((0, 0)) for file in files] == [(number, 0, 7), (number, 1, 7)]


def test_task_means_by_hand(metadata, tmp_path):
    verdicts = dict(zip([(row["tag"], row["prompt"]) for row in ROWS], ("1110", "1", "00", "01"), strict=True))
    verdicts["colors", "a photo of a blue dog"] = "001"
    file = read_results(results(tmp_path / "some.jsonl", verdicts))
    rows = scores(file)
    assert list(rows) == ["single_object", "counting", "colors", "position", OVERALL]
    assert {task: row["score"] for task, row in rows.items()} == pytest.approx(
        {"single_object": 3 / 4, "counting": 1 / 2, "colors": 2 / 4, "position": 0, OVERALL: 1.75 / 4}
    )
    assert (rows["colors"]["prompts"], rows["colors"]["images"], rows[OVERALL]["images"]) == (2, 4, 12)
    assert rows["colors"]["ci95"] is None


def test_images_that_say_the_same_count_as_one_prompt_and_independent_ones_as_many():
    quantile = float(stdtrit(99, 0.975)) / Z
    alike = _score(np.array([[4, 4]] * 60 + [[0, 4]] * 40, dtype=float))
    assert alike["ci95"] == pytest.approx(wilson(0.6, 99 / quantile**2 * 100 / 99), rel=1e-9)
    spread = _score(np.array([[2, 4]] * 100, dtype=float))  # less between prompts than chance gives: no credit for that
    assert spread["ci95"] == pytest.approx(wilson(0.5, 400 / quantile**2), rel=1e-9)
    assert _score(np.full((80, 2), 4.0))["ci95"][0] == pytest.approx(0.953, abs=2e-3)  # 80 prompts, not 320 images


def test_one_image_a_prompt_is_a_paired_rate():
    gains = np.array([1.0] * 14 + [-1.0] * 5 + [0.0] * 61)
    row = _change(gains, np.ones(80))
    usual = paired_delta((gains < 0).astype(float), (gains > 0).astype(float))
    middle = sum(usual["ci95"]) / 2
    wider = float(stdtrit(79, 0.975)) / Z
    assert row["ci95"] == pytest.approx([middle + wider * (end - middle) for end in usual["ci95"]], rel=1e-9)
    assert row["p"] == pytest.approx(usual["p"], abs=0.01)
    assert sign_flip_p(np.array([3, 1, 1, -1])) == pytest.approx(0.5, abs=0.02)  # 8 of 16
    assert sign_flip_p(np.zeros(5)) == 1


def test_changes_are_paired_by_prompt_and_image(tmp_path):
    names = [("colors", f"a photo of {number} things") for number in range(40)]
    verdicts = dict(zip(names, (["1010"] * 20 + ["0000"] * 20), strict=True))
    better = {name: images.replace("00", "01") for name, images in reversed(verdicts.items())}
    files = [read_results(results(tmp_path / f"{n}.jsonl", v)) for n, v in (("base", verdicts), ("tuned", better))]
    rows = compared(*files)
    assert rows["colors"]["delta"] == pytest.approx(0.25)  # two images of each prompt of the second half
    assert rows["colors"]["verdict"] == rows[OVERALL]["verdict"] == "rose"
    del better[names[0]]  # and all later prompts move to another folder
    shorter = read_results(results(tmp_path / "shorter.jsonl", better))
    row = compared(files[0], shorter)["colors"]
    assert (row["prompts"], row["delta"]) == (39, pytest.approx(40 / 156))
    assert compared(shorter, files[0])["colors"]["verdict"] == "fell"


def drawn(rng, mean, count, change=0.0):
    """Prompts of beta-distributed difficulty with 4 images each: correct before, and after, (count,)."""
    chance = rng.beta(2 * mean, 2 * (1 - mean), count)
    lifted = np.clip(chance + change * rng.normal(1, 1, count) * chance * (1 - chance), 0, 1)
    return rng.binomial(4, chance), rng.binomial(4, lifted)


def test_intervals_cover_and_images_taken_for_independent_would_not(monkeypatch):
    monkeypatch.setattr(geneval_results, "sign_flip_p", lambda gains: 1.0)  # it takes the time, and has its own test
    rng, rounds, sizes = (
        np.random.default_rng(3),
        400,
        dict(zip((0.97, 0.65, 0.4, 0.1), (80, 99, 80, 100), strict=True)),
    )
    hits = dict.fromkeys(("task", "mean", "change", "naive"), 0)
    truth = {mean: np.subtract(*drawn(rng, mean, 400_000, 0.3)[::-1]).mean() / 4 for mean in sizes}
    for _ in range(rounds):
        rows, changes = {}, {}
        for mean, count in sizes.items():
            before, after = drawn(rng, mean, count, 0.3)
            rows[mean] = _score(np.stack([before, np.full(count, 4)], 1).astype(float))
            images = np.full(count, 4.0)
            changes[mean] = _change((after - before).astype(float), images)
        low, high = rows[0.4]["ci95"]
        hits["task"] += low <= 0.4 <= high
        low, high = wilson(rows[0.4]["score"], 320)
        hits["naive"] += low <= 0.4 <= high
        low, high = _mean_of(rows, "score")["ci95"]
        hits["mean"] += low <= np.mean(list(sizes)) <= high
        low, high = _mean_of(changes, "delta")["ci95"]
        hits["change"] += low <= np.mean(list(truth.values())) <= high
    assert all(0.92 <= hits[name] / rounds <= 0.98 for name in ("task", "mean", "change")), hits
    assert hits["naive"] / rounds < 0.88


def read(*words):
    cli.main(["geneval", "read", *map(str, words)])


def test_read_prints_tables_and_says_what_is_missing(metadata, tmp_path, capsys):
    verdicts = dict(zip([(row["tag"], row["prompt"]) for row in ROWS], ("1110", "1111", "0000", "0101"), strict=True))
    whole = results(tmp_path / "a long name of a base model.jsonl", verdicts)
    page, numbers = tmp_path / "table.md", tmp_path / "numbers.json"
    for _ in range(2):  # its own files are remade
        read(whole, "--metadata", metadata, "--published", "--out", numbers, "--markdown", page)
    said = capsys.readouterr()
    assert not said.err
    assert max(map(len, said.out.splitlines())) <= 80
    for wanted in ("published, not measured here", "55.20", "mean of 4 task scores", "No results of two objects"):
        assert wanted in said.out
        assert wanted in page.read_text()
    overall = json.loads(numbers.read_text())["systems"][whole.stem]["scores"][OVERALL]["score"]
    assert overall == pytest.approx((0.75 + 1 + 0 + 0.5) / 4)
    fewer = {name: images[: 4 - (name[0] == "colors")] for name, images in verdicts.items() if name[0] != "counting"}
    part = results(tmp_path / "part.jsonl", fewer)
    part.write_text(part.read_text() + part.read_text().splitlines()[0] + "\n")
    read(part, "--metadata", metadata, "--partial")
    said = capsys.readouterr()
    for wanted in ("missing prompts, of 4: 1 (a photo of one cat)", "fewer than 4 images, of 3: 1", "more than once"):
        assert wanted in said.err
        assert wanted in " ".join(said.out.split())
    assert "published" not in said.out


MISTAKES = {  # name: (lines of the results file, or None for the whole one; further words; what the sentence names)
    "no file": (None, ["nowhere.jsonl"], ["nowhere.jsonl", "cannot be read"]),
    "empty": ([], [], ["found no lines"]),
    "not json": (["{"], [], ["line 1", "not JSON"]),
    "a list": (["[1]"], [], ["line 1", "object"]),
    "another tag": (['{"tag": "colours"}'], [], ["colours", "color_attr"]),
    "no verdict": (['{"tag": "colors", "prompt": "a", "filename": "0", "correct": 1}'], [], ["correct 1", "true"]),
    "both": (
        [
            f'{{"tag": "colors", "prompt": "a", "filename": "00/samples/0.png", "correct": {c}}}'
            for c in ("true", "false")
        ],
        [],
        ["line 2", "both correct and not"],
    ),
    "incomplete": (None, [], ["553", "single_object 1 of 80", "00004, 00005", "--partial", "--metadata"]),
    "a prompt too many": (
        ['{"tag": "colors", "prompt": "a photo of a fox", "filename": "0", "correct": true}'],
        ["--metadata", "METADATA"],
        ["a photo of a fox", "--metadata"],
    ),
    "another's file": (None, ["--metadata", "METADATA", "--out", "METADATA"], ["--out", "exists already"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_results_that_are_not_right_are_refused(mistake, metadata, tmp_path, capsys):
    lines, more, named = MISTAKES[mistake]
    verdicts = dict.fromkeys([(row["tag"], row["prompt"]) for row in ROWS], "1111")
    path = results(tmp_path / "results.jsonl", verdicts)
    if lines is not None:
        path.write_text("\n".join(lines))
    with pytest.raises(SystemExit, match="2"):
        read(path, *[str(metadata) if word == "METADATA" else word for word in more])
    said = capsys.readouterr()
    assert not said.out
    assert len(said.err.splitlines()) == 1
    assert all(word in said.err for word in named), said.err


BROKEN = {  # what is wrong with the last row of the metadata, and what the sentence names
    "tag": ({"tag": "colour"}, "colour"),
    "prompt": ({"prompt": " "}, "sentence"),
    "twice": ({"prompt": ROWS[0]["prompt"]}, "second time"),
    "include": ({"include": []}, "include"),
    "count": ({"include": [{"class": "cat", "count": 0}]}, "count"),
    "color": ({"include": [CAT | {"color": 3}]}, "color"),
    "position": ({"include": [CAT | {"position": ["left of", 0]}, DOG]}, "position"),
    "relation": ({"include": [CAT, DOG | {"position": ["beside", 0]}]}, "position"),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_metadata_that_is_not_right_is_refused(mistake, metadata, tmp_path, capsys):
    change, named = BROKEN[mistake]
    jsonl(metadata, [*ROWS[:3], ROWS[3] | change])
    with pytest.raises(SystemExit, match="2"):
        cli.main(["geneval", "layout", "--metadata", str(metadata), "--images", "x", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert "metadata.jsonl: line 4" in said
    assert named in said


@pytest.mark.parametrize(
    "names, named",
    [
        ([], "no image 0 of prompt 0"),
        (["0_0", "1_0", "3_0"], "no image 0 of prompt 2 in"),
        (["0_0", "1_0", "2_0", "3_0", "3_1"], "no image 1 of prompt 0"),
        (["0_0", "1_0", "2_0", "3_0", "4_0"], "4_0.png"),
        (["0_0", "00_00"], "which is"),
        (["7"], "no two numbers"),
    ],
)
def test_images_that_do_not_fit_are_refused(names, named, metadata, tmp_path, capsys):
    folder = tmp_path / "images of mine"
    folder.mkdir()
    for name in names:
        (folder / f"{name}.png").write_bytes(b"")
    with pytest.raises(SystemExit, match="2"):
        cli.main(
            ["geneval", "layout", "--metadata", str(metadata), "--images", str(folder), "--out", str(tmp_path / "o")]
        )
    assert named in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
