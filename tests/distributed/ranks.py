"""Worlds of processes on this machine, forked from one: short trainings on each engine, and what every rank found.

python ranks.py FOLDER: FOLDER/asked.json has a list of [world, {name: [function, arguments]}]; FOLDER/found.json gets
one of what every rank found. A fork spares each process the seconds that imports take.
"""

import copy
import functools
import gc
import importlib
import json
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from common import random_data, shapes, training

from nai_xl import config
from nai_xl.data.cache import DiskCache
from nai_xl.distributed.shard import Shard
from nai_xl.engine.loop import Training
from nai_xl.engine.nonfinite import Guard
from nai_xl.errors import UserError
from nai_xl.memory import process_wide
from nai_xl.model.tiny import UNET_CONFIG

IMAGES = 8
ENGINES = {
    "none": ["distributed=none"],
    "ddp": ["distributed=ddp"],
    "fsdp2": ["distributed=fsdp2"],
    "hsdp": ["distributed=fsdp2", "distributed.shard_size=2"],
    "zero2": ["distributed=deepspeed_zero2"],
    "zero3": ["distributed=deepspeed_zero3"],
}


SMALLER = {  # than the tiny network: what sharding engines do takes the time, and that goes by the number of parts
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 4),
}


@functools.cache
def network() -> nn.Module:
    torch.manual_seed(0)
    return UNet2DConditionModel(**{**UNET_CONFIG, **SMALLER})


compose = functools.cache(lambda *overrides: config_compose(overrides))
config_compose = config.compose


def composed(overrides: Sequence[str]) -> Any:
    """A config of these overrides, which takes half a second the first time."""
    return copy.deepcopy(compose(*overrides))


def words(world: int, overrides: Sequence[str]) -> list[str]:
    """The overrides of a run on a world of this size: equal images a step and chunks on all of them."""
    size = [f"run.batch_size={IMAGES // world}", f"run.chunk={IMAGES}"]
    return ["tracker=jsonl", *size, "lr.warmup=0", "optimizer.lr=1e-3", *overrides]


class Reductions(TorchDispatchMode):
    """Counts the collectives that add tensors of several ranks up."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "c10d" in str(function) and "reduce" in str(function)
        return function(*args, **(kwargs or {}))


@dataclass
class Saved:
    """A SavedTensor that lies in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop].clone()

    def whole(self) -> Tensor:
        return self.tensor.clone()


def collected(trees: Sequence[Any]) -> Any:
    """One tree of whole tensors from those of all ranks: what a checkpoint writes. The first rank's values count."""
    first = trees[0]
    if isinstance(first, dict):
        return {key: collected([tree.get(key) if tree else None for tree in trees]) for key in first}
    if not isinstance(first, Shard):
        return first
    pieces = sorted((tree.start, number) for number, tree in enumerate(trees) if len(tree.local))
    whole = torch.cat([trees[number].local for _, number in pieces])
    assert whole.shape == first.shape and len(pieces) == len({start for start, _ in pieces})
    return whole


def as_saved(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: as_saved(value) for key, value in tree.items()}
    return Saved(tree) if isinstance(tree, Tensor) else tree


