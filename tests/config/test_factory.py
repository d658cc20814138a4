"""config/factory: entry points of the form module:factory, found or refused in one sentence."""

import pytest

from strop.engine.config.factory import resolve
from strop.engine.errors import UserError


@pytest.mark.parametrize(
    "spec, complaint",
    [
        ("strop.bench", "found 'strop.bench', expected module:factory"),
        ("strop.nowhere:load", "no module strop.nowhere"),
        ("math:nothing", "math has no attribute nothing"),
        ("math:pi", "math:pi is a float"),
    ],
)
def test_entry_points_that_are_none(spec, complaint):
    with pytest.raises(UserError, match=f"^evaluate.examiner: {complaint}"):
        resolve(spec, "evaluate.examiner")


def test_entry_points_find_what_they_name(tmp_path, monkeypatch):
    assert resolve("math:hypot", "data.source")(3, 4) == 5
    (tmp_path / "needs_more.py").write_text("import not_there_at_all")
    (tmp_path / "broken_pairs.py").write_text("raise RuntimeError('no licence')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="module needs_more needs not_there_at_all, which is not installed"):
        resolve("needs_more:load", "data.source")
    with pytest.raises(UserError, match=r"module broken_pairs does not import \(RuntimeError: no licence\)"):
        resolve("broken_pairs:load", "data.source")
