"""The original layout: what is written is read back bit for bit, and bears the names that other programs expect."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from nai_xl.model.sdxl import load_sdxl
from nai_xl.model.sdxl.components import Components
from nai_xl.model.sdxl.configs import SDXL_BASE
from nai_xl.model.single_file import original_layout, to_single_file, unet_layout, vae_layout
from tests.model.test_sdxl import UNET, VAE, assert_same, modules, save_folder, small_sdxl


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def components() -> Components:
    return small_sdxl()


@pytest.fixture(scope="module")
def folder(components: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(components, tmp_path_factory.mktemp("sdxl"))


def test_round_trip_is_exact(components: Components, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.safetensors"
    written = to_single_file(components, path, v_prediction=True, zero_terminal_snr=True, dtype=torch.float32)
    assert written == path
    assert [file.name for file in path.parent.iterdir()] == ["model.safetensors"]
    assert_same(load_sdxl(path, config=folder), components)


def test_round_trip_in_half_precision(components: Components, folder: Path, tmp_path: Path) -> None:
    path = to_single_file(components, tmp_path / "m.safetensors", v_prediction=False, zero_terminal_snr=False)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float16}
    for part, module in modules(load_sdxl(path, config=folder)).items():
        original = modules(components)[part].state_dict()
        for name, weight in module.state_dict().items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, original[name].half().float()), f"{part}: {name}"


@pytest.mark.parametrize("v_prediction", [False, True])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_marks(components: Components, tmp_path: Path, v_prediction: bool, zero_terminal_snr: bool) -> None:
    path = tmp_path / "m.safetensors"
    to_single_file(components, path, v_prediction=v_prediction, zero_terminal_snr=zero_terminal_snr)
    tensors = load_file(path)
    assert ("v_pred" in tensors, "ztsnr" in tensors) == (v_prediction, zero_terminal_snr)
    assert "edm_vpred.sigma_max" not in tensors
    assert all(tensors[mark].numel() == 0 for mark in {"v_pred", "ztsnr"} & tensors.keys())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert metadata["modelspec.prediction_type"] == ("v" if v_prediction else "epsilon")


def test_replaces_the_old_file_only_when_done(components: Components, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"old")
    (tmp_path / "blocked.safetensors").mkdir()
    with pytest.raises(OSError, match="blocked"):
        to_single_file(components, tmp_path / "blocked.safetensors", v_prediction=True, zero_terminal_snr=True)
    assert {file.name for file in tmp_path.iterdir()} == {"m.safetensors", "blocked.safetensors"}
    to_single_file(components, path, v_prediction=True, zero_terminal_snr=True)
    assert path.stat().st_size > 1000


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("blocks", [2, 3, 4])
def test_unet_of_any_depth(layers: int, blocks: int) -> None:
    """diffusers' own conversion of the layout gives the UNet back, whatever the number of layers and blocks."""
    kinds = ("DownBlock2D", *["CrossAttnDownBlock2D"] * (blocks - 1))
    changes = {
        "down_block_types": kinds,
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        "block_out_channels": (8, 8, 16, 16)[:blocks],
        "transformer_layers_per_block": (1, 1, 2, 1)[:blocks],
        "attention_head_dim": (1, 1, 2, 2)[:blocks],
        "layers_per_block": layers,
    }
    unet = UNet2DConditionModel(**{**UNET, **changes})
    layout = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_layout(unet).items()}
    back = convert_ldm_unet_checkpoint(layout, unet.config)
    assert back.keys() == unet.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in unet.state_dict().items())


@pytest.mark.parametrize("layers", [1, 2])
def test_vae_of_any_depth(layers: int) -> None:
    four = {"block_out_channels": (4, 8, 8, 12), "layers_per_block": layers}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**{**VAE, **four, **kinds})
    layout = {f"first_stage_model.{name}": tensor for name, tensor in vae_layout(vae).items()}
    back = convert_ldm_vae_checkpoint(layout, vae.config)
    assert back.keys() == vae.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in vae.state_dict().items())


def test_module_without_a_place() -> None:
    unet = UNet2DConditionModel(**UNET)
    unet.adapter = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"adapter.weight has no place in SDXL's original layout"):
        unet_layout(unet)


def test_names_and_shapes_of_sdxl_base() -> None:
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SDXL_BASE / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(SDXL_BASE / "vae"))
        first = CLIPTextModel(CLIPTextConfig.from_pretrained(SDXL_BASE / "text_encoder"))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(SDXL_BASE / "text_encoder_2"))
    # All of it stays on the meta device, so that the 3.5 billion weights take no memory.
    layout = original_layout(Components(unet, vae, (first, second), tokenizers=()))  # type: ignore[arg-type]
    assert all(tensor.is_meta for tensor in layout.values())
    # The published file has 2,515: these, CLIP-L's position_ids and CLIP-G's logit_scale.
    assert len(layout) == 1680 + 248 + 196 + 389
    unet_name, vae_name = "model.diffusion_model.", "first_stage_model."
    clip_l, clip_g = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
    expected = {
        unet_name + "input_blocks.0.0.weight": (320, 4, 3, 3),
        unet_name + "time_embed.2.weight": (1280, 1280),
        unet_name + "label_emb.0.0.weight": (1280, 2816),
        unet_name + "label_emb.0.2.bias": (1280,),
        unet_name + "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        unet_name + "input_blocks.4.0.emb_layers.1.weight": (640, 1280),
        unet_name + "input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        unet_name + "input_blocks.8.1.proj_in.weight": (1280, 1280),
        unet_name + "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        unet_name + "middle_block.2.out_layers.3.weight": (1280, 1280, 3, 3),
        unet_name + "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        unet_name + "output_blocks.5.2.conv.bias": (640,),
        unet_name + "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        unet_name + "out.2.weight": (4, 320, 3, 3),
        vae_name + "encoder.down.0.downsample.conv.weight": (128, 128, 3, 3),
        vae_name + "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        vae_name + "encoder.norm_out.weight": (512,),
        vae_name + "decoder.up.3.block.0.norm1.weight": (512,),
        vae_name + "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        vae_name + "decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        vae_name + "post_quant_conv.weight": (4, 4, 1, 1),
        clip_l + "embeddings.token_embedding.weight": (49408, 768),
        clip_l + "encoder.layers.11.self_attn.q_proj.weight": (768, 768),
        clip_l + "final_layer_norm.bias": (768,),
        clip_g + "positional_embedding": (77, 1280),
        clip_g + "token_embedding.weight": (49408, 1280),
        clip_g + "transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        clip_g + "transformer.resblocks.0.attn.in_proj_bias": (3840,),
        clip_g + "transformer.resblocks.0.attn.out_proj.weight": (1280, 1280),
        clip_g + "transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280),
        clip_g + "transformer.resblocks.0.ln_2.bias": (1280,),
        clip_g + "ln_final.weight": (1280,),
        clip_g + "text_projection": (1280, 1280),
    }
    assert {name: tuple(layout[name].shape) for name in expected if name in layout} == expected
