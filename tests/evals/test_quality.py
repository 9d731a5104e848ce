"""evals=quality: features whose distance is known, and small models made here, measured in other ways."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from nai_xl import config
from nai_xl.compare.comparison import Question, compare
from nai_xl.compare.judging.verdicts import better_direction
from nai_xl.compare.runs.directory import read_directory
from nai_xl.compare.runs.run import Run
from nai_xl.data.rows import Item
from nai_xl.errors import UserError
from nai_xl.evals.contact_sheet import Prompt
from nai_xl.evals.painter import Studio
from nai_xl.evals.quality import Quality, features, fid, kid, load_extractor
from nai_xl.evals.val_loss import item_name
from nai_xl.model.clip import load_clip
from nai_xl.model.tiny import _tokenizer
from nai_xl.record.items import read_items
from nai_xl.train import train

pytest.importorskip("torchmetrics")
Make = Callable[..., Studio]


class Moments(nn.Module):
    """Mean and spread of each channel, in [0,1]."""

    def forward(self, images: Tensor) -> Tensor:
        values = images.double().flatten(2) / 255
        return torch.cat([values.mean(2), values.std(2)], 1)


class LikeStyleGan(nn.Module):
    """Gives classes unless asked for features, as StyleGAN's Inception does."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        means = images.double().flatten(1).mean(1, keepdim=True)
        return torch.cat([means, means + 1], 1) if return_features else torch.zeros(len(images), 9)


class Whole(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.double()


def scripted(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(path)
    return path


@pytest.fixture
def inception(tmp_path: Path) -> Path:
    return scripted(Moments(), tmp_path / "inception.pt")


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP that looks at 32 x 32 pixels and 24 tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    tokenizer = _tokenizer("<|endoftext|>")
    tokenizer.model_max_length = 24
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**size, **special, "vocab_size": len(tokenizer), "max_position_embeddings": 24},
            vision_config={**size, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    for name, parameter in model.named_parameters():
        if "layer_norm" not in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)  # far from CLIP's initial 0.02, with which all pictures are alike
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tokenizer).save_pretrained(folder)
    return folder


def noisy(latents: Tensor) -> Sequence[Image.Image]:
    """A decoder that shows what the network made of the noise."""
    pixels = ((latents[:, :3].tanh() + 1) * 127).byte().repeat_interleave(8, 2).repeat_interleave(8, 3)
    return [Image.fromarray(x.permute(1, 2, 0).contiguous().numpy()) for x in pixels]


