"""config/training: recipes read, overridden, written, compared; each mistake is one sentence with the key."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from strop.engine.config.find import load
from strop.engine.config.judge_training import JudgeTrainingConfig
from strop.engine.config.settings import differences, dump, keys, varied
from strop.engine.config.training import Config
from strop.engine.errors import UserError

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SPO = {
    "model": {"path": "models/sd"},
    "judge": {"path": "models/judge"},
    "prompts": {"train": "train.txt", "heldout": "heldout.txt"},
    "run": {"dir": "runs/one", "iterations": 3},
}
JUDGE_TRAINING = {
    "model": {"path": "models/sd"},
    "judge": {"path": "models/pickscore"},
    "data": {"source": "pairs:load", "train": 100},
    "optim": {"steps": 50},
    "run": {"dir": "runs/two"},
}


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe as YAML and gives its path."""

    def write(tree=SPO):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        return path

    return write


def complaint(path, *overrides, cls=Config):
    """The sentence with which a recipe is refused, the file's name taken off."""
    with pytest.raises(UserError) as refusal:
        load(path, overrides, cls)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    assert sentence.startswith((f"{path}: ", "override "))
    return sentence.removeprefix(f"{path}: ")


def test_a_recipe_gives_its_values(recipe):
    """The defaults are those of docs/configuration.md."""
    config = load(recipe(SPO | {"optim": {"lr": "5e-4", "micro_batch": 7}}))
    assert (config.model.path, config.run.iterations, config.optim.micro_batch) == ("models/sd", 3, 7)
    assert config.optim.lr == 5e-4


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_of_the_repository_is_valid(path):
    load(path, cls=JudgeTrainingConfig if path.name.startswith("judge_") else Config)


@pytest.mark.parametrize("name", ["tinyworld", "sd15", "sdxl"])
def test_a_fast_recipe_changes_the_rollout_and_how_its_pairs_are_used(name):
    """And nothing of what is learned from a pair."""
    exact, fast = (load(RECIPES[0].parent / f"{file}.yaml") for file in (name, f"{name}_fast"))
    rollout = {f"rollout.{key}" for key in ("num_steps", "inner_steps", "judge_every", "look_ahead", "decoder")}
    rest = {"rollout.merge_last", "optim.passes", "optim.micro_batch", "optim.accumulate", "run.dir", "run.iterations"}
    changed = {line.split(":")[0] for line in differences(exact, fast)}
    assert {"rollout.num_steps", "rollout.look_ahead", "run.dir"} <= changed <= rollout | rest | {"model.merge_lora"}


@pytest.mark.parametrize("name", ["tinyworld", "sd15", "sdxl"])
def test_a_fast_recipe_with_a_latent_judge_changes_the_judge_and_the_gradient(name):
    fast, latent = (load(RECIPES[0].parent / f"{name}_{file}.yaml") for file in ("fast", "latent_fast"))
    changed = {line.split(":")[0] for line in differences(fast, latent)}
    always = {"judge.path", "judge.kind", "rollout.look_ahead", "rollout.keep", "optim.guided"}
    rest = {f"rollout.{key}" for key in ("threshold", "decoder", "inner_steps", "merge_last")}
    rest |= {"judge.guidance", "judge.components", "model.gradient_checkpointing"}
    assert always <= changed - {"run.dir"} <= always | rest


@pytest.mark.parametrize(
    "override, key, value",
    [
        ("optim.lr=1e-4", "optim.lr", 1e-4),
        ("rollout.k=8", "rollout.k", 8),
        ("run.dir=runs/a=b", "run.dir", "runs/a=b"),
        ("run.dir='5'", "run.dir", "5"),
        ("run.resume=true", "run.resume", True),
        ("optim.betas=[0.5, 0.9]", "optim.betas", (0.5, 0.9)),
        ("lora.target_modules=[to_q]", "lora.target_modules", ("to_q",)),
        ("evaluate.scorers=[my.module:make]", "evaluate.scorers", ("my.module:make",)),
        ("evaluate.every=null", "evaluate.every", None),
        ("rollout.k=010", "rollout.k", 10),
        ("rollout.k=+8", "rollout.k", 8),
        ("optim.beta=1e+1", "optim.beta", 10.0),
        ("run.dir=010", "run.dir", "010"),
        ("run.dir=1:30", "run.dir", "1:30"),
        ("run.dir=2026-01-02", "run.dir", "2026-01-02"),
        ("run.dir=no", "run.dir", "no"),
        ("run.resume=yes", "run.resume", True),
        ("run.dir=~/runs/one", "run.dir", str(Path.home() / "runs/one")),
        ("prompts.train=~/a.txt", "prompts.train", str(Path.home() / "a.txt")),
        ("model={path: elsewhere}", "model.path", "elsewhere"),
    ],
)
def test_overrides_change_one_value(recipe, override, key, value):
    config = load(recipe(), [f"{key}=1", override])  # the last one wins
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == value
    assert {line.split(":")[0] for line in differences(load(recipe()), config)} <= {key}


