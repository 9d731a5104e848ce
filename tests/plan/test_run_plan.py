"""The command line of the plan, its arithmetic against closed forms, and that every preset trains."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig
from rich.console import Console

from nai_xl import config
from nai_xl.engine.gpus import GIB, GPUS
from nai_xl.errors import UserError
from nai_xl.interfaces import Bucket
from nai_xl.memory.compile import Compile
from nai_xl.model.flops import by_area, forward_flops
from nai_xl.model.tiny import tiny_unet_skeleton
from nai_xl.plan import command, remedy
from nai_xl.plan.footprint import Footprint
from nai_xl.plan.run_plan import Machines, RunPlan, make
from nai_xl.plan.tables import compared
from nai_xl.plan.throughput import all_reduce_seconds, expected
from nai_xl.train import train
from tests.synthetic import write_run

PRESETS = sorted(path.stem for path in (config.conf_dir() / "hardware").glob("gpu_*.yaml"))


@pytest.fixture
def told(typed: Callable[..., str]) -> Callable[..., str]:
    """Runs the command; what it printed."""
    return partial(typed, command.main)


# --- arithmetic -------------------------------------------------------------------------------------------------------

FOOTPRINT = Footprint(
    parameters=10**9, weights=2 * 10**9, gradients=2 * 10**9, optimizer=4 * 10**9, ema=0, cast_copy=0,
    activations=10**9, peaks={"forward": 9 * 10**9, "backward": 10**10}, after_backward=8 * 10**9, flops=10**13,
)  # fmt: skip


def test_a_ring_moves_twice_the_bytes_less_one_share() -> None:
    h100 = GPUS["h100"]
    assert all_reduce_seconds(10**9, h100, gpus=1, nodes=1) == 0
    two = all_reduce_seconds(10**9, h100, gpus=2, nodes=1)
    assert two == pytest.approx(1e9 / (0.8 * 450e9))
    assert all_reduce_seconds(10**9, h100, gpus=8, nodes=1) == pytest.approx(two * 2 * 7 / 8)
    # 32 machines of 8: eight 400 Gbit/s cards each, 10.27 GB in about 55 ms at full rate
    many = all_reduce_seconds(10_269_854_736, h100, gpus=8, nodes=32)
    assert many == pytest.approx(2 * 255 / 256 * 10.27e9 / (0.8 * 400e9), rel=1e-3)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8))
def test_more_devices_are_faster_and_never_better_than_in_proportion(batch: int, gpus: int, nodes: int) -> None:
    one = expected(FOOTPRINT, GPUS["a100_80"], batch=batch)
    many = expected(FOOTPRINT, GPUS["a100_80"], batch=batch, gpus=gpus, nodes=nodes)
    assert many.images_per_second <= gpus * nodes * one.images_per_second * (1 + 1e-9)
    assert many.efficiency == pytest.approx(many.images_per_second / (gpus * nodes * one.images_per_second))


def test_speed_is_flops_over_the_assumed_share_of_the_peak() -> None:
    found = expected(FOOTPRINT, GPUS["h100"], batch=4, grad_accum=2, utilisation=0.5)
    assert found.compute == pytest.approx(2 * 1e13 / (0.5 * 989e12))
    assert found.update == pytest.approx((4e9 + 2e9 + 8e9) / (0.8 * 3350e9))
    assert found.images_per_second == pytest.approx(8 / (found.compute + found.update))


def test_flops_of_all_canvases_from_three_of_them() -> None:
    unet = tiny_unet_skeleton()
    canvases = {Bucket(32 * i, 64): 1 for i in range(1, 6)}
    counted: list[tuple[int, int]] = []

    def count(height: int, width: int) -> int:
        counted.append((height, width))
        return forward_flops(unet, height, width)

    found = by_area(count, canvases)
    assert len(counted) == 3
    assert found == {bucket: forward_flops(unet, bucket.height, bucket.width) for bucket in canvases}


# --- command line -----------------------------------------------------------------------------------------------------


def test_one_plan_fills_a_screen(told: Callable[..., str], tmp_path: Path) -> None:
    out = told("precision=bf16", "run.batch_size=2", "--gpu", "h100", "--gpus", "8", "--json", f"{tmp_path}/p.json")
    for words in ("3,683,012 parameters", "128x128", "H100 SXM", "yes", "8 devices average", "(no data"):
        assert words in out
    (written,) = json.loads((tmp_path / "p.json").read_text())
    assert written["footprint"]["parameters"] == 3_683_012
    assert written["cards"]["H100 SXM"]["spare_gib"] == pytest.approx(79.1 - written["needed"] / GIB)


def test_several_plans_get_a_row_each(told: Callable[..., str]) -> None:
    out = told("run.batch_size=1,2", "memory=[sdpa],[sdpa,optimizer_in_backward]", "run.grad_accum=2")
    assert sum("RTX" in line for line in out.splitlines()) == 2
    assert sum("refused" in line for line in out.splitlines()) == 2
    assert "optimizer_in_backward cannot accumulate" in out


def test_the_numbers_of_several_plans_say_whose_they_are(told: Callable[..., str], tmp_path: Path) -> None:
    told("memory=[sdpa],[sdpa,optimizer_in_backward]", "run.grad_accum=2", "--json", f"{tmp_path}/p.json")
    fits, refused = json.loads((tmp_path / "p.json").read_text())
    assert fits["swept"] == {"memory": "[sdpa]"} and fits["needed"] > 0
    assert refused["swept"] == {"memory": "[sdpa,optimizer_in_backward]"}
    assert "optimizer_in_backward cannot accumulate" in refused["refused"] and "needed" not in refused


def test_what_an_engine_shares_out_is_said_not_to_be_taken_off(told: Callable[..., str]) -> None:
    assert "distributed=fsdp2 shares out is not taken off" in " ".join(told("distributed=fsdp2").split())


def test_data_of_every_kind_are_counted(told: Callable[..., str], images: Path) -> None:
    mixed = "data=mix", "+data@data.sources.x=folder", f"data.sources.x.dir={images}"
    once = "run.max_images=null", "run.epochs=1"
    assert told(*mixed, *once) == told("data=folder", f"data.dir={images}", *once)
    assert "data.files=none.tar: no such file" in told("data=shards", "data.files=none.tar", status=1)


def test_mistakes_are_told(told: Callable[..., str]) -> None:
    assert "did you mean 'gpu_24gb'" in told("hardware=gpu_24g", status=1)
    assert "no parameter 'beta'" in told("optimizer.beta=1", status=1)
    assert "data.dir=/none/typo: no such folder" in told("data=folder", "data.dir=/none/typo", status=1)
    assert "error: --json /none/x.json cannot be written" in told("--json", "/none/x.json", status=1)
    assert "begin at 1" in told("--gpus", "0", status=2)
    assert "no card .a100. in the table" in told("--gpu", "a100", status=2).replace("'", ".")


def test_a_plan_that_does_not_fit_names_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(cfg: DictConfig, choices: dict[str, str], machines: Machines) -> RunPlan:
        tried.append(choices["optimizer"])
        if choices["optimizer"] == "adamw8bit":
            raise UserError("no luck")
        small = choices["optimizer"] == "adafactor"
        needed = FOOTPRINT if small else FOOTPRINT.__class__(**{**vars(FOOTPRINT), "peaks": {"forward": 10**12}})
        return RunPlan(choices, None, needed, Bucket(8, 8), {}, False, {}, True, False)  # type: ignore[arg-type]

    tried: list[str] = []
    monkeypatch.setattr(remedy, "make", make)
    said = remedy.remedy(["memory=[sdpa]", "run.batch_size=9"], None, GPUS["rtx4090"], Machines())
    assert said.startswith("hardware=gpu_12gb fits the RTX 4090 with")
    assert tried == ["adamw8bit", "adamw8bit", "adafactor"]  # the presets for larger cards are not tried
    monkeypatch.setattr(remedy, "REMEDIES", {"hardware=gpu_16gb": 15})
    assert remedy.remedy([], None, GPUS["rtx4090"], Machines()) == "no preset fits the RTX 4090"


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["hardware=gpu_24gb", "memory=[gpu_24gb]"])
def test_a_preset_chooses_and_the_user_overrules(written: str) -> None:
    cfg = config.compose([written])
    assert set(cfg.memory) == {"sdpa", "channels_last", "bf16_weights", "gradient_checkpointing"}
    assert cfg.optimizer._target_.endswith("AdamW8bit") and cfg.ema.device == "cpu"
    own = config.compose([written, "optimizer=adamw", "ema=none", "precision=bf16"])
    assert own.optimizer._target_ == "torch.optim.AdamW" and own.ema._target_.endswith("NoEma")
    assert own.precision.autocast == "bf16" and set(own.memory) == set(cfg.memory)


def test_a_preset_beats_a_recipe() -> None:
    """A recipe is sized for one card, and a preset is chosen on top of it for another."""
    cfg = config.compose(["recipe=sdxl_nai_v3", "hardware=gpu_24gb", "model.path=x", "data.dir=."])
    assert set(cfg.memory) == {"sdpa", "channels_last", "bf16_weights", "gradient_checkpointing"}
    assert cfg.optimizer._target_.endswith("AdamW8bit") and cfg.run.batch_size == 8
    old = config.compose(["recipe=sdxl_nai_v3", "memory=gpu_24gb", "model.path=x", "data.dir=."])
    assert old == cfg


def test_a_preset_can_have_more_beside_it() -> None:
    assert set(config.compose(["memory=[cpu,gradient_checkpointing]"]).memory) == {"sdpa", "gradient_checkpointing"}


@pytest.mark.parametrize("preset", [*PRESETS, "cpu"])
def test_every_preset_trains_here(
    preset: str, small: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Compile, "apply", lambda self, unet: None)  # has tests of its own, and takes minutes
    cfg = small(f"hardware={preset}", "run.max_images=4")
    config.check(cfg)
    assert (train(cfg, {}) / "pipeline").is_dir()


def test_presets_for_smaller_cards_need_less() -> None:
    """All that training holds on the card, on the tiny model at one image a step."""

    def needed(preset: str) -> float:
        [(_, choices, cfg)] = config.combinations([f"hardware={preset}", "run.batch_size=1", "bucketing=square"])
        return make(cfg, choices).footprint.needed

    peaks = [needed(f"gpu_{size}gb") for size in (12, 16, 24, 48, 80)]
    assert peaks == sorted(peaks) and len(set(peaks)) == 5


def test_an_average_in_main_memory_takes_none_of_the_card() -> None:
    def planned(ema: str) -> RunPlan:
        return make(config.compose([f"ema={ema}", "bucketing=square", "run.batch_size=1"]), {})

    beside, away, none = map(planned, ("standard", "in_main_memory", "none"))
    assert (beside.ema_on_host, away.ema_on_host, none.ema_on_host) == (False, True, False)
    assert beside.footprint.ema >= 4 * beside.footprint.parameters and away.footprint.ema == none.footprint.ema == 0


def test_a_list_that_is_compared_is_told_as_it_was_given() -> None:
    rows = [({"memory": "[sdpa]"}, "refused"), ({"memory": "[sdpa,tf32]"}, "refused")]
    made = compared(rows, [], Machines())
    console = Console(width=200)
    with console.capture() as told:
        console.print(made)
    assert "[sdpa] " in told.get() and "[sdpa,tf32]" in told.get()


# --- a question's cost ------------------------------------------------------------------------------------------------


@pytest.fixture
def pilot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of three seeds whose arm differs by about 10 %."""
    monkeypatch.chdir(tmp_path)
    for loss, shift in (("uniform", 0.0), ("minsnr", 0.03)):
        for seed in range(3):
            write_run(tmp_path / "outputs", {"loss": loss}, seed, effect={"val/loss": shift}, sweep="first")
    return tmp_path