@pytest.fixture
def pictured(studio: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Studios whose held-out images lie on the disk, and whose samples differ."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for number in range(7):
        Image.fromarray(random.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(f"{number}.png")
    return lambda **parts: studio(**{"decode": noisy, "denoise": lambda xt, *_, **__: (0.3 * xt,), **parts})


def normal(count: int, mean: np.ndarray, covariance: np.ndarray, seed: int) -> np.ndarray:
    """[count, D] float64 with exactly this mean and covariance."""
    drawn = np.random.default_rng(seed).standard_normal((count, len(mean)))
    drawn -= drawn.mean(0)
    white = drawn @ np.linalg.inv(np.linalg.cholesky(np.cov(drawn.T))).T
    return np.asarray(white @ np.linalg.cholesky(covariance).T + mean)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    one, other = np.cov(a.T), np.cov(b.T)
    root = np.asarray(sqrtm(one @ other)).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(one + other - 2 * root))


def mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Pair by pair: the mean kernel within each set, of unlike members, less twice that between them."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / len(x) + 1) ** 3)

    n, m = len(a), len(b)
    within = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


def test_fid_of_normal_features_is_the_closed_form() -> None:
    """Of diagonal covariances: |difference of means|^2 + sum of (difference of deviations)^2."""
    deviations, others = np.array([1.0, 0.5, 2.0, 3.0]), np.array([0.2, 0.5, 1.0, 4.0])
    means, elsewhere = np.array([0.0, 1.0, -2.0, 5.0]), np.array([0.5, 1.0, -1.0, 3.0])
    a, b = normal(50, means, np.diag(deviations**2), 0), normal(70, elsewhere, np.diag(others**2), 1)
    expected = np.square(means - elsewhere).sum() + np.square(deviations - others).sum()
    assert fid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(expected, rel=1e-9)
    assert fid(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("count", "width"), [(40, 6), (12, 5), (200, 12)])
def test_fid_and_kid_are_their_definitions(count: int, width: int) -> None:
    random = np.random.default_rng(count)
    a = random.standard_normal((count, width)) @ random.standard_normal((width, width))
    b = random.standard_normal((count, width)) @ random.standard_normal((width, width)) + 0.3
    assert fid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(frechet(a, b), rel=1e-7)
    assert kid(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(mmd(a, b), rel=1e-9)


def test_fid_is_biased_with_few_images_and_kid_is_not() -> None:
    """Both sets from one distribution: FID is far from 0 and falls with their number, KID scatters about 0."""

    def drawn(count: int, seed: int) -> tuple[Tensor, Tensor]:
        made = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(count, 16, generator=made, dtype=torch.float64) for _ in range(2))
        return a, b

    few, many = (np.array([fid(*drawn(count, seed)) for seed in range(20)]) for count in (20, 200))
    assert few.min() > 4 and many.max() < 1.5
    scattered = np.array([kid(*drawn(20, seed)) for seed in range(60)])
    assert abs(scattered.mean()) < 3 * scattered.std() / np.sqrt(60) and (scattered < 0).any()


def test_a_run_gives_the_distances_of_held_out_images_and_samples(
    pictured: Make, inception: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = pictured()
    values = Quality(every=1, inception=inception, count=6, seeds=2, steps=2).run(1, scene)
    chosen = scene.encoded.held_out[:6]

    def moments(image: Image.Image) -> np.ndarray:
        pixels = np.asarray(image).reshape(-1, 3) / 255
        return np.concatenate([pixels.mean(0), pixels.std(0, ddof=1)])

    real = []
    for item, ref in chosen:
        left, top, box = *ref.placement.crop, ref.placement.bucket
        with Image.open(item.path) as image:
            real.append(moments(image.crop((left, top, left + box.width, top + box.height))))
    painter = pictured(sampling=type(scene.sampling)(steps=2))
    prompts = [Prompt(item.caption, ref.placement.bucket) for item, ref in chosen]
    fakes = [np.array([moments(image) for image in painter.paint(prompts, seed)]) for seed in range(2)]
    assert set(values) == {"quality/fid", "quality/kid"}
    assert values["quality/fid"] == pytest.approx(frechet(np.array(real), np.concatenate(fakes)), rel=1e-4)
    assert values["quality/kid"] == pytest.approx(np.mean([mmd(np.array(real), fake) for fake in fakes]), rel=1e-6)
    assert "FID of 12 samples against 6 held-out images is biased" in capsys.readouterr().err


def test_a_clip_score_is_the_cosine_of_image_and_caption(pictured: Make, clip: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    values = Quality(every=1, clip=clip, seeds=2, steps=2).run(4, pictured())
    items = read_items(tmp_path, "quality/clip")[4]
    scene = pictured(sampling=type(pictured().sampling)(steps=2))
    assert set(items) == {f"{item_name(item)}/{seed}" for item, _ in scene.encoded.held_out for seed in (0, 1)}
    assert values == {"quality/clip": pytest.approx(np.mean(list(items.values())))}

    prompts = [Prompt(item.caption, ref.placement.bucket) for item, ref in scene.encoded.held_out]
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    cosines = []
    for seed in (0, 1):
        for (item, _), image in zip(scene.encoded.held_out, scene.paint(prompts, seed), strict=True):
            with torch.no_grad():
                both = model(**processor(text=[item.caption], images=[image], return_tensors="pt"))
            cosine = float((both.image_embeds[0].double() * both.text_embeds[0].double()).sum())
            cosines.append(cosine)
            assert items[f"{item_name(item)}/{seed}"] == pytest.approx(max(0, 100 * cosine), abs=1e-3)
    assert max(cosines) > 0.01 and len(set(items.values())) > 3


def test_what_a_long_caption_says_last_is_lost_and_the_rest_is_not(clip: Path) -> None:
    model, processor = load_clip(clip)
    words = " ".join(["large"] * 40)

    def vector(text: str) -> Tensor:
        return model.get_text_features(**_renamed(processor(text=[text], return_tensors="pt", padding=True)))

    assert torch.equal(vector(f"red {words} left"), vector(f"red {words} right"))
    assert not torch.equal(vector(f"red {words}"), vector(f"blue {words}"))


def _renamed(tokens: Any) -> dict[str, Tensor]:
    return {"ids": tokens["input_ids"], "mask": tokens["attention_mask"]}


def test_it_repeats_exactly_and_leaves_the_random_numbers_alone(pictured: Make, inception: Path, clip: Path) -> None:
    def run(batch: int) -> dict[str, float]:
        return Quality(every=1, inception=inception, clip=clip, steps=2, batch=batch).run(1, pictured())

    before = torch.get_rng_state()
    first = run(16)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(5)
    assert run(16) == first
    assert run(2) == pytest.approx(first, rel=1e-4)


def test_later_evaluations_read_the_images_no_more(pictured: Make, inception: Path, tmp_path: Path) -> None:
    evaluator, scene = Quality(every=1, inception=inception, steps=2), pictured()
    first = evaluator.run(1, scene)
    for number in range(7):
        (tmp_path / f"{number}.png").unlink()
    assert evaluator.run(2, scene) == first


def test_stylegans_inception_is_asked_for_features(tmp_path: Path) -> None:
    extractor = load_extractor(scripted(LikeStyleGan(), tmp_path / "stylegan.pt"), torch.device("cpu"))
    images = torch.full((3, 3, 8, 16), 7, dtype=torch.uint8)
    assert features(extractor, images).tolist() == [[7.0, 8.0]] * 3


def test_features_of_another_shape_are_refused(tmp_path: Path) -> None:
    extractor = load_extractor(scripted(Whole(), tmp_path / "whole.pt"), torch.device("cpu"))
    with pytest.raises(UserError, match=r"evals\.quality\.inception: gives \[2, 3, 8, 8\] for 2 images"):
        features(extractor, torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def item(number: int) -> Item:
    return Item(Path(f"{number}.png"), f"caption {number}", (60, 40), f"{number:064x}")


def test_held_out_images_come_first_and_none_twice(inception: Path) -> None:
    evaluator = Quality(every=1, inception=inception, count=3)
    items = [item(number) for number in range(5)]
    assert evaluator.held_out([*items[:2], *items]) == items[:3]
    assert evaluator.held_out([]) == [] and evaluator.texts(items) == ["caption 0", "caption 1", "caption 2"]
    with pytest.raises(UserError, match="at least 2 images"):
        evaluator.held_out(items[:1])


# --- as a user chooses it ---------------------------------------------------------------------------------------------


def test_without_weights_both_overrides_are_named_before_anything_is_loaded(
    small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def built(*, seed: int) -> None:
        raise AssertionError("the model is built")

    monkeypatch.setattr("nai_xl.model.tiny.tiny_sdxl", built)
    with pytest.raises(UserError, match=r"evals\.quality\.inception=FILE .* evals\.quality\.clip=FOLDER"):
        train(small("evals=[sample_grid,quality]"), {})


def test_without_torchmetrics_the_extra_is_named(inception: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nai_xl.evals.quality.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'nai_xl\[quality\]'"):
        Quality(every=1, inception=inception)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [("inception=nowhere.pt", "inception=nowhere.pt: no such file"), ("clip=nowhere", "clip=nowhere: no such folder"),
     ("inception=weights.pt", "inception=weights.pt: no TorchScript file"), ("clip=.", "clip=.: no CLIP model"),
     ("clip=text", "clip=text: config.json is of a model of type clip_text_model"),
     ("clip=torn", r"clip=torn: config.json cannot be read"),
     ("count=1", "count=1: input should be greater than or equal to 2"), ("seeds=0", "greater than or equal to 1"),
     ("+cilp=x", "no parameter 'cilp' in Quality; did you mean 'clip'"), ("cilp=x", "cilp")],
)  # fmt: skip
def test_mistakes_are_told_with_their_override(
    overrides: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(1)}, "weights.pt")
    for folder, text in (("text", '{"model_type": "clip_text_model"}'), ("torn", "{")):
        Path(folder).mkdir()
        Path(folder, "config.json").write_text(text)
        Path(folder, "model.safetensors").write_bytes(b"")
    plus = "+" if overrides.startswith("+") else ""
    with pytest.raises((UserError, ConfigCompositionException), match=told):
        config.check(config.compose(["evals=[quality]", f"{plus}evals.quality.{overrides.removeprefix('+')}"]))


def test_a_clip_without_all_of_its_tensors_is_refused(clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    copy.mkdir()
    for file in clip.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = load_file(clip / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "visual_projection.weight"}, copy / "model.safetensors")
    with pytest.raises(UserError, match=r"evals\.quality\.clip=.*visual_projection"):
        load_clip(copy)
    (copy / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"evals\.quality\.clip=.*cannot be loaded"):
        load_clip(copy)


def test_what_is_better() -> None:
    directions = {name: better_direction(f"quality/{name}") for name in ("fid", "kid", "clip")}
    assert directions == {"fid": "lower", "kid": "lower", "clip": "higher"}


def trained(small: Callable[..., DictConfig], *overrides: str) -> Run:
    home = train(
        small("evals=[sample_grid,quality]", "run.max_images=4", "optimizer.lr=0.01", "evals.quality.count=4",
              "evals.quality.steps=2", *overrides),
        {},
    )  # fmt: skip
    return read_directory(home, {})


def test_arms_are_compared_sample_by_sample(
    small: Callable[..., DictConfig], inception: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs: list[Run] = []
    for loss in ("uniform", "minsnr"):
        weights = f"evals.quality.inception={inception}", f"evals.quality.clip={clip}"
        found = trained(small, f"loss={loss}", "data.held_out=0.4", *weights)
        runs.append(Run(found.name, {"loss": loss}, 0, curves=found.curves, path=found.path))
    assert "held-out images is biased" in capsys.readouterr().err
    asked = Question("x", baseline="loss=uniform", metrics=["quality/clip", "quality/fid", "quality/kid"])
    score, *distances = compare(runs, asked).rows
    items = [run.items("quality/clip")[2] for run in runs]
    assert items[0].keys() == items[1].keys() and items[0] != items[1]
    assert score.effect is not None and score.effect.items == len(items[0]) >= 2
    assert all(row.effect is not None for row in distances)
    assert not runs[0].items("quality/fid") and not runs[0].items("quality/kid")


def test_training_images_stand_in_where_none_is_held_out(
    small: Callable[..., DictConfig], inception: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = trained(small, f"evals.quality.inception={inception}")
    assert "FID of 4 samples against 4 training images is biased" in capsys.readouterr().err
    assert found.curves["quality/fid"][2] > 0 and "quality/clip" not in found.curves
