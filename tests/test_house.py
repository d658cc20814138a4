"""The walls of the house: who may import whom, and what no source file may hold.

Each wall is a function that yields its complaints about one source. TRIALS gives for each a snippet that it must stop
beside one that it must let pass, so that no wall is a test that cannot fail. Sources are read here, never run.
"""

import ast
import functools
import graphlib
import importlib.machinery
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PARTS = ("engine", "kernels", "bench", "tests")
EVERYWHERE, LIBRARY, SHIPPED = r".*", r"(engine|kernels)/.*", r"(engine|kernels|bench)/.*"
HOT = r"(engine/(methods|schedules|speed)|kernels)/.*|engine/models/(policy|guided_unet)\.py"

# The floors from bottom to top, each with the libraries that it may import besides the standard one. Those
# named as a file at the top of engine/ are that file; what has no floor of its own there is a door, above all others.
FLOORS = {
    "kernels": {"torch", "triton"},
    "errors": set(),
    "user_files": set(),
    "rows": {"torch"},
    "config": {"pydantic", "yaml"},
    "schedules": {"torch"},
    "speed": {"diffusers", "peft", "torch"},
    "runtime": {"deepspeed", "psutil", "pynvml", "safetensors", "torch", "wandb"},
    "models": {"diffusers", "huggingface_hub", "peft", "safetensors", "torch", "transformers"},
    "judge": {"diffusers", "safetensors", "torch", "transformers"},
    "data": {"PIL", "numpy", "pyarrow", "safetensors", "torch"},
    "scorers": {"PIL", "ftfy", "numpy", "torch", "transformers"},
    "methods": {"torch"},
    "evaluation": {"PIL", "numpy", "scipy", "torch", "tqdm"},
    "report": {"PIL", "matplotlib", "numpy", "torch", "yaml"},
    "study": {"PIL", "numpy"},
    "plan": {"diffusers", "torch", "transformers"},
    "doors": {"safetensors", "torch"},
}
ORDER = [*FLOORS, "bench", "tests"]
TOP_NAMES = {path.stem for path in (ROOT / "engine").iterdir() if path.suffix in ("", ".py") and path.stem[:1] != "_"}
DRAWS = r"(rand|randn|randint)(_like)?|randperm|multinomial|poisson|(normal|uniform|random|bernoulli|exponential)_?"
SYNCS = {"item", "cpu", "tolist", "numpy", "empty_cache", "synchronize"}
FORMER_WORDS = {"win_lose", "sample_0", "sample_1", "extra_info"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@functools.lru_cache
def walk(text: str) -> list[ast.AST]:
    """Every node of a source, the module itself first."""
    return list(ast.walk(ast.parse(text)))


class Source(NamedTuple):
    path: str
    text: str

    @property
    def names(self) -> tuple[str, ...]:
        """What stands after `strop` where it is imported: ("engine", "models", "policy")."""
        names = Path(self.path).with_suffix("").parts
        return names[:-1] if names[-1] == "__init__" else names

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in walk(self.text) if isinstance(node, kinds))

    def calls(self, outside: Callable[[ast.AST], bool]) -> Iterator[ast.Call]:
        """All calls but those within a function or `with` block for which `outside` holds."""
        blocks = [node for node in self.nodes(ast.With, *FUNCTIONS) if outside(node)]
        within = {id(node) for block in blocks for node in ast.walk(block)}
        return (call for call in self.nodes(ast.Call) if id(call) not in within)


