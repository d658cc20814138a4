"""Measures the floating-point operations and the peak memory of a computation by running it on the meta device.

Nothing is computed and nothing allocated, so full-size networks are measured on any machine in seconds. The peak is of
the tensors that live at once, with attention fused as on a GPU (it stores no matrix of all queries by all keys), and
without the memory of libraries and the allocator. Nothing of the process is replaced or set: PyTorch's modes see
the calls of this thread while the work runs.
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

# Formulas that PyTorch's counter lacks: addmm_, which adds (N, K) @ (K, M) to a tensor, and attention on a CPU.
EXTRA_FORMULAS = {
    torch.ops.aten.addmm_: lambda out, a, b, **_: 2 * a[0] * a[1] * b[1],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
    ),
}
FORMULAS = flop_registry | {function: shape_wrapper(formula) for function, formula in EXTRA_FORMULAS.items()}


@dataclass(frozen=True, slots=True)
class Flops:
    """Operations of matrix products and convolutions, where a multiplication and an addition are two.

    They are counted by the unit of a GPU that does them: half precision, TF32 (float32 tensors where TF32 is
    allowed) and float32.
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
class Measurement:
    """The operations of some work, and the most bytes at one time of the tensors that it has made."""

    flops: Flops
    peak: float


def measure(work: Callable[[], object], tf32: bool = False) -> Measurement:
    """Measures `work()`, which must use the meta device alone; its result counts while it lives.

    tf32: whether TF32 is allowed, in matrix products and convolutions alike.
    """
    with _FusedAttention(), _Meter(tf32) as meter:
        work()
    return Measurement(meter.flops, meter.peak)


def checkpointed(function: Callable[..., object], *args: object) -> object:
    """Checkpoints a function inside `measure`; it is an argument for diffusers' enable_gradient_checkpointing.

    PyTorch switches function modes off in a backward pass. This checkpoint switches fused attention on again for what
    is recomputed; with another one, PyTorch finds other tensors than in the forward pass and raises CheckpointError.
    """
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _FusedAttention()))


class _Meter(TorchDispatchMode):
    """Counts operations, and the bytes of storages made inside that are alive: `now` and at the `peak`.

    The formulas are FlopCounterMode's. That mode is not used because it follows modules by hooks, which keep tensors
    alive too long.
    """

    def __init__(self, tf32: bool):
        super().__init__()
        self.float32_unit = "tf32" if tf32 else "float32"
        self.flops = Flops()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if formula := FORMULAS.get(function._overloadpacket):
            self.flops += Flops(**{self._unit(args): formula(*args, **(kwargs or {}), out_val=result)})
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        inputs = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)} if outputs else ()
        for tensor in outputs:
            if tensor.untyped_storage()._cdata not in inputs:  # no view of a tensor that was there before
                self._add(tensor.untyped_storage())
        return result

    def _unit(self, args: tuple) -> str:
        return self.float32_unit if next(a for a in args if isinstance(a, Tensor)).dtype == torch.float32 else "half"

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive:
            return

        def freed(_):
            self.now -= size
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class _FusedAttention(TorchFunctionMode):
    """Runs attention without a mask as flash attention, as on a GPU; the meta device would keep the whole matrix."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            options = dict(kwargs or {})
            mask = {"mask": options.pop("attn_mask")} if "attn_mask" in options else {}
            return _attention(*args, **mask, **options)
        return function(*args, **(kwargs or {}))


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *more, **options) -> Tensor:
    """Takes the arguments of SDPA: after mask come dropout_p, is_causal and, by name, scale and enable_gqa."""
    if mask is not None:
        return F.scaled_dot_product_attention(query, key, value, mask, *more, **options)
    causal = options.get("is_causal", more[1] if len(more) > 1 else False)
    scale = options.get("scale")
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[0]
