"""The Triton kernels of strop.kernels: their arithmetic against float64, in Triton's interpreter where there is no GPU,
and how they sit in torch: opcheck, autograd, torch.compile, and which code answers a call.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

import strop.kernels as kernels
from strop.kernels import adaln, backend, ddim, use_reference

triton = pytest.importorskip("triton", reason="Triton is not installed: every call goes to the reference")

from strop.kernels import adaln_triton, ddim_triton  # noqa: E402

OPS = ("adaln_modulate", "gated_residual_adaln", "ddim_branch")
RESULTS = {"y", "h", "branches", "x0_hat"}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", "few"), id="interpreter"),
        pytest.param(("cpu", "many"), id="interpreter-many", marks=pytest.mark.slow),
        pytest.param(("cuda", "few"), id="gpu", marks=pytest.mark.gpu),
        pytest.param(("cuda", "many"), id="gpu-many", marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
)
def figures(request):
    """What kernel_cases.py measured in a process of its own."""
    device, cases = request.param
    env = os.environ | {"TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    command = [sys.executable, str(Path(__file__).with_name("kernel_cases.py")), device, cases]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found.pop("on_triton")  # else the reference would be compared with itself
    return found


def errors(figures, op, dtype):
    """(shape and name of the tensor, error of the kernel, error of plain PyTorch) of every case."""
    cases = {key: value for key, value in figures.items() if key.startswith(f"{op}/{dtype}/")}
    assert len(cases) > 1
    return [(f"{key}: {name}", *both) for key, value in cases.items() for name, both in value.items()]


@pytest.mark.parametrize("op", OPS)
def test_float32_is_near_float64(figures, op):
    for name, ours, _ in errors(figures, op, "float32"):
        assert ours < (2e-6 if name.split()[-1] in RESULTS else 2e-5), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("op", OPS)
def test_narrow_types_are_as_good_as_pytorch_in_that_type(figures, op, dtype):
    for name, ours, plain in errors(figures, op, dtype):
        assert ours <= 1.1 * plain + 1e-6, f"{name}: {ours} against {plain}"
        assert ours < 1.5 * torch.finfo(getattr(torch, dtype)).eps, f"{name}: {ours}"


def test_kernels_agree_with_the_published_numbers(figures):
    for case, found in figures["golden"].items():
        for name, error in found.items():
            assert error < 4e-5, f"{case}: {name}"


@pytest.mark.parametrize("op", OPS)
def test_arguments_that_are_not_dense_give_the_same_bits(figures, op):
    assert figures["strides"][op]


@pytest.mark.slow
def test_judge_and_loss_agree_with_the_published_numbers_on_the_kernels():
    """Their own tests, golden numbers among them, with every kernel interpreted; but for those that ask for the bits
    of F.layer_norm, which sums in another order."""
    tests = [str(Path(__file__).parents[1] / name) for name in ("judge/test_clip.py", "methods/spo/test_loss.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not bit_for_bit and not undoes"]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([*command, *tests], env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-3000:]


def draw(*shape, seed=0, grad=True, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=dtype).requires_grad_(grad)


def samples(dtype=torch.float32):
    """Arguments of every op as torch sees it."""
    rows, vector, weight = (
        [draw(*shape, seed=i, dtype=dtype) for i in range(4)] for shape in ((2, 3, 8), (2, 8), (8,))
    )
    latents = [draw(2, 4, 3, 3, seed=i, dtype=dtype) for i in range(3)]
    table = torch.rand((5, 2), generator=torch.Generator().manual_seed(1)) + 0.5
    noise = draw(3, 2, 4, 3, 3, dtype=dtype)
    return {
        "adaln_modulate": (rows[0], *weight[:2], *vector[:2], 1e-5),
        "gated_residual_adaln": (*rows[:2], vector[2], *weight[:2], *vector[:2], 1e-5),
        "ddim_branch": (*latents, 5.0, table, noise),
        "ddim_branch-unguided": (latents[0], None, latents[1], 1.0, table, noise[:0]),
    }


SAMPLES = tuple(samples())


def torch_op(name):
    return getattr(torch.ops.strop, name.partition("-")[0])


def public(name):
    return getattr(kernels, name.partition("-")[0])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, device):
    args = [a.detach().to(device).requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in samples()[name]]
    opcheck(torch_op(name), args)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_gradients_of_the_op_are_those_of_its_formula(name):
    """In float64, where the op runs its reference: forward and backward formulas, and which gradient goes where."""
    args = list(samples(torch.float64)[name])
    wanted = [i for i, a in enumerate(args) if torch.is_tensor(a) and a.requires_grad]

    def call(op, *given):
        filled = [given[wanted.index(i)] if i in wanted else a for i, a in enumerate(args)]
        found = op(*filled)
        found = found if isinstance(found, tuple) else (found,)
        return found[: {"adaln_modulate": 1, "gated_residual_adaln": 2}.get(name, len(found))]

    given = [args[i] for i in wanted]
    for ours, reference in zip(call(torch_op(name), *given), call(public(name), *given), strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *g: call(torch_op(name), *g), given)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_without_a_break_gives_the_same(name, compiler):
    args = samples()[name]
    given = [a for a in args if torch.is_tensor(a) and a.requires_grad]

    def total(*args):
        found = public(name)(*args)
        return sum(each.square().sum() for each in (found if isinstance(found, tuple) else (found,)))

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend=compiler)(*args)
    eager = total(*args)
    torch.testing.assert_close(compiled, eager)
    gradients = zip(torch.autograd.grad(compiled, given), torch.autograd.grad(eager, given), strict=True)
    for ours, expected in gradients:
        torch.testing.assert_close(ours, expected)


WRITTEN = {
    "adaln_modulate": [{"y_ptr", "stats_ptr"}, {"dx_ptr", "sums_ptr"}, {"dshift_ptr", "dscale_ptr", "scaled_ptr"}],
    "gated_residual_adaln": [
        {"h_ptr", "y_ptr", "stats_ptr"},
        {"dx_ptr", "dbranch_ptr", "sums_ptr"},
        {"dshift_ptr", "dscale_ptr", "dgate_ptr", "scaled_ptr"},
    ],
    "ddim_branch": [{"branches_ptr", "x0_ptr"}],
}


@pytest.mark.parametrize(
    "dynamic", [pytest.param(False, id="fixed"), pytest.param(True, id="any-size", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", WRITTEN)
def test_a_compiled_graph_holds_the_kernels_and_knows_what_they_write(name, dynamic, monkeypatch):
    """Traced as for a GPU, with a driver that only names one; the graphs are read and not run."""
    from torch._dynamo.backends.common import aot_autograd
    from triton.backends.compiler import GPUTarget

    target = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32), get_current_device=lambda: 0)
    monkeypatch.setattr(triton.runtime.driver, "_active", target)
    for module in (adaln, adaln_triton, ddim, ddim_triton):
        monkeypatch.setattr(module, "on_triton", lambda *tensors, **width: True)
    written = []

    def read(graph, inputs):
        nodes = [n for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]
        written.extend(set(n.kwargs["tensors_to_clone"]) for n in nodes)
        outputs = [n if n is None else n.meta["val"] for n in graph.graph.output_node().args[0]]
        size = lambda number: number.node.hint if isinstance(number, torch.SymInt) else number
        empty = lambda o: torch.zeros([size(s) for s in o.shape], dtype=o.dtype) if torch.is_tensor(o) else o
        run = lambda given: [empty(o) for o in outputs]
        run._boxed_call = True
        return run

    torch._dynamo.reset()
    compiler = aot_autograd(fw_compiler=read, bw_compiler=read)
    found = torch.compile(public(name), fullgraph=True, backend=compiler, dynamic=dynamic)(*samples()[name])
    found = found if isinstance(found, tuple) else (found,)
    sum(each.sum() for each in found).backward()
    assert written == WRITTEN[name]


def test_cpu_tensors_go_to_the_reference_bit_for_bit():
    x, weight, bias, shift, scale, eps = samples()["adaln_modulate"]
    assert not backend.on_triton(x)
    found = kernels.adaln_modulate(x, weight, bias, shift, scale, eps)
    assert torch.equal(found, adaln.adaln_modulate_ref(x, weight, bias, shift, scale, eps))


def test_one_place_decides():
    """By device, by type, and by who forces the reference."""
    gpu = lambda dtype: SimpleNamespace(is_cuda=True, dtype=dtype, device=torch.device("cuda"))
    assert backend.on_triton(gpu(torch.float32), gpu(torch.bfloat16))
    assert not backend.on_triton(gpu(torch.float32), gpu(torch.float64))
    assert [backend.on_triton(gpu(torch.float32), width=width) for width in (4096, 4097)] == [True, False]
    try:
        use_reference(True)
        assert not backend.on_triton(gpu(torch.float32))
    finally:
        use_reference(False)
    assert backend.on_triton(gpu(torch.float32))


@pytest.mark.parametrize("name", ["adaln_modulate", "gated_residual_adaln"])
def test_rows_that_registers_do_not_hold_go_to_the_reference(name, monkeypatch):
    """Forward and backward, where a kernel that is not interpreted would fail on tensors of the CPU."""
    monkeypatch.setattr(backend, "INTERPRETED", True)
    width = 4097
    rows, row = draw(1, 2, width, seed=0), draw(1, width, seed=1)
    weight, bias = draw(width, seed=2), draw(width, seed=3)
    given = (rows, weight, bias, row, row) if name == "adaln_modulate" else (rows, rows, row, weight, bias, row, row)
    assert backend.on_triton(rows)
    expected = getattr(adaln, f"{name}_ref")(*given)
    results = [f if isinstance(f, tuple) else (f,) for f in (expected, public(name)(*given))]
    results.append(torch_op(name)(*given, 1e-5)[: len(results[0])])
    for found in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, results[0], strict=True))
    ours, theirs = (torch.autograd.grad(found[-1].sum(), rows)[0] for found in (results[2], results[0]))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("index, entered", [(0, []), (1, [1])])
def test_a_kernel_is_launched_on_the_device_of_its_tensors(index, entered, monkeypatch):
    """And where that is the current one, nothing is switched."""
    current, switched, launched = [0], [], []

    @contextmanager
    def device(of):
        switched.append(of.index)
        current.append(of.index)
        yield
        current.pop()

    kernel = defaultdict(lambda: lambda *args, **constants: launched.append((current[-1], args, constants)))
    monkeypatch.setattr(backend, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))
    backend.launch(kernel)[(3,)](x, 2, ROWS=4)
    assert launched == [(index, (x, 2), {"ROWS": 4})]
    assert (switched, list(kernel), current) == (entered, [(3,)], [0])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", SAMPLES)
def test_the_second_gpu_gives_the_bits_of_the_first(name):
    """While the first is current."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        args = [
            a.detach().to(device).requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in samples()[name]
        ]
        found = public(name)(*args)
        found = found if isinstance(found, tuple) else (found,)
        wanted = [a for a in args if torch.is_tensor(a) and a.requires_grad]
        gradients = torch.autograd.grad([f.sum() for f in found], wanted, allow_unused=True)
        assert all(f.device == torch.device(device) for f in found)
        results.append([f.detach().cpu() for f in (*found, *gradients) if f is not None])
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """The last rows of a tensor that 32 bits cannot index are those of the same rows alone."""
    rows, length, width = 2, 2**20 + 3, 1024
    x = torch.empty((rows, length, width), dtype=torch.bfloat16, device="cuda")
    x.normal_(generator=torch.Generator("cuda").manual_seed(0))
    weight, bias, shift, scale = (x[0, i].clone() for i in range(4))
    shift, scale = shift.expand(rows, -1), scale.expand(rows, -1)
    y = kernels.adaln_modulate(x, weight, bias, shift, scale)
    last = kernels.adaln_modulate(x[1:, -5:].clone(), weight, bias, shift[1:], scale[1:])
    assert torch.equal(y[1:, -5:], last)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPS)
def test_compiled_on_a_gpu_gives_the_eager_bits(name):
    args = [a.detach().cuda().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a for a in samples()[name]]
    torch._dynamo.reset()
    eager, compiled = public(name)(*args), torch.compile(public(name), fullgraph=True)(*args)
    pairs = zip(*((f if isinstance(f, tuple) else (f,)) for f in (eager, compiled)), strict=True)
    for ours, expected in pairs:
        assert torch.equal(ours, expected)
