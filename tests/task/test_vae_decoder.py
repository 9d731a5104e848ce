"""An autoencoder is trained by the same loop: what moves, what is delivered, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from omegaconf import DictConfig
from PIL import Image

from nai_xl.config.spec import Spec
from nai_xl.data.bucketing import AspectBuckets
from nai_xl.data.pixels import PixelDataset
from nai_xl.data.source.folder import scan
from nai_xl.errors import UserError
from nai_xl.evals.reconstruction import psnr
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.record.run_dir import RunDirectory
from nai_xl.train import train
from tests.conftest import SMALL
from tests.test_train import losses

Compose = Callable[..., DictConfig]
TASK = ["task=vae_decoder", "evals=[reconstruction]", "evals.reconstruction.every=2", "optimizer.lr=1e-4"]


@pytest.fixture
def autoencoder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compose:
    """A checked config of a run of seconds with this task."""
    from nai_xl import config

    monkeypatch.chdir(tmp_path)
    plain = [override for override in SMALL if not override.startswith("evals.")]

    def compose(*overrides: str) -> DictConfig:
        cfg = config.compose([*plain, f"data.dir={images}", *TASK, *overrides])
        config.check(cfg)
        return cfg

    return compose


def delivered(folder: Path) -> AutoencoderKL:
    """As plain diffusers loads it."""
    return AutoencoderKL.from_pretrained(folder / "pipeline" / "vae", local_files_only=True)


@pytest.mark.parametrize("trained", ["decoder", "all"])
def test_only_what_is_trained_moves(autoencoder: Compose, trained: str) -> None:
    folder = train(autoencoder(f"task.trained={trained}", "run.max_images=8", "ema=none"), {})
    found = losses(folder)
    assert list(found) == [1, 2, 3, 4] and all(0 < value < 1 for value in found.values())
    before, after = tiny_sdxl(seed=0).vae.state_dict(), delivered(folder).state_dict()
    moved = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == ({"decoder", "post_quant_conv"} if trained == "decoder" else {*(n.split(".")[0] for n in before)})
    saved = json.loads((folder / "checkpoints" / "step_00000004" / "state.json").read_text())
    assert any("encoder." in name for name, _ in saved["parts"]["unet"]["items"]) == (trained == "all") or (
        trained == "decoder" and all(n.startswith(("decoder.", "post_")) for n, _ in saved["parts"]["unet"]["items"])
    )


def test_a_continued_run_is_the_uninterrupted_one(autoencoder: Compose) -> None:
    train(autoencoder("run.max_images=4", "name=two", "task.latent_noise=0.1", "task.zoom=2"), {})
    two = train(autoencoder("run.max_images=8", "name=two", "task.latent_noise=0.1", "task.zoom=2"), {})
    one = train(autoencoder("run.max_images=8", "name=one", "task.latent_noise=0.1", "task.zoom=2"), {})
    assert losses(two) == losses(one) and len(losses(one)) == 4


def test_reconstructions_are_measured_and_shown(autoencoder: Compose) -> None:
    folder = train(autoencoder("run.max_images=4", "data.held_out=0.4"), {})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert 5 < rows[-1]["reconstruction/psnr"] < 60
    assert Image.open(folder / "reconstructions" / "step_00000002.png").width > 100


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evals=[sample_grid]", "~evals.reconstruction"], r"evals=\[reconstruction\]"),
        (["memory=[bf16_weights]", "optimizer=adamw_bf16"], r"Bf16Weights is for UNets"),
        (["memory=[attention_slicing]"], r"AttentionSlicing is for UNets"),
        (["memory=[flash]"], r"Sdpa is for UNets with these settings"),
        (["memory=[gradient_checkpointing]", "memory.gradient_checkpointing.blocks=ff"], r"Checkpointing is for UNets"),
        (["task.channel_pull=0.1"], r"task\.channel_pull=0\.1.*task\.trained=all"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_weight_is_read(
    autoencoder: Compose, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    monkeypatch.setattr("nai_xl.model.tiny._vae", None)
    cfg = autoencoder(*[o for o in overrides if not o.startswith("~") and not o.startswith("evals")])
    if overrides[0].startswith("evals"):
        cfg.evals = {"sample_grid": {"_target_": "nai_xl.evals.sample_grid.SampleGrid", "every": 2}}
    with pytest.raises(UserError, match=message):
        train(cfg, {})


def test_an_image_that_cannot_be_read_is_left_out(autoencoder: Compose, images: Path) -> None:
    whole = (images / "00.png").read_bytes()
    (images / "00.png").write_bytes(whole[: len(whole) // 2])
    folder = train(autoencoder("run.max_images=4"), {})
    assert "00.png" in (folder / "skipped.csv").read_text()
    assert json.loads((folder / "run.json").read_text())["images"] == 11


def test_a_held_out_image_that_cannot_be_read_is_dropped_and_not_replaced_by_an_unchecked_one(
    autoencoder: Compose, tmp_path: Path
) -> None:
    spec = Spec.of(autoencoder("data.held_out=0.4", "evals.reconstruction.count=1"))
    index = spec.scan()
    (shown,) = spec.evals[0].held_out(index.held_out)
    shown.path.write_bytes(shown.path.read_bytes()[:200])
    data = spec.task.prepare(index, spec.cache, spec.start(), RunDirectory(tmp_path))
    assert not data.held_out and len(index.held_out) > 1


def test_whole_blocks_may_be_recomputed(autoencoder: Compose) -> None:
    spec = Spec.of(autoencoder("memory=[gradient_checkpointing,math]"))
    assert not any(action.unets_only for action in spec.memory)


def test_a_picture_depends_on_its_position_alone(images: Path) -> None:
    index, bucketing = scan(images, min_side=16), AspectBuckets(64, 16)
    one, other = (PixelDataset(index, bucketing, 3, zoom=4, recolour=True) for _ in range(2))
    square = [number for number, item in enumerate(index.items) if item.size == (96, 96)]
    together = one.__getitems__([(5, square[0]), (9, square[1])])
    alone = other.__getitems__([(9, square[1])])
    assert torch.equal(together.pixels[1], alone.pixels[0]) and torch.equal(together.noise[1], alone.noise[0])
    assert together.pixels.abs().max() <= 1 and together.canvas == (64, 64, 0)
    crops = {tuple(one.__getitems__([(n, square[0])]).pixels.flatten()[:9].tolist()) for n in range(12)}
    assert len(crops) > 8  # zoom and colours differ from position to position


def test_psnr_is_that_of_eight_bits() -> None:
    draw = np.random.default_rng(0)
    one, other = (draw.integers(0, 256, (3, 8, 8)) for _ in range(2))
    expected = 10 * np.log10(255**2 / np.mean((one - other) ** 2.0))
    a, b = (torch.tensor(x / 127.5 - 1) for x in (one, other))
    assert psnr(a, b) == pytest.approx(expected, rel=1e-9)
    assert psnr(a, a) == float("inf")


def test_a_spec_of_this_task_builds_nothing_of_the_others(autoencoder: Compose) -> None:
    spec = Spec.of(autoencoder("parameterization=epsilon"))  # which the default schedule would refuse
    assert type(spec.task).__name__ == "VaeDecoder"
