"""What a computation takes, found by running it on the meta device: floating-point operations and peak memory.

Nothing is computed and nothing allocated, so full-size networks are measured on any machine in seconds. Counted are the
tensors that live at once, attention as the fused one of a GPU (no matrix of all by all is kept); not what libraries
and the allocator take besides. Nothing of the process is replaced or set: PyTorch's modes see the calls of this thread
for as long as the work lasts.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

LACKING = {  # in PyTorch's counter, formulas on shapes: addmm_ adds (N, K) @ (K, M) to what is there; a CPU's attention
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}
FORMULAS = flop_registry | {function: shape_wrapper(formula) for function, formula in LACKING.items()}


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of matrix products and convolutions, a multiplication and an addition each.

    By the unit of a GPU that does them: what is in half precision in half precision, what is in float32 in TF32 where
    that is allowed, else in float32 as such.
    """

    half: float = 0
    tf32: float = 0
    float32: float = 0

    @property
    def all(self) -> float:
        return self.half + self.tf32 + self.float32

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.half + other.half, self.tf32 + other.tf32, self.float32 + other.float32)

    def __sub__(self, other: Flops) -> Flops:
        return self + other * -1

    def __mul__(self, times: float) -> Flops:
        return Flops(self.half * times, self.tf32 * times, self.float32 * times)


@dataclass(frozen=True, slots=True)
class Reading:
    """peak: bytes of the tensors made meanwhile that live at the same time."""

    flops: Flops
    peak: float


def gauge(work: Callable[[], object], tf32: bool = False) -> Reading:
    """What `work()` takes, whose tensors are all on the meta device; its result counts as long as it lives.

    tf32: whether TF32 is allowed, in matrix products and convolutions alike.
    """
    with _FusedAttention(), _Meter(tf32) as meter:
        work()
    return Reading(meter.flops, meter.peak)


def checkpointed(function: Callable[..., object], *args: object) -> object:
    """Gradient checkpointing of what is measured, for diffusers' enable_gradient_checkpointing.

    In the backward pass the modes of functions are off. Here that of attention is on again for what is recomputed; with
    another checkpoint PyTorch finds that other tensors are kept than in the forward pass, and raises CheckpointError.
    """
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _FusedAttention()))


class _Meter(TorchDispatchMode):
    """Floating-point operations, and bytes of the storages made inside that are alive: now and at most.

    The formulas are FlopCounterMode's; that itself follows modules by hooks, which keep tensors alive too long.
    """

    def __init__(self, tf32: bool):
        super().__init__()
        self.full = "tf32" if tf32 else "float32"  # the unit of what is in float32
        self.flops = Flops()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := FORMULAS.get(function._overloadpacket):
            self.flops += Flops(**{self._unit(args): formula(*args, **(kwargs or {}), out_val=result)})
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)} if made else ()
        for tensor in made:
            if tensor.untyped_storage()._cdata not in given:  # no view of one that was there before
                self._add(tensor.untyped_storage())
        return result

    def _unit(self, args: tuple) -> str:
        return self.full if next(a for a in args if isinstance(a, Tensor)).dtype == torch.float32 else "half"

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def gone(_):
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _FusedAttention(TorchFunctionMode):
    """Attention without a mask is flash attention, as on a GPU: the meta device would keep the whole matrix."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            given = dict(kwargs or {})
            mask = {"mask": given.pop("attn_mask")} if "attn_mask" in given else {}
            return _attention(*args, **mask, **given)
        return function(*args, **(kwargs or {}))


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *more, **options) -> Tensor:
    """PyTorch's SDPA, whose further arguments are dropout_p, is_causal and, by name, scale and enable_gqa."""
    if mask is not None:
        return F.scaled_dot_product_attention(query, key, value, mask, *more, **options)
    causal = options.get("is_causal", more[1] if len(more) > 1 else False)
    scale = options.get("scale")
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[0]
