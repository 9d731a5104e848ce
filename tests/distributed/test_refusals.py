"""What an engine that shares the model out cannot do is refused, with the override that helps, before any weight."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from omegaconf import DictConfig

from nai_xl.config.spec import Spec
from nai_xl.distributed.deepspeed import DeepSpeed
from nai_xl.distributed.fsdp2 import Fsdp2, FullySharded
from nai_xl.distributed.strategy import StepSettings
from nai_xl.errors import UserError
from nai_xl.memory import process_wide
from nai_xl.memory.fp8_ff import Fp8FeedForward
from nai_xl.optimizer.adamw8bit import AdamW8bit
from nai_xl.optimizer.part import Part, needs_whole_tensors

SHARING = ["fsdp2", *(["deepspeed_zero2", "deepspeed_zero3"] if importlib.util.find_spec("deepspeed") else [])]
every_engine = pytest.mark.parametrize("engine", SHARING)


@every_engine
@pytest.mark.parametrize(
    ("overrides", "helps"),
    [
        (["optimizer=adafactor"], "set optimizer=adamw"),
        (["precision=fp16"], "set precision=bf16"),
        (["memory=[sdpa,optimizer_in_backward]"], "set '~memory.optimizer_in_backward'"),
    ],
    ids=["adafactor", "fp16", "in_backward"],
)
def test_what_needs_whole_tensors_is_refused(
    small: Callable[..., DictConfig], engine: str, overrides: list[str], helps: str
) -> None:
    Spec.of(small(f"distributed={engine}"))
    with pytest.raises(UserError) as refusal:
        Spec.of(small(f"distributed={engine}", *overrides))
    assert helps in str(refusal.value) and f"distributed={engine}" in str(refusal.value)


@pytest.mark.skipif(len(SHARING) == 1, reason="DeepSpeed is not installed")
@pytest.mark.parametrize(
    ("overrides", "helps"),
    [
        (["optimizer=adamw8bit"], "set optimizer=adamw"),
        (["memory=[sdpa,bf16_weights]", "optimizer=adamw_bf16"], "set '~memory.bf16_weights'"),
        (["memory=[sdpa,compile]"], "set '~memory.compile'"),
    ],
    ids=["8bit", "bf16", "compile"],
)
def test_what_deepspeed_cannot_is_refused(small: Callable[..., DictConfig], overrides: list[str], helps: str) -> None:
    with pytest.raises(UserError) as refusal:
        Spec.of(small("distributed=deepspeed_zero3", *overrides))
    assert helps in str(refusal.value)


def test_products_in_8_bits_are_refused_where_they_have_not_been_tried() -> None:
    action = object.__new__(Fp8FeedForward)  # whose library need not be installed
    for engine in (Fsdp2(), DeepSpeed()) if len(SHARING) > 1 else (Fsdp2(),):
        with pytest.raises(UserError, match=r"set '~memory\.fp8_ff', or distributed="):
            engine.refuse_beside([action], torch.optim.AdamW, "no")


def test_deepspeed_that_is_missing_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="distributed=deepspeed_zero2 needs DeepSpeed; pip install deepspeed"):
        DeepSpeed(2).refuse_beside([], torch.optim.AdamW, "no")


@pytest.mark.parametrize("kind", [torch.optim.Adafactor, torch.optim.Muon])
def test_torchs_own_optimizers_of_whole_tensors_are_known(kind: type) -> None:
    assert needs_whole_tensors(kind) and not needs_whole_tensors(torch.optim.AdamW)


@pytest.mark.skipif(len(SHARING) == 1, reason="DeepSpeed is not installed")
def test_deepspeeds_settings_are_those_of_the_run() -> None:
    with process_wide.restored():
        strategy = DeepSpeed(3).start("no")
        found = strategy.config(StepSettings(batch_size=3, grad_accum=4, max_grad_norm=0.5))  # type: ignore[attr-defined]
    assert found["train_micro_batch_size_per_gpu"] == 3 and found["gradient_accumulation_steps"] == 4
    assert found["gradient_clipping"] == 0.5 and found["zero_optimization"]["stage"] == 3
    assert not torch.distributed.is_initialized()  # the group of one process ends with the run


def test_one_process_is_no_multiple_of_two() -> None:
    with process_wide.restored(), pytest.raises(UserError, match=r"distributed\.shard_size=2 does not divide the 1"):
        Fsdp2(shard_size=2).start("no")


def test_tensors_that_cannot_have_8_bits_because_of_the_cuts_are_counted() -> None:
    strategy = object.__new__(FullySharded)  # what a process of four has, without the others
    even, odd, small = torch.zeros(8, 256), torch.zeros(8, 144), torch.zeros(2)
    shapes = {even: (32, 256), odd: (32, 144), small: (8,)}
    strategy.parts, strategy.count = {p: Part(shape, 0, 4) for p, shape in shapes.items()}, 4
    (remark,) = strategy._remarks(AdamW8bit([torch.nn.Parameter(even)]))
    assert remark.startswith("optimizer: 1 of 2 tensors") and "distributed.shard_size=N" in remark
    assert not strategy._remarks(torch.optim.AdamW([even]))
