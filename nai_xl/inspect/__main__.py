"""python -m nai_xl.inspect [overrides, with comma-separated values]: what choices of the method do, before training.

Prints a table of all combinations and what is worth knowing of them, and draws a figure. No model and no data are read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.inspect.combinations import inspect
from nai_xl.inspect.figure import save_figure
from nai_xl.inspect.remarks import remarks
from nai_xl.inspect.table import show, table


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nai_xl.inspect", description=__doc__)
    parser.add_argument("--figure", type=Path, default=Path("inspect.png"), metavar="PATH", help="default: inspect.png")
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="a further folder of config groups")
    parser.add_argument("overrides", nargs="*", help="as for nai_xl.train; a=x,y spans a grid")
    return parser.parse_intermixed_args(argv)


def main() -> None:
    torch.set_num_threads(1)  # small tables: threads cost more than they bring
    given = arguments(sys.argv[1:])
    console = Console(highlight=False, soft_wrap=True)
    with config.mistakes_told():
        combinations = inspect(given.overrides, given.config_dir)
        lines = list(remarks(combinations))
        if all(c.refusal for c in combinations):
            raise UserError("\n".join(lines))
        show(table(combinations))
        console.print()
        for line in lines:
            console.print(f"- {line}", markup=False)
        save_figure(combinations, given.figure)
        console.print(f"figure: {given.figure}", markup=False)


if __name__ == "__main__":
    main()
