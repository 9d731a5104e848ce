"""evals=quality: FID, KID and CLIP score, computed by torchmetrics with weights that the user supplies.

FID: Heusel et al. 1706.08500. KID: Binkowski et al. 1801.01401. CLIP score: Hessel et al. 2104.08718.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from itertools import groupby, islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from PIL import Image
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from nai_xl.data.images import on_canvas, reopen
from nai_xl.data.index import refuse_without_pictures
from nai_xl.data.loader import Encoded
from nai_xl.data.rows import Item
from nai_xl.errors import UserError, one_line
from nai_xl.evals.contact_sheet import Prompt
from nai_xl.evals.painter import Studio
from nai_xl.evals.val_loss import first, item_name
from nai_xl.interfaces import Direction, Placement
from nai_xl.record.items import mean, report

# model.clip is imported where it is used: transformers takes seconds to import, and a comparison needs only `better`

INCEPTION, CLIP = "evals.quality.inception", "evals.quality.clip"
ENOUGH = 10_000  # images: Heusel et al.'s code advises so many at least; published figures take 50,000


def _torchscript(path: Path) -> Path:
    if not path.is_file():
        raise ValueError("no such file; give a TorchScript file that maps images to features")
    if not zipfile.is_zipfile(path) or not any("/code/" in name for name in zipfile.ZipFile(path).namelist()):
        raise ValueError("no TorchScript file (torch.jit.save); docs/evaluation.md tells how to make one of weights")
    return path


def _clip_folder(path: Path) -> Path:
    from nai_xl.model.clip import check_clip

    check_clip(path)
    return path


@dataclass
class Quality:
    """Every `every` steps `seeds` samples of the captions of `count` images, compared with the images themselves.

    The images are held-out ones, or training images if none is held out. quality/fid and quality/kid compare the set of
    samples with the set of images, and need `inception`. quality/clip is the mean over samples of
    max(0, 100 cos(image, caption)), and needs `clip`. The noise depends on the caption's place and the seed, never on
    the run. Samples are painted in `steps` steps; sampling.* sets the rest.
    """

    better: ClassVar[Mapping[str, Direction]] = {
        "quality/fid": "lower",
        "quality/kid": "lower",
        "quality/clip": "higher",
    }
    equal_within: ClassVar[Mapping[str, str]] = {"quality/": "2%"}
    incomparable_over: ClassVar[Mapping[str, Sequence[str]]] = {
        "quality/": ("data", "sampling.guidance", "evals.quality"),  # FID depends on the number of images, too
    }
    changes_weights: ClassVar[bool] = False
    looks_at: ClassVar[str] = "text_to_image"
    within_schedule: ClassVar[tuple[str, ...]] = ("steps",)

    every: Annotated[int, Field(ge=1)]
    inception: Annotated[Path, AfterValidator(_torchscript)] | None = None
    clip: Annotated[Path, AfterValidator(_clip_folder)] | None = None
    count: Annotated[int, Field(ge=2)] = 64
    seeds: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] = 16
    batch: Annotated[int, Field(ge=1)] = 16
    _real: Tensor | None = field(default=None, init=False, repr=False)  # features of the images, which stay the same

    def __post_init__(self) -> None:
        if self.inception is None and self.clip is None:
            raise UserError(
                f"evals=quality needs weights: set {INCEPTION}=FILE for FID and KID, {CLIP}=FOLDER for CLIP score, "
                "or both; docs/evaluation.md tells which"
            )
        if find_spec("torchmetrics") is None:
            raise UserError("evals=quality needs torchmetrics; pip install 'nai_xl[quality]'")

    def texts(self, items: Sequence[Item]) -> list[str]:
        """The captions of the training images that it looks at if none is held out."""
        refuse_without_pictures(items, "evals=quality", "'evals=[optimality]'")
        return [item.caption for item in self._chosen(items)]

    def held_out(self, items: Sequence[Item]) -> list[Item]:
        """The first `count`, no image twice. Raises UserError when there is only one."""
        refuse_without_pictures(items, "evals=quality", "'evals=[optimality]'")
        chosen = self._chosen(items)
        if len(chosen) == 1:
            raise UserError("evals=quality compares with at least 2 images; data.held_out holds out 1, set more or 0")
        return chosen

    def run(self, step: int, studio: Studio) -> dict[str, float]:
        """Paint, measure, write the CLIP score of each sample, and return the means and distances."""
        from nai_xl.model.clip import load_clip

        items, placements, what = self._references(studio.encoded)
        prompts = [Prompt(item.caption, placed.bucket) for item, placed in zip(items, placements, strict=True)]
        extractor = None if self.inception is None else load_extractor(self.inception, studio.device)
        clip = None if self.clip is None else load_clip(self.clip)
        fakes: list[Tensor] = []
        scores: dict[str, float] = {}
        if extractor is not None and self._real is None:
            self._real = self._features(extractor, _canvases(items, placements), studio.device)
            self._say(len(items), what)
        for seed, samples in self._painted(studio, prompts):
            if extractor is not None:
                fakes.append(self._features(extractor, samples, studio.device))
            if clip is not None:
                for item, prompt, sample in zip(items, prompts, samples, strict=True):
                    scores[f"{item_name(item)}/{seed}"] = clip_score(clip, sample, prompt.text, studio.device)
        values = report(studio.run_dir, step, {"quality/clip": scores} if scores else {})
        if self._real is not None:
            values["quality/fid"] = fid(self._real, torch.cat(fakes))
            values["quality/kid"] = mean(kid(self._real, fake) for fake in fakes)
        return values

    def _painted(self, studio: Studio, prompts: Sequence[Prompt]) -> Iterator[tuple[int, list[Image.Image]]]:
        """Each seed with its samples."""
        painter = replace(studio, sampling=replace(studio.sampling, steps=self.steps))
        for seed in range(self.seeds):
            with studio.ema.swapped_in():
                samples = painter.paint(prompts, seed, batch=self.batch)
            yield seed, samples

    def _chosen(self, items: Sequence[Item]) -> list[Item]:
        """The first `count`. Items are in the order of their contents' hashes, so this is a random choice."""
        return first(items, self.count)

    def _references(self, encoded: Encoded) -> tuple[list[Item], list[Placement], str]:
        held = {item: ref.placement for item, ref in encoded.held_out}
        what = "held-out" if held else "training"
        items = self._chosen([*held] or encoded.index.items)
        if len(items) < 2:
            raise UserError(f"evals=quality compares with at least 2 images; there is {len(items)} {what} one")
        placements = [held[item] if held else encoded.latents.of(item)[0].placement for item in items]
        return items, placements, what

    def _features(self, extractor: nn.Module, images: Iterable[Image.Image], device: torch.device) -> Tensor:
        """[N,D] float64 on the CPU, in the images' order. Neighbours of equal size are computed together."""
        rows = []
        for _, same in groupby(images, key=lambda image: image.size):
            while some := list(islice(same, self.batch)):
                rows.append(features(extractor, torch.stack([to_bytes(image) for image in some]).to(device)))
        return torch.cat(rows)

    def _say(self, count: int, what: str) -> None:
        samples = count * self.seeds
        if min(count, samples) < ENOUGH:
            print(
                f"evals.quality: FID of {samples} samples against {count} {what} images is biased upwards; "
                "compare it only between runs with as many of both. KID is not biased",
                file=sys.stderr,
            )


