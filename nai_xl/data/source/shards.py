"""data=shards: tar files of images with captions, as webdataset has them, on this machine or in object storage."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, NamedTuple

import pyarrow as pa

from nai_xl.data.images import SUFFIXES, Looked
from nai_xl.data.index import Index
from nai_xl.data.skipped import shown
from nai_xl.data.source import places
from nai_xl.data.source.caption_files import NoCaption, decoded, lines_of, of_json
from nai_xl.data.source.gathered import gathered
from nai_xl.data.source.limits import Encoding, Limited
from nai_xl.data.source.part import Fault, Part, looked_at
from nai_xl.data.source.tar import FOLDER, Damaged, Member, members

WHERE = (pa.field("offset", pa.int64()), pa.field("length", pa.int64()))
LARGEST = 1 << 30  # bytes of an image: more is never read into memory
KEY = re.compile(rb"((?:.*/)?[^./]+)\.[^/]*", re.DOTALL)  # a name up to the first dot of its last part
OF_WEBDATASET = re.compile(rb"__[^/]*__(/|$)")
TEXTS = ("txt", "caption", "json")  # the first that is there


@dataclass(frozen=True)
class ShardsSource(Limited):
    """Tar files in which an image and its caption share the name up to its first dot: 0001.jpg, 0001.txt.

    `files`: one or several files, folders, patterns ({000..123}, *) and addresses that fsspec knows. Nothing is
    unpacked: a picture is read where it lies.
    """

    files: str | Sequence[str]
    caption_lines: bool = False
    encoding: Encoding = "utf-8"

    def scan(self) -> Index:
        files = places.find("data.files", self.files, (".tar",))
        texts = Texts(self.encoding, self.caption_lines, self.max_caption)
        stamps = places.stamps("data.files", files)
        found = gathered("data.files", ["shards", *texts], files, stamps, partial(read_shard, texts=texts))
        return self.settled(found.index(self, places.Ranges(tuple(files))))


class Texts(NamedTuple):
    """How captions are read: their encoding, whether each line is one, and the most bytes of one member."""

    encoding: str
    lines: bool
    longest: int

    def captions(self, raw: bytes, suffix: str, name: str) -> list[str] | Fault:
        try:
            text = decoded(raw, name, self.encoding)
            return of_json(text, name) if suffix == "json" else lines_of(text) if self.lines else [text]
        except NoCaption as error:
            return Fault(error.kind, str(error))


def read_shard(number: int, where: str, texts: Texts) -> pa.Table:
    """The rows of a tar file. Raises UserError where it cannot be read; a damaged one gives what lies before that."""
    part, shard, home = Part(number, WHERE), _Shard(texts), os.fsencode(places.name(where))
    with places.told("data.files", where), places.opened(where) as file:
        try:
            for member in members(file, places.size(where)):
                shard.look_at(member, file)
        except Damaged as error:
            part.list(home, Fault("damaged shard", f"damaged: {error}; what lies before that is used"))
    for name, (member, image) in shard.images.items():
        part.add(home + b"/" + name, image, shard.captions(name), {"offset": member.offset, "length": member.length})
    for name in shard.texts.keys() - shard.used:
        shard.listed.append((name, Fault("caption", "a caption that no image has")))
    for name, fault in shard.listed:
        part.list(home + b"/" + name, fault)
    for kind, times in shard.others.items():
        part.list(
            home, Fault("other", f"{times} {'members' if times > 1 else 'member'} {kind}: neither image nor caption")
        )
    return part.table()


@dataclass
class _Shard:
    """What is in a tar file, by name. others: how many members of a kind were not looked at."""

    how: Texts
    images: dict[bytes, tuple[Member, Looked | Fault]] = field(default_factory=dict)
    texts: dict[bytes, list[str] | Fault] = field(default_factory=dict)
    used: set[bytes] = field(default_factory=set)  # of the texts
    listed: list[tuple[bytes, Fault]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    together: defaultdict[bytes, list[bytes]] = field(default_factory=lambda: defaultdict(list))  # key -> names

    def look_at(self, member: Member, file: BinaryIO) -> None:
        """Read what is an image or a caption."""
        name, suffix, key = member.name, _suffix(member.name), KEY.fullmatch(member.name)
        if member.wrong == FOLDER or OF_WEBDATASET.match(name):
            return
        if key is None or not (suffix in SUFFIXES or suffix in TEXTS):
            self.others[f".{shown(suffix)}" if key else "without a name before the dot"] += 1
        elif member.wrong or member.length > LARGEST:
            fault = member.wrong or f"{member.length} bytes, more than any image has"
            self.listed.append((name, Fault("unusable member", fault)))
        elif name in self.images or name in self.texts:
            self.listed.append((name, Fault("second member", "a second member of this name; the first one is used")))
        else:
            self.together[key[1]].append(name)
            self._read(member, suffix, file)

    def _read(self, member: Member, suffix: str, file: BinaryIO) -> None:
        name, longest = member.name, self.how.longest
        if suffix in SUFFIXES:
            self.images[name] = member, looked_at(_content(member, file))
        elif member.length > longest:
            reason = f"caption of {member.length} bytes; data.max_caption is {longest}"
            self.texts[name] = Fault("caption too long", reason)
        else:
            self.texts[name] = self.how.captions(_content(member, file), suffix, shown(os.fsdecode(name)))

    def captions(self, image: bytes) -> list[str] | Fault:
        """Those of a text of the same name, or else of its key's texts if no other image has the key."""
        names = self.together[KEY.fullmatch(image)[1]]  # type: ignore[index]
        texts = [name for name in names if name in self.texts]
        own = [name for name in texts if _stem(name) == _stem(image)]
        if not own and len(names) == len(texts) + 1:
            own = texts
        if not own:
            return Fault("no caption", f"no caption {shown(os.fsdecode(_stem(image)))}.txt in the shard")
        self.used.update(own)
        return self.texts[min(own, key=lambda name: TEXTS.index(_suffix(name)))]


def _content(member: Member, file: BinaryIO) -> bytes:
    file.seek(member.offset)
    return file.read(member.length)


def _stem(name: bytes) -> bytes:
    return name.rpartition(b".")[0]


def _suffix(name: bytes) -> str:
    return os.fsdecode(name.rpartition(b".")[2].lower())
