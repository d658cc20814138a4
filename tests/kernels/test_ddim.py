"""strop.kernels.ddim: the golden numbers, the formulas of DDIM in float64, installed diffusers, and what is refused."""

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler
from torch.autograd import gradcheck

from strop.kernels import DDIMCoefficients, ddim, ddim_branch, ddim_log_prob, ddim_log_ratio, ddim_x0_hat

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


@pytest.mark.parametrize("n", [20, 50])
def test_timesteps_are_the_published_ones(case1, alphas, n):
    assert list(DDIMCoefficients.build(alphas, n, 1.0).t) == [*case1[f"schedule/timesteps_list_n{n}"].tolist(), 0]


@pytest.mark.parametrize("prediction, n, eta", CASES)
def test_sigma_is_the_published_one(case1, alphas, prediction, n, eta):
    expected = case1[f"f32/{prediction}/n{n}/eta{eta}/std_dev_t"]
    torch.testing.assert_close(columns(alphas, case1, n, eta, prediction)[4], expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("prediction, n, eta", CASES)
def test_branches_are_the_published_ones(case1, alphas, prediction, n, eta, k, precision):
    table = columns(alphas, case1, n, eta, prediction)
    noise = case1[f"in/variance_noise_k{k}"].view(k, *case1["in/sample"].shape)
    branches, x0_hat = ddim_branch(case1["in/sample"], None, case1["in/model_output"], 1.0, table, noise)
    expected = f"{precision}/{prediction}/n{n}/eta{eta}"
    close(branches, case1[f"{expected}/x_prev_k{k}"].view_as(noise), LATENTS)
    close(x0_hat, case1[f"{expected}/pred_original_sample"], LATENTS)
    assert torch.equal(ddim_x0_hat(case1["in/sample"], None, case1["in/model_output"], 1.0, table), x0_hat)


@pytest.mark.parametrize("precision", ["f32", "f64"])
@pytest.mark.parametrize("prediction, n, eta", CASES)
def test_log_probs_and_their_gradients_are_the_published_ones(case1, alphas, prediction, n, eta, precision):
    recorded = f"{prediction}/n{n}/eta{eta}"
    table = columns(alphas, case1, n, eta, prediction)
    log_probs, gradients = log_probs_and_gradient(case1, table, f"f32/{recorded}")
    # The recorded "other" lies far from the mean, where a log-probability is as large as -1e4. There the float32
    # implementation is 1.4e-5 (relative) off its own float64 run, because it computes sigma in float32.
    rtol = {"f32": 2e-5, "f64": 1e-6}[precision]
    for row, name in enumerate(("own", "other")):
        expected = case1[f"{precision}/{recorded}/logprob_{name}"].double()
        torch.testing.assert_close(log_probs[row].double(), expected, rtol=rtol, atol=LOG_PROBS)
        expected = case1[f"{precision}/{recorded}/logprob_{name}_grad_model_output"].double()
        error = (gradients[row] - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert error.max() < GRADIENTS, name


def log_probs_and_gradient(case1, table, recorded):
    """Log-probabilities (2, 5) of the recorded own and other x_prev, and each one's gradient in the model output."""
    eps = case1["in/model_output"].expand(2, -1, -1, -1, -1).clone().requires_grad_()
    x_prev = torch.stack([case1[f"{recorded}/x_prev_k1"], case1["in/prev_sample_other"]])
    x_t = case1["in/sample"].expand(2, -1, -1, -1, -1)
    found = ddim_log_prob(x_prev, x_t, None, eps, 1.0, table)
    found.sum().backward()
    return found.detach(), eps.grad.double()


def test_the_final_alpha_of_the_scheduler_is_never_used(case1, alphas):
    """As published: the last step ends at alphas_cumprod[0] even where the scheduler says set_alpha_to_one."""
    table = columns(alphas, case1, 20, 1.0, "epsilon")
    noise = case1["in/variance_noise_k3"]
    branches, _ = ddim_branch(case1["in/sample"], None, case1["in/model_output"], 1.0, table, noise)
    close(branches, case1["f32_alpha_to_one/epsilon/n20/eta1.0/x_prev_k3"], LATENTS)
    assert table[4, -1] == pytest.approx(0.0206, abs=5e-5)  # and its sigma is not 0, so the last step has a density


def test_the_previous_timestep_is_a_subtraction(alphas):
    """6 steps: 831 goes to 831 - 1000 // 6 = 665, and the last one, 1, to 0, not to -165."""
    built = DDIMCoefficients.build(alphas, 6, 1.0)
    assert built.t == (831, 665, 499, 333, 167, 1, 0)
    a, prev = alphas.double()[list(built.t[:-1])], alphas.double()[[665, 499, 333, 167, 1, 0]]
    sigma = ((1 - prev) / (1 - a) * (1 - a / prev)).sqrt()
    torch.testing.assert_close(built.table[4].double(), sigma, rtol=1e-6, atol=0)


def test_half_latents_as_published(case1, alphas):
    table = columns(alphas, case1, 20, 1.0, "epsilon")
    x_t, noise = case1["in/sample"].half(), case1["in/variance_noise_k1"].half().unsqueeze(0)
    branches, x0_hat = ddim_branch(x_t, None, case1["in/model_output"], 1.0, table, noise)
    assert branches.dtype == torch.float16
    close(x0_hat, case1["fp16lat/pred_original_sample"], LATENTS)
    # A different rounding before the cast may move a value to the neighbouring half.
    torch.testing.assert_close(branches[0], case1["fp16lat/x_prev_k1"], rtol=1e-3, atol=0)
    x_prev = case1["fp16lat/x_prev_k1"].expand(2, -1, -1, -1, -1)
    for name, eps in (
        ("logprob_policy_f32pred", case1["in/model_output"]),
        ("logprob_ref_f16pred", case1["in/model_output_ref"].half()),
    ):
        found = ddim_log_prob(x_prev, x_t.unsqueeze(0), None, eps.unsqueeze(0), 1.0, table)
        assert found.dtype == torch.float32
        for row in found:
            torch.testing.assert_close(row, case1[f"fp16lat/{name}"], rtol=1e-5, atol=LOG_PROBS)


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
@pytest.mark.parametrize("eta", [1.0, 0.3])
@pytest.mark.parametrize("num_steps", [2, 7, 20, 333])
def test_every_step_of_a_schedule_against_the_formulas(alphas, num_steps, eta, prediction):
    built = DDIMCoefficients.build(alphas, num_steps, eta, prediction)
    t = torch.tensor(built.t[:-1])
    t_prev = (t - 1000 // num_steps).clamp(0)
    shape = (num_steps, 2, 3, 5)
    x, m, noise = (draw(*shape, seed=seed) for seed in (1, 2, 3))
    x0_hat, mean, sigma, sample = truth(alphas, t, t_prev, eta, prediction, x, m, noise)

    branches, found = ddim_branch(x, None, m, 1.0, built.table, noise.unsqueeze(0))
    scale = x0_hat.abs().max()
    close(found / scale, x0_hat / scale, 3e-7)
    close(ddim_x0_hat(x, None, m, 1.0, built.table) / scale, x0_hat / scale, 3e-7)
    close(branches[0], sample, 1e-5)

    x_prev = torch.stack([sample, sample + 0.5 * sigma])
    found = ddim_log_prob(x_prev, x.unsqueeze(0), None, m.unsqueeze(0), 1.0, built.table)
    expected = torch.distributions.Normal(mean, sigma).log_prob(x_prev).flatten(2).mean(-1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_every_step_against_diffusers(alphas, eta, prediction):
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    theirs.set_timesteps(20)
    built = DDIMCoefficients.build(alphas, 20, eta, prediction)
    assert list(built.t[:-1]) == theirs.timesteps.tolist()
    x, m, noise = (draw(2, 4, 3, 3, seed=seed, dtype=torch.float32) for seed in (1, 2, 3))
    for i, t in enumerate(theirs.timesteps):
        step = theirs.step(m, t, x, eta=eta, variance_noise=noise)
        branches, x0_hat = ddim_branch(x, None, m, 1.0, built.table[:, i : i + 1].expand(5, 2), noise.unsqueeze(0))
        close(branches[0], step.prev_sample, 1e-5)
        close(x0_hat, step.pred_original_sample, LATENTS)


def flow_step(form, sigmas, sigmas_next, x, v):
    """One stochastic step of a rectified flow, x = (1 - sigma) x_0 + sigma z with v = z - x_0: x0_hat, mean, std.

    "ddim": the step of DDIM with (alpha, sigma) = (1 - sigma, sigma) and eta 1; "flow_grpo": that of Flow-GRPO
    (arXiv 2505.05470) at noise level 0.7, which at sigma = 1 takes the next sigma for the one that would divide by 0.
    """
    now, then = (each.view(-1, 1, 1, 1) for each in (sigmas, sigmas_next))
    x0_hat, eps_hat = x - now * v, x + (1 - now) * v
    if form == "ddim":
        std = then / now * (now**2 - ((1 - now) / (1 - then)) ** 2 * then**2).sqrt()
        return x0_hat, (1 - then) * x0_hat + (then**2 - std**2).clamp(min=0).sqrt() * eps_hat, std
    dt, level = then - now, 0.7 * (now / (1 - torch.where(now == 1, then, now))).sqrt()
    mean = x * (1 + level**2 / (2 * now) * dt) + v * (1 + level**2 * (1 - now) / (2 * now)) * dt
    return x0_hat, mean, level * (-dt).sqrt()


@pytest.mark.parametrize("form, steps", [("ddim", 9), ("flow_grpo", 10)])  # the last DDIM step has no density
def test_a_table_of_rectified_flow_against_its_formulas(form, steps):
    """A step that is linear in (x, v) is five numbers: those that it gives for (1, 0) and for (0, 1)."""
    sigmas = torch.linspace(1, 0, 11, dtype=torch.float64)
    sigmas = 3 * sigmas / (1 + 2 * sigmas)  # shifted by 3, as for SD3
    now, then = sigmas[:steps], sigmas[1 : steps + 1]
    one = torch.ones(steps, 1, 1, 1, dtype=torch.float64)
    by_x, by_v = flow_step(form, now, then, one, 0 * one), flow_step(form, now, then, 0 * one, one)
    table = torch.stack([by_x[0], by_v[0], by_x[1], by_v[1], by_x[2]]).view(5, steps).float()
    schedule = DDIMCoefficients((*(1000 * now).tolist(), 0.0), table)

    x, v, noise = (draw(steps, 2, 3, 5, seed=seed) for seed in range(3))
    x0_hat, mean, std = flow_step(form, now, then, x, v)
    branches, found = ddim_branch(x, None, v, 1.0, schedule.table, noise[None])
    close(found, x0_hat, 1e-6)
    close(ddim_x0_hat(x, None, v, 1.0, schedule.table), x0_hat, 1e-6)
    close(branches[0], mean + std * noise, 1e-6)
    x_prev = torch.stack([mean + std * noise, x, mean])
    found = ddim_log_prob(x_prev, x[None], None, v[None], 1.0, schedule.table)
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
    expected, expected_x0 = ddim_branch(x, None, m, 1.0, table, noise)
    close(branches, expected, 1e-12)
    close(x0_hat, expected_x0, 1e-12)
    close(ddim_x0_hat(x, uncond, text, guidance, table), expected_x0, 1e-12)
    halves = ddim_log_prob(expected, x[None], uncond[None], text[None], guidance, table)
    torch.testing.assert_close(halves, ddim_log_prob(expected, x[None], None, m[None], 1.0, table), rtol=1e-10, atol=0)


def test_without_halves_guidance_has_no_effect(table):
    x, m = draw(3, 4, 2, 2, seed=0), draw(3, 4, 2, 2, seed=1)
    assert torch.equal(ddim_x0_hat(x, None, m, 7.5, table), ddim_x0_hat(x, None, m, 1.0, table))


def drawn(dtype=torch.float64, s=2, r=1, guided=True, size=(4, 5, 3)):
    """x_prev (S, 3, C, H, W), then x_t, and uncond and text of policy and reference, which nearly agree, (R, ...)."""
    x_prev, x, uncond, text = (draw(n, 3, *size, seed=i).to(dtype) for i, n in enumerate((s, r, r, r)))
    near = [each + 1e-3 * draw(r, 3, *size, seed=9).to(dtype) for each in (uncond, text)]
    return x_prev, x, *((uncond, text, *near) if guided else (None, text, None, near[1]))


AXES = [(s, r, guided) for s in (1, 2, 3, 5) for r in sorted({1, s}) for guided in (True, False)]
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
    """Of both functions; and ddim_log_prob_backward_ref, written out, is what autograd finds."""
    x_prev, x, uncond, text, *reference = drawn(s=s, r=r, guided=guided, size=(2, 1, 2))
    given = [each.requires_grad_() for each in (uncond, text) if each is not None]
    halves = lambda given: given if guided else (None, *given)
    log_prob = lambda *given: ddim_log_prob(x_prev, x, *halves(given), 5.0, table)
    assert gradcheck(log_prob, given)
    assert gradcheck(lambda *given: ddim_log_ratio(x_prev, x, *halves(given), *reference, 5.0, table), given)
    grad = draw(s, 3, seed=8)
    written = ddim.ddim_log_prob_backward_ref(grad, x_prev, x, uncond, text, 5.0, table)
    for found, expected in zip(written[-len(given) :], torch.autograd.grad(log_prob(*given), given, grad), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_each_row_has_its_own_step(table):
    x, m, noise = draw(3, 4, 3, 5, seed=0), draw(3, 4, 3, 5, seed=1), draw(2, 3, 4, 3, 5, seed=2)
    branches, x0_hat = ddim_branch(x, None, m, 1.0, table, noise)
    log_prob = ddim_log_prob(noise, x[None], None, m[None], 1.0, table)
    for i in range(3):
        one = slice(i, i + 1)
        alone, alone_x0 = ddim_branch(x[one], None, m[one], 1.0, table[:, one], noise[:, one])
        close(branches[:, one], alone, 1e-12)
        close(x0_hat[one], alone_x0, 1e-12)
        density = ddim_log_prob(noise[:, one], x[None, one], None, m[None, one], 1.0, table[:, one])
        torch.testing.assert_close(log_prob[:, one], density, rtol=1e-12, atol=0)


@pytest.mark.parametrize("latents", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("eps", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_narrow_types_lose_only_the_rounding_of_their_inputs_and_output(table, latents, eps):
    x, noise = draw(3, 4, 5, 3, seed=0).to(latents), draw(2, 3, 4, 5, 3, seed=1).to(latents)
    uncond, text = draw(3, 4, 5, 3, seed=2).to(eps), draw(3, 4, 5, 3, seed=3).to(eps)
    wide = [each.double() for each in (x, uncond, text)]
    branches, x0_hat = ddim_branch(x, uncond, text, 2.0, table, noise)
    expected, expected_x0 = ddim_branch(*wide, 2.0, table, noise.double())
    step = torch.finfo(latents).eps
    assert branches.dtype == latents
    torch.testing.assert_close(branches.double(), expected, rtol=step, atol=1e-5)
    torch.testing.assert_close(x0_hat.double(), expected_x0, rtol=1e-6, atol=1e-5)


def test_log_prob_is_the_mean_over_a_latent_not_the_sum(table):
    """At the mean itself every element has log-density -log sigma - log(2 pi) / 2, whatever the size of the latent."""
    for height in (2, 5):
        x, m = draw(3, 4, height, 3, seed=0), draw(3, 4, height, 3, seed=1)
        mean, _ = ddim_branch(x, None, m, 1.0, table, torch.zeros(2, *x.shape, dtype=x.dtype))
        found = ddim_log_prob(mean, x[None], None, m[None], 1.0, table)
        expected = -table[4].double().log() - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(found, expected.expand(2, 3), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_a_schedule_needs_a_possible_number_of_steps(alphas, num_steps):
    with pytest.raises(ValueError, match=f"num_steps is {num_steps}, expected 1 to 1000"):
        DDIMCoefficients.build(alphas, num_steps, 1.0)


def test_a_schedule_needs_a_known_prediction_type(alphas):
    with pytest.raises(ValueError, match="prediction_type is 'sample', expected 'epsilon' or 'v_prediction'"):
        DDIMCoefficients.build(alphas, 20, 1.0, "sample")


LATENT = (3, 4, 2, 2)
EPS = {"eps_uncond": LATENT, "eps_text": LATENT, "coefficients": (5, 3)}
BRANCH = {"x_t": LATENT, "noise": (2, *LATENT)} | EPS
LOG_PROB = {"x_prev": (2, *LATENT), "x_t": (1, *LATENT)} | EPS
LOG_PROB |= {"eps_uncond": (1, *LATENT), "eps_text": (1, *LATENT)}


@pytest.mark.parametrize(
    "op, shapes, name, shape",
    [
        (ddim_branch, BRANCH, "eps_uncond", (2, 4, 2, 2)),
        (ddim_branch, BRANCH, "eps_text", (3, 4, 2, 3)),
        (ddim_branch, BRANCH, "coefficients", (5, 2)),
        (ddim_branch, BRANCH, "coefficients", (4, 3)),
        (ddim_branch, BRANCH, "noise", LATENT),
        (ddim_branch, BRANCH, "noise", (2, 3, 4, 2, 1)),
        (ddim_log_prob, LOG_PROB, "x_prev", (0, *LATENT)),
        (ddim_log_prob, LOG_PROB, "x_prev", LATENT),
        (ddim_log_prob, LOG_PROB, "x_t", (3, *LATENT)),
        (ddim_log_prob, LOG_PROB, "x_t", (1, 3, 4, 2, 1)),
        (ddim_log_prob, LOG_PROB, "eps_uncond", (2, *LATENT)),
        (ddim_log_prob, LOG_PROB, "eps_text", (2, *LATENT)),
        (ddim_log_prob, LOG_PROB, "coefficients", (5, 1)),
        (ddim_log_prob, LOG_PROB, "coefficients", (3, 3)),
    ],
)
def test_a_shape_that_does_not_fit_is_named(op, shapes, name, shape):
    tensors = {key: torch.ones(shape if key == name else size) for key, size in shapes.items()}
    with pytest.raises(ValueError, match=f"^{name} has shape .*expected"):
        op(guidance=5.0, **tensors)
    if op is ddim_branch and name != "noise":
        del tensors["noise"]
        with pytest.raises(ValueError, match=f"^{name} has shape .*expected"):
            ddim_x0_hat(guidance=5.0, **tensors)


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


@pytest.mark.parametrize(
    "name, change, complaint",
    [
        ("ref_text", lambda t: t[..., :1], "has shape .*, expected that of x_t"),
        ("ref_uncond", lambda t: None, "and eps_uncond: expected both or neither to be None"),
        ("ref_text", lambda t: t.float(), "is torch.float32, expected torch.float64 like eps_text"),
        ("ref_text", lambda t: t.clone().requires_grad_(), "requires a gradient, .*; detach it"),
        ("x_t", lambda t: t.clone().requires_grad_(), "requires a gradient, .*; detach it"),
        ("x_prev", lambda t: t.float(), "is torch.float32, expected torch.float64 like x_t"),
        ("x_prev", lambda t: t.to("meta"), "is on meta, expected cpu like x_t"),
        ("eps_uncond", lambda t: t.bfloat16(), "is torch.bfloat16, expected torch.float64 like eps_text"),
        ("guidance", lambda t: torch.ones(3), "is a tensor of shape .3,., expected a number"),
        ("coefficients", lambda t: t.double(), "is torch.float64, expected torch.float32"),
        ("coefficients", lambda t: t.to("meta"), "is on meta, expected cpu like x_t"),
    ],
)
def test_log_ratio_names_what_does_not_fit(table, name, change, complaint):
    names = ("x_prev", "x_t", "eps_uncond", "eps_text", "ref_uncond", "ref_text")
    given = dict(zip(names, drawn(), strict=True)) | {"guidance": 5.0, "coefficients": table}
    with pytest.raises(ValueError, match=f"^{name} {complaint}"):
        ddim_log_ratio(**given | {name: change(given[name])})


def test_branch_refuses_noise_of_another_type_and_latents_of_another_rank(table):
    x, noise = draw(3, 4, 2, 2), draw(1, 3, 4, 2, 2)
    with pytest.raises(ValueError, match=r"^noise is torch.float32, expected torch.float64 like x_t"):
        ddim_branch(x, None, x, 1.0, table, noise.float())
    with pytest.raises(ValueError, match=r"^x_t has shape .*, expected \(N, C, H, W\)"):
        ddim_x0_hat(x[None], None, x[None], 1.0, table)
