"""Which runs are compared: those of a sweep, of named directories, or of an MLflow filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.compare.arguments import Request
from nai_xl.compare.question import Question
from nai_xl.compare.runs.directory import read_directory, sweep_directories
from nai_xl.compare.runs.from_mlflow import read_mlflow, search_mlflow
from nai_xl.compare.runs.naming import NOT_OF_THE_METHOD, named_by_differences, varied_only
from nai_xl.compare.runs.run import Run
from nai_xl.compare.statistics.spending import plan_of
from nai_xl.errors import UserError
from nai_xl.record.config import read_config, read_params
from nai_xl.tracker.mlflow.delivery import Progress
from nai_xl.tracker.mlflow.store import chosen_uri


@dataclass(frozen=True)
class Selection:
    """The runs to compare, the question they are to answer, and the folder that the report is written to.

    `named`: how a user has named the runs, where they are not simply those of a sweep.
    """

    runs: Sequence[Run]
    question: Question
    output_dir: Path
    configs: Mapping[str, DictConfig] = field(default_factory=dict)  # run name -> its config
    named: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        """Where the report and the record of looks are written."""
        return self.output_dir / f"compare-{self.question.name}"


def select(request: Request) -> Selection:
    """The runs that the command line means. Raises UserError when there are none."""
    output_dir = Path(request.settings.get("output_dir", "outputs"))
    if "runs" in request.settings:
        found = _in_mlflow(request, output_dir)
    elif request.directories:
        found = _in_directories(request.directories, request.settings.get("output_dir"))
    else:
        found = _of_sweep(request, output_dir)
    question = replace(
        found.question,
        baseline=request.settings.get("baseline", found.question.baseline),
        metrics=tuple(filter(None, request.settings.get("metrics", "").split(","))) or found.question.metrics,
        equivalence=request.settings.get("equivalence", found.question.equivalence),
        detect=request.settings.get("detect", ""),
    )
    return replace(found, question=found.question.asking(question, found.named))


def _of_sweep(request: Request, output_dir: Path) -> Selection:
    question = Question(request.settings.get("sweep", ""))
    if experiment := request.settings.get("experiment"):
        points = config.combinations([f"experiment={experiment}"], request.config_dir)
        _, _, cfg = next(points)
        points.close()  # type: ignore[attr-defined]  # leaves Hydra's context
        question = _question(cfg, experiment)
        output_dir = output_dir if "output_dir" in request.settings else Path(cfg.output_dir)
    paths = sweep_directories(output_dir, question.name)
    runs, configs = _read(paths, question.name)
    for cfg in configs.values():  # an arm that was trained for another sweep has the question of that one
        if OmegaConf.select(cfg, "sweep.name") == question.name:
            question = _question(cfg, question.name)
    return Selection(runs, question, output_dir, configs)


def _in_directories(paths: Sequence[Path], output_dir: str | None) -> Selection:
    """Named runs, the first of them the baseline.

    Arms of one sweep keep the names they have there. Other runs are named by what differs in their configs.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; name runs such as outputs/NAME, or say sweep=NAME")
    runs, configs = _read(paths)
    if not all(run.arm for run in runs) or len({tuple(run.arm) for run in runs}) > 1:
        runs = named_by_differences(runs, _ignored())
    runs = [replace(run, place=place) for place, run in enumerate(runs)]
    sweeps = {OmegaConf.select(cfg, "sweep.name") for cfg in configs.values()}
    known = configs[paths[0].name] if len(sweeps) == 1 else OmegaConf.create()  # else they answer no one's question
    question = replace(_question(known, "runs"), baseline=runs[0].label)
    named = [run.name for run in runs]
    return Selection(runs, question, Path(output_dir or paths[0].absolute().parent), configs, named)


def _in_mlflow(request: Request, output_dir: Path) -> Selection:
    """Runs by an MLflow filter: read from their directory if it is here, else from MLflow's own history."""
    uri = chosen_uri(request.settings.get("uri"))
    client, everything = search_mlflow(uri, request.settings["runs"])
    selected = [one for one in everything if "sweep_summary" not in one.data.tags]
    sent = {path.parent: Progress.read(path.parent) for path in output_dir.glob("*/mlflow.json")}
    here = {progress.run_id: path for path, progress in sent.items() if progress}
    runs: list[Run] = []
    configs: dict[str, DictConfig] = {}
    for one in selected:
        if path := here.get(one.info.run_id):
            read, own = _read([path])
            runs += read
            configs |= own
        else:
            runs.append(read_mlflow(client, one))
    sweeps = {one.data.tags.get("sweep") for one in selected}
    name = sweeps.pop() if len(sweeps) == 1 else None
    known = next(iter(configs.values()), OmegaConf.create())
    question = _question(known, name) if name else Question("runs")  # runs of several sweeps answer no one's question
    arms = varied_only(runs) if all(run.arm for run in runs) else named_by_differences(runs, _ignored())
    query = " ".join(request.settings["runs"].split())
    return Selection(arms, question, output_dir, configs, [] if query == f"tags.sweep = '{name}'" else [query])


def _read(paths: Sequence[Path], sweep: str = "") -> tuple[list[Run], dict[str, DictConfig]]:
    """The runs of these directories, and run name -> its config."""
    configs = {path.name: _config(path) for path in paths}
    return [read_directory(path, _flat(path, configs[path.name]), sweep) for path in paths], configs


def _ignored() -> tuple[str, ...]:
    """Settings that change neither weights nor samples, and so name no arm."""
    return (*NOT_OF_THE_METHOD, *(key for key in config.left_out() if key != "sampling"))


def _config(path: Path) -> DictConfig:
    """The config that a run wrote down, in terms of this version; an empty one if the run has not got that far."""
    stored = read_config(path)
    return OmegaConf.create() if stored is None else config.upgraded(stored)


def _flat(path: Path, cfg: DictConfig) -> dict[str, Any]:
    """The choices of groups, which a run notes in params.json, then the config's leaves."""
    noted = read_params(path)
    known = {**noted.tags, **config.upgraded_choices(noted.params)}
    return {**{group: known[group] for group in config.groups() if group in known}, **config.flat(cfg)}


def _question(cfg: DictConfig, name: str) -> Question:
    node = cfg.get("sweep") or {}
    return Question(
        name=str(node.get("name") or name),
        question=str(node.get("question") or ""),
        baseline=str(node.get("baseline") or ""),
        metrics=tuple(map(str, node.get("metrics") or ())),
        equivalence=str(node.get("equivalence") or ""),
        plan=plan_of(node),
    )
