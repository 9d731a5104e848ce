"""Which columns of a table hold the images and the captions, and what one value of them is."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.types as kinds

from nai_xl.data.source.caption_files import listed
from nai_xl.data.source.part import Fault
from nai_xl.errors import UserError

IMAGE = "image jpg jpeg png webp img picture image_bytes bytes file_name filename file path image_path url image_url"
CAPTION = "text caption captions texts prompt description txt label_text tags"
UNDECODED = re.compile("[\udc80-\udcff]")  # PEP 383: what stands for bytes that are no UTF-8


class Columns(NamedTuple):
    image: str
    caption: str


def found(names: Sequence[str], image: str | None, caption: str | None, where: str) -> Columns:
    """The columns that settings name, or those of a usual name. Raises UserError, which lists the columns, for none."""
    return Columns(
        _one(names, image, IMAGE.split(), "data.image", "images", where),
        _one(names, caption, CAPTION.split(), "data.caption", "captions", where),
    )


def _one(names: Sequence[str], asked: str | None, usual: Sequence[str], key: str, what: str, where: str) -> str:
    shown = ", ".join(names) or "none at all"
    if asked is not None and asked not in names:
        raise UserError(f"{key}={asked}: no such column in {where}; there is {shown}")
    if asked is None and not (found := [name for name in usual if name in names]):
        raise UserError(f"{where} has no column of {what} that has a usual name; set {key}=COLUMN, of {shown}")
    return asked or found[0]


def refuse_kinds(schema: pa.Schema, columns: Columns, where: str) -> None:
    """Raise UserError for a column of images or captions that is not there or cannot hold any."""
    for column in columns:
        if column not in schema.names:
            raise UserError(f"{where} has no column {column}, as other files have; there is {', '.join(schema.names)}")
    image, caption = schema.field(columns.image).type, schema.field(columns.caption).type
    if not (is_text(image) or is_bytes(image) or _is_image(image)):
        raise UserError(
            f"data.image={columns.image}: {image} in {where}; images are bytes, {{bytes, path}}, or names and addresses"
        )
    if not (is_text(caption) or (_is_list(caption) and is_text(caption.value_type))):
        raise UserError(f"data.caption={columns.caption}: {caption} in {where}; captions are texts or lists of texts")


def is_bytes(kind: pa.DataType) -> bool:
    return kinds.is_binary(kind) or kinds.is_large_binary(kind) or kinds.is_binary_view(kind)


def is_text(kind: pa.DataType) -> bool:
    if kinds.is_dictionary(kind):
        return is_text(kind.value_type)
    return kinds.is_string(kind) or kinds.is_large_string(kind) or kinds.is_string_view(kind) or kinds.is_null(kind)


def _is_list(kind: pa.DataType) -> bool:
    return kinds.is_list(kind) or kinds.is_large_list(kind)


def _is_image(kind: pa.DataType) -> bool:
    """As `datasets` writes its feature Image."""
    names = {kind.field(n).name: kind.field(n).type for n in range(kind.num_fields)} if kinds.is_struct(kind) else {}
    return "bytes" in names and is_bytes(names["bytes"])


def as_image(value: Any) -> tuple[bytes | None, str | None]:
    """Bytes, or the name or address of a file, of one value."""
    if isinstance(value, dict):
        data, path = value.get("bytes"), value.get("path")
        return (data, None) if data is not None else (None, path or None)
    if isinstance(value, str):
        return None, value or None
    return (value, None) if isinstance(value, bytes) else (None, None)


def as_captions(value: Any) -> list[str] | Fault:
    """Those of one value."""
    captions = listed(value)
    if captions is None:
        return Fault("no caption", "no caption in this row")
    if any(UNDECODED.search(text) for text in ([value] if isinstance(value, str) else value)):
        return Fault("undecodable caption", "the caption is not UTF-8; save the table in UTF-8")
    if any("\0" in text for text in captions):
        return Fault("NUL in the caption", "the caption holds NUL bytes")
    return captions
