"""`strop study analyse` and `pairs`: from the raters' files to numbers, and to pairs for a judge."""

import json
import random
import re

import numpy as np
import pytest
from PIL import Image

from strop.engine.data.pair_files import open_source
from strop.engine.study.analysis import TOO_FEW
from strop.engine.study.analysis import analyse as analyse_answers
from strop.engine.study.answers import read_answers
from strop.engine.study.balance import PAIR, REPEAT, SENTINEL
from strop.engine.study.key import Key
from strop.engine.user_study import main

NAMES = ("zebra", "quokka", "numbat")
RATERS = ("anna", "ben", "cleo", "dan", "eve")


@pytest.fixture(scope="module")
def study(new_study, hand_in, tmp_path_factory):
    """(folder, key, files) of five raters and two systems: zebra wins general preference with 0.6, ties 0.2."""
    folder = tmp_path_factory.mktemp("study")
    key = new_study(folder, NAMES[:2], 60, "--raters", *RATERS, "--seed", 11, "--repeats", 0.1)
    draws = random.Random(0)

    def answer(item, question):
        number = draws.random()
        win = {"general": 0.6, "appeal": 0.4, "alignment": 0.1}[question]
        side = "right" if number < win else "tie" if number < win + 0.2 else "left"
        return side if item.left == 1 or side == "tie" else {"left": "right", "right": "left"}[side]

    return folder, key, [hand_in(folder / f"{rater}.json", key, rater, answer) for rater in RATERS]


def by_hand(key, files, question):
    """Counts (zebra, tie, quokka) and (left, decided, same, repeats), from the files alone."""
    outcomes, left, same = [0, 0, 0], [0, 0], [0, 0]
    for file in files:
        content = json.loads(file.read_text())
        given = {answer["id"]: answer["answers"][question] for answer in content["answers"]}
        for token, item in key.items[content["rater"]].items():
            if item.kind == SENTINEL:
                continue
            left[0] += given[token] == "left"
            left[1] += given[token] != "tie"
            if item.kind == PAIR:
                outcomes[{"left": 2 * item.left, "tie": 1, "right": 2 * item.right}[given[token]]] += 1
            if item.kind == REPEAT:
                mirrored = {"left": "right", "tie": "tie", "right": "left"}[given[item.of]]
                same = [same[0] + (given[token] == mirrored), same[1] + 1]
    return outcomes, [*left, *same]


def test_counts_rates_and_care(study):
    _, key, files = study
    result = analyse_answers(key, read_answers(key, files))
    for question, truth in (("general", 0.7), ("appeal", 0.5), ("alignment", 0.2)):
        row = result["pairs"][0]["questions"][question]
        outcomes, (left, decided, same, repeats) = by_hand(key, files, question)
        assert [row["win"], row["tie"], row["lose"]] == outcomes
        assert row["rate"] == pytest.approx((outcomes[0] + outcomes[1] / 2) / 300)
        assert row["ci95"][0] < truth < row["ci95"][1]
        assert row["ci95_decided"][0] < row["rate_decided"] < row["ci95_decided"][1]
        care = result["all_raters"]
        assert (care["left"][question]["left"], care["left"][question]["of"]) == (left, decided)
        assert care["consistency"][question] == {"same": same, "of": repeats}
        assert repeats == 30
    verdicts = [row["verdict"] for row in result["pairs"][0]["questions"].values()]
    assert verdicts == ["zebra is preferred", "no preference shown", "quokka is preferred"]
    assert result["all_raters"]["sentinels"] == {"passed": 15, "of": 15}
    assert result["strengths"] is None


def test_careless_raters_show(study, hand_in, tmp_path):
    _, key, files = study
    content = json.loads(files[0].read_text())
    for place, answer in enumerate(content["answers"]):
        item = key.items["anna"][answer["id"]]
        answer["ms"] = 1999 if place < 20 else 2000
        answer["answers"] = dict.fromkeys(key.questions, "tie" if item.kind == SENTINEL else "left")
    (tmp_path / "anna.json").write_text(json.dumps(content))
    anna = analyse_answers(key, read_answers(key, [tmp_path / "anna.json", *files[1:]]))["raters"]["anna"]
    assert anna["sentinels"] == {"passed": 0, "of": 3}
    assert anna["too_fast"] == {"count": 20, "limit_seconds": 2.0}
    assert anna["consistency"]["general"] == {"same": 0, "of": 6}
    assert anna["left"]["general"]["rate"] == 1
    assert anna["left"]["general"]["p"] < 1e-15


def test_one_rater_has_wilsons_interval_and_few_answers_say_nothing(study, tmp_path):
    _, key, files = study
    alone = analyse_answers(key, read_answers(key, files[:1]))
    assert alone["interval"] == "Wilson"
    assert set(alone["alpha"].values()) == {None}
    content = json.loads(files[0].read_text())
    content["answers"] = content["answers"][:20]
    (tmp_path / "early.json").write_text(json.dumps(content))
    early = analyse_answers(key, read_answers(key, [tmp_path / "early.json"]))
    row = early["pairs"][0]["questions"]["general"]
    assert (row["verdict"], row["ci95"], row["p_holm"]) == (TOO_FEW, None, None)
    assert early["raters"]["anna"]["answered"] == 20