REFUSED = [  # override, words of the sentence; of each kind of rule a row, for docs/configuration.md has all bounds
    ("optim.lr=fast", "optim.lr", "'fast'", "number"),
    ("optim.lr=true", "lr", "true", "number"),
    ("optim.lr=0", "optim.lr", "found 0", "greater than 0"),
    ("optim.lr=.nan", "optim.lr", "nan", "finite"),
    ("optim.lr=", "optim.lr", "None", "number"),
    ("optim.clip=1", "optim.clip", "found 1", "less than 1"),
    ("optim.betas=[0.9]", "optim.betas.1", "missing"),
    ("optim.betas=[0.9, 0.9, 0.9]", "optim.betas", "[0.9, 0.9, 0.9]"),
    ("optim.betas=[0.9, 1.5]", "optim.betas.1", "1.5"),
    ("lora.target_modules=to_q", "lora.target_modules", "'to_q'"),
    ("lora.target_modules=[1]", "lora.target_modules.0", "found 1", "string"),
    ("model.dtype=fp16", "model.dtype", "'fp16'", "'float32', 'bfloat16' or 'float16'"),
    ("model=3", "model", "found 3", "keys and values"),
    ("model.height=1001", "model.height", "1001", "multiple of 8"),
    ("rollout.k=2.5", "rollout.k", "2.5", "integer"),
    ("rollout={look_ahead: text, guidance: 1}", "look_ahead is text", "guidance 1", "full"),
    ("rollout.t_range=[751, 0]", "t_range", "[751, 0]"),
    ("rollout.t_range=[0, 1000]", "rollout.t_range.1", "1000", "999"),
    ("run.dir=5", "run.dir", "found 5", "string"),
    ("run.resume=maybe", "run.resume", "'maybe'", "'auto'"),
    ("rollout.K=3", "key rollout.K;", "rollout.k?"),
    ("rolout.k=3", "key rolout;", "rollout?"),
    ("optim.max_gradnorm=1", "key optim.max_gradnorm;", "optim.max_grad_norm?"),
    ("inner_steps=3", "key inner_steps;", "rollout.inner_steps?"),
    ("lr=3", "key lr;", "optim.lr?"),
    ("run.k=3", "key run.k;", "rollout.k?"),
    ("zzz=1", "key zzz;", "docs/configuration.md"),
    ("=3", "'=3'", "section.key=value"),
    ("", "''", "section.key=value"),
    ("model.path.x=1", "'model.path.x=1'", "path"),
    ("optim.lr=[", "'optim.lr=['", "YAML"),
    ("rollout.k=1:30", "rollout.k", "'1:30'", "integer"),
    ("rollout.k=0x10", "rollout.k", "'0x10'", "integer"),
    (f"rollout.k={'9' * 5000}", "rollout.k", "99…", "integer"),
    (f"run.seed={'9' * 15}", "run.seed", "9" * 15, "4294967296"),
    ("model.height=80000", "model.height", "80000", "4096"),
    ("rollout.prompts=10000000", "rollout.prompts", "10000000", "10000"),
    (f"run.dir=[{'x' * 300}]", "run.dir", "xx…", "string"),
    (f"{'x' * 300}=1", "unknown key xxx"),
    (f"optim.lr=[{'x' * 300}", "xx…", "YAML"),
    ("optim={lr: 1, lr: 2}", "lr twice"),
    ("optim={lr: &a 1, eps: *a}", "alias *a"),
    ("optim=" + "[" * 10_000, "20 levels"),
    ("optim={[a]: 1}", "as a key"),
    ("optim={1: 1}", "optim.1"),
    ("optim.lr=!!python/name:os.system", "python/name"),
    ("optim.lr=!!int abc", "YAML"),
    ('run.dir="\\ud800"', "run.dir", "half"),
    ('run.dir="a\\0"', "run.dir", "zeros"),
]


