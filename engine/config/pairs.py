"""Section `data` of all recipes that train on preference pairs: of a judge, and of methods without a rollout."""

from __future__ import annotations

from pydantic import Field

from .settings import Section


class PairsConfig(Section):
    source: str = Field(
        description="Preference pairs: Pick-a-Pic parquet files, all of a folder or folder/train-*.parquet; a .jsonl "
        'file of {image_0, image_1: path relative to the file, caption, label: 0, 1 or "tie" (which image is '
        "preferred)}, where label_0 and label_1 of sum 1 may stand for label, and num_examples, the pairs with this "
        "caption, is optional; or `module:factory`, code that is imported and run: factory(seed, size) gives a "
        "map-style dataset of {image_0, image_1: (3, H, W) in [-1, 1], caption, label_0, label_1}. Images are JPEG, "
        "PNG, WebP or BMP of at most 50 million pixels, at most 16 times as long as wide; transparent is white."
    )
    only: str | None = Field(
        None,
        description="The file of `strop filter-pairs` for data.source: pairs that it does not keep are not trained on. "
        "Held-out pairs are as they are without it. Not for pairs of a factory.",
    )
    train: int | None = Field(
        None,
        ge=1,
        le=10**8,
        description="Most training pairs; null takes all that the run can see. A factory needs a number.",
    )
    max_broken: float = Field(
        0.01, ge=0, lt=1, description="Share of broken pairs above which the run stops; fewer are named and left out."
    )
    cache: str | None = Field(
        "auto",
        description="Folder where VAE latents, text embeddings (both in float16) and PickScore's scores, where it "
        "makes the labels, are stored for every later run: 130 KB a pair at 512 pixels, 520 KB at 1024, and 120 or 320 "
        "KB a caption. auto is `pair-cache` beside run.dir; null computes them in every step, and reads a row group of "
        "parquet for every pair. Pairs of a factory are not cached.",
    )
    workers: int = Field(
        0, ge=0, le=256, description="Processes that load pairs; 0 loads them in the training process."
    )
