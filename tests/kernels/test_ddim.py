"""strop.kernels.ddim: the golden numbers, the formulas of DDIM in float64, and what is refused."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from strop.kernels import DDIMCoefficients, ddim_branch, ddim_log_prob, ddim_log_ratio, ddim_x0_hat

LATENTS = 4e-5  # absolute, at values up to 60
LOG_PROBS = 5e-6
GRADIENTS = 2e-5  # relative, 2-norm

PREDICTIONS = ("epsilon", "v_prediction")
CASES = [
    pytest.param(prediction, n, eta, id=f"{prediction}-n{n}-eta{eta}")
    for prediction, n, eta in itertools.product(PREDICTIONS, (20, 50), (1.0, 0.5))
]


@pytest.fixture(scope="module")
def case1(golden):
    return golden("case1_ddim")


def columns(alphas, case1, n, eta, prediction):
    """The coefficients (5, 5) of the five timesteps that were recorded."""
    built = DDIMCoefficients.build(alphas, n, eta, prediction)
    return built.table[:, [built.t.index(t) for t in case1[f"in/timesteps_n{n}"].tolist()]]


def close(found, expected, atol):
    assert found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=atol)


@pytest.mark.parametrize("prediction, n, eta", CASES)
def test_a_step_is_the_published_one(case1, alphas, prediction, n, eta):
    """Timesteps, sigma, branches, x0_hat, log-probabilities and their gradients."""
    t = DDIMCoefficients.build(alphas, n, eta, prediction).t
    assert list(t) == [*case1[f"schedule/timesteps_list_n{n}"].tolist(), 0]
    key, x, m = f"{prediction}/n{n}/eta{eta}", case1["in/sample"], case1["in/model_output"]
    table = columns(alphas, case1, n, eta, prediction)
    torch.testing.assert_close(table[4], case1[f"f32/{key}/std_dev_t"], rtol=2e-5, atol=0)
    log_probs, gradients = log_probs_and_gradient(case1, table, f"f32/{key}")
    # The recorded "other" lies far from the mean, where a log-probability is as large as -1e4. There the float32
    # implementation is 1.4e-5 (relative) off its own float64 run, because it computes sigma in float32.
    for precision, rtol in (("f32", 2e-5), ("f64", 1e-6)):
        expected = {name.removeprefix(f"{precision}/{key}/"): value for name, value in case1.items()}
        for k in (1, 3):
            noise = case1[f"in/variance_noise_k{k}"].view(k, *x.shape)
            branches, x0_hat = ddim_branch(x, None, m, 1.0, table, noise)
            close(branches, expected[f"x_prev_k{k}"].view_as(noise), LATENTS)
            close(x0_hat, expected["pred_original_sample"], LATENTS)
        assert torch.equal(ddim_x0_hat(x, None, m, 1.0, table), x0_hat)
        for row, name in enumerate(("own", "other")):
            log_prob, gradient = (expected[f"logprob_{name}{end}"].double() for end in ("", "_grad_model_output"))
            torch.testing.assert_close(log_probs[row].double(), log_prob, rtol=rtol, atol=LOG_PROBS)
            error = (gradients[row] - gradient).flatten(1).norm(dim=1) / gradient.flatten(1).norm(dim=1)
            assert error.max() < GRADIENTS, name


def log_probs_and_gradient(case1, table, recorded):
    """Log-probabilities (2, 5) of the recorded own and other x_prev, and each one's gradient in the model output."""
    eps = case1["in/model_output"].expand(2, -1, -1, -1, -1).clone().requires_grad_()
    x_prev = torch.stack([case1[f"{recorded}/x_prev_k1"], case1["in/prev_sample_other"]])
    x_t = case1["in/sample"].expand(2, -1, -1, -1, -1)
    found = ddim_log_prob(x_prev, x_t, None, eps, 1.0, table)
    found.sum().backward()
    return found.detach(), eps.grad.double()


