"""Text conditions against diffusers' own pipeline, and captions of more than 75 tokens."""

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from nai_xl.errors import UserError
from nai_xl.model.sdxl.components import Components
from nai_xl.model.text import TextEncoding, encode_texts, tokenize
from nai_xl.model.tiny import WIDTHS, tiny_sdxl

PROMPTS = ["", "a red cup of coffee on a table", "Ünïcödé 猫, 1girl", "black white " * 60]


@pytest.fixture(scope="module")
def tiny() -> Components:
    return tiny_sdxl(seed=0)


def encode(tiny: Components, texts: list[str], chunks: int = 1) -> tuple[Tensor, Tensor]:
    return encode_texts(tiny.tokenizers, tiny.text_encoders, texts, chunks=chunks)


def words(count: int, start: int = 0) -> str:
    """That many words which are one token each."""
    return " ".join(["red", "cat", "house", "tree", "dog", "sky", "blue"][(start + i) % 7] for i in range(count))


def test_one_chunk_is_what_diffusers_pipeline_encodes(tiny: Components) -> None:
    pipeline = StableDiffusionXLPipeline(
        vae=tiny.vae,
        text_encoder=tiny.text_encoders[0],
        text_encoder_2=tiny.text_encoders[1],
        tokenizer=tiny.tokenizers[0],
        tokenizer_2=tiny.tokenizers[1],
        unet=tiny.unet,
        scheduler=DDIMScheduler(),
        add_watermarker=False,
    )
    context, pooled = encode(tiny, PROMPTS)
    assert context.shape == (len(PROMPTS), 77, sum(WIDTHS))
    for row, prompt in enumerate(PROMPTS):
        expected, _, expected_pooled, _ = pipeline.encode_prompt(
            prompt, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        torch.testing.assert_close(context[row], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(pooled[row], expected_pooled[0], atol=1e-5, rtol=1e-5)


def test_company_in_the_batch_changes_nothing(tiny: Components) -> None:
    together = encode(tiny, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        for whole, alone in zip(together, encode(tiny, [prompt]), strict=True):
            torch.testing.assert_close(whole[row], alone[0], atol=1e-5, rtol=1e-5)


def test_long_caption_is_its_pieces_of_75_tokens_each_encoded_alone(tiny: Components) -> None:
    context, pooled = encode(tiny, [words(100)], chunks=2)
    first, first_pooled = encode(tiny, [words(75)])
    second, _ = encode(tiny, [words(25, start=75)])
    assert context.shape == (1, 154, sum(WIDTHS))
    torch.testing.assert_close(context[:, :77], first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(context[:, 77:], second, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, first_pooled, atol=1e-5, rtol=1e-5)


def test_short_caption_is_filled_up_with_empty_chunks(tiny: Components) -> None:
    context, pooled = encode(tiny, [words(5)], chunks=3)
    short, short_pooled = encode(tiny, [words(5)])
    empty, _ = encode(tiny, [""])
    torch.testing.assert_close(context, torch.cat([short, empty, empty], dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pooled, short_pooled, atol=1e-5, rtol=1e-5)


def test_every_chunk_has_its_own_begin_and_end_and_text_beyond_the_last_is_cut_off(tiny: Components) -> None:
    for tokenizer in tiny.tokenizers:
        ids = tokenize(tokenizer, [words(75), words(76), words(500)], 2)
        assert ids.shape == (3, 2, 77)
        assert (ids[:, :, 0] == tokenizer.bos_token_id).all()
        ends = [[int((row == tokenizer.eos_token_id).int().argmax()) for row in caption] for caption in ids]
        assert ends == [[76, 1], [76, 2], [76, 76]]
        assert torch.equal(ids[1, 0], ids[2, 0])


def test_second_encoder_is_padded_with_exclamation_marks_and_the_first_with_ends(tiny: Components) -> None:
    first, second = (tokenize(tokenizer, ["a cat"], 1)[0, 0] for tokenizer in tiny.tokenizers)
    assert (first[4:] == tiny.tokenizers[0].eos_token_id).all()
    assert (second[4:] == 0).all()
    assert tiny.tokenizers[1].convert_ids_to_tokens(0) == "!"


@pytest.mark.parametrize("special", ["!", "<|endoftext|>", "<|startoftext|>"])
def test_special_tokens_written_in_a_caption_are_plain_text(tiny: Components, special: str) -> None:
    for tokenizer in tiny.tokenizers:
        ids = tokenize(tokenizer, [f"a cat {special} on a table"], 1)[0, 0]
        assert (ids == tokenizer.bos_token_id).sum() == 1
        end = int((ids == tokenizer.eos_token_id).int().argmax())
        assert end >= 7  # five words, the special one, the beginning
        assert (ids[1:end] != tokenizer.pad_token_id).all()
        assert (ids[end:] == ids[-1]).sum() >= 76 - end  # padding only


def test_exclamation_mark_in_a_caption_is_heard(tiny: Components) -> None:
    plain, marked = (encode(tiny, [text])[0] for text in ("a cat", "a cat!"))
    assert (plain - marked).norm() > 0.05 * plain.norm()


def test_no_chunk_at_all_is_refused() -> None:
    with pytest.raises(UserError, match=r"text\.chunks"):
        TextEncoding(chunks=0)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("text", [
    "a cat, " * 5000,
    "  led\x1cby \u2003 spaces\n\n" * 400 + " ",
    "word " * (75 * 3) + "!?" * 300,
    "x" * 4000,
    "漢字 " * 400,
    "short",
    "",
], ids=range(7))  # fmt: skip
def test_a_long_caption_has_the_tokens_of_its_whole_text(tiny: Components, text: str, chunks: int) -> None:
    for tokenizer in tiny.tokenizers:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
        found = tokenize(tokenizer, [text], chunks)[0]
        for number, piece in enumerate(found.tolist()):
            expected = ids[75 * number : 75 * (number + 1)]
            assert piece[1 : 1 + len(expected)] == expected and piece[1 + len(expected)] == tokenizer.eos_token_id
