"""Checkpoints: safetensors for tensors, JSON for everything else, written beside the training. No pickle."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, TypeAdapter

from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.checkpoint_files import STATE, Reader, damage, split_tensors, step_of
from nai_xl.engine.checkpoint_writer import Parts, Writer
from nai_xl.errors import UserError, one_line
from nai_xl.files import remove_strays
from nai_xl.interfaces import Stateful
from nai_xl.record.json_file import Damaged, read_json, write_json
from nai_xl.record.pace import Pace

BEST = "best.json"


@dataclass(frozen=True)
class Best:
    """The content of best.json: the kept checkpoint at which `metric` was best, and its value there."""

    metric: str
    step: int
    value: float


_BEST = TypeAdapter(Best)


class LocalCheckpoints:
    """`dir`/step_00000100/{state.json, <name>.safetensors}; the last `keep` are kept.

    keep_every: those whose step is a multiple of it are kept for ever too. best: the one at which this metric was best
    is kept too, and a new best is saved when it is found.

    `save` copies the state and returns; a thread writes it, one at a time. A failure is raised by the next call of
    `check`, `save` or `finish`. A folder bears its final name only when it is whole and on the disk, so that a kill or
    a power cut at any moment leaves the ones before it usable. Every rank of `strategy` saves and loads: the first
    writes all whole tensors, and each its own Shards.
    """

    changes_weights: ClassVar[bool] = False

    def __init__(
        self,
        dir: Path,
        *,
        keep: int,
        strategy: Strategy,
        keep_every: Annotated[int, Field(ge=1)] | None = None,
        best: str | None = None,
    ):
        self.dir, self.keep, self.strategy, self.keep_every, self.best = Path(dir), keep, strategy, keep_every, best
        self.stateful: dict[str, Stateful] = {}
        self.remarks: list[str] = []
        self.unreported: Mapping[str, float] | None = None
        self.writer = Writer(strategy)
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.under_way: list[Future[None]] = []
        self.held = self._best_on_disk()

    def bind(self, **stateful: Stateful) -> None:
        """The objects to save and restore, by name."""
        self.stateful = stateful

    def saved(self) -> list[Path]:
        """Checkpoints, oldest first, as far as their names tell."""
        return [path for path in self._folders() if (path / STATE).is_file()]

    def _folders(self) -> list[Path]:
        return sorted(path for path in self.dir.glob("step_*") if not path.suffix)

    def latest_step(self) -> int:
        """The step of the newest checkpoint, 0 if there is none."""
        self.finish()
        saved = self.saved()
        return step_of(saved[-1]) if saved else 0

    # --- writing ------------------------------------------------------------------------------------------------------

    def save(self, step: int, unreported: Mapping[str, float] | None = None) -> Path:
        """Collective: copy the state after optimizer step `step`, and have it written. Returns the folder to be.

        unreported: what the step has to report; a run that continues here reports it. Raises UserError when the disk
        cannot take it, or could not take the one before.
        """
        self.finish()
        final = self.dir / f"step_{step:08d}"
        parts = Parts()
        for name, part in self.stateful.items():
            parts.leaves[name] = {}
            parts.trees[name] = split_tensors(part.state_dict(), name, parts.leaves[name])
        self.writer.begin(final)
        self.strategy.wait()  # the folder is empty now, and nobody has begun to fill it
        self.writer.copy(parts)
        self._beside(self._write, final, {"step": step, "unreported": dict(unreported or {})}, parts)
        return final

    def _write(self, final: Path, content: Mapping[str, Any], parts: Parts) -> None:
        self.writer.write(final, content, parts)
        if self.strategy.first:
            self._remove_old()

    def _remove_old(self) -> None:
        """Keep what is to be kept. A folder loses its name before its files, so that it never looks like damage."""
        saved = self.saved()
        for old in saved[: -self.keep]:
            forever = self.keep_every and step_of(old) % self.keep_every == 0
            if not forever and not (self.held and self.held.step == step_of(old)):
                try:
                    shutil.rmtree(old.rename(old.with_suffix(".tmp")))
                except OSError as error:
                    raise UserError(f"cannot remove the old checkpoint {old} ({one_line(error)})") from error

    def best_value(self) -> float | None:
        """The value of the metric `best` at the kept checkpoint; None before there is one."""
        return self.held.value if self.held else None

    def keep_best(self, step: int, value: float) -> None:
        """The checkpoint of `step`, saved before this call, is the best so far. Noted when that is on the disk."""
        if self.best is not None and self.strategy.first:
            self._beside(self._note_best, Best(self.best, step, value))

    def _note_best(self, best: Best) -> None:
        try:
            write_json(self.dir / BEST, asdict(best))
        except OSError as error:
            raise UserError(f"cannot write {self.dir / BEST} ({one_line(error)}): free space") from error
        self.held = best

    def _best_on_disk(self) -> Best | None:
        """None as well where the checkpoint has gone, or another metric was asked for."""
        try:
            found = read_json(self.dir / BEST, _BEST, "it is written anew")
        except Damaged:
            return None
        there = found and found.metric == self.best and (self.dir / f"step_{found.step:08d}" / STATE).is_file()
        return found if there else None

    def _beside(self, work: Any, *given: Any) -> None:
        self.under_way.append(self.thread.submit(work, *given))

    def check(self) -> None:
        """Raise the UserError of a save that has failed since the last call."""
        while self.under_way and self.under_way[0].done():
            self.under_way.pop(0).result()

    def finish(self) -> None:
        """Return when everything is written. Raises UserError if something could not be."""
        while self.under_way:
            self.under_way.pop(0).result()

    def __enter__(self) -> LocalCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """The process leaves no save half done, whatever ends the run."""
        try:
            self.finish()
        except UserError as error:
            if kind is None:
                raise
            print(f"error: {error}", file=sys.stderr)  # beside the one that ends the run
        finally:
            self.thread.shutdown()

    # --- reading ------------------------------------------------------------------------------------------------------

    def load_latest(self) -> int:
        """Restore the newest whole checkpoint into the bound objects; the step it was made at, 0 if there is none.

        Damaged ones are renamed and kept, and `remarks` tell of them. Raises UserError when no other is left.
        `unreported` is then what its step has still to report, None for a checkpoint that does not tell.
        """
        self.finish()
        if self.strategy.first:
            self._tidy()
        self.strategy.wait()
        # the names that the first rank sees: a folder on a network may look older to others, who read no checksums
        names = self.strategy.gather_objects([[path.name for path in self.saved()]])[0]
        if not names:
            self._refuse_to_begin_anew()
            return 0
        newest = self.dir / names[-1]
        reader = Reader(newest)
        if missing := [name for name in self.stateful if name not in reader.parts]:
            raise UserError(
                f"{newest} was made by another configuration: it has no {', '.join(missing)}. Set name=NAME to begin a "
                "new run"
            )
        for name, part in self.stateful.items():
            rows = getattr(type(part), "reads_rows", False)  # optimizers of torch cannot declare it
            part.load_state_dict(reader.part(name, whole=not rows))
        self.unreported = reader.content.get("unreported")
        return step_of(newest)

    def _tidy(self) -> None:
        """Remove what killed saves have left; set damaged checkpoints aside, from the newest on until one is whole."""
        for path in self.dir.glob("step_*.tmp"):
            shutil.rmtree(path, ignore_errors=True)
        remove_strays(self.dir)
        for folder in reversed(self._folders()):
            if (wrong := damage(folder)) is None:
                break
            try:
                aside = folder.rename(_unused(folder.with_suffix(".damaged")))
            except OSError as error:
                raise UserError(f"{folder} is damaged ({wrong}) and cannot be renamed ({one_line(error)})") from error
            self.remarks.append(f"the checkpoint {folder.name} is damaged ({wrong}); it is kept as {aside}")
        self.held = self._best_on_disk()
        self._remove_old()

    def _refuse_to_begin_anew(self) -> None:
        if aside := sorted(self.dir.glob("step_*.damaged*")):
            raise UserError(
                f"{'; '.join(self.remarks) or f'{aside[-1]} is damaged'}, and no whole checkpoint is left. Nothing was "
                f"removed: put a whole one into {self.dir}, or set name=NAME to begin a new run"
            )


def _unused(path: Path) -> Path:
    """`path`, or with a number behind its name where that is taken."""
    number = 1
    unused = path
    while unused.exists():
        number += 1
        unused = path.with_name(f"{path.name}-{number}")
    return unused


class ModuleState:
    """A module's parameters and buffers as a Stateful."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    def state_dict(self) -> dict[str, Any]:
        return dict(self.module.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state)


@dataclass
class PaceState:
    """Images a step and a chunk as a Stateful. wide: images of a micro-batch on all processes."""

    pace: Pace
    wide: int

    def state_dict(self) -> dict[str, Any]:
        return self.pace._asdict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError when the run began otherwise."""
        self.pace.refuse_other(Pace(**state), self.wide)
