"""The record of finished runs, read back: from run directories, or from MLflow where the directory is elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nai_xl.errors import UserError
from nai_xl.record.items import read_items

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

Curve = Mapping[int, float]  # step -> value


@dataclass(frozen=True)
class Run:
    """One arm with one seed. `arm`: the swept keys' values, without the seed; `config`: 'loss' -> minsnr, where that is
    known, and 'optimizer.lr' -> 1e-3.
    """

    name: str
    arm: Mapping[str, str]
    seed: int
    status: str = "FINISHED"
    error: str = ""
    seconds: float | None = None
    steps: int | None = None
    images: int | None = None
    curves: Mapping[str, Curve] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def label(self) -> str:
        """'schedule=ztsnr, parameterization=v'."""
        return ", ".join(f"{key}={value}" for key, value in self.arm.items()) or self.name

    @property
    def failed(self) -> bool:
        return self.status == "FAILED"

    @cached_property
    def images_per_step(self) -> float:
        """1 where it is not known."""
        return self.images / self.steps if self.images and self.steps else 1.0

    def items(self, metric: str) -> dict[int, dict[str, float]]:
        """step -> item -> value, where the evaluator of `metric` wrote them down."""
        return {} if self.path is None else read_items(self.path, metric)


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file; a line cut short by a crash is left out, and a missing file has none."""
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def word(value: object) -> str:
    """A config value as it is typed in an override."""
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    if isinstance(value, list):
        return f"[{','.join(map(word, value))}]"
    return str(value)


def read_directory(path: Path, config: Mapping[str, Any], sweep: str = "") -> Run:
    """The run that lies in `path` as an arm of `sweep`, with its config flattened by the caller. A run outside of any
    sweep has no swept keys. Raises UserError when there is no run.
    """
    note = path / "arm.json"
    if not note.is_file() and not (path / "metrics.jsonl").is_file():
        raise UserError(
            f"{path} holds neither arm.json nor metrics.jsonl: name a run's directory, such as outputs/NAME"
        )
    try:
        arm = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}
        choices = (arm.get("sweeps") or {}).get(sweep, arm.get("arm") or {})
    except json.JSONDecodeError as error:
        raise UserError(f"{note} is not JSON ({error}); train that arm again, or leave {path} out") from error
    curves: dict[str, dict[int, float]] = {}
    for row in json_lines(path / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                curves.setdefault(name, {})[int(row["step"])] = float(value)
    return Run(
        name=path.name,
        arm={key: word(value) for key, value in choices.items()},
        seed=int(arm.get("seed", config.get("run.seed", 0))),
        status=str(arm.get("status", "FINISHED")),
        error=str(arm.get("error") or ""),
        seconds=arm.get("seconds"),
        steps=arm.get("steps") or max((step for curve in curves.values() for step in curve), default=None),
        images=arm.get("images"),
        curves=curves,
        config=config,
        path=path,
    )


def sweep_directories(output_dir: Path, sweep: str) -> list[Path]:
    """The run directories under `output_dir` that belong to `sweep`, the newest last.

    Raises UserError with the names there are when there is none of that name.
    """
    found: dict[str, list[Path]] = {}
    for note in sorted(output_dir.glob("*/arm.json"), key=lambda path: (path.stat().st_mtime, path)):
        try:
            arm = json.loads(note.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{note} is not JSON ({error}); train that arm again, or remove the file") from error
        for name in dict.fromkeys(filter(None, [arm.get("sweep"), *(arm.get("sweeps") or {})])):
            found.setdefault(name, []).append(note.parent)
    if sweep not in found:
        there = f"there is {', '.join(sorted(found))}" if found else "no arms of any sweep lie there"
        raise UserError(
            f"no run of sweep {sweep} in {output_dir}; {there}. Train it with python -m nai_xl.train -m, or set "
            "output_dir=DIR"
        )
    return found[sweep]


def named_by_differences(runs: Sequence[Run], ignored: tuple[str, ...]) -> list[Run]:
    """Runs outside of any sweep as arms: each is named by the config's values that are not the same in all of them,
    less the keys that begin with one of `ignored`, repeat the seed, or follow from the choice of their group. Runs that
    differ in these only are one arm with several seeds.
    """
    seeds = [run.seed for run in runs]
    keys = [key for key in different_keys([run.config for run in runs]) if not key.startswith(ignored)]
    keys = [key for key in keys if [run.config.get(key) for run in runs] != seeds]
    keys = [key for key in keys if not _follows(key, key.split(".")[0], keys, runs)]
    return [replace(run, arm={key: word(run.config.get(key)) for key in keys}) for run in runs]


def _follows(key: str, group: str, keys: Sequence[str], runs: Sequence[Run]) -> bool:
    """Whether the choice of its group, which is among `keys` itself, tells the value of `key` in all of these runs."""
    pairs = {(word(run.config.get(group)), word(run.config.get(key))) for run in runs}
    return group != key and group in keys and len(pairs) == len({choice for choice, _ in pairs})


def different_keys(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all of these flattened configs, in their order."""
    every = dict.fromkeys(key for config in configs for key in config)
    return [key for key in every if len({word(config.get(key)) for config in configs}) > 1]


# --- MLflow -----------------------------------------------------------------------------------------------------------

STATUS = {"KILLED": "STOPPED", "SCHEDULED": "RUNNING"}
NOTES = ("seed", "error", "git_commit", "data_fingerprint", "signature")  # tags that name no choice


def search_mlflow(uri: str, query: str) -> tuple[MlflowClient, list[MlflowRun]]:
    """The runs of every experiment that an MLflow filter string selects.

    Raises UserError when it cannot be answered or selects none.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=uri)
        experiments = [known.experiment_id for known in client.search_experiments()]
        found = list(client.search_runs(experiments, query, max_results=1000))
    except (MlflowException, OSError) as error:
        raise UserError(f"runs={query!r}: MLflow at {uri} says: {error}; set uri=... if it is another store") from error
    if not found:
        raise UserError(f"runs={query!r} selects no run at {uri}; set uri=... or another filter")
    return client, found


def read_mlflow(client: MlflowClient, found: MlflowRun) -> Run:
    """A run whose directory is not on this machine: its numbers from MLflow's history, its arm from its tags."""
    tags, params = dict(found.data.tags), dict(found.data.params)
    curves = {
        name: {int(point.step): float(point.value) for point in client.get_metric_history(found.info.run_id, name)}
        for name in found.data.metrics
    }
    ended = found.info.end_time
    return Run(
        name=str(found.info.run_name),
        arm={key: tags[key] for key in tags if not key.startswith(("mlflow.", "sweep")) and key not in NOTES},
        seed=int(tags.get("seed") or params.get("run.seed") or 0),
        status=STATUS.get(found.info.status, str(found.info.status)),
        error=tags.get("error", ""),
        seconds=(ended - found.info.start_time) / 1000 if ended else None,
        steps=max((step for curve in curves.values() for step in curve), default=None),
        curves=curves,
        config=params,
    )


def varied_only(runs: Sequence[Run]) -> list[Run]:
    """Runs whose arms name only the keys that are not the same in all of them."""
    keys = different_keys([run.arm for run in runs])
    return [replace(run, arm={key: word(run.arm.get(key)) for key in keys}) for run in runs]
