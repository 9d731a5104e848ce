"""Pixels to latents and back, and what the tiny autoencoder makes of photographs it has never seen."""

import copy
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from nai_xl.data.images import on_canvas, to_pixels
from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket, Placement
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.model.vae import decode_latents, encode_pixels, folded

AREA = 128 * 128


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return tiny_sdxl(seed=0).vae


def photographs() -> list[Image.Image]:
    """Three that the autoencoder was not trained on, out of wheels that are installed anyway."""
    sklearn, matplotlib = pytest.importorskip("sklearn"), pytest.importorskip("matplotlib")
    images, samples = Path(sklearn.__file__).parent / "datasets" / "images", Path(matplotlib.get_data_path())
    paths = [images / "china.jpg", images / "flower.jpg", samples / "sample_data" / "grace_hopper.jpg"]
    return [Image.open(path).convert("RGB") for path in paths]


def middle(image: Image.Image) -> Image.Image:
    return image.crop(
        (image.width // 4, image.height // 4, image.width - image.width // 4, image.height - image.height // 4)
    )


def on_tiny_canvas(image: Image.Image) -> Image.Image:
    factor = math.sqrt(AREA / (image.width * image.height))
    width, height = (max(32, round(side * factor / 32) * 32) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def psnr(found: Image.Image, expected: Image.Image) -> float:
    error = np.asarray(found, dtype=float) - np.asarray(expected, dtype=float)
    return 10 * math.log10(255**2 / (error**2).mean())


def test_unseen_photographs_come_back_at_22_db(vae: AutoencoderKL) -> None:
    assert np.mean([reconstruction(vae, image) for image in photographs()]) >= 22
    assert np.mean([reconstruction(vae, middle(image)) for image in photographs()]) >= 21.5


def reconstruction(vae: AutoencoderKL, image: Image.Image) -> float:
    """PSNR in dB of a photograph on the tiny canvas after the way through the latents."""
    image = on_tiny_canvas(image)
    (decoded,) = decode_latents(vae, encode_pixels(vae, to_pixels(image)[None]))
    return psnr(decoded, image)


@pytest.mark.parametrize("size", [(128, 128), (160, 96), (96, 160)])
def test_latents_are_an_eighth_of_the_picture_in_four_channels(vae: AutoencoderKL, size: tuple[int, int]) -> None:
    latents = encode_pixels(vae, to_pixels(Image.new("RGB", size, "teal"))[None])
    assert latents.shape == (1, 4, size[1] // 8, size[0] // 8)
    assert latents.dtype == torch.float32
    assert decode_latents(vae, latents)[0].size == size


def test_encoding_is_the_same_every_time(vae: AutoencoderKL) -> None:
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(encode_pixels(vae, pixels), encode_pixels(vae, pixels))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_latents_that_are_not_finite_are_refused(vae: AutoencoderKL, bad: float) -> None:
    pixels = torch.zeros(2, 3, 64, 64)
    pixels[1, 0, 3, 3] = bad
    with pytest.raises(UserError, match=r"latents that are not finite, although its weights are"):
        encode_pixels(vae, pixels)


def test_pixels_run_from_minus_one_to_one_channel_first() -> None:
    image = Image.new("RGB", (3, 2), (0, 255, 51))
    assert to_pixels(image).shape == (3, 2, 3)
    assert to_pixels(image)[:, 0, 0].tolist() == pytest.approx([-1, 1, -0.6])


def test_decoded_pixels_are_rounded_and_clipped() -> None:
    class Plain:
        """Decodes latents into themselves."""

        device, dtype = torch.device("cpu"), torch.float32

        def decode(self, raw: torch.Tensor) -> "Plain":
            self.sample = raw
            return self

    values = torch.tensor([-3.0, -1.0, 0.0, 0.2, 1.0, 7.0]).expand(1, 3, 1, 6)
    (image,) = decode_latents(Plain(), values)
    assert [image.getpixel((x, 0))[0] for x in range(6)] == [0, 0, 128, 153, 255, 255]  # type: ignore[index]


def test_canvas_is_resized_cut_and_mirrored_in_that_order() -> None:
    image = Image.new("RGB", (8, 4), "black")
    image.putpixel((5, 1), (255, 255, 255))
    plain = on_canvas(image, Placement(Bucket(4, 4), (8, 4), (3, 0), flip=False))
    mirrored = on_canvas(image, Placement(Bucket(4, 4), (8, 4), (3, 0), flip=True))
    assert plain.size == mirrored.size == (4, 4)
    assert plain.getpixel((2, 1)) == mirrored.getpixel((1, 1)) == (255, 255, 255)
    assert np.asarray(plain).sum() == np.asarray(mirrored).sum() == 3 * 255


MEAN = torch.tensor([4.8119, 0.1607, 1.3538, -1.7753]).view(4, 1, 1)
STD = torch.tensor([9.9181, 6.2753, 7.5978, 5.9956]).view(4, 1, 1)


def some_pixels() -> torch.Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1


def with_factor(vae: AutoencoderKL, factor: float) -> AutoencoderKL:
    other = copy.deepcopy(vae)
    other.register_to_config(scaling_factor=factor)
    return other


def without_quant_convs(vae: AutoencoderKL) -> AutoencoderKL:
    """As Flux's or SD3's are built."""
    other = AutoencoderKL(**{**vae.config, "use_quant_conv": False, "use_post_quant_conv": False}).eval()
    other.load_state_dict({k: v for k, v in vae.state_dict().items() if "quant_conv" not in k})
    return other


VARIANTS: dict[str, Callable[[AutoencoderKL], AutoencoderKL]] = {
    "own factor": lambda vae: vae,
    "SDXL's factor": lambda vae: with_factor(vae, 0.13025),
    "factor 1": lambda vae: with_factor(vae, 1.0),
    "no quant convs": without_quant_convs,
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_folded_autoencoder_speaks_normalised_latents(vae: AutoencoderKL, variant: str) -> None:
    plain = VARIANTS[variant](vae)
    new = folded(plain, MEAN, STD)
    factor = new.config.scaling_factor
    assert factor == plain.config.scaling_factor  # single-file readers know no other
    pixels = some_pixels()
    old, found = plain.encode(pixels).latent_dist, new.encode(pixels).latent_dist
    expected = (old.mean - MEAN) / STD
    torch.testing.assert_close(found.mean * factor, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.std * factor, old.std / STD, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(new.decode(expected / factor).sample, plain.decode(old.mean).sample, atol=1e-4, rtol=0)


@torch.no_grad()
def test_folding_twice_composes(vae: AutoencoderKL) -> None:
    once = folded(vae, MEAN, STD)
    factor = once.config.scaling_factor
    mean, std = torch.tensor([0.1, -0.2, 0.3, 0.0]).view(4, 1, 1), torch.tensor([0.5, 2.0, 1.0, 0.8]).view(4, 1, 1)
    pixels = some_pixels()
    expected = (once.encode(pixels).latent_dist.mean - mean) / std
    found = folded(once, mean, std).encode(pixels).latent_dist.mean * factor
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_folding_leaves_the_autoencoder_itself_alone(vae: AutoencoderKL) -> None:
    before, config = copy.deepcopy(vae.state_dict()), dict(vae.config)
    for mean, std in ((MEAN, STD), (0 * MEAN, torch.full((4, 1, 1), 2.0))):
        assert folded(vae, mean, std) is not vae
    assert dict(vae.config) == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in vae.state_dict().items())


@pytest.mark.parametrize("factor", [0.13025, 0.9875, 0.3])
def test_one_number_is_the_scaling_factor_and_changes_no_weight(vae: AutoencoderKL, factor: float) -> None:
    mean, std = torch.zeros(4, 1, 1), torch.full((4, 1, 1), 1 / factor)
    new = folded(vae, mean, std)
    assert new.config.scaling_factor == factor
    assert all(torch.equal(tensor, vae.state_dict()[name]) for name, tensor in new.state_dict().items())
    assert (new is vae) == (factor == vae.config.scaling_factor)


def test_statistics_that_an_autoencoder_brings_do_not_reach_the_pipeline(vae: AutoencoderKL) -> None:
    other = copy.deepcopy(vae)
    other.register_to_config(latents_mean=[1.0] * 4, latents_std=[2.0] * 4)
    new = folded(other, torch.zeros(4, 1, 1), torch.full((4, 1, 1), 1 / vae.config.scaling_factor))
    assert (new.config.latents_mean, new.config.latents_std) == (None, None)
    assert new.config.scaling_factor == vae.config.scaling_factor
