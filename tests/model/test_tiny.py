"""model=tiny: SDXL in every respect but its size."""

import json
from pathlib import Path

import pytest
import torch

import nai_xl
from nai_xl.data.source.photographs import RECIPE
from nai_xl.model.sdxl.components import Components, fingerprint
from nai_xl.model.sdxl.configs import SDXL_BASE
from nai_xl.model.text import encode_texts
from nai_xl.model.tiny import byte_symbols, tiny_sdxl

ASSETS = Path(nai_xl.__file__).parent / "assets"


@pytest.fixture(scope="module")
def tiny() -> Components:
    return tiny_sdxl(seed=0)


def published(part: str) -> dict[str, object]:
    """SDXL base 1.0's own config of one part."""
    return dict(json.loads((SDXL_BASE / part / "config.json").read_text(encoding="utf-8")))


def test_unet_has_the_topology_of_sdxl(tiny: Components) -> None:
    ours, theirs = dict(tiny.unet.config), published("unet")
    same = "down_block_types up_block_types in_channels out_channels use_linear_projection addition_embed_type act_fn"
    for key in same.split():
        found = ours[key]
        assert (list(found) if isinstance(found, tuple) else found) == theirs[key], key
    first, second = (encoder.config for encoder in tiny.text_encoders)
    assert ours["cross_attention_dim"] == first.hidden_size + second.hidden_size
    times = ours["projection_class_embeddings_input_dim"] - 6 * ours["addition_time_embed_dim"]
    assert times == second.projection_dim
    assert theirs["projection_class_embeddings_input_dim"] - 6 * theirs["addition_time_embed_dim"] == 1280  # type: ignore[operator]


def test_vae_has_the_topology_of_sdxl(tiny: Components) -> None:
    ours, theirs = dict(tiny.vae.config), published("vae")
    for key in ("down_block_types", "up_block_types"):
        assert list(ours[key]) == theirs[key]
    for key in ("in_channels", "out_channels", "latent_channels"):
        assert ours[key] == theirs[key]
    assert len(ours["block_out_channels"]) == len(theirs["block_out_channels"])  # type: ignore[arg-type]


def test_text_encoders_and_tokenizers_are_of_sdxls_two_kinds(tiny: Components) -> None:
    for number, (encoder, part) in enumerate(zip(tiny.text_encoders, ("text_encoder", "text_encoder_2"), strict=True)):
        assert encoder.config.hidden_act == published(part)["hidden_act"]
        assert [type(encoder).__name__] == published(part)["architectures"]
        assert hasattr(encoder, "text_projection") == bool(number)
        assert encoder.config.eos_token_id == tiny.tokenizers[number].eos_token_id
    assert [tokenizer.pad_token for tokenizer in tiny.tokenizers] == ["<|endoftext|>", "!"]
    assert tiny.tokenizers[0].get_vocab() == tiny.tokenizers[1].get_vocab()
    assert all(tokenizer.model_max_length == 77 for tokenizer in tiny.tokenizers)


def test_only_the_unet_depends_on_the_seed(tiny: Components) -> None:
    again, other = tiny_sdxl(seed=0), tiny_sdxl(seed=1)
    assert fingerprint(again.unet) == fingerprint(tiny.unet)
    assert fingerprint(other.unet) != fingerprint(tiny.unet)
    for found in (again, other):
        assert fingerprint(found.vae) == fingerprint(tiny.vae)
        assert list(map(fingerprint, found.text_encoders)) == list(map(fingerprint, tiny.text_encoders))


def test_building_leaves_the_global_generator_alone_and_does_not_listen_to_it(tiny: Components) -> None:
    torch.manual_seed(12345)
    before = torch.get_rng_state()
    built = tiny_sdxl(seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert fingerprint(built.unet) == fingerprint(tiny.unet)


def test_only_the_unet_is_trained(tiny: Components) -> None:
    assert all(p.requires_grad for p in tiny.unet.parameters())
    for module in (tiny.vae, *tiny.text_encoders):
        assert not any(p.requires_grad for p in module.parameters())
        assert not module.training


def test_common_words_are_single_tokens(tiny: Components) -> None:
    words = {word for item in RECIPE for word in item.caption.replace(",", " ").split()}
    words |= set("red green blue cat dog house tree portrait landscape masterpiece completely a the of".split())
    tokenizer = tiny.tokenizers[0]
    assert [word for word in sorted(words) if len(tokenizer(word, add_special_tokens=False).input_ids) != 1] == []


@pytest.mark.parametrize("text", ["zyxwvu", "Ünïcödé", "猫 🐈", "a\tb\nc", "\x00\x7f"])
def test_any_other_text_falls_to_bytes_and_never_to_the_unknown_token(tiny: Components, text: str) -> None:
    for tokenizer in tiny.tokenizers:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert ids
        assert tokenizer.eos_token_id not in ids


def test_byte_alphabet_has_256_symbols_and_begins_with_the_exclamation_mark() -> None:
    symbols = byte_symbols()
    assert len(set(symbols)) == len(symbols) == 256
    assert symbols[0] == "!"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a completely red image", "a completely blue image"),
        ("a black cat on a table", "a black dog on a table"),
        ("a tall white rocket at night", "a tall white tower at night"),
        ("a cat", ""),
    ],
)
def test_captions_that_differ_in_one_word_differ_clearly(tiny: Components, one: str, other: str) -> None:
    context, pooled = encode_texts(tiny.tokenizers, tiny.text_encoders, [one, other], chunks=1)
    change = (context[0] - context[1]).norm(dim=1) / context[0].norm(dim=1)
    assert change.max() > 0.5  # at the word itself
    assert (context[0] - context[1]).norm() > 0.1 * context[0].norm()
    assert (pooled[0] - pooled[1]).norm() > 0.2 * pooled[0].norm()


def test_small_enough_to_ship() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 8 * 2**20


def test_unet_takes_every_bucket_of_its_size(tiny: Components) -> None:
    context, pooled = encode_texts(tiny.tokenizers, tiny.text_encoders, ["a cat"], chunks=1)
    for height, width in ((16, 16), (12, 20), (32, 8)):
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[128.0, 128, 0, 0, height * 8, width * 8]])}
        with torch.no_grad():
            out = tiny.unet(torch.zeros(1, 4, height, width), 999, context, added_cond_kwargs=added).sample
        assert out.shape == (1, 4, height, width)
        assert out.isfinite().all()
