"""What has become of the data since a run began: a run keeps a note of every image that it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nai_xl.data import index_file
from nai_xl.data.index import Index
from nai_xl.data.rows import AT_ONCE, Rows, of_bytes
from nai_xl.data.skipped import shown
from nai_xl.files import write_atomically

CONTENT, CAPTIONS = 16, 8  # bytes of each hash: of so many images, no two share them by chance
NAMED = 1 << 16  # images of which the names are kept too, 6 MB
SHOWN = 3
SCHEMA = pa.schema([("content", pa.binary(CONTENT)), ("captions", pa.binary(CAPTIONS)), ("path", pa.binary())])


@dataclass(frozen=True)
class Change:
    """What happened to some images, in words, and the paths that are known of them."""

    what: str
    count: int
    paths: list[bytes | None]

    def __str__(self) -> str:
        names = [shown(path.rpartition(b"/")[2].decode(errors="surrogateescape")) for path in self.paths if path]
        more = ", ..." if self.count > len(names) else ""
        return f"{self.count} {self.what}" + (f" ({', '.join(names)}{more})" if names else "")


def note(path: Path, index: Index) -> None:
    """Keep which images these are. Raises OSError."""
    named = len(index.items) <= NAMED
    schema = SCHEMA.with_metadata({"fingerprint": index.fingerprint()})

    def save(aside: Path) -> None:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for batch in _batches(index.items, named):
                writer.write_batch(batch)

    write_atomically(path, save)


def changes(path: Path, index: Index) -> list[Change] | None:
    """What has changed since `note`; empty if nothing has, None where nothing can be read there."""
    try:
        before = index_file.mapped(path)
    except (OSError, pa.ArrowException):
        return None
    if before.schema.metadata[b"fingerprint"].decode() == index.fingerprint():
        return []
    return _between(before, pa.Table.from_batches(_batches(index.items, named=True), SCHEMA))


def _batches(rows: Rows, named: bool) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(rows), AT_ONCE):
        part = rows[start : start + AT_ONCE]
        contents = np.ascontiguousarray(part.contents[:, :CONTENT])
        texts = part.joined().to_pylist()
        hashes = b"".join(blake2b(text.encode(), digest_size=CAPTIONS).digest() for text in texts)
        paths = part.column("path").combine_chunks() if named else pa.nulls(len(part), pa.binary())
        yield pa.record_batch([of_bytes(contents.tobytes(), CONTENT), of_bytes(hashes, CAPTIONS), paths], schema=SCHEMA)


def _between(before: pa.Table, after: pa.Table) -> list[Change]:
    added = pc.invert(pc.is_in(after["content"], before["content"].combine_chunks()))
    removed = pc.invert(pc.is_in(before["content"], after["content"].combine_chunks()))
    new, gone = after.filter(added)["path"], before.filter(removed)["path"]
    edited = pc.is_in(new, gone.drop_null().combine_chunks())
    edited_paths = new.filter(edited)
    known = pc.is_in(_pairs(after), _pairs(before).combine_chunks())
    texts = pc.and_(pc.invert(added), pc.invert(known))
    found = {
        "added": new.filter(pc.invert(edited)),
        "removed": gone.filter(pc.invert(pc.is_in(gone, edited_paths.combine_chunks()))),
        "with another picture": edited_paths,
        "with another caption": after.filter(texts)["path"],
    }
    return [Change(what, len(paths), paths.slice(0, SHOWN).to_pylist()) for what, paths in found.items() if len(paths)]


def _pairs(table: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(*(table[name].cast(pa.binary()) for name in SCHEMA.names[:2]), b"")


def in_words(found: list[Change]) -> str:
    return ", ".join(map(str, found)) or "only the number of copies of an image"
