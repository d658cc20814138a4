"""judge/files: every form of a judge read bit for bit, and every unfit one refused in a sentence."""

import json
import pickle
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from strop.engine.config.training import JudgeConfig
from strop.engine.errors import UserError
from strop.engine.judge import files as judge_files
from strop.engine.judge.clip import TimeConditionedCLIP
from strop.engine.judge.files import JudgeFiles, is_modulation, load, save

RNG = torch.Generator()
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def read(path, kind="spm", components=None, rng=None):
    return load(JudgeConfig(path=str(path), kind=kind, components=components and str(components)), rng)


def prefixed(state):
    """The names of the published weights."""
    return {f"model.{name}": value for name, value in state.items()}


def assert_holds(files, state):
    found = files.clip.state_dict()
    assert found.keys() == state.keys()
    assert {value.device.type for value in [*found.values(), *files.clip.buffers()]} == {"cpu"}
    for name, value in state.items():
        assert torch.equal(found[name], value.float()), name


def shard(state, folder, name, write):
    """Two shards and their index, as transformers names them."""
    names = sorted(state)
    stem, suffix = name.rsplit(".", 1)
    index = {}
    for i, part in enumerate((names[:40], names[40:]), start=1):
        file = f"{stem}-0000{i}-of-00002.{suffix}"
        write({n: state[n] for n in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.fixture
def folder(clip_folder, tmp_path):
    """A copy of the plain CLIP folder, to be changed."""
    return shutil.copytree(clip_folder, tmp_path / "judge")


@pytest.fixture
def bare(folder):
    """As PickScore_v1 is on the hub: config.json and weights, no tokenizer and no preprocessor."""
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    return folder


@pytest.fixture
def released(spm, tmp_path):
    """As the authors published theirs: one file of tensors."""
    torch.save(prefixed(spm.state), tmp_path / "spm.bin")
    return tmp_path / "spm.bin"


@pytest.fixture
def saved(spm, tokenizer, tmp_path):
    """A judge folder of our own."""
    clip = TimeConditionedCLIP(CLIPModel(spm.config))
    clip.load_state_dict(spm.state)
    save(tmp_path / "own", JudgeFiles(clip, tokenizer, spm.mean, spm.std), "spm")
    return tmp_path / "own"


def test_a_clip_folder(clip_folder, spm):
    files = read(clip_folder, "pickscore")
    assert_holds(files, spm.plain)
    assert (files.mean, files.std) == (spm.mean, spm.std)
    assert len(files.tokenizer) == 64


def test_a_clip_folder_to_be_trained_starts_as_the_identity(clip_folder, spm):
    files = read(clip_folder, "spm", rng=RNG.manual_seed(5))
    expected = TimeConditionedCLIP(CLIPModel(spm.config))
    expected.load_state_dict(spm.state)
    expected.reset_modulation(RNG.manual_seed(5))
    assert_holds(files, {n: expected.state_dict()[n] if is_modulation(n) else v for n, v in spm.state.items()})


def test_a_folder_without_tokenizer_beside_its_components(bare, clip_folder, spm):
    assert_holds(read(bare, "pickscore", clip_folder), spm.plain)


@pytest.mark.parametrize("kind", ["spm", "spm_no_step"])
def test_a_judge_goes_on_being_trained(saved, spm, kind):
    (saved / "judge.json").write_text(json.dumps({"kind": kind}))
    assert_holds(read(saved, kind, rng=RNG), spm.state)


def test_a_folder_of_our_own(saved, spm):
    assert json.loads((saved / "judge.json").read_text()) == {"kind": "spm"}
    assert_holds(read(saved), spm.state)


def test_a_folder_without_a_record_is_a_step_aware_judge(saved, spm):
    (saved / "judge.json").unlink()
    assert_holds(read(saved), spm.state)


def test_the_released_file(released, clip_folder, spm):
    assert_holds(read(released, components=clip_folder), spm.state)


def test_the_released_file_as_safetensors(spm, clip_folder, tmp_path):
    save_file(prefixed(spm.state), tmp_path / "spm.safetensors")
    assert_holds(read(tmp_path / "spm.safetensors", components=clip_folder), spm.state)


def test_the_released_file_with_position_ids(released, clip_folder, spm):
    ids = {"text_model": torch.arange(16).unsqueeze(0), "vision_model": torch.arange(17)}
    ids = {f"{tower}.embeddings.position_ids": value for tower, value in ids.items()}
    torch.save(prefixed(spm.state | ids), released)
    assert_holds(read(released, components=clip_folder), spm.state)


def test_a_pickle_beside_safetensors_is_not_opened(clip_folder, folder, spm):
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")
    assert_holds(read(folder, "pickscore"), spm.plain)


def test_a_clip_folder_with_a_pickle_alone(folder, spm):
    (folder / "model.safetensors").unlink()
    torch.save(spm.plain, folder / "pytorch_model.bin")
    assert_holds(read(folder, "pickscore"), spm.plain)


@pytest.mark.parametrize("name, write", [*zip(WEIGHTS, (save_file, torch.save), strict=True)], ids=WEIGHTS)
def test_shards(clip_folder, spm, tmp_path, name, write):
    """Of a judge with the prefix, in a folder that holds nothing else."""
    shard(prefixed(spm.state), tmp_path, name, write)
    assert_holds(read(tmp_path, components=clip_folder), spm.state)
    assert_holds(read(tmp_path / f"{name}.index.json", components=clip_folder), spm.state)


def test_shards_as_transformers_writes_them(folder, spm):
    clip = CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    clip.save_pretrained(folder, max_shard_size="100KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    assert_holds(read(folder, "pickscore"), spm.plain)


def test_half_precision_is_widened(folder, spm):
    half = {name: value.half() for name, value in spm.plain.items()}
    save_file(half, folder / "model.safetensors")
    files = read(folder, "pickscore")
    assert {p.dtype for p in files.clip.parameters()} == {torch.float32}
    assert_holds(files, half)


@pytest.mark.parametrize("weights, fetched", [*zip(WEIGHTS, (1, 2), strict=True)], ids=WEIGHTS)
def test_of_a_hub_id_only_what_is_needed_comes(bare, clip_folder, spm, tmp_path, monkeypatch, weights, fetched):
    """A pickle only where there are no safetensors; other things never."""
    if weights == "pytorch_model.bin":
        (bare / "model.safetensors").unlink()
    torch.save(spm.plain, bare / "pytorch_model.bin")
    for name in ("optimizer.bin", "flax_model.msgpack", "open_clip_model.safetensors"):
        (bare / name).write_bytes(b"large")
    hub, snapshots, asked = {"owner/pickscore": bare, "owner/clip": clip_folder}, tmp_path / "snapshots", []

    def fetch(path, revision, key, patterns):
        asked.append((path, revision, key))
        (snapshots / path).mkdir(parents=True, exist_ok=True)
        for file in hub[path].iterdir():
            if any(fnmatch(file.name, pattern) for pattern in patterns):
                shutil.copy(file, snapshots / path)
        return snapshots / path

    monkeypatch.setattr(judge_files, "fetch", fetch)
    judge = JudgeConfig(path="owner/pickscore", revision="abc", components="owner/clip", kind="pickscore")
    assert_holds(load(judge, None), spm.plain)
    assert asked == [("owner/pickscore", "abc", "judge.path")] * fetched + [("owner/clip", None, "judge.components")]
    assert sorted(file.name for file in (snapshots / "owner/pickscore").iterdir()) == ["config.json", weights]
    assert not (snapshots / "owner/clip/model.safetensors").exists()


def test_saved_settings_are_what_other_tools_expect(saved, spm):
    pixels = json.loads((saved / "preprocessor_config.json").read_text())
    assert pixels == {"image_mean": spm.mean, "image_std": spm.std, "size": 56}
    assert CLIPModel.config_class.from_pretrained(saved).vision_config.hidden_size == 64


def test_full_size_names_survive_the_prefix():
    names = ["logit_scale", "t_embedder.mlp.0.weight", "vision_model.encoder.layers.31.adaLN_modulation.1.bias"]
    state = {name: torch.empty(1, device="meta") for name in names}
    assert list(judge_files.without_prefix(prefixed(state))) == names
    assert list(judge_files.without_prefix(state)) == names
    mixed = {"model.logit_scale": state["logit_scale"], **state}
    assert judge_files.without_prefix(mixed) == mixed


def refusal(*args, **options):
    """The sentence of the UserError."""
    with pytest.raises(UserError) as refused:
        read(*args, **options)
    sentence = str(refused.value)
    assert "\n" not in sentence
    return sentence


POSITIONS = "text_model.embeddings.position_ids"
UNFIT = {  # what is done to the state of a judge, what the sentence lists
    "missing": (lambda s: s.pop("visual_projection.weight"), "1 missing (visual_projection.weight)"),
    "unexpected": (lambda s: s.update(stranger=torch.zeros(1)), "1 unexpected (stranger)"),
    "half a modulation": (
        lambda s: [s.pop(n) for n in [*s] if n.startswith("t_embedder.")],
        "4 missing (t_embedder.mlp.0.bias, t_embedder.mlp.0.weight, t_embedder.mlp.2.bias, t_embedder.mlp.2.weight)",
    ),
    "shape": (
        lambda s: s.update({"visual_projection.weight": torch.zeros(2, 3)}),
        "1 of the wrong shape (visual_projection.weight of (2, 3) for (32, 64))",
    ),
    "several": (
        lambda s: s.update(stranger=s.pop("t_embedder.mlp.0.bias"), logit_scale=torch.zeros(2)),
        "1 missing (t_embedder.mlp.0.bias); 1 unexpected (stranger); 1 of the wrong shape (logit_scale of (2,) for ())",
    ),
    "positions": (lambda s: s.update({POSITIONS: torch.arange(1, 17)}), f"1 not counting from 0 ({POSITIONS})"),
    "more positions": (lambda s: s.update({POSITIONS: torch.arange(77)}), f"1 not counting from 0 ({POSITIONS})"),
    "another network": (lambda s: (s.clear(), s.update(other=torch.zeros(3))), "1 unexpected (other)"),
    "very many": (lambda s: s.update({f"x{i:02}": torch.zeros(1) for i in range(32)}), "x18, x19 and 12 more)"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit_tensors_are_listed(released, clip_folder, spm, case):
    (spoil, listed), state = UNFIT[case], dict(spm.state)
    spoil(state)
    torch.save(prefixed(state), released)
    for kind in ("spm", "pickscore"):  # whatever kind they are not
        sentence = refusal(released, kind, clip_folder)
        assert sentence.startswith(f"judge.path: the tensors in {released} do not fit ")
        assert listed in sentence


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


SPOILT = {  # what is done to the released file, what the sentence says
    "text": (lambda file: file.write_text("no tensors"), "no PyTorch file"),
    "empty": (lambda file: file.write_bytes(b""), "no PyTorch file"),
    "truncated": (truncate, "no PyTorch file"),
    "code": (lambda file: file.write_bytes(pickle.dumps(print, protocol=2)), "no PyTorch file"),
    "an object": (lambda file: torch.save(torch.nn.Linear(2, 2), file), "no PyTorch file"),
    "a list": (lambda file: torch.save([torch.zeros(1)], file), "no state dict; found list"),
    "nested": (lambda file: torch.save({"module": {}}, file), "no state dict; found dict under 'module'"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_file_that_holds_no_tensors_is_refused(released, clip_folder, case):
    spoil, words = SPOILT[case]
    spoil(released)
    sentence = refusal(released, components=clip_folder)
    assert sentence.startswith(f"judge.path: {released} ")
    assert words in sentence


def without(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


SETTINGS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")
LACKING = {  # what is done to a folder or to its components, the key, what the sentence names
    "tokenizer": (without(*SETTINGS), None, "judge.components", "has no tokenizer"),
    "preprocessor": (without(SETTINGS[2]), None, "judge.components", "has no preprocessor_config.json"),
    "components too": (without(*SETTINGS), without(*SETTINGS), "judge.components", "have no tokenizer"),
    "weights": (without(WEIGHTS[0]), None, "judge.path", "has neither model.safetensors nor pytorch_model.bin"),
    "cut": (lambda folder: truncate(folder / WEIGHTS[0]), None, "judge.path", "cannot be read as safetensors"),
}


@pytest.mark.parametrize("case", LACKING)
def test_a_folder_that_lacks_something_is_refused(folder, clip_folder, tmp_path, case):
    change, change_other, key, words = LACKING[case]
    change(folder)
    if change_other:
        change_other(other := shutil.copytree(clip_folder, tmp_path / "other"))
    sentence = refusal(folder, "pickscore", other if change_other else None)
    assert sentence.startswith(f"{key}: {folder}")
    assert words in sentence
    assert key == "judge.path" or "laion/CLIP-ViT-H-14-laion2B-s32B-b79K" in sentence


def test_a_file_without_components_is_refused(released):
    assert refusal(released).startswith(f"judge.components: {released} has no config.json; ")


def test_a_tokenizer_in_two_files(folder, spm):
    """As older repositories have it; of half of it transformers would make a tokenizer of letters."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    assert refusal(folder, "pickscore").startswith(f"judge.components: {folder} has no merges.txt; ")
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert read(folder, "pickscore").tokenizer("a dog").input_ids == [0, 27, 4, 15, 33, 63]


def test_a_tokenizer_of_another_model_is_refused(bare, clip_folder, tmp_path):
    other = shutil.copytree(clip_folder, tmp_path / "other")
    tokens = json.loads((other / "tokenizer.json").read_text())
    tokens["model"]["vocab"] |= {f"more{i}": 64 + i for i in range(6)}
    (other / "tokenizer.json").write_text(json.dumps(tokens))
    sentence = refusal(bare, "pickscore", other)
    assert sentence.startswith(f"judge.components: the tokenizer in {other} has 70 tokens")
    assert "embeddings of 64" in sentence


@pytest.mark.parametrize(
    "recorded, asked, training, words",
    [
        ("spm", "spm_no_step", False, "set judge.kind=spm"),
        ("spm", "pickscore", False, "set judge.kind=spm"),
        ("spm_no_step", "spm", False, "set judge.kind=spm_no_step"),
        ("spm_no_step", "pickscore", False, "set judge.kind=spm_no_step"),
        ("spm", "spm_no_step", True, "set judge.kind=spm"),
        ("spm", "pickscore", True, "not trained"),
        (None, "spm", False, "set judge.kind=pickscore"),
        (None, "spm_no_step", False, "set judge.kind=pickscore"),
        (None, "pickscore", True, "not trained"),
    ],
)
def test_a_judge_of_another_kind_is_refused(saved, clip_folder, recorded, asked, training, words):
    """None: a plain CLIP."""
    if recorded:
        (saved / "judge.json").write_text(json.dumps({"kind": recorded}))
    sentence = refusal(saved if recorded else clip_folder, asked, rng=RNG if training else None)
    assert sentence.startswith(f"judge.kind: found {asked}, ")
    assert sentence.endswith(words) or words in sentence


def test_a_plain_clip_that_was_saved_is_read_again(clip_folder, spm, tmp_path):
    save(tmp_path / "again", read(clip_folder, "pickscore"), "pickscore")
    assert_holds(read(tmp_path / "again", "pickscore"), spm.plain)


def test_a_missing_shard_is_named(spm, clip_folder, tmp_path):
    shard(spm.state, tmp_path, "model.safetensors", save_file)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    sentence = refusal(tmp_path, components=clip_folder)
    assert "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names" in sentence


def test_other_things_are_refused(tiny_folder, tmp_path, clip_folder):
    assert "of type UNet2DConditionModel, expected clip" in refusal(tiny_folder / "unet")
    (tmp_path / "judge.ckpt").write_text("")
    assert "judge.ckpt, expected a folder" in refusal(tmp_path / "judge.ckpt", components=clip_folder)
    assert "nowhere" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "name, content",
    [
        ("config.json", "{"),
        ("config.json", "[]"),
        ("config.json", '{"model_type": "clip", "vision_config": {"hidden_size": "wide"}}'),
        ("config.json", '{"model_type": "clip", "vision_config": {"hidden_size": 65}}'),
        ("model.safetensors", "no tensors"),
        ("preprocessor_config.json", "{"),
        ("preprocessor_config.json", '{"image_mean": 0.5, "image_std": [1, 1, 1]}'),
        ("preprocessor_config.json", '{"image_mean": ["a", 1, 1], "image_std": [1, 1, 1]}'),
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
    ],
)
@pytest.mark.parametrize("key", ["judge.path", "judge.components"])
def test_a_broken_file_is_refused_by_key_and_folder(folder, clip_folder, tmp_path, key, name, content):
    other = shutil.copytree(clip_folder, tmp_path / "other")
    if key == "judge.components" and name != "model.safetensors":
        without("config.json", *SETTINGS)(folder)
        (other / name).write_text(content)
    else:
        key = "judge.path"
        (folder / name).write_text(content)
    sentence = refusal(folder, "pickscore", other)
    assert sentence.startswith(f"{key}: ")
    assert str(folder if key == "judge.path" else other) in sentence


@pytest.mark.parametrize("content", ['{"kind": "best"}', '{"kind": "pickscore"}', "["])
def test_a_broken_record_is_refused_by_name(saved, content):
    (saved / "judge.json").write_text(content)
    assert refusal(saved).startswith(f"judge.path: {saved / 'judge.json'} ")


def test_the_state_is_emptied_into_memory_of_its_own(spm):
    with torch.device("meta"):
        clip = TimeConditionedCLIP(CLIPModel(spm.config))
    state = dict(spm.state)
    judge_files.fill(clip, state, set())
    assert not state
    assert not clip.state_dict()["logit_scale"].is_meta
    original = {value.data_ptr() for value in spm.state.values()}
    assert original.isdisjoint(value.data_ptr() for value in clip.state_dict().values())


def test_the_tinyworld_judge_is_still_read():
    weights = Path(__file__).parents[2] / "bench" / "tinyworld" / "weights" / "judge"
    assert_holds(read(weights), load_file(weights / "model.safetensors"))
