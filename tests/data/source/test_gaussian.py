"""data=gaussian: the same fields everywhere, with the mean and variance of their law, and no autoencoder asked."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from nai_xl import config
from nai_xl.data.index import refuse_without_pictures
from nai_xl.data.source.gaussian import MEANS, GaussianField, GaussianSource
from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket
from nai_xl.train import train
from tests.test_train import losses, rows


def test_a_field_is_a_function_of_its_settings_and_number() -> None:
    one, other = (GaussianSource(resolution=64, count=50).scan() for _ in range(2))
    assert one.fingerprint() == other.fingerprint() and len({item.content for item in one.items}) == len(one.items)
    assert len(one.items) + len(one.held_out) == 50 and one.held_out
    field = one.items[0].drawn
    assert field is not None and field == other.items[0].drawn
    torch.testing.assert_close(field.latents(Bucket(64, 48)), field.latents(Bucket(64, 48)), atol=0, rtol=0)
    assert field.latents(Bucket(64, 48)).shape == (4, 6, 8) and field.latents(Bucket(64, 48)).dtype == torch.float32
    longer = {item.content for item in GaussianSource(resolution=64, count=60).scan().items}
    assert {item.content for item in one.items} < longer  # more fields are further fields


@pytest.mark.parametrize("change", [{"power": 3.0}, {"mean": 0.0}, {"seed": 1}])
def test_every_setting_is_part_of_what_a_field_is(change: dict[str, Any]) -> None:
    both = [GaussianSource(resolution=64, count=20, **some).scan() for some in ({}, change)]
    contents = [{item.content for item in index.items} for index in both]
    assert contents[0].isdisjoint(contents[1])


def test_captions_tell_the_mean_and_nothing_else() -> None:
    index = GaussianSource(resolution=64, count=400, held_out=0).scan()
    assert {item.caption for item in index.items} == {f"a {colour} field" for colour in MEANS}
    signs = torch.tensor(list(MEANS.values())).double()
    assert not signs.mean(0).any() and torch.equal(signs.T @ signs / 8, torch.eye(4).double())


def test_fields_have_variance_one_around_their_mean() -> None:
    fields = torch.stack([GaussianField("red", 2.0, 0.5, 0, n).latents(Bucket(64, 64)) for n in range(300)])
    assert fields.mean((0, 2, 3)).tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5], abs=0.05)
    centred = fields - torch.tensor(MEANS["red"])[:, None, None] * 0.5
    assert centred.square().mean().item() == pytest.approx(1, rel=0.03)


SHORT = "tracker=jsonl sampling.steps=2 run.batch_size=2 run.log_every=1 run.checkpoint_every=100 lr.warmup=0".split()


@pytest.fixture
def fields(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., DictConfig]:
    """A checked config of a run of seconds on 40 fields of 4 x 4, with these overrides."""
    monkeypatch.chdir(tmp_path)
    settings = "data=gaussian data.count=40 native.resolution=32 cache=memory latents.factor=1".split()

    def compose(*overrides: str) -> DictConfig:
        cfg = config.compose([*SHORT, *settings, *overrides])
        config.check(cfg)
        return cfg

    return compose


def test_it_trains_and_the_autoencoder_is_not_asked(
    fields: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nai_xl.engine.encode.encode_pixels", None)
    looked = "evals=[sample_grid,optimality,mean_kept] evals.mean_kept.steps=2 evals.mean_kept.count=16".split()
    home = train(fields("run.max_images=8", "data.held_out=0.4", *looked), {})
    assert len(losses(home)) == 4 and (home / "samples").is_dir()
    assert {"optimality/excess", "mean_kept/caption", "mean_kept/variance_ideal"} <= rows(home)[4].keys()


def test_what_needs_pictures_is_refused(fields: Callable[..., DictConfig]) -> None:
    with pytest.raises(UserError, match=r"task=vae_decoder needs pictures.*set data=sample"):
        train(fields("task=vae_decoder", "evals=[reconstruction]", "memory=[sdpa]"), {})


def test_who_reads_pictures_is_named_with_what_to_set_instead() -> None:
    items = GaussianSource(resolution=64, count=3).scan().items
    with pytest.raises(UserError, match=r"evals=quality needs pictures.*evals=\[optimality\]"):
        refuse_without_pictures(items, "evals=quality", "'evals=[optimality]'")
