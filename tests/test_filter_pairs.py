"""strop filter-pairs: which pairs it keeps by known scores, how it goes on, and that data.only trains on these."""

import json
import re
import sys

import pytest
import torch
from PIL import Image

from strop.engine import cli, train_judge
from strop.engine.config.find import load
from strop.engine.config.judge_training import JudgeTrainingConfig
from strop.engine.data.pair_files import open_source
from strop.engine.data.pair_filter import PairFilter, Rule
from strop.engine.data.pair_sets import choose, split_by_caption
from strop.engine.errors import UserError
from strop.engine.runtime.ranks import Ranks
from strop.engine.runtime.session import Session
from strop.engine.scorers import find
from strop.engine.training import build

COLOURS = '''
SEEN = []

def load(device):
    """Scores of images of one colour: the levels of its red and green."""
    def score(images, prompts):
        SEEN.extend(prompts)
        levels = (images.mean((2, 3)) + 1) * 127.5
        return {"red": levels[:, 0], "green": levels[:, 1]}
    return score
'''
OPTIONS = ["--scorers", "colours:load", "--gap", "red=-50,green=0", "--tie-gap", "red=20,green=30", "--device", "cpu"]
PAIRS = [  # label; red and green of image 0 and image 1; the gaps; whether they are within the bounds
    (0, (90, 60), (40, 50), (50, 10), True),
    (0, (40, 60), (89, 50), (-49, 10), True),
    (0, (40, 60), (90, 50), (-50, 10), False),  # not more than -50
    (0, (90, 50), (40, 50), (50, 0), False),  # not more than 0
    (1, (90, 60), (40, 50), (-50, -10), False),
    (1, (40, 50), (90, 60), (50, 10), True),  # image 1 is the preferred one
    ((0.3, 0.7), (40, 50), (60, 53), (20, 3), True),
    ("tie", (40, 50), (59, 79), (-19, -29), True),
    ("tie", (59, 79), (40, 50), (19, 29), True),
    ("tie", (40, 50), (60, 50), (-20, 0), False),  # not less than 20
    ("tie", (40, 80), (40, 50), (0, 30), False),
    (1, (100, 200), (30, 150), (-70, -50), False),
]
COUNTS = {"decided": {"pairs": 8, "kept": 4}, "ties": {"pairs": 4, "kept": 2}, "broken": 0}
UNMET = {"red > -50": 3, "green > 0": 3, "|red| < 20": 1, "|green| < 30": 1}


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A .jsonl file of PAIRS, the images of two sizes; the scorer `colours:load` beside it."""
    (tmp_path / "colours.py").write_text(COLOURS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "colours", raising=False)
    monkeypatch.chdir(tmp_path)
    lines = []
    for i, (label, *colours, _, _) in enumerate(PAIRS):
        for side, colour in enumerate(colours):
            Image.new("RGB", (16 + 8 * (i % 2), 24), (*colour, 0)).save(tmp_path / f"{i}-{side}.png")
        labels = {"label_0": label[0], "label_1": label[1]} if isinstance(label, tuple) else {"label": label}
        lines.append({"image_0": f"{i}-0.png", "image_1": f"{i}-1.png", "caption": f"caption {i}"} | labels)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "pairs.jsonl"


def filtered(out, *options, source="pairs.jsonl"):
    """What the command leaves: head, {row: (gaps, kept)}, last line."""
    cli.main(["filter-pairs", source, str(out), *OPTIONS, *options])
    head, *entries, last = map(json.loads, out.read_text().splitlines())
    return head, {entry["row"]: (list(entry["gaps"].values()), entry["kept"]) for entry in entries}, last


def seen():
    """The prompts that have been scored since the last call."""
    prompts = list(sys.modules["colours"].SEEN)
    sys.modules["colours"].SEEN.clear()
    return prompts


@pytest.mark.parametrize("workers", ["0", "2"])
def test_pairs_are_kept_where_all_gaps_are_within_bounds(pairs, tmp_path, capsys, workers):
    head, entries, last = filtered(tmp_path / "new" / "out.jsonl", "--batch", "5", "--workers", workers)
    assert {key: head[key] for key in ("source", "pairs", "scorers")} == {
        "source": "pairs.jsonl",
        "pairs": 12,
        "scorers": ["colours:load"],
    }
    assert (head["gap"], head["tie_gap"]) == ({"red": -50, "green": 0}, {"red": 20, "green": 30})
    for row, (*_, gaps, kept) in enumerate(PAIRS):
        assert entries[row] == (pytest.approx(gaps, abs=1e-4), kept), row
    assert last == {"complete": True, **COUNTS, "unmet": UNMET}
    printed = capsys.readouterr().out
    assert "decided 4 of 8 (50.0%), ties 2 of 4 (50.0%), all 6 of 12 (50.0%)" in printed
    assert "3 do not have red > -50\n" in printed


@pytest.mark.parametrize("cut", ["within a line", "after a line", "before the last line"])
def test_a_file_that_was_cut_is_gone_on_with(pairs, tmp_path, cut):
    whole = tmp_path / "whole.jsonl"
    expected = filtered(whole)
    lines = whole.read_text().splitlines(keepends=True)
    left = {"within a line": lines[:6] + [lines[6][:9]], "after a line": lines[:6], "before the last line": lines[:-1]}
    (tmp_path / "cut.jsonl").write_text("".join(left[cut]))
    seen()
    assert filtered(tmp_path / "cut.jsonl") == expected
    missing = range(5, 12) if "a line" in cut else ()
    assert sorted(seen()) == sorted(f"caption {i}" for i in (*missing, *missing))
    assert (tmp_path / "cut.jsonl").read_text() == whole.read_text()


def test_another_rule_is_decided_from_the_same_scores(pairs, tmp_path):
    filtered(tmp_path / "out.jsonl")
    seen()
    other = ("--gap", "green=9", "--tie-gap", "red=100")
    found = filtered(tmp_path / "out.jsonl", *other)
    assert seen() == []
    assert found == filtered(tmp_path / "anew.jsonl", *other)
    assert {row for row, (_, kept) in found[1].items() if kept} == {0, 1, 2, 5, 7, 8, 9, 10}
    assert found[2]["ties"] == {"pairs": 4, "kept": 4}


def test_broken_pairs_are_named_up_to_the_share(pairs, tmp_path, capsys):
    (tmp_path / "3-1.png").write_bytes(b"no image")
    cli.main(["filter-pairs", "pairs.jsonl", "out.jsonl", *OPTIONS, "--max-broken", "0.1"])
    entries = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    why = "pairs.jsonl line 4: 3-1.png is no image (JPEG, PNG, WEBP, BMP)"
    assert [entry for entry in entries if entry.get("row") == 3] == [{"row": 3, "broken": why}]
    assert (entries[-1]["broken"], entries[-1]["decided"]["pairs"]) == (1, 7)
    assert f"1 broken ones, such as {why}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["filter-pairs", "pairs.jsonl", "other.jsonl", *OPTIONS, "--max-broken", "0.05"])
    assert "1 of 12 pairs are broken, which is more than --max-broken = 0.05" in capsys.readouterr().err


def test_a_scorer_of_strops_sees_the_images_as_they_are(tmp_path, pair_files, clip_folder):
    file = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(3))
    spec, bounds = f"clip_score={clip_folder}", ("--gap", "clip_score=0", "--tie-gap", "clip_score=3")
    cli.main(["filter-pairs", str(file), str(tmp_path / "out"), "--scorers", spec, *bounds, "--device", "cpu"])
    entries = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()[1:-1]]
    source, score = open_source(str(file), "data.source", True), find.load("clip_score", str(clip_folder))
    for row, entry in enumerate(entries):
        first, second = score(source.images(row), [source.captions[row]] * 2)["clip_score"].tolist()
        gap = first - second if source.labels[row] == (1, 0) else second - first
        assert entry["gaps"] == {"clip_score": pytest.approx(gap, abs=1e-4)}


SAME = lambda text: text
REFUSED = {  # what is changed before the command is typed again: a file and its text, options, words of the sentence
    "other pairs": (
        "pairs.jsonl",
        lambda text: text.replace("caption 3", "caption"),
        (),
        "OUT: .* pairs of pairs.jsonl",
    ),
    "other labels": ("pairs.jsonl", lambda text: text.replace('"label": 0', '"label": 1'), (), "OUT: .*another OUT"),
    "other scorers": (
        "out.jsonl",
        lambda text: text.replace("colours:load", "colours:other"),
        (),
        "OUT: .* scored by colours:other, found --scorers colours:load",
    ),
    "no filter": ("out.jsonl", lambda text: text.partition("\n")[2], (), r"OUT: out\.jsonl is no file of"),
    "no row": (
        "out.jsonl",
        lambda text: text.replace('"row": 4', '"row": 12'),
        (),
        "line 6: .*expected .*0 to 11",
    ),
    "no gap": ("out.jsonl", lambda text: text.replace('"green": -10.0', '"blue": 1'), (), "--gap: found green"),
    "a name": ("out.jsonl", SAME, ("--gap", "blue=1"), "--gap: found blue, .* red, green"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_of_something_else_is_refused_and_left(pairs, tmp_path, capsys, case):
    name, change, options, words = REFUSED[case]
    filtered(tmp_path / "out.jsonl")
    (tmp_path / name).write_text(change((tmp_path / name).read_text()))
    before = (tmp_path / "out.jsonl").read_bytes()
    with pytest.raises(SystemExit) as ended:
        cli.main(["filter-pairs", "pairs.jsonl", "out.jsonl", *OPTIONS, *options])
    error = capsys.readouterr().err
    assert (ended.value.code, error.count("\n")) == (2, 1)
    assert re.search(words, error), error
    assert (tmp_path / "out.jsonl").read_bytes() == before


def keep(out, spec, kept):
    """A file that keeps these rows of a source, and no other."""
    source = open_source(str(spec), "data.source", True)
    made = PairFilter(out, str(spec), source, ["a:b"], Rule({"a": 0}, {"a": 2}))
    made.add({"row": row, "gaps": {"a": 1 if row in kept else -3}} for row in range(len(source)))
    made.finish()
    return out


def judge_recipe(source, only, **data):
    data = {"source": str(source), "only": str(only), "heldout": 4} | data
    sections = {"model": {"path": "m"}, "judge": {"path": "j"}, "optim": {"steps": 99}, "run": {"dir": "r"}}
    return JudgeTrainingConfig.model_validate(sections | {"data": data})


ALONE = Ranks(0, 1, torch.device("cpu"))
KEPT = {0, 1, 2, 7, 8, 9, 15, 20, 21, 27}  # 7 and 15 are ties


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
@pytest.mark.parametrize("labels", ["given", "pickscore"])
def test_a_judge_is_trained_on_the_rows_that_are_kept(tmp_path, pair_files, form, labels):
    """A copy of the source in another folder is the same; what is held out is so without the filter."""
    rows = pair_files.rows(32)
    write = getattr(pair_files, form)
    first, copy = write(tmp_path / "pairs", rows), write(tmp_path / "copy", rows)
    source = open_source(str(copy), "data.source", True)
    train, heldout = choose(judge_recipe(copy, keep(tmp_path / "out", first, KEPT), labels=labels), ALONE)
    rest, held = split_by_caption(source.captions, 4, 42)
    assert heldout.rows == held
    assert train.rows == sorted(KEPT & set(rest))
    assert train.filtered == len(set(rest) - KEPT)


def test_pairs_held_out_elsewhere_are_not_filtered(tmp_path, pair_files):
    first = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(16))
    other = pair_files.jsonl(tmp_path / "other", pair_files.rows(8)[:3])  # whose captions rows 0 to 2 and 4 to 6 have
    recipe = judge_recipe(first, keep(tmp_path / "out", first, {0, 3, 9}), heldout_source=str(other))
    train, heldout = choose(recipe, ALONE)
    assert (heldout.rows, train.rows, train.filtered) == ([0, 1, 2], [3, 9], 8)
    assert train.source.left_out == 6


def test_a_run_of_decided_pairs_learns_from_those_that_are_kept(method_recipe, tmp_path, pair_files, capsys):
    file = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(32))
    only = keep(tmp_path / "out", file, KEPT)
    keys = (f"data.source={file}", f"data.only={only}", "data.train=null", "data.cache=null")
    path, *overrides = method_recipe("mapo", *keys)
    method = build(Session(load(path, overrides), ALONE)).method
    assert method.data.pairs.rows == sorted(KEPT - {7, 15})
    method.announce()
    assert "8 pairs, 4 ties and 0 other rows left out, 20 by data.only" in capsys.readouterr().out


def test_a_judges_run_says_what_was_filtered_and_goes_on_with_the_same_filter(recipe, tmp_path, pair_files, capsys):
    file = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(16))
    only = keep(tmp_path / "out", file, {0, 1, 2, 3, 7})
    data = (f"data.source={file}", f"data.only={only}", "data.train=null", "data.heldout=2", "data.cache=null")
    arguments = recipe(*data, "optim.steps=2", "optim.warmup=0", "optim.batch=20", "run.tracker=none", judge=True)
    train_judge.main(arguments)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["training_pairs"] + summary["filtered_pairs"] + summary["heldout_pairs"] == 16
    line = f"{summary['training_pairs']} training pairs, 2 held-out pairs, 0 rows left out"
    assert f"{line}, {summary['filtered_pairs']} by data.only\n" in capsys.readouterr().out
    keep(tmp_path / "other", file, {0, 1}).replace(only)
    with pytest.raises(SystemExit):
        train_judge.main([*arguments, "run.resume=true"])
    assert "data.only: " in capsys.readouterr().err


ONLY = {  # what is done to the file, keys of section data, words of the sentence
    "cut off": (lambda text: text[:-30], {}, "not complete: found 16 of 16"),
    "cut short": (lambda text: text[: len(text) // 2], {}, r"not complete: found \d of 16"),
    "lines lost": (lambda text: "".join(text.splitlines(keepends=True)[i] for i in (0, 1, 2, -1)), {}, "found 2 of 16"),
    "broken": (lambda text: text.replace('"row": 3,', '"row" 3,'), {}, "line 5 is not JSON"),
    "no decision": (lambda text: text.replace('"kept": true', '"kept": 1'), {}, "line 2: found"),
    "other": (lambda text: '{"caption": "a"}\n', {}, "no file of `strop filter-pairs`"),
    "other pairs": (lambda text: text.replace('"pairs": 16', '"pairs": 17'), {}, r"other pairs \(17, .* has \(16\)"),
    "other digest": (lambda text: text.replace('"digest": "', '"digest": "0'), {}, "is of other pairs"),
    "nothing": (lambda text: text.replace("true}\n", "false}\n", 16), {}, "keeps none of 12 pairs"),
    "nowhere": (SAME, {"only": "nowhere"}, "nowhere cannot be read"),
    "code": (SAME, {"source": "strop.bench.tinyworld.pairs:load", "train": 5}, "expected null .*code"),
}


@pytest.mark.parametrize("case", ONLY)
def test_data_only_takes_a_whole_file_of_the_same_pairs(tmp_path, pair_files, case):
    change, keys, words = ONLY[case]
    file = pair_files.jsonl(tmp_path / "pairs", pair_files.rows(16))
    only = keep(tmp_path / "out", file, {0, 1, 2})
    only.write_text(change(only.read_text()))
    with pytest.raises(UserError, match=rf"^data\.only: .*{words}"):
        choose(judge_recipe(**({"source": file, "only": only} | keys)), ALONE)
