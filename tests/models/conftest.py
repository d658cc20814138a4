"""Checkpoint files of the golden models, whole and spoilt."""

import pytest
from safetensors.torch import load_file, save_file


@pytest.fixture
def tiny_checkpoints(tiny_file, tiny_folder, tiny_sdxl_file, tiny_sdxl_folder):
    """tiny_checkpoints["sdxl"] -> the checkpoint file and the folder it was made of."""
    return {"sd15": (tiny_file, tiny_folder), "sdxl": (tiny_sdxl_file, tiny_sdxl_folder)}


@pytest.fixture
def spoilt(tiny_checkpoints, tmp_path):
    """spoilt("sdxl", lambda name: ...) -> the checkpoint without the tensors whose name gives false."""

    def make(family, keep=lambda name: True, **more):
        file = tmp_path / "spoilt.safetensors"
        save_file({name: v for name, v in load_file(tiny_checkpoints[family][0]).items() if keep(name)} | more, file)
        return file

    return make
