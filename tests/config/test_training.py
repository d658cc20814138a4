"""config/training: recipes read, overridden, written, compared; each mistake is one sentence with the key."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from strop.engine.config.judge_training import JudgeTrainingConfig
from strop.engine.config.settings import differences, dump, keys
from strop.engine.config.training import Config, load
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
    """Writes a recipe and gives its path: a tree as YAML, or text as it is."""

    def write(content=SPO):
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        return path

    return write


def complaint(path, *overrides, cls=Config):
    """The sentence with which a recipe is refused, the file's name taken off."""
    with pytest.raises(UserError) as refusal:
        load(path, overrides, cls)
    sentence = str(refusal.value)
    assert "\n" not in sentence
    return sentence.removeprefix(f"{path}: ")


def test_a_recipe_gives_its_values_and_the_published_defaults(recipe):
    config = load(recipe(SPO | {"optim": {"lr": "5e-4", "micro_batch": 7}}))
    assert config.model.path == "models/sd"
    assert config.optim.lr == 5e-4  # YAML itself takes 5e-4 for a word
    assert config.optim.micro_batch == 7
    assert config.run.iterations == 3
    assert (config.rollout.k, config.rollout.num_steps, config.rollout.t_range) == (4, 20, (0, 751))
    assert (config.rollout.eta, config.rollout.guidance, config.rollout.threshold) == (1.0, 5.0, 0.3)
    assert (config.optim.beta, config.optim.clip, config.optim.weight_decay) == (10.0, 0.1, 1e-4)
    assert config.lora.rank == 4
    assert config.lora.target_modules == ("to_q", "to_k", "to_v", "to_out.0")
    assert config.evaluate.examiner is None


def test_a_recipe_for_the_judge(recipe):
    config = load(recipe(JUDGE_TRAINING), cls=JudgeTrainingConfig)
    assert (config.data.train, config.data.heldout, config.optim.steps, config.zero.stage) == (100, 512, 50, 2)


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
    assert {"rollout.num_steps", "rollout.look_ahead", "run.dir"} <= changed <= rollout | rest


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
        ("evaluate.examiner=my.module:make", "evaluate.examiner", "my.module:make"),
        ("evaluate.examiner=null", "evaluate.examiner", None),
        ("model={path: elsewhere}", "model.path", "elsewhere"),
    ],
)
def test_overrides_change_one_value(recipe, override, key, value):
    config = load(recipe(), [override])
    section, name = key.split(".")
    assert getattr(getattr(config, section), name) == value
    assert {line.split(":")[0] for line in differences(load(recipe()), config)} <= {key}


