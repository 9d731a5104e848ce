"""What is compared with what, what is left out and said."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from omegaconf import OmegaConf

from nai_xl.compare.arms import group
from nai_xl.compare.comparison import Comparison, compare
from nai_xl.compare.figures import curves
from nai_xl.compare.figures.canvas import Drawn
from nai_xl.compare.judging.rows import Row
from nai_xl.compare.power import needed
from nai_xl.compare.question import Question
from nai_xl.compare.runs.directory import read_directory
from nai_xl.compare.runs.naming import NOT_OF_THE_METHOD, named_by_differences
from nai_xl.compare.runs.run import Run
from nai_xl.compare.wording import answer, markdown, remarks, said
from nai_xl.errors import UserError
from nai_xl.record.arm import Arm, write_arm
from tests.compare.losses import BAD, GOOD, LOST, METRICS, SAME
from tests.synthetic import write_run


def row(found: Comparison, metric: str, arm: dict[str, str]) -> Row:
    return next(row for row in found.of(metric) if row.arm == f"loss={arm['loss']}")


def test_the_verdicts_are_those_that_were_built_in(found: Comparison) -> None:
    table = {arm["loss"]: [row(found, metric, arm).verdict for metric in METRICS] for arm in (GOOD, SAME, BAD, LOST)}
    assert table == {
        "minsnr": ["better", "identical"],
        "edm": ["identical", "identical"],
        "p2": ["worse", "better"],
        "debiased": ["failed", "failed"],
    }
    effect = row(found, "val/loss", GOOD).effect
    assert effect is not None and effect.low is not None and effect.high is not None
    assert effect.low < -0.05 < effect.high and (effect.seeds, effect.items) == (4, 24)
    assert effect.factor is not None and effect.factor > 3


def test_an_aa_arm_differs_by_exactly_nothing(found: Comparison) -> None:
    for metric in METRICS:
        effect = row(found, metric, SAME).effect
        assert effect is not None and (effect.difference, effect.low, effect.high, effect.p) == (0, 0, 0, 1)
    assert "edm is identical to uniform." in answer(found, "val/loss")


def test_a_missing_seed_and_failures_are_said(found: Comparison) -> None:
    worse = row(found, "val/loss", BAD)
    assert worse.seeds == [0, 1, 2] and worse.effect is not None and worse.effect.seeds == 3
    told = remarks(found)
    assert "p2: seed 3 only in the baseline: left out" in told
    assert sum("debiased: failed with seed" in line and "loss is not finite" in line for line in told) == 4
    assert "There is no result of debiased, which failed." in answer(found, "color/error")


def test_sentences_say_who_by_how_much_and_what_is_possible(found: Comparison) -> None:
    sentences = answer(found, "val/loss")
    assert re.match(r"minsnr \(.1\d %\) is better than uniform; p2 \(\+1\d %\) is worse\. edm is identical", sentences)
    assert "worse" not in answer(found, "color/error")


def curve_run(arm: str, seed: int, values: dict[int, float], **more: object) -> Run:
    return Run(f"{arm}-{seed}", {"loss": arm}, seed, curves={"val/loss": values}, **more)  # type: ignore[arg-type]


def test_the_last_common_step_is_compared_and_told() -> None:
    runs = [curve_run("a", s, {100: 5.0, 200: 4.0 + s / 7, 300: 1.0}) for s in range(3)]
    runs += [curve_run("b", s, {100: 4.0, 200: 2.0 + s / 14}, status="RUNNING") for s in range(3)]
    found = compare(runs, Question("x", baseline="loss=a"))
    (one,) = found.rows
    assert one.step == 200 and one.effect is not None and one.verdict == "better"
    assert one.effect.difference == pytest.approx(-0.5 * one.baseline_mean)
    assert "b: compared at step 200, the last in common; one side goes on to 300" in remarks(found)
    assert "b: still running" in remarks(found)


def test_what_is_not_finite_is_left_out_and_said() -> None:
    runs = [curve_run("a", s, {100: 1.0 + s}) for s in range(3)]
    runs += [curve_run("b", s, {100: math.nan if s == 1 else 2.0 + s}) for s in range(3)]
    found = compare(runs, Question("x", baseline="loss=a"))
    assert found.rows[0].seeds == [0, 2] and "not finite with seed 1" in remarks(found)[0]
    assert found.rows[0].verdict == "no verdict" and found.rows[0].p_holm is None
    assert answer(found, "val/loss") == "No verdict on b (not finite with seed 1)."


@pytest.mark.parametrize("side", ["a", "b"])
def test_an_arm_or_baseline_of_which_runs_failed_is_not_judged(side: str) -> None:
    """Of six runs two failed: the four that are left are a selection."""
    runs = [curve_run("a", s, {100: 1.0 + s / 9}) for s in range(6)] + [
        curve_run("b", s, {100: 0.3 + s / 99}) for s in range(6)
    ]
    whole = compare(runs, Question("x", baseline="loss=a"))
    assert whole.rows[0].verdict == "better"
    runs = [
        replace(run, status="FAILED", error="loss is not finite") if run.name in (f"{side}-1", f"{side}-2") else run
        for run in runs
    ]
    found = compare(runs, Question("x", baseline="loss=a"))
    who = "this arm" if side == "b" else "the baseline"
    assert found.rows[0].verdict == "no verdict" and f"2 of 6 runs of {who} failed" in answer(found, "val/loss")


def test_two_seeds_are_not_judged_however_alike_they_are() -> None:
    runs = [curve_run("a", s, {100: 6 / 8}) for s in range(2)] + [curve_run("b", s, {100: 5 / 8}) for s in range(2)]
    found = compare(runs, Question("x", baseline="loss=a"))
    assert found.rows[0].verdict == "two seeds only" and found.rows[0].p_holm is None
    assert answer(found, "val/loss") == "Two seeds are too few to judge b."


def test_an_arm_may_be_shown_equal_within_a_margin_or_undecided() -> None:
    random = np.random.default_rng(0)
    shared = 1 + 0.1 * random.standard_normal(6)
    curves = {"a": shared, "b": shared * (1.003 + 0.002 * random.standard_normal(6))}
    curves["c"] = shared * (1.05 + 0.1 * random.standard_normal(6))
    runs = [curve_run(arm, s, {100: float(v)}) for arm, values in curves.items() for s, v in enumerate(values)]
    found = compare(runs, Question("x", baseline="loss=a"))
    near, far = found.rows
    assert near.verdict == "equal" and near.margin == "2%" and said(near) == "equal within 2 %"
    assert near.p_equal is not None and near.p_equal < 0.05
    assert far.verdict == "undecided" and far.seeds_needed is not None and far.seeds_needed > 6
    assert f"undecided, about {far.seeds_needed} seeds" == said(far)
    assert answer(found, "val/loss").startswith("b is equal to a within 2 %. Undecided: c (")
    narrow = compare(runs, Question("x", baseline="loss=a", equivalence="0.1%"))
    assert narrow.rows[0].verdict == "worse" and narrow.rows[0].margin == "0.1%"
    units = compare(runs, Question("x", baseline="loss=a", equivalence="0.02"))
    assert said(units.rows[0]) == "equal within 0.02"


def test_noises_of_a_prompt_are_one_item(tmp_path: Path) -> None:
    """Four noises of six prompts are six items, not 24: other prompts would differ more than other noises do."""
    for name in ("uniform", "minsnr"):
        for seed in range(3):
            path = write_run(tmp_path, {"loss": name}, seed, effect={"color/error": 0.01})
            items = path / "items" / "color__error.jsonl"
            items.write_text(re.sub(r"image(\d\d)", lambda m: f"p{int(m[1]) // 4}/{int(m[1]) % 4}", items.read_text()))
    runs = [read_directory(path, {}) for path in sorted(tmp_path.iterdir())]
    (one,) = compare(runs, Question("x", baseline="loss=uniform", metrics=["color/error"])).rows
    assert one.effect is not None and (one.effect.seeds, one.effect.items) == (3, 6)


def test_items_that_a_run_lacks_are_said_and_keep_from_a_verdict(tmp_path: Path) -> None:
    for name in ("uniform", "minsnr"):
        for seed in range(3):
            path = write_run(tmp_path, {"loss": name}, seed, effect={"val/loss": -0.1 if name == "minsnr" else 0.0})
            if (name, seed) == ("minsnr", 1):
                items = path / "items" / "val__loss.jsonl"
                items.write_text(items.read_text().replace("image03", "image99"))
    runs = [read_directory(path, {}) for path in sorted(tmp_path.iterdir())]
    found = compare(runs, Question("x", baseline="loss=uniform", metrics=["val/loss"]))
    assert found.rows[0].verdict == "no verdict" and "2 items are not in every run" in answer(found, "val/loss")


def test_without_a_common_seed_there_is_no_pair() -> None:
    runs = [curve_run("a", 0, {100: 1.0}), curve_run("b", 1, {100: 2.0})]
    assert compare(runs, Question("x", baseline="loss=a")).rows[0].verdict == "no pairs"


def test_a_failed_baseline_is_said_with_its_error() -> None:
    runs = [curve_run("a", 0, {}, status="FAILED", error="out of memory"), curve_run("b", 0, {100: 2.0})]
    row = compare(runs, Question("x", baseline="loss=a")).rows[0]
    assert row.verdict == "no pairs" and "the baseline failed with seed 0: out of memory" in row.notes


def test_one_seed_is_not_judged_even_with_items(outputs: Path) -> None:
    runs = [read_directory(outputs / f"{name}-0", {}, "losses") for name in ("uniform", "minsnr")]
    (one,) = compare(runs, Question("x", baseline="loss=uniform", metrics=["val/loss"])).rows
    assert one.verdict == "one seed only" and one.p_holm is None
    assert one.effect is not None and one.effect.items == 24 and one.effect.low is not None


def test_equal_numbers_are_identical_even_with_one_seed(outputs: Path) -> None:
    run = read_directory(outputs / "uniform-0", {}, "losses")
    runs = [run, replace(run, arm={"loss": "copied"})]
    (row,) = compare(runs, Question("losses", baseline="loss=uniform", metrics=["val/loss"])).rows
    assert row.verdict == "identical"


def test_items_count_only_where_the_metric_is_their_mean(tmp_path: Path) -> None:
    for name in ("uniform", "minsnr"):
        for seed in range(2):
            path = write_run(tmp_path, {"loss": name}, seed, effect={"val/loss": 0.01})
            if (name, seed) == ("minsnr", 1):
                rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
                text = "".join(json.dumps({**r, "val/loss": r["val/loss"] * 1.1}) + "\n" for r in rows)
                (path / "metrics.jsonl").write_text(text)
    runs = [read_directory(path, {}) for path in sorted(tmp_path.iterdir())]
    (one,) = compare(runs, Question("x", baseline="loss=uniform", metrics=["val/loss"])).rows
    assert one.effect is not None and (one.effect.seeds, one.effect.items) == (2, 1)


def test_holm_counts_all_arms_and_metrics(found: Comparison) -> None:
    tested = [row for row in found.rows if row.p_holm is not None and row.effect is not None]
    assert len(tested) == 6  # three arms that did not fail, two metrics
    claims = [row.effect.p for row in tested if row.effect] + [0.0] * 3  # three rows are identical, and so equal
    smallest = min((row for row in tested if row.p_equal != 0), key=lambda row: row.effect.p or 0)  # type: ignore[union-attr]
    assert smallest.effect is not None and smallest.effect.p is not None and len(claims) == 9
    assert smallest.p_holm == pytest.approx(6 * smallest.effect.p)


def test_images_to_the_baselines_last_loss() -> None:
    runs = [curve_run("a", s, {100: 5.0, 200: 3.0, 300: 2.0 + s}, images=3000, steps=300) for s in (0, 1)]
    runs += [curve_run("b", s, {100: 3.0, 200: 1.0, 300: 0.5}, images=3000, steps=300) for s in (0, 1)]
    runs += [curve_run("c", s, {100: 9.0, 200: 9.0, 300: 9.0 * s - 8}, images=3000, steps=300) for s in (0, 1)]
    runs += [curve_run("d", s, {100: 9.0, 200: 9.0, 300: 9.0 - 9 * s}, images=3000, steps=300) for s in (0, 1)]
    found = compare(runs, Question("x", baseline="loss=a"))
    targets = {target.arm: target for target in found.targets}
    assert targets["loss=b"].images == {0: 2000, 1: 1000} and targets["loss=b"].baseline_images == {0: 3000, 1: 2000}
    assert targets["loss=b"].ratio is not None and targets["loss=b"].ratio[0] == pytest.approx((2 / 3 * 1 / 2) ** 0.5)
    assert targets["loss=c"].ratio is not None and targets["loss=d"].ratio is None
    assert targets["loss=d"].images == {0: None, 1: 3000}


def test_a_run_that_counts_no_images_yet_has_no_share_of_the_baselines() -> None:
    runs = [curve_run("a", s, {100: 5.0, 200: 3.0}, images=3200, steps=200) for s in (0, 1)]
    runs += [curve_run("b", 0, {100: 3.0}, status="RUNNING"), curve_run("b", 1, {100: 3.0}, images=3200, steps=200)]
    runs += [curve_run("c", s, {100: 3.0}, status="RUNNING") for s in (0, 1)]
    found = compare(runs, Question("x", baseline="loss=a"))
    (target,) = found.targets
    assert target.arm == "loss=b" and target.images == {1: 1600} and target.baseline_images == {1: 3200}
    assert [row.images for row in found.rows] == [1600, 1600]
    nowhere = [curve_run(arm, 0, {100: 3.0}, status="RUNNING") for arm in "ab"]
    assert compare(nowhere, Question("x", baseline="loss=a")).rows[0].images is None


def test_curves_are_over_steps_unless_every_arm_counts_images(monkeypatch: pytest.MonkeyPatch) -> None:
    axes: list[Axes] = []
    monkeypatch.setattr(curves, "save", lambda figure: axes.extend(figure.axes) or Drawn(b""))
    counted = [curve_run(arm, 0, {100: 5.0, 200: 3.0}, images=3200, steps=200) for arm in "ab"]
    for last, label, end in (
        (counted[1], "images seen", 3200),
        (replace(counted[1], images=None), "optimizer steps", 200),
    ):
        axes.clear()
        curves.curves(compare([counted[0], last], Question("x", baseline="loss=a")))
        assert axes[1].get_xlabel() == label
        assert {line.get_xdata()[-1] for line in axes[0].lines} == {end}


def test_a_run_under_way_has_noted_neither_images_nor_seconds(tmp_path: Path) -> None:
    write_arm(tmp_path, Arm(status="RUNNING"))
    run = read_directory(tmp_path, {})
    assert (run.images, run.seconds, run.images_per_step) == (None, None, None)


def test_a_group_that_only_sets_others_names_no_arm() -> None:
    choices = [{"experiment": "minsnr", "loss": "minsnr"}, {"hardware": "cpu", "recipe": "own", "loss": "minsnr"}]
    runs = [Run(f"run-{i}", {}, i, config={"run.seed": i, **choice}) for i, choice in enumerate(choices)]
    runs += [Run("run-2", {}, 0, config={"run.seed": 0, "debug": "fast", "loss": "uniform"})]
    named = named_by_differences(runs, NOT_OF_THE_METHOD)
    assert [run.label for run in named] == ["loss=minsnr", "loss=minsnr", "loss=uniform"]


def test_parts_of_a_metric_are_compared_only_when_named() -> None:
    values = {100: 1.0}
    curves = dict.fromkeys(["train/loss", "perf/mfu", "val/loss", "val/loss_band_0_250", "color/error"], values)
    runs = [Run(f"{arm}{s}", {"loss": arm}, s, curves=curves) for arm in "ab" for s in (0, 1)]
    assert compare(runs, Question("x")).metrics == ["val/loss", "color/error"]
    assert compare(runs, Question("x", metrics=["val/loss_band_0_250"])).metrics == ["val/loss_band_0_250"]


def test_the_same_arm_and_seed_twice_counts_once_and_is_said() -> None:
    runs = [curve_run("a", 0, {1: 1.0}), Run("again", {"loss": "a"}, 0), curve_run("b", 0, {1: 1.0})]
    arms, notes = group(runs)
    assert arms[0].runs[0].name == "again" and notes == ["loss=a has seed 0 twice: again counts, a-0 is left out"]


def test_an_arm_named_with_all_of_its_keys_is_meant_though_another_has_more() -> None:
    arms = [{"lr": "1"}, {"lr": "1", "memory": "[tf32]"}]
    runs = [Run(f"{i}-{s}", arm, s, curves={"val/loss": {1: 1.0}}) for i, arm in enumerate(arms) for s in (0, 1)]
    assert compare(runs, Question("x", baseline="lr=1")).baseline == "lr=1"


def test_arms_stand_in_natural_order_under_short_names() -> None:
    def names(*arms: dict[str, str]) -> list[str]:
        runs = [Run(str(i), arm, 0, curves={"val/loss": {1: 1.0}}) for i, arm in enumerate(arms)]
        return list(compare(runs, Question("x")).names.values())

    assert names({"loss.gamma": "20"}, {"loss.gamma": "5"}) == ["gamma=5", "gamma=20"]
    assert names({"a": "x"}, {"a": "y", "g": "5"}, {"a": "y", "g": "20"}) == ["x", "y + g=5", "y + g=20"]
    assert names({"a.n": "1", "b.n": "5"}, {"a.n": "2", "b.n": "6"}) == ["a.n=1 + b.n=5", "a.n=2 + b.n=6"]
    assert names({"a": "x", "b": "on"}, {"a": "y", "b": "on"}) == ["x", "y"]
    assert names({"a": "x", "ema": "none"}, {"a": "y", "ema": "standard"}) == ["x + ema=none", "y + standard"]


def test_without_a_named_baseline_it_is_the_first_arm_as_typed(tmp_path: Path) -> None:
    """Not the first by alphabet; runs of before places were noted stand in the order of their names."""
    for place, loss in enumerate(("uniform", "minsnr", "edm")):
        for seed in range(2):
            path = write_run(tmp_path, {"loss": loss}, seed, effect={"val/loss": 0.1})
            arm = json.loads((path / "arm.json").read_text())
            places = {"choices": 2 * place + seed}
            (path / "arm.json").write_text(json.dumps(arm if loss == "edm" else {**arm, "places": places}))
    runs = [read_directory(path, {}, "choices") for path in sorted(tmp_path.iterdir())]
    found = compare(runs, Question("choices"))
    assert found.baseline == "loss=uniform" and list(found.names.values()) == ["uniform", "minsnr", "edm"]
    assert any("no baseline was named, so the first arm, loss=uniform, is it" in note for note in found.notes)


def test_markdown_is_a_table_of_every_row(found: Comparison) -> None:
    assert markdown(found).count("\n| ") == 1 + len(found.rows)


def test_an_arm_that_has_not_begun_is_no_obstacle(outputs: Path, tmp_path: Path) -> None:
    """arm.json is written before config.yaml and metrics.jsonl."""
    (tmp_path / "new").mkdir()
    note = {"sweep": "losses", "arm": {"loss": "soft"}, "seed": 0, "status": "RUNNING", "error": None}
    (tmp_path / "new" / "arm.json").write_text(json.dumps(note))
    paths = [outputs / "uniform-0", outputs / "minsnr-0", tmp_path / "new"]
    found = compare([read_directory(path, {}, "losses") for path in paths], Question("x", baseline="loss=uniform"))
    assert {row.verdict for row in found.rows if row.arm == "loss=soft"} == {"not measured"}
    assert OmegaConf.load(outputs / "uniform-0" / "config.yaml").sweep.name == "losses"


def measured(name: str, arm: dict[str, str], seed: int, *metrics: str) -> Run:
    curves = {metric: {100: 1.0 + seed + len(name)} for metric in metrics}
    return Run(f"{name}-{seed}", arm, seed, curves=curves, images=1600, steps=100)


VAL = ("val/loss", "val/loss_band_0_250", "val/x0_loss", "val/x0_loss_terminal", "val/x0_loss_logsnr_3")


def test_metrics_that_lose_their_meaning_over_what_varies_are_left_out_unless_named() -> None:
    runs = [
        measured(name, {"schedule": name, "loss": loss}, seed, *VAL, "train/loss")
        for name, loss in (("ztsnr", "minsnr"), ("cosine", "uniform"))
        for seed in range(3)
    ]
    found = compare(runs, Question("x"))
    assert found.metrics == ["val/x0_loss_logsnr_3"] and found.targets == []
    notes = " ".join(found.notes)
    assert "val/loss cannot be compared between arms of different schedule, and is left out; metrics=val/loss" in notes
    assert "val/x0_loss cannot" in notes and "band" not in notes and "train/loss" not in notes
    named = compare(runs, Question("x", metrics=["val/loss"]))
    assert named.metrics == ["val/loss"] and named.rows[0].verdict and named.targets
    assert "of different schedule, and is compared because it was named" in " ".join(named.notes)
    losses = [replace(run, arm={"loss": run.arm["loss"]}) for run in runs]
    assert compare(losses, Question("x")).metrics == ["val/loss", "val/x0_loss"]
    by_config = [replace(run, config={"schedule.base.beta_end": run.arm["loss"]}) for run in losses]
    assert compare(by_config, Question("x")).metrics == ["val/x0_loss_logsnr_3"]


def test_the_training_loss_alone_is_not_compared_between_weightings() -> None:
    runs = [measured(name, {"loss": name}, seed, "train/loss") for name in ("minsnr", "uniform") for seed in range(3)]
    with pytest.raises(UserError, match=r"(?s)nothing to compare.*train/loss cannot be .* of different loss"):
        compare(runs, Question("x"))
    assert compare(runs, Question("x", metrics=["train/loss"])).metrics == ["train/loss"]
    rates = [replace(run, arm={"optimizer.lr": run.arm["loss"]}) for run in runs]
    assert compare(rates, Question("x")).metrics == ["train/loss"]


def test_arms_that_take_their_images_in_different_orders_are_told_once() -> None:
    """With another canvas or batch, a position of the run holds another image, although the seed is the same."""
    for key in ("bucketing", "native.resolution", "run.batch_size", "data.held_out"):
        runs = [measured(name, {key: name}, seed, "color/error") for name in "ab" for seed in range(3)]
        (told,) = [note for note in compare(runs, Question("x")).notes if "different orders" in note]
        assert told.startswith(f"the arms differ in {key.removesuffix('.held_out')}, so with one seed")
        runs = [replace(run, arm={"loss": run.arm[key]}) for run in runs]
        assert not any("different orders" in note for note in compare(runs, Question("x")).notes)


def test_one_run_that_is_far_off_stops_no_comparison() -> None:
    """It is finite, so it counts; and it is no step of the others' values."""
    curves = {"a": [0.30, 0.31, 0.32, 0.305, 0.315], "b": [0.31, 0.30, 0.33, 0.31, 1e8]}
    runs = [curve_run(arm, s, {100: value}) for arm, values in curves.items() for s, value in enumerate(values)]
    found = compare(runs, Question("x", baseline="loss=a"))
    assert found.rows[0].verdict == "undecided" and markdown(found)


