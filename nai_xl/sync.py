"""python -m nai_xl.sync [RUN_DIR ...] [--all OUTPUTS]: send to MLflow what it lacks of these runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nai_xl.errors import one_line
from nai_xl.tracker.mlflow.delivery import runs_in, send
from nai_xl.tracker.mlflow.store import failures


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nai_xl.sync", description=__doc__)
    parser.add_argument("run_dirs", nargs="*", type=Path, metavar="RUN_DIR")
    parser.add_argument("--all", type=Path, metavar="OUTPUTS", help="every run in it that was meant for MLflow")
    parser.add_argument("--uri", help="another store than the one the runs were meant for")
    parser.add_argument("--experiment", help="another experiment of MLflow")
    given = parser.parse_args(argv)
    if not given.run_dirs and not given.all:
        parser.error("name some run directories, or --all outputs")
    return given


def main() -> None:
    given = arguments(sys.argv[1:])
    found = runs_in(given.all, meant_for_mlflow=not given.uri) if given.all else []
    failed = False
    for run_dir in [*given.run_dirs, *found]:
        try:
            print(f"{run_dir}: {send(run_dir, given.uri, given.experiment) or 'no'} rows sent")
        except failures() as error:
            failed = True
            print(f"error: {run_dir}: {one_line(error)[:300]}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
