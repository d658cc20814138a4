"""The optimizer: AdamW over a module's trainable parameters, its state sharded by DeepSpeed ZeRO over several ranks.

One process runs plain AdamW: there is nothing to shard, and DeepSpeed is not needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config.training import Config
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
    def of(cls, config: Config) -> AdamWSettings:
        """Takes the settings of a recipe; gradients pass through a base model of its model.dtype."""
        optim, dtype = config.optim, config.model.dtype
        names = ("lr", "weight_decay", "max_grad_norm", "micro_batch", "betas", "eps")
        settings = {name: getattr(optim, name) for name in names}
        return cls(
            **settings,
            accumulate=config.accumulate,
            stage=config.zero.stage,
            loss_scale=FLOAT16_SCALE if dtype == "float16" else 1.0,
        )


class Optimizer:
    """AdamW with accumulation, clipping and loss scaling, of which a checkpoint can hold what waits for a step.

    gate: keeps out what is not finite. waiting: micro-batches since the last optimizer step; steps: taken so far.
    """

    optimizer: torch.optim.Optimizer  # PyTorch's, or this rank's share of it

    def __init__(self, module: nn.Module, settings: AdamWSettings, ranks: Ranks):
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.settings, self.rank = settings, ranks.rank
        self.gate = Gate(self.parameters, settings.loss_scale, ranks)
        self.waiting = self.steps = 0

    def backward(self, loss: Tensor) -> Tensor:
        """Adds the gradient of a micro-batch's loss, and returns whether that is finite, () bool; if not, adds zero."""
        finite = self.gate.judge(loss, self.waiting + 1 >= self.settings.accumulate)
        self._add(loss * (self.settings.loss_scale / self.settings.accumulate))
        return finite

    def step(self) -> Tensor | float | None:
        """Takes an optimizer step if `accumulate` micro-batches wait, and returns its gradient norm, else None.

        A step whose norm is not finite is left out.
        """
        self.waiting += 1
        if self.waiting < self.settings.accumulate:
            return None
        norm = self._take()
        self.waiting = 0
        self.steps += not self.gate.in_a_row
        return norm

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def state_bytes(self) -> int:
        """Returns the bytes of optimizer state on this rank."""
        tensors = [v for state in self.optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)

    def save(self, folder: Path) -> None:
        """Writes this rank's state to folder/optimizer-<rank>.safetensors."""
        tensors = {
            f"{name}.{i}": value.contiguous()
            for i, entries in self.optimizer.state_dict()["state"].items()
            for name, value in entries.items()
        }
        tensors |= {f"grad.{i}": grad.contiguous() for i, grad in enumerate(self._sums())}
        counts = {"steps": str(self.steps), "waiting": str(self.waiting)}
        save_file(tensors | {"counts.0": self.gate.counts}, self._file(folder), counts)

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, by as many ranks; the module's parameters have been loaded by then.

        Raises UserError if it is no safetensors file; nothing in it is ever run.
        """
        moments: dict[int, dict[str, Tensor]] = {}
        try:
            with safe_open(self._file(folder), "pt") as file:
                for key in file.keys():  # noqa: SIM118 (it is no dict)
                    name, i = key.rsplit(".", 1)
                    moments.setdefault(int(i), {})[name] = file.get_tensor(key)
                counts = file.metadata()
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._file(folder)}: found no optimizer state in safetensors ({one_line(error)}); go on from "
                "another checkpoint"
            ) from None
        self.steps, self.waiting = int(counts["steps"]), int(counts["waiting"])
        self.gate.counts.copy_(moments[0].pop("counts"))
        grads = [moments[i].pop("grad") for i in sorted(moments) if "grad" in moments[i]]
        self._put_back([grad.to(p.device) for grad, p in zip(grads, self.parameters, strict=False)])
        state = {i: entries for i, entries in moments.items() if entries}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})

    def _file(self, folder: Path) -> Path:
        return folder / f"optimizer-{self.rank}.safetensors"

    def _add(self, loss: Tensor) -> None:
        """Adds the gradient of a scaled loss to the sums."""
        raise NotImplementedError

    def _take(self) -> Tensor | float:
        """Takes a step on the sums if the gate admits their norm, begins new ones, and returns the norm."""
        raise NotImplementedError

    def _sums(self) -> list[Tensor]:
        """Returns the gradients that wait, by parameter; none if no micro-batch does."""
        raise NotImplementedError

    def _put_back(self, sums: list[Tensor]) -> None:
        """Takes up what `_sums` returned."""
        raise NotImplementedError


class LocalAdamW(Optimizer):
    """AdamW of one process."""

    def __init__(self, module: nn.Module, settings: AdamWSettings, ranks: Ranks):
        super().__init__(module, settings, ranks)
        self.optimizer = _adamw(self.parameters, settings)

    def _add(self, loss: Tensor) -> None:
        loss.backward()

    def _take(self) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.parameters, self.settings.max_grad_norm or math.inf)
        if self.gate.admits(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _sums(self) -> list[Tensor]:
        return [p.grad for p in self.parameters] if self.waiting else []

    def _put_back(self, sums: list[Tensor]) -> None:
        for parameter, grad in zip(self.parameters, sums, strict=False):
            parameter.grad = grad


class ZeroAdamW(Optimizer):
    """AdamW of several ranks through a DeepSpeedEngine, ZeRO stage 1 or 2.

    Gradients are accumulated here, each rank's own, and DeepSpeed is given their sum at every optimizer step: it then
    reduces once a step, and a checkpoint can hold the sums that wait, which DeepSpeed's own cannot.
    Raises UserError for a version of DeepSpeed that cannot train the module.
    """

    def __init__(self, module: nn.Module, settings: AdamWSettings, ranks: Ranks):
        import deepspeed

        super().__init__(module, settings, ranks)
        self._waiting_sums: list[Tensor] = []
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

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.engine.optimizer.optimizer

    def _add(self, loss: Tensor) -> None:
        if self.settings.accumulate == 1:
            self.engine.backward(loss)
            return
        grads = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
        if self._waiting_sums:
            torch._foreach_add_(self._waiting_sums, grads)
        else:
            self._waiting_sums = list(grads)

    def _take(self) -> Tensor | float:
        if self._waiting_sums:
            self.gate.open()
            # The gradient of this product is the sums, bit for bit; what is unscaled twice is scaled twice.
            products = [(p * grad).sum() for p, grad in zip(self.parameters, self._waiting_sums, strict=True)]
            self.engine.backward(torch.stack(products).sum() * self.settings.loss_scale)
            self._waiting_sums = []
        self.engine.step()  # DeepSpeed itself leaves out a step whose norm is not finite
        norm = self.engine.get_global_grad_norm()
        self.gate.admits(norm)
        return norm

    def _sums(self) -> list[Tensor]:
        return self._waiting_sums

    def _put_back(self, sums: list[Tensor]) -> None:
        self._waiting_sums = sums
        self.engine.optimizer.refresh_fp32_params()  # the shares that the optimizer steps on


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
