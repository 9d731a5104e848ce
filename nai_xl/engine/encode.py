"""Cache filling: every image's latents and every caption's text condition, keyed by all that changes the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tqdm import tqdm

from nai_xl.data.cache import content_key
from nai_xl.data.images import UNREADABLE, on_canvas, picture, to_pixels
from nai_xl.data.index import Index
from nai_xl.data.loader import LatentRef, Placed, read
from nai_xl.data.rows import Item
from nai_xl.distributed import activity
from nai_xl.errors import UserError, one_line
from nai_xl.interfaces import Bucketing, Cache, Placement
from nai_xl.model.latents import Moments, moments
from nai_xl.model.sdxl.components import Components, fingerprint
from nai_xl.model.text import TOGETHER, encode_texts
from nai_xl.model.vae import encode_pixels

PIXELS = 2 * 1024 * 1024  # encoded at once: SDXL's autoencoder holds 2.5 GiB for each million of them
READ_FIRST = 2048  # entries of a rank that are read whole at the start; of more, damage is found when they are used
VERSION = 3  # raise it whenever this code makes other latents or text conditions from the same input
T = TypeVar("T")


@dataclass(frozen=True)
class Encoder:
    """Fills `cache`. Each rank of `world` encodes its share; what other ranks do is read back after a barrier."""

    components: Components
    cache: Cache
    dtype: Literal["fp32", "bf16"]
    device: torch.device
    rank: int = 0
    world: int = 1

    @cached_property
    def _vae(self) -> str:
        return fingerprint(self.components.vae)

    def latent_refs(self, index: Index, bucketing: Bucketing) -> Placed:
        """The cache keys of every placement of every image; nothing is read or encoded."""
        vae, dtype = self._vae, self.dtype

        def key(content: str, place: Placement) -> str:
            return content_key("latent", VERSION, content, vae, dtype, place)

        return Placed(index.items, bucketing, key)

    def encode_images(self, wanted: Sequence[Placed]) -> dict[Path, str]:
        """Encode, or draw, what the cache lacks. Returns the images that could not be decoded, with the reason."""
        activity.doing("encoding the images")
        jobs = [(item, ref) for placed in wanted for item in placed.rows for ref in placed.of(item)]
        bad: dict[Path, str] = {}
        vae = self.components.vae.to(self.device)
        with (
            self._missing(jobs, lambda job: job[1].key) as mine,
            ThreadPoolExecutor(4) as pool,
            _bar("latents", len(mine), self.rank) as bar,
        ):
            for item, ref in mine:
                activity.beat()
                if item.drawn is not None:
                    self.cache.put(ref.key, {"latents": item.drawn.latents(ref.placement.bucket)})
                    bar.update()
            for group, size in _by_bucket([job for job in mine if job[0].drawn is None]):
                activity.beat()
                canvases = list(pool.map(_canvas, group))
                whole = [(ref, c) for (_, ref), c in zip(group, canvases, strict=True) if isinstance(c, torch.Tensor)]
                bad |= {item.path: c for (item, _), c in zip(group, canvases, strict=True) if isinstance(c, str)}
                if whole:
                    # autocast and no cast: rounded weights would be another autoencoder, for previews and keys too
                    with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
                        latents = encode_pixels(vae, torch.stack(filled([canvas for _, canvas in whole], size)))
                    for (ref, _), latent in zip(whole, latents, strict=False):
                        self.cache.put(ref.key, {"latents": latent})
                bar.update(len(group))
        vae.to("cpu")
        return bad

    @contextmanager
    def _missing(self, rows: list[T], key: Callable[[T], str]) -> Iterator[list[T]]:
        """This rank's rows that the cache lacks, while its counterparts in other runs wait.

        Arms that begin together lack the same: those that waited find it made.
        """
        mine = self._share(rows)
        missing = [row for row in mine if not self._there(key(row), read=len(mine) <= READ_FIRST)]
        with ExitStack() as stack:
            if missing:
                with activity.held_up():
                    stack.enter_context(self.cache.alone(f"encoding-{self.rank}-of-{self.world}"))
            yield [row for row in missing if key(row) not in self.cache]

    def _there(self, key: str, *, read: bool) -> bool:
        """Whether the cache has an entry that is whole; only with `read` are its tensors looked at too."""
        return self.cache.get(key) is not None if read else key in self.cache

    def _share(self, rows: list[T]) -> list[T]:
        """This rank's rows, chosen by their place and not by what is missing: other ranks are writing meanwhile."""
        return rows[self.rank :: self.world] if self.cache.shared else rows

    def measure(self, refs: Placed) -> Moments:
        """The moments of this rank's share of all cached latents; those of all ranks add up to the whole."""
        keys = [ref.key for row in refs for ref in row][self.rank :: self.world]
        with tqdm(keys, desc="measuring latents", disable=self.rank > 0) as bar:
            return moments(read(self.cache, key)["latents"] for key in bar)

    def encode_captions(
        self, wanted: Iterable[str], chunks: int, dtype: Literal["fp32", "bf16"] = "fp32", *, batch: int = TOGETHER
    ) -> dict[str, str]:
        """text -> cache key, for every wanted text and for the empty one. dtype: in the cache; all compute in fp32."""
        activity.doing("encoding the captions")
        models = [(fingerprint(e), e.config.hidden_act, e.config.eos_token_id) for e in self.components.text_encoders]
        words = content_key(*((sorted(t.get_vocab().items()), t.pad_token_id) for t in self.components.tokenizers))
        texts = dict.fromkeys(["", *wanted])
        kind = "text" if dtype == "fp32" else f"text in {dtype}"
        keys = {t: content_key(kind, VERSION, models, words, chunks, t) for t in texts}
        encoders = [encoder.to(self.device) for encoder in self.components.text_encoders]
        with self._missing(list(texts), keys.__getitem__) as mine, _bar("captions", len(mine), self.rank) as bar:
            for group in _batches(mine, batch):
                activity.beat()
                together = filled(group, batch)
                context, pooled = encode_texts(self.components.tokenizers, encoders, together, chunks=chunks)
                if not (context.isfinite().all() and pooled.isfinite().all()):
                    raise UserError(f"the text encoders gave conditions that are not finite for {group[0]!r:.80}")
                if dtype == "bf16":
                    context, pooled = context.bfloat16(), pooled.bfloat16()
                for t, row, vector in zip(group, context.cpu(), pooled.cpu(), strict=False):
                    self.cache.put(keys[t], {"context": row, "pooled": vector})
                bar.update(len(group))
        for encoder in encoders:
            encoder.to("cpu")
        return keys


