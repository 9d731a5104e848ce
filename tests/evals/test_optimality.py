"""evals=optimality and mean_kept of models whose distance from the best one is known, the best one included."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nai_xl.data.cache import MemoryCache
from nai_xl.data.index import Index
from nai_xl.data.loader import Encoded, LatentRef
from nai_xl.data.rows import Item
from nai_xl.data.source.gaussian import MEANS, GaussianSource
from nai_xl.diffusion.ideal import Law
from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.sampling import Sampling
from nai_xl.diffusion.schedule import scaled_linear, shifted, ztsnr
from nai_xl.errors import UserError
from nai_xl.evals.mean_kept import MeanKept
from nai_xl.evals.optimality import LEVELS, Optimality, law_of
from nai_xl.evals.painter import Studio
from nai_xl.evals.val_loss import item_name
from nai_xl.interfaces import Bucket, NoiseLevel, Parameterization, Placement, Schedule
from nai_xl.record.items import read_items

CANVAS = Bucket(48, 32)
COLOURS = list(MEANS)
SHIFT, STD = torch.tensor([0.3, 0.0, -0.2, 0.0])[:, None, None], torch.tensor([1.0, 2.0, 0.5, 1.0])[:, None, None]


def fields(count: int) -> Encoded:
    """Held-out fields of one canvas, with an uneven normalisation."""
    items = GaussianSource(resolution=64, count=count, held_out=0).scan().items
    cache, pairs = MemoryCache(), []
    for item in items:
        assert item.drawn is not None
        cache.put(item.content, {"latents": item.drawn.latents(CANVAS)})
        pairs.append((item, LatentRef(item.content, Placement(CANVAS, CANVAS, (0, 0), False))))
    return Encoded(Index([]), [], None, cache, SHIFT, STD, torch.ones(0), pairs)


def told(text: str) -> tuple[Tensor, Tensor]:
    return torch.full((77, 1), float(COLOURS.index(text.split()[1]))), torch.zeros(1)


def model(studio: Studio, answer: Callable[[Law, Tensor, NoiseLevel], Tensor]) -> Any:
    """A network whose x0 is `answer(law, x_t, level)`, in the studio's parameterization."""
    laws = {item.caption.split()[1]: law_of(item, ref, studio.encoded) for item, ref in studio.encoded.held_out}

    def network(x: Tensor, t: Tensor, context: Tensor, **_: Any) -> tuple[Tensor]:
        schedule = studio.schedule.for_canvas(CANVAS.height, CANVAS.width)
        out = []
        for row in range(len(x)):
            level = schedule.at(t[row : row + 1])
            x0 = answer(laws[COLOURS[int(context[row, 0, 0])]], x[row : row + 1], level).double()
            implied = (x[row : row + 1] - level.alpha.double() * x0) / level.sigma.double()
            out.append(studio.parameterization.target(x0, implied, level))
        return (torch.cat(out),)

    return network


def best(law: Law, xt: Tensor, level: NoiseLevel) -> Tensor:
    return law.denoise(xt, level)


def only_the_mean(law: Law, xt: Tensor, level: NoiseLevel) -> Tensor:
    return law.mean.expand_as(xt)


@pytest.fixture
def scene(studio: Callable[..., Studio]) -> Callable[..., Studio]:
    def make(answer: Any, count: int = 8, **parts: Any) -> Studio:
        made = studio(encoded=fields(count), condition=told, **parts)
        object.__setattr__(made, "denoise", model(made, answer))
        return made

    return make


Make = Callable[..., Studio]


@pytest.mark.parametrize(
    ("schedule", "p"),
    [(ztsnr(scaled_linear()), V()), (ztsnr(scaled_linear()), Sample()), (scaled_linear(), Epsilon()),
     (shifted(ztsnr(scaled_linear()), resolution=40), V())],
)  # fmt: skip
def test_the_ideal_denoiser_has_no_excess(scene: Make, schedule: Schedule, p: Parameterization) -> None:
    values = Optimality(every=1).run(1, scene(best, schedule=schedule, parameterization=p))
    assert len(values) == 7 and max(values.values()) < 1e-8


