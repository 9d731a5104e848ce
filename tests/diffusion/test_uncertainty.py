"""Learned uncertainty: where it starts, where it settles, and what it belongs to."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nai_xl.diffusion import loss, timesteps
from nai_xl.diffusion.loss import LearnedWeighting, Uncertainty
from nai_xl.diffusion.objective import Misfit, Objective
from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.interfaces import Batch, NoiseLevel, Parameterization, Weighting
from nai_xl.optimizer.ema import StandardEma
from tests.conftest import SMALL
from tests.diffusion.test_objective import FakeUnet, batch
from tests.test_train import Compose, losses, run, same_weights

ROOT = Path(__file__).parents[2]
ZERO_TERMINAL = ztsnr(scaled_linear())
LEVEL = ZERO_TERMINAL.at(torch.arange(1000))


def launch(folder: Path, images: Path, processes: int, *overrides: str) -> Path:
    """The run that the command trains in `folder`, on so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, "-m", "nai_xl.train", *SMALL, f"data.dir={images}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    folder.mkdir(exist_ok=True)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next((folder / "outputs").iterdir())


def expected_error() -> Tensor:
    """[1000] a loss over the table as of v: high at the quiet end, a tenth in the middle, 1 at pure noise."""
    angle = torch.atan2(LEVEL.sigma, LEVEL.alpha).double()
    return 0.9 / (1 + (angle / 0.1) ** 1.2) + 0.05 + 0.9 * torch.sin(angle) ** 8


@pytest.mark.parametrize("base", [loss.uniform, loss.min_snr, loss.edm])
def test_starts_as_its_base_on_every_level(base: Weighting) -> None:
    learned = Uncertainty(base)
    for p in (V(), Sample()):
        assert torch.equal(learned(LEVEL, p), base(LEVEL, p))
    assert torch.equal(learned.log_variance(LEVEL), torch.zeros(1000))
    assert torch.equal(learned.penalty(LEVEL), torch.zeros(1000))


def test_first_loss_is_the_plain_loss_and_learning_u_moves_no_network_gradient_yet() -> None:
    data = batch([0.1, 0.5, 0.9999], weight=[1.0, 0.0, 2.0])
    plain, _ = Objective(ZERO_TERMINAL, V(), timesteps.uniform, loss.uniform)(FakeUnet(), data)
    learned, _ = Objective(ZERO_TERMINAL, V(), timesteps.uniform, Uncertainty())(FakeUnet(), data)
    assert torch.equal(learned, plain)


def test_loss_is_the_equation() -> None:
    weighting = Uncertainty(loss.min_snr, features=5)
    with torch.no_grad():
        weighting.coefficients.copy_(torch.tensor([0.3, -0.2, 0.5, 0.1, -0.4]))
    data = batch([0.05, 0.4, 0.9999], weight=[1.0, 0.5, 2.0])
    base, level = Objective(ZERO_TERMINAL, V(), timesteps.uniform, loss.min_snr)(FakeUnet(), data)
    found, _ = Objective(ZERO_TERMINAL, V(), timesteps.uniform, weighting)(FakeUnet(), data)
    angle = torch.atan2(level.sigma.double(), level.alpha.double())
    u = sum(c * torch.cos(2 * k * angle) for k, c in enumerate([0.3, -0.2, 0.5, 0.1, -0.4]))
    torch.testing.assert_close(found.double(), torch.exp(-u) * base.double() + u * data.weight, rtol=1e-5, atol=1e-6)


def test_gradient_vanishes_where_u_is_the_logarithm_of_the_expected_error() -> None:
    """u with two given coefficients is optimal for errors of expectation exp(u), noisy as they may be."""
    weighting = Uncertainty(features=8)
    with torch.no_grad():
        weighting.coefficients[:2] = torch.tensor([-0.7, 1.1])
    expected = weighting.log_variance(LEVEL).detach().exp()
    noise = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 2
    errors = torch.cat([expected * noise, expected * (2 - noise)])  # two draws of mean `expected`
    u = weighting.log_variance(LEVEL).repeat(2)
    (torch.exp(-u) * errors + u).mean().backward()
    assert weighting.coefficients.grad is not None
    assert weighting.coefficients.grad.abs().max() < 1e-6


