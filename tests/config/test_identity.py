"""A run's identity is what can change its weights, by content and not by address."""

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from nai_xl import config
from nai_xl.config import identity
from nai_xl.diffusion.loss import min_snr
from tests.config.options import MULTIPLE, OPTIONS, composed, together


def signature(*overrides: str) -> str:
    return config.signature(composed(*overrides))


CHANGING = "optimizer.lr=1 schedule=scaled_linear loss.gamma=4 run.seed=1 run.batch_size=3 text.chunks=2 memory=[]"
FURTHER_CHANGING = (
    "model=sdxl_random data.held_out=0.1 precision=bf16 ema=none ema.decay=0.9 lr=cosine schedule.base.timesteps=500 "
    "memory=[sdpa,channels_last] memory=[math] noise.offset=0.1 objective.micro_conditioning=false +extra.a=1"
)
HARMLESS = (
    "run.max_images=9 run.log_every=3 tracker=jsonl cache=memory output_dir=x run.workers=2 evals=[] debug=profile "
    "ema.device=cpu memory=[sdpa,gradient_checkpointing] memory=[sdpa,offload_activations]"
)
FURTHER_HARMLESS = (
    "distributed=ddp name=x plugins=[mine] sampling.steps=3 sweep.parallel=2 run.keep_checkpoints=1 data.cache=x "
    "evals=[color,quality,coherence,val_loss] evals.sample_grid.every=7 +evals.color.every=3 tracker.experiment=x "
    "run.checkpoint_every=7 +memory.gradient_checkpointing.blocks=ff"
)


@pytest.mark.parametrize("change", [*CHANGING.split(), *FURTHER_CHANGING.split()])
def test_what_changes_the_weights_changes_the_signature(change: str) -> None:
    assert signature(change) != signature()


@pytest.mark.parametrize("change", [*HARMLESS.split(), *FURTHER_HARMLESS.split()])
def test_what_does_not_change_the_weights_keeps_the_signature(change: str) -> None:
    assert signature(change) == signature()


def test_the_order_of_overrides_does_not_matter() -> None:
    assert signature("loss=uniform", "run.seed=3") == signature("run.seed=3", "loss=uniform")


STATED = (
    "loss.gamma=5 +optimizer.amsgrad=false optimizer.betas=[0.9,0.999] +optimizer.maximize=false ~loss.gamma "
    "~schedule.base.timesteps ~ema.decay ~captions.dropout schedule.base.timesteps=1000 run.grad_accum=1 "
    "~run.grad_accum ~objective.normalize_weights"
)


@pytest.mark.parametrize("change", STATED.split())
def test_a_default_may_be_stated_or_not(change: str) -> None:
    assert signature(change) == signature()


def test_a_node_may_be_a_default_too() -> None:
    assert signature("loss=uncertainty") == signature("loss=uncertainty", "~loss.base")
    assert signature("loss=uncertainty") != signature("loss=uncertainty", "loss.base._target_=nai_xl.diffusion.loss.p2")


def test_numbers_are_compared_as_the_target_takes_them() -> None:
    assert signature("optimizer.lr=1") == signature("optimizer.lr=1.0") == signature("optimizer.lr='1'")


def test_settings_of_an_option_that_is_not_chosen_do_not_count() -> None:
    assert signature("evals=[]", "debug=fast") == signature()


def test_the_signature_of_the_default_run() -> None:
    """Whoever changes it makes every run that there is another run."""
    assert signature() == "f7d6873c"
    assert signature("bucketing.scheme=half") == "ed8d7549"  # that of the default run before the published buckets


# --- by content, not by address ---------------------------------------------------------------------------------------


def module(name: str, monkeypatch: pytest.MonkeyPatch, **content: object) -> None:
    made = ModuleType(name)
    vars(made).update(content)
    monkeypatch.setitem(sys.modules, name, made)


def longer(level: Any, p: Any, *, gamma: float = 5.0, power: float = 1.0) -> None:
    """min_snr as it might be one day: with a parameter more."""


