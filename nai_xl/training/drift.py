"""A run whose data have changed since it began: it stops and says so, goes on, or leaves its place to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from nai_xl import config
from nai_xl.data.drift import changes, in_words, note
from nai_xl.data.index import Index
from nai_xl.distributed.strategy import Strategy
from nai_xl.errors import UserError
from nai_xl.files import writing
from nai_xl.record.run_dir import RunDirectory


@dataclass(frozen=True)
class Drift:
    """changed: what, in words; empty where nothing has, None where the run has not noted what it is trained on."""

    changed: str | None

    @classmethod
    def since(cls, home: RunDirectory, index: Index) -> Drift:
        found = changes(home.images, index)
        return cls(None if found is None else in_words(found) if found else "")

    def refuse(self, index: Index) -> None:
        """Raises UserError where the data have changed and nobody has said what to do."""
        if self.changed and index.on_change != "continue":
            raise UserError(
                f"the data have changed since this run began: {self.changed}. data.on_change=continue goes on with "
                "what is there now, so that its further steps see other images than runs of the old data; "
                "data.on_change=new or name=NAME begins a new run; or bring the old data back"
            )

    def said_of_finished(self) -> list[str]:
        if not self.changed:
            return []
        return [
            f"the data have changed since: {self.changed}. The run is of what was there before; data.on_change=new "
            "trains one of what is there now, and data.on_change=continue with a larger run.max_images goes on with it"
        ]

    def accept(self, home: RunDirectory, scanned: Index, trained: Index, step: int) -> list[str]:
        """Before claim_data: note that the run goes on with other data from `step` on. What is to be said of it.

        scanned: the index as the source made it; trained: less the images that cannot be decoded.
        """
        before = home.trained_on()
        if scanned.on_change != "continue" or before is None or before.data == trained.fingerprint():
            return []
        what = self.changed or "an earlier version began the run, and has not noted its images"
        with writing(home.data_changes):
            home.accept_other_data(step, what)
        return [f"the data have changed since this run began, and it goes on with what is there now: {what}"]

    def note(self, home: RunDirectory, scanned: Index) -> None:
        """After claim_data: keep which images the run is trained on."""
        if self.changed != "":
            with writing(home.images):
                note(home.images, scanned)


def refuse_unlike(index: Index, strategy: Strategy) -> None:
    """Collective. Raises UserError on every rank where they do not see the same data: each would train on its own."""
    seen = strategy.gather_objects([(index.fingerprint(), len(index.items))])
    if len({fingerprint for fingerprint, _ in seen}) > 1:
        counts = ", ".join(f"process {rank}: {count}" for rank, (_, count) in enumerate(seen))
        raise UserError(
            f"data: the processes see other images or captions than each other ({counts}); give every machine the same "
            "files, leave them alone while a run starts, and run the same command again"
        )


def begun_anew(cfg: DictConfig, choices: Mapping[str, str]) -> DictConfig:
    """The config; with data.on_change=new and other data than its run began with, that of another run.

    Its name ends in the first characters of the data's fingerprint: the same command on the same data continues it.
    """
    if OmegaConf.select(cfg, "data.on_change") != "new":
        return cfg
    home = RunDirectory(config.run_dir(cfg, choices))
    source: Any = config.build(cfg.data, tuple(cfg.plugins))
    index: Index = source.scan()
    if not Drift.since(home, index).changed:
        return cfg
    cfg = cfg.copy()
    with open_dict(cfg):
        cfg.name = f"{home.path.name.rpartition('-')[0]}-{index.fingerprint()[:6]}"
    return cfg
