"""model=sdxl_random: SDXL's own configs with seeded random weights, here in a shrunken folder of them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.model.sdxl.components import fingerprint
from nai_xl.model.sdxl.configs import SDXL_BASE
from nai_xl.model.sdxl_random import random_unet, sdxl_random
from nai_xl.model.text import encode_texts
from nai_xl.model.vae import encode_pixels

SHRUNKEN = {
    "unet": {
        "block_out_channels": [32, 64, 64],
        "attention_head_dim": [1, 2, 2],
        "transformer_layers_per_block": [1, 1, 1],
        "layers_per_block": 1,
        "cross_attention_dim": 48,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "addition_time_embed_dim": 8,
    },
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
    "text_encoder": {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2},
    "text_encoder_2": {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "projection_dim": 32,
    },
}


@pytest.fixture(scope="module")
def shrunken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SDXL base's own folder of configs, narrower and with fewer layers."""
    folder = tmp_path_factory.mktemp("configs") / "sdxl"
    shutil.copytree(SDXL_BASE, folder)
    for part, changes in SHRUNKEN.items():
        file = folder / part / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | changes))
    return folder


def test_the_weights_are_those_of_the_seed(shrunken: Path) -> None:
    before = torch.random.get_rng_state()
    models = [sdxl_random(seed=seed, config=shrunken) for seed in (3, 3, 4)]
    assert torch.equal(torch.random.get_rng_state(), before)
    parts = [(m.unet, m.vae, *m.text_encoders) for m in models]
    for same, again, other in zip(*parts, strict=True):
        assert fingerprint(same) == fingerprint(again) != fingerprint(other)
    assert fingerprint(random_unet(seed=3, config=shrunken)) == fingerprint(models[0].unet)


def test_it_runs_from_a_caption_and_a_picture_to_a_gradient(shrunken: Path) -> None:
    model = sdxl_random(seed=0, config=shrunken)
    context, pooled = encode_texts(model.tokenizers, model.text_encoders, ["a cat", "two words"], chunks=1)
    latents = encode_pixels(model.vae, torch.rand(2, 3, 64, 64) * 2 - 1)
    condition = {"text_embeds": pooled, "time_ids": torch.full((2, 6), 64.0)}
    prediction = model.unet(latents, torch.tensor([0, 999]), context, added_cond_kwargs=condition).sample
    loss = (prediction - torch.randn_like(prediction)).square().mean()
    loss.backward()
    gradients = [p.grad for p in model.unet.parameters()]
    assert 0.1 < loss.item() < 10
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert not any(p.requires_grad for part in (model.vae, *model.text_encoders) for p in part.parameters())


def test_the_default_is_sdxl_base() -> None:
    """Counted on the meta device; 2,567,463,684 is the size of the published UNet."""
    unet = random_unet(seed=0, device="meta")
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    cfg = config.compose(["model=sdxl_random"])
    config.check(cfg)
    sdxl = config.compose(["model=sdxl", "model.path=x"])
    assert cfg.native == sdxl.native


def test_an_incomplete_folder_is_refused(shrunken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sdxl"
    shutil.copytree(shrunken, folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match=r"model\.config.*lacks vae/"):
        sdxl_random(seed=0, config=folder)