def test_three_systems_on_one_scale(new_study, hand_in, tmp_path, capsys):
    key = new_study(tmp_path, NAMES, 40, "--raters", *RATERS, "--seed", 4)
    draws, truth, nu = random.Random(1), np.array([0.8, 0.0, -0.8]), 0.5

    def answer(item, _):
        p, q = np.exp(truth[[item.left, item.right]])
        return draws.choices(("left", "right", "tie"), (p, q, nu * (p * q) ** 0.5))[0]

    files = [str(hand_in(tmp_path / f"{rater}.json", key, rater, answer)) for rater in RATERS]
    place = tmp_path / "study"
    capsys.readouterr()
    main(["analyse", str(place / "key.json"), *files, "--markdown", str(tmp_path / "table.md")])
    printed = capsys.readouterr().out
    assert max(map(len, printed.partition("all numbers")[0].splitlines())) <= 80
    result = json.loads((place / "analysis.json").read_text())
    for strengths in result["strengths"].values():
        for name, true in zip(NAMES, truth, strict=True):
            low, high = strengths["systems"][name]["ci95"]
            assert low < true < high
        assert strengths["nu"] == pytest.approx(nu, rel=0.3)
    table = (tmp_path / "table.md").read_text()
    assert len(re.findall(r"^\| ---", table, re.MULTILINE)) == 8  # 3 pairs, 3 scales, raters, questions
    main(["analyse", str(place / "key.json"), *files, "--markdown", str(tmp_path / "table.md")])  # again


def changed(**changes):
    return lambda content: content | changes


def with_answer(**changes):
    return lambda content: content | {"answers": [content["answers"][0] | changes, *content["answers"][1:]]}


MISTAKES = {
    "another study": (changed(manifest="0" * 64), "another study", "000000000000"),
    "unknown rater": (changed(rater="zoe"), "'zoe'", "anna, ben"),
    "another's answers": (changed(rater="ben"), "ben was not shown"),
    "no answers": (changed(answers=None), "no list of answers"),
    "no format": (changed(format="x"), "strop-study-answers/1"),
    "unknown pair": (with_answer(id="x"), "answer 1", "'x'"),
    "no side": (with_answer(answers={"general": "up", "appeal": "tie", "alignment": "tie"}), "answer 1", "'up'"),
    "a question is missing": (with_answer(answers={"general": "left"}), "answer 1", "alignment"),
    "no time": (with_answer(ms=None), "answer 1", "None"),
    "twice": (lambda content: content | {"answers": content["answers"] * 2}, "several answers"),
    "a list": (lambda content: [content], "list"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_file_that_is_not_right_is_refused_by_name(mistake, study, tmp_path, capsys):
    folder, _, files = study
    change, *words = MISTAKES[mistake]
    (tmp_path / "odd.json").write_text(json.dumps(change(json.loads(files[0].read_text()))))
    out = ["--out", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit) as stopped:
        main(["analyse", str(folder / "study" / "key.json"), str(tmp_path / "odd.json"), *out])
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2
    assert [word for word in ("odd.json", *words) if word not in sentence] == []
    assert sentence.count("\n") == 1
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    "line, words",
    [
        ("{key} {anna} {anna}", ("anna.json", "'anna'")),
        ("{key} {images}", ("images", "cannot be read")),
        ("{key} {text}", ("text.txt", "cannot be read as JSON")),
        ("{anna} {anna}", ("anna.json", "no key")),
        ("{key} {anna} --out {anna}", ("anna.json", "exists already")),
        ("{key} {anna} --markdown {text}", ("text.txt", "exists already")),
    ],
)
def test_a_mistake_in_the_command(line, words, study, capsys):
    folder, _, _ = study
    (folder / "text.txt").write_text("text")
    places = {"key": folder / "study" / "key.json", "anna": folder / "anna.json", "text": folder / "text.txt"}
    with pytest.raises(SystemExit) as stopped:
        main(["analyse", *line.format(**places, images=folder / "study" / "page" / "images").split()])
    sentence = capsys.readouterr().err
    assert stopped.value.code == 2
    assert [word for word in words if word not in sentence] == []


def test_answers_become_pairs_that_a_judge_is_trained_from(study, capsys):
    folder, key, files = study
    out = folder / "pairs" / "alignment.jsonl"
    arguments = ["pairs", str(folder / "study" / "key.json"), *map(str, files), "--out", str(out)]
    main([*arguments, "--question", "alignment"])
    source = open_source(str(out), "data.source", labelled=True)
    assert (len(source), source.broken) == (300, [])
    zebra, tie, quokka = by_hand(key, files, "alignment")[0]
    assert source.labels.count((0.5, 0.5)) == tie
    votes = {"zebra": 0, "quokka": 0}
    for row in range(300):
        number = int(re.search(r"\d+", source.captions[row])[0])
        for image, label in zip(source.images(row), source.labels[row], strict=True):
            name = next(n for n in votes if Image.open(folder / n / f"{number}.png").tobytes() == image.tobytes())
            votes[name] += label == 1
    assert votes == {"zebra": zebra, "quokka": quokka}
    with pytest.raises(SystemExit):
        main(arguments)
    assert "nothing is overwritten" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments[:-1], str(folder / "new.jsonl"), "--question", "taste"])
    assert "'taste'" in capsys.readouterr().err


def test_a_key_is_read_as_it_was_written(study, tmp_path):
    _, key, _ = study
    key.write(tmp_path / "key.json")
    assert Key.read(tmp_path / "key.json") == key
