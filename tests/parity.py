"""Prints how far strop is from the golden numbers, as a Markdown table, and exits with 1 where an error exceeds its
tolerance: `python tests/parity.py`. strop runs in float32, and is held against the published code in float32 and in
float64. Each case is fed as the tests of its modules feed it, and out of their files. docs/parity.md shows the table.
"""

import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import CPU, LORA_TARGETS, golden_spm, letters, load_golden, module_of, part, write_sd15, write_sdxl
from parity_judge import judge, judge_in_training, judge_training, selection
from parity_scorers import scorers
from parity_table import (
    ENCODINGS,
    EXACT,
    GRADIENTS,
    HALF,
    LATENTS,
    LOG_PROBS,
    LOSS,
    ROLLED_OUT,
    ROLLOUT_SCORES,
    Row,
    Rows,
    both,
    markdown,
)
from torch import Tensor

from strop.engine.config.training import ModelConfig
from strop.engine.methods.spo.pairs import is_sure
from strop.engine.methods.spo.rollout import choose
from strop.engine.models.base_model import load_unet, quiet_libraries
from strop.engine.models.conditioning import Conditioning
from strop.engine.models.latent_diffusion import LatentDiffusion
from strop.engine.models.policy import Policy
from strop.engine.schedules.draws import Replay
from strop.engine.schedules.schedule import Schedule
from strop.kernels import DDIMCoefficients, ddim_branch, ddim_log_prob, ddim_x0_hat

ddim = module_of("kernels/test_ddim.py")
replay = module_of("methods/spo/test_rollout.py").replay
spo = module_of("methods/spo/test_loss.py")


def ddim_step(rows: Rows, world: SimpleNamespace) -> None:
    """Case 1: epsilon and v prediction, 20 and 50 steps, eta 1 and 0.5, five timesteps each."""
    see, case = partial(rows.see, "1 DDIM step"), load_golden("case1_ddim")
    x, eps = case["in/sample"], case["in/model_output"]
    for prediction, n, eta in (given.values for given in ddim.CASES):
        key = f"{prediction}/n{n}/eta{eta}"
        table, recorded = ddim.columns(world.alphas, case, n, eta, prediction), both(case, f"{key}/")
        t = DDIMCoefficients.build(world.alphas, n, eta).t
        after = [t[t.index(now) + 1] for now in case[f"in/timesteps_n{n}"].tolist()]
        see("timestep after the step", EXACT, torch.tensor(after), *recorded("prev_timestep"))
        if prediction == "epsilon":  # where the table has sqrt(alpha_prev / alpha) and sqrt(1 / alpha)
            see("alpha after the step", GRADIENTS, (table[2] / table[0]) ** 2, *recorded("alpha_prod_t_prev"))
        see("sigma", GRADIENTS, table[4], *recorded("std_dev_t"))
        see("x0_hat", LATENTS, ddim_x0_hat(x, None, eps, 1.0, table), *recorded("pred_original_sample"))
        for k in (1, 3):
            noise = case[f"in/variance_noise_k{k}"]
            branches = ddim_branch(x, None, eps, 1.0, table, noise.view(k, *x.shape))[0]
            see("branches, 1 and 3", LATENTS, branches.view_as(noise), *recorded(f"x_prev_k{k}"))
        (own, other), gradients = ddim.log_probs_and_gradient(case, table, f"f32/{key}")
        see("log-prob of a branch", LOG_PROBS, own, recorded("logprob_own")[0])
        wide = [value.double().expand(2, *x.shape) for value in (recorded("x_prev_k1")[1], x, eps)]
        found = ddim_log_prob(wide[0], wide[1], None, wide[2], 1.0, table)[0]
        see("log-prob of a branch, all in float64", LOG_PROBS, found, None, recorded("logprob_own")[1])
        see("log-prob of another latent, to -1e4", GRADIENTS, other, *recorded("logprob_other"))
        for side, found in zip(("own", "other"), gradients, strict=True):
            see("gradient of the log-prob", GRADIENTS, found, *recorded(f"logprob_{side}_grad_model_output"))