def test_the_last_override_wins_and_is_checked_together_with_the_others(recipe):
    config = load(recipe(), ["rollout.t_range=[300, 990]", "rollout.num_steps=40", "rollout.k=2", "rollout.k=3"])
    assert (config.rollout.t_range, config.rollout.num_steps, config.rollout.k) == ((300, 990), 40, 3)


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("optim.lr=fast", "optim.lr: found 'fast', expected a valid number"),
        ("optim.lr=true", "optim: lr is true, but must be a number"),
        ("optim.lr=0", "optim.lr: found 0, expected greater than 0"),
        ("optim.lr=.nan", "optim.lr: found nan, expected a finite number"),
        ("optim.lr=.inf", "optim.lr: found inf, expected a finite number"),
        ("optim.lr=", "optim.lr: found None, expected a valid number"),
        ("optim.clip=1", "optim.clip: found 1, expected less than 1"),
        ("optim.micro_batch=0", "optim.micro_batch: found 0, expected greater than or equal to 1"),
        ("optim.betas=[0.9]", "optim.betas.1 is missing"),
        ("optim.betas=[0.9, 0.9, 0.9]", "optim.betas: found [0.9, 0.9, 0.9], expected"),
        ("lora.target_modules=[]", "lora.target_modules: found [], expected"),
        ("lora.target_modules=to_q", "lora.target_modules: found 'to_q', expected a valid tuple"),
        ("lora.target_modules=[1]", "lora.target_modules.0: found 1, expected a valid string"),
        ("lora.rank=0", "lora.rank: found 0, expected greater than or equal to 1"),
        ("model.dtype=fp16", "model.dtype: found 'fp16', expected 'float32', 'bfloat16' or 'float16'"),
        ("model=3", "model: found 3, expected keys and values"),
        ("rollout.k=1", "rollout.k: found 1, expected greater than or equal to 2"),
        ("rollout.k=2.5", "rollout.k: found 2.5, expected a valid integer"),
        ("rollout.eta=0", "rollout.eta: found 0, expected greater than 0"),
        ("rollout.guidance=0.5", "rollout.guidance: found 0.5, expected greater than or equal to 1"),
        ("rollout.threshold=1", "rollout.threshold: found 1, expected less than 1"),
        ("rollout.num_steps=1001", "rollout.num_steps: found 1001, expected less than or equal to 1000"),
        ("rollout.look_ahead=half", "rollout.look_ahead: found 'half', expected 'full' or 'text'"),
        ("rollout.judge_every=0", "rollout.judge_every: found 0, expected greater than or equal to 1"),
        ("optim.passes=0", "optim.passes: found 0, expected greater than or equal to 1"),
        ("optim.keep_pairs=0", "optim.keep_pairs: found 0, expected greater than 0"),
        ("optim.keep_pairs=2", "optim.keep_pairs: found 2, expected less than or equal to 1"),
        (
            "rollout={look_ahead: text, guidance: 1}",
            "rollout: look_ahead is text, but with guidance 1 there is no other half to leave out; use full",
        ),
        ("rollout.t_range=[751, 0]", "rollout: t_range is [751, 0], expected the lower timestep first"),
        ("rollout.t_range=[0, 1000]", "rollout.t_range.1: found 1000, expected less than or equal to 999"),
        ("rollout.inner_steps=0", "rollout.inner_steps: found 0, expected greater than or equal to 1"),
        ("rollout.next_state=best", "rollout.next_state: found 'best', expected 'random', 'winner' or 'loser'"),
        ("model.height=1001", "model.height: found 1001, expected a multiple of 8"),
        ("judge.kind=clip", "judge.kind: found 'clip', expected 'spm', 'spm_no_step' or 'pickscore'"),
        ("run.dir=5", "run.dir: found 5, expected a valid string"),
        ("run.iterations=0", "run.iterations: found 0, expected greater than or equal to 1"),
        ("run.resume=maybe", "run.resume: found 'maybe', expected a valid boolean"),
        ("run.device=tpu", "run.device: found 'tpu', expected 'auto', 'cpu' or 'cuda'"),
        ("zero.stage=3", "zero.stage: found 3, expected 1 or 2"),
        pytest.param("optim.betas=[0.9, 1.5]", "optim.betas"),
    ],
)
def test_a_wrong_value_is_refused_with_its_key(recipe, override, sentence):
    assert complaint(recipe(), override).startswith(sentence)


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("rollout.K=3", "unknown key rollout.K; did you mean rollout.k?"),
        ("rolout.k=3", "unknown key rolout; did you mean rollout?"),
        ("optim.micro_bach=3", "unknown key optim.micro_bach; did you mean optim.micro_batch?"),
        ("optim.max_gradnorm=1", "unknown key optim.max_gradnorm; did you mean optim.max_grad_norm?"),
        ("inner_steps=3", "unknown key inner_steps; did you mean rollout.inner_steps?"),
        ("zzz=1", "unknown key zzz; docs/configuration.md lists all keys"),
        pytest.param("lr=3", "unknown key lr; did you mean optim.lr?"),
        pytest.param("run.k=3", "unknown key run.k; did you mean rollout.k?"),
    ],
)
def test_an_unknown_key_names_the_nearest(recipe, override, sentence):
    assert complaint(recipe(), override) == sentence


@pytest.mark.parametrize("override", ["optim.lr", "=3", ""])
def test_an_override_needs_key_and_value(recipe, override):
    assert complaint(recipe(), override) == (
        f"override {override!r}: expected section.key=value, such as optim.lr=1e-4"
    )


def test_an_override_cannot_go_below_a_value(recipe):
    assert complaint(recipe(), "model.path.x=1") == "override 'model.path.x=1': path is not a section"


def test_an_override_needs_valid_yaml(recipe):
    assert complaint(recipe(), "optim.lr=[") == "override 'optim.lr=[': the value is not valid YAML"


