"""A plan in words: tables, sentences and JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from nai_xl.engine.gpus import GIB, Gpu
from nai_xl.model.flops import FORWARDS_PER_STEP
from nai_xl.plan.footprint import ALLOWANCE, SLACK
from nai_xl.plan.run_plan import SPARE, Machines, RunPlan


def gib(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def memory_table(plan: RunPlan) -> Table:
    """What a step needs, a part a row."""
    shown = [group for group in ("model", "memory", "optimizer", "ema") if group in plan.choices]
    table = _table(", ".join(f"{group} {plan.choices[group]}" for group in shown))
    table.show_header = False
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in memory_rows(plan):
        table.add_row(*row)
    return table


def memory_rows(plan: RunPlan) -> Iterator[tuple[str, str]]:
    f, s = plan.footprint, plan.settings
    yield "UNet", f"{f.parameters:,} parameters"
    yield "weights", gib(f.weights)
    if f.text_encoders:
        yield "text encoders", gib(f.text_encoders)
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


def bucket_table(plan: RunPlan) -> Table:
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


def card_table(plan: RunPlan, gpus: Sequence[Gpu], machines: Machines) -> Table:
    title = f"{machines.gpus} of these" + (f" in each of {machines.nodes} machines" if machines.nodes > 1 else "")
    table = _table("cards" if machines.world == 1 else title)
    for heading in ("card", "GiB", "spare", "fits", "images/s", "MFU", "hours", "dollars"):
        table.add_column(heading, justify="left" if heading == "card" else "right", no_wrap=True)
    for gpu in gpus:
        table.add_row(gpu.name, f"{gpu.memory_gib:.1f}", f"{plan.spare(gpu):+.1f}", *_card_cells(plan, gpu, machines))
    return table


def _card_cells(plan: RunPlan, gpu: Gpu, machines: Machines) -> list[str]:
    fits = "yes" if plan.spare(gpu) >= SPARE else "barely" if plan.spare(gpu) >= 0 else "no"
    speed = plan.speed(gpu, machines)
    if fits == "no" or speed is None:
        return [fits, "-", "-", "-", "-"]
    used = speed.images_per_second * mean_training_flops(plan) / (machines.world * gpu.bf16_tflops * 1e12)
    hours = None if plan.images is None else plan.images / speed.images_per_second / 3600
    price = machines.dollars_per_hour or gpu.dollars_per_hour
    cost = f"{hours * price * machines.world:,.2f}" if hours is not None and price else "-"
    return [fits, f"{speed.images_per_second:.3g}", f"{used:.0%}", f"{hours:,.2f}" if hours is not None else "-", cost]


def mean_training_flops(plan: RunPlan) -> float:
    total = sum(plan.canvases.values())
    return FORWARDS_PER_STEP * sum(plan.forward[b] * n for b, n in plan.canvases.items()) / total


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 1))


def sentences(plan: RunPlan, gpus: Sequence[Gpu], machines: Machines) -> Iterator[str]:
    """What the numbers rest on."""
    yield (
        f"images/s assumes {machines.utilisation:.0%} of the card's dense bf16 peak for all that is computed, "
        "recomputation included; --utilisation changes it. MFU counts 3 forward passes an image."
    )
    if plan.shards:
        yield (
            "memory is that of a process which keeps the whole model: what "
            f"distributed={plan.choices['distributed']} shares out is not taken off (docs/distributed.md)"
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


def compared(rows: Sequence[tuple[Mapping[str, str], RunPlan | str]], gpus: Sequence[Gpu], machines: Machines) -> Table:
    """A row for each combination, with the smallest of the cards that it fits."""
    table = _table("plans")
    for key in rows[0][0]:
        table.add_column(key, style="cyan", no_wrap=True)
    for heading in ("peak GiB", "needed GiB", "fits", "spare GiB", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for swept, plan in rows:
        table.add_row(*map(Text, swept.values()), *compared_cells(plan, gpus, machines))
    return table


def described(point: Mapping[str, str], plan: RunPlan | str) -> str:
    told = plan if isinstance(plan, str) else f"peak {gib(plan.footprint.peak)}, needs {gib(plan.footprint.needed)}"
    return f"{' '.join(f'{key}={value}' for key, value in point.items())}: {told}"


def compared_cells(plan: RunPlan | str, gpus: Sequence[Gpu], machines: Machines) -> list[str]:
    if isinstance(plan, str):
        return ["refused"]
    card = next((gpu for gpu in gpus if plan.spare(gpu) >= SPARE), None)
    numbers = [f"{plan.footprint.peak / GIB:.2f}", f"{plan.footprint.needed / GIB:.2f}"]
    if card is None:
        return [*numbers, "none"]
    speed = plan.speed(card, machines)
    return [*numbers, card.name, f"{plan.spare(card):.1f}", f"{speed.images_per_second:.3g}" if speed else "-"]


def as_json(plan: RunPlan | str, gpus: Sequence[Gpu], machines: Machines) -> dict[str, Any]:
    """The numbers of a plan, or why there is none."""
    if isinstance(plan, str):
        return {"refused": plan}
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
