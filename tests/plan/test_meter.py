"""engine/plan/meter.py: operations and bytes of small computations, counts by hand."""

from threading import Thread

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint
from torch.utils.flop_counter import FlopCounterMode

from strop.engine.plan.meter import Flops, checkpointed, measure, measure_by_size


def empty(*shape, dtype=torch.float32):
    return torch.empty(shape, device="meta", dtype=dtype)


def test_a_product_is_two_operations_for_each_pair_of_numbers():
    a, b = empty(3, 5), empty(5, 7)
    measured = measure(lambda: a @ b)
    assert measured.flops == Flops(float32=2 * 3 * 5 * 7)
    assert measure(lambda: a @ b, tf32=True).flops == Flops(tf32=2 * 3 * 5 * 7)
    assert measured.peak == 4 * 3 * 7


@pytest.mark.parametrize(
    "dtype, flops",
    [(torch.float32, Flops(tf32=2 * 9 * 4 * 6 * 64)), (torch.float16, Flops(half=2 * 9 * 4 * 6 * 64))],
    ids=["float32", "float16"],
)
def test_a_convolution_counts_for_the_unit_that_does_it(dtype, flops):
    x, weight = empty(1, 4, 8, 8, dtype=dtype), empty(6, 4, 3, 3, dtype=dtype)
    assert measure(lambda: F.conv2d(x, weight, padding=1), tf32=True).flops == flops


def test_the_peak_is_of_what_lives_at_once():
    def chain():
        x = empty(100)  # 400 bytes
        x = x + 1
        x = x + 1
        return x.view(10, 10)[1:]  # no bytes of its own

    assert measure(chain).peak == 2 * 400


def test_what_is_known_of_a_call_counts_as_the_call_did():
    def work():
        x = empty(3, 4, 5) @ empty(5, 6)  # the product, and a view of it
        x.add_(1)
        left, right = x.split(3, dim=-1)
        return left.contiguous(), F.layer_norm(right, (3,)), x.topk(2)

    first = measure(work)
    assert first.flops == Flops(float32=2 * 12 * 5 * 6)
    assert first.peak == 4 * (72 + 36 + 36) + (4 + 8) * 24
    assert measure(work) == first


def test_memory_that_was_there_before_is_not_counted():
    x = empty(100)
    assert measure(lambda: x.view(10, 10).add_(1)).peak == 0


def test_attention_keeps_no_matrix_of_all_by_all():
    q = empty(1, 2, 1000, 8, dtype=torch.float16)
    measured = measure(lambda: F.scaled_dot_product_attention(q, q, q))
    assert measured.flops.all == 2 * (2 * 2 * 1000 * 1000 * 8)
    assert measured.peak < 10 * q.nbytes < 2 * 2 * 1000 * 1000


def test_checkpointing_trades_operations_for_memory():
    weights = [empty(64, 64).requires_grad_() for _ in range(8)]
    for weight in weights:
        weight.grad = torch.empty_like(weight)
    block = lambda x, w: torch.sigmoid(torch.sigmoid(torch.sigmoid(x @ w)))

    def run(call):
        x = empty(1000, 64)
        for weight in weights:
            x = call(x, weight)
        x.sum().backward()

    plain = measure(lambda: run(block))
    again = measure(lambda: run(lambda x, w: checkpoint(block, x, w, use_reentrant=False)))
    forward = 2 * 1000 * 64 * 64 * 8
    assert again.flops.all - plain.flops.all == forward
    assert again.peak < 0.7 * plain.peak


@pytest.mark.parametrize("again", [None, checkpointed], ids=["kept", "recomputed"])
def test_attention_is_fused_in_the_backward_pass_too(again):
    """Its formula: two products forward, five backward, and what is recomputed forward once more."""
    q = empty(1, 2, 1000, 8, dtype=torch.float16).requires_grad_()
    q.grad = torch.empty_like(q)
    attend = lambda q: F.scaled_dot_product_attention(q.sigmoid(), q, q)
    measured = measure(lambda: (again(attend, q) if again else attend(q)).sum().backward())
    assert measured.flops.all == (2 + 5 + 2 * (again is not None)) * 2 * 2 * 1000 * 1000 * 8
    assert measured.peak < 20 * q.nbytes < 2 * 2 * 1000 * 1000


def test_a_checkpoint_that_would_be_counted_wrongly_is_refused():
    q = empty(1, 2, 100, 8).requires_grad_()
    attend = lambda q: F.scaled_dot_product_attention(q.sigmoid(), q, q)
    with pytest.raises(CheckpointError):
        measure(lambda: checkpoint(attend, q, use_reentrant=False).sum().backward())


def test_a_mask_is_not_fused():
    q, mask = empty(1, 2, 100, 8), empty(100, 100)
    measured = measure(lambda: F.scaled_dot_product_attention(q, q, q, attn_mask=mask))
    assert measured.peak > 2 * 100 * 100 * 4


def test_the_process_is_left_alone_while_it_measures():
    """Another thread, and this one through the function itself, have PyTorch as it was."""
    attention, states, shapes = F.scaled_dot_product_attention, [], []
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    state = lambda: (torch.get_default_dtype(), *(backend.allow_tf32 for backend in backends))
    real = torch.ones(1, 1, 4, 2)

    def elsewhere():
        shapes.append(F.scaled_dot_product_attention(real, real, real).shape)
        states.append(state())

    def work():
        assert F.scaled_dot_product_attention is attention
        thread = Thread(target=elsewhere)
        thread.start()
        thread.join()
        return empty(3, 5) @ empty(5, 7)

    before = state()
    assert measure(work, tf32=not backends[0].allow_tf32).flops.all == 2 * 3 * 5 * 7
    assert F.scaled_dot_product_attention is attention
    assert states == [before] == [state()]
    assert shapes == [real.shape]


def test_operations_are_those_of_pytorchs_counter():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 5))
    x = empty(2, 3, 8, 8)
    work = lambda: model(x).sum().backward()
    with FlopCounterMode(display=False) as counter:
        work()
    assert measure(work).flops.all == counter.get_total_flops()


def test_what_grows_with_a_size_is_known_at_every_other_size():
    """A product of n rows, attention of n by n, and a product without n; beside them 400 bytes whatever n is."""

    def work(n):
        fixed, x, q = empty(10, 10), empty(n, 5), empty(1, 2, n, 8, dtype=torch.float16)
        return fixed @ fixed, x @ empty(5, 7), F.scaled_dot_product_attention(q, q, q)

    of = measure_by_size(lambda: work(127 * 131), 127 * 131)
    assert of(3).flops == Flops(half=2 * 2 * 2 * 3 * 3 * 8, float32=2 * 10**3 + 2 * 3 * 5 * 7)
    for n in (1, 3, 127 * 131, 10**6):
        assert of(n) == measure(lambda n=n: work(n))


def test_flops_add_and_scale():
    assert (Flops(1, 2, 3) + Flops(1, 1, 1)) * 2 - Flops(4, 0, 0) == Flops(0, 6, 8)
    assert Flops(1, 2, 3).all == 6
