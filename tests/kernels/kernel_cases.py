"""What test_triton.py runs in a process of its own: `python kernel_cases.py cpu|cuda few|many`, on the CPU with
TRITON_INTERPRET=1. Prints as JSON, for every op, type and shape, how far Triton's result and that of plain PyTorch in
the same type lie from float64: the largest error over the largest value for results, relative 2-norms for gradients.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from strop.kernels import (
    adaln_modulate,
    backend,
    ddim_branch,
    ddim_x0_hat,
    gated_residual_adaln,
)
from strop.kernels.ddim import DDIMCoefficients

GOLDEN = Path(__file__).parents[1] / "golden"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROWS = [
    (2, 3, 5),
    (1, 9, 600),
    (1, 1, 1),
    (1, 9, 1280),
    (3, 17, 64),
    (5, 1, 769),
    (2, 70, 33),
    (1, 2, 4096),
    (1, 5, 2050),
]
LATENTS = [  # with k, and whether there is guidance
    ((2, 4, 17, 19), 3, True),
    ((2, 4, 17, 19), 1, False),
    ((3, 4, 5, 3), 9, False),
    ((3, 4, 5, 3), 2, True),
    ((1, 1, 1, 1), 1, True),
    ((2, 4, 17, 19), 4, True),
    ((2, 4, 17, 19), 5, True),
    ((3, 4, 5, 3), 2, False),
    ((1, 1, 1, 1), 1, False),
]
EPS = 1e-5


def draw(device, dtype, *shape, seed):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).to(device)


def worst(found, truth):
    return ((found.double() - truth).abs().max() / truth.abs().max()).item()


def norm(found, truth):
    """Relative 2-norm; of gradients that are rounding noise around a true zero, the plain one."""
    size = truth.norm()
    return ((found.double() - truth).norm() / (size if size > 1e-6 else 1)).item()


def run(call, given, wanted, grads=None):
    """Results of `call(**given)` and the gradients of the tensors named in `wanted`, by name."""
    given = dict(given)
    for name in wanted:
        given[name] = given[name].detach().clone().requires_grad_()
    results = call(**given)
    results = results if isinstance(results, tuple) else (results,)
    if grads is None:
        grads = [draw(r.device, r.dtype, *r.shape, seed=90 + i) for i, r in enumerate(results)]
    found = torch.autograd.grad(
        results, [given[name] for name in wanted], [g.to(r) for g, r in zip(grads, results, strict=True)]
    )
    return [r.detach() for r in results], list(found), grads


def compare(op, naive, truth, given, wanted, names):
    """{name: [error of op, error of naive]}; checks that op leaves its arguments alone and can be repeated."""
    before = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    results, gradients, grads = run(op, given, wanted)
    for name, value in before.items():
        assert torch.equal(given[name], value), f"{name} was modified"
    if not backend.INTERPRETED:  # where programs run one after the other
        again = run(op, given, wanted, grads)
        for first, second in zip(results + gradients, again[0] + again[1], strict=True):
            assert torch.equal(first, second), "not the same bits again"
    plain, plain_gradients, _ = run(naive, given, wanted, grads)
    exact = {k: v.double() if isinstance(v, torch.Tensor) and k != "coefficients" else v for k, v in given.items()}
    true, true_gradients, _ = run(truth, exact, wanted, grads)
    errors = {n: [worst(a, c), worst(b, c)] for n, a, b, c in zip(names, results, plain, true, strict=True)}
    for n, a, b, c in zip(wanted, gradients, plain_gradients, true_gradients, strict=True):
        assert a.dtype == given[n].dtype
        errors[f"d{n}"] = [norm(a, c), norm(b, c)]
    return errors


def modulate(x, weight, bias, shift, scale):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS) * (1 + scale[:, None]) + shift[:, None]


def gated(residual, branch, gate, weight, bias, shift, scale):
    h = residual + gate[:, None] * branch
    return h, modulate(h, weight, bias, shift, scale)


def adaln(device, dtype, shape):
    rows, _, width = shape
    parts = draw(device, dtype, rows, 6 * width, seed=1).chunk(6, dim=-1)  # not dense, as in the engine
    given = {
        "residual": draw(device, dtype, *shape, seed=2) * 3 + 1,
        "branch": draw(device, dtype, *shape, seed=3),
        "gate": parts[0],
        "weight": draw(device, dtype, width, seed=4) + 1,
        "bias": draw(device, dtype, width, seed=5),
        "shift": parts[1],
        "scale": parts[2],
    }
    both = compare(gated_residual_adaln, gated, gated, given, list(given), ["h", "y"])
    single = {"x" if k == "residual" else k: v for k, v in given.items() if k not in ("branch", "gate")}
    return {
        "adaln_modulate": compare(adaln_modulate, modulate, modulate, single, list(single), ["y"]),
        "gated_residual_adaln": both,
    }


def guide(uncond, text, guidance):
    return text if uncond is None else uncond + guidance * (text - uncond)


def branch(x_t, eps_uncond, eps_text, guidance, coefficients, noise):
    a, b, c, d, sigma = coefficients[..., None, None, None]
    m = guide(eps_uncond, eps_text, guidance)
    return (c * x_t + d * m + sigma * noise).to(x_t.dtype), a * x_t + b * m


def exactly(formula):
    """The formula with its table in float64."""
    return lambda **given: formula(**given | {"coefficients": given["coefficients"].double()})


def ddim(device, dtype, shape, k, guided):
    """dtype of the latents; the model outputs are of dtype, too."""
    rows = shape[0]
    alphas = load_file(GOLDEN / "case1_ddim.safetensors")["schedule/alphas_cumprod"]
    table = DDIMCoefficients.build(alphas, 20, 1.0).table.to(device)[:, [0, 7, 18][:rows]]
    x_t, text, uncond = (draw(device, dtype, *shape, seed=i) for i in (1, 2, 3))
    noise = draw(device, dtype, k, *shape, seed=6)
    wanted = ["eps_uncond", "eps_text"] if guided else ["eps_text"]
    one = {"x_t": x_t, "eps_uncond": uncond if guided else None, "eps_text": text, "guidance": 5.0}
    one["coefficients"] = table
    call = {"noise": noise, **one}
    found = compare(ddim_branch, branch, exactly(branch), call, [*wanted, "x_t", "noise"], ["branches", "x0_hat"])
    assert torch.equal(ddim_x0_hat(**one), ddim_branch(**call)[1])
    return {"ddim_branch": found}


def golden(device, many):
    """Largest errors of branches and x0_hat against case 1."""
    case = {k: v.to(device) for k, v in load_file(GOLDEN / "case1_ddim.safetensors").items()}
    errors = {}
    for prediction in ("epsilon", "v_prediction"):
        for n in (20, 50) if many else (20,):
            for eta in (1.0, 0.5) if many else (0.5,):
                name = f"{prediction}/n{n}/eta{eta}"
                built = DDIMCoefficients.build(case["schedule/alphas_cumprod"], n, eta, prediction)
                step = [built.t.index(t) for t in case[f"in/timesteps_n{n}"].tolist()]
                table = built.table.to(device)[:, step]
                x, m = case["in/sample"], case["in/model_output"]
                noise = case["in/variance_noise_k3"].view(3, *x.shape)
                branches, x0_hat = ddim_branch(x, None, m, 1.0, table, noise)
                expected = {key.removeprefix(f"f64/{name}/"): v for key, v in case.items()}
                far = lambda found, truth: (found.double() - truth.view_as(found)).abs().max().item()
                errors[name] = {
                    "branches": far(branches, expected["x_prev_k3"]),
                    "x0_hat": far(x0_hat, expected["pred_original_sample"]),
                }
    return errors


def strides(device):
    """Whether arguments that are not dense give the bits that dense ones give."""
    turned = lambda *shape, seed: draw(device, torch.float32, *reversed(shape), seed=seed).permute(
        *reversed(range(len(shape)))
    )
    x, branch, gate, vector = (turned(2, *size, seed=i) for i, size in enumerate(((3, 20), (3, 20), (20,), (20,))))
    weight, bias = (draw(device, torch.float32, 40, seed=seed)[::2] for seed in (4, 7))
    row = vector[:1].expand(2, -1)
    latents, noise = turned(2, 4, 3, 5, seed=5), turned(3, 2, 4, 3, 5, seed=6)
    table = DDIMCoefficients.build(torch.linspace(0.99, 0.01, 1000), 20, 1.0).table.to(device)[:, 3:4].expand(5, 2)
    calls = {
        "adaln_modulate": (adaln_modulate, (x, weight, bias, vector, row)),
        "gated_residual_adaln": (gated_residual_adaln, (x, branch, gate, weight, bias, row, vector)),
        "ddim_branch": (ddim_branch, (latents, latents, latents, 5.0, table, noise)),
    }
    same = {}
    for name, (op, given) in calls.items():
        results = []
        for dense in (False, True):
            args = [a.contiguous() if dense and isinstance(a, torch.Tensor) else a for a in given]
            args = [a.requires_grad_() if i in (0, 2) and "adaln" in name else a for i, a in enumerate(args)]
            found = op(*args)
            found = found if isinstance(found, tuple) else (found,)
            if "adaln" in name:  # a gradient that is not dense either
                found += torch.autograd.grad([f.sum() for f in found], [args[0], args[2]])
            results.append(found)
        same[name] = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    return same


def round_to_bfloat16():
    """Triton's interpreter cuts float32 to bfloat16, where the machine code rounds to the nearest (cvt.rn)."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cut = InterpreterBuilder.cast_impl

    def cast(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            rounded = torch.tensor(src.data).to(torch.bfloat16).view(torch.uint16).numpy()
            return TensorHandle(rounded, dst_type.scalar)
        return cut(self, src, dst_type)

    InterpreterBuilder.cast_impl = cast


def main():
    device, many = torch.device(sys.argv[1]), sys.argv[2] == "many"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # which also fills torch.empty with NaN
    if backend.INTERPRETED:
        round_to_bfloat16()
    found = {"on_triton": backend.on_triton(torch.ones(1, device=device))}
    found |= {"golden": golden(device, many), "strides": strides(device)}
    for name, dtype in TYPES.items():
        for shape in ROWS if many else ROWS[: 3 if name == "float32" else 2]:
            for op, errors in adaln(device, dtype, shape).items():
                found[f"{op}/{name}/{'x'.join(map(str, shape))}"] = errors
        for shape, k, guided in LATENTS if many else LATENTS[: 4 if name == "float32" else 2]:
            for op, errors in ddim(device, dtype, shape, k, guided).items():
                found[f"{op}/{name}/{'x'.join(map(str, shape))} k{k} {guided}"] = errors
    print(json.dumps(found))


if __name__ == "__main__":
    main()
