"""What a combination does, told before it is trained: numbers against a float64 computation of their own."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.diffusion import loss, timesteps
from nai_xl.diffusion.diagnosis import PURE_NOISE, diagnose, sentences
from nai_xl.diffusion.loss import LearnedWeighting
from nai_xl.diffusion.objective import Objective
from nai_xl.diffusion.parameterization import Epsilon, Sample, V
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.inspect.__main__ import main
from nai_xl.inspect.combinations import build_objective, inspect
from nai_xl.inspect.remarks import described
from nai_xl.inspect.table import numbers
from nai_xl.interfaces import NoiseLevel, Parameterization, Schedule, TimestepSampler, Weighting
from nai_xl.train import train

Array = NDArray[np.float64]


def objective(
    schedule: Schedule,
    weighting: Weighting = loss.min_snr,
    p: Parameterization | None = None,
    sampler: TimestepSampler = timesteps.uniform,
) -> Objective:
    return Objective(schedule, p or V(), sampler, weighting)


def snr(name: str) -> Array:
    """[1000] float64, from the papers' formulas."""
    root = np.sqrt(np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2))
    if name == "ztsnr":
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root**2 / (1 - root**2)


WEIGHTS: dict[str, Callable[[Array], Array]] = {
    "uniform": lambda s: np.ones_like(s),
    "minsnr": lambda s: np.minimum(s, 5) / (s + 1),
    "minsnr_plus_one": lambda s: np.minimum(s + 1, 5) / (s + 1),
}


@pytest.mark.parametrize("schedule", ["scaled_linear", "ztsnr"])
@pytest.mark.parametrize("weighting", WEIGHTS)
def test_the_numbers_are_those_of_the_formulas(schedule: str, weighting: str) -> None:
    (row,) = inspect([f"schedule={schedule}", f"loss={weighting}"])
    s = snr(schedule)
    weight = WEIGHTS[weighting](s)
    with np.errstate(divide="ignore"):
        noise, log_snr = 1 / np.sqrt(s), np.log(s)
    d = row.diagnosis
    assert d is not None
    assert d.noise.numpy() == pytest.approx(noise, rel=1e-5)
    assert d.log_snr.numpy() == pytest.approx(log_snr, rel=1e-5, abs=1e-5)
    assert d.weight.numpy() == pytest.approx(weight, rel=1e-5, abs=1e-12)
    assert d.deciles.numpy() == pytest.approx(weight.reshape(10, 100).sum(1) / weight.sum(), rel=1e-5)
    assert d.mean_weight == pytest.approx(weight.mean(), rel=1e-5)
    cells = list(numbers(d))
    assert cells[0] == ("inf" if schedule == "ztsnr" else "14.6")
    assert float(cells[-2]) == pytest.approx(weight[-1], rel=5e-3) and float(cells[-1]) == pytest.approx(
        weight.mean(), rel=5e-3
    )


def test_the_density_is_the_samplers() -> None:
    def towards_noise(u: Tensor, schedule: Schedule) -> Tensor:
        return u.sqrt() * len(schedule) - 0.5  # float, between table entries

    found = diagnose(objective(scaled_linear(), loss.uniform, sampler=towards_noise))
    k = np.arange(1000)
    assert found.density.numpy() == pytest.approx(((k + 1) ** 2 - k**2) / 1e6, abs=1.1 / 200_000)
    assert found.deciles.numpy() == pytest.approx((2 * np.arange(10) + 1) / 100, abs=1e-4)


