"""What a run is for: which network is trained, on what, by which loss, and what is delivered in the end.

A task is an option. Its constructor is given the config's groups and nodes that its parameters are named after, already
built (config/spec.py), and nothing else of the config. It must refuse, before any weight is read, what cannot be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nai_xl.data.index import Index
from nai_xl.distributed.strategy import Strategy
from nai_xl.engine.assemble import State
from nai_xl.engine.loop import RunSettings
from nai_xl.engine.nonfinite import Sample, Traced
from nai_xl.errors import UserError
from nai_xl.interfaces import Evaluator, Losses, MicroBatch, Stateful, Tracker
from nai_xl.record.run_dir import RunDirectory


class TrainingData(Protocol):
    """What a task has made of an index: all that its batches read."""

    @property
    def index(self) -> Index:
        """The images that are trained on, less those that turned out unusable."""
        ...

    def batches(self, settings: RunSettings, strategy: Strategy, *, start: int) -> DataLoader[Any]:
        """This rank's endless micro-batches from optimizer step `start` on."""
        ...

    def one_of_each_shape(self, size: int) -> Iterable[MicroBatch]:
        """Random micro-batches of `size`, one of every shape that the run will meet."""
        ...

    def described(self) -> Mapping[str, str]:
        """Rows of the table that a run begins with: name -> words."""
        ...

    def figure(self) -> Image.Image | None:
        """A picture of the data, logged at the start; None for none."""
        ...

    def counted(self) -> str:
        """How much of it was cached, in words."""
        ...

    def write(self, run: RunDirectory) -> None:
        """Keep in the run's directory what a run that continues must find again."""
        ...


class Task(Protocol):
    """One option of the group `task`. Every rank calls its methods; `figure` and `deliver` are the first rank's alone.

    The order: refuse, load, prepare, flops, free_groups, stateful, described, remarks, figure, studio, loss at every
    step, deliver. With something to compile, `loss` is called for each shape before `studio`, too. `traced` is asked
    where a loss is not finite. precompute ends after `prepare`.

    timesteps: the length of the axis along which losses are reported in bands; 0 for none. A class may also declare
    headline, the groups whose options name a run's directory; without it they are task and model.
    """

    timesteps: int

    def refuse(self, index: Index) -> None:
        """Raise UserError for an index that lacks what the task or an evaluator needs; no weight has been read."""
        ...

    def load(self, model: Callable[[], Any]) -> nn.Module:
        """Read the model's weights. The network that an adapter makes a Trainable of."""
        ...

    def prepare(self, index: Index, cache: Any, strategy: Strategy, run: RunDirectory) -> TrainingData: ...

    def loss(self, module: nn.Module, batch: Any) -> Losses: ...

    def traced(self, data: TrainingData, sample: Sample, seed: int) -> Traced:
        """Which file a sample of a run with `seed` was made of, its noise level in words, and what is wrong with it."""
        ...

    def free_groups(self, device: torch.device) -> list[dict[str, Any]]:
        """Optimizer groups beside the network's, such as those of a learned weighting, moved to `device`."""
        ...

    def stateful(self) -> Mapping[str, Stateful]:
        """What a checkpoint must hold beside the network, by name."""
        ...

    def flops(self, data: TrainingData) -> Callable[[int, int, int], int] | None:
        """Height, width in pixels and tokens -> FLOPs of training on one image; None where they are not counted."""
        ...

    def studio(self, data: TrainingData, state: State, tracker: Tracker, run: RunDirectory) -> Any:
        """What evaluators see."""
        ...

    def described(self) -> Mapping[str, str]:
        """Rows of the table that a run begins with: name -> words."""
        ...

    def remarks(self) -> Iterable[str]:
        """Sentences that a person should read before training."""
        ...

    def figure(self, choices: Mapping[str, str]) -> Image.Image | None:
        """A picture of the method, logged at the start; None for none. choices: group -> option."""
        ...

    @property
    def delivered(self) -> str:
        """How what was delivered is loaded, in a few words."""
        ...

    def deliver(self, data: TrainingData, weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the finished model into `folder`; weights are the network's whole state. First rank only."""
        ...


def refuse_other_tasks(evaluators: Iterable[Evaluator], task: str, instead: str) -> None:
    """Raise UserError for an evaluator that looks at another task's model. instead: the override that helps."""
    for evaluator in evaluators:
        if evaluator.looks_at != task:
            name = type(evaluator).__name__
            raise UserError(f"evals: {name} looks at task={evaluator.looks_at}, and this is task={task}; set {instead}")
