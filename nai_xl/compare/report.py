"""python -m nai_xl.compare experiment=NAME | sweep=NAME | runs='MLflow filter' | DIRECTORY ...: which arm is better?

Pairs the arms over seeds and evaluation items, prints a table and writes <output_dir>/compare-<name>/ with report.html,
results.csv, results.json and the figures. Further: output_dir=, baseline=key=value,..., metrics=a,b, uri= (with runs=).
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nai_xl import config
from nai_xl.compare import figures, page
from nai_xl.compare.comparison import NOT_OF_THE_METHOD, Comparison, Question, compare
from nai_xl.compare.figures import Drawn
from nai_xl.compare.results import CSV_COLUMNS, as_json, tidy
from nai_xl.compare.runs import (
    Run,
    named_by_differences,
    read_directory,
    read_mlflow,
    search_mlflow,
    sweep_directories,
    varied_only,
)
from nai_xl.compare.samples import samples
from nai_xl.compare.wording import about, change, interval, markdown, narrower, number, p_value, percent, remarks
from nai_xl.diffusion.diagnosis import Diagnosis, diagnose
from nai_xl.errors import UserError
from nai_xl.evals import method_figure
from nai_xl.files import write_atomically
from nai_xl.inspect import combinations as inspect
from nai_xl.tracker.mlflow.delivery import Progress
from nai_xl.tracker.mlflow.sweep import log_summary

SOURCES = ("experiment", "sweep", "runs")
SETTINGS = (*SOURCES, "output_dir", "baseline", "metrics", "uri")


def ignored() -> tuple[str, ...]:
    """What changes neither weights nor samples names no arm."""
    return (*NOT_OF_THE_METHOD, *(key for key in config.left_out() if key != "sampling"))


@dataclass(frozen=True)
class Asked:
    """The command line: settings, and run directories instead of a source."""

    settings: Mapping[str, str]
    directories: Sequence[Path] = ()
    config_dir: Path | None = None


@dataclass(frozen=True)
class Found:
    """The runs that are meant, what they are to answer, and where the report goes."""

    runs: Sequence[Run]
    question: Question
    output_dir: Path
    configs: Mapping[str, DictConfig] = field(default_factory=dict)  # run name -> its config


def arguments(argv: Sequence[str]) -> Asked:
    """Raises UserError unless exactly one source of runs is named."""
    parser = argparse.ArgumentParser(prog="python -m nai_xl.compare", description=__doc__)
    parser.add_argument("--config-dir", "-cd", type=Path, metavar="DIR", help="a further folder of config groups")
    parser.add_argument("what", nargs="*", help="experiment=NAME, sweep=NAME, runs='FILTER', or run directories")
    given = parser.parse_intermixed_args(argv)
    settings: dict[str, str] = {}
    directories = []
    for word in given.what:
        key, equals, value = word.partition("=")
        if equals and not Path(word).exists():
            if key not in SETTINGS:
                raise UserError(f"no setting '{key}' of nai_xl.compare; there is {', '.join(SETTINGS)}")
            settings[key] = value
        else:
            directories.append(Path(word))
    if sum(key in settings for key in SOURCES) + bool(directories) != 1:
        raise UserError("say what to compare: experiment=NAME, sweep=NAME, runs='MLFLOW FILTER' or run directories")
    return Asked(settings, directories, given.config_dir)


# --- finding the runs -------------------------------------------------------------------------------------------------


def find(asked: Asked) -> Found:
    """The runs that the command line means. Raises UserError when there are none."""
    output_dir = Path(asked.settings.get("output_dir", "outputs"))
    if "runs" in asked.settings:
        found = _in_mlflow(asked, output_dir)
    elif asked.directories:
        found = _in_directories(asked.directories, asked.settings.get("output_dir"))
    else:
        found = _of_sweep(asked, output_dir)
    question = replace(
        found.question,
        baseline=asked.settings.get("baseline", found.question.baseline),
        metrics=tuple(filter(None, asked.settings.get("metrics", "").split(","))) or found.question.metrics,
    )
    return replace(found, question=question)


def _of_sweep(asked: Asked, output_dir: Path) -> Found:
    question = Question(asked.settings.get("sweep", ""))
    if experiment := asked.settings.get("experiment"):
        points = config.combinations([f"experiment={experiment}"], asked.config_dir)
        _, _, cfg = next(points)
        points.close()  # type: ignore[attr-defined]
        question = _question(cfg, experiment)
        output_dir = output_dir if "output_dir" in asked.settings else Path(cfg.output_dir)
    paths = sweep_directories(output_dir, question.name)
    configs = {path.name: _config(path) for path in paths}
    runs = [read_directory(path, _flat(path, configs[path.name]), question.name) for path in paths]
    for cfg in configs.values():  # an arm that was trained for another sweep has that one's question
        if OmegaConf.select(cfg, "sweep.name") == question.name:
            question = _question(cfg, question.name)
    return Found(runs, question, output_dir, configs)


def _in_directories(paths: Sequence[Path], output_dir: str | None) -> Found:
    """Named runs, the first of them the baseline. Arms of one sweep keep its names for them; other runs are named by
    what differs in their configs.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; name runs such as outputs/NAME, or say sweep=NAME")
    configs = {path.name: _config(path) for path in paths}
    runs = [read_directory(path, _flat(path, configs[path.name])) for path in paths]
    if not all(run.arm for run in runs) or len({tuple(run.arm) for run in runs}) > 1:
        runs = named_by_differences(runs, ignored())
    question = replace(_question(configs[paths[0].name], "runs"), baseline=runs[0].label)
    return Found(runs, question, Path(output_dir or paths[0].absolute().parent), configs)


