"""Captions that are longer than text.chunks holds: how many there are, what would hold them, and what is cut off."""

from __future__ import annotations

import unicodedata
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from nai_xl.data.captions import Captions
from nai_xl.data.loader import shortened
from nai_xl.data.rows import Rows
from nai_xl.distributed import activity
from nai_xl.model.text import CHUNK, beginning

LOOKED_AT = 5_000  # images whose captions are tokenised at most, in a second or two
COUNTED = 100 * CHUNK  # tokens at which counting ends
GROWTH = 4.5  # of a text's bytes: three times when Unicode composes it, half as much again in small letters


class TooLong(NamedTuple):
    """beyond: the words that are cut off."""

    file: str
    tokens: int
    beyond: str


def told(rows: Rows, captions: Captions, tokenizer: Any, chunks: int) -> list[str]:
    """A sentence on captions of more than `chunks` pieces of 75 tokens; none where all fit.

    Only what may be too long by its bytes is tokenised, and of more than LOOKED_AT images some, evenly spread.
    """
    limit = CHUNK * chunks
    suspects = may_exceed(rows, limit, added=_bytes(captions.whole("")))
    some = suspects[:: -(-len(suspects) // LOOKED_AT) or 1]
    found: list[TooLong] = []
    count = 0
    activity.doing("measuring the captions")
    with tqdm(some.tolist(), desc="measuring captions", disable=len(some) < LOOKED_AT // 10) as bar:
        for item in map(rows.__getitem__, bar):
            activity.beat()
            count += len(item.captions)
            texts = map(captions.whole, item.captions)
            found += [one for text in texts if (one := _measured(tokenizer, item.path.name, text, limit))]
    if not found:
        return []
    longest, first = max(one.tokens for one in found), found[0]
    lengths = pc.list_value_length(rows.table["captions"]).to_numpy()
    among = f"{(lengths if rows.picked is None else lengths[rows.picked]).sum():,} captions"
    if len(some) < len(suspects):
        among = f"{count:,} long captions that were looked at, among {among},"
    more = "more than " if longest == COUNTED else ""
    return [
        f"{len(found):,} of {among} have more tokens than the {limit} of text.chunks={chunks} and lose their end; the "
        f"longest has {more}{longest:,}, which text.chunks={-(-longest // CHUNK)} holds. {first.file} has "
        f"{first.tokens:,} and loses {shortened(first.beyond)}"
    ]


def may_exceed(rows: Rows, tokens: int, *, added: int = 0) -> NDArray[np.intp]:
    """The numbers of items with a caption that can have more than so many tokens: each token takes a byte at least.

    added: bytes that are put before and behind a caption.
    """
    marks = [np.zeros(0, np.bool_)]
    for chunk in rows.table["captions"].chunks:
        size, letters = (count(chunk.flatten()).to_numpy() for count in (pc.binary_length, pc.utf8_length))
        long = np.where(size == letters, size, GROWTH * size) + added > tokens
        mark = np.zeros(len(chunk), np.bool_)
        mark[pc.list_parent_indices(chunk).to_numpy()[long]] = True
        marks.append(mark)
    marked = np.concatenate(marks)
    return np.flatnonzero(marked if rows.picked is None else marked[rows.picked])


def _bytes(text: str) -> int:
    """Of a text as tokenizers normalise it."""
    return len(unicodedata.normalize("NFC", text).lower().encode(errors="replace"))


def _measured(tokenizer: Any, file: str, text: str, limit: int) -> TooLong | None:
    text = beginning(text, COUNTED)
    told = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    count = min(len(told.input_ids), COUNTED)
    if count <= limit:
        return None
    return TooLong(file, count, text[told.offset_mapping[limit][0] :].strip())
