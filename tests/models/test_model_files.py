"""models/model_files: a file that is not what its name says is refused by name."""

import pytest

from strop.engine.errors import UserError
from strop.engine.models.model_files import read_config, read_shapes


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_broken_configuration_is_named(tmp_path, text):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"^model\.components: .*unet/config\.json"):
        read_config(tmp_path, "unet", "model.components")


def test_a_file_that_is_no_safetensors_is_refused(tmp_path):
    file = tmp_path / "file.safetensors"
    file.write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match=r"^model\.path: .* is no \.safetensors file"):
        read_shapes(file, "model.path")
