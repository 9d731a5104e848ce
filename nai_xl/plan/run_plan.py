"""python -m nai_xl.plan [overrides]: what a run would need and cost, without a GPU and without weights.

One combination of choices gets a screen of its own; several, by comma-separated values, get a row each.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nai_xl import config
from nai_xl.engine.gpus import GIB, GPUS, Gpu
from nai_xl.engine.loop import RunSettings
from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket
from nai_xl.memory.compatibility import autocast, refuse_misfits
from nai_xl.model.flops import FORWARDS_PER_STEP, by_area, forward_flops
from nai_xl.model.quiet import quiet_libraries
from nai_xl.model.sdxl.configs import SDXL_BASE, unet_skeleton
from nai_xl.model.tiny import tiny_unet_skeleton
from nai_xl.optimizer.update import OptimizerInBackward
from nai_xl.plan.estimate import ALLOWANCE, SLACK, Footprint, Micro, Rehearsal
from nai_xl.plan.throughput import UTILISATION, Speed, expected

# what is built; nothing else of the config need be there
CHECKED = ("run", "memory", "optimizer", "ema", "bucketing", "precision")
SPARE = 1.0  # GiB that should stay free: other programs' windows, an odd bucket, a newer library
REMEDIES = {
    "hardware=gpu_80gb": 79,
    "hardware=gpu_48gb": 44,
    "hardware=gpu_24gb": 23,
    "hardware=gpu_16gb": 15,
    "hardware=gpu_12gb": 11,
    "run.batch_size=1 hardware=gpu_24gb": 23,
    "run.batch_size=1 hardware=gpu_12gb": 11,
}
"""What is tried in turn when a plan does not fit, from what costs least time; each from cards of so many GiB on."""


@dataclass(frozen=True)
class Machines:
    """What the command line says about the hardware."""

    gpus: int = 1
    nodes: int = 1
    utilisation: float = UTILISATION
    dollars_per_hour: float | None = None

    @property
    def world(self) -> int:
        return self.gpus * self.nodes


@dataclass(frozen=True)
class Plan:
    """One combination: its settings, what a step needs, and the canvases that its images land on, with their number."""

    choices: Mapping[str, str]
    settings: RunSettings
    footprint: Footprint
    worst: Bucket
    canvases: Mapping[Bucket, int]
    from_data: bool
    forward: Mapping[Bucket, int]  # FLOPs of one image
    half: bool  # computes in 16 bits
    ema_on_host: bool

    @property
    def images(self) -> int | None:
        """Seen by the run; None for epochs over data that are not here."""
        if self.settings.max_images is not None:
            return self.settings.max_images
        return round((self.settings.epochs or 0) * sum(self.canvases.values())) if self.from_data else None

    def speed(self, gpu: Gpu, machines: Machines) -> Speed | None:
        """Of the mean canvas; None in float32, which no tensor core computes."""
        if not self.half:
            return None
        total = sum(self.canvases.values())
        mean = sum(self.forward[bucket] * count for bucket, count in self.canvases.items()) / total
        return expected(
            replace(self.footprint, flops=int(self.footprint.flops * mean / self.forward[self.worst])),
            gpu,
            batch=self.settings.batch_size,
            grad_accum=self.settings.grad_accum,
            gpus=machines.gpus,
            nodes=machines.nodes,
            utilisation=machines.utilisation,
        )

    def spare(self, gpu: Gpu) -> float:
        """GiB left free on the card; negative when it does not fit."""
        return gpu.memory_gib - self.footprint.needed / GIB


# --- from a config ----------------------------------------------------------------------------------------------------


def make(cfg: DictConfig, choices: Mapping[str, str], machines: Machines = Machines()) -> Plan:
    """Rehearse the step that a composed config describes. Raises UserError for what could not be trained."""
    config.check(cfg, only=[group for group in CHECKED if group in cfg])
    build = functools.partial(config.build, plugins=tuple(cfg.plugins))
    settings: RunSettings = build(cfg.run)
    actions = [build(node) for node in (cfg.get("memory") or {}).values() if "_target_" in node]
    optimizer = build(cfg.optimizer)
    computed = config.build(cfg.precision, tuple(cfg.plugins)).autocast
    refuse_misfits(actions, optimizer, computed)
    for action in actions:
        if isinstance(action, OptimizerInBackward):
            action.refuse(grad_accum=settings.grad_accum, precision=computed, world=machines.world)
    canvases, from_data = find_canvases(cfg, build)
    worst = max(canvases, key=lambda bucket: bucket.width * bucket.height)
    skeleton = skeleton_of(cfg.model)
    unet = skeleton()
    on_host = cfg.ema.get("device") == "cpu"
    rehearsal = Rehearsal(unet, actions, optimizer, None if on_host else build(cfg.ema), settings.max_grad_norm)
    tokens = 77 * int((cfg.get("text") or {}).get("chunks", 1))
    precision = autocast(actions, computed)
    keeps = settings.grad_accum > 1 or machines.world > 1
    footprint = rehearsal.run(Micro(settings.batch_size, worst.height, worst.width, tokens, precision, keeps))
    half = computed != "no" or "bf16_weights" in cfg.memory
    forward = by_area(functools.partial(forward_flops, skeleton(), tokens=tokens), canvases)
    return Plan(choices, settings, footprint, worst, canvases, from_data, forward, half, on_host)


def skeleton_of(model: DictConfig) -> Callable[[], Any]:
    """The UNet of a model option without storage. Raises UserError for a model that has none."""
    target = str(model._target_).rpartition(".")[2]
    if target == "tiny_sdxl":
        return tiny_unet_skeleton
    if target not in ("load_sdxl", "sdxl_random"):
        raise UserError(f"model: no plan for {target}; there is model=tiny, sdxl and sdxl_random")
    path = None if OmegaConf.is_missing(model, "path") else model.get("path")
    folder = path if path and Path(path, "unet").is_dir() else model.get("config") or SDXL_BASE
    return functools.partial(unet_skeleton, Path(folder))


def find_canvases(cfg: DictConfig, build: Callable[..., Any]) -> tuple[dict[Bucket, int], bool]:
    """Canvas -> its number of images, and whether a data set said so; without one, each of the bucketing's once."""
    bucketing = build(cfg.bucketing)
    folder = None if OmegaConf.is_missing(cfg.data, "dir") else cfg.data.get("dir")
    if folder and Path(folder).is_dir():
        config.check(cfg, only=["data"])
        index = build(cfg.data).scan()
        counts = Counter(bucketing.assign(*item.size) for item in index.items)
        return dict(sorted(counts.items(), key=lambda pair: -pair[1])), True
    return dict.fromkeys(sorted(bucketing.buckets, key=lambda b: (-b.width * b.height, b)), 1), False


