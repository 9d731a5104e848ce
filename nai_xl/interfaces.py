"""Shapes and interfaces shared by every layer. B batch, h x w latent size, k caption chunks of 77 tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

F = TypeVar("F", bound=Callable[..., Any])


def declare(**members: Any) -> Callable[[F], F]:
    """Give an option that is a plain function these attributes, as a class of options has them in its body.

    changes_weights = False: nothing about the option changes the trained weights by more than roundings, so that no
    run's signature holds it. without_effect: the parameters of which that is true. open_ended, of a learning rate: its
    curve does not depend on the length of the run, so that a longer run continues a shorter one. Without declarations
    an option and all of its parameters count, and the length of the run too.

    Others are what the options of one group offer beside their call, such as a model's `check` and `skeleton`.
    """

    def declared(function: F) -> F:
        vars(function).update(members)
        return function

    return declared


@dataclass(frozen=True, slots=True)
class Native:
    """What belongs to a model's size: canvas edge and bucket step in pixels, learning rate, images per micro-batch."""

    changes_weights: ClassVar[bool] = False  # only settings computed from it can

    resolution: Annotated[int, Field(ge=8)]
    bucket_step: Annotated[int, Field(ge=8, multiple_of=8)]
    lr: float
    batch_size: int


Precision = Literal["no", "bf16", "fp16"]
"""What a forward pass is cast to; "no" is float32."""


@dataclass(frozen=True, slots=True)
class NoiseLevel:
    """alpha^2 + sigma^2 = 1, all [B]. The ratio sigma/alpha is not kept: it is infinite at zero terminal SNR.

    timesteps: the length of the schedule that t is a place in; None if there is no such table.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    timesteps: int | None = None

    @property
    def snr(self) -> Tensor:
        """[B] alpha^2 / sigma^2."""
        return (self.alpha / self.sigma).square()


@dataclass(slots=True)
class Batch:
    """Samples of one bucket shape, with the random numbers that belong to their positions in the run."""

    latents: Tensor  # [B,4,h,w] normalised, float32
    context: Tensor  # [B,77k,D] penultimate states of both text encoders; [B,0,0] where the step encodes the text
    pooled: Tensor  # [B,P] projected state of the second encoder; [B,0] likewise
    time_ids: Tensor  # [B,6] float32: original h, w; crop top, left; target h, w
    weight: Tensor  # [B] sample weight, 1.0 by default
    position: Tensor  # [B] int64: place of each sample in the run
    item: Tensor  # [B] int64: place of each sample's image in the index
    u: Tensor  # [B] float64 in [0,1): the timestep draw
    noise: Tensor  # [B,4,h,w] float32
    # [B,4,h,w] what x_t has beside the noise and the target has not; [B,1,1,1] zeros without input perturbation
    perturbation: Tensor = field(default_factory=lambda: torch.zeros(1, 1, 1, 1))
    # what the step encodes: [n,2,77] int64 distinct chunks, of both tokenizers; [B,k] int64 which of them a caption has
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, 2, 77, dtype=torch.int64))
    chunks: Tensor = field(default_factory=lambda: torch.zeros(1, 0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.position)

    def pin_memory(self) -> Batch:
        """What the loader calls for copies to a GPU that run beside computation."""
        return Batch(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until `stream` has used it, although it was filled on another."""
        for f in fields(self):
            getattr(self, f.name).record_stream(stream)

    def to(self, device: torch.device) -> Batch:
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    @property
    def canvas(self) -> tuple[int, int, int]:
        """Height and width in pixels, and tokens of the captions: what a step's cost depends on."""
        tokens = self.context.shape[1] or 77 * self.chunks.shape[1]
        return 8 * self.latents.shape[2], 8 * self.latents.shape[3], tokens


class MicroBatch(Protocol):
    """A micro-batch of any task, as the loop and the meter see it."""

    item: Tensor  # [B] int64: place of each sample's image in the index
    position: Tensor  # [B] int64: place of each sample in the run

    def __len__(self) -> int: ...
    @property
    def canvas(self) -> tuple[int, int, int]: ...  # height, width in pixels, tokens
    def to(self, device: torch.device) -> MicroBatch: ...
    def pin_memory(self) -> MicroBatch: ...
    def record_stream(self, stream: torch.cuda.Stream) -> None: ...


class Losses(NamedTuple):
    """What a task makes of a micro-batch."""

    values: Tensor  # [B] float32, the loss of each sample
    axis: Tensor  # [B] where each is reported, along an axis of the task's own such as timesteps