class Run:
    """One short training of the tiny network, step by step, on this rank's share of every batch."""

    def __init__(
        self,
        overrides: Sequence[str],
        folder: Path,
        *,
        frozen: bool = False,
        start: int = 0,
        state: Mapping[str, Any] | None = None,
    ):
        world = int(os.environ.get("WORLD_SIZE", "1"))
        self.unet: nn.Module = copy.deepcopy(network())
        if frozen:
            self.unet.requires_grad_(False)
            self.unet.up_blocks.requires_grad_(True)
        data = random_data(shapes(self.unet, 64), 16, DiskCache(folder / "cache"))
        self.settings, self.parts = training(words(world, overrides), self.unet, data, folder)
        self.number, self.losses, self.norms = start, [], []
        if state:
            for name, part in self.stateful().items():
                part.load_state_dict(as_saved(state[name]) if getattr(part, "reads_rows", False) else state[name])
        for _ in range(start * self.settings.grad_accum):
            next(self.parts.batches)

    def stateful(self) -> dict[str, Any]:
        parts = self.parts.state.stateful()
        return {name: parts[name] for name in ("unet", "ema", "optimizer")}

    def saved(self) -> dict[str, Any]:
        mine = {name: part.state_dict() for name, part in self.stateful().items()}
        return collected(self.parts.state.strategy.gather_objects([mine]))

    def step(self, spoil: float = 1.0, around: Callable[[bool], Any] | None = None) -> None:
        """One optimizer step; this rank's loss times `spoil`."""
        parts: Training = self.parts
        state, count = parts.state, self.settings.grad_accum
        state.lr.set(self.number)
        values = []
        for micro in range(count):
            batch = next(parts.batches)
            last = micro + 1 == count
            with state.strategy.accumulating(state.module, last=last):
                losses = parts.loss(state.module, batch)
                state.strategy.backward(spoil * losses.values.mean() / count)
            if around:
                around(last)
            values.append(losses.values.detach())
        self.norms.append(float(state.update()))
        self.number += 1
        state.ema.update(self.number)
        if spoil == 1.0:
            self.losses.append(float(state.strategy.gather(torch.cat(values)).mean()))

    def steps(self, count: int) -> "Run":
        self.parts.state.module.train()
        for _ in range(count):
            self.step()
        return self

    @torch.no_grad()
    def looked(self) -> float:
        """One number of what an evaluator sees of the averages; 0 on a rank that does not evaluate."""
        state = self.parts.state
        if not state.strategy.evaluates:
            return 0.0
        draw = torch.Generator().manual_seed(1)
        context, pooled = torch.randn(1, 77, 160, generator=draw), torch.randn(1, 96, generator=draw)
        added = {"text_embeds": pooled, "time_ids": torch.zeros(1, 6)}
        latents = torch.randn(1, 4, 8, 8, generator=draw)
        with state.ema.swapped_in():
            out = state.trainable.module(latents, torch.tensor([500]), context, added_cond_kwargs=added).sample
        return float(out.double().square().sum())

    def delivered(self) -> dict[str, float]:
        weights = self.parts.state.delivered()
        return {name: float(weight.double().square().sum()) for name, weight in weights.items()}


def plain(engine: str, folder: Path, *overrides: str, frozen: bool = False) -> dict[str, Any]:
    """Three steps with a look at the averages between them, one that is NaN on the last rank, and the delivery."""
    run = Run([*ENGINES[engine], *overrides], folder, frozen=frozen)
    strategy, module = run.parts.state.strategy, run.parts.state.trainable.module
    parts = [getattr(p, "ds_tensor", p) for p in module.parameters()]
    unknown: Any = None
    weights = Guard("stop", 0, run.parts.state, unknown, "no", unknown, unknown, unknown)._weights()
    held = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in parts)
    sharded = all(isinstance(p, DTensor) for p in module.parameters())
    run.steps(2)
    seen = run.looked()
    run.steps(1)
    told = run.norms[:]
    before = run.saved()
    run.step(spoil=float("nan") if strategy.rank == strategy.world - 1 else 1.0 + 1e-9)
    moved = different(before, run.saved())
    return {
        "losses": run.losses, "norms": told, "bytes": held, "largest": weights.largest, "dtensors": sharded,
        "looked": seen, "moved": moved,
        "spoiled": str(run.norms[-1]), "delivered": run.delivered(),
        "plain": not any(isinstance(p, DTensor) for p in run.unet.parameters()),
    }  # fmt: skip


def different(before: Any, after: Any, at: str = "") -> list[str]:
    """Where two states differ; the average goes on, and its turn counts."""
    if isinstance(before, dict):
        return [place for key in before if key != "ema" for place in different(before[key], after[key], f"{at}/{key}")]
    return [] if not isinstance(before, Tensor) or torch.equal(before, after[:] if before.dim() else after) else [at]