# --- words ------------------------------------------------------------------------------------------------------------


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def memory_rows(plan: Plan) -> Iterator[tuple[str, str]]:
    f, s = plan.footprint, plan.settings
    yield "UNet", f"{f.parameters:,} parameters"
    yield "weights", gib(f.weights)
    yield "gradients", gib(f.gradients) if f.gradients else "never all at once"
    yield "optimizer state", gib(f.optimizer)
    if plan.ema_on_host:
        yield "average (EMA)", f"{gib(4 * f.parameters)} in main memory"
    elif f.ema:
        yield "average (EMA)", gib(f.ema)
    if f.cast_copy:
        yield "weights for autocast", gib(f.cast_copy)
    per_image = gib(f.activations / s.batch_size)
    yield "activations", f"{gib(f.activations)}{' (estimated)' if f.estimated else ''} kept for the backward pass"
    yield "", f"{s.batch_size} images of {plan.worst.name}, {per_image} each"
    yield "peak", f"{gib(f.peak)} in the {f.phase} phase ({', '.join(f'{n} {gib(p)}' for n, p in f.peaks.items())})"
    yield (
        "to be free on the card",
        f"{gib(f.needed)} (with {gib(ALLOWANCE)} for CUDA and {SLACK:.0%} the allocator wastes)",
    )


def bucket_table(plan: Plan) -> Table:
    table = _table("canvases" + ("" if plan.from_data else " (no data: each of the bucketing's, once)"))
    for heading in ("canvas", "images", "TFLOP a training image", "activations, GiB"):
        table.add_column(heading, justify="left" if heading == "canvas" else "right")
    per_pixel = plan.footprint.activations / (plan.worst.width * plan.worst.height)
    for bucket, count in list(plan.canvases.items())[:8]:
        flops = FORWARDS_PER_STEP * plan.forward[bucket] / 1e12
        table.add_row(bucket.name, str(count), f"{flops:.3g}", f"{per_pixel * bucket.width * bucket.height / GIB:.2f}")
    if len(plan.canvases) > 8:
        table.caption, table.caption_justify = f"and {len(plan.canvases) - 8} more", "left"
    return table


def card_table(plan: Plan, gpus: Sequence[Gpu], machines: Machines) -> Table:
    title = f"{machines.gpus} of these" + (f" in each of {machines.nodes} machines" if machines.nodes > 1 else "")
    table = _table("cards" if machines.world == 1 else title)
    for heading in ("card", "GiB", "spare", "fits", "images/s", "MFU", "hours", "dollars"):
        table.add_column(heading, justify="left" if heading == "card" else "right", no_wrap=True)
    for gpu in gpus:
        table.add_row(gpu.name, f"{gpu.memory_gib:.1f}", f"{plan.spare(gpu):+.1f}", *_card_cells(plan, gpu, machines))
    return table