@pytest.mark.parametrize("later", [min_snr, longer])
def test_a_target_may_move_inside_the_package_and_get_parameters(
    later: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    module("nai_xl.elsewhere", monkeypatch, min_snr=later)
    there = ["loss._target_=nai_xl.elsewhere.min_snr", "plugins=[nai_xl.elsewhere]"]
    assert signature(*there) == signature()
    assert signature(*there, "loss.gamma=4") == signature("loss.gamma=4") != signature()
    if later is longer:
        assert signature(*there, "+loss.power=2") != signature()


def test_the_path_of_a_plug_in_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first_of_mine", "second_of_mine"):
        module(name, monkeypatch, min_snr=min_snr)
    one, two = (
        signature(f"loss._target_={name}.min_snr", f"plugins=[{name}]") for name in ("first_of_mine", "second_of_mine")
    )
    assert len({one, two, signature()}) == 3


def test_a_public_name_belongs_to_one_target_of_its_group() -> None:
    """Two that were called alike would share their runs."""
    found: dict[tuple[str, str], set[str]] = {}
    for group, option in OPTIONS:
        content: Any = OmegaConf.to_container(OmegaConf.load(config.conf_dir() / group / f"{option}.yaml"))
        for node in [content, *content.values()]:
            if isinstance(node, dict) and "_target_" in node:
                name = identity.public_name(node["_target_"])
                found.setdefault((group, name), set()).add(node["_target_"])
    assert len(found) > 40
    assert not {key: targets for key, targets in found.items() if len(targets) > 1}


def test_a_target_that_cannot_be_loaded_still_has_a_signature() -> None:
    """The run's directory is where a sweep notes why the arm failed."""
    broken = [signature(f"loss._target_=nai_xl.diffusion.loss.{name}") for name in ("nothing", "nil")]
    assert len({*broken, signature()}) == 3
    assert signature("optimizer.lr=fast") != signature()


# --- what is left out -------------------------------------------------------------------------------------------------


def targets(cfg: DictConfig) -> list[tuple[str, DictConfig, Any]]:
    """Key, node and target of every option in a config."""
    plain = [(str(key), cfg[key]) for key in cfg if key not in MULTIPLE]
    several = [(f"{group}.{key}", cfg[group][key]) for group in MULTIPLE for key in cfg.get(group) or {}]
    nodes = [(key, node) for key, node in [*plain, *several] if isinstance(node, DictConfig) and "_target_" in node]
    return [(key, node, config.locate(node._target_)) for key, node in nodes]


def test_whoever_says_that_it_changes_no_weights_is_left_out() -> None:
    seen = set()
    for cfg in together():
        hashed = json.dumps(identity.identity(cfg))
        for key, _, target in targets(cfg):
            if inspect.isclass(target) and not inspect.getattr_static(target, "changes_weights", True):
                seen.add(target.__name__)
                assert f'"{target.__name__}"' not in hashed, (key, hashed)
    assert len(seen) > 15 and {"MlflowTracker", "GradientCheckpointing", "Profiler", "Color", "Native"} <= seen


def test_a_parameter_without_effect_exists_and_is_left_out() -> None:
    seen = set()
    for cfg in together():
        for key, node, target in targets(cfg):
            for name in inspect.getattr_static(target, "without_effect", ()):
                assert name in inspect.signature(target).parameters, (target, name)
                changed = OmegaConf.create({"lr": {}, key.split(".")[0]: {**node, name: "something else"}})
                assert "something else" not in json.dumps(identity.identity(changed))
                seen.add(f"{target.__name__}.{name}")
    wanted = "RunSettings.workers StandardEma.device SampleSource.cache load_sdxl.config sdxl_random.config"
    assert {*wanted.split()} <= seen


def test_what_is_left_out_in_short() -> None:
    assert {*config.left_out()} == {
        *"name output_dir plugins tracker evals checkpoint distributed cache data.cache data.on_change native".split(),
        *"model.config sampling profile sweep hooks run.on_nonfinite run.max_nonfinite".split(),
        *"run.log_every run.checkpoint_every run.keep_checkpoints run.workers ema.device".split(),
        *"memory.gradient_checkpointing memory.offload_activations".split(),
    }


def test_a_longer_run_is_the_same_one_where_the_rate_is_open_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    for rate, same in (("constant", True), ("linear", False), ("cosine", False)):
        cfg = config.compose([f"lr={rate}"])
        longer = config.compose([f"lr={rate}", "run.max_images=99"])
        assert config.open_ended(cfg) is same
        assert (config.signature(cfg) == config.signature(longer)) is same
    module("rates_of_mine", monkeypatch, constant=lambda step, total: 1.0)
    assert not config.open_ended(config.compose(["lr._target_=rates_of_mine.constant", "plugins=[rates_of_mine]"]))


def test_runs_lie_under_their_name_and_signature(tmp_path: Path) -> None:
    cfg = config.compose([f"output_dir={tmp_path}"])
    choices = {"model": "tiny", "schedule": "ztsnr", "parameterization": "v", "loss": "minsnr"}
    assert config.run_dir(cfg, choices) == tmp_path / f"tiny-ztsnr-v-minsnr-{signature()}"
    named = config.compose([f"output_dir={tmp_path}", "name=a/b"])
    assert config.run_dir(named, choices) == tmp_path / "a" / f"b-{signature()}"


def test_a_task_says_which_choices_name_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = {"task": "own", "model": "tiny", "loss": "minsnr"}
    plain = config.compose([f"output_dir={tmp_path}", "task=vae_decoder"])
    assert config.run_dir(plain, choices | {"task": "vae_decoder"}).name.startswith("vae_decoder-tiny-")
    module("tasks_of_mine", monkeypatch, Own=type("Own", (), {"headline": ("task", "loss")}))
    own = config.compose([f"output_dir={tmp_path}", "task._target_=tasks_of_mine.Own", "plugins=[tasks_of_mine]"])
    assert config.run_dir(own, choices).name.startswith("own-minsnr-")


# --- a config in short ------------------------------------------------------------------------------------------------


def test_flat_names_every_leaf_and_no_target() -> None:
    flat = config.flat(config.compose([]))
    assert flat["optimizer.lr"] == 1e-3 and flat["loss.gamma"] == 5.0
    assert not any("_target_" in name for name in flat)


def test_flat_tells_the_seed_once() -> None:
    """In a comparison of runs a repeated one would stand there as a second thing that was varied."""
    flat = config.flat(config.compose(["optimizer=adafactor", "run.seed=7654321"]))
    assert [name for name, value in flat.items() if value == 7654321] == ["run.seed"]