def _canvases(items: Sequence[Item], placements: Sequence[Placement]) -> Iterator[Image.Image]:
    return (on_canvas(reopen(item), placed) for item, placed in zip(items, placements, strict=True))


def to_bytes(image: Image.Image) -> Tensor:
    """[3,H,W] uint8."""
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).contiguous()


def load_extractor(path: Path, device: torch.device) -> nn.Module:
    """The TorchScript module, in eval mode. Raises UserError if it cannot be loaded."""
    try:
        return torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{INCEPTION}={path}: cannot be loaded ({one_line(error)[:300]})") from error


@torch.no_grad()
def features(extractor: nn.Module, images: Tensor) -> Tensor:
    """uint8 [N,3,H,W] -> [N,D] float64 on the CPU. Raises UserError for features of another shape.

    StyleGAN's Inception gives its features for return_features=True, and classes without.
    """
    schema: Any = getattr(getattr(extractor, "forward", None), "schema", None)
    wanted = {argument.name for argument in schema.arguments} if schema else set()
    try:
        found = extractor(images, return_features=True) if "return_features" in wanted else extractor(images)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{INCEPTION}: out of memory with {len(images)} images; set a smaller evals.quality.batch"
        ) from error
    except RuntimeError as error:
        last = str(error).strip().splitlines()[-1]
        raise UserError(f"{INCEPTION}: takes no uint8 images {list(images.shape)} ({last[:300]})") from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(images):
        shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"{INCEPTION}: gives {shape} for {len(images)} images, and not [{len(images)},D]")
    return found.double().cpu()


class _Given(nn.Module):
    """Stands in for torchmetrics' extractor: its input is features already."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, found: Tensor) -> Tensor:
        return found


def fid(real: Tensor, fake: Tensor) -> float:
    """The squared Frechet distance of two normal distributions with the means and covariances of these features."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


def kid(real: Tensor, fake: Tensor) -> float:
    """The unbiased estimate of the squared MMD with the kernel (x.y / D + 1)^3, of all features [N,D] at once.

    torchmetrics' own metric averages it over random subsets, which has the same expectation, a larger variance, and
    another value each time.
    """
    from torchmetrics.image.kid import poly_mmd

    return float(poly_mmd(real, fake))


def clip_score(clip: Any, image: Image.Image, text: str, device: torch.device) -> float:
    """100 cos(image, text), at least 0, with `clip` = model and processor."""
    from torchmetrics.functional.multimodal import clip_score as score

    return float(score(to_bytes(image).to(device), text, model_name_or_path=lambda: clip))