@runtime_checkable
class Schedule(Protocol):
    """An immutable table of noise levels; the only owner of SNR."""

    @property
    def zero_terminal(self) -> bool: ...
    def __len__(self) -> int: ...
    def for_canvas(self, height: int, width: int) -> Schedule: ...  # pixels; itself, unless resolution shifts it
    def at(self, t: Tensor) -> NoiseLevel: ...  # t [B] int, or float32/64 between table entries
    def add_noise(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor: ...
    def inference_timesteps(self, steps: int) -> Tensor: ...
    def scheduler_config(self) -> dict[str, Any]: ...


class Parameterization(Protocol):
    """What the network predicts. `prediction_type` is diffusers' name for it."""

    prediction_type: str
    defined_at_zero_snr: bool

    def target(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor: ...
    def to_x0(self, xt: Tensor, prediction: Tensor, level: NoiseLevel) -> Tensor: ...
    def x0_error_scale(self, level: NoiseLevel) -> Tensor: ...


TimestepSampler = Callable[[Tensor, Schedule], Tensor]  # u [B] in [0,1) -> t [B]
Weighting = Callable[[NoiseLevel, Parameterization], Tensor]  # -> [B], on the prediction error
PointwiseError = Callable[[Tensor, Tensor, NoiseLevel], Tensor]  # prediction, target [B,4,h,w], level -> [B]
Denoiser = Callable[..., Any]  # diffusers' UNet2DConditionModel call


class Bucket(NamedTuple):
    """A canvas size in pixels."""

    width: int
    height: int

    @property
    def name(self) -> str:
        return f"{self.width}x{self.height}"

    def at_once(self, pixels: int, most: int) -> int:
        """How many images of this canvas to compute together: at least one, at most `most`, else `pixels` in all."""
        return max(1, min(most, pixels // (self.width * self.height)))


class Placement(NamedTuple):
    """How an image lands on its canvas: resize to `resized` (width, height), then cut at `crop` (left, top)."""

    bucket: Bucket
    resized: tuple[int, int]
    crop: tuple[int, int]
    flip: bool

    def time_ids(self, original: tuple[int, int]) -> list[float]:
        """SDXL's six numbers (h, w, top, left, h, w); `left` is mirrored with the picture. [SDXL] 2.2."""
        left = self.resized[0] - self.bucket.width - self.crop[0] if self.flip else self.crop[0]
        return [*map(float, (original[1], original[0], self.crop[1], left, self.bucket.height, self.bucket.width))]


class Places(NamedTuple):
    """Placements of N images as rows: bucket width, height; resized width, height; crop left, top; flip."""

    rows: NDArray[np.int32]  # [M,7], image after image
    counts: NDArray[np.int64]  # [N] rows of each image


class Bucketing(Protocol):
    """The canvases, and how an image lands on one. Sizes are widths and heights in pixels, of [N,2] images at once."""

    @property
    def buckets(self) -> Sequence[Bucket]: ...
    @property
    def max_enlarge(self) -> float | None: ...  # images that would be enlarged more are left out
    @property
    def max_cut(self) -> float | None: ...  # images that would lose a larger share of their area are left out
    @property
    def merge_small(self) -> bool: ...  # whether `merged` has anything to do
    def assign(self, width: int, height: int) -> Bucket: ...
    def placements(self, width: int, height: int) -> list[Placement]: ...
    def buckets_of(self, sizes: NDArray[np.int32]) -> NDArray[np.uint16]: ...  # [N] places in `buckets`
    def places(self, sizes: NDArray[np.int32]) -> Places: ...
    def merged(self, sizes: NDArray[np.int32], chunk: int) -> Bucketing: ...  # without canvases below a chunk of images


class Cache(Protocol):
    """Tensors by content key. `get` gives None for what is missing or unreadable. `shared`: other ranks see it too.

    Keys are 32 hex characters, or [M,16] bytes where many are asked for at once. `alone`: what others do under the same
    name, in any process that shares the cache, waits meanwhile. `place`: where a person finds the entry, for messages.
    `discard`: from then on, the entry counts as missing. `seal`: called when a process has put all that it will.
    `refuse_too_little_room`: raises UserError if there is no room for so many more bytes; smaller: the overrides that
    make them fewer. nai_xl.data.cache.KeyByKey has these and `missing`, by the methods that take one key.
    """

    shared: bool

    def __contains__(self, key: str) -> bool: ...
    def place(self, key: str) -> str: ...
    def get(self, key: str) -> dict[str, Tensor] | None: ...
    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None: ...
    def alone(self, name: str) -> AbstractContextManager[None]: ...
    def missing(self, keys: NDArray[np.uint8]) -> NDArray[np.bool_]: ...
    def discard(self, key: str) -> None: ...
    def seal(self) -> None: ...
    def refuse_too_little_room(self, needed: int, smaller: str) -> None: ...


class Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class Ema(Stateful, Protocol):
    """`on_host`: the average lies in main memory, and takes none of the device's."""

    @property
    def on_host(self) -> bool: ...
    def update(self, step: int) -> None: ...
    def averages(self) -> dict[str, Tensor]: ...
    def swapped_in(self) -> AbstractContextManager[None]: ...


class Tracker(Protocol):
    """A place for what a run reports. Used as a context manager, on rank 0 only."""

    def __enter__(self) -> Tracker: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None: ...
    def params(self, flat: Mapping[str, Any], tags: Mapping[str, str]) -> None: ...
    def log(self, step: int, values: Mapping[str, float]) -> None: ...
    def figure(self, name: str, step: int, image: Image.Image) -> None: ...
    def artifact(self, path: Path) -> None: ...
    def where(self) -> list[str]: ...

    @classmethod
    def of_sweep(cls, **settings: Any) -> Any:
        """What follows a whole sweep whose arms have this tracker: a tracker.sweep.SweepTracker.

        `settings`: those of the tracker's config node. Called before any arm starts, without a run.
        """
        ...


Direction = Literal["lower", "higher"]
"""Which values of a metric are better."""


class Evaluator(Protocol):
    """Looks at the model every `every` optimizer steps, and once at the end. An option of evals=.

    better: the direction of the metrics that `run` returns, by the beginning of their names. Of several entries that a
    name begins with, the longest counts: {"mine/": "lower", "mine/hits": "higher"}. A metric without an entry has no
    good direction: a comparison calls it "higher" or "lower" instead of "better" or "worse".

    equal_within: the largest difference that nobody minds, by the beginning of the metrics' names as well: "2%" of the
    baseline, or "0.1" in the metric's units. A comparison says "equal within 2 %" where it is sure of that. A positive
    error without an entry has 2 %, any other metric without an entry has none.

    incomparable_over: the settings over which a metric keeps no meaning, by the beginning of the metrics' names too:
    {"mine/": ("schedule", "objective.micro_conditioning")}. Where arms differ in one of them, a comparison leaves the
    metric out unless it is named. A metric without an entry can be compared between any arms.

    changes_weights: whether the evaluator can change the trained weights. Looking does not, so two runs that differ in
    their evaluators alone are one run.

    looks_at: the task whose model the evaluator looks at, by the name of that option.

    A class may also declare within_schedule, the names of settings that count a sampler's steps or timesteps: a run
    with more of them than its schedule has is refused.
    """

    better: ClassVar[Mapping[str, Direction]]
    equal_within: ClassVar[Mapping[str, str]]
    incomparable_over: ClassVar[Mapping[str, Sequence[str]]]
    changes_weights: ClassVar[bool]
    every: int
    looks_at: ClassVar[str]

    def texts(self, items: Sequence[Any]) -> list[str]:
        """The texts that `run` will need. They are encoded before training, since the text encoders are not kept.

        `items`: the training images, each a data.index.Item.
        """
        ...

    def held_out(self, items: Sequence[Any]) -> Sequence[Any]:
        """Those of the held-out `items` that `run` will look at: their images and captions are encoded beforehand.

        Raises UserError where there are too few of them.
        """
        ...

    def run(self, step: int, studio: Any) -> dict[str, float]:
        """Metric -> value after `step` optimizer steps, to be logged; {} where there is nothing but a picture.

        `studio` is what the task's `studio` makes: of task=text_to_image an evals.painter.Studio. Evaluate the averaged
        weights with `studio.ema.swapped_in()`. The values of single items, by which comparisons pair, are written with
        record.items.report. Take random numbers from rng.generator and never from torch's global one: an evaluation
        must not change the training. Under an engine that shards the model every process runs this, and the first one's
        values and files count: all must call the model equally often.
        """
        ...


class Checkpointer(Protocol):
    """Keeps the state of the parts that `bind` names. An option of checkpoint=; a context manager around the training.

    Every process calls `save` and `load_latest`. A part's `state_dict` is collective: call it on all processes. Write
    whole tensors on the first, and distributed.shard.Shards on each.

    `save` may return before anything is written: `check` raises what has failed since, `finish` waits for the end
    first, and so does leaving the context. `unreported` is what the step has still to report: saved with it, and a
    member after `load_latest`, where None means that the checkpoint does not tell. `remarks`: what a person should know
    of the checkpoints that were found. `best`: the metric whose best checkpoint is kept, or None.
    """

    best: str | None
    remarks: list[str]
    unreported: Mapping[str, float] | None

    def bind(self, **stateful: Stateful) -> None: ...
    def saved(self) -> Sequence[Path]: ...
    def latest_step(self) -> int: ...
    def save(self, step: int, unreported: Mapping[str, float] | None = None) -> Path: ...
    def best_value(self) -> float | None: ...
    def keep_best(self, step: int, value: float) -> None: ...
    def check(self) -> None: ...
    def finish(self) -> None: ...
    def load_latest(self) -> int: ...
    def __enter__(self) -> Checkpointer: ...
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None: ...
