"""Counts the rows that an iteration puts through each network, by running the recipe's own method.

It runs on stand-ins: latents of one number, a policy that counts its rows and computes nothing, a judge that is sure of
every pair, and pairs without images. What an iteration does is thus written down once, where it is run.
"""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from ..config.offline import OfflineConfig
from ..config.online import JUDGE, SamplingConfig
from ..config.settings import keys, varied
from ..config.training import Config
from ..data.decided_pairs import DecidedPairs
from ..data.embeddings import TrainingPrompts
from ..data.pair_files import is_factory
from ..judge.candidates import Candidates
from ..judge.latent import LatentJudge
from ..methods.find import method_class
from ..models.conditioning import Conditioning
from ..runtime.ranks import Ranks
from ..schedules.schedule import Schedule

ONE_PROCESS = Ranks(0, 1, torch.device("cpu"))
TEXT_ENCODERS, VAE_ENCODER = "text encoders", "VAE encoder"
AUDIT = "rollout/audit"  # the clock's stage
COUNTED_AS = {"rollout.decoder": None, "reward": JUDGE, "data.workers": 0}  # in place of what would be loaded


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Counts of one iteration of one process, where the judge is sure of every pair.

    items: how many prompts it samples for, or pairs it learns from where it samples nothing; `item` says which. rows:
    by (stage, call), how many rows went through. largest: by call, the most rows in one of them. The calls of the UNet,
    in its rows, of which a guided latent has two: `guided` and `unguided`, forwards of the rollout; in the update
    `train`, forwards that a backward pass follows, `reference`, and `forward`, other forwards of the policy. `decode`
    counts latents; `judge` images that judge or reward score, `auditor` those that an auditor does; `encode` images for
    the VAE; `text` and `empty text` prompts that are encoded within the loop. pairs: those that a run reports.
    trained_rows: different rows that are trained on. x_t_per_row: 2 where one may have two latents x_t. latents,
    other_bytes: of what is collected, without conditioning. exchanged: whether ranks deal it anew. lora_copies: beside
    the policy's own. kept: encoders that stay on the device.
    """

    items: int
    item: str = "prompt"
    rows: Counter = field(default_factory=Counter)
    largest: Counter = field(default_factory=Counter)
    pairs: int = 0
    trained_rows: int = 0
    x_t_per_row: int = 1
    micro_batches: int = 0
    latents: int = 0
    other_bytes: int = 0
    exchanged: bool = False
    lora_copies: int = 0
    kept: Sequence[str] = (VAE_ENCODER,)

    @property
    def prompts(self) -> int:
        """Prompts that an iteration samples for."""
        return self.items if self.item == "prompt" else 0

    def total(self, call: str, stage: str | None = None) -> int:
        """Returns the rows of a call, in one stage, or in all but AUDIT, which not every iteration has."""
        return sum(rows for (s, c), rows in self.rows.items() if c == call and (s == stage if stage else s != AUDIT))

    def collected_bytes(self, latent: int) -> int:
        """Returns the bytes of what is collected, where a latent has `latent` numbers, in float32."""
        return self.latents * latent * torch.float32.itemsize + self.other_bytes


def count_rows(config: Config, schedule: Schedule) -> RowCounts:
    """Runs one iteration of a recipe on stand-ins and returns its counts. schedule: the rollout's, on the CPU.

    Raises UserError where the method refuses the recipe.
    """
    has = set(keys(type(config)))
    counter, prompts = _CountingModels(config, schedule), config.prompts_per_iteration
    texts = TrainingPrompts([str(i) for i in range(prompts)], counter, prompts, 0, ONE_PROCESS)
    live = SimpleNamespace(counted=lambda items, total, stage: items)
    session = SimpleNamespace(ranks=ONE_PROCESS, clock=counter.clock, live=live, dir=Path(config.run.dir))
    loadable = varied(config, {key: value for key, value in COUNTED_AS.items() if key in has})
    method = method_class(config)(loadable, counter, texts, session)
    counter.rows.clear()
    with redirect_stdout(io.StringIO()), counter.clock(method.stage):  # what it says of its pairs is not true here
        collected, facts = method.collect(0)
    sizes, x_t_per_row, known = [], 1, {}
    with counter.clock("update"):
        for batch in method.batches(collected):
            sizes.append(len(batch))
            kind = _kind(batch)
            if kind not in known:
                before, counter.trained_latents = counter.rows.copy(), 0
                method.loss(batch)
                known[kind] = counter.rows - before
                x_t_per_row = max(x_t_per_row, math.ceil(counter.trained_latents / len(batch)))
            else:
                counter.rows.update(known[kind])
    tensors = list(_tensors(collected))
    is_latent = lambda tensor: tensor.ndim > 3 and tensor.shape[-3:] == counter.latent_shape
    return RowCounts(
        items=facts["prompts"],
        item="prompt" if prompts else "pair",
        rows=counter.rows,
        largest=counter.largest,
        pairs=facts.get("pairs", 0),
        trained_rows=sum(sizes) // getattr(config.optim, "passes", 1),
        x_t_per_row=x_t_per_row,
        micro_batches=len(sizes),
        latents=sum(tensor.numel() for tensor in tensors if is_latent(tensor)),
        other_bytes=sum(tensor.nbytes for tensor in tensors if not is_latent(tensor)),
        exchanged="rollout.threshold" in has,  # above which the ranks have different numbers of pairs
        lora_copies=len(list(_tensors(method.trainable))),
        kept=counter.kept,
    )


def _kind(value: object) -> object:
    """Returns what the calls for a micro-batch depend on: shapes and plain values, or a loss would wait for a GPU."""
    if isinstance(value, Tensor):
        return value.shape
    return tuple(_kind(getattr(value, field.name)) for field in fields(value)) if is_dataclass(value) else value


def _tensors(value: object) -> Iterator[Tensor]:
    """Yields the tensors in an object and in what it holds, without conditioning and parameters."""
    if isinstance(value, Tensor):
        yield from () if isinstance(value, nn.Parameter) else (value,)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value) and not isinstance(value, Conditioning):
        yield from _tensors([getattr(value, field.name) for field in fields(value)])
    elif hasattr(value, "__dict__"):
        yield from _tensors(list(vars(value).values()))


class _CountingModels:
    """Stands in for the models of a run and for the policy, base model and judge in them, and only counts their rows.

    kept: as in RowCounts. trained_latents: whose forwards had gradients, since it was set to 0.
    """

    latent_shape = (1, 1, 1)
    device, trainable = torch.device("cpu"), None
    vae = SimpleNamespace(config=SimpleNamespace(scaling_factor=1.0))

    def __init__(self, config: Config, schedule: Schedule):
        self.policy = self.diffusion = self.judge = self
        self.parameters, self.scheduler = [nn.Parameter(torch.zeros(1))], DDIMScheduler()
        self.config, self.rollout_schedule = config, schedule
        self.multiple = config.optim.micro_batch if config.model.compile == "all" else 1
        self.rows, self.largest = Counter(), Counter()
        self.stage, self.is_reference, self.is_sampling, self.trained_latents = "", False, False, 0
        self.kept = (TEXT_ENCODERS, VAE_ENCODER)
        audited = lambda candidates, cond: self._scored("auditor", config.auditor.kind, candidates)
        self.auditor = SimpleNamespace(score=audited) if config.auditor else None

    def __getitem__(self, prompts: Sequence[str]) -> Conditioning:
        """Returns the embeddings of prompts that were encoded before the loop."""
        count = len(prompts)
        judges = dict.fromkeys(("judge", "auditor"), torch.zeros(count))
        return Conditioning(torch.zeros(count, 1, 1), torch.zeros(1, 1, 1), **judges)

    def schedule(self, rollout: SamplingConfig) -> Schedule:
        return self.rollout_schedule

    def pairs(self, config: OfflineConfig, ranks: Ranks) -> DecidedPairs:
        """Returns as many pairs as an iteration takes, each with what the cache holds and with images."""
        latents, data = torch.zeros(2, *self.latent_shape), self.config.data
        pair = dict.fromkeys(("mean", "std", "flipped_mean", "flipped_std"), latents)
        pair |= {"text": torch.zeros(1, 1), "caption": "", "label_0": 1.0, "label_1": 0.0}
        pair |= {"image_0": torch.zeros(3, 1, 1), "image_1": torch.zeros(3, 1, 1)}
        cached = data.cache is not None and not is_factory(data.source)
        return DecidedPairs([pair] * config.pairs_per_iteration, 0, cached=cached)

    def release_text_encoders(self) -> None:
        self.kept = tuple(part for part in self.kept if part != TEXT_ENCODERS)

    def release_encoders(self) -> None:
        self.kept = ()

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        outer, self.stage = self.stage, stage
        yield
        self.stage = outer

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.is_reference = True
        with torch.no_grad():
            yield
        self.is_reference = False

    @contextmanager
    def sampling(self, cond: Conditioning, text_kv: bool) -> Iterator[Conditioning]:
        self.is_sampling = True
        with torch.no_grad():
            yield cond
        self.is_sampling = False

    def eps(self, x: Tensor, step_t: Tensor, cond: Conditioning, guided: bool = True) -> Tensor:
        halves, rows = 2 if guided else 1, len(x)
        if self.is_sampling:
            call = "guided" if guided else "unguided"
        else:
            call = "reference" if self.is_reference else "train" if torch.is_grad_enabled() else "forward"
            rows += -rows % self.multiple
        if call == "train":
            self.trained_latents += len(x)
        self._count(call, halves * rows)
        return torch.zeros(halves, *x.shape, requires_grad=call == "train")

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        self._count("text", len(prompts))
        self._count("empty text", 1)
        return self[prompts]

    def posterior(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and std (2, N, 1, 1, 1) of images (2, N, 3, H, W), encoded one side after the other."""
        for side in images:
            self._count("encode", len(side))
        latents = torch.zeros(*images.shape[:2], *self.latent_shape)
        return latents, latents

    def decode(self, latents: Tensor) -> Tensor:
        self._count("decode", latents[..., 0, 0, 0].numel())
        return latents

    def score(self, candidates: Candidates, cond: Conditioning) -> Tensor:
        """Returns scores (K, B) so far apart that the judge is sure at any threshold."""
        return self._scored("judge", self.config.judge.kind, candidates)

    def _scored(self, call: str, kind: str, candidates: Candidates) -> Tensor:
        read = candidates.x if kind == LatentJudge.kind else candidates.images
        k, prompts = read.shape[:2]
        self._count(call, k * prompts)
        return 1e3 * torch.arange(k, dtype=torch.float32).unsqueeze(1).expand(k, prompts)

    def score_images(self, images: Tensor, text: Tensor, t: int) -> Tensor:
        """Returns scores (K, N) of images (K, N, ...), all different."""
        if self.config.judge.kind == LatentJudge.kind:
            self._count("encode", images[..., 0, 0, 0].numel())
        self._count("judge", images[..., 0, 0, 0].numel())
        return torch.arange(len(text), dtype=torch.float32).expand(len(images), -1)

    def _count(self, call: str, rows: int) -> None:
        self.rows[self.stage, call] += rows
        self.largest[call] = max(self.largest[call], rows)
