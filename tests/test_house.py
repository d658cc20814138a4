"""The walls of the house: who may import whom, and what no source file may hold.

Each wall is a function that yields its complaints about one source. TRIALS gives for each a snippet that it must stop
beside one that it must let pass, so that no wall is a test that cannot fail. Sources are read here, never run.
"""

import ast
import functools
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
FOLDERS = ("engine", "kernels", "bench", "tests")
SOURCES = sorted(str(p.relative_to(ROOT)) for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))
EVERYWHERE, LIBRARY, SHIPPED = r".*", r"(engine|kernels)/.*", r"(engine|kernels|bench)/.*"
HOT = r"engine/(rollout|objective|ddim|draws|pairs|policy|text_kv|halves|residual|low_rank)\.py|kernels/.*"

# What a room may import of the house (errors is open to all); a room without a row may import any but the entry points.
ROOMS = {
    "errors": set(),
    "objective": set(),
    "pairs": set(),
    "metrics": set(),
    "ledger": {"metrics"},
    "settings": set(),
    "config": {"settings"},
    "spm_config": {"config", "settings"},
    "draws": set(),
    "conditioning": set(),
    "text_kv": {"conditioning"},
    "upsample": set(),
    "halves": set(),
    "residual": set(),
    "low_rank": set(),
    "ddim": {"kernels", "draws"},
    "clip": {"kernels"},
    "judge_files": {"clip", "config", "hub"},
    "pair_cache": set(),
    "pair_data": set(),
    "preference": {"clip", "config", "judge_files", "pairs"},
    "rollout": {"pairs", "preference", "ddim", "draws"},
    "lora": {"config"},
}
# What a room may import beyond the house and the standard library; a room without a row is bound by HOMES only.
OUTSIDE = {
    "errors": set(),
    "objective": {"torch"},
    "pair_cache": {"torch", "safetensors"},
    "pair_data": {"torch", "PIL", "pyarrow"},
    "pairs": {"torch"},
    "metrics": {"torch"},
    "ledger": {"torch", "pynvml"},
    "settings": {"pydantic", "yaml"},
    "config": {"pydantic"},
    "spm_config": {"pydantic"},
    "ddim": {"torch"},
    "draws": {"torch"},
    "conditioning": {"torch"},
    "text_kv": {"torch"},
    "upsample": {"torch"},
    "halves": {"torch"},
    "residual": {"torch", "diffusers"},
    "low_rank": {"torch", "peft"},
    "rollout": {"torch"},
    "lora": {"torch", "safetensors"},
}
# Libraries whose ways should be known in few rooms.
HOMES = {
    "diffusers": {"base_model", "blueprint", "single_file", "diffusion", "policy", "residual", "spm", "tiny_decoder"},
    "transformers": {"base_model", "blueprint", "diffusion", "clip", "judge_files", "preference"},
    "peft": {"policy", "low_rank"},
    "deepspeed": {"zero", "ranks"},
    "pyarrow": {"pair_data"},
    "pynvml": {"ledger"},
}
DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli"}
DRAWS |= {"multinomial", "poisson", "normal_", "uniform_", "random_", "bernoulli_", "exponential_"}
SYNCS = {"item", "cpu", "tolist", "numpy", "empty_cache", "synchronize"}
FORMER_WORDS = {"win_lose", "sample_0", "sample_1", "extra_info"}

parse = functools.lru_cache(ast.parse)


class Source(NamedTuple):
    path: str
    text: str

    @property
    def room(self) -> str:
        return Path(self.path).stem if self.path.startswith("engine/") else self.path.split("/")[0]

    def nodes(self, *kinds: type[ast.AST]) -> Iterator[ast.AST]:
        return (node for node in ast.walk(parse(self.text)) if isinstance(node, kinds))


def dotted(node: ast.AST) -> str:
    """`torch.cuda.synchronize` of the expression that says so; the last name alone where it hangs on something else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def imports(source: Source) -> list[tuple[int, str]]:
    """(line, full name) of every import, those inside functions too, those for type checkers only left out."""
    tree = parse(source.text)
    typing_only = {
        id(node)
        for test in ast.walk(tree)
        if isinstance(test, ast.If) and dotted(test.test).endswith("TYPE_CHECKING")
        for node in ast.walk(test)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            here = ["strop", *Path(source.path).parent.parts]
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
    return found


def rooms_of(source: Source) -> list[tuple[int, str]]:
    """(line, room) of every import from the house: an engine module's name, or `kernels`, or `bench`."""
    parts = [(line, name.split(".")) for line, name in imports(source)]
    return [
        (line, (p[2:] or ["engine"])[0] if p[1] == "engine" else p[1]) for line, p in parts if p[0] == "strop" and p[1:]
    ]


