"""kernels/README.md: every example runs, and every public name has its place."""

import re
from pathlib import Path

import pytest

import strop.kernels

README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda text: re.search(r"kernels import (.*)", text)[1])
def test_example_runs(example):
    exec(compile(example, "kernels/README.md", "exec"), {})


def test_every_function_has_an_example():
    shown = set(re.findall(r"\w+", " ".join(re.findall(r"kernels import (.*)", "".join(EXAMPLES)))))
    assert shown == set(strop.kernels.__all__) - {"use_reference"}  # which the text explains
    assert "use_reference(True)" in README