def truth(alphas, t, t_prev, eta, prediction, x, m, noise):
    """One step by the formulas of DDIM (arXiv 2010.02502) in float64: x0_hat, mean, sigma, sample."""
    a, a_prev = alphas[t].double().view(-1, 1, 1, 1), alphas[t_prev].double().view(-1, 1, 1, 1)
    if prediction == "epsilon":
        eps = m
        x0_hat = (x - (1 - a).sqrt() * eps) / a.sqrt()  # formula 12, "predicted x_0"
    else:
        x0_hat = a.sqrt() * x - (1 - a).sqrt() * m
        eps = a.sqrt() * m + (1 - a).sqrt() * x
    sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()  # formula 16
    mean = a_prev.sqrt() * x0_hat + (1 - a_prev - sigma**2).sqrt() * eps  # formula 12
    return x0_hat, mean, sigma, mean + sigma * noise


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("num_steps, eta", [(2, 1.0), (6, 0.3), (20, 0.0), (333, 1.0)])
def test_every_step_of_a_schedule_against_the_formulas(alphas, num_steps, eta, prediction):
    """Each row at a step of its own. 333: the step before 3 is 0, not a negative one."""
    built = DDIMCoefficients.build(alphas, num_steps, eta, prediction)
    distance = 1000 // num_steps
    assert built.t == (*(1 + distance * i for i in reversed(range(num_steps))), 0)
    t = torch.tensor(built.t[:-1])
    x, m, noise = (draw(num_steps, 2, 3, 5, seed=seed) for seed in (1, 2, 3))
    x0_hat, mean, sigma, sample = truth(alphas, t, (t - distance).clamp(0), eta, prediction, x, m, noise)

    branches, found = ddim_branch(x, None, m, 1.0, built.table, noise.unsqueeze(0))
    scale = x0_hat.abs().max()
    close(found / scale, x0_hat / scale, 3e-7)
    close(ddim_x0_hat(x, None, m, 1.0, built.table) / scale, x0_hat / scale, 3e-7)
    close(branches[0], sample, 1e-5)
    if eta > 0:  # else there is no density
        x_prev = torch.stack([sample, sample + 0.5 * sigma])
        found = ddim_log_prob(x_prev, x.unsqueeze(0), None, m.unsqueeze(0), 1.0, built.table)
        expected = torch.distributions.Normal(mean, sigma).log_prob(x_prev).flatten(2).mean(-1)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def flow_step(now, then, x, v):
    """One step of Flow-GRPO (arXiv 2505.05470) at noise level 0.7, of x = (1 - sigma) x_0 + sigma z with v = z - x_0:
    x0_hat, mean, std. At sigma = 1 it takes the next sigma for the one that would divide by 0."""
    now, then = (each.view(-1, 1, 1, 1) for each in (now, then))
    dt, level = then - now, 0.7 * (now / (1 - torch.where(now == 1, then, now))).sqrt()
    mean = x * (1 + level**2 / (2 * now) * dt) + v * (1 + level**2 * (1 - now) / (2 * now)) * dt
    return x - now * v, mean, level * (-dt).sqrt()