def _in_mlflow(asked: Asked, output_dir: Path) -> Found:
    """Runs by an MLflow filter: from their directory where it is here, else from MLflow's own history."""
    uri = asked.settings.get("uri") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    client, everything = search_mlflow(uri, asked.settings["runs"])
    selected = [one for one in everything if "sweep_summary" not in one.data.tags]
    sent = {path.parent: Progress.read(path.parent) for path in output_dir.glob("*/mlflow.json")}
    here = {progress.run_id: path for path, progress in sent.items() if progress}
    runs, configs = [], {}
    for one in selected:
        if path := here.get(one.info.run_id):
            configs[path.name] = _config(path)
            runs.append(read_directory(path, _flat(path, configs[path.name])))
        else:
            runs.append(read_mlflow(client, one))
    sweeps = {one.data.tags.get("sweep") for one in selected}
    name = sweeps.pop() if len(sweeps) == 1 else None
    known = next(iter(configs.values()), OmegaConf.create())
    question = _question(known, name) if name else Question("runs")  # of several sweeps, none of their questions
    named = varied_only(runs) if all(run.arm for run in runs) else named_by_differences(runs, ignored())
    return Found(named, question, output_dir, configs)


def _config(path: Path) -> DictConfig:
    """The config that a run wrote down; an empty one where it had not got so far."""
    return config.stored_config(path) if (path / "config.yaml").is_file() else OmegaConf.create({})


def _flat(path: Path, cfg: DictConfig) -> dict[str, Any]:
    """The config's leaves after the choices of groups, which a run notes beside its config."""
    file = path / "params.json"
    noted = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    known = {**noted.get("tags", {}), **config.upgraded_choices(noted.get("params", {}))}
    return {**{group: known[group] for group in config.groups() if group in known}, **config.flat(cfg)}


def _question(cfg: DictConfig, name: str) -> Question:
    node = cfg.get("sweep") or {}
    return Question(
        name=str(node.get("name") or name),
        question=str(node.get("question") or ""),
        baseline=str(node.get("baseline") or ""),
        metrics=tuple(map(str, node.get("metrics") or ())),
    )


# --- figures ----------------------------------------------------------------------------------------------------------


def draw(found: Comparison, configs: Mapping[str, DictConfig]) -> dict[str, tuple[Drawn, str]]:
    """Every figure there is something to draw for, with the sentence that stands below it."""
    made = {
        "differences": (
            figures.forest(found),
            "Difference to the baseline at the end: thick, the paired 95 % interval; thin, what the same runs would "
            "have shown unpaired (an arrow: it goes on). Colour and mark tell the verdict.",
        ),
        "curves": (
            figures.curves(found),
            "Over the training: the mean of the seeds with their range, and below it the paired difference to the "
            "baseline with its 95 % interval over seeds.",
        ),
    }
    for seed in sorted({seed for arm in found.arms for seed in arm.runs}):
        words = f"The same prompts and the same noise in every arm, after training with seed {seed}."
        made[f"samples_seed_{seed}"] = (samples(found, seed), words)
    made["method"] = (weights(found, configs), "What the arms do: noise levels and how much each timestep counts.")
    return {name: (drawn, words) for name, (drawn, words) in made.items() if drawn is not None}


