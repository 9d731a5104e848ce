"""The check: every option is sound, and mistakes are told by their path before anything is built."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nai_xl import config
from nai_xl.errors import UserError
from tests.config.options import OPTIONS, chosen, composed


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_passes_the_check(group: str, option: str) -> None:
    config.check(composed(*chosen(group, option)))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.fused=maybe"], "optimizer.fused=maybe: input should be a valid boolean"),
        (["optimizer.betas=[a,b]"], "optimizer.betas"),
        (["+optimizer.momentum=1"], "no parameter 'momentum' in AdamW"),
        (["latents.dtype=fp16"], "'fp32' or 'bf16'"),
        (["~run.batch_size"], "run.batch_size is missing"),
        (["schedule.base.beta_strat=1"], "beta_strat"),
        (["+sede=3"], "no setting 'sede'"),
        (["+los.gamma=3"], "no setting 'los'; did you mean 'loss'?"),
    ],
)
def test_mistakes_are_told_by_their_path(overrides: list[str], message: str) -> None:
    from hydra.errors import ConfigCompositionException

    with pytest.raises((UserError, ConfigCompositionException)) as told:
        config.check(config.compose(overrides))
    assert message in str(told.value)


def test_a_part_of_a_config_is_checked_alone() -> None:
    cfg = config.compose(["loss.gamma=x", "optimizer.lr=y"])
    with pytest.raises(UserError) as told:
        config.check(cfg, only=["loss"])
    assert str(told.value).startswith("loss.gamma=x") and "optimizer" not in str(told.value)


def test_a_node_of_a_plug_in_is_no_unknown_setting() -> None:
    cfg = config.compose(["+mine._target_=nai_xl.diffusion.loss.edm", "+mine._partial_=true", "+mine.sigma_data=2"])
    config.check(cfg)
    cfg.mine.sigma_data = "x"
    with pytest.raises(UserError, match=r"mine\.sigma_data=x"):
        config.check(cfg)


def test_a_group_that_the_config_was_composed_of_is_no_unknown_setting() -> None:
    cfg = config.compose(["+mine.x=1"])
    config.check(cfg, choices=["mine"])
    with pytest.raises(UserError, match="no setting 'mine'"):
        config.check(cfg)


BASE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import Annotated
from pydantic import Field

Count = Annotated[int, Field(ge=1)]

@dataclass
class Every:
    every: Count = 1

class Lengthy:
    def __init__(self, *, length: Count = 1, unlike: Count = 1):
        pass
"""
DERIVED = """
from __future__ import annotations
from dataclasses import dataclass
from base_of_mine import Every, Lengthy

Count = str

@dataclass
class Coloured(Every):
    color: Count = "red"

class Same(Lengthy):
    pass

class Other(Lengthy):
    def __init__(self, *, unlike: Count = "a"):
        pass
"""


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("Coloured", {"every": 2, "color": "blue"}, {"every": 0}),  # a field of a base class in another module
        ("Coloured", {"every": 2}, {"every": "often"}),
        ("Same", {"length": 2}, {"length": 0}),  # a parameter of a base class's __init__
        ("Other", {"unlike": "b"}, {"unlike": 3}),  # a parameter that hides the base class's
    ],
)
def test_annotations_are_those_of_the_module_they_were_written_in(
    name: str, right: dict[str, object], wrong: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base_of_mine.py").write_text(BASE)
    (tmp_path / "derived_of_mine.py").write_text(DERIVED)
    monkeypatch.syspath_prepend(tmp_path)
    for values in (right, wrong):
        for module in ("base_of_mine", "derived_of_mine"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        node = {"_target_": f"derived_of_mine.{name}", **values}
        cfg = OmegaConf.create({"plugins": ["derived_of_mine"], "loss": node})
        if values is right:
            config.check(cfg)
        else:
            with pytest.raises(UserError, match=rf"^loss\.{next(iter(wrong))}="):
                config.check(cfg)


def test_a_target_outside_the_trusted_packages_is_not_even_imported() -> None:
    with pytest.raises(UserError, match=r"plugins=\[antigravity\]"):
        config.locate("antigravity.fly")
    assert "antigravity" not in sys.modules
