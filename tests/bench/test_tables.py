"""bench/tinyworld/tables: rows, cells, the search's rule, differences and the page; all runs here are made up."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from PIL import Image

from strop.bench.tinyworld.geneval import TASKS
from strop.bench.tinyworld.runs import ROOT
from strop.bench.tinyworld.tables import __main__ as tables
from strop.bench.tinyworld.tables import cells, page, plots, search
from strop.bench.tinyworld.tables.claims import claims, verdict
from strop.bench.tinyworld.tables.examination import SCORES, Examination
from strop.bench.tinyworld.tables.results import GENEVAL, Difference, Results
from strop.bench.tinyworld.tables.rows import ABLATED, DEFAULT, ITERATIONS, METHODS, TFLOP
from strop.engine.config.find import load
from strop.engine.config.settings import differences, dump
from strop.engine.errors import UserError

WINNER = next(row for row in ABLATED if row.name == "next_winner")
K8 = next(row for row in ABLATED if row.name == "k8")


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def study(tmp_path):
    return cells.Study(tmp_path / "cells", tmp_path / "runs", prompts=3, inner=2)


def made_up(scores, ends=(0.55, 0.6)):
    """A cell whose scores are all alike; its curve has two points of the first two prompts."""
    curve = [{"iteration": done, **dict.fromkeys(SCORES, end)} for done, end in zip((7, 14), ends, strict=True)]
    return {"scores": dict.fromkeys(SCORES, scores), "curve": curve, GENEVAL: dict.fromkeys(TASKS, scores)}


@pytest.fixture
def results():
    base = made_up([0.5, 0.4, 0.3])
    found = {
        "spo": {42: made_up([0.7, 0.7, 0.4]), 43: made_up([0.9, 0.5, 0.4])},
        "next_winner": {42: made_up([0.6, 0.6, 0.3])},
    }
    return Results(base, found)


def trained(fail, recipe, changes, run, script="train.py"):
    """Stands in for a training: its folder has what the measurement looks for."""
    assert not fail
    config = load(recipe, [*changes, f"run.dir={run}"])
    every = config.run.save_every
    for done in {*range(every, config.run.iterations, every), config.run.iterations}:
        (run / "checkpoints" / f"{done:06d}").mkdir(parents=True)
    dump(config, run / "config.yaml")
    (run / "metrics.jsonl").write_text(json.dumps({"optimizer_steps": 31}) + "\n")
    return run


def examination(lora, count=None):
    """Quality and the rest are a hundredth of the iterations."""
    done = int(lora.name) if lora else 0
    return {name: torch.full((count or 3,), done / 100) for name in SCORES}


@pytest.fixture
def made(study, monkeypatch):
    """make(row, seed=42) -> the file of a cell."""
    monkeypatch.setattr(cells, "train", partial(trained, False))
    monkeypatch.setattr(cells, "answers", lambda lora, *_: {task: [0.5] for task in TASKS})
    return lambda row, seed=42: cells.make(row, seed, study, partial(cells.along, lambda: examination, study))


def test_a_row_changes_what_it_says_and_spends_the_budget():
    assert DEFAULT.share == 1
    for row in ABLATED:
        changed = differences(load(row.recipe, ["run.dir=x"]), load(row.recipe, ["run.dir=x", *row.changes]))
        assert sorted(line.split(":")[0] for line in changed) == sorted(key.split("=")[0] for key in row.changes)
    for row in (*METHODS, *ABLATED):
        assert row.iterations == 0 or row.share == pytest.approx(1, abs=0.06), row.name


@pytest.mark.parametrize("row, points", [(DEFAULT, [4, 8, 12, 14]), (K8, [2, 4, 6, 8])], ids=["14", "8"])
def test_a_cell_holds_a_curve_and_the_scores_of_its_end(made, study, row, points):
    file = made(row)
    cell = cells.read(row, 42, study)
    assert file == study.cells / f"{row.name}-42.json"
    assert [point["iteration"] for point in cell["curve"]] == points
    assert [point["prompts"] for point in cell["curve"]] == [2, 2, 2, 3]
    assert cell["curve"][0]["quality"] == points[0] / 100
    assert cell["scores"]["judge"] == [points[-1] / 100] * 3
    assert cell["tflop"] == pytest.approx(points[-1] * row.tflop, rel=1e-3)
    assert (GENEVAL in cell) == row.geneval
    assert not (study.runs / f"{row.name}-42" / "checkpoints").exists()


def test_what_is_finished_is_not_run_again(made, study, monkeypatch):
    made(WINNER)
    once = replace(study, searched=False)
    monkeypatch.setattr(tables, "Examination", lambda _: examination)
    ran = []
    monkeypatch.setattr(cells, "make", lambda row, seed, *_: ran.append((row.name, seed)) or study.file(row, seed))
    tables.make_cells([WINNER, K8], (42, 43), once, jobs=1)
    assert ran == [("k8", 42), ("next_winner", 43), ("k8", 43)]
    assert json.loads((study.cells / "base.json").read_text())["scores"]["quality"] == [0, 0, 0]


CHANGED = {
    "a key": (replace(WINNER, changes=("rollout.next_state=loser",)), "rollout.next_state.*winner.*loser"),
    "the length": (replace(WINNER, iterations=16), "run.iterations=15.*16"),
    "the recipe": (replace(WINNER, recipe="configs/tinyworld_fast.yaml"), r"tinyworld\.yaml.*tinyworld_fast\.yaml"),
}


@pytest.mark.parametrize("row, names", CHANGED.values(), ids=CHANGED)
def test_a_cell_of_another_definition_is_refused(made, study, row, names):
    made(WINNER)
    with pytest.raises(UserError, match=f"next_winner-42.json.*{names}"):
        cells.read(row, 42, study)


def test_a_broken_cell_is_refused_and_a_new_key_of_the_engine_is_not(made, study):
    file = made(WINNER)
    cell = json.loads(file.read_text())
    del cell["settings"]["rollout.eta"]
    cell["settings"]["rollout.former"] = 1
    file.write_text(cells.written(cell))
    assert cells.read(WINNER, 42, study) == cell
    file.write_text("[]")
    with pytest.raises(UserError, match=r"next_winner-42\.json"):
        cells.read(WINNER, 42, study)


LOW, MIDDLE, HIGH = [1.0, 1.0, 1.0, 1.0], [1.0, 1.2, 1.4, 1.0], [1.0, 1.0, 0.9, 1.8]
SEARCHES = {  # scores of one, three and nine times a rate; the one that the rule takes
    "the best": ((LOW, [2.0, 2.1, 2.0, 2.2], MIDDLE), 1.0),
    "the largest": ((LOW, MIDDLE, [3.0, 3.1, 3.2, 3.0]), 3.0),
    "within an error": ((LOW, MIDDLE, HIGH), 0.1),  # HIGH leads LOW by 0.175 +- 0.21, MIDDLE by 0.025
    "beyond an error": ((LOW, [1.5, 1.4, 1.6, 1.5], [1.5, 1.7, 1.3, 1.6]), 1.0),
    "all alike": ((LOW, LOW, LOW), 0.1),
}


@pytest.mark.parametrize("scores, taken", SEARCHES.values(), ids=SEARCHES)
def test_the_search_takes_the_best_rate_or_a_smaller_one_within_its_error(scores, taken):
    assert search.chosen(dict(zip((0.1, 1.0, 3.0), scores, strict=True))) == taken


def test_the_search_uses_prompts_of_its_own_and_goes_on_while_it_gains(made, study):
    full = cells.Study(study.cells, study.runs)
    assert not set(search.prompts()) & set(cells.heldout(full))
    assert len(set(search.prompts())) == search.PROMPTS
    assert search.rates(DEFAULT) == [5e-4, 1.5e-3, 4.5e-3]
    assert searched(study, {"lr0.0015": 1.0}) == ["spo-42", "spo-lr0.0015-42", "spo-lr0.0045-42"]
    assert search.tuned(DEFAULT, study) == DEFAULT.with_rate(1.5e-3)
    cell = cells.read(DEFAULT, 42, study)
    assert (cell["iterations"], cell["settings"]["optim.lr"], cell["search"]) == (14, 5e-4, [0.5, 0.5, 0.5])
    assert len(cell["curve"]) == 4  # the tables' own cell, too
    assert searched(study, {}) == []


def test_the_search_ends_where_a_larger_rate_loses(made, study):
    made(DEFAULT)  # without the scores of the search
    assert searched(study, {"lr0.0015": 0.0}) == ["spo-42", "spo-lr0.0015-42"]
    assert search.tuned(DEFAULT, study) == DEFAULT


def searched(study, scores):
    """Runs the search to its end, with these scores by rate, 0.5 by default; returns what was run."""
    at = lambda lora: next((score for rate, score in scores.items() if rate in str(lora)), 0.5)
    best = lambda lora, count=None: {"pickscore": torch.full((3,), at(lora))}
    measure, ran = partial(cells.along, lambda: examination, study), []
    while tasks := list(tables.search_tasks([DEFAULT], measure, lambda: best, study)):
        assert search.tuned(DEFAULT, study) is None
        ran += [task().stem for task in tasks]
    return ran


def test_differences_are_paired_by_prompt_and_averaged_over_seeds(results):
    gain = results.gain(DEFAULT, "quality")
    assert gain.seeds == pytest.approx((0.2, 0.2))
    assert gain.mean == pytest.approx(0.2)  # of 0.3, 0.2 and 0.1
    assert gain.interval is None  # of three prompts nobody can tell
    assert results.gain(WINNER, "judge").seeds == pytest.approx((0.1,))
    assert results.against(WINNER, DEFAULT, "quality").seeds == pytest.approx((-0.1,))  # of the seed that both have
    assert results.gain(DEFAULT, GENEVAL, "position").mean == pytest.approx(0.2)
    assert results.gain(K8, "quality") is None
    assert results.against(DEFAULT, K8, "quality") is None


def test_an_interval_is_that_of_the_prompts_means():
    base, tuned = [0.0] * 10, [[0.1, 0.3] * 5, [0.3, 0.5] * 5]
    many = Results(made_up(base), {"spo": {42: made_up(tuned[0]), 43: made_up(tuned[1])}})
    gain = many.gain(DEFAULT, "pickscore")
    half = 2.262157 * 0.1 * (10 / 9) ** 0.5 / 10**0.5  # Student's t of nine degrees, of 0.2 and 0.4 in turn
    assert gain.interval == pytest.approx((0.3 - half, 0.3 + half), abs=1e-6)
    assert gain.sure == 1


@pytest.mark.parametrize(
    "interval, seeds, sure",
    [((0.1, 0.3), (0.2, 0.1), 1), ((-0.3, -0.1), (-0.2,), -1), ((0.1, 0.3), (0.5, -0.1), 0), (None, (0.2,), 0)],
    ids=["rises", "falls", "seeds differ", "no interval"],
)
def test_an_order_is_shown_where_prompts_and_seeds_agree(interval, seeds, sure):
    found = Difference(0.2, interval, seeds)
    assert found.sure == sure
    assert ("opposite" in verdict(found)) == (sure == -1)


def test_a_curve_goes_from_the_base_through_gains_on_the_same_prompts(results):
    curves = results.curves(DEFAULT, "quality", 2)
    share = 7 * TFLOP / (ITERATIONS * TFLOP)
    assert [len(curve) for curve in curves] == [3, 3]
    assert curves[0][1] == pytest.approx((share, 0.55 - 0.45))
    assert curves[0][2] == pytest.approx((1, 0.7 - 0.45))  # of the cell's first two prompts, not of all


def test_the_page_shows_what_is_there_and_says_what_is_missing(results, study, tmp_path):
    text = page.write(results, study, tmp_path / "tables.md")
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("|")]
    winner = next(row for row in rows if row[1] == "the winner")
    assert winner[0] == "| next state (random)"
    assert winner[4:9] == [
        "+0.100 (one seed)",
        "+0.100 (one seed)",
        "+0.10 (one seed)",
        "+0.10 (one seed)",
        "-0.100 (one seed)",
    ]
    eight = next(row for row in rows if row[1] == "8" and row[2] == "8")
    assert set(eight[4:9]) == {page.MISSING}
    spo = next(row for row in rows if row[0] == "| SPO")
    assert "not yet searched" in spo[1]
    assert spo[2:4] == ["14", "1.00"]
    assert spo[4] == "+0.200 (+0.200 +0.200)"
    gradspo = next(row for row in rows if row[0] == "| GradSPO")
    assert set(gradspo[4:8]) == {page.MISSING}


def test_the_papers_orders_are_those_that_it_reports():
    texts = [claim.text for claim in claims(METHODS)]
    assert "SD-1.5: SPO above DDPO, 21.43 and 21.06" in texts
    assert "SDXL: Diffusion-DPO above MaPO, 22.64 and 22.11" in texts
    assert "next state (random) above the winner, 21.43 and 17.87" in texts
    assert not any("GradSPO" in text for text in texts)


def test_the_plots_are_drawn(results, tmp_path):
    plots.curves(results, METHODS, 2, tmp_path / "curves.png")
    plots.ablations(results, tmp_path / "ablations.png")
    for name in ("curves", "ablations"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_a_prompts_scores_do_not_depend_on_how_many_are_measured():
    two = Examination(cells.HELDOUT.read_text().splitlines()[:2])
    both, first = two(None), two(None, 1)
    for name in SCORES:
        assert torch.allclose(both[name][:1], first[name], atol=1e-3), name
    assert both["quality"][0] != both["quality"][1]


def test_the_base_is_asked_for_before_a_page_is_written(study):
    with pytest.raises(UserError, match=r"base\.json.*--page"):
        tables.page_of(study, study.runs / "tables.md", (42,))


@pytest.mark.parametrize("jobs", ["0", "-1"])
def test_no_runs_at_once_are_refused(jobs):
    with pytest.raises(UserError, match=f"--jobs.*{jobs}"):
        tables.arguments(["--jobs", jobs])


def test_the_page_is_that_of_the_cells():
    study, target, seeds, _ = tables.plan(tables.arguments([]))
    assert tables.page_of(study, target, seeds)[1] == target.read_text(), "write it anew with --page"
