"""What an installation of strop contains, and that it lives beside Hugging Face's package `kernels`."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_kernels_of_another_package_is_left_alone(tmp_path):
    """`import kernels` finds the package of that name on sys.path, `import strop.kernels` ours."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    names = "kernels", "strop.kernels", "strop.engine", "strop.bench.tinyworld"
    code = f"import importlib.util as u\nfor name in {names}: print(u.find_spec(name).origin)"
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    expected = [tmp_path / "kernels", ROOT / "kernels", ROOT / "engine", ROOT / "bench" / "tinyworld"]
    assert found.stdout.split() == [str(folder / "__init__.py") for folder in expected]


def test_installation_takes_one_top_level_name():
    assert importlib.metadata.distribution("strop").read_text("top_level.txt").split() == ["strop"]


@pytest.mark.parametrize("needed", ["torch", "triton", "transformers", "pydantic"])
def test_tested_version_is_within_the_declared_range(needed):
    declared = {r.name: r for r in map(Requirement, importlib.metadata.requires("strop"))}[needed]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalnum()]
    pin = next(p for p in pins if p.name == needed and (p.marker is None or p.marker.evaluate()))
    assert declared.specifier.contains(str(pin.specifier).removeprefix("=="))


@pytest.mark.slow
def test_wheel_holds_every_source_and_no_weights(tmp_path):
    """Built without network; a copy, because setuptools leaves a build folder behind."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "copy" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", str(tmp_path), str(tmp_path / "copy")], check=True)
    names = zipfile.ZipFile(next(tmp_path.glob("strop-*.whl"))).namelist()
    inside = {name.removeprefix("strop/") for name in names if ".dist-info/" not in name}
    copied = (tmp_path / "copy").rglob("*.py")
    sources = {str(path.relative_to(tmp_path / "copy")) for path in copied}
    assert inside == {name for name in sources if name.split("/")[0] in ("engine", "kernels", "bench")}