def test_a_table_of_rectified_flow_against_its_formulas():
    """A step that is linear in (x, v) is five numbers: those that it gives for (1, 0) and for (0, 1)."""
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)  # shifted by 3, as for SD3
    now, then = sigmas[:-1], sigmas[1:]
    one = torch.ones(10, 1, 1, 1, dtype=torch.float64)
    by_x, by_v = flow_step(now, then, one, 0 * one), flow_step(now, then, 0 * one, one)
    table = torch.stack([by_x[0], by_v[0], by_x[1], by_v[1], by_x[2]]).view(5, 10).float()

    x, v, noise = (draw(10, 2, 3, 5, seed=seed) for seed in range(3))
    x0_hat, mean, std = flow_step(now, then, x, v)
    branches, found = ddim_branch(x, None, v, 1.0, table, noise[None])
    close(found, x0_hat, 1e-6)
    close(branches[0], mean + std * noise, 1e-6)
    x_prev = torch.stack([mean + std * noise, x, mean])
    found = ddim_log_prob(x_prev, x[None], None, v[None], 1.0, table)
    expected = torch.distributions.Normal(mean, std).log_prob(x_prev).flatten(2).mean(-1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def table(alphas):
    return DDIMCoefficients.build(alphas, 20, 1.0).table[:, [0, 7, 19]]


@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
def test_halves_are_combined_as_guidance_says(table, guidance):
    x, uncond, text, noise = (draw(3, 4, 5, 3, seed=seed) for seed in range(4))
    m = (1 - guidance) * uncond + guidance * text
    noise = torch.stack([noise, -noise])
    branches, x0_hat = ddim_branch(x, uncond, text, guidance, table, noise)
    expected, expected_x0 = ddim_branch(x, None, m, 7.5, table, noise)  # where it is of no effect
    close(branches, expected, 1e-12)
    close(x0_hat, expected_x0, 1e-12)
    close(ddim_x0_hat(x, uncond, text, guidance, table), expected_x0, 1e-12)
    halves = ddim_log_prob(expected, x[None], uncond[None], text[None], guidance, table)
    torch.testing.assert_close(halves, ddim_log_prob(expected, x[None], None, m[None], 1.0, table), rtol=1e-10, atol=0)


def drawn(dtype=torch.float64, s=2, r=1, guided=True, size=(4, 5, 3)):
    """x_prev (S, 3, C, H, W), then x_t, and uncond and text of policy and reference, which nearly agree, (R, ...)."""
    x_prev, x, uncond, text = (draw(n, 3, *size, seed=i).to(dtype) for i, n in enumerate((s, r, r, r)))
    near = [each + 1e-3 * draw(r, 3, *size, seed=9).to(dtype) for each in (uncond, text)]
    return x_prev, x, *((uncond, text, *near) if guided else (None, text, None, near[1]))


AXES = [(s, r, guided) for s in (1, 3) for r in sorted({1, s}) for guided in (True, False)]
every_axis = pytest.mark.parametrize("s, r, guided", AXES, ids=str)


@every_axis
def test_log_prob_and_log_ratio_of_every_draw_are_those_of_its_own_x_t(table, s, r, guided):
    x_prev, x, uncond, text, *reference = drawn(s=s, r=r, guided=guided)
    from_x, from_m, sigma = table[2:, :, None, None, None].double()

    def density(i, uncond, text):
        row = i if r > 1 else 0
        m = text[row] if uncond is None else -4 * uncond[row] + 5 * text[row]
        mean = from_x * x[row] + from_m * m
        return torch.distributions.Normal(mean, sigma).log_prob(x_prev[i]).flatten(1).mean(-1)

    ours, theirs = (torch.stack([density(i, *eps) for i in range(s)]) for eps in ((uncond, text), reference))
    found = ddim_log_prob(x_prev, x, uncond, text, 5.0, table)
    torch.testing.assert_close(found, ours, rtol=1e-10, atol=1e-10)
    found = ddim_log_ratio(x_prev, x, uncond, text, *reference, 5.0, table)
    torch.testing.assert_close(found, ours - theirs, rtol=1e-8, atol=1e-9)


@every_axis
def test_gradients_by_finite_differences(table, s, r, guided):
    x_prev, x, uncond, text, *reference = drawn(s=s, r=r, guided=guided, size=(2, 1, 2))
    given = [each.requires_grad_() for each in (uncond, text) if each is not None]
    halves = lambda given: given if guided else (None, *given)
    log_prob = lambda *given: ddim_log_prob(x_prev, x, *halves(given), 5.0, table)
    assert gradcheck(log_prob, given)
    assert gradcheck(lambda *given: ddim_log_ratio(x_prev, x, *halves(given), *reference, 5.0, table), given)


@every_axis
def test_log_prob_and_log_ratio_compile_without_a_break(table, s, r, guided):
    x_prev, x, uncond, text, *reference = drawn(s=s, r=r, guided=guided)
    given = [each.requires_grad_() for each in (uncond, text) if each is not None]
    for op, others in ((ddim_log_prob, ()), (ddim_log_ratio, reference)):
        torch._dynamo.reset()
        args = (x_prev, x, uncond, text, *others, 5.0, table)
        found = [each(*args) for each in (torch.compile(op, fullgraph=True, backend="aot_eager"), op)]
        torch.testing.assert_close(*found)
        for ours, expected in zip(*(torch.autograd.grad(each.sum(), given) for each in found), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("latents", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_lose_only_the_rounding_of_their_inputs_and_output(table, latents, eps):
    x, noise = draw(3, 4, 5, 3, seed=0).to(latents), draw(2, 3, 4, 5, 3, seed=1).to(latents)
    uncond, text = draw(3, 4, 5, 3, seed=2).to(eps), draw(3, 4, 5, 3, seed=3).to(eps)
    wide = [each.double() for each in (x, uncond, text)]
    branches, x0_hat = ddim_branch(x, uncond, text, 2.0, table, noise)
    expected, expected_x0 = ddim_branch(*wide, 2.0, table, noise.double())
    step = torch.finfo(latents).eps
    assert (branches.dtype, x0_hat.dtype) == (latents, torch.float32)
    assert ddim_log_prob(noise, x[None], None, text[None], 2.0, table).dtype == torch.float32
    torch.testing.assert_close(branches.double(), expected, rtol=step, atol=1e-5)
    torch.testing.assert_close(x0_hat.double(), expected_x0, rtol=1e-6, atol=1e-5)


LATENT = (3, 4, 2, 2)


@pytest.mark.parametrize(
    "op, name, change, expected",
    [
        (ddim_branch, "x_t", (1, *LATENT), "shape"),
        (ddim_branch, "eps_uncond", (2, 4, 2, 2), "shape"),
        (ddim_branch, "eps_text", (3, 4, 2, 3), "shape"),
        (ddim_branch, "coefficients", (5, 2), "shape"),
        (ddim_branch, "coefficients", (4, 3), "shape"),
        (ddim_branch, "noise", LATENT, "shape"),
        (ddim_branch, "noise", (2, 3, 4, 2, 1), "shape"),
        (ddim_branch, "noise", torch.float32, "float32.*float64.* x_t"),
        (ddim_log_prob, "x_prev", (0, *LATENT), "shape"),
        (ddim_log_prob, "x_prev", LATENT, "shape"),
        (ddim_log_prob, "x_t", (3, *LATENT), "shape"),
        (ddim_log_prob, "x_t", (1, 3, 4, 2, 1), "shape"),
        (ddim_log_prob, "eps_uncond", (2, *LATENT), "shape"),
        (ddim_log_prob, "eps_text", (2, *LATENT), "shape"),
        (ddim_log_prob, "coefficients", (5, 1), "shape"),
        (ddim_log_prob, "coefficients", (3, 3), "shape"),
        (ddim_log_ratio, "ref_text", (1, 3, 4, 2, 1), "shape.* x_t"),
        (ddim_log_ratio, "ref_uncond", None, "eps_uncond"),
        (ddim_log_ratio, "ref_text", torch.float32, "float32.*float64.* eps_text"),
        (ddim_log_ratio, "ref_text", "learnt", "gradient"),
        (ddim_log_ratio, "x_t", "learnt", "gradient"),
        (ddim_log_ratio, "x_prev", torch.float32, "float32.*float64.* x_t"),
        (ddim_log_ratio, "x_prev", "meta", "meta.* cpu.* x_t"),
        (ddim_log_ratio, "eps_uncond", torch.bfloat16, "bfloat16.*float64.* eps_text"),
        (ddim_log_ratio, "guidance", (3,), "3"),
        (ddim_log_ratio, "coefficients", torch.float64, "float64.*float32"),
        (ddim_log_ratio, "coefficients", "meta", "meta.* cpu.* x_t"),
    ],
)
def test_what_does_not_fit_is_named(table, op, name, change, expected):
    """change: the shape, type or device that the argument has instead; "learnt": it asks for a gradient."""
    names = ("x_prev", "x_t", "eps_uncond", "eps_text", "ref_uncond", "ref_text")
    arguments = dict(zip(names, drawn(size=(4, 2, 2)), strict=True)) | {"guidance": 5.0, "coefficients": table}
    if op is not ddim_log_ratio:
        del arguments["ref_uncond"], arguments["ref_text"]
    if op is ddim_branch:
        arguments["noise"] = arguments.pop("x_prev")
        arguments |= {key: arguments[key][0] for key in ("x_t", "eps_uncond", "eps_text")}
    op(**arguments)
    if isinstance(change, tuple):
        arguments[name] = torch.ones(change, dtype=torch.float32 if name == "coefficients" else torch.float64)
    elif change == "learnt":
        arguments[name].requires_grad_()
    else:
        arguments[name] = None if change is None else arguments[name].to(change)
    with pytest.raises(ValueError, match=f"^{name} .*{expected}"):
        op(**arguments)
    if op is ddim_branch and name != "noise":
        del arguments["noise"]
        with pytest.raises(ValueError, match=f"^{name} .*{expected}"):
            ddim_x0_hat(**arguments)


@pytest.mark.parametrize("num_steps, prediction, expected", [(0, "epsilon", "num_steps.* 0"), (1001, "epsilon", "1001"),
                                                             (20, "sample", "prediction_type.* 'sample'")])  # fmt: skip
def test_a_schedule_that_cannot_be_is_refused(alphas, num_steps, prediction, expected):
    with pytest.raises(ValueError, match=expected):
        DDIMCoefficients.build(alphas, num_steps, 1.0, prediction)


def test_log_ratio_of_equal_predictions_is_zero_and_still_has_a_gradient(table):
    x_prev, x, uncond, text, *_ = drawn(torch.float32)
    eps = text.clone().requires_grad_()
    found = ddim_log_ratio(x_prev, x, uncond, eps, uncond, text, 5.0, table)
    assert not found.any()
    found.sum().backward()
    assert eps.grad.any()


@pytest.mark.parametrize("dtype, gain", [(torch.float32, 20), (torch.bfloat16, 50), (torch.float16, 50)], ids=str)
def test_log_ratio_keeps_digits_that_two_log_probs_lose(table, dtype, gain):
    """Against float64 on the same numbers, as a step of training near its beginning has them."""
    given = drawn(dtype)
    truth = ddim_log_ratio(*(each.double() for each in given), 5.0, table)
    found = ddim_log_ratio(*given, 5.0, table)
    x_prev, x, uncond, text, *reference = given
    naive = [ddim_log_prob(x_prev, x, *eps, 5.0, table) for eps in ((uncond, text), reference)]
    error = lambda ratio: (ratio.double() - truth).norm() / truth.norm()
    assert gain * error(found) < error(naive[0] - naive[1])
