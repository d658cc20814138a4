"""What is compared: a base model, LoRAs at their strengths added to it, and whole models of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from ..config.training import Config, ModelConfig
from ..data.prompts import read_prompts, split_prompts
from ..errors import UserError
from ..models.base_model import BaseModel
from ..models.lora_file import Lora
from ..models.lora_source import base_of, check_lora, find_lora, recipe_of
from ..user_files import user_path
from .arguments import BASE, Request
from .protocols import Protocol

DECODE_ROWS = 2  # images of 1024 pixels that are decoded at a time, for the memory they take


@dataclass(frozen=True, slots=True)
class System:
    """A system: `model`, with strength times the LoRA of the file `source` on its UNet; both None for a whole model."""

    name: str
    model: ModelConfig
    source: Path | None = None
    lora: Lora | None = None
    strength: float = 1.0

    def to_json(self) -> dict:
        """Returns what makes the system what it is, as JSON holds it; the LoRA by the hash of its file."""
        model = {key: getattr(self.model, key) for key in ("path", "revision", "components", "vae")}
        if self.lora is None:
            return {"model": model}
        digest = sha256(self.source.read_bytes()).hexdigest()
        return {"model": model, "lora": str(self.source), "sha256": digest, "strength": self.strength}


@dataclass(frozen=True, slots=True)
class Systems:
    """All systems, the base first; config: the recipe of the run that trained the first LoRA that says so, or None."""

    all: list[System]
    config: Config | None

    @property
    def base(self) -> System:
        return self.all[0]

    @property
    def others(self) -> list[System]:
        """Those that are compared with the base."""
        return self.all[1:]


def read_systems(request: Request) -> Systems:
    """Reads the LoRAs and finds the models; no weights of a model are read.

    Raises UserError for a source that is neither, a base that nobody names, and a LoRA that does not fit its base.
    """
    models = {s.name: s.path for s in request.sources if _is_model(s.path)}
    loras = {s.name: find_lora(user_path(s.path)) for s in request.sources if s.name not in models}
    if not loras and request.base is None:
        raise UserError("found no LoRA that names its base; name the model to compare with by --base")
    config = next(filter(None, (recipe_of(lora, file) for file, lora in loras.values())), None)
    base = _base(request, loras, config)
    systems = [System(BASE, base)]
    for source in request.sources:
        if source.name in models:
            systems.append(
                System(source.name, ModelConfig(path=source.path, dtype=request.dtype, decode_rows=DECODE_ROWS))
            )
            continue
        file, lora = loras[source.name]
        for strength in request.strengths or (1.0,):
            name = f"{source.name}@{strength:g}" if request.strengths else source.name
            systems.append(System(name, base, file, lora, strength))
    _check(systems)
    return Systems(systems, config)


def sized(systems: Systems, protocol: Protocol) -> Systems:
    """Returns the systems with the image size that a protocol asks for."""
    if protocol.size is None:
        return systems
    height, width = protocol.size
    update = {"height": height, "width": width}
    changed = [replace(system, model=system.model.model_copy(update=update)) for system in systems.all]
    return Systems(changed, systems.config)


def prompts_of(request: Request, config: Config | None) -> list[str]:
    """Returns the prompts to draw: those of a file, or those that the run of `config` held out. Raises UserError."""
    if request.prompts is not None:
        return read_prompts(request.prompts, "--prompts")
    if config is None:
        raise UserError("--prompts: no LoRA here says by which run it was trained, and so which prompts were held out")
    count, prompts = config.evaluate.prompts, config.prompts
    try:
        if prompts.heldout is not None:
            return read_prompts(prompts.heldout, "prompts.heldout")[:count]
        known = read_prompts(prompts.train, "prompts.train")
    except UserError as error:
        raise UserError(f"{error}; --prompts names a file of prompts") from None
    return split_prompts(known, min(count, len(set(known)) - 1), config.run.seed)[1]


def _is_model(path: str) -> bool:
    local = user_path(path)
    return (local / "model_index.json").is_file() if local.exists() else True


def _base(request: Request, loras: dict[str, tuple[Path, Lora]], config: Config | None) -> ModelConfig:
    named = next((pair for pair in loras.values() if "strop.config" in pair[1].facts), None)
    if request.base is None and named is None:
        file = next(iter(loras.values()))[0]
        raise UserError(f"{file} does not say which model it was trained on; name it with --base")
    file, lora = named or next(iter(loras.values()), (None, Lora({}, {}, {})))
    base = base_of(lora, file, request.base, request.components)
    vae = config.model.vae if config is not None and request.base is None else None
    return base.model_copy(update={"dtype": request.dtype, "vae": vae, "decode_rows": DECODE_ROWS})


def _check(systems: Sequence[System]) -> None:
    """Raises UserError for a model that cannot be used, or a LoRA that does not fit its model."""
    outlines: dict[str, object] = {}
    for system in systems:
        path = system.model.path
        if path not in outlines:
            try:
                outlines[path] = BaseModel.find(system.model).outline("unet")
            except UserError as error:
                raise UserError(f"{system.name}: {error}") from None
        if system.lora is not None:
            check_lora(outlines[path], system.lora, system.source, path)
