"""python -m nai_xl.sync [RUN_DIR ...] [--all OUTPUTS]: send to MLflow what it lacks of these runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from nai_xl.errors import one_line
from nai_xl.record.journal import metrics_of
from nai_xl.tracker.mlflow.delivery import Delivery, Progress


def sync(run_dir: Path, uri: str | None = None, experiment: str | None = None) -> int:
    """Rows sent of this run, to the store it was meant for or to `uri`. Raises MlflowException or OSError."""
    meant = Progress.read(run_dir)
    uri, experiment = uri or (meant.uri if meant else None), experiment or (meant.experiment if meant else "nai_xl")
    if uri is None:
        raise FileNotFoundError("it was not meant for MLflow; --uri says where to send it")
    delivery = Delivery(run_dir, uri, experiment)
    delivery.open()  # name and tags may have changed even if no row waits
    return delivery.deliver()


def runs_in(outputs: Path, *, tracked: bool) -> list[Path]:
    """Run directories in `outputs`, or those of them that were meant for MLflow."""
    return sorted(path.parent for path in outputs.glob("*/metrics.jsonl") if not tracked or Progress.read(path.parent))


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
    from mlflow.exceptions import MlflowException

    given = arguments(sys.argv[1:])
    failed = False
    for run_dir in [*given.run_dirs, *(runs_in(given.all, tracked=not given.uri) if given.all else ())]:
        try:
            if not metrics_of(run_dir).path.parent.is_dir():
                raise FileNotFoundError("no such directory")
            print(f"{run_dir}: {sync(run_dir, given.uri, given.experiment) or 'no'} rows sent")
        except (MlflowException, OSError) as error:
            failed = True
            print(f"error: {run_dir}: {one_line(error)[:300]}", file=sys.stderr)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