def test_what_is_undecided_would_take_more_seeds_than_there_are() -> None:
    """By the level that the verdict needs, which is shared by all arms and metrics."""
    random = np.random.default_rng(1)
    runs = []
    for number in range(9):
        for seed, value in enumerate(1 + 0.1 * random.standard_normal(5)):
            runs.append(curve_run(str(number), seed, {100: float(value + 0.02 * number)}))
    rows = compare(runs, Question("x", baseline="loss=0")).rows
    needed = [row.seeds_needed for row in rows if row.verdict == "undecided"]
    assert needed and all(seeds == 0 or (seeds is not None and seeds > 5) for seeds in needed)


@pytest.mark.parametrize(
    ("shared", "told"), [(0, "40 items are not in every run"), (None, "some runs have no single items")]
)
def test_items_of_which_none_is_shared_are_said(tmp_path: Path, shared: int | None, told: str) -> None:
    for name in ("uniform", "minsnr"):
        for seed in range(3):
            path = write_run(tmp_path, {"loss": name}, seed, effect={"val/loss": 0.01}, items=20)
            items = path / "items" / "val__loss.jsonl"
            if name == "minsnr":
                items.unlink() if shared is None else items.write_text(items.read_text().replace("image", "other"))
    runs = [read_directory(path, {}) for path in sorted(tmp_path.iterdir())]
    found = compare(runs, Question("x", baseline="loss=uniform", metrics=["val/loss"]))
    assert any(told in line for line in remarks(found))
    assert (found.rows[0].verdict == "no verdict") == (shared == 0)


@pytest.mark.parametrize(
    ("wanted", "told"), [("1%", "is no size where the baseline is 0"), ("1e-9", "is not shown by any number of seeds")]
)
def test_a_difference_that_no_number_of_seeds_shows_is_told_with_its_reason(wanted: str, told: str) -> None:
    values = {"a": [-1.0, 0.0, 1.0], "b": [-0.3, 0.7, 2.9]}
    runs = [
        Run(f"{arm}-{s}", {"loss": arm}, s, curves={"mine/x": {1: v}})
        for arm, row in values.items()
        for s, v in enumerate(row)
    ]
    asked = Question("x", baseline="loss=a", metrics=["mine/x"], detect=wanted)
    (line,) = needed(compare(runs, asked))
    assert line.endswith(told)
