"""The comparison with other trainers, tried on a trainer of a dozen lines: none of theirs is needed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.peers_inputs import write_images, write_model
from benchmarks.peers_launch import Clock
from benchmarks.peers_parity import Step, as_batch, compare, passed
from nai_xl.diffusion.schedule import scaled_linear
from nai_xl.diffusion.timesteps import uniform

LAUNCHER = Path(__file__).parents[1] / "benchmarks" / "peers_launch.py"
# what a peer's script does, by diffusers and torch alone
TRAINER = """
import sys, torch
from pathlib import Path
from diffusers import DDPMScheduler, UNet2DConditionModel
unet = UNet2DConditionModel.from_pretrained(sys.argv[1], subfolder="unet").train()
scheduler = DDPMScheduler.from_pretrained(sys.argv[1], subfolder="scheduler")
optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-5)
Path(sys.argv[2]).write_text(str(optimizer.defaults["fused"]))
torch.manual_seed(0)
while True:
    latents, noise, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randint(0, 1000, (2,))
    sizes = torch.randint(64, 256, (2, 6))
    condition = {"text_embeds": torch.randn(2, 96), "time_ids": sizes}
    noisy = scheduler.add_noise(latents, noise, t)
    out = unet(noisy, t, torch.randn(2, 77, 160), added_cond_kwargs=condition, return_dict=False)[0]
    torch.nn.functional.mse_loss(out, noise).backward()
    torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peers") / "model"
    write_model("tiny", folder)
    return folder


def launch(model: Path, folder: Path, *, capture: bool) -> Path:
    """Run TRAINER as peers.py runs a peer's script, for two steps."""
    (folder / "trainer.py").write_text(TRAINER)
    spec: dict[str, Any] = {
        "trainer": "diffusers",
        "script": str(folder / "trainer.py"),
        "root": str(folder),
        "arguments": [str(model), str(folder / "fused")],
        "fused_adamw": True,
        "capture": capture,
        "warmup": 1,
        "steps": 2,
        "out": str(folder / "out"),
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    subprocess.run([sys.executable, LAUNCHER, folder / "spec.json"], check=True, capture_output=True)
    return folder / "out"


@pytest.fixture(scope="module")
def captured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Step]:
    steps: list[Step] = torch.load(launch(model, tmp_path_factory.mktemp("run"), capture=True), weights_only=True)
    return steps


def test_an_equal_trainer_agrees_at_every_step(model: Path, captured: list[Step]) -> None:
    rows = compare(model, captured, "no", 1e-5)
    assert len(rows) == 2
    assert passed(rows, "no")


@pytest.mark.parametrize(
    "name, change",
    [
        ("t", lambda t: t + 1),
        ("context", lambda x: x.flip(0)),
        ("pooled", lambda x: x.flip(0)),
        ("time_ids", lambda x: x.flip(1)),
        ("latents", lambda x: x * 1.001),
    ],
)
def test_any_difference_shows(model: Path, captured: list[Step], name: str, change: Any) -> None:
    step = captured[0] | {name: change(captured[0][name])}
    assert not passed(compare(model, [step], "no", 1e-5), "no")


@pytest.mark.parametrize("bad", [float("nan"), 2e-5])
def test_every_step_and_every_number_count(bad: float) -> None:
    good = {"noisy": 1e-6, "loss": 1e-6, "grad_norm": 1e-6}
    assert passed([good, good], "no")
    for name in good:
        assert not passed([good, good | {name: bad}], "no")


def test_another_learning_rate_shows_at_the_second_step(model: Path, captured: list[Step]) -> None:
    rows = compare(model, captured, "no", 1e-3)
    assert passed(rows[:1], "no")
    assert not passed(rows, "no")


def test_every_timestep_survives_the_way_through_u() -> None:
    zeros, t = torch.zeros(1000, 1), torch.arange(1000)
    step = dict.fromkeys(("latents", "context", "pooled", "time_ids", "noise"), zeros) | {"t": t}
    assert torch.equal(uniform(as_batch(step).u, scaled_linear()), t)


def test_the_clock_ends_a_script_after_its_steps(model: Path, tmp_path: Path) -> None:
    record = json.loads(launch(model, tmp_path, capture=False).read_text())
    assert len(record["times"]) == 2
    assert sum(record["times"]) == pytest.approx(record["window"], rel=0.1)
    assert record["versions"]["torch"] == torch.__version__
    assert (tmp_path / "fused").read_text() == "True"


def test_the_clock_leaves_out_the_warm_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, *(float(n) ** 2 for n in range(1, 20))])  # read once more at each end of the window
    monkeypatch.setattr("benchmarks.peers_launch.time.perf_counter", lambda: next(now))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clock = Clock(warmup=2, steps=2, out=tmp_path / "out")
    with pytest.raises(SystemExit):
        for _ in range(10):
            clock.mark()
    # marks: 1, (4: first), 9, 16, (25: start), 36, 49
    assert json.loads((tmp_path / "out").read_text())["times"] == [20.0, 13.0]


def test_all_trainers_find_the_same_captions(tmp_path: Path) -> None:
    write_images(tmp_path / "images", 3, 32)
    lines = [json.loads(line) for line in (tmp_path / "images" / "metadata.jsonl").read_text().splitlines()]
    texts = {file.with_suffix(".png").name: file.read_text() for file in (tmp_path / "images").glob("*.txt")}
    assert {line["file_name"]: line["text"] for line in lines} == texts
    assert len(set(texts.values())) == 3