def _canvas(job: tuple[Item, LatentRef]) -> torch.Tensor | str:
    """The picture on its canvas, or why the file cannot be read."""
    try:
        return to_pixels(on_canvas(picture(job[0]), job[1].placement))
    except UNREADABLE as error:
        return f"not a whole image: {one_line(error)}"


def _by_bucket(jobs: Sequence[tuple[Item, LatentRef]]) -> Iterator[tuple[list[tuple[Item, LatentRef]], int]]:
    """Lists of jobs that share a canvas, and how many images of it to encode at once: at most PIXELS together."""
    ordered = sorted(jobs, key=lambda job: job[1].placement.bucket)
    for bucket, same in groupby(ordered, key=lambda job: job[1].placement.bucket):
        size = bucket.at_once(PIXELS, most=8)
        yield from ((group, size) for group in _batches(list(same), size))


def filled(rows: list[T], size: int) -> list[T]:
    """`rows` with the last one repeated up to `size`, so that every batch has the same size.

    Batches of different sizes use different kernels and round differently. Without this, a latent's last digits would
    depend on what else was encoded with it.
    """
    return rows + rows[-1:] * (size - len(rows))


def _batches(rows: list[T], size: int) -> Iterator[list[T]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _bar(what: str, missing: int, rank: int) -> tqdm[Any]:
    """A progress bar for what has to be made; silent when everything was cached, and on other ranks."""
    return tqdm(total=missing, desc=f"encoding {what}", disable=rank > 0 or not missing)
