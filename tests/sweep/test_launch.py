"""Sweeps: arms in processes of their own, what fails and what is told of it, and what the same command does again."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from hydra_plugins.nai_xl_sweep import as_overrides, listed, varied
from nai_xl import config
from nai_xl.compare.judging.comparable import leading
from nai_xl.errors import UserError
from nai_xl.record.arm import Arm, read_arm
from nai_xl.sweep.board import Row, print_table, progress
from nai_xl.sweep.launch import sweep_tracker
from nai_xl.sweep.machine import slots
from nai_xl.sweep.processes import Program, Running, run_all, why
from nai_xl.sweep.settings import SweepSettings
from nai_xl.tracker.mlflow.sweep import MlflowSweep
from nai_xl.tracker.mlflow.view import view
from nai_xl.tracker.sweep import SweepTracker
from nai_xl.train import main
from tests.conftest import SMALL
from tests.test_cli import environment

FAULTY = '''
"""A loss weighting that is at fault in its third step, until a file called mended lies in the working directory."""

import os
import signal
import time
from pathlib import Path

import torch

calls = 0


def weight(level, p, *, fault: str = "none"):
    global calls
    if not torch.is_grad_enabled() or not p.__class__.__module__.startswith("nai_xl"):
        return torch.ones_like(level.alpha)
    calls += 1
    if calls == 1:
        with Path("starts.txt").open("a") as file:
            file.write(fault + " ")
    if fault == "slow":
        time.sleep(0.05)
    if calls == 3 and not Path("mended").exists():
        if fault == "raises":
            raise ArithmeticError("one step too many")
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    return torch.ones_like(level.alpha)
'''
OF_FAULTY = ["loss=uniform", "loss._target_=faulty.weight", "plugins=[faulty]"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with faulty.py in it."""
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def sweep(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["train", "-m", *SMALL, *arguments])
    try:
        main()
    except SystemExit as stopped:
        return int(str(stopped.code))
    return 0


def by_arm(folder: Path) -> dict[str, Arm]:
    found = [read_arm(path.parent) for path in (folder / "outputs").glob("*/arm.json")]
    return {arm.label: arm for arm in found if arm}


def test_two_of_four_arms_fail_the_others_finish_and_the_same_command_trains_those_two_alone(
    folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forks: None
) -> None:
    swept = "+loss.fault=raises,fine,killed,well"
    command = [f"data.dir={images}", *OF_FAULTY, swept, "run.max_images=8", "sweep.parallel=2"]
    assert sweep(monkeypatch, *command) == 1
    told = capsys.readouterr()
    arms = by_arm(folder)
    assert {name: arm.status for name, arm in arms.items()} == {
        "loss.fault=raises": "FAILED",
        "loss.fault=fine": "FINISHED",
        "loss.fault=killed": "FAILED",
        "loss.fault=well": "FINISHED",
    }
    assert arms["loss.fault=raises"].error == "ArithmeticError: one step too many"
    assert arms["loss.fault=killed"].error == "killed by signal 9"
    fine = arms["loss.fault=fine"]
    assert (fine.sweep, fine.arm, fine.steps, fine.images) == ("loss.fault", {"loss.fault": "fine"}, 4, 8)
    # what failed had taken two whole steps, by the third's failure
    assert [arms[f"loss.fault={name}"].steps for name in ("raises", "killed")] == [2, 2]
    assert told.out.count("FINISHED") == 4 and "FAILED loss.fault=killed: killed by signal 9" in told.out
    assert "error: 2 of 4 arms failed" in told.err
    again = next(line for line in told.out.splitlines() if line.startswith("  again") and "raises" in line)
    assert "+loss.fault=raises" in again and "sweep.name=loss.fault 'sweep.varied=[loss.fault]'" in again

    (folder / "mended").touch()
    began = (folder / "starts.txt").read_text().split()
    assert sorted(began) == ["fine", "killed", "raises", "well"]
    assert sweep(monkeypatch, *command) == 0
    assert sorted((folder / "starts.txt").read_text().split()[4:]) == ["killed", "raises"]
    assert {arm.status for arm in by_arm(folder).values()} == {"FINISHED"}
    assert "2 of 4 arms are finished already, 2 to train" in capsys.readouterr().out
    # a third time nothing is begun, and what is asked for further is
    assert sweep(monkeypatch, *command) == 0
    assert len((folder / "starts.txt").read_text().split()) == 6
    assert (read_arm(next((folder / "outputs").glob("tiny-*"))) or fine).finished(max_images=8, epochs=None)
    assert not fine.finished(max_images=9, epochs=None)


