"""What an earlier shell or another launcher has left in the environment never changes a run in silence."""

import re
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest

from nai_xl.distributed import environment
from nai_xl.distributed.environment import leave_out
from nai_xl.distributed.launch import refuse_half_a_launch
from nai_xl.errors import UserError
from nai_xl.train import main
from tests.conftest import SMALL
from tests.test_train import losses

LEFT = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "PARALLELISM_CONFIG_DP_SHARD_SIZE": "2",
    "ACCELERATE_FP8_BACKEND": "TE",
}
TOLD = [
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is left out; set run.grad_accum=4",
    "ACCELERATE_MIXED_PRECISION=fp16 is left out; set precision=fp16",
    "ACCELERATE_USE_FSDP=true is left out; set distributed=fsdp2",
    "ACCELERATE_USE_DEEPSPEED=true is left out; set distributed=deepspeed_zero3",
    "ACCELERATE_DYNAMO_BACKEND=INDUCTOR is left out; set 'memory=[sdpa,compile]'",
    "ACCELERATE_USE_MEGATRON_LM=true is left out: there is no such engine here; see docs/distributed.md",
    "ACCELERATE_USE_PARALLELISM_CONFIG=true is left out: there is no such engine here; see docs/distributed.md",
]
# what `accelerate launch` of a default configuration sets
LAUNCHED = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_DYNAMO_BACKEND": "NO",
    "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}


def plain(key: str) -> list[str]:
    """What a command line without overrides asks for."""
    chosen = {"precision": ["fp32"], "memory": ["sdpa"], "run.grad_accum": ["1"], "distributed": ["none"]}
    return chosen.get(key, ["1.0"])


def test_a_run_is_what_its_command_line_says_and_what_is_left_out_is_told(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "200")
    command = [*SMALL, f"data.dir={images}", "run.max_images=4", "distributed=ddp"]
    alone = typed(main, *command, "output_dir=clean")
    assert "environment" not in alone
    for name, value in LEFT.items():
        monkeypatch.setenv(name, value)
    told = typed(main, *command, "output_dir=left")
    for line in TOLD:
        assert line in told
    (clean,), (left,) = (list((tmp_path / name).iterdir()) for name in ("clean", "left"))
    assert losses(left) == losses(clean)
    for words in (alone, told):  # no launcher has started several
        assert "distributed=ddp runs in this one process: start several with torchrun" in words


def test_nothing_is_said_of_what_asks_for_the_same_or_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    environ = {**LAUNCHED, "HOME": "/root", "ACCELERATE_LOG_LEVEL": "INFO"}
    assert leave_out(plain, environ) == []
    assert environ == {"HOME": "/root", "ACCELERATE_LOG_LEVEL": "INFO"}
    same = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DYNAMO_BACKEND": "X"}
    asked = {"precision": ["bf16"], "distributed": ["deepspeed_zero2"], "memory": ["sdpa", "compile"]}
    assert leave_out(asked.__getitem__, same) == [] and not same
    other = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert len(leave_out(asked.__getitem__, other)) == 1


def test_a_cpu_that_was_asked_for_is_said_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    (line,) = leave_out(plain, {"ACCELERATE_USE_CPU": "true"})
    assert "ACCELERATE_USE_CPU=true is left out; CUDA_VISIBLE_DEVICES" in line


READ = re.compile(
    r"(?:environ(?:\.get\(|\.setdefault\(|\[)|getenv\(|parse_flag_from_env\(|parse_choice_from_env\(|int_from_env\(\[)"
    r"\s*\"([A-Z][A-Z0-9_]{2,})\"|prefix = \"([A-Z0-9_]+)\""
)
HARMLESS = {  # a launch's own numbers, which are checked; threads; devices of kinds that are not trained on
    *"RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS FORK_LAUNCHED".split(),
    *"USE_TORCH_XLA PJRT_DEVICE TPU_NAME PT_HPU_LAZY_MODE DEEPSPEED_USE_HPU PYTORCH_ENABLE_MPS_FALLBACK".split(),
    *"XLA_USE_BF16 XLA_DOWNCAST_BF16 CUDA_VISIBLE_DEVICES FOO".split(),
}
APART = ("test_utils", "commands", "tracking.py", "launch.py", "launchers.py", "big_modeling.py")


def test_whatever_accelerate_reads_is_left_out_or_known_to_change_nothing() -> None:
    package = Path(accelerate.__file__).parent
    files = [path for path in package.rglob("*.py") if not set(path.relative_to(package).parts) & set(APART)]
    found = {a or b for path in files for a, b in READ.findall(path.read_text(encoding="utf-8"))}
    assert {"FSDP_", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "PMI_SIZE"} <= found
    prefixes = (*environment.PREFIXES, *environment.MPI)
    assert {name for name in found if not name.startswith(prefixes)} - HARMLESS == set()


WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE= in the environment is no number; `unset WORLD_SIZE`"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is no number"),
        ({"LOCAL_RANK": "3"}, "LOCAL_RANK=3 in the environment without RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT is"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK=1, WORLD_SIZE=2 in the environment without MASTER_ADDR, MASTER_PORT"),
        ({**WHOLE, "RANK": ""}, "RANK= in the environment is no number"),
        ({**WHOLE, "MASTER_PORT": "a"}, "MASTER_PORT=a in the environment is no number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE=2: started several times without RANK"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8: started several times without RANK"),
    ],
)
def test_half_a_launch_is_refused_by_name(environ: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        refuse_half_a_launch(several=True, environ=environ)


@pytest.mark.parametrize(
    "environ", [{}, {"WORLD_SIZE": "1"}, WHOLE, {**WHOLE, "PMI_SIZE": "8"}, {"MASTER_PORT": "1"}, {"PMI_SIZE": "1"}]
)
def test_a_whole_launch_and_none_are_fine(environ: dict[str, str]) -> None:
    refuse_half_a_launch(several=True, environ=environ)
    refuse_half_a_launch(several=False, environ={**environ, "SLURM_STEP_NUM_TASKS": "8"})  # one run for each task


@pytest.mark.parametrize("variable", ["WORLD_SIZE=", "LOCAL_RANK=3"])
@pytest.mark.parametrize("option", ["none", "ddp"])
def test_the_command_says_so_in_one_line(
    variable: str, option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name, _, value = variable.partition("=")
    monkeypatch.setenv(name, value)
    told = typed(main, f"distributed={option}", status=1)
    assert told.startswith(f"error: {variable} in the environment") and len(told.splitlines()) == 1