def accumulated(engine: str, folder: Path) -> dict[str, Any]:
    """Three steps of three micro-batches; reductions until the end of each of them in the last step."""
    run = Run([*ENGINES[engine], "run.grad_accum=3"], folder).steps(2)
    counts = []
    with Reductions() as counter:
        run.step(around=lambda last: counts.append(counter.count))
    return {"losses": run.losses, "norms": run.norms, "reductions": counts}


def continued(path: Sequence[str], each: int, folder: Path, *overrides: str, state: Any = None) -> dict[str, Any]:
    """`each` steps on each engine of `path` in turn, every one from what the one before has saved."""
    losses: list[float] = []
    start = state["step"] if state else 0
    for engine in path:
        with process_wide.restored():
            run = Run([*ENGINES[engine], *overrides], folder, start=start, state=state).steps(each)
            losses, start = losses + run.losses, start + each
            state = run.saved()
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save({**state, "step": start}, folder / "state.pt")
    return {"losses": losses}


def further(path: Sequence[str], each: int, folder: Path, *overrides: str) -> dict[str, Any]:
    """The same from the state that was saved last, by another world."""
    return continued(path, each, folder, *overrides, state=torch.load(folder / "state.pt", weights_only=True))


def refused(folder: Path) -> dict[str, Any]:
    try:
        Run(["distributed=fsdp2", "distributed.shard_size=3"], folder)
    except UserError as error:
        return {"error": str(error)}
    return {"error": ""}


def ask(name: str, folder: Path, arguments: Sequence[Any]) -> dict[str, Any]:
    with process_wide.restored():
        if name == "plain":
            return plain(arguments[0], folder, *arguments[1:])
        if name == "frozen":
            return plain(arguments[0], folder, *arguments[1:], frozen=True)
        if name == "accumulated":
            return accumulated(arguments[0], folder)
        if name == "refused":
            return refused(folder)
        return {"continued": continued, "further": further}[name](arguments[0], arguments[1], folder, *arguments[2:])


def rank_of(world: int, rank: int, port: int, asked: Mapping[str, Sequence[Any]], folder: Path) -> None:
    """What one process does. It never returns."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"})
    if world == 1:
        for name in place:
            del os.environ[name]
    found = {}
    for name, (what, *arguments) in asked.items():
        found[name] = ask(what, folder, arguments)
        gc.collect()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))


def world_of(world: int, asked: Mapping[str, Sequence[Any]], folder: Path) -> list[dict[str, Any]]:
    """What every rank of a world has found. Raises RuntimeError, when the others are ended too, if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=rank_of, args=(world, rank, port, asked, folder)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(600)
        if process.exitcode != 0:
            for other in ranks:
                other.kill()
            raise RuntimeError(f"a rank of {world} ended with {process.exitcode}")
    return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


def warm(worlds: Sequence[Any], folder: Path) -> None:
    """Do once, before the forks, what every process would do by itself."""
    network()
    importlib.import_module("nai_xl.task.text_to_image")
    config.compose = composed
    for world, asked in worlds:
        for what, *arguments in asked.values():
            engines = [name for name in arguments[:1] for name in ([name] if isinstance(name, str) else name)]
            more = [word for word in arguments[1:] if isinstance(word, str)]
            more += ["run.grad_accum=3"] * (what == "accumulated")
            for engine in engines:
                composed([f"output_dir={folder}", "evals=[]", *words(world, [*ENGINES[engine], *more])])
            if any(name.startswith("zero") for name in engines):
                importlib.import_module("deepspeed.runtime.engine")
                importlib.import_module("deepspeed.runtime.zero.muon.original_muon")  # with torch's compiler


if __name__ == "__main__":
    torch.set_num_threads(1)
    there = Path(sys.argv[1])
    worlds = json.loads((there / "asked.json").read_text())
    warm(worlds, there)
    (there / "found.json").write_text(json.dumps([world_of(world, asked, there) for world, asked in worlds]))
