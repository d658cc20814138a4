"""config/factory: entry points of the form module:factory, found or refused in one sentence."""

import pytest

from strop.engine.config.factory import resolve
from strop.engine.errors import UserError


@pytest.mark.parametrize(
    "spec, words",
    [
        ("strop.bench", "'strop.bench', expected module:factory"),
        ("strop.nowhere:load", "no module strop.nowhere"),
        ("math:nothing", "math .*nothing"),
        ("math:pi", "math:pi .*float"),
        ("needs_more:load", "needs_more .*not_there_at_all"),
        ("broken_pairs:load", "broken_pairs .*RuntimeError: no licence"),
    ],
)
def test_entry_points_that_are_none(tmp_path, monkeypatch, spec, words):
    (tmp_path / "needs_more.py").write_text("import not_there_at_all")
    (tmp_path / "broken_pairs.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=f"^evaluate.scorers: .*{words}"):
        resolve(spec, "evaluate.scorers")


def test_an_entry_point_is_what_it_names():
    assert resolve("math:hypot", "data.source")(3, 4) == 5
