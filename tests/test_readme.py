"""The pages that a reader types from: their size, their links, and every command in them.

Commands stand in ```bash fences. Each is parsed by the program that it starts, and its recipe is loaded with its
overrides; a comment marks what needs a GPU or a download. The block "Your own run" of the README is typed in order.
"""

import argparse
import re
import shlex
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

from strop.bench import readme
from strop.engine import cli
from strop.engine.config.find import load
from strop.engine.config.judge_training import JudgeTrainingConfig
from strop.engine.config.settings import RECIPES, differences
from strop.engine.config.training import Config
from strop.engine.errors import UserError
from strop.engine.models.lora_file import read
from strop.engine.runtime.metrics import read_records
from strop.engine.runtime.run_folder import MAY_CHANGE

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", *DOCS]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "kernels" / "README.md", *ROOT.glob("bench/**/README.md")]
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
LAUNCHER = {"--num_gpus", "--num_accelerators", "--hostfile", "--no_ssh", "--node_rank", "--master_addr"}
LAUNCHER |= {"--nnodes", "--nproc_per_node"}


class Command(NamedTuple):
    """A line of a page's bash fences."""

    page: Path
    line: str

    def __str__(self) -> str:
        return f"{self.page.name}: {' '.join(self.words)}"

    @property
    def words(self) -> list[str]:
        return shlex.split(self.line, comments=True)

    @property
    def marked(self) -> bool:
        return re.search(r" # .*\b(GPU|downloads)\b", self.line) is not None

    def program(self) -> tuple[str, list[str]]:
        """(module, arguments) of the Python program that it starts."""
        match self.words:
            case ["strop", command, *rest] if command in cli.COMMANDS:
                return f"strop.engine{cli.COMMANDS[command][0]}", rest
            case ["strop", option] if option.startswith("--"):
                return "strop.engine.cli", [option]
            case ["python", "-m", module, *rest]:
                return module, rest
            case ["deepspeed" | "torchrun", option, *words] if any(word.endswith(".py") for word in words):
                at = next(at for at, word in enumerate(words) if word.endswith(".py"))
                assert {option, *(word for word in words[:at] if word.startswith("-"))} <= LAUNCHER
                script, *rest = words[at:]
                assert (ROOT / script).is_file(), script
                return f"strop.{Path(script).with_suffix('').as_posix().replace('/', '.')}", rest
        raise AssertionError(f"{self.line!r}: no program that a page may name")


def fences(page: Path, kind: str) -> list[str]:
    return [text for info, text in FENCE.findall(page.read_text(encoding="utf-8")) if info == kind]


def commands(page: Path) -> list[Command]:
    lines = "".join(fences(page, "bash")).splitlines()
    return [Command(page, line) for line in lines if line.strip()]


COMMANDS = [command for page in PAGES for command in commands(page)]
SCRIPTS = {"engine/train.py", "engine/train_judge.py"}
TRAININGS = [c for c in COMMANDS if SCRIPTS & set(c.words) or c.words[1:2] in (["train"], ["train-judge"])]


class Parsed(Exception):
    """A program has parsed its command line: what came out."""


@pytest.fixture
def recipe_of(monkeypatch):
    """recipe_of(command) -> the recipe that it runs, None where it runs none. Nothing is run.

    AssertionError or UserError for what its program does not take.
    """

    def stopping(parse):
        def stopped(self, *args, **options):
            raise Parsed(parse(self, *args, **options))

        return stopped

    for name in ("parse_args", "parse_intermixed_args"):
        monkeypatch.setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    monkeypatch.chdir(ROOT)

    def answer(command):
        module, arguments = command.program()
        assert find_spec(module), f"there is no module {module}"
        if not re.search("argparse|recipe_of", Path(find_spec(module).origin).read_text()):
            assert not arguments, f"{module} takes no arguments"
            return None
        with pytest.raises((Parsed, SystemExit)) as ended:
            import_module(module).main(arguments)
        if ended.type is SystemExit:
            assert ended.value.code == 0, command.line  # --help
            return None
        names = ended.value.args[0]
        kind = JudgeTrainingConfig if module.endswith("train_judge") else Config
        return load(names.recipe, names.overrides, kind) if hasattr(names, "overrides") else None

    return answer


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_is_one_that_its_program_takes(command, recipe_of):
    first, *rest = command.words
    if first == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(rest) <= set(targets)
    elif first == "export":
        assert {word.partition("=")[0] for word in rest} <= {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"}
    elif first == "source":
        assert rest == [".venv/bin/activate"]
    elif first == "pytest" or (first == "python" and rest[0] != "-m"):
        assert all((ROOT / word).exists() for word in rest if "/" in word)
    else:
        recipe_of(command)


@pytest.mark.parametrize(
    "line",
    [
        "strop train sd15 optim.lrr=1e-4",
        "strop train sd16",
        "strop tran sd15",
        "strop plan sd15 --card a100",
        "strop export runs/mine --out mine",
        "python -m strop.bench.coffee",
        "python -m strop.bench.full_size sd3",
        "deepspeed --num_gpus 4 engine/coffee.py sd15",
        "deepspeed engine/train.py sd15",
        "rm -rf /",
    ],
)
def test_command_that_its_program_does_not_take_is_noticed(line, recipe_of):
    with pytest.raises((AssertionError, UserError)):
        recipe_of(Command(README, line))


@pytest.mark.parametrize("command", TRAININGS, ids=str)
def test_training_is_marked_and_leaves_nothing_to_be_filled_in(command, recipe_of):
    config = recipe_of(command)
    assert command.marked == (not config.model.path.startswith("bench/tinyworld"))
    assert "/path/to/" not in config.model_dump_json()


def test_a_resumed_run_says_what_it_said_before(recipe_of):
    begun, resumed = {}, 0
    for command in TRAININGS:
        config = recipe_of(command)
        place = command.page, config.run.dir
        if config.run.resume:
            assert not differences(begun[place], config, MAY_CHANGE), command.line
            resumed += 1
        begun.setdefault(place, config)
    assert resumed >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fences_say_what_they_hold(page):
    assert {info for info, _ in FENCE.findall(page.read_text(encoding="utf-8"))} <= {"bash", "text", "python"}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "design.md"], ids=lambda page: page.name)
