"""A yaml or a run directory of a stranger runs no program."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nai_xl import config
from nai_xl.config.trust import typed_plugins
from nai_xl.errors import UserError

CALLED: list[str] = []


def called(**given: object) -> None:
    CALLED.append("called")


HERE = __name__
YAMLS = {
    "a plug-in of its own": f"plugins: [{HERE}]\nloss: {{_target_: {HERE}.called}}",
    "a callback": f"hydra: {{callbacks: {{mine: {{_target_: {HERE}.called}}}}}}",
    "a callback by another name": f"name: {HERE}.called\nhydra: {{callbacks: {{mine: {{_target_: '${{name}}'}}}}}}",
    "a handler": f"hydra: {{job_logging: {{version: 1, handlers: {{a: {{'()': {HERE}.called}}}}}}}}",
    "a stream": f"hydra: {{hydra_logging: {{version: 1, handlers: {{a: {{stream: 'ext://{HERE}.called'}}}}}}}}",
    "a callback that stands elsewhere": f"mine: {{_target_: {HERE}.called}}\nhydra: {{callbacks: {{a: '${{mine}}'}}}}",
    "a callback that is put together": f"hydra: {{callbacks: {{a: '${{oc.create:{{_target_: {HERE}.called}}}}'}}}}",
    "a callback of a later name": "hydra: {callbacks: {a: '${mine.${hydra.job.num}}'}}",
    "a circle": "one: {a: '${other}'}\nother: {b: '${one}'}\nhydra: {callbacks: {a: '${one}'}}",
    "a handler that stands elsewhere": (
        f"mine: {{'()': {HERE}.called}}\nhydra: {{job_logging: {{version: 1, handlers: {{a: '${{mine}}'}}}}}}"
    ),
    "a file": ("hydra: {job_logging: {version: 1, handlers: {a: {filename: '${oc.env:HOME}/.rc'}}}}"),
    "overrides": f"hydra: {{overrides: {{hydra: ['plugins=[{HERE}]']}}}}",
    "an arm": f"sweep: {{arms: [{{plugins: '[{HERE}]', loss._target_: {HERE}.called}}]}}",
    "a swept key": f"hydra: {{sweeper: {{params: {{plugins: '[{HERE}]'}}}}}}",
    "the environment": "hydra: {job: {env_set: {PATH: .}}}",
}


@pytest.mark.parametrize("content", YAMLS.values(), ids=YAMLS.keys())
def test_a_yaml_does_not_trust_itself(content: str, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "stranger.yaml").write_text(f"# @package _global_\n{content}\n")
    with pytest.raises(UserError, match=r"command line|leave it out|leave out|write out") as refused:
        config.compose([config.further(tmp_path), "recipe=stranger"])
    assert "\n" not in str(refused.value) and not CALLED


@pytest.mark.parametrize(
    ("group", "parent", "setting"),
    [
        ("hydra/launcher", "submitit_slurm", "setup: [echo]"),
        ("hydra/sweeper", "optuna", f"custom_search_space: {HERE}.called"),
    ],
)
def test_a_yaml_hands_no_program_to_a_plug_in_of_hydra(group: str, parent: str, setting: str, tmp_path: Path) -> None:
    (tmp_path / group).mkdir(parents=True)
    (tmp_path / group / "theirs.yaml").write_text(f"defaults: [{parent}, _self_]\n{setting}\n")
    words = [config.further(tmp_path), f"{group}=theirs"]
    with pytest.raises(UserError, match="only the command line may"):
        config.compose(words)
    key, _, value = setting.partition(": ")
    config.compose([*words, f"{group.replace('/', '.')}.{key}={value}"])


@pytest.mark.parametrize("option", ["job_logging=default", "hydra_logging=default", "launcher=submitit_slurm"])
def test_what_hydra_offers_itself_is_trusted(option: str) -> None:
    config.compose([f"hydra/{option}"])


def test_interpolations_may_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "of_mine")
    assert config.compose(["name='run_${run.seed}_${oc.env:MINE}'"]).name == "run_0_of_mine"
    assert config.compose(["name='${none.${hydra.job.num}}'"])._get_node("name")._value() == "${none.${hydra.job.num}}"


def test_what_is_typed_is_trusted(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    content = f"# @package _global_\nplugins: [{HERE}]\nloss: {{_target_: {HERE}.called, _partial_: true}}\n"
    (tmp_path / "recipe" / "mine.yaml").write_text(content)
    cfg = config.compose([config.further(tmp_path), "recipe=mine", f"plugins=[{HERE}]"])
    assert config.locate(cfg.loss._target_, tuple(cfg.plugins)) is called
    with pytest.raises(UserError, match=r"write 'plugins=\[mine\]'"):
        config.compose(["plugins=mine"])


@pytest.mark.parametrize(
    "name", ["nai_xl.engine.gpus.find", "nai_xl.files.shutil", "torch.optim.lr_scheduler.partial", "os.system"]
)
def test_only_what_is_meant_for_configs_is_called(name: str) -> None:
    with pytest.raises(UserError, match=r"'plugins=\["):
        config.locate(name)


def test_options_and_optimizers_are_called() -> None:
    for name in ("nai_xl.diffusion.loss.min_snr", "nai_xl.diffusion.pointwise.mse", "torch.optim.SGD"):
        assert callable(config.locate(name))


def test_plug_ins_of_a_stored_run_are_named_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    OmegaConf.save({"plugins": ["theirs"], "run": {}}, tmp_path / "config.yaml")
    monkeypatch.setattr(sys, "argv", ["sample", str(tmp_path), "a prompt"])
    assert list(config.stored_config(tmp_path).plugins) == []
    assert "add 'plugins=[theirs]'" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["sample", str(tmp_path), "a prompt", "plugins=[theirs]"])
    assert list(config.stored_config(tmp_path).plugins) == ["theirs"]


def test_every_way_to_type_plug_ins() -> None:
    assert typed_plugins(["plugins=[a,b]", "loss=mine", "+plugins=[c]"]) == ("a", "b", "c")
    assert typed_plugins(["plugins=[a],[b,c]"]) == ("a", "b", "c")
    assert typed_plugins(["plugins=a", "plugins="]) == ()
