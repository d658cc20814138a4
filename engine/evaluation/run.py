"""Runs `strop evaluate`: draws with every system, scores every image, compares, and writes what is found.

What is done already is not done again, so that the same command goes on where it was stopped. evaluate_lora.py is the
command.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch

from ..errors import UserError
from ..models.base_model import BaseModel, quiet_libraries
from ..runtime.output import check_free, write_all
from ..runtime.ranks import TIMEOUT, Ranks, gather_rows, rank_slice, start
from ..runtime.watch import Watch
from ..scorers.names import NAMES as SCORERS
from ..user_files import user_path
from .arguments import Request
from .draw import Work, draw
from .gallery import gallery
from .geneval import read_metadata
from .images import Images, batches
from .progress import Progress
from .protocols import GENEVAL, protocol_of
from .published import published
from .result_text import as_markdown, as_text
from .results import Scores, results_of, table_of, verdict
from .score import ScoreLog, check_scorers, score
from .systems import Systems, prompts_of, read_systems, sized

SETTINGS, PARTS = "settings.json", "parts"
DEFAULT_SCORERS = tuple(name for name in SCORERS if name != "hpsv2")  # its successor is hpsv2.1


def run(request: Request) -> None:
    """Evaluates what was asked for; the last line on the terminal says what is shown."""
    quiet_libraries()
    systems = read_systems(request)
    protocol = protocol_of(request.protocol, systems.config)
    protocol = protocol if request.seeds is None else replace(protocol, seeds=request.seeds)
    systems = sized(systems, protocol)
    geneval = read_metadata(user_path(request.prompts)) if protocol.name == GENEVAL.name else []
    prompts = [prompt.text for prompt in geneval] or prompts_of(request, systems.config)
    scorers = request.scorers or (systems.config and systems.config.evaluate.scorers) or DEFAULT_SCORERS
    try:
        ranks = start(request.device)
    except UserError as error:
        raise UserError(str(error).replace("run.device", "--device")) from None
    every = batches(len(prompts), protocol.seeds, request.batch)
    work = Work(protocol, prompts, every[rank_slice(len(every), ranks)], Images(request.out, geneval), ranks.device)
    settings = settings_of(request, systems, work)
    log = ScoreLog.read(request.out / PARTS, ranks.rank)
    names = [system.name for system in systems.all]
    if ranks.first:
        check_settings(request.out, settings)
        announce(request, systems, work, ranks)
    with Watch(ranks, TIMEOUT):
        check_scorers(scorers, names, work, log)
        if ranks.first:
            write_settings(request.out, settings)
        wait(ranks)  # nobody writes before the folder is known to be the right one
        progress = Progress(ranks.first)
        draw(systems.all, work, progress)
        score(scorers, names, work, log, progress)
        wait(ranks)
    if not ranks.first:
        return
    log = ScoreLog.read(request.out / PARTS, ranks.rank)
    table = table_of(log, scorers, names, len(prompts), protocol.seeds)
    family = BaseModel.find(systems.base.model).family.name
    results = {
        "protocol": protocol.to_json(),
        "protocol_text": str(protocol),
        "prompts": len(prompts),
        "seeds": protocol.seeds,
        "systems": {system.name: system.to_json() for system in systems.all},
        "scores": results_of(table),
    }
    results["verdict"] = [verdict(results["scores"], system.name) for system in systems.others]
    if request.published:
        results["published"] = published(family)
    write_results(results, table, work)
    close(request.out, results)


def wait(ranks: Ranks) -> None:
    """Returns when all processes are here."""
    gather_rows(torch.zeros(1, device=ranks.device), ranks)


def settings_of(request: Request, systems: Systems, work: Work) -> dict:
    """Returns what an image depends on: protocol, prompts, type, batch, device, and each system by its name."""
    return {
        "protocol": work.protocol.to_json() | {"seeds": None},  # more images of a prompt change none of the others
        "prompts": f"{len(work.prompts)}, {sha256(json.dumps(work.prompts).encode()).hexdigest()[:16]}",
        "dtype": request.dtype,
        "batch": request.batch,
        "device": work.device.type,
        "systems": {system.name: system.to_json() for system in systems.all},
    }


def check_settings(out: Path, settings: dict) -> None:
    """Raises UserError if a folder holds something else, or an evaluation with other settings.

    Other systems and scorers may come and go; one name stays one system.
    """
    file = out / SETTINGS
    if not file.is_file():
        return check_free("--out", out)
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        differing = [key for key in settings if key != "systems" and before[key] != settings[key]]
        known = before["systems"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{file} is not readable as settings; choose another --out") from None
    if differing:
        key = differing[0]
        raise UserError(
            f"--out: {out} was drawn with {key} {json.dumps(before[key])}, found {json.dumps(settings[key])}; choose "
            "another folder, or the same settings"
        )
    for name, system in settings["systems"].items():
        if name in known and _identity(known[name]) != _identity(system):
            raise UserError(
                f"--out: {out} has images of another {name} ({_shown(known[name])}, found {_shown(system)}); give it "
                "another name by NAME=PATH, or choose another folder"
            )


def write_settings(out: Path, settings: dict) -> None:
    """Writes DIR/settings.json, with the systems of earlier starts. Raises UserError where that is impossible."""
    file = out / SETTINGS
    known = {}
    with suppress(OSError, ValueError, KeyError):
        known = json.loads(file.read_text(encoding="utf-8"))["systems"]
    write_all({file: json.dumps(settings | {"systems": known | settings["systems"]}, indent=1)})


def announce(request: Request, systems: Systems, work: Work, ranks: Ranks) -> None:
    """Says what is compared, in lines of at most 80 columns but for paths."""
    facts = {
        "protocol": str(work.protocol),
        "prompts": f"{len(work.prompts):,}" + (f", {request.prompts}" if request.prompts else ", held out by the run"),
        "base": systems.base.model.path,
        **{f"  {system.name}": str(system.source or system.model.path) for system in systems.others},
        "device": f"{ranks.size} x {work.device}, {request.dtype}",
    }
    for name, fact in facts.items():
        print(textwrap.fill(f"{name:<12}{fact}", 80, subsequent_indent=" " * 12, break_long_words=False))
    print(flush=True)


def write_results(results: Mapping, table: Scores, work: Work) -> None:
    """Writes results.json, results.md, scores.jsonl, pairs.jsonl and gallery.html into the folder."""
    out, systems = work.images.root, list(results["systems"])
    lines, pairs = [], []
    for prompt in work.images.geneval:
        for name in systems:
            prompt.write(out / "images" / name)
    for number, prompt in enumerate(work.prompts):
        for seed in range(work.protocol.seeds):
            files = {name: work.images.file(name, number, seed).relative_to(out).as_posix() for name in systems}
            pairs.append({"prompt": prompt, "images": files})
            for name in systems:
                scores = {measure: by_system[name][number, seed].item() for measure, by_system in table.items()}
                row = {"prompt": prompt, "number": number, "seed": seed, "system": name, "file": files[name]}
                lines.append(row | {"scores": scores})
    texts = {
        "results.json": json.dumps(results, indent=1) + "\n",
        "results.md": as_markdown(results),
        "scores.jsonl": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
        "pairs.jsonl": "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in pairs),
        "gallery.html": gallery(results, table, work.prompts, work.images),
    }
    write_all({out / name: text for name, text in texts.items()})


def close(out: Path, results: Mapping) -> None:
    """Prints the table, where things lie, and what is shown."""
    print(f"\n{as_text(results)}\n")
    for name in ("gallery.html", "results.md", "results.json", "scores.jsonl", "pairs.jsonl", "images"):
        print(f"{name:<14}{out / name}")
    print()
    print("\n".join(results["verdict"]))


def _identity(system: Mapping) -> dict:
    return {key: value for key, value in system.items() if key != "lora"}  # a file may move


def _shown(system: Mapping) -> str:
    lora = f"{system['lora']} at strength {system['strength']:g} on " if "lora" in system else ""
    return lora + system["model"]["path"]
