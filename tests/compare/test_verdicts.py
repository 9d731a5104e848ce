"""Which direction is better, as the evaluators declare it."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.compare.comparison import compare
from nai_xl.compare.judging.verdicts import (
    Claims,
    Directions,
    better_direction,
    declared,
    declared_margins,
    margin_of,
    parse_margin,
    verdict,
)  # fmt: skip
from nai_xl.compare.question import Question
from nai_xl.compare.runs.run import Run
from nai_xl.engine.meter import Meter
from nai_xl.errors import UserError
from nai_xl.interfaces import Evaluator
from tests.compare.losses import Command
from tests.synthetic import write_run


@pytest.mark.parametrize(
    ("metric", "difference", "p", "word"),
    [
        ("val/loss", -1, 0.01, "better"), ("val/loss", -1, 0.05, "undecided"),
        ("val/loss_band_0_250", 1, 0.01, "worse"),
        ("color/luminance_range", 1, 0.01, "better"), ("color/error_black", 1, 0.01, "worse"),
        ("coherence/right", -1, 0.01, "worse"), ("mine/thing", 1, 0.01, "higher"), ("mine/thing", -1, 0.01, "lower"),
        ("color/luminance", -1, 0.01, "lower"), ("val/loss", 0, 0.0, "undecided"),
    ],
)  # fmt: skip
def test_verdicts(metric: str, difference: float, p: float, word: str) -> None:
    assert verdict(metric, difference, Claims(p)) == verdict(metric, difference, Claims(p, 0.05)) == word
    assert verdict(metric, difference, Claims(p, 0.049)) == "equal"
    assert verdict(metric, difference, Claims(p, 0.049), level=0.001) == "undecided"


@pytest.mark.parametrize(("text", "size"), [("2%", (0.02, True)), (" 0.5 % ", (0.005, True)), ("0.1", (0.1, False))])
def test_a_margin_is_a_share_or_a_size(text: str, size: tuple[float, bool]) -> None:
    assert parse_margin(text) == pytest.approx(size)


@pytest.mark.parametrize("text", ["two", "-1%", "0", "inf", "nan%", "%"])
def test_what_is_no_margin_is_told(text: str) -> None:
    with pytest.raises(ValueError, match="is no difference; write 2%"):
        parse_margin(text)


def test_margins_are_declared_as_directions_are(plugin: str) -> None:
    assert margin_of("val/loss_band_0_250") == "2%" and margin_of("coherence/cut_2x") == "0.05"
    assert margin_of("mine/thing") is None and margin_of("color/luminance") == "0.02"
    mine = declared_margins([chosen(f"{plugin}.Sharpness", plugin)])
    assert margin_of("sharp/edges", mine) == "3%" and margin_of("val/loss", mine) == "2%"
    with pytest.raises(UserError, match=r"Boundless.equal_within.*a little is no difference"):
        declared_margins([chosen(f"{plugin}.Boundless", plugin)])


def test_the_projects_own_metrics_have_these_directions() -> None:
    """A change here turns verdicts of finished comparisons round."""
    lower = (
        "val/loss val/x0_loss_terminal_raw train/loss train/loss_band_0_250 color/error color/error_black_2x "
        "color/luminance_min coherence/count_error coherence/cut coherence/too_many_2x quality/fid quality/kid "
        "perf/data_wait perf/peak_memory_gib"
    ).split()
    higher = (
        "color/luminance_max color/luminance_range_2x coherence/right quality/clip reconstruction/psnr "
        "perf/images_per_second perf/tflops perf/mfu"
    ).split()
    neither = ["color/luminance", "train/lr", "train/grad_norm", "mine/thing", "valid"]
    assert {better_direction(metric) for metric in lower} == {"lower"}
    assert {better_direction(metric) for metric in higher} == {"higher"}
    assert {better_direction(metric) for metric in neither} == {None}


@pytest.mark.parametrize("option", sorted(path.stem for path in (config.conf_dir() / "evals").glob("*.yaml")))
def test_every_evaluator_keeps_the_whole_contract(option: str) -> None:
    """So that verdicts know it, and a run is not another one for being looked at."""
    node = OmegaConf.load(config.conf_dir() / "evals" / f"{option}.yaml")
    kind: type[Evaluator] = config.locate(node[option]["_target_"])  # type: ignore[assignment, index]
    assert kind.looks_at in {path.stem for path in (config.conf_dir() / "task").glob("*.yaml")}
    assert set(kind.better.values()) <= {"lower", "higher"} and kind.changes_weights is False
    assert all(parse_margin(margin)[0] > 0 for margin in kind.equal_within.values())
    assert all(callable(member) for member in (kind.texts, kind.held_out, kind.run))
    cfg = config.compose([f"evals=[{option}]"])
    for key in {key for keys in [*kind.incomparable_over.values(), *Meter.incomparable_over.values()] for key in keys}:
        assert key in config.groups() or OmegaConf.select(cfg, key) is not None, f"there is no setting {key}"


def test_the_longest_beginning_counts() -> None:
    directions: Directions = {"mine/": "lower", "mine/hits": "higher"}
    assert [better_direction(name, directions) for name in ("mine/misses", "mine/hits_2x", "val/loss")] == [
        "lower", "higher", None,
    ]  # fmt: skip
    assert verdict("mine/hits", 1, Claims(0.01), directions) == "better"
    assert verdict("mine/x", 1, Claims(0.01), directions) == "worse"


PLUGIN = """
    class Sharpness:
        better = {"sharp/": "higher", "sharp/halo": "lower"}
        equal_within = {"sharp/": "3%"}

    class Boundless:
        equal_within = {"sharp/": "a little"}

    class Older:
        pass

    class Wrong:
        better = {"sharp/": "up"}

    def made(every): ...
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an installed module with evaluators."""
    (tmp_path / "sharpness_plugin.py").write_text(textwrap.dedent(PLUGIN))
    monkeypatch.syspath_prepend(tmp_path)
    return "sharpness_plugin"


def chosen(target: str, *plugins: str) -> DictConfig:
    return OmegaConf.create({"plugins": list(plugins), "evals": {"mine": {"_target_": target, "every": 1}}})


def test_a_plug_in_declares_its_own_directions(plugin: str) -> None:
    directions = declared([OmegaConf.create(), chosen(f"{plugin}.Sharpness", plugin)])
    assert better_direction("sharp/edges", directions) == "higher"
    assert better_direction("sharp/halo", directions) == "lower"
    assert better_direction("val/loss", directions) == "lower" and better_direction("sharp/edges") is None
    runs = [
        Run(f"{arm}-{seed}", {"loss": arm}, seed, curves={"sharp/edges": {1: seed + shift * (8 + seed / 7)}})
        for arm, shift in (("a", 0.0), ("b", 1.0))
        for seed in range(3)
    ]
    assert compare(runs, Question("x", baseline="loss=a"), directions).rows[0].verdict == "better"
    assert compare(runs, Question("x", "", "loss=a", ["sharp/edges"])).rows[0].verdict == "higher"
    (unasked,) = compare(runs, Question("x", baseline="loss=a")).rows  # shown, but no share of the adjustment
    assert unasked.verdict == "no verdict" and unasked.effect is not None and unasked.p_holm is None


def test_an_evaluator_that_is_not_here_or_declares_nothing_is_no_obstacle(plugin: str) -> None:
    targets = ["gone_plugin.Thing", f"{plugin}.Older", f"{plugin}.made", f"{plugin}.Missing"]
    configs = [chosen(target, "gone_plugin", plugin) for target in targets]
    assert declared([*configs, chosen(f"{plugin}.Sharpness"), chosen("")]) == declared([])  # not among `plugins`


def test_a_direction_that_is_none_is_told(plugin: str) -> None:
    with pytest.raises(UserError, match=r"sharpness_plugin\.Wrong\.better\['sharp/'\] is 'up'; it must be 'lower' or"):
        declared([chosen(f"{plugin}.Wrong", plugin)])


def test_the_command_asks_the_plug_ins_of_the_runs(told: Command, tmp_path: Path, plugin: str) -> None:
    for loss, shift in (("uniform", 0.0), ("minsnr", 0.1)):
        for seed in range(3):
            path = write_run(tmp_path, {"loss": loss}, seed, effect={"sharp/edges": shift}, sweep="sharp")
            cfg = OmegaConf.merge(OmegaConf.load(path / "config.yaml"), chosen(f"{plugin}.Sharpness", plugin))
            OmegaConf.save(cfg, path / "config.yaml")
    out = told("sweep=sharp", f"output_dir={tmp_path}", "baseline=loss=uniform", f"plugins=[{plugin}]")
    assert "better" in next(line for line in out.splitlines() if line.strip().startswith("minsnr"))


def test_directions_are_read_without_the_model_libraries() -> None:
    """They take seconds to import, and a comparison needs no model."""
    code = (
        "import sys; from nai_xl.compare.judging.verdicts import declared; assert 'val/' in declared(());"
        "print([name for name in ('diffusers', 'transformers', 'torchmetrics') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
