"""The optimizer: AdamW over a module's trainable parameters, its state sharded by DeepSpeed ZeRO over several ranks.

One process runs plain AdamW: there is nothing to shard, and DeepSpeed is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config.training import OptimConfig
from ..errors import UserError, one_line
from .finite import Gate
from .ranks import Ranks

# Gradients of a mean over the 16,384 or 65,536 numbers of a latent are 1e-4 and less: the foot of float16's range.
FLOAT16_SCALE = 4096.0
NO_SCALARS = "self.dim() cannot be 0"  # PyTorch, of a scalar that is viewed as bytes, which is how DeepSpeed broadcasts


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """Settings of torch.optim.AdamW; max_grad_norm clips (None: never); accumulate: micro-batches per optimizer step.

    stage: of ZeRO. micro_batch: rows per backward pass, which DeepSpeed asks for.
    """

    lr: float
    weight_decay: float
    max_grad_norm: float | None
    accumulate: int
    micro_batch: int
    stage: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    loss_scale: float = 1.0  # of the backward pass; gradients are divided by it before anything else sees them

    @classmethod
    def of(cls, optim: OptimConfig, stage: int, dtype: str) -> AdamWSettings:
        """Takes the settings of a recipe's section `optim`; dtype: of the base model that gradients pass through."""
        names = [field.name for field in fields(cls) if field.name not in ("stage", "loss_scale")]
        settings = {name: getattr(optim, name) for name in names}
        return cls(**settings, stage=stage, loss_scale=FLOAT16_SCALE if dtype == "float16" else 1.0)


@dataclass(frozen=True, slots=True)
class AdamWState:
    """What an optimizer holds beside its moments: steps taken, micro-batches that wait, and the sums of their grads."""

    steps: int
    waiting: int
    grads: list[Tensor]
    counts: Tensor  # of the gate, since the last step


def write_state(folder: Path, rank: int, state: AdamWState, optimizer: torch.optim.Optimizer) -> None:
    """Writes a rank's state and its optimizer's moments to folder/optimizer-<rank>.safetensors."""
    tensors = {
        f"{name}.{i}": value.contiguous()
        for i, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }
    tensors |= {f"grad.{i}": grad.contiguous() for i, grad in enumerate(state.grads)} | {"counts.0": state.counts}
    counts = {"steps": str(state.steps), "waiting": str(state.waiting)}
    save_file(tensors, folder / f"optimizer-{rank}.safetensors", counts)


def read_state(folder: Path, rank: int, optimizer: torch.optim.Optimizer) -> AdamWState:
    """Puts the moments of folder/optimizer-<rank>.safetensors into an optimizer, and returns the rest.

    Raises UserError if it is no safetensors file; nothing in it is ever run.
    """
    moments: dict[int, dict[str, Tensor]] = {}
    path = folder / f"optimizer-{rank}.safetensors"
    try:
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (it is no dict)
                name, i = key.rsplit(".", 1)
                moments.setdefault(int(i), {})[name] = file.get_tensor(key)
            counts = {name: int(value) for name, value in file.metadata().items()}
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: found no optimizer state in safetensors ({one_line(error)}); go on from another checkpoint"
        ) from None
    gate = moments[0].pop("counts")
    grads = [moments[i].pop("grad") for i in sorted(moments) if "grad" in moments[i]]
    state = {i: entries for i, entries in moments.items() if entries}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return AdamWState(**counts, grads=grads, counts=gate)


