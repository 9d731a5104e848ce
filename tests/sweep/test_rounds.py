"""Sweeps in rounds: which arms get further seeds, by real processes that write a run's files instead of training."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from nai_xl.compare.answered import answered
from nai_xl.compare.arguments import Request
from nai_xl.compare.judging.looks import chance
from nai_xl.compare.selection import select
from nai_xl.compare.statistics.spending import Plan
from nai_xl.record.config import write_config
from nai_xl.record.looks import read_looks
from nai_xl.sweep.member import Member
from nai_xl.sweep.processes import Program
from nai_xl.train import main
from tests.conftest import SMALL
from tests.test_cli import environment

# the logarithm of each loss's val/loss against uniform's, seed by seed
EFFECTS = {
    "uniform": [0.0] * 10,
    "minsnr": [-0.500, -0.501, -0.502, -0.5, -0.5],  # better, which three seeds show
    "p2": [0.5, 0.6, 0.45, 0.5, 0.5],  # worse, which takes four
    "edm": [0.1, -0.1, 0.11, -0.09, 0.1],  # undecided
}
SHARED = np.random.default_rng(0).normal(-1.0, 0.3, 10)
ARM = """
import json, os, signal, sys, time
from pathlib import Path
home, note, value = Path(sys.argv[1]), json.loads(sys.argv[2]), float(sys.argv[3])
name = f"{note['arm']['loss']} {note['seed']}"
with Path("starts.txt").open("a") as file:
    file.write(name + chr(10))
if Path("interrupt").exists() and Path("interrupt").read_text() == name:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
if Path("fail").exists() and Path("fail").read_text() == name:
    sys.exit("error: no luck")
(home / "pipeline").mkdir(parents=True, exist_ok=True)
(home / "metrics.jsonl").write_text(json.dumps({"step": 4, "time": 0, "val/loss": value}) + chr(10))
(home / "arm.json").write_text(json.dumps({**note, "status": "FINISHED", "steps": 4, "images": 10**6}))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of sweeps whose arms are quick."""

    def program(member: Member) -> Program:
        arm = member.record.arm
        value = float(np.exp(SHARED[arm.seed] + EFFECTS[str(arm.arm["loss"])][arm.seed]))
        write_config(member.path, member.cfg)
        note = json.dumps({**asdict(arm), "sweeps": {arm.sweep: dict(arm.arm)}})
        return Program([sys.executable, "-S", "-c", ARM, str(member.path), note, repr(value)], member.record.home.log)

    monkeypatch.setattr(Member, "program", program)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    return tmp_path


@pytest.fixture
def sweep(
    folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs a sweep over losses in this process and returns what it told; its exit status must be `status`."""

    def run(*arguments: str, status: int = 0) -> str:
        settings = [
            f"data.dir={images}",
            "run.max_images=8",
            "sweep.baseline='loss=uniform'",
            "sweep.metrics=[val/loss]",
        ]
        monkeypatch.setattr(sys, "argv", ["train", "-m", *SMALL, *settings, *arguments])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(str(stopped.code))
        told = capsys.readouterr()
        assert code == status, told
        return told.out + told.err

    return run


def starts(folder: Path) -> Counter[str]:
    """loss -> how many arms with it were started."""
    return Counter(line.split()[0] for line in (folder / "starts.txt").read_text().splitlines())


UNTIL = ("sweep.seeds_until=decided", "sweep.max_seeds=5", "sweep.looks=[3,4]", "sweep.parallel=3")


