"""Finds the files of a model: a path of this machine is taken as it is, anything else is a Hugging Face hub id.

Only files are fetched, never code; files that were fetched before are used again without the network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..config.training import JudgeConfig, ModelConfig
from ..errors import UserError, one_line
from ..user_files import user_path

REPOSITORY = re.compile(r"(?P<owner_name>[\w.-]+/[\w.-]+)(/(?P<file>.+\.\w+))?")


def fetch(path: str, revision: str | None, key: str, patterns: Sequence[str]) -> Path:
    """Returns the local file or folder of `path`; for a hub id, the snapshot with the files that match `patterns`.

    A hub id may name one file of its repository, owner/name/file; then that file is returned. key: the configuration
    key that holds `path`, for messages. Raises UserError if neither a local path nor a reachable repository exists.
    """
    local = user_path(path)
    if local.exists():
        if not (local.is_dir() or local.is_file()):
            raise UserError(f"{key}: {path} is a pipe or a device, expected a file or a folder")
        if revision is not None:
            raise UserError(f"{key}: {path} is on this machine, where revision {revision} means nothing; leave it out")
        return local
    hub_id = REPOSITORY.fullmatch(path)
    if not hub_id:
        raise UserError(f"{key}: no such file or folder {path}; expected one, or a hub id such as owner/name")
    file = hub_id["file"]
    try:
        folder = snapshot_download(
            hub_id["owner_name"], revision=revision, allow_patterns=[file] if file else list(patterns)
        )
    except LocalEntryNotFoundError:
        raise UserError(
            f"{key}: {path} is no file or folder here, and the hub, where it would be a repository, cannot be reached"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{key}: {path} is no file or folder here, and the hub does not give it ({one_line(error)})"
        ) from None
    if file and not (Path(folder) / file).is_file():
        raise UserError(f"{key}: the hub's repository {hub_id['owner_name']} has no file {file}")
    return Path(folder) / (file or "")


def source(path: str, revision: str | None, key: str) -> Path | str:
    """Returns the local file or folder that `path` means, or for a hub id a text of it and its commit.

    Raises UserError as `fetch`.
    """
    found = fetch(path, revision, key, ())
    parts = found.parts
    if user_path(path).exists() or "snapshots" not in parts:
        return found
    return f"{path}, commit {parts[parts.index('snapshots') + 1]}"


def model_inputs(model: ModelConfig, judge: JudgeConfig) -> dict[str, Path | str]:
    """Returns the `source` of all that the sections `model` and `judge` name, by key."""
    named = {
        "model.path": (model.path, model.revision),
        "model.vae": (model.vae, None),
        "model.components": (model.components, None),
        "judge.path": (judge.path, judge.revision),
        "judge.components": (judge.components, None),
    }
    return {key: source(path, revision, key) for key, (path, revision) in named.items() if path}
