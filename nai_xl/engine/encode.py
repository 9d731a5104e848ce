"""Cache filling: every image's latents and every caption's text condition, keyed by all that changes the result."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from nai_xl.data.cache import content_key
from nai_xl.data.images import UNREADABLE, on_canvas, picture, to_pixels
from nai_xl.data.index import Index
from nai_xl.data.keys import TextKeys, latent_key, recipe
from nai_xl.data.loader import Placed, read
from nai_xl.data.placement_table import PlacementTable
from nai_xl.data.rows import Item
from nai_xl.data.shards.shard import KEY
from nai_xl.distributed import activity
from nai_xl.distributed.team import Alone, Team
from nai_xl.engine.overlap import Behind, ahead, readers, until
from nai_xl.errors import UserError, one_line
from nai_xl.interfaces import Bucket, Bucketing, Cache, Placement
from nai_xl.model.latents import Moments, Stored, moments
from nai_xl.model.sdxl.components import Components, fingerprint
from nai_xl.model.text import TOGETHER as TEXTS
from nai_xl.model.text import encode_texts
from nai_xl.model.vae import encode_pixels

PIXELS = 2 * 1024 * 1024  # encoded at once: SDXL's autoencoder holds 2.5 GiB for each million of them
TOGETHER = 8  # images at most
AHEAD = 3  # batches that are read before their turn
READ_FIRST = 2048  # entries that are read whole at the start; of more, damage is found when they are used
VERSION = 4  # raise it whenever this code makes other latents or text conditions from the same input
TYPES: dict[Stored, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
T = TypeVar("T")
NAME = np.dtype(f"S{KEY}")  # a key that numpy sorts
Wanted = Callable[[], Iterable[str]]  # texts, which are gone through more than once instead of being kept


@dataclass(frozen=True)
class Encoder:
    """Fills `cache`. The ranks of `team` share the work; a cache that is not shared, each fills for itself.

    dtype: the autoencoder's precision while it encodes. stored: that of the latents in the cache.
    """

    components: Components
    cache: Cache
    dtype: Literal["fp32", "bf16"]
    device: torch.device
    stored: Stored = "fp32"
    team: Team = field(default_factory=Alone)

    @cached_property
    def _vae(self) -> str:
        return fingerprint(self.components.vae)

    @property
    def _sharing(self) -> Team:
        """Those that fill the same cache."""
        return self.team if self.cache.shared else Alone()

    # --- images -------------------------------------------------------------------------------------------------------

    @cached_property
    def _latents_made_by(self) -> bytes:
        return recipe("latent", VERSION, self._vae, self.dtype, self.stored)

    def latent_refs(self, index: Index, bucketing: Bucketing) -> Placed:
        """The cache keys of every placement of every image; nothing is read or encoded."""
        return Placed(index.items, bucketing, functools.partial(latent_key, made_by=self._latents_made_by))

    def encode_images(self, wanted: Sequence[Placed], beside: Callable[[], int] = int) -> dict[Path, str]:
        """Encode, or draw, what the cache lacks. Returns the images that this rank could not decode, with the reason.

        beside: the bytes of what will be encoded later. Raises UserError, before anything is encoded, if there is no
        room for all of it.
        """
        activity.doing("encoding the images")
        table = PlacementTable.of(wanted)
        keys = table.keys(self._latents_made_by)
        with self._missing(keys, lambda which: self._latent_bytes(table, which) + beside(), SMALLER) as missing:
            return self._encode_images(table, keys, missing) if len(missing) else {}

    def _encode_images(
        self, table: PlacementTable, keys: NDArray[np.uint8], missing: NDArray[np.int64]
    ) -> dict[Path, str]:
        bad: dict[Path, str] = {}
        missing = missing[_first_of_each(keys[missing])]
        batches = Batches(table, table.by_bucket(missing))
        vae = self.components.vae.to(self.device)
        with (
            ThreadPoolExecutor(readers()) as reading,
            Behind() as writing,
            _bar("latents", len(missing), "images", self._sharing) as bar,
        ):

            def begin(ticket: int) -> tuple[int, list[Job], list[Future[torch.Tensor | str]]]:
                jobs = [Job(*table.job(row), keys[row].tobytes().hex()) for row in batches[ticket]]
                return ticket, jobs, [reading.submit(_picture, job) for job in jobs]

            tickets = until(len(batches), self._sharing.tickets())
            for ticket, jobs, pictures in ahead(map(begin, tickets), AHEAD):
                activity.beat()
                found = [picture.result() for picture in pictures]
                bad |= {job.item.path: why for job, why in zip(jobs, found, strict=True) if isinstance(why, str)}
                whole = [(job, x) for job, x in zip(jobs, found, strict=True) if isinstance(x, torch.Tensor)]
                writing.do(self._put_latents, self._encoded(vae, whole, batches.size(ticket)))
                bar.n = batches.before(ticket) + len(jobs)  # as far as the ranks have got together
                bar.update(0)
            _full(bar)
        vae.to("cpu")
        return bad

    def _encoded(
        self, vae: Any, whole: Sequence[tuple[Job, torch.Tensor]], size: int
    ) -> list[tuple[Job, torch.Tensor]]:
        """Pixels become latents; what was drawn as latents already stays as it is."""
        drawn = [(job, x) for job, x in whole if job.item.drawn is not None]
        pictures = [(job, x) for job, x in whole if job.item.drawn is None]
        if not pictures:
            return drawn
        # autocast and no cast: rounded weights would be another autoencoder, for previews and keys too
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            latents = encode_pixels(vae, torch.stack(filled([x for _, x in pictures], size)))
        return [*drawn, *((job, latent) for (job, _), latent in zip(pictures, latents, strict=False))]

    def _put_latents(self, made: Sequence[tuple[Job, torch.Tensor]]) -> None:
        for job, latent in made:
            stored = latent.to(TYPES[self.stored])
            if not stored.isfinite().all():
                raise UserError(
                    f"{job.item.path} has latents too large for latents.stored={self.stored}; set latents.stored=bf16"
                )
            self.cache.put(job.key, {"latents": stored})

    def _latent_bytes(self, table: PlacementTable, which: NDArray[np.int64]) -> int:
        values = self.components.vae.config.latent_channels * table.sides(which).astype(np.int64).prod(axis=1) // 64
        return int(values.sum()) * TYPES[self.stored].itemsize

    @contextmanager
    def _missing(self, keys: NDArray[np.uint8], needed: Any, smaller: str) -> Iterator[NDArray[np.int64]]:
        """Which of `keys` [M,16] the cache lacks, the same on all ranks, while other runs that lack something wait.

        Runs that begin together lack the same: those that waited find it made. needed: rows -> bytes that they take.
        """
        team = self._sharing
        with ExitStack() as stack:
            if team.rank == 0:
                missing = self._first_look(keys)
                if missing.any():
                    with activity.held_up():
                        stack.enter_context(self.cache.alone("encoding"))
                    missing = self.cache.missing(keys)
                    self.cache.refuse_too_little_room(needed(np.flatnonzero(missing)), smaller)
                told = team.told(np.packbits(missing).tobytes())
            else:
                told = team.told(None)
            rows = np.flatnonzero(np.unpackbits(np.frombuffer(told, np.uint8), count=len(keys)))
            try:
                yield rows
            finally:
                if len(rows):
                    self.cache.seal()
            if len(rows):
                team.wait()

    def _first_look(self, keys: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Few entries are read, so that damage is found before training; of many, only the index is asked."""
        missing = self.cache.missing(keys)
        if len(keys) > READ_FIRST:
            return missing
        for key in keys[~missing]:
            self.cache.get(key.tobytes().hex())  # which finds it missing from then on, if it is damaged
        return self.cache.missing(keys)

    def measure(self, refs: Placed) -> Moments:
        """The moments of this rank's share of all cached latents; those of all ranks add up to the whole."""
        rank, world = self.team.rank, self.team.world
        keys = PlacementTable.of([refs]).keys(self._latents_made_by)[rank::world]
        with tqdm(keys, desc="measuring latents", disable=rank > 0) as bar:
            return moments(read(self.cache, key.tobytes().hex())["latents"] for key in bar)

    # --- captions -----------------------------------------------------------------------------------------------------

    def encode_captions(
        self, wanted: Wanted, chunks: int, dtype: Literal["fp32", "bf16"] = "fp32", *, batch: int = TEXTS
    ) -> TextKeys:
        """Encode, once each, what the cache lacks of the wanted texts and of the empty one. Returns the way to keys.

        dtype: in the cache; all compute in fp32. Raises UserError, before anything is encoded, if there is no room.
        """
        activity.doing("encoding the captions")
        key_of = self._text_keys(chunks, dtype)
        keys = _distinct(key_of, wanted)
        encoders = [encoder.to(self.device) for encoder in self.components.text_encoders]
        size = self._text_bytes(chunks, dtype)
        with (
            self._missing(keys, lambda which: len(which) * size, SMALLER_TEXTS) as missing,
            Behind() as writing,
            _bar("captions", len(missing), "captions", self._sharing) as bar,
        ):
            groups = enumerate(_in_groups(_lacking(key_of, wanted, keys[missing]), batch))
            for ticket in until(math.ceil(len(missing) / batch), self._sharing.tickets()):
                activity.beat()
                group = next(group for number, group in groups if number == ticket)  # others are other ranks'
                together = filled(group, batch)
                context, pooled = encode_texts(self.components.tokenizers, encoders, together, chunks=chunks)
                if not (context.isfinite().all() and pooled.isfinite().all()):
                    raise UserError(f"the text encoders gave conditions that are not finite for {group[0]!r:.80}")
                context, pooled = context.to(TYPES[dtype]), pooled.to(TYPES[dtype])
                rows = [(key_of(t), *row) for t, *row in zip(group, context.cpu(), pooled.cpu(), strict=False)]
                writing.do(self._put_texts, rows)
                bar.n = ticket * batch + len(group)
                bar.update(0)
            _full(bar)
        for encoder in encoders:
            encoder.to("cpu")
        return replace(key_of, count=len(keys))

    def _put_texts(self, rows: Sequence[tuple[str, torch.Tensor, torch.Tensor]]) -> None:
        for key, context, pooled in rows:
            self.cache.put(key, {"context": context, "pooled": pooled})

    def bytes_of_captions(self, wanted: Wanted, chunks: int, dtype: Literal["fp32", "bf16"] = "fp32") -> int:
        """What encode_captions would add to the cache."""
        keys = _distinct(self._text_keys(chunks, dtype), wanted)
        return int(self.cache.missing(keys).sum()) * self._text_bytes(chunks, dtype)

    def _text_keys(self, chunks: int, dtype: Stored) -> TextKeys:
        models = [(fingerprint(e), e.config.hidden_act, e.config.eos_token_id) for e in self.components.text_encoders]
        words = content_key(*((sorted(t.get_vocab().items()), t.pad_token_id) for t in self.components.tokenizers))
        return TextKeys(content_key("text", VERSION, models, words, chunks, dtype))

    def _text_bytes(self, chunks: int, dtype: Stored) -> int:
        width = sum(encoder.config.hidden_size for encoder in self.components.text_encoders)
        pooled = self.components.text_encoders[-1].config.projection_dim
        return int(TYPES[dtype].itemsize * (77 * chunks * width + pooled))


