"""What a computation takes, found by running it on the meta device: floating-point operations and peak memory.

Nothing is computed and nothing allocated, so full-size networks are measured on any machine in seconds. Counted are the
tensors that live at once, attention as the fused one of a GPU (no matrix of all by all is kept); not what libraries
and the allocator take besides.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
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

    By the unit of a GPU that does them: what is in half precision in half precision, what is in float32 as PyTorch
    is set, which out of the box runs convolutions in TF32 and matrix products in float32 as such.
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


def gauge(work: Callable[[], object]) -> Reading:
    """What `work()` takes, whose tensors are all on the meta device; its result counts as long as it lives."""
    with _fused_attention(), _Meter() as meter:
        work()
    return Reading(meter.flops, meter.peak)


@contextmanager
def built_on(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """Inside, networks are built on this device, in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Inside, PyTorch is set to TF32 for what is in float32, or to float32 as such."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = allowed
        yield
    finally:
        for backend, own in zip(backends, before, strict=True):
            backend.allow_tf32 = own


class _Meter(TorchDispatchMode):
    """Floating-point operations, and bytes of the storages made inside that are alive: now and at most.

    The formulas are FlopCounterMode's; that itself follows modules by hooks, which keep tensors alive too long.
    """

    def __init__(self):
        super().__init__()
        self.flops = Flops()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := FORMULAS.get(function._overloadpacket):
            self.flops += Flops(**{self._unit(function, args): formula(*args, **(kwargs or {}), out_val=result)})
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)} if made else ()
        for tensor in made:
            if tensor.untyped_storage()._cdata not in given:  # no view of one that was there before
                self._add(tensor.untyped_storage())
        return result

    @staticmethod
    def _unit(function, args) -> str:
        if next(a for a in args if isinstance(a, Tensor)).dtype != torch.float32:
            return "half"
        convolution = "convolution" in str(function)
        tf32 = torch.backends.cudnn.allow_tf32 if convolution else torch.backends.cuda.matmul.allow_tf32
        return "tf32" if tf32 else "float32"

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


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Inside, attention without a mask is flash attention, as on a GPU: the meta device would keep the whole matrix.

    The function is replaced, because a TorchFunctionMode is off in what a checkpoint recomputes in the backward pass.
    """
    plain = F.scaled_dot_product_attention

    def fused(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
        if attn_mask is not None:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]

    with attention_by(fused):
        yield


@contextmanager
def attention_by(function: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, `function` is PyTorch's SDPA."""
    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = function
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain
