"""report/ with null in place of any number, or without it: a report of what is left, never a traceback."""

import io
import json
import shutil

import pytest

from strop.engine.report.html import page
from strop.engine.report.model_card import model_card
from strop.engine.report.pictures import curves
from strop.engine.report.run_folder import read_run, said
from strop.engine.report.tables import closing_table
from strop.engine.runtime.progress import Progress


def nulled(tree, keep=("iteration",)):
    """A tree with null for every number."""
    if isinstance(tree, dict):
        return {key: value if key in keep else nulled(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [nulled(value) for value in tree]
    return tree if isinstance(tree, str) else None


def report(folder):
    run = read_run(folder)
    curves(run.records, run.columns, io.BytesIO(), run.judged_timesteps)
    assert "<html" in page(run)
    assert closing_table(run)
    assert said(run)
    if run.summary and not run.trains_judge:
        assert model_card(run)
    progress = Progress(9, run.columns, io.StringIO())
    for record in run.records:
        progress.show(record)


def write(folder, records=None, summary=None, heldout=None):
    for name, objects in (("metrics.jsonl", records), ("heldout.jsonl", heldout)):
        if objects:
            (folder / name).write_text("".join(json.dumps(each) + "\n" for each in objects))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture(params=["policy", "judge"])
def folder(request, training_run, judge_run, tmp_path):
    """A copy of a finished run, and its records, summary and held-out lines."""
    run = training_run if request.param == "policy" else judge_run
    copied = shutil.copytree(run.folder, tmp_path / "run")
    read = read_run(copied)
    return copied, read.records, read.summary, list(read.prompts)


def test_a_run_of_nulls_has_a_report(folder):
    path, records, summary, heldout = folder
    broken = [{**record, "nonfinite": list(record)} for record in nulled(records)]
    write(path, [*broken, *records, *({"iteration": n} for n in range(7, 40))], nulled(summary), nulled(heldout))
    report(path)


def test_of_an_unfinished_run_too(folder):
    path, records, *_ = folder
    (path / "summary.json").unlink()
    write(path, [record | {"nonfinite": list(record)} for record in nulled(records)])
    report(path)
