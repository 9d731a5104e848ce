"""A finished run is measured anew, and says what it would have said at its end."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from nai_xl.errors import UserError
from nai_xl.evaluate import main
from nai_xl.record.items import read_items
from nai_xl.record.metrics import curves
from nai_xl.train import train
from nai_xl.training.evaluation import config_of, evaluate

EVALS = ["evals=[val_loss,color]", "evals.val_loss.count=2", "evals.color.colors=[red,blue]", "evals.color.steps=2"]


def test_a_finished_run_says_later_what_it_would_have_said_at_its_end(
    small: Callable[..., DictConfig], typed: Callable[..., str]
) -> None:
    options = ["run.max_images=8", "run.seed=3", "data.held_out=0.4", "name=measured"]
    during = train(small(*options, "evals=[sample_grid,val_loss,color]", *EVALS[1:]), {})
    said, items = curves(during), read_items(during, "color/error")
    before = {path.name: path.read_bytes() for path in (during / "config.yaml", during / "arm.json")}
    with (during / "metrics.jsonl").open("r+") as file:  # forget it
        rows = [json.loads(line) for line in file]
        rows = [{k: v for k, v in row.items() if not k.startswith(("val/", "color/"))} for row in rows]
        file.seek(0)
        file.truncate()
        file.writelines(json.dumps(row) + "\n" for row in rows)
    (during / "items" / "color__error.jsonl").unlink()
    assert "color/error" not in curves(during)
    out = typed(main, str(during), *EVALS)
    assert f"color/error {said['color/error'][4]:.4g}" in out
    assert curves(during) == said and read_items(during, "color/error") == items
    assert before == {path.name: path.read_bytes() for path in (during / "config.yaml", during / "arm.json")}
    evaluate(during, config_of(during, [*EVALS, "evals.color.seeds=2"]))
    assert len(read_items(during, "color/error")[4]) == 4  # the later evaluation of a step counts


def test_what_cannot_be_measured_is_told(typed: Callable[..., str], tmp_path: Path) -> None:
    assert "no run here" in typed(main, str(tmp_path), "evals=[color]", status=1)
    assert "name run directories and what to measure" in typed(main, str(tmp_path), status=1)
    with pytest.raises(UserError, match=r"loss=p2: a finished run has its settings; only evals"):
        config_of(tmp_path, ["evals=[color]", "loss=p2"])
