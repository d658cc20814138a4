"""Measures the floating-point operations and the peak memory of a computation by running it on the meta device.

Nothing is computed and nothing allocated, so full-size networks are measured on any machine in seconds. The peak is of
the tensors that live at once, with attention fused as on a GPU (it stores no matrix of all queries by all keys), and
without the memory of libraries and the allocator. Nothing of the process is replaced or set: PyTorch's modes see
the calls of this thread while the work runs.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
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
IN_PLACE, VIEW = "the result is the first argument", "it is a view of an argument, which the function makes itself"
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

    def __sub__(self, other: Measurement) -> Measurement:
        return Measurement(self.flops - other.flops, self.peak - other.peak)

    def __mul__(self, times: float) -> Measurement:
        return Measurement(self.flops * times, self.peak * times)


def measure(work: Callable[[], object], tf32: bool = False) -> Measurement:
    """Measures `work()`, which must use the meta device alone; its result counts while it lives.

    tf32: whether TF32 is allowed, in matrix products and convolutions alike.
    """
    return measure_by_size(work, 0, tf32)(0)


def measure_by_size(work: Callable[[], object], size: int, tf32: bool = False) -> Callable[[int], Measurement]:
    """Measures `work()` at one size and returns what it takes at any: a function of the size, exact in both numbers.

    size: of the work as it runs, such as the pixels of a latent, with prime factors that no other dimension of a tensor
    has: operations and bytes that it divides are those that grow with it, operations that its square divides with the
    square. 0 means that nothing is known to grow.
    """
    with _FusedAttention(), _Meter(size, tf32) as meter:
        work()
    return meter.at


def checkpointed(function: Callable[..., object], *args: object) -> object:
    """Checkpoints a function inside `measure`; it is an argument for diffusers' enable_gradient_checkpointing.

    PyTorch switches function modes off in a backward pass. This checkpoint switches fused attention on again for what
    is recomputed; with another one, PyTorch finds other tensors than in the forward pass and raises CheckpointError.
    """
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _FusedAttention()))


class _Meter(TorchDispatchMode):
    """Counts operations, and the bytes of storages made inside that are alive: `fixed`, and `grown` for each of `size`.

    The formulas are FlopCounterMode's. That mode is not used because it follows modules by hooks, which keep tensors
    alive too long. operations: by unit of a GPU and power of the size. peaks: the most `fixed` there was beside so much
    `grown`. calls: what all meters know of a function with such arguments, its operations and what makes its result
    anew, IN_PLACE or VIEW; on the meta device most functions are decompositions in Python, which take a hundred times
    as long.
    """

    calls: ClassVar[dict[tuple, tuple[int, object]]] = {}

    def __init__(self, size: int, tf32: bool):
        super().__init__()
        self.size, self.float32_unit = size, "tf32" if tf32 else "float32"
        self.fixed = self.grown = 0
        self.operations, self.peaks = Counter(), {0: 0}
        self.alive: dict[int, weakref.ref] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and telling Dynamo so takes longer than most calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        key = (function, _signature(args), _signature(kwargs.items()) if kwargs else None)
        operations, make = self.calls.get(key, (0, None))
        if make is None or make is VIEW:
            result = function(*args, **kwargs)
        else:
            result = args[0] if make is IN_PLACE else make()
        if make is None:
            operations, make = self.calls[key] = _described(function, args, kwargs, result)
        if operations:
            power, each = self._powers(operations, 2)
            self.operations[self._unit(args), power] += each
        if make is not VIEW and make is not IN_PLACE:
            for tensor in _tensors(result):
                self._add(tensor.untyped_storage())
        return result

    def at(self, size: int) -> Measurement:
        """Returns what was measured, had it been of this size."""
        units = Counter()
        for (unit, power), each in self.operations.items():
            units[unit] += each * size**power
        return Measurement(Flops(**units), max(fixed + grown * size for grown, fixed in self.peaks.items()))

    def _powers(self, count: int, most: int) -> tuple[int, int]:
        """Returns (power of the size in a count, at most `most`; what is left of the count without it)."""
        power = 0
        while self.size and power < most and count % self.size == 0:
            power, count = power + 1, count // self.size
        return power, count

    def _unit(self, args: tuple) -> str:
        return self.float32_unit if next(a for a in args if isinstance(a, Tensor)).dtype == torch.float32 else "half"

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        grows, each = self._powers(storage.nbytes(), 1)
        fixed, grown = (0, each) if grows else (each, 0)

        def freed(_):
            self.fixed -= fixed
            self.grown -= grown
            del self.alive[key]

        self.alive[key] = weakref.ref(storage, freed)
        self.fixed += fixed
        self.grown += grown
        if self.fixed > self.peaks.get(self.grown, -1):
            self.peaks[self.grown] = self.fixed


class _FusedAttention(TorchFunctionMode):
    """Runs attention without a mask as flash attention, as on a GPU; the meta device would keep the whole matrix."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            function = _attention
        return function(*args, **(kwargs or {}))


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *more, **options) -> Tensor:
    """Takes the arguments of SDPA: after the mask come dropout_p, is_causal and, by name, scale and enable_gqa."""
    if attn_mask is not None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask, *more, **options)
    causal, scale = options.get("is_causal", more[1] if len(more) > 1 else False), options.get("scale")
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, scale=scale)[0]


def _described(function, args: tuple, kwargs: dict, result: object) -> tuple[int, object]:
    """Returns the operations of a call that gave this result, and what makes it anew."""
    formula = FORMULAS.get(function._overloadpacket)
    operations = formula(*args, **kwargs, out_val=result) if formula else 0
    before = {tensor.untyped_storage()._cdata for tensor in _tensors((args, tuple(kwargs.values())))}
    shared = {tensor.untyped_storage()._cdata in before for tensor in _tensors(result)}
    if True not in shared:
        return operations, _maker(result)
    return operations, IN_PLACE if args and result is args[0] else VIEW


def _signature(values: Iterable) -> tuple:
    """Returns all that a result on the meta device depends on, hashable: of a tensor its layout."""
    return tuple(
        (value.shape, value.stride(), value.dtype)
        if isinstance(value, Tensor)
        else _signature(value)
        if isinstance(value, (list, tuple))
        else (type(value), value)
        for value in values
    )


def _tensors(value: object) -> Iterator[Tensor]:
    """Yields the tensors of a value, or of nested lists and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _maker(result: object) -> Callable[[], object]:
    """Returns what makes such a result anew: tensors of the meta device, in the tuples that they are in."""
    if isinstance(result, Tensor):
        return partial(torch.empty_strided, result.shape, result.stride(), dtype=result.dtype, device="meta")
    if isinstance(result, (list, tuple)):
        makers = [_maker(each) for each in result]
        return lambda: tuple(make() for make in makers)
    return lambda: result
