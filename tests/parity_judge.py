"""The part of parity.py that is the judge: cases 2 to 5b."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import letters, load_golden, module_of, part
from parity_table import EXACT, FEATURES, GRADIENTS, LATENTS, LOSS, SCALE_GRADIENT, SCORES, STEP_GRADIENTS, Rows, both
from torch.nn.functional import normalize

from strop.engine.methods.spo.pairs import PreferencePairs, is_sure
from strop.engine.methods.spo.rollout import choose

clips = module_of("judge/test_clip.py")
judges = module_of("judge/test_model.py")
training = module_of("judge/test_training.py")


def judge(rows: Rows, world: SimpleNamespace) -> None:
    """Case 2: pixels, features and scores."""
    see, case = partial(rows.see, "2 judge"), load_golden("case2_spm_clip")
    model, clip, t = judges.golden_judge(world.spm, letters()), clips.trained_clip(world.spm), case["in/timesteps"]
    text = clip.text_features(case["in/input_ids"])
    see("text features", FEATURES, text, *both(case, "", "spm", "spm_f64")("text_features"))
    see("text features", FEATURES, clip.text_features(case["in/input_ids_pad0"]), case["spm/text_features_pad0"])
    text = normalize(text, dim=-1).detach()
    for size in judges.SIZES:
        recorded, pixels = both(case, f"{size}/", "spm", "spm_f64"), model.pixels(case[f"in/image_{size}_f16"].float())
        see("pixels, 7 image sizes", FEATURES, pixels, *recorded("pixel_values"))
        found = clip.image_features(recorded("pixel_values")[0], t)
        see("image features, 7 image sizes", FEATURES, found, *recorded("image_features"))
        see("scores, 7 image sizes", SCORES, model.compare(pixels, text, t), *recorded("scores"))
    pixels = model.pixels(case["in/image_64x96_f16"])
    see("pixels, float16 images", FEATURES, pixels, case["spm/64x96_fp16input/pixel_values"])
    see("scores, float16 images", SCORES, model.compare(pixels, text, t), case["spm/64x96_fp16input/scores"])
    image = case["in/image_64x64_f16"].float()
    for each in (0, 1, 501, 951):
        found = model.score_images(image[None], text, each)[0]
        see("scores, one t for all", SCORES, found, case[f"spm/64x64_allt{each}/scores"])
    found = model.score_images(torch.stack([image, image.flip(-1)]), text, 501).flatten()
    see("scores of two branches", SCORES, found, case["spm/k2b4_64x64_and_hflip_t501/scores"])


def judge_in_training(rows: Rows, world: SimpleNamespace) -> None:
    """Case 2: gradients of the judge, and a judge as training begins with it."""
    see, case = partial(rows.see, "2 judge"), load_golden("case2_spm_clip")
    clip, t = clips.trained_clip(world.spm), case["in/timesteps"]
    clips.sum_of_scores(clip, case).backward()
    for name, expected in part(case, "spm_grad/model.").items():
        see("gradients of 13 tensors, each", GRADIENTS, clip.get_parameter(name).grad, expected)
    fresh, plain, pixels = clips.fresh_clip(world.spm), clips.plain_clip(world.spm), case["in/pixel_values"]
    found = {"image": fresh.image_features(pixels, t), "text": fresh.text_features(case["in/input_ids"])}
    same = {
        "image": plain.get_image_features(pixel_values=pixels),
        "text": plain.get_text_features(input_ids=case["in/input_ids"]),
    }
    for name in found:
        see("fresh judge, features", FEATURES, found[name], case[f"spm_init/{name}_features"])
        see("fresh judge, features beside CLIPModel's", EXACT, found[name], same[name].pooler_output)


def selection(rows: Rows, world: SimpleNamespace) -> None:
    """Case 3: 2, 4 and 8 branches, thresholds 0.3 and 0.4."""
    case = load_golden("case3_compare")
    for k in (2, 4, 8):
        branches = torch.arange(k).view(k, 1, 1, 1, 1).expand(k, 6, 1, 1, 1)
        for threshold in (0.3, 0.4):
            scores = case[f"k{k}/scores"]
            chosen = choose(scores, "best_worst", torch.Generator())
            pairs = PreferencePairs.of_step(torch.zeros(1, 6, 1, 1, 1), branches, chosen, 0)
            kept = is_sure(scores, chosen, threshold)
            recorded = part(case, f"k{k}/thr{threshold}/")
            rows.see("3 selection", "winner and loser", EXACT, pairs.x_prev.flatten(1), recorded["indices"])
            rows.see("3 selection", "pair kept or not", EXACT, kept, recorded["valid"])


def judge_training(rows: Rows, world: SimpleNamespace) -> None:
    """Cases 4, 5 and 5b: the judge's loss, what it is shown, a whole training step."""
    see, case = partial(rows.see, "4 judge's loss"), load_golden("case4_spm_criterion")
    for scale in (10, 100):
        recorded = both(case, f"neg0/scale{scale}/")
        for name, found in training.criterion(case, scale, torch.float32)[0].items():
            what = ("loss", LOSS) if name == "loss" else ("gradients, each", GRADIENTS)
            see(*what, found, *recorded(name))
    see, case = partial(rows.see, "5 noising"), load_golden("case5_batchable_ddim")
    for prediction in ("epsilon", "v_prediction"):
        denoiser, recorded = training.denoiser_of(world.diffusion, prediction), both(case, f"{prediction}/")
        found = denoiser.add_noise(case["in/clean_latents"], case["in/noise"], case["in/timesteps"])
        see("x_t", LATENTS, found, *recorded("noisy"))
        found = denoiser.x0_hat(recorded("noisy")[0], case["in/model_output"][None], case["in/timesteps"])
        see("x0_hat", LATENTS, found, *recorded("pred_original_sample"))
    see, case = partial(rows.see, "5b judge's step"), load_golden("case5b_spm_train_step_sd15")
    with pytest.MonkeyPatch.context() as patch:
        shown, pixels, loss, grads = training.one_step(load_golden, world.sd15, world.diffusion, world.spm, patch)
    for side in (0, 1):
        see("decoded x0_hat", LATENTS, shown[side], case[f"x0hat_decoded_image_{side}"])
        see("pixels", LATENTS, pixels[side], case[f"model_pixel_values_{side}"])
    see("loss", LOSS, loss, case["loss"])
    for name, expected in part(case, "grad/model.").items():
        if name == "logit_scale":
            see("gradient of logit_scale", SCALE_GRADIENT, grads[name], expected)
        else:
            see("gradients of 9 tensors, each", STEP_GRADIENTS, grads[name], expected)
    norm = torch.stack([grad.double().norm() for grad in grads.values()]).norm()
    see("norm of all gradients", GRADIENTS, norm, case["grad_norm_all_params"])