def house_imports(source: Source) -> Iterator[str]:
    for line, room in rooms_of(source):
        if room == "errors":
            continue
        if source.room == "kernels" and room != "kernels":
            yield f"line {line}: strop.kernels knows nothing of strop.{room}; take what it needs as an argument"
        elif source.room in ROOMS and room not in ROOMS[source.room]:
            yield f"line {line}: {source.room} may import {sorted(ROOMS[source.room])} of the house, not {room}"
        elif source.path.startswith("engine/") and room == "bench":
            yield f"line {line}: the engine does not know the bench; name it in a recipe as module:factory"
        elif source.path.startswith("engine/") and room.startswith("train"):
            yield f"line {line}: entry points import the rooms, never the other way; move the shared part to a room"


def outside_imports(source: Source) -> Iterator[str]:
    allowed = {"torch", "triton"} if source.room == "kernels" else OUTSIDE.get(source.room)
    for line, name in imports(source):
        library = name.split(".")[0]
        if library == "strop" or library in sys.stdlib_module_names:
            continue
        if allowed is not None and library not in allowed:
            yield f"line {line}: {source.path} may import {sorted(allowed)} and the standard library, not {library}"
        elif library in HOMES and source.room not in HOMES[library]:
            yield f"line {line}: {library} is imported only in {sorted(HOMES[library])}; put the call there"


def import_names(source: Source) -> Iterator[str]:
    bare = {Path(path).stem for path in SOURCES if path.startswith("engine/")} | {"engine", "kernels", "bench"}
    for line, name in imports(source):
        if name.split(".")[0] in bare - sys.stdlib_module_names:
            yield f"line {line}: `{name}` is found only by luck of the current folder; import it from strop"


def within(source: Source, found: Callable[[ast.AST], bool]) -> set[tuple[int, int]]:
    """Where the calls stand that lie inside a node for which `found` holds."""
    blocks = [node for node in source.nodes(ast.With, ast.FunctionDef) if found(node)]
    return {(n.lineno, n.col_offset) for block in blocks for n in ast.walk(block) if isinstance(n, ast.Call)}


def constructs(node: ast.AST) -> bool:
    named = isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__post_init__")
    return named or "classmethod" in map(dotted, getattr(node, "decorator_list", ()))


def forks(node: ast.AST) -> bool:
    contexts = [item.context_expr for item in getattr(node, "items", ())]
    return any(isinstance(c, ast.Call) and dotted(c.func).endswith("fork_rng") for c in contexts)


def host_syncs(source: Source) -> Iterator[str]:
    """Construction happens once and may wait; what runs in the loop may not."""
    once = within(source, constructs)
    for call in source.nodes(ast.Call):
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        to_cpu = method == "to" and any(isinstance(a, ast.Constant) and a.value == "cpu" for a in call.args)
        if (method in SYNCS or to_cpu) and (call.lineno, call.col_offset) not in once:
            yield f"line {call.lineno}: .{method}() waits for the device; keep the tensor there until it is logged"


def global_rng(source: Source) -> Iterator[str]:
    forked = within(source, forks)
    for call in source.nodes(ast.Call):
        module, _, function = dotted(call.func).rpartition(".")
        if (call.lineno, call.col_offset) in forked or not isinstance(call.func, ast.Attribute):
            continue
        explicit = any(keyword.arg == "generator" for keyword in call.keywords)
        draws = function in DRAWS and (module == "torch" or function.endswith("_")) and not explicit
        seeds = module.split(".")[0] == "torch" and function in ("seed", "manual_seed", "manual_seed_all")
        other = module in ("random", "np.random", "numpy.random") and function not in ("Random", "default_rng")
        if draws or seeds or other:
            yield f"line {call.lineno}: {function} uses the global generator; pass a torch.Generator"


def unsafe_loading(source: Source) -> Iterator[str]:
    for call in source.nodes(ast.Call):
        name, given = dotted(call.func), {k.arg: getattr(k.value, "value", None) for k in call.keywords}
        if name == "torch.load" and given.get("weights_only") is not True:
            yield f"line {call.lineno}: torch.load runs code of the file; say weights_only=True"
        if name in ("pickle.load", "pickle.loads"):
            yield f"line {call.lineno}: {name} runs code of the file; use safetensors or JSON"
        if "trust_remote_code" in given:
            yield f"line {call.lineno}: trust_remote_code runs code of a model folder; load a known class"


def path_edits(source: Source) -> Iterator[str]:
    for node in source.nodes(ast.Call, ast.Assign, ast.AugAssign, ast.Delete):
        touched = [node.func] if isinstance(node, ast.Call) else getattr(node, "targets", None) or [node.target]
        if any(dotted(part) == "sys.path" for t in touched for part in (t, getattr(t, "value", t))):
            yield f"line {node.lineno}: sys.path is not edited; install the package and import it from strop"


