"""The names of the scorers that come with strop, for those who check a command line before torch is imported."""

NAMES = ("pickscore", "hpsv2", "hpsv2.1", "image_reward", "aesthetic", "clip_score")