SMALLER = ", or make less: text=live, latents.stored=bf16, fewer bucketing.crops, bucketing.flip=false"
SMALLER_TEXTS = ", or make less: text=live, fewer text.chunks"


@dataclass(frozen=True)
class Job:
    """One placement of one image, and where its latents go."""

    item: Item
    placement: Placement
    key: str


def _distinct(key_of: TextKeys, wanted: Wanted) -> NDArray[np.uint8]:
    """[M,16] the keys of the wanted texts and of the empty one, each once, in order."""
    packed = (bytes.fromhex(key_of(text)) for text in chain([""], wanted()))
    return np.unique(np.fromiter(packed, NAME)).view(np.uint8).reshape(-1, KEY)


def _lacking(key_of: TextKeys, wanted: Wanted, missing: NDArray[np.uint8]) -> Iterator[str]:
    """Each text whose key is `missing` [M,16], once: as they are wanted, so on all ranks alike."""
    names = missing.reshape(-1).view(NAME)
    due, left = np.ones(len(names), bool), len(names)
    for text in chain([""], wanted()):
        if not left:
            return
        name = np.array(bytes.fromhex(key_of(text)), NAME)
        at = int(names.searchsorted(name))
        if at < len(names) and names[at] == name and due[at]:
            due[at] = False
            left -= 1
            yield text