def module_globals(source: Source) -> Iterator[str]:
    for node in source.nodes(ast.Global):
        yield f"line {node.lineno}: `global` hides state; pass it, or return it"


def banners(source: Source) -> Iterator[str]:
    for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
        if token.type == tokenize.COMMENT and re.search(r"[-=#*~─━═]{4,}", token.string):
            yield f"line {token.start[0]}: no banner comments; a new section is a new function or a new file"


def sizes(source: Source) -> Iterator[str]:
    lines = source.text.count("\n")
    if lines > 350:
        yield f"{lines} lines, more than 350: a second thing lives here; give it a file"
    for node in source.nodes(ast.FunctionDef, ast.AsyncFunctionDef):
        first = node.body[0]
        documented = ast.get_docstring(node) is not None
        length = node.end_lineno - node.lineno + 1 - documented * (first.end_lineno - first.lineno + 1)
        if length > 60:
            yield f"line {node.lineno}: {node.name} has {length} lines without its docstring, more than 60; split it"


def docstrings(source: Source) -> Iterator[str]:
    """A kernel's `<op>_ref` is its own documentation: the head of its file gives the formula and the shapes."""
    tree = parse(source.text)
    if tree.body and ast.get_docstring(tree) is None:
        yield "line 1: a module's head says what it holds, and what it does not do"
    for node in tree.body:
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        public = isinstance(node, kinds) and not node.name.startswith("_") and not node.name.endswith("_ref")
        if public and ast.get_docstring(node) is None:
            yield f"line {node.lineno}: {node.name} is public: its docstring gives shapes, units, errors and the source"


def vocabulary(source: Source) -> Iterator[str]:
    for node in source.nodes(ast.Name, ast.arg, ast.Attribute, ast.keyword):
        word = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
        if word in FORMER_WORDS:
            yield f"line {node.lineno}: `{word}` is a former word; say winner / loser, preference pair, branch"


