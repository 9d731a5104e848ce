"""Normalisation of latents: the statistics themselves, and runs that train, continue and export with them."""

import functools
import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch.distributed import HashStore

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.data.bucketing import SquareBucket
from nai_xl.data.cache import MemoryCache
from nai_xl.data.index import Index
from nai_xl.data.loader import PositionDataset
from nai_xl.data.rows import Item
from nai_xl.distributed.team import StoreTeam
from nai_xl.engine.encode import Encoder
from nai_xl.errors import UserError
from nai_xl.model.latents import (
    GivenLatents,
    Moments,
    PerChannelLatents,
    ScaleLatents,
    moments,
    read_statistics,
    write_statistics,
)
from nai_xl.model.sdxl import load_sdxl
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.model.vae import encode_pixels
from nai_xl.record.run_dir import RunDirectory
from nai_xl.train import train
from tests.test_train import losses, run, same_weights

Compose = Callable[..., DictConfig]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_sdxl(seed=0).vae


def unmeasured() -> Moments:
    raise AssertionError("the data were looked at")


def random_latents(seed: int, count: int, mean: float, std: float) -> list[torch.Tensor]:
    """Four channels that differ, of several shapes, float64."""
    random = np.random.default_rng(seed)
    own_mean, own_std = mean * np.array([1, -0.5, 0, 0.1]), std * np.array([1, 2, 0.5, 3])
    shapes = random.integers(1, 7, (count, 2))
    return [
        torch.from_numpy(random.normal(own_mean, own_std, (*shape, 4)).transpose(2, 0, 1).copy()) for shape in shapes
    ]