@pytest.mark.parametrize("override, words", [(override, words) for override, *words in REFUSED])
def test_a_wrong_override_is_refused_with_its_key(recipe, override, words):
    sentence = complaint(recipe(), override)
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize(
    "more, words",
    [
        ("run: {dir: x, iterations: 1}", "run twice"),
        ("optim: {lr: 1e-5, lr: 1e-4}", "lr twice"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]", "alias *a"),
        ("optim: " + "{lr: " * 500, "20 levels"),
        ("optim: {lr: 1e-5}\n---\nrun: 3", "single document"),
        ("#" * 2**18, "more than 262,144"),
    ],
)
def test_a_recipe_that_says_two_things_or_too_much_is_refused(recipe, more, words):
    path = recipe()
    path.write_text(path.read_text() + more)
    assert words in complaint(path)


def test_a_recipe_of_a_windows_editor_is_read(recipe):
    path = recipe(SPO | {"optim": {"lr": 2e-5}})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert load(path).optim.lr == 2e-5


@pytest.mark.parametrize(
    "text", ["1e-5", "010", "1:30", "yes", "2026-01-02", "null", "0x1", "1_000", "a: b", "*a", "½"]
)
def test_any_text_is_dumped_as_itself(recipe, tmp_path, text):
    config = varied(load(recipe()), {"run.dir": text})
    dump(config, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml") == config


def test_an_override_fills_an_empty_section(recipe):
    assert load(recipe(SPO | {"rollout": None}), ["rollout.k=3"]).rollout.k == 3


@pytest.mark.parametrize("section", SPO)
def test_a_missing_section_is_named(recipe, section):
    assert complaint(recipe({name: tree for name, tree in SPO.items() if name != section})) == f"{section} is missing"


def test_a_missing_key_is_named_and_the_others_counted(recipe):
    assert complaint(recipe(SPO | {"run": {"dir": "x"}})) == "run.iterations is missing"
    assert complaint(recipe(SPO | {"run": {}, "model": {}})) == "model.path is missing (and 2 more)"


FILES = {"empty": b"", "list": b"- model", "broken": b"model: [", "no text": b"\xff\xfe\x00"}


@pytest.mark.parametrize(
    "name, word",
    [
        *(("empty", "NoneType"), ("list", "list"), ("broken", "YAML"), ("no text", "utf-8")),
        *(("nothing.yaml", "No such file"), (".", "Is a directory")),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path, name, word):
    for file, content in FILES.items():
        (tmp_path / file).write_bytes(content)
    assert word in complaint(tmp_path / name)


@pytest.mark.parametrize("override, word", [("data.sourse=x", "data.source?"), ("rollout.k=4", "key rollout;")])
def test_a_recipe_for_the_judge_is_checked_too(recipe, override, word):
    assert word in complaint(recipe(JUDGE_TRAINING), override, cls=JudgeTrainingConfig)


@pytest.mark.parametrize("cls, tree", [(Config, SPO), (JudgeTrainingConfig, JUDGE_TRAINING)], ids=["spo", "judge"])
def test_what_is_dumped_is_loaded_equal_with_every_default_in_it(recipe, tmp_path, cls, tree):
    config = load(recipe(tree), ["optim.lr=1.2345678901234e-05", "run.dir='Läufe/#1: a'"], cls)
    dump(config, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml", cls=cls) == config
    written = yaml.safe_load((tmp_path / "resolved.yaml").read_text(encoding="utf-8"))
    assert [
        f"{section}.{key}" if isinstance(values, dict) else section
        for section, values in written.items()
        for key in (values if isinstance(values, dict) else [section])
    ] == keys(type(config))


def test_differences_name_key_and_both_values(recipe):
    old = load(recipe())
    new = load(recipe(), ["rollout.k=8", "run.dir=runs/other", "lora.target_modules=[to_q]"])
    assert differences(old, old) == []
    assert differences(old, new) == [
        "lora.target_modules: ('to_q', 'to_k', 'to_v', 'to_out.0') -> ('to_q',)",
        "run.dir: 'runs/one' -> 'runs/other'",
        "rollout.k: 4 -> 8",
    ]
    assert differences(old, new, ignore=["run.dir", "lora.target_modules"]) == ["rollout.k: 4 -> 8"]


def test_a_configuration_is_frozen(recipe):
    config = load(recipe())
    for section, name in ((config, "run"), (config.run, "seed"), (config.optim, "lr")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)
    assert config.run.seed == 42