def test_training_finds_the_logarithm_of_the_expected_error() -> None:
    weighting, expected = Uncertainty(), expected_error().float()
    optimizer = torch.optim.Adam([weighting.parameter_group()])
    assert optimizer.param_groups[0]["lr"] == 5e-3
    generator = torch.Generator().manual_seed(0)
    for step in range(600):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 600)
        t = torch.randint(1000, (64,), generator=generator)
        level = ZERO_TERMINAL.at(t)
        errors = expected[t] * (0.5 + torch.rand(64, generator=generator))
        (weighting(level, V()) * errors + weighting.log_variance(level)).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    wrong = (weighting.log_variance(LEVEL) - expected.log()).detach()
    assert wrong.square().mean().sqrt() < 0.04
    weighted = (weighting(LEVEL, V()) * expected).detach()  # every level now counts alike
    assert abs(weighted.mean() - 1) < 0.03


def test_is_the_objective_s_learned_part_and_no_other_weighting_is() -> None:
    weighting = Uncertainty(lr=0.02)
    learned = Objective(scaled_linear(), Epsilon(), timesteps.uniform, weighting)
    assert dict(learned.learned.state_dict()).keys() == {"weighting.coefficients"}
    assert learned.parameter_groups() == [{"params": [weighting.coefficients], "lr": 0.02, "weight_decay": 0.0}]
    plain = Objective(scaled_linear(), Epsilon(), timesteps.uniform, loss.uniform)
    assert not dict(plain.learned.state_dict()) and plain.parameter_groups() == []


def test_normalising_what_is_learned_is_refused() -> None:
    with pytest.raises(Misfit, match=r"^normalize_weights=true has no meaning for a weighting that learns"):
        Objective(ZERO_TERMINAL, V(), timesteps.uniform, Uncertainty(), normalize_weights=True)


