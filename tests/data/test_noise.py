"""The noise of training samples: what it depends on and its moments."""

import pytest
import torch
from torch import Tensor

from nai_xl.data.noise import TrainingNoise
from nai_xl.errors import UserError
from nai_xl.rng import draws

SHAPE = (4, 6, 5)


def many(noise: TrainingNoise, count: int = 3000) -> tuple[Tensor, Tensor]:
    return noise([draws(1, position) for position in range(count)], SHAPE)


def test_off_by_default_it_is_the_position_s_noise_and_nothing_beside_it() -> None:
    noise, perturbation = TrainingNoise()([draws(3, 7), draws(3, 9)], SHAPE)
    assert torch.equal(noise, torch.stack([draws(3, 7).noise(SHAPE), draws(3, 9).noise(SHAPE)]))
    assert perturbation.shape == (2, 1, 1, 1) and not perturbation.any()


def test_offset_is_one_normal_number_a_channel_with_the_stated_variance() -> None:
    plain, _ = many(TrainingNoise())
    offset, _ = many(TrainingNoise(offset=0.5))
    shift = offset - plain
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift), rtol=0, atol=1e-6)
    values = shift[..., 0, 0]
    assert abs(values.mean().item()) < 5 * 0.5 / values.numel() ** 0.5
    assert values.var().item() == pytest.approx(0.25, rel=0.06)
    assert offset.var().item() == pytest.approx(1.25, rel=0.03)
    correlation = torch.corrcoef(values.T) - torch.eye(4)
    assert correlation.abs().max() < 0.1
    assert abs(torch.corrcoef(torch.stack([values[:, 0], plain.mean(dim=(1, 2, 3))]))[0, 1].item()) < 0.1


def test_perturbation_is_independent_noise_with_the_stated_variance() -> None:
    noise, perturbation = many(TrainingNoise(perturbation=0.1))
    assert torch.equal(noise, many(TrainingNoise())[0])
    assert perturbation.shape == noise.shape
    assert perturbation.var().item() == pytest.approx(0.01, rel=0.02)
    assert abs(torch.corrcoef(torch.stack([noise.flatten(), perturbation.flatten()]))[0, 1].item()) < 0.02


def test_both_depend_on_seed_and_position_alone() -> None:
    option = TrainingNoise(offset=0.1, perturbation=0.1)
    first, again = option([draws(0, 5)], SHAPE), option([draws(4, 4), draws(0, 5)], SHAPE)
    assert all(torch.equal(a[0], b[1]) for a, b in zip(first, again, strict=True))
    for other in (option([draws(0, 6)], SHAPE), option([draws(1, 5)], SHAPE)):
        assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])


@pytest.mark.parametrize("wrong", [{"offset": -0.1}, {"perturbation": -1.0}, {"offset": float("nan")}])
def test_negative_strength_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"noise\.{next(iter(wrong))}="):
        TrainingNoise(**wrong)
