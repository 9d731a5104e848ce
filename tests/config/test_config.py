"""The config tree: every option is sound, mistakes are seen, and a run's identity is what can change its weights."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nai_xl import config
from nai_xl.diffusion.schedule import TableSchedule
from nai_xl.errors import UserError

OPTIONS = [(path.parent.name, path.stem) for path in sorted(config.conf_dir().glob("*/*.yaml"))]
NEEDED = {
    ("model", "sdxl"): ["model.path=x"],
    ("data", "folder"): ["data.dir=."],
    ("recipe", "sdxl_nai_v3"): ["model.path=x", "data.dir=."],
}
MULTIPLE = ("memory", "evals")


def chosen(group: str, option: str) -> list[str]:
    value = f"[{option}]" if group in MULTIPLE else option
    return [f"{group}={value}", *NEEDED.get((group, option), [])]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_passes_the_check(group: str, option: str) -> None:
    config.check(config.compose(chosen(group, option)))


def test_every_group_of_the_defaults_exists_and_every_folder_is_a_default() -> None:
    listed = OmegaConf.load(config.conf_dir() / "train.yaml").defaults
    defaults = {str(key) for entry in listed if not isinstance(entry, str) for key in entry if "hydra" not in str(key)}
    assert defaults == set(config.groups())


def test_the_recipe_is_the_papers() -> None:
    cfg = config.compose(chosen("recipe", "sdxl_nai_v3"))
    assert cfg.optimizer.lr == 1e-5 and cfg.bucketing.resolution == 1024 and cfg.precision.autocast == "bf16"
    assert list(cfg.memory) == ["sdpa", "gradient_checkpointing"]


def test_an_override_beats_the_recipe() -> None:
    cfg = config.compose([*chosen("recipe", "sdxl_nai_v3"), "loss=uniform", "run.batch_size=1"])
    assert cfg.loss._target_.endswith("uniform") and cfg.run.batch_size == 1


def test_nested_nodes_are_built_and_partials_wait_for_their_arguments() -> None:
    cfg = config.compose(["optimizer.lr=3"])
    assert isinstance(config.build(cfg.schedule), TableSchedule)
    assert isinstance(config.build(cfg.optimizer), functools.partial)
    assert config.build(cfg.run).seed == 0


def test_a_path_becomes_a_path() -> None:
    cfg = config.compose(["data=folder", "data.dir=."])
    assert config.build(cfg.data).dir == Path()


CHANGING = "optimizer.lr=1 schedule=scaled_linear loss.gamma=4 run.seed=1 run.batch_size=3 text.chunks=2 memory=[]"
HARMLESS = (
    "run.max_images=9 run.log_every=3 tracker=jsonl cache=memory output_dir=x run.workers=2 evals=[] debug=profile "
    "ema.device=cpu memory=[sdpa,gradient_checkpointing] memory=[sdpa,offload_activations]"
)


@pytest.mark.parametrize("change", CHANGING.split())
def test_what_changes_the_weights_changes_the_signature(change: str) -> None:
    assert config.signature(config.compose([change])) != config.signature(config.compose([]))


@pytest.mark.parametrize("change", HARMLESS.split())
def test_what_does_not_change_the_weights_keeps_the_signature(change: str) -> None:
    assert config.signature(config.compose([change])) == config.signature(config.compose([]))


def test_the_order_of_overrides_does_not_matter() -> None:
    one = config.compose(["loss=uniform", "run.seed=3"])
    assert config.signature(one) == config.signature(config.compose(["run.seed=3", "loss=uniform"]))


def test_flat_names_every_leaf_and_no_target() -> None:
    flat = config.flat(config.compose([]))
    assert flat["optimizer.lr"] == 1e-3 and flat["loss.gamma"] == 5.0
    assert not any("_target_" in name for name in flat)


def test_flat_tells_the_seed_once() -> None:
    """In a comparison of runs a repeated one would stand there as a second thing that was varied."""
    flat = config.flat(config.compose(["optimizer=adafactor", "run.seed=7654321"]))
    assert [name for name, value in flat.items() if value == 7654321] == ["run.seed"]


def test_a_target_outside_the_trusted_packages_is_not_even_imported() -> None:
    with pytest.raises(UserError, match=r"plugins=\[antigravity\]"):
        config.locate("antigravity.fly")
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.fused=maybe"], "optimizer.fused=maybe: input should be a valid boolean"),
        (["optimizer.betas=[a,b]"], "optimizer.betas"),
        (["+optimizer.momentum=1"], "no parameter 'momentum' in AdamW"),
        (["latents.dtype=fp16"], "'fp32' or 'bf16'"),
        (["~run.batch_size"], "run.batch_size is missing"),
        (["schedule.base.beta_strat=1"], "beta_strat"),
    ],
)
def test_mistakes_are_told_by_their_path(overrides: list[str], message: str) -> None:
    from hydra.errors import ConfigCompositionException

    with pytest.raises((UserError, ConfigCompositionException)) as told:
        config.check(config.compose(overrides))
    assert message in str(told.value)


def test_a_weighting_from_outside_needs_a_function_and_a_yaml(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def halved(level, p, *, factor: float = 0.5):\n    return factor * level.alpha\n"
    )
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "halved.yaml").write_text("_target_: mine.halved\n_partial_: true\n")
    arguments = (
        "-m --config-dir conf loss=halved,minsnr plugins=[mine] debug=fast tracker=jsonl run.max_images=16".split()
    )
    command = [sys.executable, "-m", "nai_xl.train", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for loss in ("halved", "minsnr"):
        assert len(list((tmp_path / "outputs").glob(f"tiny-ztsnr-v-{loss}-*/pipeline"))) == 1
