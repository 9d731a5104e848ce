"""What all benchmarks share: the objects that a run trains with, a bare loop to compare with, timing and records."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
import transformers
from torch import Tensor, nn

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.data.bucketing import Canvases
from nai_xl.data.cache import DiskCache, content_key
from nai_xl.data.index import Index
from nai_xl.data.keys import TextKeys
from nai_xl.data.loader import Encoded, Placed
from nai_xl.data.rows import Item
from nai_xl.engine.loop import RunSettings, Training
from nai_xl.engine.meter import Meter
from nai_xl.engine.precompile import precompile
from nai_xl.engine.prefetch import on_device
from nai_xl.interfaces import Batch, Bucket, Cache
from nai_xl.model.quiet import quiet_libraries
from nai_xl.model.sdxl.components import Components

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


# --- records ----------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """What a figure depends on beside the code: libraries, processor, accelerator, threads."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def _cpu_name() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(name: str, command: str, settings: Mapping[str, Any], rows: Sequence[Row], folder: Path = RESULTS) -> None:
    """Record rows in `folder`/NAME.json, and as a table in NAME.md, with the command, the settings and the versions."""
    folder.mkdir(parents=True, exist_ok=True)
    date = time.strftime("%Y-%m-%d")
    found = versions()
    record = {"command": command, "date": date, "settings": dict(settings), "versions": found, "rows": list(rows)}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    lines = [f"# {name}", "", f"`{command}`, {date}", "", *table(rows), ""]
    for title, pairs in (("Settings", settings), ("Versions", found)):
        lines += [f"{title}: " + ", ".join(f"{key} {value}" for key, value in pairs.items()) + ".", ""]
    (folder / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def table(rows: Sequence[Row]) -> list[str]:
    """Rows as lines of markdown; the columns are all keys in the order of their first row."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    body = [[_cell(row.get(key)) for key in columns] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in ([*columns], ["---"] * len(columns), *body)]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def command() -> str:
    """The command line of this process, as a person would type it."""
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


# --- timing -----------------------------------------------------------------------------------------------------------


def spread(times: Sequence[float]) -> dict[str, float]:
    """median, p10, p90 and mean of seconds; linear between neighbours, as numpy's percentile."""
    ordered = sorted(times)

    def at(share: float) -> float:
        place = share * (len(ordered) - 1)
        low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
        return low + (high - low) * (place - math.floor(place))

    return {"median": at(0.5), "p10": at(0.1), "p90": at(0.9), "mean": sum(ordered) / len(ordered)}


def interleave(arms: Mapping[str, Callable[[], list[float]]], rounds: int) -> dict[str, list[list[float]]]:
    """Run every arm once a round, the first one again at the round's end: A-B-C-A. An arm returns seconds per step.

    One round before is for warming up and is thrown away. The first arm's second turn is named "NAME again": what lies
    between the two is noise.
    """
    first = next(iter(arms))
    turns = [*arms.items(), (f"{first} again", arms[first])]
    times: dict[str, list[list[float]]] = {name: [] for name, _ in turns}
    for number in range(rounds + 1):
        for name, arm in turns:
            window = arm()
            if number:
                times[name].append(window)
    return times


class Ticks:
    """Batches that note the time whenever one is asked for: the time between two is a step's, in any loop.

    On a GPU the note is an event in its stream, so that noting waits for nothing.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device):
        self.batches, self.device = batches, device
        self.marks: list[Any] = []

    def __iter__(self) -> Ticks:
        return self

    def __next__(self) -> Batch:
        self.mark()
        return next(self.batches)

    def mark(self) -> None:
        if self.device.type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> list[float]:
        """The steps' times since the last call; `mark` ends the last one."""
        marks, self.marks = self.marks, []
        pairs = itertools.pairwise(marks)
        if self.device.type != "cuda":
            return [after - before for before, after in pairs]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1000 for before, after in pairs]


