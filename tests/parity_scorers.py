"""The part of parity.py that is the scorers: case 8, on tiny weights in the form of the published ones."""

from functools import partial
from types import SimpleNamespace

from conftest import module_of
from parity_table import EXACT, FEATURES, SCORERS, Rows

scores = module_of("scorers/test_scores.py")
TITLES = {
    "pickscore": "PickScore",
    "hpsv2": "HPSv2, times 100",
    "hpsv2.1": "HPSv2.1, times 100",
    "image_reward": "ImageReward",
    "aesthetic": "aesthetic score",
    "clip_score": "CLIPScore",
}


def scorers(rows: Rows, world: SimpleNamespace) -> None:
    """Case 8: 6 prompts with 6 images each, of the aesthetic score the images alone."""
    see, recorded = partial(rows.see, "8 scorers"), scores.golden()
    for name, found in scores.found_ids().items():
        see("tokens", EXACT, found, scores.published_ids(name))
    for name, found in scores.found_bytes().items():
        see("bytes of the resized images", EXACT, found, recorded[name])
    see("pixels of HPS", FEATURES, scores.hps_pixels(), recorded["hpsv2/pixels_2_4_5"])
    for name, title in TITLES.items():
        see(title, SCORERS, scores.matrix(name), *(scores.recorded(name, precision) for precision in ("f32", "f64")))
    given = (recorded[f"image_reward/{precision}/score_gard_hand"] for precision in ("f32", "f64"))
    see("ImageReward of given tokens", SCORERS, scores.rewards_of_given_ids(), *given)