def test_deciles_of_a_schedule_that_ten_does_not_divide() -> None:
    found = diagnose(objective(scaled_linear(timesteps=37), loss.uniform))
    assert found.deciles.numpy() * 37 == pytest.approx(np.bincount(np.arange(37) * 10 // 37))


# --- sentences --------------------------------------------------------------------------------------------------------

DRIFT, TERMINAL, NEGLECTED = "medium brightness", "terminal step has weight 0", "t >= 800 holds"


@pytest.mark.parametrize(
    ("schedule", "weighting", "p", "said"),
    [
        (scaled_linear(), loss.uniform, V(), {DRIFT}),
        (scaled_linear(), loss.min_snr, V(), {DRIFT, NEGLECTED}),
        (scaled_linear(), loss.min_snr, Epsilon(), {DRIFT}),
        (scaled_linear(), loss.min_snr_plus_one, V(), {DRIFT}),
        (ztsnr(scaled_linear()), loss.uniform, V(), set()),
        (ztsnr(scaled_linear()), loss.min_snr, V(), {TERMINAL, NEGLECTED}),
        (ztsnr(scaled_linear()), loss.min_snr, Sample(), {TERMINAL, NEGLECTED}),
        (ztsnr(scaled_linear()), loss.min_snr_plus_one, V(), set()),
    ],
)
def test_a_sentence_is_said_exactly_when_it_is_true(
    schedule: Schedule, weighting: Weighting, p: Parameterization, said: set[str]
) -> None:
    lines = sentences(objective(schedule, weighting, p))
    assert len(lines) == len(said) and all(any(part in line for line in lines) for part in said), lines


def test_the_sentences_quote_their_numbers() -> None:
    told = sentences(objective(ztsnr(scaled_linear())))
    s = snr("ztsnr")
    weight = np.minimum(s, 5) / (s + 1)
    assert f"t >= 800 holds {100 * weight[800:].sum() / weight.sum():.2g} % of the loss weight" in told[1]
    assert "holds 0.36 %" in told[1] and "loss=minsnr_plus_one gives it 1" in told[0]
    assert "sigma/alpha = 14.6" in sentences(objective(scaled_linear()))[0]


@settings(max_examples=30, deadline=None)
@given(st.floats(0.001, 0.1))
def test_the_end_of_the_noise_is_told_of_every_schedule_that_leaves_the_brightness(beta_end: float) -> None:
    last = np.cumprod(1 - np.linspace(0.00085**0.5, beta_end**0.5, 1000) ** 2)[-1]
    told = any(DRIFT in line for line in sentences(objective(scaled_linear(beta_end=beta_end), loss.uniform)))
    noise = np.sqrt((1 - last) / last)
    assert told == (noise < PURE_NOISE) or noise == pytest.approx(PURE_NOISE, rel=1e-4)


@pytest.mark.parametrize(("edge", "drifts"), [(64, False), (128, True), (1024, True)])
def test_whether_the_brightness_is_left_depends_on_the_canvas(edge: int, drifts: bool) -> None:
    """The mean of n latent values has 1 / sqrt(n) of their noise: 64 x 64 pixels lose it at SDXL's 14.6."""
    (row,) = inspect(["schedule=scaled_linear", "loss=uniform", f"native.resolution={edge}"])
    assert any(DRIFT in line for line in row.sentences) == drifts
    assert not drifts or f"mean of {edge} x {edge} pixels readable" in row.sentences[0]
    (below,) = inspect(["schedule=shifted", "schedule.resolution=512", "loss=uniform", "native.resolution=64"])
    assert "sigma/alpha = 1.83" in below.sentences[0]


def test_a_terminal_step_that_is_never_drawn_is_told() -> None:
    def all_but_the_last(u: Tensor, schedule: Schedule) -> Tensor:
        return (u * (len(schedule) - 1)).long()

    (line,) = sentences(objective(ztsnr(scaled_linear()), loss.uniform, sampler=all_but_the_last))
    assert "practically never drawn" in line


def test_a_weighting_that_learns_is_shown_as_it_begins() -> None:
    class Learned(LearnedWeighting):
        def __init__(self) -> None:
            super().__init__()
            self.log_variance = nn.Parameter(torch.zeros(()))

        def forward(self, level: NoiseLevel, p: Parameterization) -> Tensor:
            return (-self.log_variance).exp().expand(len(level.t))

    found = diagnose(objective(ztsnr(scaled_linear()), Learned()))
    assert not found.weight.requires_grad and found.mean_weight == pytest.approx(1)


def test_a_weighting_that_learns_is_asked_where_it_lies() -> None:
    """Training moves it to its device first; no operator takes the two apart."""

    class Learned(LearnedWeighting):
        def __init__(self) -> None:
            super().__init__()
            self.log_variance = nn.Parameter(torch.zeros((), device="meta"))

        def forward(self, level: NoiseLevel, p: Parameterization) -> Tensor:
            assert {part.device.type for part in (level.t, level.alpha, level.sigma)} == {"meta"}
            return torch.ones(len(level.t))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "_refuse_senseless_loss", lambda self: None)
        made = objective(ztsnr(scaled_linear()), Learned())
    assert diagnose(made).mean_weight == pytest.approx(1)


# --- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., str]) -> Callable[..., str]:
    """Runs the command in a directory of its own; what it printed."""
    monkeypatch.chdir(tmp_path)
    return partial(typed, main)


def test_normalized_weights_are_shown_as_they_are_trained(told: Callable[..., str]) -> None:
    plain, normalized = inspect(["objective.normalize_weights=false,true", "loss=minsnr"])
    assert plain.diagnosis and normalized.diagnosis
    assert plain.diagnosis.mean_weight < 0.9 and normalized.diagnosis.mean_weight == pytest.approx(1)
    made = build_objective(config.compose(["loss=minsnr"]))
    trained = plain.diagnosis.weight / made.expected_weight(64, 64)
    assert normalized.diagnosis.weight.numpy() == pytest.approx(trained.numpy(), rel=1e-6)
    err = told("loss=uncertainty", "objective.normalize_weights=true", status=1)
    assert "objective.normalize_weights=true has no meaning for a weighting that learns" in err


def test_refused_pairs_stand_in_the_table_with_their_reason(told: Callable[..., str]) -> None:
    out = told("schedule=scaled_linear,ztsnr", "parameterization=v,epsilon", "loss=uniform")
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["scaled_linear"], ["ztsnr"])]
    assert [row[:3] for row in rows if "refused" in row] == [["ztsnr", "epsilon", "refused"]] and len(rows) == 4
    assert "schedule=ztsnr parameterization=epsilon: refused: parameterization=epsilon is undefined" in out
    assert "- schedule=scaled_linear: the noise ends at" in out