class Watched:
    """Stands for `inner`; each call of it, of its methods and of next() runs inside around("NAME.method")."""

    def __init__(self, inner: Any, name: str, around: Callable[[str], AbstractContextManager[Any]]):
        self._inner, self._name, self._around = inner, name, around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._around(self._name):
            return self._inner(*args, **kwargs)

    def __next__(self) -> Any:
        with self._around(self._name):
            return next(self._inner)

    def __getattr__(self, attribute: str) -> Any:
        found = getattr(self._inner, attribute)
        if not callable(found) or isinstance(found, nn.Module):
            return found
        return Watched(found, f"{self._name}.{attribute}", self._around)


def watched(parts: Training, around: Callable[[str], AbstractContextManager[Any]]) -> Training:
    """The same training, in which every collaborator of the loop is called inside around("COLLABORATOR.method")."""
    names = ("strategy", "module", "update", "lr", "ema", "meter")
    seen: dict[str, Any] = {name: Watched(getattr(parts.state, name), name, around) for name in names}
    state = replace(parts.state, **seen)
    loss: Any = Watched(parts.loss, "loss", around)
    return replace(parts, state=state, loss=loss, batches=Watched(parts.batches, "batches", around))


class Unread(Meter):
    """A meter that collects and does not report: reading brings values to the host, which tensors without any lack."""

    def __init__(self) -> None:
        super().__init__(1000, gather=lambda rows: rows)

    def read(self, *, lr: float, clear: bool = True) -> dict[str, float]:
        self.clear()
        return {}


class Clock:
    """around(NAME) for `watched`: the seconds spent under each name, less those under names inside it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inner.append(0.0)
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.seconds[name] = self.seconds.get(name, 0.0) + took - self._inner.pop()
            self._inner[-1] += took


# --- our loop ---------------------------------------------------------------------------------------------------------


def training(
    overrides: Sequence[str],
    unet: nn.Module,
    data: Encoded,
    folder: Path,
    *,
    storage: AbstractContextManager[Any] | None = None,
) -> tuple[RunSettings, Training]:
    """What `python -m nai_xl.train` with these overrides gives its loop, for this network and these cached samples.

    The run's own code assembles it, so what is measured is what users get. Checkpoints, evaluation and the tracker are
    off. `folder` is for what a run writes; `storage` is a mode of tensors to assemble it in, without a loader and
    without reports.
    """
    quiet_libraries()
    cfg = config.compose([f"output_dir={folder}", "evals=[]", *overrides])
    config.check(cfg)
    spec = Spec.of(cfg)
    strategy = spec.start()
    task: Any = spec.task
    components: Any = Components(unet, None, (None, None), (None, None))
    samples = task.samples(data)
    with storage or nullcontext():
        trainable = spec.adapter(task.load(lambda: components))
        for action in spec.memory:
            action.apply(trainable.module)
        state = spec.assemble(trainable, strategy, samples, 10**9)
        if spec.compiles:
            first = next(iter(trainable.parameters.values()))
            shapes = samples.one_of_each_shape(spec.run.batch_size)
            precompile(task.loss, state.module, first, strategy, shapes)
    if storage:  # tensors without values cannot draw the seed that every loader begins with
        return spec.run, Training(replace(state, meter=Unread()), task.loss, iter(()))
    read = samples.batches(spec.run, strategy, start=0)
    return spec.run, Training(state, task.loss, on_device(read, strategy.device))


@dataclass(frozen=True)
class Shapes:
    """What a model's samples look like."""

    resolution: int  # pixels
    width: int  # of the text condition
    pooled: int


def shapes(unet: Any, resolution: int) -> Shapes:
    """By the UNet's own config."""
    c = unet.config
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    return Shapes(resolution, c.cross_attention_dim, pooled)


