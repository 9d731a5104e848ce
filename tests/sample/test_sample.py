"""python -m nai_xl.sample: pictures of a finished run, the same that the run itself would paint."""

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor

from nai_xl.diffusion.parameterization import V
from nai_xl.diffusion.sampling import Sampling
from nai_xl.diffusion.schedule import scaled_linear, ztsnr
from nai_xl.evals.contact_sheet import Prompt
from nai_xl.evals.painter import Painter, Studio
from nai_xl.evals.sample_grid import SampleGrid
from nai_xl.interfaces import Bucket, Schedule
from nai_xl.sample.__main__ import main
from nai_xl.train import train as trained

Compose = Callable[..., DictConfig]
TEXT = "picture number 3"


def train(cfg: DictConfig) -> Path:
    return trained(cfg, {})


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., list[Path]]:
    """The pictures that a command line names on its standard output."""

    def run(*arguments: Any) -> list[Path]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments)])
        main()
        return [Path(line) for line in capsys.readouterr().out.splitlines()]

    return run


@pytest.fixture
def mistake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a command line that is refused says; sys.exit with a text prints it and leaves with status 1."""

    def run(*arguments: Any) -> str:
        monkeypatch.setattr(sys, "argv", ["sample", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        told = stopped.value.code
        assert isinstance(told, str) and told.startswith("error: ") and len(told.splitlines()) == 1
        return told

    return run


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype=int)


@pytest.mark.parametrize(
    "overrides",
    [
        "sampling.method=dpmpp_2m sampling.steps=3",
        "schedule=scaled_linear parameterization=epsilon text.chunks=2 precision=bf16 latents.factor=0.5",
    ],
)
def test_a_sample_is_what_the_run_itself_paints(
    small: Compose, monkeypatch: pytest.MonkeyPatch, sample: Callable[..., list[Path]], overrides: str
) -> None:
    own: list[Image.Image] = []

    def look(self: SampleGrid, step: int, studio: Studio) -> dict[str, float]:
        with studio.ema.swapped_in():
            own.extend(studio.paint([Prompt(TEXT, Bucket(160, 96))], 7))
        return {}

    monkeypatch.setattr(SampleGrid, "run", look)
    run = train(small("run.max_images=2", *overrides.split()))
    stored = OmegaConf.load(run / "config.yaml")
    if stored.precision.autocast == "no":  # the option's default need not be written down
        del stored.precision["autocast"]
        OmegaConf.save(stored, run / "config.yaml")
    [path] = sample(run, TEXT, "--size", "160x96", "--seed", 7)
    assert Image.open(path).size == (160, 96)
    # the exported autoencoder's factor is the reciprocal of the run's, to the last bit but one
    assert np.abs(pixels(path) - np.asarray(own[-1], dtype=int)).max() <= 1


def test_pictures_say_how_to_paint_them_again(
    small: Compose, tmp_path: Path, sample: Callable[..., list[Path]], mistake: Callable[..., str]
) -> None:
    run = train(small("run.max_images=2"))
    paths = sample(run, TEXT, "an élan", "--seed", 3, "--count", 2, "--steps", 4, "--guidance", 3, "--negative", "fog")
    assert len(set(paths)) == 4 and all(path.parent == run / "painted" for path in paths)
    assert Image.open(paths[0]).size == (128, 128)
    said = Image.open(paths[3]).text
    assert said == {
        "prompt": "an élan",
        "negative": "fog",
        "seed": "4",
        "size": "128x128",
        "steps": "4",
        "guidance": "3.0",
        "rescale": "0.7",
        "method": "ddim",
        "run": run.name,
    }
    options = [part for key in ("seed", "size", "steps", "guidance", "negative") for part in (f"--{key}", said[key])]
    [alone] = sample(run, said["prompt"], *options, "--out", tmp_path / "again")
    assert alone.name == paths[3].name and alone.read_bytes() == paths[3].read_bytes()
    assert np.abs(pixels(paths[2]) - pixels(paths[3])).max() > 0, "another seed, another picture"
    [other] = sample(run, TEXT, "--seed", 3, "--steps", 4, "--guidance", 3, "--method", "dpmpp_2m")
    assert np.abs(pixels(other) - pixels(paths[0])).max() > 0, "another negative and method, another picture"

    assert "multiples of 8" in mistake(run, TEXT, "--size", "160x100")
    assert "multiples of 8" in mistake(run, TEXT, "--size", "0x96")
    assert "multiples of 8" in mistake(run, TEXT, "--size", "large")
    assert "--count 0" in mistake(run, TEXT, "--count", 0)
    assert "error: --steps=2000: must lie in 1..1000" in mistake(run, TEXT, "--steps", 2000)
    assert "error: --rescale=2.0: must lie in [0, 1]" in mistake(run, TEXT, "--rescale", 2)
    (tmp_path / "file").touch()
    assert "--out" in mistake(run, TEXT, "--out", tmp_path / "file" / "below")
    (run / "pipeline" / "model_index.json").unlink()
    assert "model_index.json" in mistake(run, TEXT)
    shutil.rmtree(run / "pipeline" / "unet")  # as a run of task=vae_decoder leaves it
    assert "holds no network that paints; give a run of task=text_to_image" in mistake(run, TEXT)


def test_a_canvas_is_painted_on_its_own_schedule() -> None:
    """Height and width in pixels pick the schedule, and the negative prompt is the unconditional side."""
    asked: list[tuple[int, int]] = []

    class Shifted:
        def for_canvas(self, height: int, width: int) -> Schedule:
            asked.append((height, width))
            return ztsnr(scaled_linear())

    def unet(x: Tensor, t: Tensor, context: Tensor, **_: Any) -> tuple[Tensor]:
        return (context[:, :1, :1, None].expand_as(x),)  # -x0, as many as the prompt has letters

    def condition(text: str) -> tuple[Tensor, Tensor]:
        return torch.full((77, 3), float(len(text))), torch.zeros(5)

    latents: list[Tensor] = []
    painter = Painter(
        denoise=unet,
        schedule=cast(Schedule, Shifted()),
        parameterization=V(),
        sampling=Sampling(steps=1, guidance=3.0, rescale=0.0),
        condition=condition,
        decode=lambda x: latents.append(x) or [Image.new("RGB", (8, 8))] * len(x),
        device=torch.device("cpu"),
    )
    painter.paint([Prompt("four", Bucket(160, 96))], 0, negative="no")
    assert asked == [(96, 160)] and latents[0].shape == (1, 4, 12, 20)
    assert torch.equal(latents[0].unique(), torch.tensor([-(2.0 + 3 * (4 - 2))]))


def test_a_folder_that_is_no_finished_run_is_refused(
    small: Compose, tmp_path: Path, mistake: Callable[..., str]
) -> None:
    assert "no run here" in mistake(tmp_path / "nowhere", TEXT)
    assert "no run here" in mistake(tmp_path, TEXT)
    run = tmp_path / "run"
    run.mkdir()
    cfg = small()
    OmegaConf.save(cfg, run / "config.yaml", resolve=True)
    assert "holds no pipeline yet" in mistake(run, TEXT)
    cfg.schedule = {"_target_": "os.system", "command": "true"}
    OmegaConf.save(cfg, run / "config.yaml", resolve=True)
    assert "outside nai_xl" in mistake(run, TEXT)
    (run / "config.yaml").write_text("run: {}\n")
    assert "lacks plugins" in mistake(run, TEXT)


def test_an_unknown_method_is_told_with_the_known_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["sample", str(tmp_path), TEXT, "--method", "heun"])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr().err
    assert "--method" in told and "dpmpp_2m" in told