def ddim_corners(rows: Rows, world: SimpleNamespace) -> None:
    """Case 1: a scheduler with set_alpha_to_one, one step index for all rows, float16 latents."""
    see, case = partial(rows.see, "1 DDIM step"), load_golden("case1_ddim")
    x, eps, noise = case["in/sample"], case["in/model_output"], case["in/variance_noise_k1"]
    table = ddim.columns(world.alphas, case, 20, 1.0, "epsilon")
    branches = ddim_branch(x, None, eps, 1.0, table, case["in/variance_noise_k3"])[0]
    see("branches, set_alpha_to_one", LATENTS, branches, case["f32_alpha_to_one/epsilon/n20/eta1.0/x_prev_k3"])
    schedule = Schedule(DDIMCoefficients.build(world.alphas, 20, 1.0), 1.0)
    for t in (951, 1):
        step, recorded = schedule.t.index(t), part(case, f"f32_scalar_t{t}/")
        branch = schedule.branch(x, eps[None], step, 1, Replay([noise]))[0]
        see("x0_hat, one t for all", LATENTS, schedule.x0_hat(x, eps[None], step), recorded["pred_original_sample"])
        see("branch, one t for all", LATENTS, branch, recorded["x_prev_k1"])
    recorded = part(case, "fp16lat/")
    branches, x0_hat = ddim_branch(x.half(), None, eps, 1.0, table, noise.half()[None])
    see("x0_hat, float16 latents", LATENTS, x0_hat, recorded["pred_original_sample"])
    see("branch, float16 latents", HALF, branches[0], recorded["x_prev_k1"])
    x_prev = recorded["x_prev_k1"].expand(2, *x.shape)
    for name, out in (("policy_f32pred", eps), ("ref_f16pred", case["in/model_output_ref"].half())):
        found = ddim_log_prob(x_prev, x.half()[None], None, out[None], 1.0, table)[0]
        see("log-prob, float16 latents", GRADIENTS, found, recorded[f"logprob_{name}"])


class Recorded:
    """The recorded token ids in place of a tokenizer, which could not spell them."""

    def __init__(self, prompts: Tensor):
        self.prompts, self.empty = prompts, torch.tensor([[61] + [63] * 15])
        self.model_max_length = prompts.shape[1]

    def __call__(self, prompts: list[str], **options: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=self.empty if prompts == [""] else self.prompts)


def encoded(diffusion: LatentDiffusion, case: dict[str, Tensor]) -> Conditioning:
    ids = [case[name] for name in ("in/prompt_ids", "in/prompt_ids_2") if name in case]
    diffusion.tokenizers = [Recorded(each) for each in ids]
    return diffusion.encode([f"prompt {i}" for i in range(len(ids[0]))])


def rollouts(rows: Rows, world: SimpleNamespace) -> None:
    """Case 6: whole rollouts with the recorded draws."""
    mspo = {"k": 2, "threshold": 0.4, "inner_steps": 4}
    for folder, name, config in ((world.sd15, "sd15_k4_b3", {}), (world.sdxl, "sdxl_k2_b2_inner3", mspo)):
        see, case = partial(rows.see, f"6 rollout, {name.split('_')[0]}"), load_golden(f"case6_{name}")
        made = replay(case, world.alphas, folder, **config)
        cond = encoded(made.diffusion, case)
        see("text embeddings", ENCODINGS, cond.text, case["in/prompt_embeds"])
        see("text embeddings, no prompt", ENCODINGS, cond.null, case["in/negative_prompt_embeds"][:1])
        if cond.pooled is not None:
            see("pooled text embeddings", ENCODINGS, cond.pooled, case["in/pooled_prompt_embeds"])
            see("time ids", EXACT, cond.time_ids, case["f32/out/log_add_time_ids"])
        pairs, recorded = made.rollout.pairs, both(case, "out/")
        see("timesteps of the pairs", EXACT, torch.tensor(made.schedule.t)[pairs.step][:, None], *recorded("timesteps"))
        see("prompts of the pairs", EXACT, made.cond.text[pairs.prompt], recorded("prompt_embeds")[0][:, 0])
        see("x_t of the pairs", ROLLED_OUT, pairs.x_t.transpose(0, 1), *recorded("current_latents"))
        see("x_prev of the pairs", ROLLED_OUT, pairs.x_prev.transpose(0, 1), *recorded("next_latents"))
        see("scores", ROLLOUT_SCORES, torch.stack(made.judge.scores).flatten(), *recorded("preference_score_logs"))
        for event, (t, scores) in enumerate(zip(made.judge.t, made.judge.scores, strict=True)):
            recorded, chosen = both(case, f"event/{event:02d}/"), choose(scores, "best_worst", None)
            see("timesteps told to the judge", EXACT, torch.full((scores.numel(),), t), *recorded("timesteps"))
            see("winner and loser", EXACT, chosen, *recorded("indices"))
            see("pair kept or not", EXACT, is_sure(scores, chosen, config.get("threshold", 0.3)), *recorded("valid"))
            if f"f32/event/{event:02d}/image" in case:
                see("decoded x0_hat", LATENTS, made.judge.images[event].flatten(0, 1), *recorded("image"))
        for step, (x, eps) in enumerate(made.forwards):
            recorded = both(case, f"unet/{step:02d}/")
            see("latents of every step", ROLLED_OUT, x, *recorded("latent_model_input_first_half"))
            see("UNet's output of every step", LATENTS, eps.flatten(0, 1), *recorded("noise_pred_uncond_text"))


