"""python -m nai_xl.precompute [the overrides of a training]: fill the latent and text cache, and stop there."""

from __future__ import annotations

from omegaconf import DictConfig

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.data.skipped import shown
from nai_xl.engine.console import Screen
from nai_xl.engine.stop import Stop
from nai_xl.model.quiet import quiet_libraries
from nai_xl.record.run_dir import RunDirectory
from nai_xl.training.processes import heartbeat

SHOWN = 20  # skipped images


def precompute(cfg: DictConfig, choices: dict[str, str]) -> None:
    """Fill the cache with everything this run would read."""
    quiet_libraries()
    spec = Spec.of(cfg)
    with Stop() as stop:
        environment = spec.environment(choices)
        strategy = spec.start()
        with heartbeat(spec, strategy, stop, record=lambda error: None):
            index = spec.scan()
            spec.task.load(spec.model)
            data = spec.task.prepare(index, spec.cache, strategy, RunDirectory(config.run_dir(cfg, choices)))
    screen = Screen(silent=not strategy.first)
    screen.say(*(f"environment: {line}" for line in environment))
    screen.say(f"cached: {data.counted()}")
    screen.say(*data.index.remarks)
    for skip in data.index.skipped.of_images()[:SHOWN]:
        screen.say(f"skipped: {shown(str(skip.path))}: {skip.reason}")
    if (more := len(data.index.skipped.of_images()) - SHOWN) > 0:
        screen.say(f"skipped: {more} more images; python -m nai_xl.train lists them in skipped.csv")


main = config.entry_point(precompute)

if __name__ == "__main__":
    main()
