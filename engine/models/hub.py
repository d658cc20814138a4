"""Where a model lies: a path of this machine as it is, anything else as a repository of the Hugging Face hub.

Only files are fetched, never code; what has been fetched before is used again without the network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..errors import UserError

REPOSITORY = re.compile(r"(?P<owner_name>[\w.-]+/[\w.-]+)(/(?P<file>.+\.\w+))?")


def fetch(path: str, revision: str | None, key: str, patterns: Sequence[str]) -> Path:
    """The local file or folder of `path`; of a hub id the snapshot folder, with the files that match `patterns`.

    A hub id may go on with a file of the repository, owner/name/file, and then that file is meant.
    key: where in the configuration it stands, for the message. Raises UserError where there is neither.
    """
    local = Path(path).expanduser()
    if local.exists():
        if revision is not None:
            raise UserError(f"{key}: {path} is on this machine, where revision {revision} means nothing; leave it out")
        return local
    meant = REPOSITORY.fullmatch(path)
    if not meant:
        raise UserError(f"{key}: no such file or folder {path}; expected one, or a hub id such as owner/name")
    file = meant["file"]
    try:
        folder = snapshot_download(
            meant["owner_name"], revision=revision, allow_patterns=[file] if file else list(patterns)
        )
    except LocalEntryNotFoundError:
        raise UserError(
            f"{key}: {path} is no file or folder here, and the hub, where it would be a repository, cannot be reached"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        found = " ".join(str(error).split())
        raise UserError(f"{key}: {path} is no file or folder here, and the hub does not give it ({found})") from None
    if file and not (Path(folder) / file).is_file():
        raise UserError(f"{key}: the hub's repository {meant['owner_name']} has no file {file}")
    return Path(folder) / (file or "")