def test_an_override_fills_an_empty_section(recipe):
    assert load(recipe(SPO | {"rollout": None}), ["rollout.k=3"]).rollout.k == 3


@pytest.mark.parametrize("section", SPO)
def test_a_missing_section_is_named(recipe, section):
    assert complaint(recipe({name: tree for name, tree in SPO.items() if name != section})) == f"{section} is missing"


def test_a_missing_key_is_named_and_the_others_counted(recipe):
    assert complaint(recipe(SPO | {"run": {"dir": "x"}})) == "run.iterations is missing"
    assert complaint(recipe(SPO | {"run": {}, "model": {}})) == "model.path is missing (and 2 more)"


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("", "found NoneType, expected sections such as `model:` and `run:`"),
        ("- model", "found list, expected sections such as `model:` and `run:`"),
        ("model: [", "not valid YAML (while parsing"),
    ],
    ids=["empty", "list", "broken"],
)
def test_a_file_that_is_no_recipe_is_refused(recipe, text, sentence):
    assert complaint(recipe(text)).startswith(sentence)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    assert complaint(tmp_path / "recipe.yaml").startswith("not valid YAML ('utf-8' codec")


@pytest.mark.parametrize("name, reason", [("nothing.yaml", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, reason):
    assert complaint(tmp_path / name).startswith(f"cannot be read ({reason}); give the path of a recipe")


def test_every_refusal_starts_with_the_file(recipe):
    path = recipe()
    with pytest.raises(UserError) as refusal:
        load(path, ["rollout.k=1"])
    assert str(refusal.value).startswith(f"{path}: rollout.k")


@pytest.mark.parametrize(
    "override, sentence",
    [
        ("optim.warmup=50", "optim: warmup is 50, but must be smaller than steps = 50"),
        ("optim.clean_share=1", "optim.clean_share: found 1, expected less than 1"),
        ("data.sourse=x", "unknown key data.sourse; did you mean data.source?"),
        ("rollout.k=4", "unknown key rollout; docs/configuration.md lists all keys"),
    ],
)
def test_a_recipe_for_the_judge_is_checked_too(recipe, override, sentence):
    assert complaint(recipe(JUDGE_TRAINING), override, cls=JudgeTrainingConfig) == sentence


@pytest.mark.parametrize("cls, tree", [(Config, SPO), (JudgeTrainingConfig, JUDGE_TRAINING)], ids=["spo", "judge"])
def test_what_is_dumped_is_loaded_equal_with_every_default_in_it(recipe, tmp_path, cls, tree):
    config = load(recipe(tree), ["optim.lr=1.2345678901234e-05", "run.dir='Läufe/#1: a'"], cls)
    dump(config, tmp_path / "resolved.yaml")
    assert load(tmp_path / "resolved.yaml", cls=cls) == config
    written = yaml.safe_load((tmp_path / "resolved.yaml").read_text(encoding="utf-8"))
    assert [f"{section}.{key}" for section, values in written.items() for key in values] == keys(cls)


def test_keys_are_dotted_and_complete():
    found = keys(Config)
    assert found[:2] == ["model.path", "model.revision"]
    assert len(found) == len(set(found)) == sum(len(f.annotation.model_fields) for f in Config.model_fields.values())


def test_differences_name_key_and_both_values(recipe):
    old = load(recipe())
    new = load(recipe(), ["rollout.k=8", "run.dir=runs/other", "lora.target_modules=[to_q]"])
    assert differences(old, old) == []
    assert differences(old, new) == [
        "lora.target_modules: ('to_q', 'to_k', 'to_v', 'to_out.0') -> ('to_q',)",
        "rollout.k: 4 -> 8",
        "run.dir: 'runs/one' -> 'runs/other'",
    ]
    assert differences(old, new, ignore=["run.dir", "lora.target_modules"]) == ["rollout.k: 4 -> 8"]


def test_a_configuration_is_frozen(recipe):
    config = load(recipe())
    for section, name in ((config, "run"), (config.run, "seed"), (config.optim, "lr")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, name, 1)
    assert config.run.seed == 42


def test_every_key_has_a_description():
    for cls in (Config, JudgeTrainingConfig):
        for name, section in cls.model_fields.items():
            for key, field in section.annotation.model_fields.items():
                assert field.description, f"{name}.{key}"