def random_data(shapes: Shapes, count: int, cache: Cache, canvases: Sequence[Bucket] = ()) -> Encoded:
    """`count` samples of random numbers in `cache`, never zeros: products with zeros run faster. Seeded, float32."""
    draw = torch.Generator().manual_seed(0)
    canvases = canvases or [Bucket(shapes.resolution, shapes.resolution)]

    def put(*parts: object, **tensors: Tensor) -> str:
        key = content_key("benchmark", shapes, *parts)
        cache.put(key, tensors)
        return key

    def text(caption: str) -> None:
        context = torch.randn(77, shapes.width, generator=draw)
        cache.put(texts(caption), {"context": context, "pooled": torch.randn(shapes.pooled, generator=draw)})

    items, texts = [], TextKeys(content_key("benchmark", shapes, "text"))
    text("")  # the empty caption stands in where captions are dropped
    for number in range(count):
        bucket = canvases[number % len(canvases)]
        latents = torch.randn(4, bucket.height // 8, bucket.width // 8, generator=draw)
        item = Item(Path(f"{number}.png"), f"caption {number}", (bucket.width, bucket.height), f"{number:064x}")
        items.append(item)
        put("latents", item.content, latents=latents)
        text(item.caption)
    index = Index(items)
    placed = Placed(
        index.items,
        Canvases([(b,) for b in sorted(canvases, key=math.prod)]),
        lambda content, _: content_key("benchmark", shapes, "latents", content),
    )
    return Encoded(index, placed, texts, cache, torch.zeros(4, 1, 1), torch.ones(4, 1, 1), torch.ones(count))


def random_batch(
    shapes: Shapes, size: int, device: torch.device, *, seed: int = 0, canvas: Bucket | None = None
) -> Batch:
    """A micro-batch of random numbers on `device`, float32 as the loader's."""
    draw = torch.Generator().manual_seed(seed)
    width, height = canvas or Bucket(shapes.resolution, shapes.resolution)

    def normal(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=draw)

    return Batch(
        latents=normal(4, height // 8, width // 8),
        context=normal(77, shapes.width),
        pooled=normal(shapes.pooled),
        time_ids=torch.tensor([[height, width, 0, 0, height, width]] * size, dtype=torch.float32),
        weight=torch.ones(size),
        position=torch.arange(size),
        item=torch.arange(size),
        u=torch.rand(size, generator=draw, dtype=torch.float64),
        noise=normal(4, height // 8, width // 8),
    ).to(device)


@contextmanager
def disk_cache() -> Iterator[tuple[Path, DiskCache]]:
    """A folder that is deleted afterwards, and a cache in it."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), DiskCache(Path(folder) / "cache")


# --- the bare loop ----------------------------------------------------------------------------------------------------


def ztsnr_tables() -> tuple[Tensor, Tensor]:
    """alpha, sigma [1000] float32 of SDXL's schedule brought to zero terminal SNR; Lin et al. 2305.08891, algorithm 1.

    Written anew from the paper, so that equal losses say something.
    """
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return root.float(), (1 - root.square()).sqrt().float()


class Bare:
    """The default recipe (v, ztsnr, min-SNR, AdamW, clip at 1) in plain PyTorch: no accelerate, nothing is recorded."""

    def __init__(self, unet: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, precision: str = "no"):
        self.unet, self.optimizer, self.device, self.precision = unet, optimizer, device, precision
        self.parameters = list(unet.parameters())
        self.alpha, self.sigma = (table.to(device) for table in ztsnr_tables())
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []

    def steps(self, batches: Iterator[Batch], count: int, around: Callable[[str], Any] = nullcontext) -> None:
        for _ in range(count):
            with around("batches"):
                batch = next(batches)
            batch = batch.to(self.device)
            with around("loss"):
                loss = self.loss(batch, around)
            with around("strategy.backward"):
                loss.backward()
            with around("update"):
                norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.losses.append(loss.detach())
            self.norms.append(norm)

    def loss(self, batch: Batch, around: Callable[[str], Any]) -> Tensor:
        t = (batch.u * 1000).long()
        alpha, sigma = self.alpha[t], self.sigma[t]
        a, s = alpha.view(-1, 1, 1, 1), sigma.view(-1, 1, 1, 1)
        noisy = a * batch.latents + s * batch.noise
        condition = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
        with (
            around("module"),
            torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"),
        ):
            prediction = self.unet(noisy, t, batch.context, added_cond_kwargs=condition, return_dict=False)[0]
        error = (prediction.float() - (a * batch.noise - s * batch.latents)).square().mean(dim=(1, 2, 3))
        # min(SNR, 5) / (SNR + 1), with SNR + 1 = 1 / sigma^2
        return (error * (alpha / sigma).square().clamp(max=5) * sigma.square()).mean()
