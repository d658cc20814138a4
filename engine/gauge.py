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
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, slots=True)
class Reading:
    """flops: of matrix products and convolutions, a multiplication and an addition each; peak: bytes of the tensors
    made meanwhile that live at the same time."""

    flops: float = 0
    peak: float = 0

    def __add__(self, other: Reading) -> Reading:
        """One after the other."""
        return Reading(self.flops + other.flops, max(self.peak, other.peak))


def gauge(work: Callable[[], object]) -> Reading:
    """What `work()` takes, whose tensors are all on the meta device; its result counts as long as it lives."""
    with _FusedAttention(), FlopCounterMode(display=False) as flops, _Living() as living:
        work()
    return Reading(flops.get_total_flops(), living.peak)


@contextmanager
def on_meta(dtype: torch.dtype) -> Iterator[None]:
    """Inside, networks are built on the meta device, in `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


class _Living(TorchDispatchMode):
    """Bytes of the storages made inside that are alive: now and at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self._add(leaf.untyped_storage())
        return result

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
    """Attention without a mask as flash attention has it; the meta device would keep the matrix of all by all."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        masked = kwargs.get("attn_mask") is not None or len(args) > 3
        if function is not F.scaled_dot_product_attention or masked:
            return function(*args, **kwargs)
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))
        causal, scale = kwargs.get("is_causal", False), kwargs.get("scale")
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[0]
