"""Text conditions by SDXL's rule: penultimate states of both encoders side by side, pooled of the second.

Sources: [SDXL] Podell et al. 2307.01952, section 2; chunks of 75 tokens: NovelAI V3, 2409.15997, section 4.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from nai_xl.errors import UserError
from nai_xl.interfaces import Batch

CHUNK = 75  # tokens between a chunk's BOS and EOS
TOGETHER = 8  # captions, or chunks, that are encoded at once: always as many, since other sizes round differently
RECENT = 64  # texts of evaluators whose conditions are kept, 20 MB for SDXL


@dataclass(frozen=True)
class TextEncoding:
    """`chunks` pieces of 75 tokens a caption, each with its own BOS and EOS; more text than that is cut off.

    All captions are encoded in float32 before training, and kept as `dtype`: by default bf16 if the network computes in
    bfloat16, which would round them anyway, else fp32.
    """

    in_step: ClassVar[bool] = False

    chunks: int = 1
    dtype: Literal["fp32", "bf16"] | None = None

    def __post_init__(self) -> None:
        _refuse_none(self.chunks)

    def kept_as(self, compute_dtype: torch.dtype) -> Literal["fp32", "bf16"]:
        """The dtype in the cache, for a network that computes in `compute_dtype`."""
        return self.dtype or ("bf16" if compute_dtype == torch.bfloat16 else "fp32")


@dataclass(frozen=True)
class LiveText:
    """`chunks` pieces of 75 tokens a caption, as text=cached has them, encoded in each step on the device.

    Copies of both encoders stay there, in the precision that the network computes in: 1.6 GB for SDXL in 16 bits.
    """

    in_step: ClassVar[bool] = True

    chunks: int = 1

    def __post_init__(self) -> None:
        _refuse_none(self.chunks)


def _refuse_none(chunks: int) -> None:
    if chunks < 1:
        raise UserError(f"text.chunks={chunks}: must be at least 1")


def tokenize(tokenizer: Any, texts: Sequence[str], chunks: int) -> Tensor:
    """[B, chunks, 77] int64. Captions that are too short are filled up with empty chunks."""
    rows = []
    for text in texts:
        # a "!" or "<|endoftext|>" in a caption is text, not the second tokenizer's padding
        ids = tokenizer(
            beginning(text, CHUNK * chunks), add_special_tokens=False, split_special_tokens=True, verbose=False
        ).input_ids[: CHUNK * chunks]
        pieces = [ids[i * CHUNK : (i + 1) * CHUNK] for i in range(chunks)]
        rows.append([_framed(tokenizer, piece) for piece in pieces])
    return torch.tensor(rows)


def beginning(text: str, tokens: int) -> str:
    """As much of a text as its first `tokens` tokens take, since every word has one at least: a text may be long."""
    words = text.split(maxsplit=tokens + 1)
    return text if len(words) <= tokens + 1 else text[: -len(words[-1])]


def _framed(tokenizer: Any, piece: list[int]) -> list[int]:
    framed = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
    return framed + [tokenizer.pad_token_id] * (CHUNK + 2 - len(framed))


def encode_texts(
    tokenizers: Sequence[Any], encoders: Sequence[nn.Module], texts: Sequence[str], *, chunks: int
) -> tuple[Tensor, Tensor]:
    """context [B, 77 chunks, D1 + D2] and pooled [B, P], float32. Pooled is the first chunk's."""
    ids = torch.stack([tokenize(tokenizer, texts, chunks) for tokenizer in tokenizers], dim=2)
    states, pooled = encode_chunks(encoders, ids.flatten(0, 1))
    rows = (len(texts), chunks)
    return states.float().unflatten(0, rows).flatten(1, 2), pooled.float().unflatten(0, rows)[:, 0]


@torch.no_grad()
def encode_chunks(encoders: Sequence[nn.Module], ids: Tensor) -> tuple[Tensor, Tensor]:
    """States [n,77,D1 + D2] and pooled [n,P] of chunks in the encoders' precision. ids: [n,2,77] of both tokenizers."""
    states = []
    pooled = torch.empty(0)
    for number, encoder in enumerate(encoders):
        out = encoder(ids[:, number].to(next(encoder.parameters()).device), output_hidden_states=True)
        states.append(out.hidden_states[-2])
        if hasattr(out, "text_embeds"):
            pooled = out.text_embeds
    return torch.cat(states, dim=-1), pooled


# --- text=live --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """What a loader's worker tells of texts that the step will encode."""

    tokenizers: Sequence[Any]
    chunks: int

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The fields of a Batch, whose context and pooled are still empty. A chunk that occurs twice is there once."""
        ids = torch.stack([tokenize(tokenizer, texts, self.chunks) for tokenizer in self.tokenizers], dim=2)
        distinct, place = torch.unique(ids.flatten(0, 1), dim=0, return_inverse=True)
        filled = -(-len(distinct) // TOGETHER) * TOGETHER - len(distinct)
        return {
            "context": torch.empty(len(texts), 0, 0),
            "pooled": torch.empty(len(texts), 0),
            "tokens": torch.cat([distinct, distinct[-1:].expand(filled, -1, -1)]),
            "chunks": place.view(len(texts), self.chunks),
        }


@dataclass
class LiveEncoders:
    """Frozen text encoders on the device, which encode TOGETHER chunks at a time, whatever batch they belong to."""

    encoders: Sequence[nn.Module]
    tokens: Tokens
    _recent: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        tokenizers: Sequence[Any],
        encoders: Sequence[nn.Module],
        chunks: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> LiveEncoders:
        """Copies of `encoders`, which themselves stay as they are, to be delivered."""
        copies = [copy.deepcopy(encoder).to(device, dtype).eval().requires_grad_(False) for encoder in encoders]
        return cls(copies, Tokens(tokenizers, chunks))

    def encoded(self, batch: Batch) -> Batch:
        """The batch with context and pooled, made of its tokens; nothing waits for the device."""
        parts = [encode_chunks(self.encoders, ids) for ids in batch.tokens.split(TOGETHER)]
        states, pooled = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return replace(batch, context=states[batch.chunks].flatten(1, 2), pooled=pooled[batch.chunks[:, 0]])

    def condition(self, text: str) -> tuple[Tensor, Tensor]:
        """context [77k,D] and pooled [P], float32, of an evaluator's text."""
        found = self._recent.pop(text, None) or self._condition(text)
        self._recent[text] = found  # the last one again
        if len(self._recent) > RECENT:
            del self._recent[next(iter(self._recent))]
        return found

    def _condition(self, text: str) -> tuple[Tensor, Tensor]:
        told = self.tokens([text])
        states, pooled = encode_chunks(self.encoders, told["tokens"])
        places = told["chunks"][0].to(states.device)
        return states[places].flatten(0, 1).float(), pooled[places[0]].float()