def objective(rows: Rows, world: SimpleNamespace) -> None:
    """Case 7: 6 pairs of the SD-1.5 rollout, a LoRA for each tag."""
    policy = Policy(load_unet(ModelConfig(path=str(world.sd15)), CPU), 4, LORA_TARGETS, seed=0)
    for tag in spo.TAGS:
        see, case = partial(rows.see, f"7 objective, {tag}"), spo.case7_of(load_golden("case7_spo_loss_sd15"), tag)
        schedule, recorded = spo.schedule_of(world.alphas, tag), both(case, "")
        policy.unet.zero_grad()
        learner = spo.learner_of(spo.with_lora(policy, case), schedule)
        batch = spo.batch_of(spo.recorded_pairs(case, schedule), case)
        logp, logp_ref, log_ratio = spo.log_probs(learner, batch)
        loss, _ = learner.loss(batch)
        loss.backward()
        for side in (0, 1):
            see("log-probs of the policy", LOG_PROBS, logp[side], *recorded(f"total_prob_{side}"))
            see("log-probs of the reference", LOG_PROBS, logp_ref[side], *recorded(f"total_ref_prob_{side}"))
            see("ratios", LOG_PROBS, log_ratio[side].exp(), *recorded(f"unclamped_ratio_{side}"))
        see("loss", LOSS, loss, *recorded("loss"))
        trained = {name: p.grad for name, p in policy.unet.named_parameters() if p.requires_grad}
        published = [part(case, f"{precision}/grad/") for precision in ("f32", "f64")]
        one = [torch.cat([grads[name].flatten() for name in trained]) for grads in (trained, *filter(None, published))]
        see("gradient of the LoRA", GRADIENTS, *one)
        see("norm of the gradient", GRADIENTS, one[0].norm(), *recorded("grad_norm"))


def all_rows() -> list[Row]:
    """Every row of the table, in some ten seconds."""
    quiet_libraries()
    rows, tokenizer = Rows(), letters()
    with tempfile.TemporaryDirectory() as made:
        folders = {
            "sd15": write_sd15(Path(made) / "sd15", tokenizer),
            "sdxl": write_sdxl(Path(made) / "sdxl", tokenizer),
        }
        diffusion = LatentDiffusion.load(ModelConfig(path=str(folders["sd15"])), CPU)
        alphas = load_golden("case1_ddim")["schedule/alphas_cumprod"]
        world = SimpleNamespace(alphas=alphas, spm=golden_spm(), diffusion=diffusion, **folders)
        of_spo = (ddim_step, ddim_corners, judge, judge_in_training, selection, judge_training, rollouts, objective)
        for case in (*of_spo, scorers):
            case(rows, world)
    return list(rows.values())


def main(rows: list[Row]) -> int:
    print(markdown(rows))
    return 0 if all(row.agrees() for row in rows) else 1


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed writes above the table that it looked for a GPU
    sys.exit(main(all_rows()))
