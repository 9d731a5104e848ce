"""A trial: everything refused that can be known without weights, then every model measured, and the verdicts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.compare.arms import choose_metrics, group
from nai_xl.compare.comparison import Comparison, compare
from nai_xl.compare.figures.draw import draw
from nai_xl.compare.judging.verdicts import better_direction, declared, declared_margins
from nai_xl.compare.question import Question
from nai_xl.compare.report.files import write
from nai_xl.compare.report.screen import show
from nai_xl.compare.runs.run import Run
from nai_xl.compare.wording import number
from nai_xl.config.spec import Parts
from nai_xl.data.index import Index, is_held_out
from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket
from nai_xl.judge.arguments import Request
from nai_xl.judge.levels import PREFIX, comparable, over_levels, shared_levels
from nai_xl.judge.measure import STEP, Bench
from nai_xl.judge.models import BASE, Model, models
from nai_xl.record.run_dir import RunDirectory
from nai_xl.task.task import refuse_other_tasks

MEASURED_WITH = "data bucketing evals sampling precision native cache".split()
DEFAULTS = ("data=folder", "evals=[val_loss,color]")


@dataclass(frozen=True)
class Trial:
    request: Request
    cfg: DictConfig
    models: Sequence[Model]
    bench: Bench

    @classmethod
    def of(cls, request: Request) -> Trial:
        """Raises UserError for what cannot be judged. Reads images' and models' headers, and no weight."""
        judged = models(request)
        cfg = _composed(request, judged[0])
        parts = Parts(cfg)
        refuse_other_tasks(parts["evals"], "text_to_image", "'evals=[val_loss,color]'")
        index: Index = parts["data"].scan()
        _refuse_trained(judged, index)
        edge = int(cfg.native.resolution)
        bench = Bench(
            evals=parts["evals"],
            sampling=parts["sampling"],
            bucketing=parts["bucketing"],
            cache=parts["cache"],
            precision=parts["precision"].autocast,
            square=Bucket(edge, edge),
            items=index.held_out or index.items,
            device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        )
        if not index.held_out:
            bench.notes.append(
                f"data.held_out=0: all {len(index.items)} images are looked at as new ones; no model must know them"
            )
        for evaluator in bench.evals:
            evaluator.held_out(bench.items)  # refuses too few
        return cls(request, cfg, judged, bench)

    def introduced(self) -> Iterator[str]:
        """A line for each model: what it is taken for."""
        for model in self.models:
            yield f"{model.side} {model.row}: {model.path}: {model.told}"

    def run(self) -> None:
        """Measure, compare, and write the report into <output_dir>/judge-<name>."""
        names = dict.fromkeys(model.side for model in self.models)
        folder = Path(self.cfg.output_dir) / f"judge-{self.cfg.name or '-'.join(names)}"
        shutil.rmtree(folder / "measured", ignore_errors=True)  # an earlier trial's
        found = self.compared(folder / "measured")
        show(found, write(found, folder, draw(found, {})))

    def compared(self, folder: Path) -> Comparison:
        homes = {model: folder / f"{model.side}-{place}" for place, model in enumerate(self.models)}
        values = {}
        for model, home in homes.items():
            values[model] = self.bench.measure(model, home)
            print(f"measured {model.side} {model.row}", flush=True)
        alike = [home for model, home in homes.items() if model not in self.bench.other_latents]
        levels = shared_levels(alike, STEP)
        runs = []
        for model, home in homes.items():
            own = {metric: value for metric, value in values[model].items() if comparable(metric)}
            own |= over_levels(home, levels, STEP)
            if model in self.bench.other_latents:
                own = {metric: value for metric, value in own.items() if not metric.startswith(PREFIX)}
            runs.append(_run(model, home, own))
        notes = [*self.introduced(), *self.bench.notes, *_by_level(runs, levels)]
        return self._verdicts(runs, notes)

    def _verdicts(self, runs: Sequence[Run], notes: Sequence[str]) -> Comparison:
        directions = declared([self.cfg])
        known, _ = choose_metrics(group(runs)[0], self.request.metrics, lambda metric: ())
        wanted = self.request.metrics or [m for m in known if better_direction(m, directions)]
        names = " and ".join(dict.fromkeys(model.side for model in self.models))
        asked = Question(f"judge {names}", "", f"model={self.models[0].side}", wanted, self.request.equivalence)
        found = compare(runs, asked, directions, declared_margins([self.cfg]))
        return replace(found, notes=[*notes, *found.notes])


# --- before any weight is read ----------------------------------------------------------------------------------------


def _composed(request: Request, first: Model) -> DictConfig:
    """The settings that all models are measured with; those of canvases are the baseline's unless they are given."""
    native = {"resolution": first.edge, "bucket_step": 64 if first.edge >= 512 else 32}
    if first.run is not None:
        native["bucket_step"] = int(first.run.native.bucket_step)
    sizes = [f"native.{key}={value}" for key, value in native.items()]
    cfg = config.compose([*BASE, *DEFAULTS, *sizes, *request.overrides])
    config.check(cfg, only=[key for key in MEASURED_WITH if key in cfg])
    return cfg


def _refuse_trained(judged: Sequence[Model], index: Index) -> None:
    """Raise UserError where an image that is to be looked at is known to be one that a run was trained on."""
    looked_at = {item.content for item in index.held_out or index.items}
    for model in judged:
        if model.run is None or (noted := RunDirectory(model.path).trained_on()) is None:
            continue
        share = float(OmegaConf.select(model.run, "data.held_out") or 0)
        trained = Index([item for item in (*index.items, *index.held_out) if not is_held_out(item, share)])
        known = sum(item.content in looked_at for item in trained.items)
        if known and trained.fingerprint() == noted.data:
            mend = f"data.held_out={share:g}, as in its training" if share else "data.dir to images that are new to it"
            raise UserError(
                f"{model.side}: {model.path} was trained on {known} of these {len(looked_at)} images; set {mend}"
            )


# --- after ------------------------------------------------------------------------------------------------------------


def _run(model: Model, home: Path, values: Mapping[str, float]) -> Run:
    """A model as a comparison sees it."""
    said = {"model": str(model.path), "trained": model.told}
    curves = {metric: {STEP: value} for metric, value in values.items()}
    return Run(str(model.path), {"model": model.side}, model.row, curves=curves, config=said, path=home)


def _by_level(runs: Sequence[Run], levels: Sequence[int]) -> Iterator[str]:
    """What val/x0_loss_logsnr is made of, a line for each side: means over its models, without verdicts."""
    for side in dict.fromkeys(run.label for run in runs):
        same = [run.curves for run in runs if run.label == side]
        tables = {
            level: [curves[f"{PREFIX}_{level}"][STEP] for curves in same if f"{PREFIX}_{level}" in curves]
            for level in levels
        }
        told = [f"{level}: {number(fmean(values))}" for level, values in tables.items() if values]
        if told:
            yield f"{side.partition('=')[2]}: error of x0 at log-SNR {', '.join(told)}"
