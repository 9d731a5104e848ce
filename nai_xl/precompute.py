"""python -m nai_xl.precompute [--verify] [the overrides of a training]: fill the latent and text cache, and stop there.

Under torchrun all processes share the work. With --verify nothing is made: every entry that the training would use is
read, damaged ones are listed by file and discarded, and the exit status is 1 if there are any, or if some are missing.
"""

from __future__ import annotations

import sys
from dataclasses import replace

from omegaconf import DictConfig

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.data.audit import Audit
from nai_xl.data.skipped import shown
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.console import Screen
from nai_xl.engine.stop import Stop
from nai_xl.errors import UserError
from nai_xl.model.quiet import quiet_libraries
from nai_xl.record.run_dir import RunDirectory
from nai_xl.task.task import TrainingData
from nai_xl.training.processes import heartbeat

VERIFY = "--verify"
SHOWN = 20  # skipped images


def precompute(cfg: DictConfig, choices: dict[str, str]) -> None:
    """Fill the cache with everything this run would read."""
    quiet_libraries()
    spec = Spec.of(cfg)
    with Stop() as stop:
        environment = spec.environment(choices)
        strategy = spec.start()
        with heartbeat(spec, strategy, stop, record=lambda error: None):
            data = _prepared(spec, strategy, RunDirectory(config.run_dir(cfg, choices)))
    screen = Screen(silent=not strategy.first)
    screen.say(*(f"environment: {line}" for line in environment))
    screen.say(f"cached: {data.counted()}")
    rows = {name: words for name, words in data.described().items() if name != "images"}  # these are counted above
    screen.say(*(f"{name}: {words}" for name, words in rows.items()), *data.index.remarks)
    for skip in data.index.skipped.of_images()[:SHOWN]:
        screen.say(f"skipped: {shown(str(skip.path))}: {skip.reason}")
    if (more := len(data.index.skipped.of_images()) - SHOWN) > 0:
        screen.say(f"skipped: {more} more images; python -m nai_xl.train lists them in skipped.csv")


def verify(cfg: DictConfig, choices: dict[str, str]) -> None:
    """Read everything this run would read. Raises UserError for what is damaged or missing."""
    quiet_libraries()
    spec = Spec.of(cfg)
    audit = Audit(spec.cache)
    strategy = spec.start()
    if strategy.world > 1:
        raise UserError(f"{VERIFY} reads in one process; start it without torchrun")
    try:
        _prepared(replace(spec, cache=audit), strategy, RunDirectory(config.run_dir(cfg, choices)))
    except UserError:
        if not (audit.faults or audit.absent):  # statistics of all latents need all of them
            raise
    again = "python -m nai_xl.precompute with the same overrides"
    if audit.faults:
        told = (
            f"{len(audit.faults)} of {audit.read} entries are damaged, and are discarded now: {again} makes them anew"
        )
        raise UserError("\n".join([*audit.by_file(), told]))
    if audit.absent:
        raise UserError(f"{audit.read} entries are whole, and {audit.absent} are not there yet: {again} makes them")
    Screen(silent=not strategy.first).say(f"verified: {audit.read} entries are whole and finite")


def _prepared(spec: Spec, strategy: Strategy, run: RunDirectory) -> TrainingData:
    index = spec.scan()
    spec.task.load(spec.model)
    return spec.task.prepare(index, spec.cache, strategy, run)


def main() -> None:
    job = verify if VERIFY in sys.argv else precompute
    sys.argv[1:] = [word for word in sys.argv[1:] if word != VERIFY]  # Hydra knows its own flags only
    config.entry_point(job)()


if __name__ == "__main__":
    main()
