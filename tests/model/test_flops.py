"""FLOPs by closed forms of their own, and SDXL's published sizes."""

import pytest
from diffusers import UNet2DConditionModel

from nai_xl.model.flops import forward_flops, inputs, training_flops
from nai_xl.model.sdxl.configs import unet_skeleton
from nai_xl.model.tiny import tiny_sdxl, tiny_unet_skeleton


@pytest.fixture(scope="module")
def sdxl() -> UNet2DConditionModel:
    return unet_skeleton()


def test_sdxl_has_its_published_parameters_and_no_storage(sdxl: UNet2DConditionModel) -> None:
    assert sum(p.numel() for p in sdxl.parameters()) == 2_567_463_684  # Stability AI's "2.6B parameter UNet"
    assert len(list(sdxl.parameters())) == 1680
    assert all(p.is_meta for p in sdxl.parameters()) and all(b.is_meta for b in sdxl.buffers())


@pytest.mark.parametrize(("edge", "tera"), [(512, 1.589), (1024, 6.761)])
def test_sdxl_forward(sdxl: UNet2DConditionModel, edge: int, tera: float) -> None:
    assert forward_flops(sdxl, edge, edge) / 1e12 == pytest.approx(tera, abs=5e-4)
    assert training_flops(sdxl, edge, edge) == 3 * forward_flops(sdxl, edge, edge)


def test_the_canvas_may_lie_or_stand(sdxl: UNet2DConditionModel) -> None:
    assert forward_flops(sdxl, 512, 768) == forward_flops(sdxl, 768, 512)


def small(**changed: object) -> UNet2DConditionModel:
    """One cross-attention block down and up, and the middle: few enough products to count by hand."""
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "down_block_types": ("CrossAttnDownBlock2D",),
            "up_block_types": ("CrossAttnUpBlock2D",),
            "block_out_channels": (32,),
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            "use_linear_projection": True,
            "cross_attention_dim": 48,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 48,
            **changed,
        }
    )


def by_hand(height: int, width: int, tokens: int) -> int:
    """2 x multiplications of small(), from the architecture: SDXL's blocks with 32 channels, one level."""
    c, t, cross, n = 32, 128, 48, height // 8 * (width // 8)
    embedding = c * t + t * t + 64 * t + t * t

    def resnet(inputs: int) -> int:
        shortcut = n * inputs * c if inputs != c else 0
        return n * 9 * inputs * c + n * 9 * c * c + t * c + shortcut

    def transformer() -> int:
        project = 2 * n * c * c
        own = 4 * n * c * c + 2 * n * n * c
        crossed = 2 * n * c * c + 2 * tokens * cross * c + 2 * n * tokens * c
        feed_forward = n * c * 8 * c + n * 4 * c * c
        return project + own + crossed + feed_forward

    down = resnet(c) + transformer()
    middle = 2 * resnet(c) + transformer()
    up = 2 * (resnet(2 * c) + transformer())
    ends = 2 * n * 9 * 4 * c
    return 2 * (embedding + down + middle + up + ends)


@pytest.mark.parametrize(("height", "width", "tokens"), [(64, 64, 77), (64, 128, 77), (128, 64, 154)])
def test_every_product_of_a_small_unet_by_hand(height: int, width: int, tokens: int) -> None:
    assert forward_flops(small(), height, width, tokens=tokens) == by_hand(height, width, tokens)


def test_the_device_and_training_of_the_model_do_not_matter() -> None:
    real, bare = tiny_sdxl(seed=0).unet.train(), tiny_unet_skeleton()
    assert forward_flops(real, 128, 96) == forward_flops(bare, 128, 96) > 0
    assert [(name, p.shape) for name, p in real.named_parameters()] == [
        (n, p.shape) for n, p in bare.named_parameters()
    ]
    given = inputs(real, 2, 128, 96, device="cpu")
    assert real(**given).sample.shape == (2, 4, 16, 12)
