"""What the loop steps, and that a checkpoint of something else is not taken for it."""

import pytest
import torch
from torch import nn

from nai_xl.distributed.weights import Weights
from nai_xl.errors import UserError


@pytest.mark.parametrize("other", [nn.Linear(3, 2, bias=False), nn.Linear(1, 2), nn.Linear(2, 3)])
def test_weights_of_another_model_are_refused_and_nothing_is_loaded(other: nn.Module) -> None:
    layer = nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    saved = Weights(dict(other.named_parameters())).state_dict()
    with pytest.raises(UserError, match="another model or adapter; set name=NAME to begin a new run"):
        Weights(dict(layer.named_parameters())).load_state_dict(saved)
    assert all(torch.equal(p, before[name]) for name, p in layer.named_parameters())
