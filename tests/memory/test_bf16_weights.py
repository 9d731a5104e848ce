"""bfloat16 weights: what they may change of the loss, what they must not round, and which optimizers may have them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig
from safetensors.torch import load_file
from torch import Tensor

from nai_xl.config.spec import Spec
from nai_xl.errors import UserError
from nai_xl.memory.action import MemoryAction
from nai_xl.memory.bf16_weights import Bf16Weights
from nai_xl.memory.compatibility import autocast, refuse_misfits
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.optimizer.adamw_bf16 import AdamWBf16
from nai_xl.optimizer.rounding import rounds_stochastically
from tests.test_train import losses, run, same_weights

Compose = Callable[..., DictConfig]


def example(height: int, width: int) -> dict[str, Any]:
    """A call of the tiny UNet with latents of height x width."""
    generator = torch.Generator().manual_seed(height)
    context = torch.randn(2, 77, 160, generator=generator)
    ids = torch.tensor([[1333.0, 1001, 0, 3, 8 * height, 8 * width]] * 2)
    return {
        "sample": torch.randn(2, 4, height, width, generator=generator),
        "timestep": torch.tensor([257, 999]),
        "encoder_hidden_states": context,
        "added_cond_kwargs": {"text_embeds": context[:, 0, :96], "time_ids": ids},
    }


def loss_and_gradients(unet: Any) -> tuple[float, dict[str, Tensor]]:
    unet.zero_grad()
    target = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(1))
    loss = (unet(**example(12, 20)).sample - target).square().mean()
    loss.backward()
    return loss.item(), {name: p.grad.float() for name, p in unet.named_parameters()}


def assert_close(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]], by: float) -> None:
    """Losses within `by` of each other, and all gradients together within four times that, as they pass twice."""
    assert found[0] == pytest.approx(expected[0], rel=by) and found[0] != expected[0]
    assert found[1].keys() == expected[1].keys()
    ours, theirs = (torch.cat([g.flatten() for g in gradients.values()]) for _, gradients in (found, expected))
    assert (ours - theirs).norm() < 4 * by * theirs.norm()


def assert_stays_close(action: MemoryAction) -> None:
    plain, unet = (tiny_sdxl(seed=0).unet.train() for _ in range(2))
    action.apply(unet)
    assert_close(loss_and_gradients(unet), loss_and_gradients(plain), by=action.tolerance)


def test_loss_and_gradients_stay_close_and_names_the_same() -> None:
    assert_stays_close(Bf16Weights())


def test_takes_and_gives_float32_by_position_and_by_name() -> None:
    unet = tiny_sdxl(seed=0).unet
    Bf16Weights().apply(unet)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    call = example(16, 16)
    named = unet(**call).sample
    rest = {"added_cond_kwargs": call["added_cond_kwargs"]}
    placed = unet(call["sample"], call["timestep"], call["encoder_hidden_states"], **rest, return_dict=False)
    assert named.dtype == torch.float32 and isinstance(placed, tuple) and torch.equal(placed[0], named)


@settings(max_examples=20, deadline=None)
@given(
    timestep=st.one_of(st.integers(0, 999), st.floats(0, 999, width=32)),
    sizes=st.lists(st.integers(0, 4096), min_size=6, max_size=6),
)
def test_timesteps_and_sizes_are_embedded_as_the_numbers_they_are(timestep: float, sizes: list[int]) -> None:
    """Against the sinusoids of Ho et al., 2006.11239, in float64."""
    unet = SMALL_UNET
    seen: dict[str, Tensor] = {}
    hooks = [
        getattr(unet, name).register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
        for name in ("time_proj", "add_time_proj")
    ]
    call = example(8, 8)
    call["timestep"] = torch.tensor([timestep, timestep])
    call["added_cond_kwargs"]["time_ids"] = torch.tensor([sizes, sizes], dtype=torch.float32)
    try:
        with torch.no_grad():
            unet(**call)
    finally:
        for hook in hooks:
            hook.remove()
    for name, numbers in (("time_proj", [timestep]), ("add_time_proj", sizes)):
        found = seen[name][: len(numbers)]
        half = found.shape[1] // 2
        angles = torch.tensor(numbers, dtype=torch.float64)[:, None] * torch.exp(
            -math.log(10_000) * torch.arange(half, dtype=torch.float64) / half
        )
        assert found.dtype == torch.float32
        # float32 angles of up to 4096 are off by up to 2e-4 each; one rounded to bfloat16 would be off by up to 8
        torch.testing.assert_close(found.double(), torch.cat([angles.cos(), angles.sin()], dim=1), rtol=0, atol=2e-3)


SMALL_UNET = tiny_sdxl(seed=0).unet
Bf16Weights().apply(SMALL_UNET)


def rounding(kind: Any = None, **arguments: Any) -> Any:
    from functools import partial

    return partial(kind or torch.optim.AdamW, **arguments)


class Drawn(torch.optim.SGD):
    stochastic_rounding = True


def test_which_optimizers_round_stochastically() -> None:
    assert rounds_stochastically(Drawn) and rounds_stochastically(rounding(Drawn, lr=1))
    assert rounds_stochastically(rounding(lr=1, bf16_stochastic_round=True))
    assert not rounds_stochastically(rounding(lr=1, bf16_stochastic_round=False))
    assert not rounds_stochastically(rounding(lr=1)) and not rounds_stochastically(torch.optim.AdamW)


def test_optimizers_that_round_to_nearest_are_refused(small: Compose) -> None:
    with pytest.raises(UserError, match="optimizer=adamw_bf16"):
        Spec.of(small("memory=[bf16_weights]"))


def test_nothing_is_cast_whatever_the_precision_is_called(bf16: Compose) -> None:
    """A recipe says bf16, and a preset for a small card is chosen on top of it."""
    chosen = ["run.max_images=4"]
    named, plain = (run(bf16(*chosen, f"name={p}", f"precision={p}")) for p in ("bf16", "fp32"))
    assert losses(named) == losses(plain)


def test_half_precision_of_another_kind_is_refused(small: Compose) -> None:
    assert autocast([Bf16Weights()], "bf16") == "no" and autocast([], "bf16") == "bf16"
    with pytest.raises(UserError, match=r"set precision=bf16"):
        refuse_misfits([Bf16Weights()], AdamWBf16, "fp16")


@pytest.fixture
def bf16(small: Compose) -> Compose:
    return lambda *overrides: small("memory=[bf16_weights]", "optimizer=adamw_bf16", "~evals.sample_grid", *overrides)


def test_a_run_keeps_an_average_in_float32_and_exports_it_whole(bf16: Compose) -> None:
    folder = run(bf16("run.max_images=4", "ema.decay=0.9"))
    newest = folder / "checkpoints" / "step_00000002"
    trained, averaged = (load_file(newest / f"{name}.safetensors") for name in ("unet", "ema"))
    assert {t.dtype for t in trained.values()} == {torch.bfloat16}
    assert {t.dtype for name, t in averaged.items() if "shadow" in name} == {torch.float32}
    # an average in bfloat16 would hold no value between two neighbours
    assert any(not torch.equal(t, t.bfloat16().float()) for name, t in averaged.items() if "shadow" in name)
    exported = load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], averaged[f"ema/shadow/{name}"]) for name in exported)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder / "pipeline", local_files_only=True)
    assert pipeline.unet.dtype == torch.float32


def test_without_an_average_the_weights_are_exported_as_they_are(bf16: Compose) -> None:
    folder = run(bf16("run.max_images=4", "ema=none"))
    trained = load_file(folder / "checkpoints" / "step_00000002" / "unet.safetensors")
    exported = load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {t.dtype for t in exported.values()} == {torch.bfloat16}
    assert all(torch.equal(tensor, trained[f"unet/{name}"]) for name, tensor in exported.items())


def test_a_run_in_two_parts_is_the_same_run(bf16: Compose) -> None:
    run(bf16("run.max_images=6", "name=two"))
    two, one = run(bf16("run.max_images=12", "name=two")), run(bf16("run.max_images=12", "name=one"))
    assert losses(two) == losses(one) and len(losses(one)) == 6
    assert same_weights(two, one)


def test_trains_close_to_float32(bf16: Compose) -> None:
    coarse = losses(run(bf16("run.max_images=12", "name=bf16")))
    exact = losses(run(bf16("run.max_images=12", "name=fp32", "memory=[]", "optimizer=adamw")))
    assert list(coarse.values()) == pytest.approx(list(exact.values()), rel=Bf16Weights.tolerance) and coarse != exact