def _in_groups(texts: Iterator[str], size: int) -> Iterator[list[str]]:
    """Lists of `size` texts; the last may have fewer."""
    return iter(lambda: list(islice(texts, size)), [])


def _picture(job: Job) -> torch.Tensor | str:
    """The picture on its canvas, or latents that are drawn; or why the file cannot be read."""
    if job.item.drawn is not None:
        return job.item.drawn.latents(job.placement.bucket)
    try:
        return to_pixels(on_canvas(picture(job.item), job.placement))
    except UNREADABLE as error:
        return f"not a whole image: {one_line(error)}"


def _first_of_each(keys: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Places of the keys [M,16] that come first of those equal to them: an image can stand in an index many times."""
    rows = np.ascontiguousarray(keys).view(NAME).reshape(-1)
    return np.sort(np.unique(rows, return_index=True)[1])


class Batches(Sequence[NDArray[np.int64]]):
    """Rows of a table, ordered by bucket, in batches that share a canvas; `size` of them fit on the device at once."""

    def __init__(self, table: PlacementTable, rows: NDArray[np.int64]):
        self.rows = rows
        sides = table.sides(rows)
        begins = np.flatnonzero(np.r_[True, (sides[1:] != sides[:-1]).any(axis=1)])
        self.sizes = [Bucket(*map(int, sides[at])).at_once(PIXELS, most=TOGETHER) for at in begins]
        self.begins = np.r_[begins, len(rows)]
        self.first = np.cumsum([0, *(-(-n // size) for n, size in zip(np.diff(self.begins), self.sizes, strict=True))])

    def __len__(self) -> int:
        return int(self.first[-1])

    def _bucket(self, ticket: int) -> int:
        return int(self.first.searchsorted(ticket, side="right")) - 1

    def size(self, ticket: int) -> int:
        return self.sizes[self._bucket(ticket)]

    def before(self, ticket: int) -> int:
        """How many rows there are in the batches before."""
        bucket = self._bucket(ticket)
        return int(self.begins[bucket] + (ticket - self.first[bucket]) * self.sizes[bucket])

    def __getitem__(self, ticket: Any) -> Any:
        begin, bucket = self.before(ticket), self._bucket(ticket)
        return self.rows[begin : min(begin + self.sizes[bucket], int(self.begins[bucket + 1]))]


def filled(rows: list[T], size: int) -> list[T]:
    """`rows` with the last one repeated up to `size`, so that every batch has the same size.

    Batches of different sizes use different kernels and round differently. Without this, a latent's last digits would
    depend on what else was encoded with it.
    """
    return rows + rows[-1:] * (size - len(rows))


def _bar(what: str, missing: int, unit: str, team: Team) -> tqdm[Any]:
    """A progress bar for what has to be made; silent when everything was cached, and on other ranks."""
    return tqdm(total=missing, desc=f"encoding {what}", unit=f" {unit}", disable=team.rank > 0 or not missing)


def _full(bar: tqdm[Any]) -> None:
    bar.n = bar.total or 0
    bar.refresh()
