"""tinyworld's twin of GenEval: the detector on rendered truth, the rules on pictures, and lines that strop reads."""

import json

import pytest
import torch

from strop.bench.tinyworld import geneval, world
from strop.bench.tinyworld.detector import Found, detect
from strop.bench.tinyworld.render import render
from strop.engine.evaluation.geneval import read_metadata
from strop.engine.evaluation.geneval_results import OVERALL, read_results, scores


def picture(*captions, q=0.8, seed=1):
    scenes = [world.parse(text) for text in captions]
    return render(scenes, torch.full((len(scenes),), q), torch.Generator().manual_seed(seed))


def seen(scene):
    pairs = [(scene.shape_a, scene.colour_a), (scene.shape_b, scene.colour_b)]
    return sorted(pair for pair in pairs if pair[0])


def test_detector_finds_what_was_rendered():
    rng = torch.Generator().manual_seed(5)
    scenes, q = world.sample_scenes(200, rng), 1.2 * torch.rand(200, generator=rng)
    found = detect(render(scenes, q, rng))
    right = [
        sorted((one.shape, one.colour) for one in objects) == seen(s) for objects, s in zip(found, scenes, strict=True)
    ]
    assert sum(right) >= 0.97 * 200
    assert not any(detect(torch.full((1, 3, 64, 64), 0.3)))  # nothing is nothing


def asks(tag, text):
    return {"include": geneval.asked(world.parse(text), tag)}


PICTURE = "a red circle left of a blue square on a white background"


@pytest.mark.parametrize(
    "tag, text, reason",
    [
        ("single_object", "a green circle", ""),  # its colour is not asked for
        ("single_object", "a red cross", "expected cross>=1, found 0"),
        ("two_object", "a red square above a green circle", ""),
        ("two_object", "a red circle left of a blue cross", "expected cross>=1, found 0"),
        ("colors", "a red circle", ""),
        ("colors", "a blue circle", "expected blue circle>=1, found 0; and 1 red"),
        ("position", "a green circle left of a red square", ""),
        ("position", "a blue square left of a red circle", "expected square left of target, found right of target"),
        ("position", "a red circle above a blue square", "expected circle above target, found left of target"),
        ("position", "a red circle above a blue cross", "no target for circle to be above"),
        ("color_attr", "a blue square above a red circle", ""),
        ("color_attr", "a red square above a blue circle", "expected red square>=1, found 0; and 1 blue"),
    ],
)
def test_rules_on_a_picture(tag, text, reason):
    correct, reasons = geneval.judge(detect(picture(PICTURE))[0], asks(tag, text))
    assert correct == (not reason)
    assert reason in "\n".join(reasons)


def test_counts_look_at_the_best_and_exclude_forbids_more():
    objects = [Found("circle", colour, (0, 0, 9, 9), fit) for colour, fit in (("red", 0.9), ("blue", 0.8))]
    wanted = lambda **more: {"include": [{"class": "circle", **more}]}
    assert geneval.judge(objects, wanted(count=2))[0]
    assert geneval.judge(objects, wanted(count=1, color="red"))[0]
    assert not geneval.judge(objects, wanted(count=1, color="blue"))[0]  # the second one is not looked at
    assert not geneval.judge(objects, wanted(count=2, color="red"))[0]
    assert not geneval.judge(objects, wanted(count=3))[0]
    correct, reasons = geneval.judge(objects, wanted(count=1) | {"exclude": [{"class": "circle", "count": 2}]})
    assert (correct, reasons) == (False, ["expected circle<2, found 2"])


@pytest.mark.parametrize(
    "x, y, named",
    [
        (-30, 0, {"left of"}),
        (30, 0, {"right of"}),
        (0, -30, {"above"}),
        (20, 20, {"right of", "below"}),  # (20 - 2) / 28.3 = 0.64 on both axes
        (20, 12, {"right of"}),  # (12 - 2) / 23.3 = 0.43
        (4, 0, set()),  # (4 - 2) / 4 is 0.5 and not more
        (1, 1, set()),  # within a tenth of both sizes
        (0, 0, set()),
    ],
)
def test_position_by_hand(x, y, named):
    assert geneval.relations((20 + x, 20 + y, 30 + x, 30 + y), (20, 20, 30, 30)) == named


def test_prompts_are_the_worlds_and_results_are_read(tmp_path):
    rows = geneval.metadata(8)
    texts = [row["prompt"] for row in rows]
    assert rows == geneval.metadata(8)
    assert len(set(texts)) == 40
    assert not set(texts) & set(geneval.TRAINED.read_text().splitlines())
    (tmp_path / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    twice = [row for row in rows for _ in range(2)]
    images = picture(*(row["prompt"] for row in twice))
    red_squares = torch.tensor([row["tag"] == "colors" for row in twice])
    images[red_squares] = picture("a red square on a grey background")
    lines = geneval.results(images, twice, 2)
    (tmp_path / "base.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    file = read_results(tmp_path / "base.jsonl", read_metadata(tmp_path / "metadata.jsonl"))
    assert not file.faults
    found = {task: row["score"] for task, row in scores(file).items()}
    expected = sum("red square" in text for text in texts[16:24]) / 8
    assert found.pop("colors") == expected < 1
    assert found.pop(OVERALL) < 1
    assert all(score >= 0.87 for score in found.values()), found
    assert set(found) == set(geneval.TASKS) - {"colors"}


def test_examiner_reads_the_whole_caption():
    examine = geneval.load("cpu")
    two = "a red circle left of a blue circle"
    images = picture(PICTURE, two, "a small green cross on a black background")
    right = examine(images, [PICTURE, two, "a large green cross"])
    assert right["geneval"].tolist() == right["geneval_objects"].tolist() == [1, 1, 1]  # sizes are not looked at
    wrong = [PICTURE.replace("left of", "above"), "a blue circle left of a red circle", "a cyan cross"]
    scores = examine(images, wrong)
    assert scores["geneval"].tolist() == [0, 0, 0]
    assert scores["geneval_objects"].tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="zebra"):
        examine(images[:1], ["a zebra"])
