"""What an installation of strop contains, how its doors start, and that it lives beside Hugging Face's `kernels`."""

import importlib.metadata
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SCRIPT = 'if __name__ == "__main__":'
DOORS = sorted(path.name for path in (ROOT / "engine").glob("*.py") if SCRIPT in path.read_text(encoding="utf-8"))


def python(*arguments: str, cwd: Path, first_on_path: Path | None = None) -> str:
    """What a Python of its own prints; it must end well."""
    paths = filter(None, [first_on_path and str(first_on_path), os.environ.get("PYTHONPATH")])
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_of_another_package_is_left_alone(tmp_path):
    """`import kernels` finds the package of that name on sys.path, `import strop.kernels` ours."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    names = "kernels", "strop.kernels", "strop.engine", "strop.bench.tinyworld"
    code = f"import importlib.util as u\nfor name in {names}: print(u.find_spec(name).origin)"
    found = python("-c", code, cwd=tmp_path, first_on_path=tmp_path).split()
    expected = [tmp_path / "kernels", ROOT / "kernels", ROOT / "engine", ROOT / "bench" / "tinyworld"]
    assert [Path(origin).resolve() for origin in found] == [(folder / "__init__.py").resolve() for folder in expected]


def test_installation_takes_one_top_level_name():
    assert importlib.metadata.distribution("strop").read_text("top_level.txt").split() == ["strop"]


@pytest.mark.parametrize("needed", ["torch", "triton", "transformers", "pydantic"])
def test_tested_version_is_within_the_declared_range(needed):
    declared = {r.name: r for r in map(Requirement, importlib.metadata.requires("strop"))}[needed]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1].isalnum()]
    pin = next(p for p in pins if p.name == needed and (p.marker is None or p.marker.evaluate()))
    assert declared.specifier.contains(str(pin.specifier).removeprefix("=="))


@pytest.mark.parametrize("arguments", [[str(ROOT / "engine/train.py")], ["-m", "strop.engine.train"]])
def test_trainer_starts_from_any_folder(tmp_path, arguments):
    assert "usage: train.py" in python(*arguments, "--help", cwd=tmp_path)


@pytest.mark.parametrize("door", DOORS)
def test_door_starts_as_a_file_of_the_repository(door):
    safe_path = ["-P"] if door == "train.py" and sys.version_info >= (3, 11) else []
    assert "usage: " in python(*safe_path, f"engine/{door}", "--help", cwd=ROOT)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built without network; from a copy, because setuptools leaves a build folder behind."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).exists():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "copy" / name).write_bytes((ROOT / name).read_bytes())
    pip = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    python(*pip, "--wheel-dir", str(folder), str(folder / "copy"), cwd=folder)
    with zipfile.ZipFile(next(folder.glob("strop-*.whl"))) as archive:
        archive.extractall(folder / "unzipped")
    return folder / "unzipped"


def test_wheel_holds_every_source_and_no_weights(wheel):
    copy = wheel.parent / "copy"
    sources = [path for part in ("engine", "kernels", "bench") for path in (copy / part).rglob("*.py")]
    others = "*/py.typed", "configs/*.yaml", "engine/study/page.*", "engine/evaluation/gallery.*"
    sources += [path for pattern in others for path in copy.glob(pattern)]
    inside = {str(path.relative_to(wheel / "strop")) for path in (wheel / "strop").rglob("*") if path.is_file()}
    assert inside == {str(path.relative_to(copy)) for path in sources}


@pytest.mark.slow
def test_wheel_runs_without_the_repository(wheel, tmp_path):
    """All that the trainer imports of strop comes from the wheel, though this environment knows the repository too."""
    code = """
import sys, strop.engine.train, strop.engine.training
print(*(m.__file__ for name, m in list(sys.modules.items()) if name.startswith("strop.")), sep="\\n")"""
    files = python("-c", code, cwd=tmp_path, first_on_path=wheel).splitlines()
    assert str(wheel / "strop/engine/methods/spo/rollout.py") in files
    assert [file for file in files if not Path(file).is_relative_to(wheel)] == []
    assert "usage: train.py" in python("-m", "strop.engine.train", "--help", cwd=tmp_path, first_on_path=wheel)