def _card_cells(plan: Plan, gpu: Gpu, machines: Machines) -> list[str]:
    fits = "yes" if plan.spare(gpu) >= SPARE else "barely" if plan.spare(gpu) >= 0 else "no"
    speed = plan.speed(gpu, machines)
    if fits == "no" or speed is None:
        return [fits, "-", "-", "-", "-"]
    used = speed.images_per_second * mean_training_flops(plan) / (machines.world * gpu.bf16_tflops * 1e12)
    hours = None if plan.images is None else plan.images / speed.images_per_second / 3600
    price = machines.dollars_per_hour or gpu.dollars_per_hour
    cost = f"{hours * price * machines.world:,.2f}" if hours is not None and price else "-"
    return [fits, f"{speed.images_per_second:.3g}", f"{used:.0%}", f"{hours:,.2f}" if hours is not None else "-", cost]


def mean_training_flops(plan: Plan) -> float:
    total = sum(plan.canvases.values())
    return FORWARDS_PER_STEP * sum(plan.forward[b] * n for b, n in plan.canvases.items()) / total


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))


def sentences(plan: Plan, gpus: Sequence[Gpu], machines: Machines) -> Iterator[str]:
    """What the numbers rest on."""
    yield (
        f"images/s assumes {machines.utilisation:.0%} of the card's dense bf16 peak for all that is computed, "
        "recomputation included; --utilisation changes it. MFU counts 3 forward passes an image."
    )
    if not plan.half:
        yield "float32 throughout: no speed is expected of it; set precision=bf16"
    if plan.images is None:
        yield "run.epochs of data that are not here: no time and cost; set run.max_images, or data.dir=..."
    if plan.footprint.estimated:
        yield "a compiled block's activations are estimated from a documented ratio, not counted"
    if machines.world > 1 and len(gpus) == 1 and (speed := plan.speed(gpus[0], machines)):
        yield (
            f"{machines.world} devices average {plan.footprint.gradients / 1e9:.1f} GB of gradients a step: "
            f"{speed.all_reduce * 1e3:.0f} ms, of which {speed.exposed * 1e3:.0f} ms show beside "
            f"{speed.compute * 1e3:.0f} ms of computation: {speed.efficiency:.0%} efficiency"
        )


def remedy(overrides: Sequence[str], config_dir: Path | None, gpu: Gpu, machines: Machines) -> str:
    """The first override that makes the plan fit the card."""
    for tried in (override for override, least in REMEDIES.items() if gpu.memory_gib >= least):
        # a preset of the card brings its own memory actions
        keys = ["memory", *(override.split("=")[0] for override in tried.split())]
        kept = [override for override in overrides if override.split("=")[0] not in keys]
        for _, choices, cfg in config.combinations([*kept, *tried.split()], config_dir):
            try:
                plan = make(cfg, choices, machines)
            except UserError:  # such as accumulation in the backward pass: the next may do
                continue
            if plan.spare(gpu) >= SPARE:
                return f"{tried} fits the {gpu.name} with {plan.spare(gpu):.1f} GiB to spare"
    return f"no preset fits the {gpu.name}"