def test_python_of_a_page_runs(page):
    for text in fences(page, "python"):  # design.md quotes pieces of the engine
        exec(compile(text, page.name, "exec"), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_programs_named_in_a_sentence_exist(page):
    text = page.read_text(encoding="utf-8")
    assert all(find_spec(module) for module in re.findall(r"`python -m (strop[\w.]+)", text))
    assert set(re.findall(r"`strop ([a-z-]+)", text)) <= set(cli.COMMANDS)
    named = set(re.findall(r"(?:`strop (?:train|plan|train-judge) |\[`)(\w+)[ `]", text))
    assert named <= {file.stem for file in RECIPES.glob("*.yaml")} | {"RECIPE"}


def links(page: Path) -> list[tuple[Path, str]]:
    """(file or folder, anchor) of every link of a page to another place of the repository."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    parts = [target.partition("#") for target in found if not target.startswith("http")]
    return [((page.parent / path).resolve() if path else page, anchor) for path, _, anchor in parts]


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub makes them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_link_is_dead(page):
    dead = [str(p) for p, anchor in links(page) if not p.exists() or (anchor and anchor not in anchors(p))]
    assert not dead


def test_every_page_is_reached_from_the_readme():
    reached, ahead = set(), [README]
    while ahead:
        page = ahead.pop()
        reached.add(page)
        ahead += [p for p, _ in links(page) if p.suffix == ".md" and p not in reached]
    assert set(DOCS) <= reached


def test_the_pages_one_meets_first_are_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_measured_figures_are_those_of_the_records_and_none_is_typed_by_hand():
    page = README.read_text(encoding="utf-8")
    assert readme.renewed(page, readme.block(readme.RESULTS)) == page, "run python -m strop.bench.readme --write"
    section = page.partition("## What was measured")[2].partition("\n## ")[0]
    by_hand = section.partition(readme.BEGIN)[0] + section.partition(readme.END)[2]
    assert not re.search(r"\d+\.\d+|\d+ ?%", by_hand.replace("SD-1.5", ""))


@pytest.mark.slow
@pytest.mark.timeout(1200)  # what a full-size recipe takes is counted in a minute of an idle core
def test_your_own_run_works_when_it_is_typed_in_order(tiny_folder, clip_folder, tmp_path, monkeypatch):
    """With a tiny model and judge in place of the reader's and the recipe's; a run of one iteration is gone on with."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["strop"])
    (tmp_path / "my-prompts.txt").write_text("\n".join("abcdefgh"))
    (tmp_path / "my-model").symlink_to(tiny_folder)
    judge = [f"judge.path={clip_folder}", "judge.kind=pickscore", "judge.components=null", "model.dtype=float32"]
    brief = ["rollout.prompts=2", "rollout.num_steps=5", "rollout.threshold=0", "run.device=cpu"]
    brief += ["evaluate.prompts=2", "evaluate.scorers=[]"]  # the recipe's scorers would be downloaded
    section = README.read_text(encoding="utf-8").partition("## Your own run")[2]
    lines = FENCE.search(section)[2].splitlines()
    typed = []
    for line in lines:
        _, command, *arguments = shlex.split(line, comments=True)
        if command == "train":
            arguments += [*judge, *brief, f"run.iterations={1 + typed.count('train')}"]
        cli.main([command, *arguments])
        typed.append(command)
    assert typed == ["plan", "train", "train", "report", "export"]
    assert [record["iteration"] for record in read_records(tmp_path / "runs/mine/metrics.jsonl")] == [1, 2]
    assert (tmp_path / "runs/mine/report.html").stat().st_size > 0
    assert read(tmp_path / "loras/mine.safetensors").facts["strop.iteration"] == "2"
