"""Text conditions by SDXL's rule: penultimate states of both encoders side by side, pooled of the second.

Sources: [SDXL] Podell et al. 2307.01952, section 2; chunks of 75 tokens: NovelAI V3, 2409.15997, section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nai_xl.errors import UserError

CHUNK = 75  # tokens between a chunk's BOS and EOS


@dataclass(frozen=True)
class TextEncoding:
    """`chunks` pieces of 75 tokens a caption, each with its own BOS and EOS; more text than that is cut off."""

    chunks: int = 1

    def __post_init__(self) -> None:
        if self.chunks < 1:
            raise UserError(f"text.chunks={self.chunks}: must be at least 1")


def tokenize(tokenizer: Any, texts: Sequence[str], chunks: int) -> Tensor:
    """[B, chunks, 77] int64. Captions that are too short are filled up with empty chunks."""
    rows = []
    for text in texts:
        # a "!" or "<|endoftext|>" in a caption is text, not the second tokenizer's padding
        ids = tokenizer(
            _beginning(text, CHUNK * chunks), add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids[: CHUNK * chunks]
        pieces = [ids[i * CHUNK : (i + 1) * CHUNK] for i in range(chunks)]
        rows.append([_framed(tokenizer, piece) for piece in pieces])
    return torch.tensor(rows)


def _beginning(text: str, tokens: int) -> str:
    """As much of a text as its first `tokens` tokens take, since every word has one at least: a text may be long."""
    words = text.split(maxsplit=tokens + 1)
    return text if len(words) <= tokens + 1 else text[: -len(words[-1])]


def _framed(tokenizer: Any, piece: list[int]) -> list[int]:
    framed = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
    return framed + [tokenizer.pad_token_id] * (CHUNK + 2 - len(framed))


@torch.no_grad()
def encode_texts(
    tokenizers: Sequence[Any], encoders: Sequence[nn.Module], texts: Sequence[str], *, chunks: int
) -> tuple[Tensor, Tensor]:
    """context [B, 77 chunks, D1 + D2] and pooled [B, P], float32. Pooled is the first chunk's."""
    states = []
    pooled = torch.empty(0)
    for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
        device = next(encoder.parameters()).device
        ids = tokenize(tokenizer, texts, chunks).to(device)
        out = encoder(ids.flatten(0, 1), output_hidden_states=True)
        states.append(out.hidden_states[-2].float().unflatten(0, (len(texts), chunks)).flatten(1, 2))
        if hasattr(out, "text_embeds"):
            pooled = out.text_embeds.float().unflatten(0, (len(texts), chunks))[:, 0]
    return torch.cat(states, dim=-1), pooled