def shadows(path: str) -> Iterator[str]:
    """`deepspeed engine/train.py` puts engine/ first on sys.path, where a module hides an installed one of its name."""
    name = Path(path).stem
    elsewhere = [p for p in sys.path if p and not Path(p).resolve().is_relative_to(ROOT / "engine") and Path(p) != ROOT]
    installed = importlib.machinery.PathFinder.find_spec(name, elsewhere) is not None
    if name != "__init__" and (name in sys.stdlib_module_names or installed):
        yield f"{path} hides the installed module `{name}` from everything that a script of engine/ imports; rename it"


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The rooms of one import circle, or nothing."""

    def walk(room: str, trail: list[str]) -> list[str]:
        if room in trail:
            return [*trail[trail.index(room) :], room]
        if room in done:
            return []
        for other in sorted(graph.get(room, ())):
            if found := walk(other, [*trail, room]):
                return found
        done.add(room)
        return []

    done: set[str] = set()
    return next((found for room in sorted(graph) if (found := walk(room, []))), [])


def dead_names(page: str) -> Iterator[str]:
    """Files and make targets that a page of Markdown names and that do not exist."""
    for path in re.findall(r"(?<![\w/.-])(?:engine|kernels|bench|configs|tests|docs)/[\w/-]+(?:\.\w+)*", page):
        if not (ROOT / path).exists():
            yield f"{path} does not exist"
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M)
    for target in re.findall(r"(?:`|^\s*\$? ?)make ([a-z-]+)", page, flags=re.M):
        if target not in targets:
            yield f"`make {target}` does not exist"


WALLS = {
    house_imports: LIBRARY,
    outside_imports: LIBRARY,
    import_names: EVERYWHERE,
    host_syncs: HOT,
    global_rng: LIBRARY,
    unsafe_loading: EVERYWHERE,
    path_edits: EVERYWHERE,
    module_globals: EVERYWHERE,
    banners: EVERYWHERE,
    sizes: SHIPPED,
    docstrings: LIBRARY,
    vocabulary: LIBRARY,
}
TYPES_ONLY = "if TYPE_CHECKING:\n    import strop.engine.policy"
FORKED = "with torch.random.fork_rng():\n    torch.manual_seed(0)"
ONCE = "class A:\n    @classmethod\n    def of(cls, x):\n        x.tolist()"
TRIALS = [  # the wall, where the snippet stands, one to stop, one to let pass
    (house_imports, "engine/objective.py", "def f():\n    from strop.engine import policy", TYPES_ONLY),
    (house_imports, "engine/objective.py", "import strop.kernels", "from strop.engine.errors import UserError"),
    (house_imports, "kernels/adaln.py", "import strop.engine.clip", "from . import ddim"),
    (house_imports, "engine/zero.py", "import strop.bench.tinyworld", "import strop.engine.checkpoint"),
    (house_imports, "engine/zero.py", "from strop.engine.train import main", "from strop.kernels import adaln"),
    (outside_imports, "engine/pairs.py", "import numpy as np", "import math, torch"),
    (outside_imports, "kernels/adaln.py", "import transformers", "import torch, triton"),
    (outside_imports, "engine/report.py", "import diffusers", "import matplotlib"),
    (import_names, "engine/train.py", "import kernels.ddim", "import strop.kernels"),
    (
        import_names,
        "engine/train.py",
        "from pairs import PreferencePairs",
        "from strop.engine.pairs import PreferencePairs",
    ),
    (host_syncs, "kernels/adaln.py", "x.sum().item()", "x.items()"),
    (host_syncs, "engine/ddim.py", "x.tolist()", ONCE),
    (host_syncs, "engine/policy.py", "x.to('cpu')", "x.to(device)"),
    (global_rng, "engine/ddim.py", "torch.randn(3)", "torch.randn(3, generator=rng)"),
    (global_rng, "engine/ddim.py", "x.normal_()", "x.normal_(generator=rng)"),
    (global_rng, "engine/zero.py", "torch.cuda.manual_seed_all(0)", "torch.Generator().manual_seed(0)"),
    (global_rng, "engine/zero.py", "with a:\n    torch.manual_seed(0)", FORKED),
    (global_rng, "engine/zero.py", "np.random.seed(0)", "np.random.default_rng(0)"),
    (unsafe_loading, "tests/a.py", "torch.load(f)", "torch.load(f, weights_only=True)"),
    (unsafe_loading, "bench/a.py", "load(f, trust_remote_code=True)", "json.load(f)"),
    (unsafe_loading, "bench/a.py", "pickle.load(f)", "load(f)"),
    (path_edits, "bench/a.py", "sys.path.insert(0, here)", "print(sys.path)"),
    (path_edits, "bench/a.py", "sys.path[:0] = [here]", "first = sys.path[0]"),
    (path_edits, "bench/a.py", "sys.path += [here]", "x.path += [here]"),
    (module_globals, "engine/a.py", "def f():\n    global x\n    x = 1", "X = 1"),
    (banners, "engine/a.py", "# ---- loss ----", "x = 1  # a - b, equation (4)"),
    (sizes, "engine/a.py", "x = 1\n" * 351, "x = 1\n" * 350),
    (sizes, "engine/a.py", "def f():\n" + "    x = 1\n" * 60, "def f():\n    'One.'\n" + "    x = 1\n" * 59),
    (docstrings, "engine/a.py", "'Head.'\ndef f(): ...", "'Head.'\ndef _f(): ..."),
    (docstrings, "engine/a.py", "x = 1", ""),
    (vocabulary, "engine/a.py", "win_lose = 1", "winner = 1"),
]


def read(path: str) -> Source:
    return Source(path, (ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("wall", WALLS, ids=lambda wall: wall.__name__)
def test_wall_stands(wall):
    faults = [f"{p}: {fault}" for p in SOURCES if re.fullmatch(WALLS[wall], p) for fault in wall(read(p))]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("wall, path, stops, passes", TRIALS, ids=[f"{t[0].__name__}-{t[2][:30]!r}" for t in TRIALS])
def test_wall_stops_and_lets_pass(wall, path, stops, passes):
    assert list(wall(Source(path, stops)))
    assert not list(wall(Source(path, passes)))


def test_every_wall_is_tried():
    assert {trial[0] for trial in TRIALS} == set(WALLS)


def test_no_module_hides_an_installed_one():
    faults = [fault for path in SOURCES if path.startswith("engine/") for fault in shadows(path)]
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("name", ["logging", "types", "numpy", "peft"])
def test_hiding_is_noticed(name):
    assert list(shadows(f"engine/{name}.py"))


def test_no_import_circle():
    sources = [read(path) for path in SOURCES if path.startswith("engine/")]
    found = circle({source.room: {room for _, room in rooms_of(source)} for source in sources})
    assert not found, f"import circle: {' -> '.join(found)}; move what both need to a third room"


def test_circle_is_noticed():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": {"outside"}}) == []


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda page: page.name)
def test_page_names_what_exists(page):
    faults = list(dead_names(page.read_text(encoding="utf-8")))
    assert not faults, f"{page.name}: " + "; ".join(faults)


def test_dead_names_are_noticed():
    assert list(dead_names("`make coffee`, see engine/coffee.py")) == [
        "engine/coffee.py does not exist",
        "`make coffee` does not exist",
    ]
    assert not list(dead_names("`make test`, see engine/train.py. Or\n    make demo"))
