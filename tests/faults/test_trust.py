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
    "an arm": f"sweep: {{arms: [{{plugins: '[{HERE}]', loss._target_: {HERE}.called}}]}}",
    "a swept key": f"hydra: {{sweeper: {{params: {{plugins: '[{HERE}]'}}}}}}",
    "the environment": "hydra: {job: {env_set: {PATH: .}}}",
}


@pytest.mark.parametrize("content", YAMLS.values(), ids=YAMLS.keys())
def test_a_yaml_does_not_trust_itself(content: str, tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "stranger.yaml").write_text(f"# @package _global_\n{content}\n")
    with pytest.raises(UserError, match=r"command line|leave it out") as refused:
        config.compose([config.further(tmp_path), "recipe=stranger"])
    assert "\n" not in str(refused.value) and not CALLED


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
