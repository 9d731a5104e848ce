"""python -m nai_xl.evaluate RUN ... evals=[color] evals.color.seeds=8: measure finished runs anew, without training.

The evaluators look at the averaged weights of the run's newest checkpoint, with its own images and settings. What they
measure is added to the run's record, where nai_xl.compare finds it.
"""

from __future__ import annotations

import argparse
import gc
from pathlib import Path

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.model.quiet import quiet_libraries
from nai_xl.training.evaluation import config_of, evaluate


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m nai_xl.evaluate", description=__doc__)
    parser.add_argument("what", nargs="+", metavar="RUN | evals=[...]", help="run directories, and overrides of evals")
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="a further folder of config groups")
    given = parser.parse_intermixed_args()
    words = given.what
    runs = [Path(word) for word in words if "=" not in word or Path(word).exists()]
    overrides = [word for word in words if Path(word) not in runs]
    quiet_libraries()
    with config.mistakes_told():
        if not runs or not overrides:
            raise UserError("name run directories and what to measure: outputs/NAME 'evals=[color]'")
        asked = [(run, config_of(run, overrides, given.config_dir)) for run in runs]  # all mistakes before any run
        for run, cfg in asked:
            values = evaluate(run, cfg)
            gc.collect()  # the next run must not find this one's model in memory
            print(run, *(f"{name} {value:.4g}" for name, value in values.items()), sep="\n  ")


if __name__ == "__main__":
    main()
