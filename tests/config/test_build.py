"""Building: nested nodes first, values coerced, and a target's own refusals told by the key of its node."""

import functools
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nai_xl import config
from nai_xl.diffusion.schedule import TableSchedule
from nai_xl.errors import UserError


def test_nested_nodes_are_built_and_partials_wait_for_their_arguments() -> None:
    cfg = config.compose(["optimizer.lr=3"])
    assert isinstance(config.build(cfg.schedule), TableSchedule)
    assert isinstance(config.build(cfg.optimizer), functools.partial)
    assert config.build(cfg.run).seed == 0


def test_a_path_becomes_a_path() -> None:
    cfg = config.compose(["data=folder", "data.dir=."])
    assert config.build(cfg.data).dir == Path()


PICKY = """
def picky(limit=1, inner=None):
    if limit > 1:
        raise ValueError(f"{limit} is more than\\n 1")
    return limit
"""


@pytest.fixture
def picky(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picky_of_mine.py").write_text(PICKY)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("picky")
@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"loss": {"_target_": "picky_of_mine.picky", "limit": 2}}, "loss"),
        ({"loss": {"_target_": "picky_of_mine.picky", "inner": {"_target_": "picky_of_mine.picky", "limit": 2}}},
         "loss.inner"),
        ({"evals": {"one": {"_target_": "picky_of_mine.picky", "limit": 2}}}, "evals.one"),
    ],
)  # fmt: skip
def test_a_refusal_begins_with_the_key_of_the_node(tree: dict[str, object], key: str) -> None:
    cfg = OmegaConf.create(tree)
    with pytest.raises(UserError) as told:
        config.build(next(iter(cfg.values())), ("picky_of_mine",))
    assert str(told.value) == f"{key}: 2 is more than 1"


@pytest.mark.usefixtures("picky")
def test_a_refusal_of_a_node_that_stands_alone_begins_with_its_target() -> None:
    with pytest.raises(UserError, match=r"^picky: 2 is more than 1$"):
        config.build(OmegaConf.create({"_target_": "picky_of_mine.picky", "limit": 2}), ("picky_of_mine",))