def wait_until(true: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if true():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError("the arm did not begin")


def test_an_interrupted_sweep_saves_the_arm_under_way_and_begins_no_more(
    folder: Path, images: Path, forks: None
) -> None:
    fault = ["+loss.fault=slow,never", "run.max_images=2000", "run.checkpoint_every=1000"]
    command = [sys.executable, "-m", "nai_xl.train", "-m", *SMALL, f"data.dir={images}", *OF_FAULTY, *fault]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    rows = lambda: [line for path in folder.glob("outputs/*/metrics.jsonl") for line in path.open()]  # noqa: E731
    wait_until(lambda: len(rows()) >= 3, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "stopping: the arms under way save their state" in out and "Traceback" not in err
    (arm,) = by_arm(folder).values()
    (saved,) = folder.glob("outputs/*/checkpoints/step_*")
    assert (arm.status, arm.steps) == ("STOPPED", int(saved.name.removeprefix("step_"))) and arm.steps >= 3
    table = {line.split()[0]: line for line in out[out.index("sweep loss.fault") :].splitlines() if "fault=" in line}
    assert "STOPPED" in table["loss.fault=slow"] and "not started" in table["loss.fault=never"]
    assert (folder / "starts.txt").read_text().split() == ["slow"]


LISTED = "sweep.arms=[{loss:uniform},{loss:minsnr,loss.gamma:1},{loss:minsnr,loss.gamma:20}]"


def test_arms_that_are_listed_one_by_one_are_trained_with_every_seed(
    folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forks: None
) -> None:
    """An arm that does not name a key of another one is not named by it either."""
    command = [f"data.dir={images}", "run.max_images=2", "sweep.parallel=2", LISTED, "run.seed=0,1"]
    assert sweep(monkeypatch, *command, "loss.gamma=1") == 0
    found = [read_arm(path.parent) for path in (folder / "outputs").glob("*/arm.json")]
    assert sorted((arm.label, arm.seed) for arm in found if arm) == [("loss=minsnr,loss.gamma=1", i) for i in (0, 1)]
    capsys.readouterr()
    assert sweep(monkeypatch, *command) == 0
    assert "2 of 6 arms are finished already, 4 to train" in capsys.readouterr().out
    found = [read_arm(path.parent) for path in (folder / "outputs").glob("*/arm.json")]
    names = ["loss=minsnr,loss.gamma=1", "loss=minsnr,loss.gamma=20", "loss=uniform"]
    assert sorted((arm.label, arm.seed) for arm in found if arm) == [(name, i) for name in names for i in (0, 1)]
    assert [arm.label for arm in sorted(found, key=lambda arm: arm.places[arm.sweep])][::2] == [  # type: ignore
        "loss=uniform", "loss=minsnr,loss.gamma=1", "loss=minsnr,loss.gamma=20",
    ]  # fmt: skip  # as typed, although the second was trained first
    assert {(arm.sweep, arm.status) for arm in found if arm} == {("loss-loss.gamma", "FINISHED")}
    assert sweep(monkeypatch, *command, "loss=p2") == 1
    assert "error: loss=p2: no arm of sweep.arms has that; there is uniform, minsnr" in capsys.readouterr().err


# --- Hydra's other launchers and sweepers -----------------------------------------------------------------------------


def test_joblib_trains_arms_that_know_their_sweep(folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    launcher = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    assert sweep(monkeypatch, *launcher, f"data.dir={images}", "run.max_images=2", "loss=minsnr,uniform") == 0
    arms = by_arm(folder)
    assert {(arm.sweep, arm.status) for arm in arms.values()} == {("loss", "FINISHED")}
    assert set(arms) == {"loss=minsnr", "loss=uniform"}


def test_submitit_trains_an_arm_sent_from_the_command_line(folder: Path, images: Path) -> None:
    """Through its local queue, which needs no SLURM."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    options = ["hydra/launcher=submitit_local", f"data.dir={images}", "run.max_images=2", "sweep.name=queue"]
    command = [sys.executable, "-m", "nai_xl.train", "-m", *SMALL, *options]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (arm,) = by_arm(folder).values()
    assert (arm.sweep, arm.status, arm.steps) == ("queue", "FINISHED", 1)


def test_optuna_searches_with_the_loss_that_arms_return(
    folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["hydra/sweeper=optuna", "hydra/launcher=basic", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    space = ["hydra.sweeper.sampler.seed=0", "loss=minsnr", "loss.gamma=interval(1.0,9.0)"]
    assert sweep(monkeypatch, f"data.dir={images}", "run.max_images=4", *search, *space) == 0
    best = OmegaConf.load(folder / "outputs" / "optimization_results.yaml")
    losses = {}
    for path in (folder / "outputs").glob("tiny-*"):
        arm = read_arm(path)
        assert arm and arm.sweep == "loss.gamma" and 1 <= arm.arm["loss.gamma"] <= 9
        rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        losses[arm.arm["loss.gamma"]] = rows[-1]["train/loss"]
    assert len(losses) == 2
    assert best.best_value == min(losses.values()) == losses[best.best_params["loss.gamma"]]


# --- parts ------------------------------------------------------------------------------------------------------------


def test_what_an_experiment_and_the_command_line_vary() -> None:
    params = {"loss": "uniform,minsnr", "schedule": "ztsnr,cosine", "run.seed": "range(0,3)"}
    assert varied(params, ["schedule=ztsnr", "memory=[sdpa,tf32]"]) == ["loss", "run.seed"]
    assert varied({}, ["+loss.gamma=1,5", "a='x,y'", "'memory=[a],[]'".strip("'")]) == ["loss.gamma", "memory"]


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1000, 1000),
    st.floats(-1e6, 1e6),
    st.text(st.sampled_from("ab1.,:[]{}()'\"\\= -+e/~"), max_size=8).filter(lambda text: text == text.strip()),
)
KEYS = st.text("abc", min_size=1, max_size=3)
VALUES = st.recursive(
    SCALARS, lambda part: st.lists(part, max_size=3) | st.dictionaries(KEYS, part, max_size=3), max_leaves=5
)


@given(VALUES)
@example("a,b")
@example("null")
@example("it's \\")
@example({"a": [1, "x,y"]})
def test_a_listed_value_reaches_the_arm_as_the_yaml_has_it(value: object) -> None:
    (arm,) = listed([{"key": value}], [])
    read = OverridesParser.create().parse_override(*as_overrides(arm)).value()
    assert read == value and type(read) is type(value)


def test_listed_arms_are_named_first_and_picked_by_values_given_beside_them() -> None:
    arms = [{"schedule": "ztsnr", "noise.offset": 0}, {"schedule": "ztsnr", "noise.offset": 0.1}, {"memory": ["tf32"]}]
    typed = [{"schedule": "ztsnr", "noise.offset": "0"}, {"schedule": "ztsnr", "noise.offset": "0.1"}]
    assert varied({"run.seed": "0,1", "schedule": "a,b"}, [], arms) == [
        "schedule",
        "noise.offset",
        "memory",
        "run.seed",
    ]
    parse = OverridesParser.create().parse_overrides
    assert listed(arms, parse(["loss=a,b"])) == [*typed, {"memory": "[tf32]"}]
    assert listed(arms, parse(["schedule=ztsnr"])) == typed
    assert listed(arms, parse(["schedule=ztsnr,cosine", "noise.offset=0.1"])) == typed[1:]
    assert listed(arms, parse(["memory=[tf32]"])) == [{"memory": "[tf32]"}]
    assert listed([{"name": "c"}], parse(["name='c'"])) and listed([{"name": "a,b"}], parse(['name="a,b"']))
    with pytest.raises(HydraException, match=r"noise\.offset=1: no arm of sweep\.arms has that; there is 0, 0\.1"):
        listed(arms, parse(["noise.offset=1"]))


def test_an_arm_is_named_by_the_values_of_what_varies() -> None:
    keys = "sweep.varied=[loss,loss.gamma,memory,run.seed,schedule@schedule.base]"
    overrides = ["loss=minsnr", "loss.gamma=3", "memory=[tf32]", "run.seed=4", "schedule=shifted"]
    overrides += ["schedule@schedule.base=cosine"]
    cfg = config.compose([*overrides, keys])
    named = {"loss": "minsnr", "loss.gamma": 3, "memory": "[tf32]", "schedule@schedule.base": "cosine"}
    assert config.arm(cfg, overrides) == named
    assert config.arm(config.compose([]), overrides) == {}


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (config.conf_dir() / "experiment").glob("*.yaml")))
def test_every_arm_of_an_experiment_has_a_directory_of_its_own(experiment: str) -> None:
    points = [(choices, cfg) for _, choices, cfg in config.combinations([f"experiment={experiment}", "run.seed=3,4"])]
    assert len({config.run_dir(cfg, choices) for choices, cfg in points}) == len(points) > 1
    config.check(points[0][1])


def test_settings_of_the_sweep_do_not_make_another_run() -> None:
    plain, named = config.compose([]), config.compose(["sweep.name=x", "sweep.parallel=3", "sweep.question=why"])
    assert config.run_dir(plain, {}) == config.run_dir(named, {})
    with pytest.raises(UserError, match=r"sweep\.paralel"):
        config.check(config.compose(["+sweep.paralel=2"]))


@pytest.mark.parametrize(
    ("parallel", "processes", "gpus", "expected"),
    [
        (1, 1, [], [None]),
        (2, 1, [], [None, None]),
        (2, 1, ["0", "1"], ["0", "1"]),
        (1, 1, ["0", "1", "2"], ["0"]),
        (2, 2, ["0", "1", "2", "3"], ["0,1", "2,3"]),
        (3, 1, ["GPU-a", "GPU-b"], ["GPU-a", "GPU-b", "GPU-a"]),
    ],
)
def test_places_share_gpus_and_cores(
    parallel: int, processes: int, gpus: list[str], expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    places = slots(parallel, processes, gpus, cores=8)
    assert [place.get("CUDA_VISIBLE_DEVICES") for place in places] == expected
    threads = str(8 // (parallel * processes)) if parallel * processes > 1 else None
    assert {place.get("OMP_NUM_THREADS") for place in places} == {threads}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert not [place for place in slots(parallel, processes, gpus, cores=8) if "OMP_NUM_THREADS" in place]


def test_processes_of_an_arm() -> None:
    one, ddp = config.compose([]), config.compose(["distributed=ddp"])
    assert SweepSettings().processes_of(one, 8) == 1
    assert SweepSettings().processes_of(ddp, 8) == 8
    assert SweepSettings(parallel=3).processes_of(ddp, 8) == 2
    assert SweepSettings().processes_of(ddp, 0) == 1
    assert SweepSettings(processes=2).processes_of(ddp, 0) == 2
    with pytest.raises(UserError, match="set distributed=ddp"):
        SweepSettings(processes=2).processes_of(one, 8)
    with pytest.raises(UserError, match="2 GPUs"):
        SweepSettings(processes=3).processes_of(ddp, 2)


PLUG_IN = """
from nai_xl.tracker.jsonl import JsonlTracker
from nai_xl.tracker.mlflow.tracker import MlflowTracker

class Own(JsonlTracker):
    def __init__(self, run_dir, *, colour="red"):
        super().__init__(run_dir)

class OwnMlflow(MlflowTracker):
    def __init__(self, run_dir, *, colour="red", uri=None):
        super().__init__(run_dir, uri=uri)

def function(run_dir):
    return JsonlTracker(run_dir)
"""


def test_a_tracker_says_what_follows_the_whole_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_trackers.py").write_text(PLUG_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["plugins=[own_trackers]", "tracker=jsonl"]
    for overrides in (["tracker=jsonl"], [*own, "tracker._target_=own_trackers.Own", "+tracker.colour=blue"]):
        quiet = sweep_tracker(config.compose(overrides))
        assert type(quiet) is SweepTracker
        assert quiet.begin("s", "why?", ["loss"], []) == [] == quiet.end([tmp_path])
    sent = sweep_tracker(config.compose(["tracker.uri=sqlite:///x.db", "tracker.experiment=e"]))
    assert isinstance(sent, MlflowSweep) and (sent.uri, sent.experiment) == ("sqlite:///x.db", "e")
    target = ["tracker._target_=own_trackers.OwnMlflow", "+tracker.colour=blue", "+tracker.uri=sqlite:///y.db"]
    sent = sweep_tracker(config.compose([*own, *target]))
    assert isinstance(sent, MlflowSweep) and (sent.uri, sent.experiment) == ("sqlite:///y.db", "nai_xl")
    with pytest.raises(UserError, match=r"own_trackers\.function cannot be swept; derive it from .*NoTracker"):
        sweep_tracker(config.compose([*own, "tracker._target_=own_trackers.function"]))


def test_a_tracker_that_cannot_be_swept_is_refused_before_any_arm_leaves_a_trace(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "own_trackers.py").write_text(PLUG_IN)
    own = ["plugins=[own_trackers]", "tracker._target_=own_trackers.function"]
    assert sweep(monkeypatch, *own, "optimizer.lr=fast,slow") == 1
    assert "or set tracker=jsonl" in capsys.readouterr().err and not by_arm(folder)


def test_an_arm_whose_record_is_damaged_is_trained(
    folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process that begins as a user's does."""
    command = [f"data.dir={images}", "name=one", "run.max_images=2"]
    path = config.run_dir(config.compose([*SMALL, *command]), {})
    path.mkdir(parents=True)
    (path / "arm.json").write_text('{"sweep": "s", "arm": {')
    assert sweep(monkeypatch, *command, "sweep.name=s") == 0
    (arm,) = by_arm(folder).values()
    assert (arm, arm.sweep, arm.status, arm.steps) == (read_arm(path), "s", "FINISHED", 1)
    assert "Traceback" not in capsys.readouterr().err


def test_arms_that_would_be_one_run_are_refused(
    folder: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep(monkeypatch, f"data.dir={images}", "run.max_images=2,4") == 1
    assert "run.max_images=2 and run.max_images=4 are one run" in capsys.readouterr().err
    assert not list(folder.glob("outputs/*/log.txt"))


class Calls:
    """What run_all calls, noted."""

    def __init__(self) -> None:
        self.most, self.ends = 0, dict[int, int]()
        self.now: set[int] = set()

    def begun(self, running: Running) -> None:
        assert running.slot not in self.now, "two programs in one slot"
        self.now.add(running.slot)
        self.most = max(self.most, len(self.now))

    def ended(self, running: Running, status: int) -> None:
        self.now.discard(running.slot)
        self.ends[running.number] = status

    def watch(self, running: Any) -> None:
        pass


def python(code: str, log: Path) -> Program:
    return Program([sys.executable, "-c", code], log)


def test_programs_share_slots_and_add_to_their_logs(tmp_path: Path) -> None:
    say = "import os, sys, time; time.sleep(0.2); print(os.environ['PLACE']); sys.exit({})"
    programs = [python(say.format(number), tmp_path / f"{number}.txt") for number in range(5)]
    (tmp_path / "0.txt").write_text("before\n")
    calls = Calls()
    places = [{"PLACE": "left"}, {"PLACE": "right"}]
    quiet = SimpleNamespace(asked=False)
    assert run_all(programs, places, quiet, begun=calls.begun, ended=calls.ended, watch=calls.watch) == 5
    assert calls.ends == {number: number for number in range(5)} and calls.most == 2
    assert (tmp_path / "0.txt").read_text() == "before\nleft\n"


def test_a_second_interruption_ends_programs_and_their_children_at_once(tmp_path: Path) -> None:
    deaf = "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
    child = "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); print(p.pid, flush=True); "
    program = python(f"{deaf}{child}time.sleep(600)", tmp_path / "log.txt")
    calls, stop = Calls(), SimpleNamespace(asked=False)

    def watch(running: Any) -> None:
        if stop.asked:
            assert all(one.asked for one in running)
            raise KeyboardInterrupt
        stop.asked = bool(program.log.read_text())

    with pytest.raises(KeyboardInterrupt):
        run_all([program, program], [{}], stop, begun=calls.begun, ended=calls.ended, watch=watch)
    assert calls.ends == {0: -9}
    with pytest.raises(psutil.NoSuchProcess):
        psutil.Process(int(program.log.read_text())).wait(timeout=10)  # soon, where it is not so already
        psutil.Process(int(program.log.read_text()))


def test_an_end_that_cannot_be_told_leaves_no_other_program_running(tmp_path: Path) -> None:
    started: list[Running] = []

    def watch(running: Any) -> None:
        raise KeyboardInterrupt

    def ended(running: Running, code: int) -> None:
        raise OSError(28, "No space left on device")

    sleepers = [python("import time; time.sleep(600)", tmp_path / f"{number}.txt") for number in range(2)]
    with pytest.raises(OSError, match="No space left"):
        run_all(sleepers, [{}, {}], SimpleNamespace(asked=False), begun=started.append, ended=ended, watch=watch)
    assert [one.process.poll() for one in started] == [-9, -9]


@pytest.mark.parametrize(
    ("code", "output", "reason"),
    [
        (-11, "whatever", "killed by signal 11"),
        (1, "Traceback:\n  File x\nRuntimeError: no\nlater words\n", "RuntimeError: no"),
        (1, "error: data.dir=x: no such folder\n", "data.dir=x: no such folder"),
        (
            1,
            "torch.ChildFailedError:\n exitcode  : -15 (pid: 6)\nRoot Cause\n exitcode  : -9 (pid: 7)\n",
            "killed by signal 9",
        ),
        (1, "ValueError: no\n exitcode  : -15 (pid: 6)\nRoot Cause\n  exitcode  : 1 (pid: 7)\n", "ValueError: no"),
        (3, "the last words\n\n", "the last words"),
        (3, "", "exit status 3"),
    ],
)
def test_why_a_process_ended(code: int, output: str, reason: str) -> None:
    assert why(code, output) == reason


def test_the_table_names_an_arm_of_several_options(capsys: pytest.CaptureFixture[str]) -> None:
    """[sdpa] is no markup."""
    print_table("[a] question", [Row("memory=[sdpa,math],seed=0", "FINISHED", 4, 1.0, 0.5, Path("out[x]"))])
    told = capsys.readouterr().out
    assert "[a] question" in told and "memory=[sdpa,math],seed=0" in told and "out[x]" in told


def test_progress_is_the_last_state_of_the_last_bar() -> None:
    bar = "encoding latents:  50%|##   | 4/8\r  3% |#    | 3/100 steps, 00:09 left, loss 0.2\r"
    assert progress(f"words\n{bar}\nsaved\n") == "3% |#    | 3/100 steps, 00:09 left, loss 0.2"
    assert progress("importing\n") == "starts"


def test_a_table_leads_with_what_keeps_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    """Training losses of unlike weightings, and val/loss of unlike schedules, are not set side by side."""
    cfg = config.compose(["evals=[sample_grid,val_loss,color]"])
    assert leading(cfg, ["optimizer.lr"])[0] == "val/loss" and "train/loss" in leading(cfg, ["optimizer.lr"])
    assert leading(cfg, ["schedule", "loss"])[:2] == ["val/x0_loss_logsnr_0", "color/error"]
    assert "train/loss" not in leading(cfg, ["schedule", "loss"])
    assert leading(config.compose([]), ["loss"]) == [] and leading(config.compose([]), ["lr"]) == ["train/loss"]
    print_table("s", [Row("loss=p2", "FINISHED", 4, 1.0, 0.25, Path("out"))], "color/error")
    assert "color/error" in (told := capsys.readouterr().out) and "0.2500" in told and "train/loss" not in told
    print_table("s", [Row("loss=p2", "FINISHED", 4, 1.0, None, Path("out"))], None)
    assert "loss=p2" in (told := capsys.readouterr().out) and "train/loss" not in told
    assert json.loads(view("s", ["loss"], [], []))["compareRunCharts"][0]["type"] != "PARALLEL"