class LocalAdamW:
    """AdamW of one process, with accumulation, clipping and loss scaling."""

    def __init__(self, module: nn.Module, settings: AdamWSettings, ranks: Ranks):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.settings = settings
        self.optimizer = _adamw(self.parameters, settings)
        self.gate = Gate(self.parameters, settings.loss_scale, ranks)
        self.waiting = 0  # micro-batches since the last optimizer step
        self.steps = 0

    def backward(self, loss: Tensor) -> Tensor:
        """Adds the gradient of a micro-batch's loss, and returns whether that is finite, () bool; if not, adds zero."""
        finite = self.gate.judge(loss, self.waiting + 1 >= self.settings.accumulate)
        (loss * (self.settings.loss_scale / self.settings.accumulate)).backward()
        return finite

    def step(self) -> Tensor | float | None:
        """Takes an optimizer step if `accumulate` micro-batches wait, and returns its gradient norm, else None.

        A step whose norm is not finite is left out.
        """
        self.waiting += 1
        if self.waiting < self.settings.accumulate:
            return None
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm or math.inf)
        if self.gate.admits(norm):
            self.optimizer.step()
            self.steps += 1
        self.optimizer.zero_grad()
        self.waiting = 0
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state_bytes(self) -> int:
        """Returns the bytes of optimizer state on this rank."""
        return _bytes(self.optimizer)

    def save(self, folder: Path) -> None:
        """Writes the state to folder/optimizer-0.safetensors."""
        waiting = [p.grad for p in self.parameters] if self.waiting else []
        write_state(folder, 0, AdamWState(self.steps, self.waiting, waiting, self.gate.counts), self.optimizer)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, into an optimizer of the same module."""
        state = read_state(folder, 0, self.optimizer)
        self.steps, self.waiting = state.steps, state.waiting
        self.gate.counts.copy_(state.counts)
        for parameter, grad in zip(self.parameters, state.grads, strict=False):
            parameter.grad = grad.to(parameter.device)


class ZeroAdamW:
    """AdamW of several ranks through a DeepSpeedEngine, ZeRO stage 1 or 2; the same interface as LocalAdamW.

    Gradients are accumulated here, each rank's own, and DeepSpeed is given their sum at every optimizer step: it then
    reduces once a step, and a checkpoint can hold the sums that wait, which DeepSpeed's own cannot.
    Raises UserError for a version of DeepSpeed that cannot train the module.
    """

    def __init__(self, module: nn.Module, settings: AdamWSettings, ranks: Ranks):
        import deepspeed

        self.settings, self.rank = settings, ranks.rank
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.gate = Gate(self.parameters, settings.loss_scale, ranks)
        self.waiting = 0  # micro-batches since the last optimizer step
        self.steps = 0
        self._sums: list[Tensor] = []  # of their gradients, by parameter
        with _scalars_not_broadcast(module):
            self.engine, *_ = deepspeed.initialize(
                model=module,
                model_parameters=self.parameters,
                optimizer=_adamw(self.parameters, settings),
                config={
                    "train_micro_batch_size_per_gpu": settings.micro_batch,
                    "gradient_accumulation_steps": 1,
                    "gradient_clipping": settings.max_grad_norm or 0.0,  # 0 never clips
                    "zero_optimization": {
                        "stage": settings.stage,
                        "overlap_comm": False,
                        "reduce_bucket_size": sum(p.numel() for p in self.parameters),  # DeepSpeed's own takes 2 GB
                    },
                    "zero_allow_untested_optimizer": True,
                    "steps_per_print": 10**9,
                },
            )

    def backward(self, loss: Tensor) -> Tensor:
        finite = self.gate.judge(loss, self.waiting + 1 >= self.settings.accumulate)
        loss = loss * (self.settings.loss_scale / self.settings.accumulate)
        if self.settings.accumulate == 1:
            self.engine.backward(loss)
            return finite
        grads = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        if self._sums:
            torch._foreach_add_(self._sums, grads)
        else:
            self._sums = list(grads)
        return finite

    def step(self) -> Tensor | float | None:
        """Does as LocalAdamW's."""
        self.waiting += 1
        if self.waiting < self.settings.accumulate:
            return None
        if self._sums:
            self.gate.open()
            # The gradient of this product is the sums, bit for bit; what is unscaled twice is scaled twice.
            products = [(p * grad).sum() for p, grad in zip(self.parameters, self._sums, strict=True)]
            self.engine.backward(torch.stack(products).sum() * self.settings.loss_scale)
            self._sums = []
        self.engine.step()  # DeepSpeed itself leaves out a step whose norm is not finite
        self.waiting = 0
        norm = self.engine.get_global_grad_norm()
        if self.gate.admits(norm):
            self.steps += 1
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def state_bytes(self) -> int:
        return _bytes(self.engine.optimizer.optimizer)

    def save(self, folder: Path) -> None:
        """Writes this rank's share of the state to folder/optimizer-<rank>.safetensors."""
        state = AdamWState(self.steps, self.waiting, self._sums, self.gate.counts)
        write_state(folder, self.rank, state, self.engine.optimizer.optimizer)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, by as many ranks; the module's parameters have been loaded by then."""
        state = read_state(folder, self.rank, self.engine.optimizer.optimizer)
        self.steps, self.waiting = state.steps, state.waiting
        self.gate.counts.copy_(state.counts)
        self._sums = [g.to(p.device) for g, p in zip(state.grads, self.parameters, strict=False)]
        self.engine.optimizer.refresh_fp32_params()  # the shares that the optimizer steps on


Optimizer = LocalAdamW | ZeroAdamW


def build_optimizer(module: nn.Module, settings: AdamWSettings, ranks: Ranks) -> Optimizer:
    """Builds LocalAdamW for one rank and ZeroAdamW for several. Raises UserError as ZeroAdamW does."""
    return LocalAdamW(module, settings, ranks) if ranks.size == 1 else ZeroAdamW(module, settings, ranks)


@contextmanager
def _scalars_not_broadcast(module: nn.Module) -> Iterator[None]:
    """Makes DeepSpeed skip parameters without dimensions, such as CLIP's logit_scale, which all ranks load alike.

    DeepSpeed cannot broadcast them ("self.dim() cannot be 0"). They are marked as the weights of its OptimizedLinear
    are, by a name that is not public. Raises UserError for a version that ignores the mark and cannot broadcast them.
    """
    scalars = [p for p in module.parameters() if p.dim() == 0]
    for p in scalars:
        p.ds_optim_param = True
    try:
        yield
    except RuntimeError as error:
        if not scalars or NO_SCALARS not in str(error):
            raise
        raise UserError(
            f"DeepSpeed {version('deepspeed')} cannot broadcast parameters without dimensions, such as CLIP's "
            "logit_scale, nor be told to leave them out; install deepspeed==0.19.*, or train with one process"
        ) from error
    finally:
        for p in scalars:
            del p.ds_optim_param


def _adamw(parameters: list[nn.Parameter], settings: AdamWSettings) -> torch.optim.AdamW:
    """Builds PyTorch's AdamW, whose step on a GPU is one kernel (`fused`)."""
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        fused=True if all(p.is_cuda for p in parameters) else None,
    )


def _bytes(optimizer: torch.optim.Optimizer) -> int:
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
