"""Captions that are longer than text.chunks holds: how many there are, what would hold them, and what is cut off."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from nai_xl.data.captions import Captions
from nai_xl.data.loader import shortened
from nai_xl.data.rows import Item
from nai_xl.distributed import activity
from nai_xl.model.text import CHUNK, beginning

LOOKED_AT = 10_000  # captions that are tokenised at most, in some seconds
COUNTED = 100 * CHUNK  # tokens at which counting ends


class TooLong(NamedTuple):
    """beyond: the words that are cut off."""

    file: str
    tokens: int
    beyond: str


def told(items: Sequence[Item], captions: Captions, tokenizer: Any, chunks: int) -> list[str]:
    """A sentence on captions of more than `chunks` pieces of 75 tokens; none where all fit.

    Only what may be too long by its bytes is tokenised, and of more than LOOKED_AT of those as many, evenly spread.
    """
    limit = CHUNK * chunks
    suspects = [i for i, item in enumerate(items) if may_exceed(captions.whole(item.caption), limit)]
    some = suspects[:: -(-len(suspects) // LOOKED_AT) or 1]
    found = []
    activity.doing("measuring the captions")
    with tqdm(some, desc="measuring captions", disable=len(some) < LOOKED_AT // 10) as bar:
        for i in bar:
            activity.beat()
            if too_long := _measured(tokenizer, items[i], captions.whole(items[i].caption), limit):
                found.append(too_long)
    if not found:
        return []
    longest, first = max(row.tokens for row in found), found[0]
    among = f"{len(items):,} captions"
    if len(some) < len(suspects):
        among = f"{len(some):,} long captions that were looked at, among {among},"
    more = "more than " if longest == COUNTED else ""
    return [
        f"{len(found):,} of {among} have more tokens than the {limit} of text.chunks={chunks} and lose their "
        f"end; the longest has {more}{longest:,}, which text.chunks={-(-longest // CHUNK)} holds. {first.file} has "
        f"{first.tokens:,} and loses {shortened(first.beyond)}"
    ]


def may_exceed(text: str, tokens: int) -> bool:
    """Whether a text can have more than so many tokens: each takes a byte at least, once the text is normalised."""
    if len(text) <= tokens and text.isascii():
        return False
    return len(unicodedata.normalize("NFC", text).lower().encode(errors="replace")) > tokens


def _measured(tokenizer: Any, item: Item, text: str, limit: int) -> TooLong | None:
    text = beginning(text, COUNTED)
    told = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
    )
    count = min(len(told.input_ids), COUNTED)
    if count <= limit:
        return None
    return TooLong(item.path.name, count, text[told.offset_mapping[limit][0] :].strip())
