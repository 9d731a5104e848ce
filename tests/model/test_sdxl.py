"""Loading SDXL: folders, single files, tokenizers, and one clear error for everything that is not an SDXL model."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from nai_xl.errors import UserError
from nai_xl.model.sdxl import check_sdxl, load_sdxl
from nai_xl.model.sdxl.components import Components, fingerprint
from nai_xl.model.sdxl.configs import SDXL_BASE
from nai_xl.model.sdxl.tokenizers import load_tokenizers
from nai_xl.model.single_file import to_single_file

UNET = {
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16, 24),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 2),
    "attention_head_dim": (1, 2, 3),
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "cross_attention_dim": 40,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 24 + 6 * 4,
}
VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (4, 8, 12),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "latent_channels": 4,
    "scaling_factor": 0.13025,
}


def byte_tokenizer(pad: str) -> CLIPTokenizer:
    """CLIP's tokenizer without a single merge: every letter is a token, twice (inside and at the end of a word)."""
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], pad_token=pad, model_max_length=77)


def text_config(width: int, vocabulary: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )


def small_sdxl() -> Components:
    """Every part of SDXL, random, at a few channels' width."""
    tokenizers = (byte_tokenizer("<|endoftext|>"), byte_tokenizer("!"))
    vocabulary = len(tokenizers[0])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        components = Components(
            unet=UNet2DConditionModel(**UNET).eval(),
            vae=AutoencoderKL(**VAE).eval(),
            text_encoders=(
                CLIPTextModel(text_config(16, vocabulary)).eval(),
                CLIPTextModelWithProjection(text_config(24, vocabulary)).eval(),
            ),
            tokenizers=tokenizers,
        )
        # Norms and biases start alike everywhere: only random ones show that none is taken for another.
        for module in modules(components).values():
            for parameter in module.parameters():
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    return components


def modules(components: Components) -> dict[str, Any]:
    first, second = components.text_encoders
    return {"unet": components.unet, "vae": components.vae, "text_encoder": first, "text_encoder_2": second}


def save_folder(components: Components, folder: Path) -> Path:
    for part, module in modules(components).items():
        module.save_pretrained(folder / part)
    for part, tokenizer in zip(("tokenizer", "tokenizer_2"), components.tokenizers, strict=True):
        tokenizer.save_pretrained(folder / part)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return folder


@torch.no_grad()
def outputs(components: Components) -> list[torch.Tensor]:
    """What each of the four models makes of a fixed input."""
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 16, 16, generator=generator)
    latent = components.vae.encode(image).latent_dist.mean
    ids = torch.tensor([[*range(75), 188, 189]])
    first, second = (encoder(ids, output_hidden_states=True) for encoder in components.text_encoders)
    context = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    conditions = {"text_embeds": second.text_embeds, "time_ids": torch.arange(6.0)[None]}
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    predicted = components.unet(noise, 10, context, added_cond_kwargs=conditions).sample
    return [latent, components.vae.decode(latent).sample, first.last_hidden_state, second.text_embeds, predicted]


