"""The optimizer: AdamW over a module's trainable parameters, its state sharded by DeepSpeed ZeRO over several ranks.

One process runs plain AdamW: there is nothing to shard, and neither DeepSpeed nor a compiler is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config.training import OptimConfig
from ..errors import UserError
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
        state = {"optimizer": self.optimizer.state_dict(), "waiting": self.waiting, "steps": self.steps}
        state["grads"] = [p.grad for p in self.parameters] if self.waiting else None
        torch.save(state, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        state = torch.load(folder / "optimizer.pt", weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.waiting, self.steps = state["waiting"], state["steps"]
        for parameter, grad in zip(self.parameters, state["grads"] or [], strict=False):
            parameter.grad = grad


class ZeroAdamW:
    """AdamW of several ranks through a DeepSpeedEngine, ZeRO stage 1 or 2; the same interface as LocalAdamW.

    Raises UserError for a version of DeepSpeed that cannot train the module.
    """

    def __init__(self, module: nn.Module, settings: AdamWSettings, ranks: Ranks):
        import deepspeed

        self.settings = settings
        parameters = [p for p in module.parameters() if p.requires_grad]
        self.gate = Gate(parameters, settings.loss_scale, ranks)
        with _scalars_not_broadcast(module):
            self.engine, *_ = deepspeed.initialize(
                model=module,
                model_parameters=parameters,
                optimizer=_adamw(parameters, settings),
                config={
                    "train_micro_batch_size_per_gpu": settings.micro_batch,
                    "gradient_accumulation_steps": settings.accumulate,
                    "gradient_clipping": settings.max_grad_norm or 0.0,  # 0 never clips
                    "zero_optimization": {
                        "stage": settings.stage,
                        "overlap_comm": False,
                        "reduce_bucket_size": sum(p.numel() for p in parameters),  # DeepSpeed's own takes 2 GB
                    },
                    "zero_allow_untested_optimizer": True,
                    "steps_per_print": 10**9,
                },
            )

    @property
    def steps(self) -> int:
        return self.engine.global_steps - self.engine.skipped_steps

    @property
    def waiting(self) -> int:
        return self.engine.micro_steps % self.settings.accumulate

    def backward(self, loss: Tensor) -> Tensor:
        finite = self.gate.judge(loss, self.engine.is_gradient_accumulation_boundary())
        self.engine.backward(loss * self.settings.loss_scale)
        return finite

    def step(self) -> Tensor | float | None:
        boundary = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()  # DeepSpeed itself leaves out a step whose norm is not finite
        if not boundary:
            return None
        norm = self.engine.get_global_grad_norm()
        self.gate.admits(norm)
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr

    def state_bytes(self) -> int:
        return _bytes(self.engine.optimizer.optimizer)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(str(folder), tag="zero", exclude_frozen_parameters=True)

    def load(self, folder: Path) -> None:
        self.engine.load_checkpoint(str(folder), tag="zero", load_module_strict=False)


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
