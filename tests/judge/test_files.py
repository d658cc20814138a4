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
    actual = files.clip.state_dict()
    assert actual.keys() == state.keys()
    assert {value.device.type for value in [*actual.values(), *files.clip.buffers()]} == {"cpu"}
    for name, value in state.items():
        assert torch.equal(actual[name], value.float()), name


def shard(state, folder, name):
    """Two shards and their index, as transformers names them."""
    names, index = sorted(state), {}
    stem, suffix = name.rsplit(".", 1)
    for i, part in enumerate((names[:40], names[40:]), start=1):
        file = f"{stem}-0000{i}-of-00002.{suffix}"
        (save_file if suffix == "safetensors" else torch.save)({n: state[n] for n in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder / f"{name}.index.json"


def without(*names):
    return lambda folder, *_: [(folder / name).unlink() for name in names]


def written(name, content):
    return lambda folder, *_: (folder / name).write_text(content)


def changed(path, change, beside):
    """The path after the change, which may give another."""
    other = change(path, beside) if change else None
    return other if isinstance(other, Path) else path


@pytest.fixture
def folder(clip_folder, tmp_path):
    """A copy of the plain CLIP folder, to be changed."""
    return shutil.copytree(clip_folder, tmp_path / "judge")


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


def pickled(folder, spm):
    (folder / "model.safetensors").unlink()
    torch.save(spm.plain, folder / "pytorch_model.bin")


def sharded(folder, spm):
    clip = CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    clip.save_pretrained(folder, max_shard_size="100KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1


def as_safetensors(file, spm):
    file = file.with_name("judge.safetensors")
    save_file(prefixed(spm.state), file)
    return file


def with_position_ids(file, spm):
    ids = {"text_model": torch.arange(16).unsqueeze(0), "vision_model": torch.arange(17)}
    ids = {f"{tower}.embeddings.position_ids": value for tower, value in ids.items()}
    torch.save(prefixed(spm.state | ids), file)


SETTINGS = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def shards(name, place):
    """Of a judge with the prefix, in a folder that holds nothing else: that folder, or the index in it."""

    def change(file, spm):
        file.unlink()
        index = shard(prefixed(spm.state), file.parent, name)
        return index if place == "index" else index.parent

    return change


FORMS = {  # where it is, what is done to it, the kind of judge, whether components are named
    "a CLIP": ("folder", None, "pickscore", False),
    "a CLIP without settings": ("folder", without(*SETTINGS), "pickscore", True),
    "a CLIP as a pickle": ("folder", pickled, "pickscore", False),
    "a CLIP beside a pickle": ("folder", written(WEIGHTS[1], "no pickle"), "pickscore", False),
    "a CLIP in shards": ("folder", sharded, "pickscore", False),
    "our own": ("saved", None, "spm", False),
    "our own without a record": ("saved", without("judge.json"), "spm", False),
    "the released": ("released", None, "spm", True),
    "the released as safetensors": ("released", as_safetensors, "spm", True),
    "the released with position ids": ("released", with_position_ids, "spm", True),
    **{
        f"shards of {name} by {place}": ("released", shards(name, place), "spm", True)
        for name in WEIGHTS
        for place in ("index", "folder")
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_bit_for_bit(form, request, clip_folder, spm):
    fixture, change, kind, components = FORMS[form]
    path = changed(request.getfixturevalue(fixture), change, spm)
    assert_holds(read(path, kind, clip_folder if components else None), spm.plain if kind == "pickscore" else spm.state)


def test_what_is_read_and_saved_beside_the_weights(clip_folder, saved, spm, tmp_path):
    """A plain CLIP that was saved is read again; other tools find what they expect."""
    files = read(clip_folder, "pickscore")
    assert (files.mean, files.std, len(files.tokenizer)) == (spm.mean, spm.std, 64)
    save(tmp_path / "again", files, "pickscore")
    assert_holds(read(tmp_path / "again", "pickscore"), spm.plain)
    pixels = json.loads((saved / "preprocessor_config.json").read_text())
    assert pixels == {"image_mean": spm.mean, "image_std": spm.std, "size": 56}
    assert CLIPModel.config_class.from_pretrained(saved).vision_config.hidden_size == 64
    assert json.loads((saved / "judge.json").read_text()) == {"kind": "spm"}


def test_a_clip_to_be_trained_starts_as_the_identity(clip_folder, spm):
    expected = TimeConditionedCLIP(CLIPModel(spm.config))
    expected.load_state_dict(spm.state)
    expected.reset_modulation(RNG.manual_seed(5))
    drawn = {name: value for name, value in expected.state_dict().items() if is_modulation(name)}
    assert_holds(read(clip_folder, "spm", rng=RNG.manual_seed(5)), spm.state | drawn)


@pytest.mark.parametrize("kind", ["spm", "spm_no_step"])
def test_a_judge_goes_on_being_trained(saved, spm, kind):
    (saved / "judge.json").write_text(json.dumps({"kind": kind}))
    assert_holds(read(saved, kind, rng=RNG), spm.state)


def test_half_precision_is_widened(folder, spm):
    half = {name: value.half() for name, value in spm.plain.items()}
    save_file(half, folder / "model.safetensors")
    files = read(folder, "pickscore")
    assert {p.dtype for p in files.clip.parameters()} == {torch.float32}
    assert_holds(files, half)


@pytest.mark.parametrize("weights, fetched", [*zip(WEIGHTS, (1, 2), strict=True)], ids=WEIGHTS)
def test_of_a_hub_id_only_what_is_needed_comes(folder, clip_folder, spm, tmp_path, monkeypatch, weights, fetched):
    """A pickle only where there are no safetensors; other things never."""
    without(*SETTINGS, *(WEIGHTS[:1] if weights == WEIGHTS[1] else ()))(folder)
    torch.save(spm.plain, folder / "pytorch_model.bin")
    for name in ("optimizer.bin", "flax_model.msgpack", "open_clip_model.safetensors"):
        (folder / name).write_bytes(b"large")
    hub, snapshots, asked = {"owner/pickscore": folder, "owner/clip": clip_folder}, tmp_path / "snapshots", []

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


def test_a_prefix_is_removed_only_of_all_names():
    mixed = {"model.logit_scale": torch.zeros(1), "logit_scale": torch.ones(1)}
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
    "half a modulation": (
        lambda s: [s.pop(n) for n in [*s] if n.startswith("t_embedder.")],
        "4 missing (t_embedder.mlp.0.bias, t_embedder.mlp.0.weight, t_embedder.mlp.2.bias, t_embedder.mlp.2.weight)",
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
        assert sentence.startswith("judge.path: ")
        assert str(released) in sentence
        assert listed in sentence


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1000])


def one_shard(file, other):
    index = shard(prefixed(torch.load(file, weights_only=True)), file.parent, WEIGHTS[0])
    (file.parent / "model-00002-of-00002.safetensors").unlink()
    return index.parent


def index_of(*names):
    """Puts an index of one shard in place of the weights."""

    def change(folder, other):
        (folder / WEIGHTS[0]).unlink()
        content = {"weight_map": dict.fromkeys(["logit_scale"], *names)} if names else {}
        (folder / f"{WEIGHTS[0]}.index.json").write_text(json.dumps(content))

    return change


def two_file_tokenizer(folder, other):
    """As older repositories have it; of half of it transformers would make a tokenizer of letters."""
    vocabulary = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))


def other_tokenizer(folder, other):
    without(*SETTINGS)(folder)
    tokens = json.loads((other / "tokenizer.json").read_text())
    tokens["model"]["vocab"] |= {f"more{i}": 64 + i for i in range(6)}
    (other / "tokenizer.json").write_text(json.dumps(tokens))


def nameless(file, other):
    return file.rename(file.with_suffix(".ckpt"))


HUB = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
NO_STEP, BROKEN = written("judge.json", '{"kind": "spm_no_step"}'), ('{"kind": "best"}', '{"kind": "pickscore"}', "[")
REFUSED = {  # where it is, what is done to it and to its components; the kind; are they named; words of the sentence
    "text": ("released", lambda file, _: file.write_text("no tensors"), "spm", True, "path", "{path}"),
    "empty": ("released", lambda file, _: file.write_bytes(b""), "spm", True, "path", "{path}"),
    "truncated": ("released", lambda file, _: truncate(file), "spm", True, "path", "{path}"),
    "code": ("released", lambda file, _: file.write_bytes(pickle.dumps(print, 2)), "spm", True, "path", "{path}"),
    "object": ("released", lambda file, _: torch.save(torch.nn.Linear(2, 2), file), "spm", True, "path", "{path}"),
    "list": ("released", lambda file, _: torch.save([torch.zeros(1)], file), "spm", True, "path", "{path}", "list"),
    "nested": ("released", lambda file, _: torch.save({"module": {}}, file), "spm", True, "path", "dict", "'module'"),
    "suffix": ("released", nameless, "spm", True, "path", "spm.ckpt"),
    "one shard": ("released", one_shard, "spm", True, "path", "model-00002-of-00002", "model.safetensors.index.json"),
    **{
        f"shard {name}": ("saved", index_of(name), "spm", False, "path", "model.safetensors.index.json", repr(name)[:9])
        for name in (3, None, "../model.safetensors", "/model.safetensors", "..", "", ["a"])
    },
    "no map": ("saved", index_of(), "spm", False, "path", "weight_map"),
    "no components": ("released", None, "spm", False, "components", "{path}", "config.json"),
    "no tokenizer": ("folder", without(*SETTINGS), "pickscore", False, "components", "{path}", "tokenizer", HUB),
    "no pixels": ("folder", without(SETTINGS[2]), "pickscore", False, "components", "{path}", SETTINGS[2], HUB),
    "neither tokenizer": (
        "folder",
        lambda *both: [without(*SETTINGS)(folder) for folder in both],
        *("pickscore", True, "components", "{path}", "{other}", "tokenizer", HUB),
    ),
    "half a tokenizer": ("folder", two_file_tokenizer, "pickscore", False, "components", "{path}", "merges.txt"),
    "another tokenizer": ("folder", other_tokenizer, "pickscore", True, "components", "{other}", "70 tokens", "64"),
    "no weights": ("folder", without(WEIGHTS[0]), "pickscore", False, "path", "{path}", *WEIGHTS),
    "cut": ("folder", lambda folder, _: truncate(folder / WEIGHTS[0]), "pickscore", False, "path", "{path}"),
    "spm as spm_no_step": ("saved", None, "spm_no_step", False, "kind", "found spm_no_step", "judge.kind=spm"),
    "spm as pickscore": ("saved", None, "pickscore", False, "kind", "found pickscore", "judge.kind=spm"),
    "spm_no_step as spm": ("saved", NO_STEP, "spm", False, "kind", "found spm,", "judge.kind=spm_no_step"),
    "spm_no_step as pickscore": ("saved", NO_STEP, "pickscore", False, "kind", "judge.kind=spm_no_step"),
    "CLIP as spm": ("folder", None, "spm", False, "kind", "found spm,", "judge.kind=pickscore"),
    "CLIP as spm_no_step": ("folder", None, "spm_no_step", False, "kind", "judge.kind=pickscore"),
    **{f"record {text}": ("saved", written("judge.json", text), "spm", False, "path", "judge.json") for text in BROKEN},
    "another model": ("tiny_folder", lambda folder, _: folder / "unet", "spm", False, "path", "UNet2DConditionModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_judge_is_refused_by_name(case, request, clip_folder, tmp_path):
    fixture, change, kind, components, key, *words = REFUSED[case]
    other = shutil.copytree(clip_folder, tmp_path / "other")
    path = changed(request.getfixturevalue(fixture), change, other)
    sentence = refusal(path, kind, other if components else None)
    assert sentence.startswith(f"judge.{key}: ")
    assert [word for word in (word.format(path=path, other=other) for word in words) if word not in sentence] == []


@pytest.mark.parametrize(
    "fixture, asked, word",
    [("saved", "spm_no_step", "judge.kind=spm"), ("saved", "pickscore", "trained"), ("folder", "pickscore", "trained")],
)
def test_a_judge_of_another_kind_is_not_trained(request, fixture, asked, word):
    sentence = refusal(request.getfixturevalue(fixture), asked, rng=RNG)
    assert sentence.startswith(f"judge.kind: found {asked}, ")
    assert word in sentence


def test_a_tokenizer_in_two_files(folder, spm):
    two_file_tokenizer(folder, None)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert read(folder, "pickscore").tokenizer("a dog").input_ids == [0, 27, 4, 15, 33, 63]


BROKEN_FILES = [
    ("config.json", "{"),
    ("config.json", "[]"),
    ("config.json", '{"model_type": "clip", "vision_config": {"hidden_size": "wide"}}'),
    ("config.json", '{"model_type": "clip", "vision_config": {"hidden_size": 65}}'),
    ("preprocessor_config.json", "{"),
    ("preprocessor_config.json", '{"image_mean": 0.5, "image_std": [1, 1, 1]}'),
    ("preprocessor_config.json", '{"image_mean": ["a", 1, 1], "image_std": [1, 1, 1]}'),
    ("tokenizer.json", "{"),
    ("tokenizer.json", "{}"),
]


@pytest.mark.parametrize("name, content", BROKEN_FILES)
@pytest.mark.parametrize("key", ["judge.path", "judge.components"])
def test_a_broken_file_is_refused_by_key_and_folder(folder, clip_folder, tmp_path, key, name, content):
    other = shutil.copytree(clip_folder, tmp_path / "other")
    if key == "judge.components":
        without("config.json", *SETTINGS)(folder)
    broken = folder if key == "judge.path" else other
    (broken / name).write_text(content)
    sentence = refusal(folder, "pickscore", other)
    assert sentence.startswith(f"{key}: ")
    assert str(broken) in sentence


def test_the_state_is_emptied_into_memory_of_its_own(spm):
    with torch.device("meta"):
        clip = TimeConditionedCLIP(CLIPModel(spm.config))
    state = dict(spm.state)
    judge_files.fill(clip, state, set(), "key: file")
    assert not state
    assert not clip.state_dict()["logit_scale"].is_meta
    original = {value.data_ptr() for value in spm.state.values()}
    assert original.isdisjoint(value.data_ptr() for value in clip.state_dict().values())


def test_the_tinyworld_judge_is_still_read():
    weights = Path(__file__).parents[2] / "bench" / "tinyworld" / "weights" / "judge"
    assert_holds(read(weights), load_file(weights / "model.safetensors"))