def test_seeds_are_added_to_undecided_arms_until_all_are_decided_also_after_an_interruption(
    folder: Path, sweep: Callable[..., str]
) -> None:
    (folder / "interrupt").write_text("p2 3")
    told = sweep("loss=uniform,minsnr,p2", *UNTIL, status=75)
    assert "look at 3 of 5 seeds: minsnr better (no further seeds); p2 undecided" in told
    assert starts(folder) == {"uniform": 4, "minsnr": 3, "p2": 4}
    assert len(read_looks(folder / "outputs/compare-loss")) == 1

    (folder / "interrupt").unlink()
    told = sweep("loss=uniform,minsnr,p2", *UNTIL)
    assert "look at 4 of 5 seeds: minsnr better (no further seeds); p2 worse (no further seeds)" in told
    lines = (folder / "starts.txt").read_text().splitlines()
    assert sorted({*lines}) == sorted(
        [*(f"{arm} {seed}" for arm in ("uniform", "p2") for seed in range(4)), *(f"minsnr {seed}" for seed in range(3))]
    )
    assert lines.count("p2 3") == 2 and lines.count("p2 2") == lines.count("minsnr 2") == 1

    looks = read_looks(folder / "outputs/compare-loss")
    assert [{arm: len(seen.seeds) for arm, seen in look.arms.items()} for look in looks] == [
        {"loss=minsnr": 3, "loss=p2": 3}, {"loss=minsnr": 3, "loss=p2": 4},
    ]  # fmt: skip
    levels = Plan.of(5, [3, 4]).levels
    assert all(seen.planned and seen.level == levels[len(seen.seeds)] for look in looks for seen in look.arms.values())
    assert [look.verdicts for look in looks] == [
        {"val/loss": {"loss=minsnr": "better"}}, {"val/loss": {"loss=minsnr": "better", "loss=p2": "worse"}},
    ]  # fmt: skip
    # a report on the same data is no further look
    found = answered(select(Request({"sweep": "loss"})), recorded=True)
    assert [row.verdict for row in found.rows] == ["better", "worse"] and chance(found.looks) < 0.05
    assert read_looks(folder / "outputs/compare-loss") == looks


def test_the_budget_ends_a_sweep_and_a_failed_arm_gets_no_further_seeds(
    folder: Path, sweep: Callable[..., str]
) -> None:
    (folder / "fail").write_text("p2 2")
    told = sweep("loss=uniform,edm,p2", "run.seed=0,1", *UNTIL, "sweep.max_seeds=4", status=1)
    assert starts(folder) == {"uniform": 4, "edm": 4, "p2": 3}
    assert "look at 3 of 4 seeds: edm undecided" in told and "p2 no verdict (no further seeds)" in told
    assert "look at 4 of 4 seeds: edm undecided" in told and "error: 1 of 11 arms failed" in told
    looks = read_looks(folder / "outputs/compare-loss")
    assert [{arm: len(seen.seeds) for arm, seen in look.arms.items()} for look in looks] == [
        {"loss=edm": 3}, {"loss=edm": 4},
    ]  # fmt: skip


def test_a_pruned_arm_gets_no_further_seeds(folder: Path, sweep: Callable[..., str]) -> None:
    told = sweep("loss=uniform,minsnr,p2", "run.seed=0,1,2,3", "sweep.prune=true", "sweep.parallel=3")
    assert starts(folder) == {"uniform": 4, "minsnr": 4, "p2": 3}
    assert "look at 3 of 4 seeds: minsnr better; p2 worse (no further seeds)" in told
    found = answered(select(Request({"sweep": "loss"})), recorded=True)
    assert {row.arm: (row.verdict, len(row.seeds)) for row in found.rows} == {
        "loss=minsnr": ("better", 4), "loss=p2": ("worse", 3),
    }  # fmt: skip
    assert chance(found.looks) == pytest.approx(0.05) and found.asked.plan == Plan(4, (3, 4))


@pytest.mark.parametrize(
    ("arguments", "mistake"),
    [
        (["loss=uniform,p2", *UNTIL, "sweep.max_seeds=2"], "2 seeds are too few to judge an arm.* set sweep.max_seeds"),
        (["loss=uniform,p2", "sweep.prune=true"], "1 seeds are too few to judge an arm.* set run.seed=0,1,2"),
        ([*UNTIL, "sweep.max_seeds=3", "run.seed=range(0,4)"], "run.seed has 4 values; set sweep.max_seeds=4 or more"),
        (["loss=uniform", *UNTIL], "a sweep of one arm decides nothing"),
        (["loss=minsnr,p2", *UNTIL], "baseline=loss=uniform is no arm of this sweep; there is loss=minsnr; loss=p2"),
        (["loss=uniform,p2", *UNTIL, "hydra/launcher=basic"], "sweep.seeds_until is for hydra/launcher=arms"),
        (["loss=uniform,p2", "sweep.looks=[2]"], "sweep.looks.*greater than or equal to 3"),
    ],
)
def test_a_plan_that_cannot_be_kept_is_refused_before_any_arm_is_trained(
    folder: Path, sweep: Callable[..., str], arguments: list[str], mistake: str
) -> None:
    told = sweep(*arguments, status=1)
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert re.search(mistake, line)
    assert not (folder / "starts.txt").exists()