def assert_same(found: Components, expected: Components) -> None:
    for part, module in modules(found).items():
        weights, others = module.state_dict(), modules(expected)[part].state_dict()
        assert weights.keys() == others.keys()
        for name, weight in weights.items():
            assert weight.dtype == torch.float32
            assert torch.equal(weight, others[name]), f"{part}: {name}"
        assert not module.training
        assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    for one, other in zip(outputs(found), outputs(expected), strict=True):
        assert torch.equal(one, other)


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
def saved(components: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(components, tmp_path_factory.mktemp("sdxl") / "folder")


@pytest.fixture(scope="module")
def saved_file(components: Components, saved: Path) -> Path:
    file = saved.parent / "file.safetensors"
    return to_single_file(components, file, v_prediction=True, zero_terminal_snr=True, dtype=torch.float32)


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.filterwarnings("error")
def test_folder(components: Components, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load_sdxl(saved)
    assert capfd.readouterr() == ("", "")
    assert_same(loaded, components)
    text = "1girl, wow! two"
    assert loaded.tokenizers[0](text).input_ids == components.tokenizers[0](text).input_ids


@pytest.mark.filterwarnings("error")
def test_single_file_is_read_quietly(saved_file: Path, saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_sdxl(saved_file, config=saved)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("single", [False, True])
def test_weights_are_not_tied_to_the_file(folder: Path, saved_file: Path, single: bool) -> None:
    source = Path(shutil.copy(saved_file, folder / "file.safetensors")) if single else folder
    loaded = modules(load_sdxl(source, config=folder))
    marks = {part: fingerprint(module) for part, module in loaded.items()}
    for file in folder.rglob("*.safetensors"):
        with file.open("r+b") as opened:
            opened.seek(-5000, 2)
            opened.write(bytes(5000))
    assert {part: fingerprint(module) for part, module in loaded.items()} == marks


def test_folder_with_only_half_precision(components: Components, folder: Path) -> None:
    for part, stem in (("unet", "diffusion_pytorch_model"), ("text_encoder_2", "model")):
        file = folder / part / f"{stem}.safetensors"
        halves = {name: tensor.half() for name, tensor in load_file(file).items()}
        file.unlink()
        save_file(halves, folder / part / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
    loaded = load_sdxl(folder)
    weight = loaded.unet.conv_in.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, components.unet.conv_in.weight.half().float())
    assert loaded.text_encoders[1].text_projection.weight.dtype == torch.float32


def test_folder_in_shards(components: Components, folder: Path) -> None:
    shutil.rmtree(folder / "unet")
    components.unet.save_pretrained(folder / "unet", max_shard_size="200KB")
    shards = sorted((folder / "unet").glob("*.safetensors"))
    assert len(shards) > 1
    assert fingerprint(load_sdxl(folder).unet) == fingerprint(components.unet)
    shards[1].unlink()
    with pytest.raises(UserError, match=r"-00002-of-\d+\.safetensors cannot be read"):
        check_sdxl(folder)


def test_exclamation_marks_are_text_not_padding(saved: Path) -> None:
    second = load_sdxl(saved).tokenizers[1]
    assert second("a!").input_ids[2] != second.pad_token_id == 0
    assert second("a!", padding="max_length", max_length=8).input_ids[-1] == 0


# What is not an SDXL model


def refuse(match: str, path: Path, config: Path | None = None) -> None:
    with pytest.raises(UserError, match=match) as caught:
        check_sdxl(path, config)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model.")
    with pytest.raises(UserError, match=match):
        load_sdxl(path, config=config)


def test_missing_path(tmp_path: Path) -> None:
    refuse("model.path=.*nowhere: no such file or folder", tmp_path / "nowhere")


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"\x80\x02}q\x00.")
    refuse("pickle.* convert it to .safetensors", file)


def test_other_file(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    refuse("not a .safetensors file", tmp_path / "model.gguf")


def test_folder_without_index(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    refuse("has no model_index.json", folder)


@pytest.mark.parametrize(
    ("pipeline", "what"),
    [
        ("StableDiffusionPipeline", "Stable Diffusion 1.x"),
        ("StableDiffusionXLImg2ImgPipeline", "the SDXL refiner"),
        ("SomeOtherPipeline", "a SomeOtherPipeline; only SDXL base"),
    ],
)
def test_other_pipeline(folder: Path, pipeline: str, what: str) -> None:
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    refuse(what, folder)


def test_broken_index(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")
    refuse("model_index.json is not valid JSON", folder)


def test_missing_subfolders(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "tokenizer_2")
    refuse("lacks vae/, tokenizer_2/", folder)


def test_missing_config(folder: Path) -> None:
    (folder / "text_encoder" / "config.json").unlink()
    refuse("text_encoder/config.json is missing", folder)


def test_missing_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    refuse("tokenizer/ has neither", folder)


def test_other_unet(folder: Path) -> None:
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "addition_embed_type": None}))
    refuse("addition_embed_type None; SDXL's is 'text_time'", folder)


def test_pickled_weights_in_folder(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    refuse(r"unet/ has only pickled weights \(.bin\)", folder)


def test_no_weights_in_folder(folder: Path) -> None:
    (folder / "text_encoder_2" / "model.safetensors").unlink()
    refuse(r"text_encoder_2/ has no weights \(model.safetensors\)", folder)


def test_truncated_weights_in_folder(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refuse("vae/diffusion_pytorch_model.safetensors is corrupt or not completely downloaded", folder)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_missing_tensor_in_folder(folder: Path, part: str) -> None:
    file = folder / f"{part}.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[5]
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"lacks 1 of its tensors, the first being .*{name}"):
        load_sdxl(folder)


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_misshapen_tensor_in_folder(folder: Path, part: str) -> None:
    file = folder / f"{part}.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if tensors[name].dim() == 1)
    save_file({**tensors, name: torch.zeros(3)}, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{part.split('/')[0]}/ cannot be loaded"):
        load_sdxl(folder)


def test_vocabulary_larger_than_the_embedding(folder: Path, saved_file: Path) -> None:
    config = json.loads((SDXL_BASE / "tokenizer" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text(json.dumps(config))
    vocabulary = {**byte_tokenizer("!").get_vocab(), "extra": 500}
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    (folder / "tokenizer_2" / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer_2" / "merges.txt").write_text("#version: 0.2\n")
    for path, option in ((folder, "model.path"), (saved_file, "model.config")):
        with pytest.raises(UserError, match=rf"{option}=.* 501 tokens, but text_encoder_2/ .* only 190"):
            load_sdxl(path, config=folder)


def write(path: Path, names: list[str]) -> Path:
    save_file({name: torch.zeros(1) for name in names}, path)
    return path


@pytest.mark.parametrize(
    ("names", "match"),
    [
        (["cond_stage_model.transformer.text_model.x", "model.diffusion_model.out.2.weight"], "Stable Diffusion 1.x"),
        (["cond_stage_model.model.ln_final.weight"], "Stable Diffusion 2.x"),
        (["lora_unet_down_blocks_1.lora_up.weight", "lora_te1_x.alpha"], "a LoRA"),
        (["unet.down_blocks.1.to_q.lora_A.weight"], "a LoRA"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a UNet alone"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a UNet alone"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "a VAE alone"),
        (["conditioner.embedders.0.model.ln_final.weight", "model.diffusion_model.x"], "the SDXL refiner"),
        (["transformer.double_blocks.0.weight"], "another model"),
    ],
)
def test_other_single_file(tmp_path: Path, names: list[str], match: str) -> None:
    refuse(f"looks like {match}, not a complete SDXL checkpoint", write(tmp_path / "m.safetensors", names))


def test_single_file_without_vae(saved: Path, saved_file: Path, tmp_path: Path) -> None:
    tensors = {name: x for name, x in load_file(saved_file).items() if not name.startswith("first_stage_model")}
    save_file(tensors, tmp_path / "m.safetensors")
    refuse(r"an incomplete SDXL checkpoint, .*\(no VAE\)", tmp_path / "m.safetensors", saved)


@pytest.mark.parametrize("keep", [4, 5000, -100])
def test_truncated_single_file(saved_file: Path, tmp_path: Path, keep: int) -> None:
    (tmp_path / "m.safetensors").write_bytes(saved_file.read_bytes()[:keep])
    refuse("corrupt or not completely downloaded", tmp_path / "m.safetensors")


def test_single_file_of_other_sizes(saved_file: Path) -> None:
    refuse("UNet's width: 8 in the file, 320 in .*set model.config", saved_file)


def test_inpainting_model(saved: Path, saved_file: Path, tmp_path: Path) -> None:
    tensors = load_file(saved_file)
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(8, 9, 3, 3)
    save_file(tensors, tmp_path / "m.safetensors")
    refuse("input channels: 9 in the file, 4 in .*inpainting", tmp_path / "m.safetensors", saved)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model.diffusion_model.out.2.weight": None}, "UNet does not fit .*conv_out.weight is missing"),
        ({"first_stage_model.decoder.mid.attn_1.q.bias": torch.zeros(3)}, r"VAE does not fit .* is \[3\], by .*\[12\]"),
        ({"conditioner.embedders.1.model.text_projection": None}, "second text encoder does not fit"),
        (
            {"conditioner.embedders.0.transformer.text_model.encoder.layers.7.mlp.fc1.bias": torch.zeros(3)},
            "first text encoder does not fit .*not in the config",
        ),
    ],
)
def test_single_file_that_does_not_fit(
    saved: Path, saved_file: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], match: str
) -> None:
    tensors = {**load_file(saved_file), **change}
    save_file({name: x for name, x in tensors.items() if x is not None}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match=match):
        load_sdxl(tmp_path / "m.safetensors", config=saved)


def test_bad_config_folder(saved_file: Path, tmp_path: Path) -> None:
    refuse("model.config=.*nowhere: no such folder", saved_file, tmp_path / "nowhere")
    (tmp_path / "unet").mkdir()
    refuse("model.config=.*lacks vae/, text_encoder/", saved_file, tmp_path)


# The shipped folder


def test_shipped_configs_are_sdxl_base() -> None:
    unet_config = UNet2DConditionModel.load_config(SDXL_BASE / "unet")
    vae_config = AutoencoderKL.load_config(SDXL_BASE / "vae")
    assert (vae_config["scaling_factor"], vae_config["force_upcast"]) == (0.13025, True)
    with init_empty_weights():
        unet, vae = UNet2DConditionModel.from_config(unet_config), AutoencoderKL.from_config(vae_config)
        first = CLIPTextModel(CLIPTextConfig.from_pretrained(SDXL_BASE / "text_encoder"))
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(SDXL_BASE / "text_encoder_2"))

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    assert size(unet) == 2_567_463_684
    assert len(unet.state_dict()) == 1680
    assert size(vae) == 83_653_863
    assert size(first) == 123_060_480
    assert size(second) == 694_659_840


def test_shipped_assets_are_small() -> None:
    assert sum(file.stat().st_size for file in SDXL_BASE.rglob("*")) < 1_500_000


def test_shipped_vocabulary() -> None:
    first, second = load_tokenizers(SDXL_BASE, "model.config")
    cat = [49406, 320, 1125, 539, 320, 2368, 49407]
    assert len(first) == len(second) == 49_408
    assert first("a photo of a cat").input_ids == second("a photo of a cat").input_ids == cat
    assert first("A  Photo\nof a CAT").input_ids == cat
    assert first("a", padding="max_length").input_ids == [49406, 320, *[49407] * 75]
    assert second("a", padding="max_length").input_ids == [49406, 320, 49407, *[0] * 74]
    # 256 is "!</w>", as open_clip has it; the padding's id 0 would be an exclamation mark inside a word.
    assert first("wow!").input_ids == second("wow!").input_ids == [49406, 2781, 256, 49407]
    assert (
        first.decode(first("1girl, blue_eyes é 猫").input_ids, skip_special_tokens=True) == "1 girl , blue _ eyes é 猫"
    )


# Fingerprints


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fingerprint(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype)
    mark = fingerprint(module)
    assert len(mark) == 16
    assert int(mark, 16) >= 0
    assert fingerprint(module) == mark
    with torch.no_grad():
        next(module.parameters())[1, 1] += 1
    assert fingerprint(module) != mark


def test_fingerprint_tells_shapes_names_and_dtypes() -> None:
    def module(**buffers: torch.Tensor) -> nn.Module:
        built = nn.Module()
        for name, tensor in buffers.items():
            built.register_buffer(name, tensor)
        return built

    zeros = torch.zeros(2, 6)
    others = [
        module(a=zeros),
        module(b=zeros),
        module(a=zeros.view(3, 4)),
        module(a=zeros.int()),
        module(a=torch.zeros(0)),
        module(a=zeros, b=torch.tensor(0)),
    ]
    assert len({fingerprint(other) for other in others}) == len(others)
    stepped = torch.arange(12.0).view(3, 4)
    assert fingerprint(module(a=stepped.T)) == fingerprint(module(a=stepped.T.contiguous()))
    assert fingerprint(module(a=zeros, b=stepped)) == fingerprint(module(b=stepped, a=zeros))
