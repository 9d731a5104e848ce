"""Whole runs of the tiny model: what they leave behind, and that they can be stopped and continued."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from omegaconf import DictConfig
from PIL import Image
from safetensors.torch import load_file

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.optimizer.ema import StandardEma
from nai_xl.train import train
from tests.conftest import SMALL

Compose = Callable[..., DictConfig]


def run(cfg: DictConfig) -> Path:
    return train(cfg, {})


def rows(folder: Path) -> dict[int, dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row for row in map(json.loads, lines)}


def losses(folder: Path) -> dict[int, float]:
    return {step: row["train/loss"] for step, row in rows(folder).items() if "train/loss" in row}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").iterdir())[-1]
    return {f"{part}/{k}": v for part in ("unet", "ema") for k, v in load_file(newest / f"{part}.safetensors").items()}


def same_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_leaves_metrics_samples_checkpoint_and_pipeline(small: Compose) -> None:
    folder = run(small("run.max_images=8"))
    reported = rows(folder)[4]
    assert {"train/loss", "train/grad_norm", "train/lr"} <= reported.keys()
    perf = {name.removeprefix("perf/"): value for name, value in reported.items() if name.startswith("perf/")}
    assert perf.keys() == {"images_per_second", "data_wait", "tflops", "peak_memory_gib"}
    assert 0 < perf["data_wait"] < 1 and all(value > 0 for value in perf.values())
    assert any(name.startswith("train/loss_band_") for name in reported)
    assert Image.open(folder / "samples" / "step_00000004.png").width > 100
    assert (folder / "config.yaml").is_file() and (folder / "skipped.csv").is_file()
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step_00000004"]


def test_plain_diffusers_loads_and_samples_the_pipeline(small: Compose) -> None:
    folder = run(small("run.max_images=4"))
    script = """
import sys
from diffusers import StableDiffusionXLPipeline
pipe = StableDiffusionXLPipeline.from_pretrained(sys.argv[1], local_files_only=True)
config = pipe.scheduler.config
assert (config.prediction_type, config.timestep_spacing) == ("v_prediction", "trailing")
assert config.rescale_betas_zero_snr is True
assert pipe.scheduler.timesteps[0] == 999 and pipe.scheduler.sigmas[0] > 4000
image = pipe("picture number 3", num_inference_steps=8, width=160, height=96).images[0]
assert image.size == (160, 96) and "nai_xl" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script, str(folder / "pipeline")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("resolution", [64, 128])
def test_noise_that_depends_on_the_canvas_is_exported_as_it_is_on_the_native_one(
    small: Compose, resolution: int
) -> None:
    """What was trained and what diffusers samples by default must have the same noise at the same timestep."""
    options = ("schedule=shifted", "schedule.resolution=512", "parameterization=epsilon")
    folder = run(small("run.max_images=4", f"native.resolution={resolution}", *options))
    edge = json.loads((folder / "pipeline" / "unet" / "config.json").read_text())["sample_size"] * 8
    assert edge == resolution
    loaded = EulerDiscreteScheduler.from_pretrained(folder / "pipeline", subfolder="scheduler")
    plain = EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    assert loaded.sigmas[0].item() == pytest.approx(plain.sigmas[0].item() * edge / 512, rel=1e-4)


def test_the_pipeline_holds_the_averaged_weights(small: Compose) -> None:
    folder = run(small("run.max_images=8"))
    exported = load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    averaged = load_file(folder / "checkpoints" / "step_00000004" / "ema.safetensors")
    assert all(torch.equal(exported[name], averaged[f"ema/shadow/{name}"]) for name in exported)