def weights(found: Comparison, configs: Mapping[str, DictConfig]) -> Drawn | None:
    """The arms' schedules and weights overlaid, as far as their configs are here; None where they do not differ."""
    names = found.names
    tables: dict[str, Diagnosis] = {}
    for arm in found.arms:
        run = arm.first
        if run is None or not configs.get(run.name):
            continue
        cfg = configs[run.name]
        parts = [key for key in cfg if key in config.groups() or key in ("plugins", "native")]
        try:
            tables[names[arm.label]] = diagnose(inspect.build_objective(OmegaConf.masked_copy(cfg, parts)))
        except UserError:
            continue  # an arm that was refused, or a plug-in that is not installed here
    if all(_alike(one, other) for one, other in pairwise(tables.values())):
        return None
    image = method_figure.method(
        [method_figure.Arm(table, name) for name, table in tables.items()], "", method_figure.Legend("arm")
    )
    png = BytesIO()
    image.save(png, format="PNG")
    return Drawn(png.getvalue())


def _alike(one: Diagnosis, other: Diagnosis) -> bool:
    return len(one) == len(other) and all(
        bool((getattr(one, name) == getattr(other, name)).all()) for name in ("noise", "weight", "density")
    )


# --- files ------------------------------------------------------------------------------------------------------------


def write(found: Comparison, folder: Path, drawn: Mapping[str, tuple[Drawn, str]]) -> list[Path]:
    """The report's files, the page first. Raises UserError when `folder` cannot be written."""
    html, table, data = folder / "report.html", folder / "results.csv", folder / "results.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows(tidy(found, row) for row in found.rows)
        (folder / "report.md").write_text(markdown(found), encoding="utf-8")
        text = json.dumps(as_json(found), indent=2, default=str, allow_nan=False)
        data.write_text(text + "\n", encoding="utf-8")
        for name, (figure, _) in drawn.items():
            (folder / f"{name}.png").write_bytes(figure.png)
        write_atomically(html, lambda path: path.write_text(page.page(found, drawn), encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); set output_dir=DIR") from error
    return [html, folder / "report.md", table, data, *(folder / f"{name}.png" for name in drawn)]


def log(found: Comparison, files: Sequence[Path]) -> str:
    """Put the report where the arms are in MLflow; what became of it, in a line, or '' when they are in none."""
    paths = [run.path for arm in found.arms for run in arm.runs.values() if run.path is not None]
    sent = next((progress for path in paths if (progress := Progress.read(path)) is not None and progress.run_id), None)
    if sent is None:
        return ""
    differences = {
        re.sub(r"[^\w\-./ :]", "_", f"{row.metric}/{found.names[row.arm].replace(' + ', ' ')}"): row.effect.difference
        for row in found.rows
        if row.effect
    }
    try:
        page = log_summary(
            found.asked.name, found.asked.question, files, differences, uri=sent.uri, experiment=sent.experiment
        )
    except UserError as error:
        return f"not in MLflow: {error}"
    return f"MLflow: {page}"


# --- screen -----------------------------------------------------------------------------------------------------------

SHADES = {"better": "bold blue", "worse": "bold red", "higher": "bold", "lower": "bold"}


def table(found: Comparison) -> Table:
    """A row for each metric and arm."""
    made = Table(box=None, padding=(0, 1), title=Text(about(found), style="bold"), title_justify="left")
    made.add_column("arm", no_wrap=True)
    made.add_column("", no_wrap=True)
    for heading in ("mean", "difference", "", "95 % interval", "p (Holm)", "narrower by pairing", "seeds x items"):
        made.add_column(heading, justify="right", no_wrap=True)
    for metric in found.metrics:
        rows = found.of(metric)
        base = next((row.baseline_mean for row in rows if row.baseline_mean is not None), None)
        made.add_row(Text(metric, style="bold cyan"))
        made.add_row(Text(found.names[found.baseline]), "baseline", number(base))
        for row in rows:
            e = row.effect
            made.add_row(
                Text(found.names[row.arm]),
                Text(row.verdict, style=SHADES.get(row.verdict, "")),
                number(row.mean),
                change(e.difference) if e else "",
                percent(row),
                interval(row) if e else "",
                p_value(row.p_holm) if e else "",
                narrower(row) if e else "",
                f"{e.seeds} x {e.items}" if e else "",
            )
    return made


def show(found: Comparison, files: Sequence[Path]) -> None:
    """Question, table at its natural width, remarks, and where the report lies."""
    console = Console(highlight=False, soft_wrap=True)
    if found.asked.question:
        console.print(found.asked.question, markup=False, style="bold")
    made = table(found)
    Console(highlight=False, width=Console(width=1000).measure(made).maximum).print(made)
    console.print()
    for line in [*found.notes, *remarks(found)]:
        console.print(f"- {line}", markup=False)
    console.print(f"report: {files[0]}", markup=False)


def main() -> None:
    with config.mistakes_told():
        found = find(arguments(sys.argv[1:]))
        result = compare(found.runs, found.question)
        folder = found.output_dir / f"compare-{found.question.name}"
        files = write(result, folder, draw(result, found.configs))
        show(result, files)
        if line := log(result, files):
            print(line)