def test_a_pilot_tells_the_seeds_and_hours_of_a_difference(told: Callable[..., str], pilot: Path) -> None:
    asked = ["run.batch_size=4", "precision=bf16", "--pilot", "first"]
    (row,) = (line.split() for line in told(*asked).splitlines() if line.startswith(" val/loss"))
    shares = [float(word) for word in row if re.fullmatch(r"[\d.]+", word)]
    assert len(shares) == 4 and shares == sorted(shares, reverse=True) and row.count("%") == 4
    out = told(*asked, "--gpu", "4090", "--detect", "20%")
    (row,) = (line.split() for line in out.splitlines() if line.startswith(" val/loss"))
    seeds, hours = int(row[-3]), float(row[-1])
    assert "20 % takes" in out and row[-2] == "seeds" and 2 <= seeds <= 3
    (card,) = (line.split() for line in out.splitlines() if line.strip().startswith("RTX 4090"))
    assert hours == pytest.approx(2 * seeds * float(card[-2]), abs=0.02 * seeds)  # arm and baseline


def test_a_pilot_that_is_not_there_or_a_size_that_is_none_is_told(told: Callable[..., str], pilot: Path) -> None:
    assert "no run of sweep frist in outputs; there is first" in told("--pilot", "frist", status=1)
    assert "--detect: little is no difference" in told("--pilot", "first", "--detect", "little", status=1)
    assert "--detect needs the spread of an earlier sweep" in told("--detect", "1%", status=2)