@pytest.mark.parametrize(("lr", "longer"), [("constant", "continues it"), ("cosine", "with this lr is another run")])
def test_a_finished_run_is_not_trained_again(
    small: Compose, capsys: pytest.CaptureFixture[str], lr: str, longer: str
) -> None:
    folder = run(small("run.max_images=4", f"lr={lr}"))
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.suffix in (".safetensors", ".jsonl", ".png")}
    assert run(small("run.max_images=4", f"lr={lr}")) == folder
    out = capsys.readouterr().out
    assert "finished" in out and f"a larger run.max_images {longer}" in out
    assert (config.run_dir(small("run.max_images=8", f"lr={lr}"), {}) == folder) == (lr == "constant")
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_more_images_continue_the_run_as_if_it_had_never_ended(small: Compose) -> None:
    folder = run(small("run.max_images=6", "name=two"))
    assert run(small("run.max_images=12", "name=two")) == folder
    whole = run(small("run.max_images=12", "name=one"))
    assert losses(folder) == losses(whole) and len(losses(whole)) == 6
    assert same_weights(folder, whole)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_crashed_run_continues_with_the_same_losses(
    small: Compose, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    overrides = [
        "run.max_images=40",
        "run.checkpoint_every=4",
        "run.log_every=3",
        "run.grad_accum=2",
        f"run.workers={workers}",
    ]
    whole = run(small(*overrides, "name=whole"))
    original = StandardEma.update

    def failing(self: StandardEma, step: int) -> None:
        if step == 7:
            raise RuntimeError("power cut")
        original(self, step)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
        patch.setattr(StandardEma, "update", failing)
        run(small(*overrides, "name=cut"))
    cut = run(small(*overrides, "name=cut"))
    assert losses(cut) == losses(whole) and list(losses(cut)) == [3, 6, 9, 10]
    assert same_weights(cut, whole)


def test_accumulated_micro_batches_train_like_one_large_batch(small: Compose) -> None:
    split = run(small("run.max_images=16", "run.batch_size=2", "run.grad_accum=2", "run.chunk=4", "name=split"))
    whole = run(small("run.max_images=16", "run.batch_size=4", "name=whole"))
    assert list(losses(split).values()) == pytest.approx(list(losses(whole).values()), rel=1e-4)


def test_a_continued_run_reports_whole_intervals(small: Compose) -> None:
    run(small("run.max_images=6", "run.log_every=2", "name=two"))
    two = losses(run(small("run.max_images=16", "run.log_every=2", "name=two")))
    one = losses(run(small("run.max_images=16", "run.log_every=2", "name=one")))
    assert {step: two[step] for step in one} == one


def test_a_longer_run_with_a_falling_rate_is_another_run(small: Compose) -> None:
    short, long = ([f"run.max_images={images}"] for images in (4, 8))
    assert config.run_dir(small("lr=cosine", *short), {}) != config.run_dir(small("lr=cosine", *long), {})
    assert config.run_dir(small(*short), {}) == config.run_dir(small(*long), {})


def test_encoding_in_bf16_leaves_the_autoencoder_as_it_was(small: Compose) -> None:
    exact = run(small("run.max_images=2", "name=fp32"))
    coarse = run(small("run.max_images=2", "name=bf16", "latents.dtype=bf16"))
    first, second = (load_file(f / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors") for f in (exact, coarse))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(exact) != losses(coarse)


def test_no_evaluation_at_all(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = [override for override in SMALL if "evals" not in override]
    folder = run(config.compose([*plain, f"data.dir={images}", "run.max_images=2", "evals=[]", "memory=[]"]))
    assert not (folder / "samples").exists()


def test_arms_of_an_ablation_see_the_same_images_noise_and_timesteps(
    small: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nai_xl.diffusion.objective import Objective

    seen: dict[str, list[torch.Tensor]] = {}
    original = Objective.__call__

    def spy(self, unet, batch):  # type: ignore[no-untyped-def]
        seen.setdefault(arm, []).extend([batch.latents, batch.noise, batch.u, batch.item, batch.context])
        return original(self, unet, batch)

    monkeypatch.setattr(Objective, "__call__", spy)
    for arm in ("minsnr", "uniform"):
        run(small(f"loss={arm}", "run.max_images=8", "schedule=scaled_linear", f"name={arm}"))
    assert all(torch.equal(a, b) for a, b in zip(seen["minsnr"], seen["uniform"], strict=True))


def test_epsilon_on_scaled_linear_with_square_buckets_in_memory(small: Compose) -> None:
    folder = run(
        small("schedule=scaled_linear", "loss=uniform", "parameterization=epsilon", "bucketing=square", "cache=memory",
              "ema=none", "run.max_images=4")
    )  # fmt: skip
    scheduler = json.loads((folder / "pipeline" / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["prediction_type"], scheduler["rescale_betas_zero_snr"]) == ("epsilon", False)


def test_bf16_trains_and_stays_close_to_fp32(small: Compose) -> None:
    exact = losses(run(small("run.max_images=8", "name=fp32")))
    coarse = losses(run(small("run.max_images=8", "name=bf16", "precision=bf16")))
    assert list(coarse.values()) == pytest.approx(list(exact.values()), rel=0.05)
    assert coarse != exact


def test_flips_and_crops_are_part_of_the_run(small: Compose) -> None:
    plain = losses(run(small("run.max_images=12", "name=plain")))
    flipped = losses(run(small("run.max_images=12", "name=flip", "bucketing.flip=true")))
    assert plain != flipped


def test_images_beyond_a_limit_are_left_out_and_the_rest_is_told(
    small: Compose, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four of the pictures are enlarged; small canvases are merged, and the table and the figure tell so."""
    folder = run(
        small("bucketing.max_enlarge=1.2", "bucketing.merge_small=true", "run.chunk=8", "run.max_images=4", "name=few")
    )
    listed = (folder / "skipped.csv").read_text()
    assert listed.count("bucketing.max_enlarge=1.2") == 4
    told = " ".join(capsys.readouterr().out.split())
    assert "8 (4 skipped: 4 unusable; listed in skipped.csv)" in told and "buckets 8 in 160x96" in told
    assert "not seen" in told and "merge_small" not in told.split("not seen")[1]
    assert Image.open(folder / "canvases" / "step_00000000.png").width > 600


def test_single_bad_images_are_skipped_and_listed(small: Compose, images: Path) -> None:
    (images / "bad.png").write_bytes((images / "00.png").read_bytes()[:60])
    (images / "bad.txt").write_text("cut short")
    (images / "dot.png").write_bytes(b"")
    Image.new("RGB", (1, 1)).save(images / "one.png")
    (images / "one.txt").write_text("one pixel")
    (images / "03.txt").unlink()
    folder = run(small("run.max_images=4"))
    listed = (folder / "skipped.csv").read_text()
    assert all(name in listed for name in ("bad.png", "dot.png", "one.png", "03.png")) and "1x1" in listed


def test_a_truncated_cache_file_is_made_anew(small: Compose, own_cache: Path) -> None:
    first = losses(run(small("run.max_images=4", "name=first")))
    for path in own_cache.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:100])
    assert losses(run(small("run.max_images=4", "name=second"))) == first


def test_changed_data_do_not_continue_a_run(small: Compose, images: Path) -> None:
    run(small("run.max_images=4"))
    (images / "00.txt").write_text("another caption")
    with pytest.raises(UserError, match="name=NAME"):
        run(small("run.max_images=8"))


def test_a_non_finite_loss_stops_the_run_but_spares_weights(small: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    from nai_xl.diffusion.objective import Objective

    original = Objective.__call__

    def poisoned(self, unet, batch):  # type: ignore[no-untyped-def]
        values, level = original(self, unet, batch)
        return (values * float("nan") if int(batch.position[0]) >= 4 else values), level

    good = run(small("run.max_images=4", "name=nan"))
    before = weights(good)
    monkeypatch.setattr(Objective, "__call__", poisoned)
    with pytest.raises(UserError, match=r"not finite.*optimizer\.lr"):
        run(small("run.max_images=8", "name=nan"))
    after = weights(good)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_full_disk_leaves_the_earlier_checkpoint(small: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(small("run.max_images=4"))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr("nai_xl.engine.checkpoint_writer.write_tensors", full)
        run(small("run.max_images=8"))
    run(small("run.max_images=8"))
    assert list(losses(folder)) == [1, 2, 3, 4]
