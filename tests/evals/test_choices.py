"""The evaluators as a user chooses them."""

import pytest

from nai_xl import config
from nai_xl.errors import UserError
from nai_xl.interfaces import Evaluator

ALL = ["data=shapes", "evals=[sample_grid,val_loss,color,coherence]"]


def test_all_can_be_chosen_together() -> None:
    cfg = config.compose([*ALL, "evals.coherence.sizes=[1,2]", "evals.color.colors=[black,white]"])
    config.check(cfg)
    built: dict[str, Evaluator] = config.build(cfg.evals)
    assert list(built) == ["sample_grid", "val_loss", "color", "coherence"]
    assert len(built["color"].texts([])) == 2 and len(built["coherence"].texts([])) == 8
    assert config.signature(cfg) == config.signature(config.compose(["data=shapes"]))  # looking changes no weight


@pytest.mark.parametrize(
    ("override", "told"),
    [("evals.color.colors=[mauve]", "no colour mauve"), ("evals.color.sizes=[]", "at least 1"),
     ("evals.sample_grid.count=0", "greater than or equal to 1"), ("evals.sample_grid.every=0", "equal to 1"),
     ("evals.coherence.sizes=[0]", "greater than 0"), ("evals.val_loss.count=0", "greater than or equal to 1"),
     ("data.held_out=1.5", "less than 1"), ("data.include=[circles]", "should be"),
     ("data.resolution=100", "multiple of 16")],
)  # fmt: skip
def test_what_makes_no_sense_is_told_before_anything_is_built(override: str, told: str) -> None:
    with pytest.raises(UserError, match=rf"^{override.split('=')[0]}.*{told}"):
        config.check(config.compose([*ALL, override]))