class OneScale(nn.Module):
    """A learned weighting of somebody else's that derives from no class of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.logarithm = nn.Parameter(torch.tensor(0.5))

    def forward(self, level: NoiseLevel, p: Parameterization) -> Tensor:
        return (-self.logarithm).exp().expand(len(level.t))

    def penalty(self, level: NoiseLevel) -> Tensor:
        return self.logarithm.expand(len(level.t))

    def parameter_group(self) -> dict[str, Any]:
        return {"params": [self.logarithm], "lr": 0.3}


class WithoutPenalty(LearnedWeighting):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, level: NoiseLevel, p: Parameterization) -> Tensor:
        return self.scale.expand(len(level.t))


def test_any_module_with_the_members_of_a_learned_weighting_is_one() -> None:
    weighting = OneScale()
    data = batch([0.1, 0.5], weight=[1.0, 3.0])
    learned = Objective(ZERO_TERMINAL, V(), timesteps.uniform, weighting)
    plain, _ = Objective(ZERO_TERMINAL, V(), timesteps.uniform, loss.uniform)(FakeUnet(), data)
    found, _ = learned(FakeUnet(), data)
    torch.testing.assert_close(found, plain * torch.tensor(-0.5).exp() + 0.5 * data.weight)
    assert learned.parameter_groups() == [{"params": [weighting.logarithm], "lr": 0.3}]
    found.mean().backward()
    assert weighting.logarithm.grad is not None and weighting.logarithm.grad != 0


def test_a_learned_weighting_adds_no_penalty_unless_it_says_so() -> None:
    weighting, data = WithoutPenalty(), batch([0.1, 0.5])
    learned = Objective(ZERO_TERMINAL, V(), timesteps.uniform, weighting)
    plain, _ = Objective(ZERO_TERMINAL, V(), timesteps.uniform, loss.uniform)(FakeUnet(), data)
    assert torch.equal(learned(FakeUnet(), data)[0], 2 * plain)
    assert learned.parameter_groups() == [{"params": [weighting.scale]}]
    assert dict(learned.learned.state_dict()).keys() == {"weighting.scale"}


# --- in a run ---------------------------------------------------------------------------------------------------------


def newest(folder: Path, part: str) -> dict[str, Tensor]:
    return load_file(sorted((folder / "checkpoints").iterdir())[-1] / f"{part}.safetensors")


def coefficients(folder: Path) -> Tensor:
    return newest(folder, "objective")["objective/weighting.coefficients"]


def test_a_run_trains_it_saves_it_and_resumes_exactly(small: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["loss=uncertainty", "run.max_images=16", "run.checkpoint_every=3"]
    whole = run(small(*overrides, "name=whole"))
    original = StandardEma.update

    def failing(self: StandardEma, step: int) -> None:
        if step == 5:
            raise RuntimeError("power cut")
        original(self, step)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(StandardEma, "update", failing)
        run(small(*overrides, "name=cut"))
    half = coefficients(next(Path("outputs").glob("cut-*")))
    cut = run(small(*overrides, "name=cut"))
    assert losses(cut) == losses(whole) and same_weights(cut, whole)
    assert torch.equal(coefficients(cut), coefficients(whole))
    assert half.abs().max() > 0 and not torch.equal(half, coefficients(cut))
    assert not any("coefficients" in name for name in newest(cut, "ema"))
    exported = load_file(cut / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert not any("coefficients" in name for name in exported)


def test_two_processes_average_its_gradients(images: Path, tmp_path: Path, forks: None) -> None:
    common = ["loss=uncertainty", "loss.lr=0.05", "run.chunk=4", "run.max_images=20"]
    one = launch(tmp_path / "one", images, 1, *common, "run.batch_size=4")
    two = launch(tmp_path / "two", images, 2, *common, "run.batch_size=2", "distributed=ddp")
    assert coefficients(one).abs().max() > 0.05
    torch.testing.assert_close(coefficients(two), coefficients(one), rtol=1e-3, atol=1e-4)
    assert list(losses(two).values()) == pytest.approx(list(losses(one).values()), rel=1e-3)


def test_first_step_is_the_uniform_weight_s_and_later_ones_differ(small: Compose) -> None:
    plain = losses(run(small("loss=uniform", "run.max_images=6")))
    learned = losses(run(small("loss=uncertainty", "loss.lr=0.1", "run.max_images=6")))
    assert learned[1] == plain[1] and learned[3] != plain[3]


def test_every_option_trains_in_a_run(small: Compose) -> None:
    combined = ["loss=debiased", "error=scheduled_huber", "objective.normalize_weights=true", "noise.offset=0.1",
                "noise.perturbation=0.1"]  # fmt: skip
    folder = run(small(*combined, "run.max_images=4", "run.workers=1"))
    assert all(value > 0 for value in losses(folder).values())


def test_noise_options_leave_the_other_random_numbers_of_a_run_alone(
    small: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}
    original = Objective.__call__

    def spy(self: Objective, unet: Any, data: Batch) -> Any:
        seen.setdefault(arm, []).append(data)
        return original(self, unet, data)

    monkeypatch.setattr(Objective, "__call__", spy)
    for arm, override in (("plain", "noise.offset=0"), ("offset", "noise.offset=0.1"), ("p", "noise.perturbation=0.1")):
        run(small(override, "run.max_images=4", f"name={arm}"))
    for plain, offset, perturbed in zip(*seen.values(), strict=True):
        for name in ("u", "item", "latents", "context"):
            assert torch.equal(getattr(plain, name), getattr(offset, name))
        assert torch.equal(plain.noise, perturbed.noise) and perturbed.perturbation.shape == plain.noise.shape
        shift = offset.noise - plain.noise
        torch.testing.assert_close(shift, shift.mean(dim=(2, 3), keepdim=True).expand_as(shift), rtol=0, atol=1e-5)
        assert not torch.equal(shift[0], shift[1])
