"""evals=val_loss against a plain loop in float64; its noise, which no run can change; its images, never trained on."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.schedule import cosine, scaled_linear, shifted, ztsnr
from nai_xl.errors import UserError
from nai_xl.evals.painter import Studio
from nai_xl.evals.val_loss import LOG_SNR, ValLoss, item_name, timestep_at
from nai_xl.interfaces import Parameterization, Schedule
from nai_xl.record.items import read_items
from nai_xl.train import train

Make = Callable[..., Studio]


def brute_force(studio: Studio, evaluator: ValLoss, prediction: str) -> dict[str, dict[str, float]]:
    """val/loss, val/x0_loss, the bands and the terminal step, image by image, in float64 throughout."""
    steps = [round(1000 - 1000 * k / evaluator.timesteps) - 1 for k in range(evaluator.timesteps)]
    found: dict[str, dict[str, list[float]]] = {}
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    if studio.schedule.zero_terminal:
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    for item, ref in studio.encoded.held_out:
        raw = studio.encoded.cache.get(ref.key)["latents"].double()  # type: ignore[index]
        x0 = (raw - studio.encoded.mean.double()) / studio.encoded.std.double()
        text = {k: v.double()[None] for k, v in studio.encoded.cache.get(studio.encoded.texts(item.caption)).items()}  # type: ignore[union-attr]
        ids = [40, 60, 1, 2, ref.placement.bucket.height, ref.placement.bucket.width]
        for k, t in enumerate(steps):
            noise = evaluator.noise(item_name(item), k, x0.shape).double()
            alpha, sigma = root[t], np.sqrt(1 - root[t] ** 2)
            xt = alpha * x0 + sigma * noise
            added = {"text_embeds": text["pooled"], "time_ids": torch.tensor([ids]).double()}
            given = xt[None], torch.tensor([t]).double(), text["context"]
            out = studio.denoise(*given, added_cond_kwargs=added, return_dict=False)[0][0]
            target = {"v": alpha * noise - sigma * x0, "epsilon": noise, "sample": x0}[prediction]
            # x0 that follows from each prediction, by solving its definition for x0
            clean = {"v": alpha * xt - sigma * out, "epsilon": (xt - sigma * out) / max(alpha, 1e-30), "sample": out}
            error, x0_error = ((a - b).square().mean().item() for a, b in ((out, target), (clean[prediction], x0)))
            unscaled = clean[prediction] * studio.encoded.std + studio.encoded.mean
            band = t * 4 // 1000
            for metric, value in {
                "val/loss": error,
                "val/x0_loss": x0_error,
                f"val/loss_band_{250 * band}_{250 * band + 250}": error,
                **({"val/x0_loss_terminal": x0_error} if t == 999 else {}),
                **({"val/x0_loss_terminal_raw": (unscaled - raw).square().mean().item()} if t == 999 else {}),
            }.items():
                found.setdefault(metric, {}).setdefault(item_name(item), []).append(value)
    return {m: {i: float(np.mean(values)) for i, values in items.items()} for m, items in found.items()}


@pytest.mark.parametrize(
    ("prediction", "parameterization", "schedule"),
    [("v", V(), ztsnr(scaled_linear())), ("sample", Sample(), ztsnr(scaled_linear())), ("v", V(), scaled_linear()),
     ("epsilon", Epsilon(), scaled_linear())],
)  # fmt: skip
def test_it_is_the_plain_loop(
    studio: Make, tmp_path: Path, prediction: str, parameterization: Parameterization, schedule: Schedule
) -> None:
    scene = studio(parameterization=parameterization, schedule=schedule)
    evaluator = ValLoss(every=1, count=7, timesteps=5, batch=2)
    values = evaluator.run(3, scene)
    expected = brute_force(scene, evaluator, prediction)
    assert set(expected) <= set(values) and len(expected) == 8
    for metric, items in expected.items():
        assert read_items(tmp_path, metric)[3] == pytest.approx(items, rel=2e-4)
        assert values[metric] == pytest.approx(np.mean(list(items.values())), rel=2e-4)


def test_at_zero_snr_the_x0_error_is_that_of_the_prediction(studio: Make) -> None:
    """v = -x0 there, so a network that says 0 has the error of the data themselves."""
    silent = studio(denoise=lambda xt, *_, **__: (torch.zeros_like(xt),))
    values = ValLoss(every=1, timesteps=1).run(1, silent)
    power = np.mean([silent.encoded.latents_of(ref).square().mean().item() for _, ref in silent.encoded.held_out])
    assert values["val/x0_loss_terminal"] == values["val/x0_loss"] == pytest.approx(power)
    assert values["val/loss"] == pytest.approx(power)


def test_a_perfect_network_has_no_error_at_any_level(studio: Make) -> None:
    """One that knows x0 predicts v = (alpha x_t - x0) / sigma, at entries of the table and between them."""
    scene = studio()
    one = scene.encoded.held_out[:1]
    x0 = scene.encoded.latents_of(one[0][1])

    def oracle(xt: torch.Tensor, t: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor]:
        level = scene.schedule.at(t)
        return ((level.alpha[:, None, None, None] * xt - x0) / level.sigma[:, None, None, None],)

    knows = studio(denoise=oracle, encoded=scene.encoded)
    object.__setattr__(knows.encoded, "held_out", one)
    values = ValLoss(every=1).run(1, knows)
    assert len(values) == 4 + 4 + len(LOG_SNR)
    assert max(values.values()) < 1e-6


@pytest.mark.parametrize("schedule", [scaled_linear(), ztsnr(scaled_linear()), cosine()], ids=["linear", "zt", "cos"])
def test_levels_of_equal_log_snr_are_equal_in_every_schedule(schedule: Schedule) -> None:
    for wanted in LOG_SNR:
        t = timestep_at(schedule, wanted)
        assert t is not None
        assert schedule.at(torch.tensor([t])).snr.log().item() == pytest.approx(wanted, abs=2e-3)
    assert timestep_at(scaled_linear(), -6) is None and timestep_at(scaled_linear(), 8) is None
    assert timestep_at(ztsnr(scaled_linear()), -6) is not None


def noises(studio: Studio, evaluator: ValLoss) -> list[tuple[str, str]]:
    """(image, noise) as they enter x_t = alpha x0 + sigma n, in the order of the levels."""
    seen = []
    original = type(studio.schedule).add_noise

    def spy(self: Any, x0: torch.Tensor, noise: torch.Tensor, level: Any) -> torch.Tensor:
        for clean, n in zip(x0, noise, strict=True):
            seen.append(tuple(hashlib.sha256(x.numpy().tobytes()).hexdigest() for x in (clean, n)))
        return original(self, x0, noise, level)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(studio.schedule), "add_noise", spy)
        evaluator.run(1, studio)
    return seen  # type: ignore[return-value]


def test_noise_depends_on_image_and_level_alone(studio: Make) -> None:
    """Whatever the schedule, the parameterization, or how many are measured together."""
    arms = [
        noises(studio(**parts), ValLoss(every=1, batch=batch))
        for parts, batch in (
            ({}, 16),
            ({"parameterization": Epsilon(), "schedule": scaled_linear()}, 16),
            ({"schedule": shifted(ztsnr(scaled_linear()), resolution=16)}, 1),
        )
    ]
    assert len(arms[0]) == 7 * (8 + len(LOG_SNR)) == len(set(arms[0]))
    assert len({noise for _, noise in arms[0]}) == len(arms[0])  # independent between images and levels
    assert set(arms[0]) == set(arms[1])
    missing = set(arms[0]) - set(arms[2])
    assert len(missing) <= 7  # on larger canvases the shifted schedule begins below log-SNR 6
    assert set(noises(studio(), ValLoss(every=1, seed=1))).isdisjoint(arms[0])


def test_no_image_counts_twice(studio: Make) -> None:
    items = [item for item, _ in studio().encoded.held_out]
    evaluator = ValLoss(every=1, count=5)
    assert evaluator.held_out([*items, *items]) == items[:5]
    assert evaluator.held_out(items[:2] * 3) == items[:2]


def test_nothing_held_out_is_refused_before_the_model_is_built(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*, seed: int) -> None:
        raise AssertionError("the model is built")

    monkeypatch.setattr("nai_xl.model.tiny.tiny_sdxl", built)
    with pytest.raises(UserError, match=r"data\.held_out=0\.1"):
        train(small("evals=[sample_grid,val_loss]"), {})


def test_held_out_images_are_never_trained_on_and_arms_are_paired(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: set[bytes] = set()
    looked_at: set[bytes] = set()
    whole = Objective.__call__
    measure = ValLoss.run

    def spy(self: Objective, unet: Any, batch: Any) -> Any:
        trained.update(x.numpy().tobytes() for x in batch.latents)
        return whole(self, unet, batch)

    def look(self: ValLoss, step: int, scene: Studio) -> dict[str, float]:
        looked_at.update(scene.encoded.latents_of(ref).numpy().tobytes() for _, ref in scene.encoded.held_out)
        return measure(self, step, scene)

    monkeypatch.setattr(Objective, "__call__", spy)
    monkeypatch.setattr(ValLoss, "run", look)
    arms = []
    for arm in ("schedule=ztsnr loss=minsnr run.seed=0", "schedule=scaled_linear loss=uniform run.seed=1"):
        home = train(
            small(*arm.split(), "evals=[sample_grid,val_loss]", "data.held_out=0.4", "run.max_images=16",
                  "evals.val_loss.every=4", "evals.val_loss.timesteps=4"),
            {},
        )  # fmt: skip
        arms.append(read_items(home, "val/loss"))
    assert len(trained) + len(looked_at) == 12 and trained.isdisjoint(looked_at)
    assert [list(arm) for arm in arms] == [[4, 8], [4, 8]]
    assert len(arms[0][4]) == len(looked_at)
    assert arms[0][4].keys() == arms[1][4].keys()
    assert arms[0] != arms[1]


def test_a_run_continued_has_each_evaluation_once(small: Callable[..., DictConfig]) -> None:
    chosen = [
        "evals=[sample_grid,val_loss]",
        "data.held_out=0.4",
        "evals.val_loss.every=2",
        "evals.val_loss.timesteps=2",
    ]
    for images in (6, 12):
        home = train(small(*chosen, f"run.max_images={images}"), {})
    # 3 was the last step at first, where a run is always looked at
    assert list(read_items(home, "val/loss")) == [2, 3, 4, 6]
