"""How images are drawn for a comparison: a protocol fixes sampler, steps, guidance, size and noise under one name.

Tables of other papers differ most by what they leave unsaid here, so a protocol is printed into every result.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..config.training import Config
from ..errors import UserError


@dataclass(frozen=True, slots=True)
class Protocol:
    """A protocol. size: (height, width) in pixels, None for the model's own; seeds: images of each prompt.

    noise: "prompt" if image s of a prompt starts from what its number draws from seed + s, as in a run's own
    evaluation; "seed" if image s of every prompt starts from what seed + s draws first, as where it is set anew.
    """

    name: str
    steps: int
    guidance: float
    seed: int = 0
    seeds: int = 1
    size: tuple[int, int] | None = None
    sampler: str = "DDIM"
    eta: float = 0.0
    noise: str = "prompt"

    def __str__(self) -> str:
        size = "the model's own size" if self.size is None else f"{self.size[0]}x{self.size[1]} pixels"
        images = "1 image" if self.seeds == 1 else f"{self.seeds} images"
        start = "noise by prompt number" if self.noise == "prompt" else "the same noise for every prompt"
        return (
            f"{self.name}: {self.sampler}, {self.steps} steps, eta {self.eta:g}, guidance {self.guidance:g}, {size}, "
            f"{images} a prompt, seed {self.seed}, {start}"
        )

    def to_json(self) -> dict:
        """Returns the protocol as JSON holds it."""
        return asdict(self) | {"size": None if self.size is None else list(self.size)}


PAPER = Protocol("paper", steps=20, guidance=5.0)  # arXiv 2406.04314, for its tables of scores
GENEVAL = Protocol("geneval", steps=50, guidance=9.0, seed=42, seeds=4, noise="seed")  # github.com/djghosh13/geneval
NAMED = {protocol.name: protocol for protocol in (PAPER, GENEVAL)}
AS_TRAINED = "run"  # how the run that trained the first LoRA evaluates
NAMES = (*NAMED, AS_TRAINED)


def protocol_of(name: str, config: Config | None) -> Protocol:
    """Returns the protocol of a name of NAMES; config: the recipe of the run that trained the first LoRA, if known."""
    if name != AS_TRAINED:
        return NAMED[name]
    if config is None:
        raise UserError("--protocol: found run, but no LoRA here says by which recipe it was trained; name another")
    evaluate, model = config.evaluate, config.model
    if (model.height is None) != (model.width is None):
        raise UserError("--protocol: found run, but its recipe sets one of model.height and model.width; name another")
    size = None if model.height is None else (model.height, model.width)
    return Protocol(AS_TRAINED, evaluate.num_steps, evaluate.guidance, evaluate.seed, size=size)