FILES = [path for part in PARTS for path in sorted((ROOT / part).rglob("*.py"))]
SOURCES = [Source(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")) for path in FILES]


def dotted(node: ast.AST) -> str:
    """`torch.cuda.synchronize` of the expression that says so; the last name alone where it hangs on something else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def imports(source: Source) -> Iterator[tuple[ast.AST, str]]:
    """(statement, full name) of every import, those inside functions too, those for type checkers only left out."""
    checks = [node for node in source.nodes(ast.If) if dotted(node.test).endswith("TYPE_CHECKING")]
    typing_only = {id(node) for check in checks for node in ast.walk(check)}
    for node in source.nodes(ast.Import, ast.ImportFrom):
        module = [getattr(node, "module", None)]
        if level := getattr(node, "level", 0):
            folder = ["strop", *Path(source.path).parent.parts]
            module = folder[: len(folder) - level + 1] + module
        if id(node) not in typing_only:
            yield from ((node, ".".join(filter(None, [*module, alias.name]))) for alias in node.names)


def house_imports(source: Source) -> list[tuple[int, tuple[str, ...]]]:
    """(line, names after `strop`) of every import from the house: ("engine", "models", "policy", "Policy")."""
    return [(node.lineno, tuple(name.split(".")[1:])) for node, name in imports(source) if name.startswith("strop.")]


def floor_of(names: tuple[str, ...]) -> str:
    return next((name for name in names[:2] if name in ORDER), "doors")


def own_floor_and_below(source: Source) -> Iterator[str]:
    here = floor_of(source.names)
    for line, names in house_imports(source):
        if ORDER.index(floor_of(names)) > ORDER.index(here):
            yield f"line {line}: {here} lies below {floor_of(names)}; take what it needs as an argument, or move it"


def import_style(source: Source) -> Iterator[str]:
    """Engine and kernels are relative, which type checkers resolve; bench and tests import as users do."""
    inside = source.names[0] in ("engine", "kernels")
    for node, name in imports(source):
        relative, first = getattr(node, "level", 0) > 0, name.split(".")[0]
        if inside and first == "strop" and not relative:
            yield f"line {node.lineno}: `{name}`: write it relative"
        elif relative and not inside:
            yield f"line {node.lineno}: `{name}`: write it absolute, from strop"
        elif not relative and first in (TOP_NAMES | set(PARTS)) - sys.stdlib_module_names:
            yield f"line {node.lineno}: `{name}` is found only by luck of the current folder; import it from strop"


def outside_imports(source: Source) -> Iterator[str]:
    floor = floor_of(source.names)
    for node, name in imports(source):
        library = name.split(".")[0]
        if library not in FLOORS[floor] | {"strop"} | sys.stdlib_module_names:
            yield f"line {node.lineno}: {library} is not among the libraries of {floor}: {sorted(FLOORS[floor])}"


def constructs(node: ast.AST) -> bool:
    named = isinstance(node, FUNCTIONS) and node.name in ("__init__", "__post_init__")
    return named or "classmethod" in map(dotted, getattr(node, "decorator_list", ()))


def forks(node: ast.AST) -> bool:
    contexts = [item.context_expr for item in getattr(node, "items", ())]
    return any(isinstance(c, ast.Call) and dotted(c.func).endswith("fork_rng") for c in contexts)


def host_syncs(source: Source) -> Iterator[str]:
    """Construction happens once and may wait. What runs in the loop may not, but where its line says how rarely."""
    lines = source.text.splitlines()
    for call in source.calls(outside=constructs):
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        to_cpu = method == "to" and any(isinstance(a, ast.Constant) and a.value == "cpu" for a in call.args)
        on_purpose = any(re.search(r"# one wait an? \w+", line) for line in lines[call.lineno - 1 : call.end_lineno])
        if (method in SYNCS or to_cpu) and not on_purpose:
            yield f"line {call.lineno}: .{method}() waits for the device; keep the tensor there until it is logged"


def global_rng(source: Source) -> Iterator[str]:
    for call in source.calls(outside=forks):
        module, _, function = dotted(call.func).rpartition(".")
        explicit = any(keyword.arg == "generator" for keyword in call.keywords)
        on_tensor = isinstance(call.func, ast.Attribute) and function.endswith("_")
        draws = re.fullmatch(DRAWS, function) and (module == "torch" or on_tensor) and not explicit
        seeds = module.split(".")[0] == "torch" and function in ("seed", "manual_seed", "manual_seed_all")
        other = module in ("random", "np.random", "numpy.random") and function not in ("Random", "default_rng")
        if draws or seeds or other:
            yield f"line {call.lineno}: {function} uses the global generator; pass a torch.Generator"


def unsafe_loading(source: Source) -> Iterator[str]:
    for call in source.nodes(ast.Call):
        name, given = dotted(call.func), {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        unsafe = name == "torch.load" and given.get("weights_only") is not True
        if unsafe or name in ("pickle.load", "pickle.loads") or "trust_remote_code" in given:
            yield f"line {call.lineno}: {name} may run code of the file; weights_only=True, safetensors or JSON do not"


def hidden_state(source: Source) -> Iterator[str]:
    for node in source.nodes(ast.Call, ast.Assign, ast.AugAssign, ast.Delete, ast.Global):
        touched = getattr(node, "targets", None) or [getattr(node, "target", getattr(node, "func", node))]
        if any(dotted(part) == "sys.path" for t in touched for part in (t, getattr(t, "value", t))):
            yield f"line {node.lineno}: sys.path is not edited; install the package and import it from strop"
        if isinstance(node, ast.Global):
            yield f"line {node.lineno}: `global` hides state; pass it, or return it"


def banners(source: Source) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT and re.search(r"[-=#*~─━═]{4,}", token.string):
            yield f"line {token.start[0]}: no banner comments; a new section is a new function or a new file"


def sizes(source: Source) -> Iterator[str]:
    """Fields of a dataclass are no parameters, and the ops of kernels/ take as many as their formula has."""
    if (lines := source.text.count("\n")) > 350:
        yield f"{lines} lines, more than 350: a second thing lives here; give it a file"
    for node in source.nodes(*FUNCTIONS):
        first, a = node.body[0], node.args
        length = node.end_lineno - node.lineno + 1
        length -= (first.end_lineno - first.lineno + 1) if ast.get_docstring(node) is not None else 0
        every = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
        count = sum(arg is not None and arg.arg not in ("self", "cls") for arg in every)
        if length > 60:
            yield f"line {node.lineno}: {node.name} has {length} lines without its docstring, more than 60; split it"
        if count > 6 and source.names[0] != "kernels":
            yield f"line {node.lineno}: {node.name} has {count} parameters, more than six; some of them are one thing"


def docstrings(source: Source) -> Iterator[str]:
    """A kernel's `<op>_ref` is its own documentation: the head of its file gives the formula and the shapes."""
    module = walk(source.text)[0]
    if module.body and ast.get_docstring(module) is None:
        yield "line 1: a module's head says what it holds, and what it does not do"
    for node in module.body:
        public = isinstance(node, FUNCTIONS) and not node.name.startswith("_") and not node.name.endswith("_ref")
        if public and ast.get_docstring(node) is None:
            yield f"line {node.lineno}: {node.name} is public: its docstring gives shapes, units, errors and the source"


def vocabulary(source: Source) -> Iterator[str]:
    for node in source.nodes(ast.Name, ast.arg, ast.Attribute, ast.keyword):
        word = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
        if word in FORMER_WORDS:
            yield f"line {node.lineno}: `{word}` is a former word; say winner / loser, preference pair, branch"


def image_opening(source: Source) -> Iterator[str]:
    for call in source.nodes(ast.Call):
        if dotted(call.func) == "Image.open" and "formats" not in {keyword.arg for keyword in call.keywords}:
            yield f"line {call.lineno}: Image.open takes all there is; images of users are read in data/image_files.py"


PLACES = {
    EVERYWHERE: (import_style, unsafe_loading, hidden_state, banners),
    SHIPPED: (own_floor_and_below, sizes),
    LIBRARY: (outside_imports, global_rng, docstrings, vocabulary, image_opening),
    HOT: (host_syncs,),
}
WALLS = {wall: place for place, walls in PLACES.items() for wall in walls}
POLICY, SPO = "engine/models/policy.py", "engine/methods/spo/update.py"
TRIALS = [  # the wall, where the snippet stands, one to stop, one to let pass
    (own_floor_and_below, POLICY, "def f():\n    from ..judge import clip", "if TYPE_CHECKING:\n    from .. import x"),
    (own_floor_and_below, "engine/runtime/checkpoint.py", "from .. import models", "from .ranks import Ranks"),
    (own_floor_and_below, SPO, "from ... import train", "from ...models.policy import Policy"),
    (own_floor_and_below, SPO, "import strop.bench.tinyworld", "from ....kernels import ddim_branch"),
    (own_floor_and_below, "engine/rows.py", "from .schedules import ddim", "from .errors import UserError"),
    (own_floor_and_below, "kernels/adaln.py", "from ..engine.judge import clip", "from . import ddim"),
    (import_style, "engine/train.py", "import strop.kernels", "from ..kernels import ddim"),
    (import_style, "engine/train.py", "from models.policy import Policy", "from .models.policy import Policy"),
    (import_style, "bench/ours.py", "from .published import Clock", "from strop.bench.published import Clock"),
    (outside_imports, SPO, "import numpy as np", "import math, torch"),
    (outside_imports, "engine/config/a.py", "import torch", "import yaml"),
    (host_syncs, "kernels/adaln.py", "x.sum().item()", "x.items()"),
    (host_syncs, SPO, "x.tolist()", "@classmethod\ndef of(cls, x): x.tolist()"),
    (host_syncs, SPO, "x.tolist()  # fast", "x.tolist()  # one wait an iteration"),
    (host_syncs, POLICY, "x.to('cpu')", "x.to(device)"),
    (global_rng, SPO, "torch.randn(3)", "torch.randn(3, generator=rng)"),
    (global_rng, SPO, "x.normal_()", "x.normal_(generator=rng)"),
    (global_rng, SPO, "with a:\n    torch.manual_seed(0)", "with fork_rng():\n    torch.manual_seed(0)"),
    (global_rng, SPO, "torch.cuda.manual_seed_all(0)", "torch.Generator().manual_seed(0)"),
    (global_rng, SPO, "np.random.seed(0)", "np.random.default_rng(0)"),
    (unsafe_loading, "tests/a.py", "torch.load(f)", "torch.load(f, weights_only=True)"),
    (unsafe_loading, "bench/a.py", "load(f, trust_remote_code=True)", "load(f)"),
    (unsafe_loading, "bench/a.py", "pickle.load(f)", "json.load(f)"),
    (hidden_state, "bench/a.py", "sys.path.insert(0, here)", "print(sys.path)"),
    (hidden_state, "bench/a.py", "sys.path[:0] = [here]", "first = sys.path[0]"),
    (hidden_state, "bench/a.py", "sys.path += [here]", "x.path += [here]"),
    (hidden_state, SPO, "def f():\n    global x\n    x = 1", "X = 1"),
    (banners, SPO, "# ---- loss ----", "x = 1  # a - b, equation (4)"),
    (sizes, SPO, "x = 1\n" * 351, "x = 1\n" * 350),
    (sizes, SPO, "def f():\n" + "    x = 1\n" * 60, "def f():\n    'One.'\n" + "    x = 1\n" * 59),
    (sizes, "bench/a.py", "def f(a, b, c, /, d, *e, g, **h): ...", "def f(self, a, b, c, d, *e, **f): ..."),
    (docstrings, SPO, "'Head.'\ndef f(): ...", "'Head.'\ndef _f(): ..."),
    (docstrings, SPO, "x = 1", ""),
    (image_opening, SPO, "Image.open(f)", "Image.open(f, formats=OURS)"),
    (vocabulary, SPO, "win_lose = 1", "winner = 1"),
]


@pytest.mark.parametrize("wall", WALLS, ids=lambda wall: wall.__name__)
def test_wall_stands(wall):
    faults = [f"{s.path}: {fault}" for s in SOURCES if re.fullmatch(WALLS[wall], s.path) for fault in wall(s)]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("wall, path, stops, passes", TRIALS, ids=[f"{t[0].__name__}-{t[2][:30]!r}" for t in TRIALS])
def test_wall_stops_and_lets_pass(wall, path, stops, passes):
    assert list(wall(Source(path, stops)))
    assert not list(wall(Source(path, passes)))


def test_every_wall_is_tried():
    assert {trial[0] for trial in TRIALS} == set(WALLS)


def hides_another(name: str) -> bool:
    """`deepspeed engine/train.py` puts engine/ first on sys.path, where a name hides an installed one."""
    elsewhere = [p for p in sys.path if p and not Path(p).resolve().is_relative_to(ROOT / "engine") and Path(p) != ROOT]
    return name in sys.stdlib_module_names or importlib.machinery.PathFinder.find_spec(name, elsewhere) is not None


def test_no_name_at_the_top_of_engine_hides_an_installed_one():
    assert not [name for name in TOP_NAMES if hides_another(name)]
    assert all(map(hides_another, ("logging", "types", "numpy", "peft")))


def circle(sources: list[Source]) -> list[tuple[str, ...]]:
    """The modules of one import circle, or nothing. An import names a module, or what stands in one."""
    known = {source.names for source in sources}
    needs = {s.names: {n if n in known else n[:-1] for _, n in house_imports(s)} for s in sources}
    try:
        graphlib.TopologicalSorter(needs).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_import_circle():
    assert not circle([source for source in SOURCES if re.fullmatch(LIBRARY, source.path)])
    there, back = Source("kernels/a.py", "from .b import x"), Source("kernels/b.py", "from . import a")
    assert circle([there, back])
    assert not circle([there, Source("kernels/b.py", "x = 1")])


def dead_names(page: str) -> Iterator[str]:
    """Files and make targets that a page of Markdown names and that do not exist; `ddim.py` may lie in any folder."""
    paths = re.findall(r"(?<![\w/.-])(?:engine|kernels|bench|configs|tests|docs)/[\w/-]+(?:\.\w+)*", page)
    paths += re.findall(r"`([\w/]+\.py)`", page)
    yield from (p for p in paths if not (ROOT / p).exists() and not any(s.path.endswith(f"/{p}") for s in SOURCES))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    named = re.findall(r"(?:`|^\s*\$? ?)make ([a-z-]+)", page, flags=re.M)
    yield from (f"make {target}" for target in named if target not in targets)


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_page_names_what_exists(page):
    assert not list(dead_names(page.read_text(encoding="utf-8")))


def test_dead_name_is_noticed():
    dead = "`make coffee`, engine/coffee.py, `models/coffee.py`"
    assert list(dead_names(dead)) == ["engine/coffee.py", "models/coffee.py", "make coffee"]
    assert not list(dead_names("`make test`, see engine/train.py and `models/policy.py`. Or\n    make demo"))