def test_the_excess_is_the_loss_less_the_lowest_one(scene: Make, tmp_path: Path) -> None:
    """A model that says the mean alone has the data's variance for its loss, in units of the normalised latents."""
    values = Optimality(every=1, count=150).run(3, scene(only_the_mean, 150))
    item, ref = fields(1).held_out[0]
    law = law_of(item, ref, fields(1))

    def excess(log_snr: float) -> float:
        one = torch.tensor([log_snr], dtype=torch.float64)
        level = NoiseLevel(one, one.sigmoid().sqrt(), (-one).sigmoid().sqrt())
        return float(law.spectrum.mean() - law.optimum(level))

    expected = [excess(level) for level in LEVELS]
    assert values["optimality/excess_logsnr_-5_-2"] == pytest.approx(sum(expected[:3]) / 3, rel=0.1)
    assert values["optimality/excess_logsnr_4_7"] == pytest.approx(sum(expected[9:]) / 3, rel=0.1)
    assert values["optimality/excess"] == pytest.approx(sum(expected) / len(expected), rel=0.1)
    assert values["optimality/excess_terminal"] == pytest.approx(0, abs=1e-12)  # of pure noise nothing can be read
    assert len(read_items(tmp_path, "optimality/excess")[3]) == 150


def test_draws_depend_on_the_field_and_the_level_alone(scene: Make, tmp_path: Path) -> None:
    """So arms of two schedules are paired: with one x0 at equal levels they differ by roundings."""
    found = []
    for number, schedule in enumerate((scaled_linear(), ztsnr(scaled_linear()))):
        Optimality(every=1, batch=3 + number).run(number, scene(only_the_mean, schedule=schedule))
        found.append(read_items(tmp_path, "optimality/excess")[number])
    assert found[0] == pytest.approx(found[1], rel=2e-3)


def test_a_band_that_the_schedule_does_not_reach_is_left_out(scene: Make) -> None:
    values = Optimality(every=1).run(1, scene(best, schedule=shifted(scaled_linear(), resolution=400)))
    assert {"optimality/excess_logsnr_4_7", "optimality/excess_terminal"} <= values.keys()
    assert not {"optimality/excess_logsnr_-5_-2", "optimality/excess", "optimality/relative"} & values.keys()


@pytest.mark.parametrize("schedule", [scaled_linear(), ztsnr(scaled_linear())])
@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m"])
def test_the_ideal_denoiser_keeps_of_the_mean_what_theory_says(scene: Make, schedule: Schedule, method: Any) -> None:
    made = scene(best, 160, schedule=schedule, sampling=Sampling(method=method))
    values = MeanKept(every=1, count=160, steps=4).run(1, made)
    assert values["mean_kept/caption"] == pytest.approx(values["mean_kept/caption_ideal"], abs=0.04)
    assert values["mean_kept/variance"] == pytest.approx(values["mean_kept/variance_ideal"], rel=0.15)
    assert 0.2 < values["mean_kept/variance_ideal"] < 1.1


@pytest.mark.parametrize("evaluator", [Optimality(every=1), MeanKept(every=1)])
def test_other_data_are_refused(evaluator: Optimality | MeanKept) -> None:
    with pytest.raises(UserError, match="data=gaussian"):
        evaluator.held_out([Item(Path("a.png"), "", (8, 8), "0" * 64)])
    with pytest.raises(UserError, match=r"data\.held_out=0\.1"):
        evaluator.held_out([])


def test_each_field_counts_once(scene: Make) -> None:
    items = [item for item, _ in scene(best).encoded.held_out]
    assert Optimality(every=1, count=5).held_out([*items, *items]) == items[:5]
    assert len({item_name(item) for item in items}) == 8
