"""python -m nai_xl.plan [overrides]: what a run would need and cost, without a GPU and without weights.

One combination of choices gets a screen of its own; several, by comma-separated values, get a row each.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from nai_xl import config
from nai_xl.compare.comparison import Comparison
from nai_xl.compare.judging.verdicts import parse_margin
from nai_xl.engine.gpus import GPUS, Gpu
from nai_xl.errors import UserError, keyed
from nai_xl.model.quiet import quiet_libraries
from nai_xl.plan.pilot import hours_of_a_run, pilot_of, pilot_table
from nai_xl.plan.remedy import remedy
from nai_xl.plan.run_plan import SPARE, Machines, RunPlan, make
from nai_xl.plan.tables import as_json, bucket_table, card_table, compared, described, memory_table, sentences
from nai_xl.plan.throughput import UTILISATION


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nai_xl.plan", description=__doc__)
    parser.add_argument("--gpu", type=_card, metavar="NAME", help=f"one card, without it all: {', '.join(GPUS)}")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="of each machine")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="machines")
    parser.add_argument(
        "--utilisation", type=float, default=UTILISATION, metavar="SHARE", help="of the peak, default %(default)s"
    )
    parser.add_argument("--dollars-per-hour", type=float, metavar="PRICE", help="of one card")
    parser.add_argument("--pilot", metavar="SWEEP", help="an earlier sweep: what more seeds would show, by its spread")
    parser.add_argument(
        "--detect", default="", metavar="SIZE", help="with --pilot: the difference to find, such as 1%%"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the numbers there too")
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="a further folder of config groups")
    parser.add_argument("overrides", nargs="*", help="as for nai_xl.train; a=x,y gives a row for each")
    given = parser.parse_intermixed_args(argv)
    if given.detect and not given.pilot:
        parser.error("--detect needs the spread of an earlier sweep: add --pilot SWEEP")
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
        if given.detect:
            with keyed("--detect"):
                parse_margin(given.detect)
        if given.json:
            with _told_unwritable(given.json):
                given.json.open("a").close()  # before half a minute of work
        rows: list[tuple[Mapping[str, str], RunPlan | str]] = []
        pilot: Comparison | None = None
        for swept, choices, cfg in config.combinations(given.overrides, given.config_dir):
            if given.pilot and pilot is None:  # before half a minute of work
                pilot = pilot_of(given.pilot, Path(cfg.output_dir), given.detect)
            rows.append((swept, _made_or_refused(cfg, choices, machines, alone=not swept)))
            if swept:  # a plan of SDXL takes half a minute: something to look at meanwhile
                print(described(*rows[-1]), file=sys.stderr, flush=True)
        plans = [plan for _, plan in rows if isinstance(plan, RunPlan)]
        if len(rows) == 1:
            _show_one(plans[0], gpus, machines)
            if len(gpus) == 1 and plans[0].spare(gpus[0]) < SPARE:
                _say(f"- {remedy(given.overrides, given.config_dir, gpus[0], machines)}")
        else:
            _print(compared(rows, gpus, machines))
            for point, plan in rows:
                if isinstance(plan, str):
                    _say(f"- {described(point, plan)}")
        if pilot is not None:
            _say("")
            _print(pilot_table(pilot, hours_of_a_run(plans[0], gpus, machines) if len(rows) == 1 else None))
        if given.json:
            written = [{"swept": dict(point), **as_json(plan, gpus, machines)} for point, plan in rows]
            with _told_unwritable(given.json):
                given.json.write_text(json.dumps(written, indent=1))


@contextmanager
def _told_unwritable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--json {path} cannot be written ({error.strerror}); give another place") from error


def _made_or_refused(cfg: DictConfig, choices: Mapping[str, str], machines: Machines, *, alone: bool) -> RunPlan | str:
    try:
        return make(cfg, choices, machines)
    except UserError as error:
        if alone:
            raise
        return str(error)


def _show_one(plan: RunPlan, gpus: Sequence[Gpu], machines: Machines) -> None:
    for shown in (memory_table(plan), bucket_table(plan), card_table(plan, gpus, machines)):
        _print(shown)
        _say("")
    for sentence in sentences(plan, gpus, machines):
        _say(f"- {sentence}")


def _print(table: Table) -> None:
    """At its natural width, however narrow the terminal or pipe."""
    Console(highlight=False, width=Console(width=1000).measure(table).maximum).print(table)


def _say(line: str) -> None:
    Console(highlight=False, soft_wrap=True).print(line, markup=False)