def by_numpy(latents: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and std of all values at once, in long double."""
    values = np.concatenate([latent.flatten(1).numpy() for latent in latents], axis=1).astype(np.longdouble)
    return values.mean(axis=1).astype(float), values.std(axis=1).astype(float)


def assert_moments(found: Moments, latents: list[torch.Tensor], rel: float = 1e-9) -> None:
    mean, std = by_numpy(latents)
    assert found.count == sum(latent[0].numel() for latent in latents)
    np.testing.assert_allclose(found.mean.numpy(), mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.std.numpy(), std, rtol=rel, atol=1e-12)


# --- moments ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.integers(1, 30), st.floats(-100, 100), st.floats(0.01, 100))
def test_moments_are_those_of_all_values_together(seed: int, count: int, mean: float, std: float) -> None:
    latents = random_latents(seed, count, mean, std)
    assert_moments(moments(latents), latents)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 20), max_size=4), st.randoms(use_true_random=False))
def test_order_and_split_do_not_matter(seed, cuts, random) -> None:  # type: ignore[no-untyped-def]
    """As when several processes measure a share each, of which some may be empty."""
    latents = random_latents(seed, 20, 3.0, 2.0)
    random.shuffle(latents)
    shares = [moments(latents[a:b]) for a, b in pairwise([0, *sorted(cuts), 20])]
    random.shuffle(shares)
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    assert_moments(total, latents)


def test_small_deviation_beside_a_huge_mean_is_not_cancelled() -> None:
    latents = random_latents(0, 200, 1e6, 1e-2)
    assert_moments(moments(latents), latents, rel=1e-6)
    values = torch.cat([latent.flatten(1) for latent in latents], dim=1)
    naive = (values.square().mean(1) - values.mean(1).square())[0]  # the case is one: this gives nonsense
    assert abs(naive.item() - 1e-4) > 1e-5


def test_every_pixel_counts_the_same() -> None:
    found = moments([torch.zeros(4, 1, 1), torch.ones(4, 1, 3)])
    assert found.mean.tolist() == [0.75] * 4
    assert found.std.tolist() == pytest.approx([math.sqrt(0.1875)] * 4)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_shares_of_all_processes_add_up(world: int) -> None:
    """World 5: more processes than latents, so that one has none."""
    latents = random_latents(0, 4, 3.0, 2.0)
    cache, index = MemoryCache(), Index([Item(Path(f"{n}.png"), "", (8, 8), 64 * f"{n}") for n in range(2)])
    teams = [StoreTeam(HashStore(), rank, world) for rank in range(world)]
    ranks = [Encoder(tiny_sdxl(seed=0), cache, "fp32", torch.device("cpu"), team=team) for team in teams]
    refs = ranks[0].latent_refs(index, SquareBucket(8, flip=True))
    for ref, latent in zip((ref for row in refs for ref in row), latents, strict=True):
        cache.put(ref.key, {"latents": latent})
    assert_moments(functools.reduce(Moments.__add__, (encoder.measure(refs) for encoder in ranks)), latents)


# --- options ----------------------------------------------------------------------------------------------------------


def test_one_factor_for_all_channels(vae: AutoencoderKL) -> None:
    for latents, factor in ((ScaleLatents(), vae.config.scaling_factor), (ScaleLatents(factor=0.5), 0.5)):
        mean, std = latents.statistics(vae, unmeasured)
        assert mean.shape == std.shape == (4, 1, 1)
        torch.testing.assert_close((torch.ones(4, 1, 1) - mean) / std, torch.full((4, 1, 1), factor))


@pytest.mark.parametrize("factor", [0.0, -1.0, math.inf, math.nan])
def test_impossible_factor_is_refused(factor: float) -> None:
    with pytest.raises(UserError, match=r"latents\.factor"):
        ScaleLatents(factor=factor)


def test_anime_has_the_published_numbers(vae: AutoencoderKL) -> None:
    mean, std = config.build(config.compose(["latents=anime"]).latents).statistics(vae, unmeasured)
    assert mean.shape == std.shape == (4, 1, 1) and mean.dtype == std.dtype == torch.float32
    assert torch.equal(mean.flatten(), torch.tensor([4.8119, 0.1607, 1.3538, -1.7753]))
    assert torch.equal(std.flatten(), torch.tensor([9.9181, 6.2753, 7.5978, 5.9956]))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ([0.0] * 4, [1.0, 1.0, 0.0, 1.0]),
        ([0.0] * 4, [1.0, -1.0, 1.0, 1.0]),
        ([math.nan, 0.0, 0.0, 0.0], [1.0] * 4),
        ([0.0] * 3, [1.0] * 4),
        ([0.0] * 4, []),
    ],
)
def test_impossible_given_numbers_are_refused(vae: AutoencoderKL, mean: list[float], std: list[float]) -> None:
    with pytest.raises(UserError, match=r"latents\.mean and latents\.std"):
        GivenLatents(mean, std).statistics(vae, unmeasured)


def test_per_channel_statistics_are_the_measured_ones(vae: AutoencoderKL) -> None:
    latents = random_latents(0, 30, 3.0, 2.0)
    mean, std = PerChannelLatents().statistics(vae, lambda: moments(latents))
    assert mean.shape == std.shape == (4, 1, 1) and mean.dtype == std.dtype == torch.float32
    for found, expected in zip((mean, std), by_numpy(latents), strict=True):
        np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, math.inf, math.nan])
def test_channel_that_cannot_be_normalised_is_refused(vae: AutoencoderKL, value: float) -> None:
    latents = [latent.float() for latent in random_latents(0, 30, 3.0, 2.0)]
    for latent in latents:
        latent[2] = value
    with pytest.raises(UserError, match=r"channel 2 .*latents=scale"):
        PerChannelLatents().statistics(vae, lambda: moments(latents))


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4))
def test_stored_numbers_come_back_bit_for_bit(tmp_path_factory: pytest.TempPathFactory, values: list[float]) -> None:
    path = tmp_path_factory.getbasetemp() / "latents.json"
    numbers = torch.tensor(values).view(4, 1, 1)
    write_statistics(path, (numbers, numbers + 1), "bf16")
    mean, std, stored = read_statistics(path)
    assert torch.equal(mean, numbers) and torch.equal(std, numbers + 1) and stored == "bf16"


def test_a_run_of_an_earlier_version_keeps_its_latents_in_fp32(small: Callable[..., DictConfig]) -> None:
    """Whose latents.json tells no precision: it goes on with what it began with, and others with bf16."""
    folder = run(small("precision=bf16", "latents.stored=fp32", "run.max_images=4", "name=old"))
    told = json.loads((folder / "latents.json").read_text())
    assert told.pop("stored") == "fp32"
    (folder / "latents.json").write_text(json.dumps(told))
    home, spec = RunDirectory(folder), Spec.of(small("precision=bf16", "run.max_images=4"))
    spec.task.load(spec.model)
    assert spec.task.prepare(spec.scan(), spec.cache, spec.start(), home).stored == "fp32"
    assert spec.task.prepare(spec.scan(), spec.cache, spec.start(), RunDirectory(folder / "new")).stored == "bf16"


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"mean": "x", "std": "y"}', '{"mean": [1], "std": [1], "stored": "x"}']
)
def test_damaged_numbers_are_told(tmp_path: Path, content: str) -> None:
    path = tmp_path / "latents.json"
    path.write_text(content)
    with pytest.raises(UserError, match="damaged"):
        read_statistics(path)


# --- runs -------------------------------------------------------------------------------------------------------------


def normalised(cfg: DictConfig) -> torch.Tensor:
    """All values [4,N] that the loader would give, of every placement."""
    spec = Spec.of(cfg)
    strategy, index = spec.start(), spec.scan()
    spec.task.load(spec.model)
    data = spec.task.prepare(index, spec.cache, strategy, RunDirectory(config.run_dir(cfg, {})))
    encoded = data.encoded
    dataset = PositionDataset(encoded, data.captions, seed=0)
    found = {}
    for number, refs in enumerate(encoded.latents):
        position = 0
        while len([key for key in found if key[0] == number]) < len(refs):
            sample = dataset[position, number]
            found[number, tuple(sample.time_ids[0].tolist())] = sample.latents[0]
            position += 1
    return torch.cat([latent.flatten(1) for latent in found.values()], dim=1)


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_per_channel_latents_have_mean_0_and_std_1_over_the_data(small: Compose, cache: str) -> None:
    values = normalised(small("latents=per_channel", f"cache={cache}")).double()
    assert values.mean(1).tolist() == pytest.approx([0] * 4, abs=1e-6)
    assert values.std(1, unbiased=False).tolist() == pytest.approx([1] * 4, abs=1e-6)
    plain = normalised(small(f"cache={cache}")).double()
    assert plain.mean(1).abs().max() > 0.01  # which is not so by itself


def test_numbers_of_the_beginning_are_kept_when_the_run_continues(
    small: Compose, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(small("latents=per_channel", "run.max_images=6"))
    stored = (folder / "latents.json").read_text()
    mean, std = (json.loads(stored)[name] for name in ("mean", "std"))
    shown = " ".join(capsys.readouterr().out.split())
    assert f"mean {' '.join(f'{x:.4g}' for x in mean)}, std {' '.join(f'{x:.4g}' for x in std)}" in shown
    changed = {"mean": [x + 0.25 for x in mean], "std": std}
    (folder / "latents.json").write_text(json.dumps(changed))  # so that measuring anew would show
    for path in own_cache.rglob("*.safetensors"):
        path.unlink()
    assert run(small("latents=per_channel", "run.max_images=12")) == folder
    assert json.loads((folder / "latents.json").read_text())["mean"] == pytest.approx(changed["mean"])
    conv = load_file(folder / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    plain = tiny_sdxl(seed=0).vae.post_quant_conv
    shift = conv["post_quant_conv.bias"] - plain.bias
    expected = plain.weight[:, :, 0, 0] @ torch.tensor(changed["mean"])
    torch.testing.assert_close(shift, expected.detach(), atol=1e-5, rtol=1e-5)


def test_continued_per_channel_run_is_the_uninterrupted_one(small: Compose) -> None:
    run(small("latents=per_channel", "run.max_images=6", "name=two"))
    two = run(small("latents=per_channel", "run.max_images=12", "name=two"))
    one = run(small("latents=per_channel", "run.max_images=12", "name=one"))
    assert losses(two) == losses(one) and same_weights(two, one)


def test_training_goes_on_from_the_exported_pipeline_with_plain_scale(small: Compose) -> None:
    folder = run(small("latents=per_channel", "run.max_images=4"))
    onward = small(
        "model=sdxl", f"model.path={folder / 'pipeline'}", "native.resolution=128", "native.bucket_step=32",
        "latents=scale", "run.max_images=4", "name=onward",
    )  # fmt: skip
    values = normalised(onward).double()
    assert values.mean(1).tolist() == pytest.approx([0] * 4, abs=1e-4)
    assert values.std(1, unbiased=False).tolist() == pytest.approx([1] * 4, abs=1e-4)
    again = run(onward)
    first, second = (load_sdxl(path / "pipeline").vae for path in (folder, again))
    assert first.config.scaling_factor == second.config.scaling_factor
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_run_on_a_dead_channel_is_refused_and_leaves_no_numbers(
    small: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
        latents = encode_pixels(vae, pixels)
        latents[:, 1] = 0.3
        return latents

    monkeypatch.setattr("nai_xl.engine.encode.encode_pixels", dead)
    cfg = small("latents=per_channel", "cache=memory", "run.max_images=4")
    with pytest.raises(UserError, match=r"channel 1 .*latents=scale"):
        train(cfg, {})
    assert not RunDirectory(config.run_dir(cfg, {})).latents.exists()