def compared(rows: Sequence[tuple[Mapping[str, str], Plan | str]], gpus: Sequence[Gpu], machines: Machines) -> Table:
    """A row for each combination, with the smallest of the cards that it fits."""
    table = _table("plans")
    for key in rows[0][0]:
        table.add_column(key, style="cyan", no_wrap=True)
    for heading in ("peak GiB", "needed GiB", "fits", "spare GiB", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for swept, plan in rows:
        table.add_row(*map(Text, swept.values()), *compared_cells(plan, gpus, machines))
    return table


def described(point: Mapping[str, str], plan: Plan | str) -> str:
    told = plan if isinstance(plan, str) else f"peak {gib(plan.footprint.peak)}, needs {gib(plan.footprint.needed)}"
    return f"{' '.join(f'{key}={value}' for key, value in point.items())}: {told}"


def compared_cells(plan: Plan | str, gpus: Sequence[Gpu], machines: Machines) -> list[str]:
    if isinstance(plan, str):
        return ["refused"]
    card = next((gpu for gpu in gpus if plan.spare(gpu) >= SPARE), None)
    numbers = [f"{plan.footprint.peak / GIB:.2f}", f"{plan.footprint.needed / GIB:.2f}"]
    if card is None:
        return [*numbers, "none"]
    speed = plan.speed(card, machines)
    return [*numbers, card.name, f"{plan.spare(card):.1f}", f"{speed.images_per_second:.3g}" if speed else "-"]


def as_json(plan: Plan, gpus: Sequence[Gpu], machines: Machines) -> dict[str, Any]:
    cards = {}
    for gpu in gpus:
        speed = plan.speed(gpu, machines)
        cards[gpu.name] = {
            "spare_gib": plan.spare(gpu),
            "images_per_second": speed.images_per_second if speed else None,
            "efficiency": speed.efficiency if speed else None,
        }
    footprint = {**asdict(plan.footprint), "peak": plan.footprint.peak, "phase": plan.footprint.phase}
    return {"choices": dict(plan.choices), "footprint": footprint, "needed": plan.footprint.needed, "cards": cards}


# --- command line -----------------------------------------------------------------------------------------------------


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nai_xl.plan", description=__doc__)
    parser.add_argument("--gpu", type=_card, metavar="NAME", help=f"one card, without it all: {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="of each machine")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines")
    parser.add_argument(
        "--utilisation", type=float, default=UTILISATION, metavar="SHARE", help="of the peak, default %(default)s"
    )
    parser.add_argument("--dollars-per-hour", type=float, metavar="PRICE", help="of one card")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there too")
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="a further folder of config groups")
    parser.add_argument("overrides", nargs="*", help="as for nai_xl.train; a=x,y gives a row for each")
    given = parser.parse_intermixed_args(argv)
    if min(given.gpus, given.nodes) < 1 or not 0 < given.utilisation <= 1:
        parser.error("--gpus and --nodes begin at 1, --utilisation is a share above 0")
    return given


def _card(name: str) -> Gpu:
    """'rtx4090', 'RTX 4090' or '4090', but not 'a100', of which there are two."""
    plain = re.sub(r"[\s-]", "", name.lower())
    found = [gpu for key, gpu in GPUS.items() if plain in (key, key.removeprefix("rtx"))]
    if not found:
        raise argparse.ArgumentTypeError(f"no card '{name}' in the table; there is {', '.join(GPUS)}")
    return found[0]


def main() -> None:
    torch.set_num_threads(1)  # nothing is computed
    given = arguments(sys.argv[1:])
    machines = Machines(given.gpus, given.nodes, given.utilisation, given.dollars_per_hour)
    gpus = [given.gpu] if given.gpu else list(GPUS.values())
    quiet_libraries()
    with config.mistakes_told():
        rows: list[tuple[Mapping[str, str], Plan | str]] = []
        for swept, choices, cfg in config.combinations(given.overrides, given.config_dir):
            rows.append((swept, _made_or_refused(cfg, choices, machines, alone=not swept)))
            if swept:  # a plan of SDXL takes half a minute: something to look at meanwhile
                print(described(*rows[-1]), file=sys.stderr, flush=True)
        plans = [plan for _, plan in rows if isinstance(plan, Plan)]
        if len(rows) == 1:
            _show_one(plans[0], gpus, machines)
            if len(gpus) == 1 and plans[0].spare(gpus[0]) < SPARE:
                _say(f"- {remedy(given.overrides, given.config_dir, gpus[0], machines)}")
        else:
            _print(compared(rows, gpus, machines))
            for point, plan in rows:
                if isinstance(plan, str):
                    _say(f"- {described(point, plan)}")
        if given.json:
            given.json.write_text(json.dumps([as_json(plan, gpus, machines) for plan in plans], indent=1))


def _made_or_refused(cfg: DictConfig, choices: Mapping[str, str], machines: Machines, *, alone: bool) -> Plan | str:
    try:
        return make(cfg, choices, machines)
    except UserError as error:
        if alone:
            raise
        return str(error)


def _show_one(plan: Plan, gpus: Sequence[Gpu], machines: Machines) -> None:
    table = _table(
        ", ".join(f"{g} {plan.choices[g]}" for g in ("model", "memory", "optimizer", "ema") if g in plan.choices)
    )
    table.show_header = False
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in memory_rows(plan):
        table.add_row(*row)
    for shown in (table, bucket_table(plan), card_table(plan, gpus, machines)):
        _print(shown)
        _say("")
    for sentence in sentences(plan, gpus, machines):
        _say(f"- {sentence}")


def _print(table: Table) -> None:
    """At its natural width, however narrow the terminal or pipe."""
    Console(highlight=False, width=Console(width=1000).measure(table).maximum).print(table)


def _say(line: str) -> None:
    Console(highlight=False, soft_wrap=True).print(line, markup=False)
