"""A base model whose weights are not finite is refused when it is loaded, by the name of the part and the tensor."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from nai_xl.config.spec import Spec
from nai_xl.errors import UserError
from nai_xl.model.finite import is_finite, refuse_not_finite
from nai_xl.model.single_file import to_single_file
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.train import train
from tests.model.test_sdxl import modules, save_folder, small_sdxl

# part -> the beginning of a tensor's name there
PLACES = [
    ("unet", "mid_block"),
    ("vae", "encoder.conv_in"),
    ("vae", "decoder.conv_out"),
    ("text_encoder", ""),
    ("text_encoder_2", ""),
]


@pytest.mark.parametrize(("part", "begins"), PLACES)
@pytest.mark.parametrize("single", [False, True], ids=["folder", "single file"])
def test_every_part_of_a_model_on_disk_is_looked_at(
    small: Callable[..., DictConfig], tmp_path: Path, part: str, begins: str, single: bool
) -> None:
    components = small_sdxl()
    named = dict(modules(components)[part].named_parameters())
    name = [name for name in named if name.startswith(begins)][-1]
    named[name].data.view(-1)[-1] = math.nan
    path = save_folder(components, tmp_path / "model")
    choices = ["model=sdxl", f"model.path={path}", "native.resolution=64"]
    if single:
        file = tmp_path / "model.safetensors"
        to_single_file(components, file, v_prediction=True, zero_terminal_snr=True, dtype=torch.float32)
        choices[1:2] = [f"model.path={file}", f"+model.config={path}"]
    with pytest.raises(UserError, match=rf"not finite: {part}: \S*{name.rpartition('.')[2]} \(1 of .*model\.path"):
        Spec.of(small(*choices)).model()


def test_an_option_of_a_plug_in_is_looked_at_before_anything_is_encoded(
    small: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "broken.py").write_text(
        "from nai_xl.model.tiny import tiny_sdxl\n"
        "def model(*, seed):\n"
        "    made = tiny_sdxl(seed=seed)\n"
        "    made.vae.decoder.conv_out.bias.data.fill_(float('inf'))\n"
        "    return made\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "mine")
    with pytest.raises(UserError, match=r"not finite: vae: decoder\.conv_out\.bias \(3 of 3 numbers\)"):
        train(small("model._target_=broken.model", "plugins=[broken]", "cache.dir=cache"), {})
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_large_weights_are_finite_and_every_broken_part_is_named() -> None:
    assert is_finite(torch.full((1000,), 3e38)) and is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.full((1000,), 6e4, dtype=torch.float16)) and is_finite(torch.ones(2).to(torch.float8_e4m3fn))
    assert not is_finite(torch.tensor([math.inf, -math.inf])) and not is_finite(torch.tensor([math.nan]).bfloat16())
    components = tiny_sdxl(seed=0)
    refuse_not_finite(components)
    for module in (components.unet, components.text_encoders[1]):
        for parameter in list(module.parameters())[:2]:
            parameter.data.fill_(math.nan)
    with pytest.raises(UserError, match=r"unet: .* and 1 tensors more; text_encoder_2: .* and 1 tensors more"):
        refuse_not_finite(components)