def test_nothing_but_refusals_is_a_mistake(told: Callable[..., str], tmp_path: Path) -> None:
    err = told("parameterization=epsilon", status=1)
    assert err.startswith("error: refused: parameterization=epsilon is undefined") and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("loss=minsnr,minsrn", "loss=minsrn: no such option; did you mean 'minsnr'?"),
        ("loss.gama=3", "no parameter 'gama' in min_snr; did you mean 'gamma'?"),
        ("+loss.gama=3", "no parameter 'gama' in min_snr; did you mean 'gamma'?"),
        ("loss.gamma=interval(1,5)", "list some: loss.gamma=a,b"),
        ("native.resolution=abc schedule=shifted", "native.resolution=abc: input should be a valid integer"),
        ("loss.gamma=0", "refused: loss.gamma=0.0: must be positive and finite"),
        ("loss=uncertainty loss.features=0", "refused: loss.features=0: must be at least 1"),
        ("error=huber error.delta=-1", "refused: error.delta=-1.0: must be positive and finite"),
        ("timesteps=logit_normal timesteps.std=0", "refused: timesteps.std=0.0: must be above 0"),
        ("timesteps=inference_grid timesteps.steps=1001", "refused: timesteps.steps=1001: the schedule has only 1000"),
        ("schedule.base.beta_start=0.5", "refused: schedule.base.beta_start=0.5 and beta_end=0.012: needs 0 <"),
        ("schedule=high_sigma schedule@schedule.base=ztsnr", "refused: schedule.sigma_max=29.0: must be finite"),
        ("--figure /proc/none.png", "give another place"),
        ("--figure none.xyz", "give another place"),
    ],
)
def test_mistakes_are_told(told: Callable[..., str], arguments: str, message: str) -> None:
    assert message in told(*arguments.split(), status=1)


def test_lists_are_one_value_and_what_training_needs_is_not_asked_for(told: Callable[..., str]) -> None:
    out = told("model=sdxl", "data=folder", "memory=[sdpa,channels_last]", "loss.gamma=1,5")
    assert len([line for line in out.splitlines() if line.split()[:1] in (["1"], ["5"])]) == 2


def test_a_list_that_is_swept_is_told_as_it_was_given(told: Callable[..., str]) -> None:
    out = told("memory=[sdpa],[sdpa,channels_last]")
    assert "[sdpa] " in out and "[sdpa,channels_last]" in out


def test_noise_that_depends_on_the_canvas_is_told_of_the_native_one() -> None:
    shifted = ["schedule=shifted", "schedule.resolution=512"]
    small, equal, large = (inspect([*shifted, f"native.resolution={edge}"])[0] for edge in (128, 512, 1024))
    ends = [one.diagnosis.noise[-1] for one in (small, equal, large) if one.diagnosis]
    assert ends == pytest.approx([14.6146 / 4, 14.6146, 14.6146 * 2], rel=1e-4)
    assert "sigma/alpha = 3.65" in small.sentences[0]


