"""SDXL's two tokenizers: from their own files, or from CLIP's vocabulary."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from nai_xl.model.sdxl.configs import TOKENIZERS, VOCABULARY, text_config
from nai_xl.model.sdxl.files import read_json, refusal


def load_tokenizers(folder: Path, option: str) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Both tokenizers of a folder, which config key `option` names. Raises UserError where they do not fit it."""
    first, second = (_load_tokenizer(folder, part, option) for part in TOKENIZERS)
    return first, second


def _load_tokenizer(folder: Path, part: str, option: str) -> CLIPTokenizer:
    """One tokenizer, from its own files or the folder's CLIP vocabulary; UserError if its ids exceed the embedding."""
    if (folder / VOCABULARY).is_file():
        settings = read_json(folder / part / "tokenizer_config.json", folder, option)
        del settings["tokenizer_class"]
        vocabulary, merges = _clip_vocabulary(folder / VOCABULARY)
        tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, **settings)
    else:
        tokenizer = CLIPTokenizer.from_pretrained(folder / part, local_files_only=True)
    encoder = part.replace("tokenizer", "text_encoder")
    rows = text_config(folder, encoder, option).vocab_size
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        raise refusal(folder, f"{part}/ has {needed} tokens, but {encoder}/ has embeddings for only {rows}", option)
    if tokenizer.pad_token != tokenizer.eos_token:
        # The second tokenizer pads with "!", an ordinary character: read as a special token, each "!" of a caption
        # would become padding (id 0), where open_clip, which the encoder was trained with, gives "!</w>" (id 256).
        tokenizer.split_special_tokens = True
    return tokenizer


def _clip_vocabulary(path: Path) -> tuple[dict[str, int], Any]:
    """CLIP's 49,408 tokens with their ids, and its 48,894 merges, pairs of tokens, in order of priority."""
    with gzip.open(path, mode="rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[1:48895]
    merges = [(left, right) for left, right in (line.split() for line in lines)]
    # Each byte is written as one printable character: itself where it has one, else the next one from 256 on.
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(code) for code in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = letters + [letter + "</w>" for letter in letters] + [left + right for left, right in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: i for i, token in enumerate(tokens)}, merges
