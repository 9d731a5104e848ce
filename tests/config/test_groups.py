"""The config tree, the choices of a config, and groups that a plug-in adds."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nai_xl import config
from nai_xl.config.groups import of_several, settings
from nai_xl.errors import UserError
from tests.config.options import MULTIPLE, chosen


def test_every_group_of_the_defaults_exists_and_every_folder_is_a_default() -> None:
    listed = OmegaConf.load(config.conf_dir() / "train.yaml").defaults
    defaults = {str(key) for entry in listed if not isinstance(entry, str) for key in entry if "hydra" not in str(key)}
    assert defaults == set(config.groups())


def test_settings_and_groups_are_all_that_a_config_has() -> None:
    assert {str(key) for key in config.compose([])} <= {*settings(), *config.groups()}
    assert of_several() == MULTIPLE


def test_the_recipe_is_the_papers() -> None:
    cfg = config.compose(chosen("recipe", "sdxl_nai_v3"))
    assert cfg.optimizer.lr == 1e-5 and cfg.bucketing.resolution == 1024 and cfg.precision.autocast == "bf16"
    assert list(cfg.memory) == ["sdpa", "gradient_checkpointing"]


def test_an_override_beats_the_recipe() -> None:
    cfg = config.compose([*chosen("recipe", "sdxl_nai_v3"), "loss=uniform", "run.batch_size=1"])
    assert cfg.loss._target_.endswith("uniform") and cfg.run.batch_size == 1


def choices(*overrides: str, config_dir: Path | None = None) -> dict[str, str]:
    (point,) = config.combinations(overrides, config_dir)
    return point[1]


def test_choices_name_the_options_in_the_order_of_train_yaml() -> None:
    found = choices("debug=fast", "hardware=gpu_24gb", "evals=[color,val_loss]")
    listed = [group for group in found if group in config.groups()]
    defaults = OmegaConf.load(config.conf_dir() / "train.yaml").defaults
    order = [str(key) for entry in defaults if not isinstance(entry, str) for key in entry]
    assert listed == [*found] == [group for group in order if group in found]
    assert found["memory"] == "sdpa, channels_last, bf16_weights, gradient_checkpointing"
    assert found["evals"].startswith("color, val_loss")
    assert (found["debug"], found["hardware"], found["loss"]) == ("fast", "gpu_24gb", "minsnr")
    assert "recipe" not in found


def test_settings_of_an_option_that_is_not_chosen_name_no_choice() -> None:
    assert choices("debug=fast", "evals=[val_loss]")["evals"] == "val_loss"


@pytest.fixture
def plug_in(tmp_path: Path) -> Path:
    """A folder of config groups: one with a plain option, one with options of which several can be chosen."""
    for name, text in {
        "extras/big": "width: 3\n",
        "probes/one": "one:\n  _target_: nai_xl.diffusion.loss.edm\n  _partial_: true\n",
        "probes/two": "two:\n  _target_: nai_xl.diffusion.loss.p2\n  _partial_: true\n",
        "sets/all": "# @package _global_\nrun: {seed: 7}\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_groups_of_a_further_folder_are_known(plug_in: Path) -> None:
    assert {"extras", "probes", "sets", "loss"} <= {*config.groups(plug_in)}
    assert "extras" not in config.groups()
    (point,) = config.combinations(["+extras=big", "+probes=[one,two]", "+sets=all"], plug_in)
    _, found, cfg = point
    assert (found["extras"], found["probes"], found["sets"]) == ("big", "one, two", "all")
    assert cfg.extras.width == 3 and cfg.run.seed == 7 and [*cfg.probes] == ["one", "two"]
    config.check(cfg, choices=found)


def test_what_no_folder_has_is_still_unknown(plug_in: Path) -> None:
    with pytest.raises(UserError, match=r"no setting 'extra'; did you mean 'extras'\?"):
        list(config.combinations(["+extras=big", "+extra.width=1"], plug_in))