def test_an_experiment_brings_its_own_sweep() -> None:
    losses = [row.swept["loss"] for row in inspect(["experiment=terminal_step"])]
    assert losses == ["uniform", "minsnr", "minsnr_plus_one"]
    assert [row.swept for row in inspect(["experiment=terminal_step", "loss=minsnr"])] == [{}]


def test_an_experiment_whose_arms_are_listed_has_a_row_for_each_whatever_the_seeds(told: Callable[..., str]) -> None:
    rows = [row.swept for row in inspect(["experiment=minsnr"])]
    assert rows[:2] == [{"loss": "uniform", "loss.gamma": ""}, {"loss": "minsnr", "loss.gamma": "1"}]
    assert [row["loss"] for row in rows[2:]] == ["minsnr", "minsnr", "minsnr_plus_one", "soft_minsnr"]
    assert [row.swept["loss.gamma"] for row in inspect(["experiment=minsnr", "loss.gamma=5,20"])] == ["5", "20"]
    assert "- loss=minsnr,soft_minsnr: the terminal step has weight 0" in told("experiment=minsnr")
    assert not any(row.refusal for row in inspect(["experiment=ztsnr"]))


def test_sixteen_combinations_with_options_from_outside(told: Callable[..., str], tmp_path: Path) -> None:
    for group, option, text in (
        ("schedule", "steep", "{_target_: nai_xl.diffusion.schedule.scaled_linear, beta_end: 0.03}"),
        ("schedule", "flat", "{_target_: nai_xl.diffusion.schedule.scaled_linear, beta_end: 0.006}"),
        ("loss", "minsnr_1", "{_target_: nai_xl.diffusion.loss.min_snr, _partial_: true, gamma: 1.0}"),
    ):
        (tmp_path / "mine" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / group / f"{option}.yaml").write_text(text)
    out = told(
        "schedule=scaled_linear,ztsnr,steep,flat", "loss=uniform,minsnr,minsnr_plus_one,minsnr_1",
        "--config-dir", "mine", "--figure", "grid.png",
    )  # fmt: skip
    rows = [line.split() for line in out.splitlines() if line.startswith((" scaled", " zt", " st", " fl"))]
    assert [len(row) for row in rows] == [17] * 16
    picture = Image.open(tmp_path / "grid.png")
    picture.load()
    assert 1000 < picture.width < 2500 and 600 < picture.height < 1500
    assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 100


def test_a_mistake_beside_an_option_from_outside_is_told(told: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("{_target_: nai_xl.diffusion.loss.min_snr, _partial_: true}")
    assert "no parameter 'gama'" in told("--config-dir", str(tmp_path), "loss=mine", "loss.gama=3", status=1)


def test_neither_model_nor_tracker_libraries_are_imported(tmp_path: Path) -> None:
    script = (
        "import sys; from nai_xl.inspect.__main__ import main; main(); "
        "print(sorted({'diffusers', 'transformers', 'accelerate', 'mlflow'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, "schedule=scaled_linear,ztsnr", "model=sdxl"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
    assert Image.open(tmp_path / "inspect.png").format == "PNG"


GRID = [{"a": a, "b": b} for a in "12" for b in "xyz"]


@pytest.mark.parametrize(
    ("meant", "words"),
    [
        (GRID, ""),
        (GRID[:3], "a=1"),
        ([GRID[0], GRID[3]], "b=x"),
        ([GRID[0], GRID[1]], "a=1 b=x,y"),
        ([GRID[0], GRID[4]], "a=1 b=x; a=2 b=y"),
    ],
)
def test_points_of_a_grid_are_named_by_the_overrides_that_select_them(meant: list[dict[str, str]], words: str) -> None:
    assert described(meant, GRID) == words


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_a_run_says_the_sentences_and_keeps_the_figure(
    small: Callable[..., DictConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    cfg = small("run.max_images=2", "evals.sample_grid.every=100")
    home = train(cfg, {"schedule": "ztsnr", "loss": "minsnr"})
    out = " ".join(capsys.readouterr().out.split())
    assert all(line in out for line in Spec.of(cfg).task.remarks()) and "t >= 800 holds 0.36 %" in out
    assert Image.open(home / "method" / "step_00000000.png").width > 1000
