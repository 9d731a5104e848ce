"""What can be added from outside: one function or class and one yaml each, in a folder of the user's own.

Nothing inside the package is touched. CONTRIBUTING.md shows an example of each kind.
"""

import json
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from safetensors.torch import load_file

from nai_xl import config
from nai_xl.config.spec import Spec
from nai_xl.train import train
from tests.conftest import SMALL
from tests.test_train import losses

ADDITIONS = {
    "loss=halved": """
        def halved(level, p, *, factor: float = 0.5):
            return factor * level.snr.clamp(max=1) * p.x0_error_scale(level)
        """,
    "loss=scaled": """
        import torch
        from nai_xl.diffusion.loss import LearnedWeighting

        class Scaled(LearnedWeighting):
            def __init__(self, *, lr: float = 0.1):
                super().__init__()
                self.lr, self.log_scale = lr, torch.nn.Parameter(torch.zeros(()))

            def forward(self, level, p):
                return torch.exp(self.log_scale) * torch.ones_like(level.alpha)

            def penalty(self, level):
                return -self.log_scale * torch.ones_like(level.alpha)

            def parameter_group(self):
                return {"params": [self.log_scale], "lr": self.lr}
        """,
    "optimizer=signs": """
        import torch

        class Signs(torch.optim.Optimizer):
            def __init__(self, params, lr: float = 1e-3):
                super().__init__(params, {"lr": lr})

            @torch.no_grad()
            def step(self, closure=None):
                for group in self.param_groups:
                    for p in group["params"]:
                        p.sub_(p.grad.sign(), alpha=group["lr"])
        """,
    "data=stripes": """
        from dataclasses import dataclass
        from pathlib import Path
        from PIL import Image
        from nai_xl.data.source.folder import scan

        @dataclass(frozen=True)
        class Stripes:
            dir: Path
            count: int = 6

            def scan(self):
                self.dir.mkdir(parents=True, exist_ok=True)
                for number in range(self.count):
                    image = Image.new("RGB", (96, 96), (40 * number, 0, 200))
                    image.save(self.dir / f"{number}.png")
                    (self.dir / f"{number}.txt").write_text(f"stripe {number}")
                return scan(self.dir, min_side=16)
        """,
    "evals=norm": """
        from dataclasses import dataclass
        from typing import ClassVar

        @dataclass
        class Norm:
            every: int = 1
            better: ClassVar = {"norm/": "lower"}
            changes_weights: ClassVar[bool] = False
            looks_at: ClassVar[str] = "text_to_image"

            def texts(self, items):
                return []

            def held_out(self, items):
                return []

            def run(self, step, studio):
                total = sum(average.square().sum() for average in studio.ema.averages().values())
                return {"norm/weights": float(total.sqrt())}
        """,
    "distributed=logged": """
        from nai_xl.distributed.none import SingleProcess
        from nai_xl.distributed.strategy import Engine

        CALLS = []

        class Logged(Engine):
            several = False
            changes_weights = False

            def start(self, precision):
                return LoggedStrategy(SingleProcess().start(precision))

        class LoggedStrategy:
            def __init__(self, inner):
                self.inner = inner

            def __getattr__(self, name):
                found = getattr(self.inner, name)
                if not callable(found) or name == "device":
                    return found

                def called(*args, **kwargs):
                    CALLS.append(name)
                    return found(*args, **kwargs)

                return called
        """,
    "adapter=biases": """
        from nai_xl.adapter.trainable import Trainable

        def biases(module):
            module.requires_grad_(False)
            chosen = {name: p.requires_grad_(True) for name, p in module.named_parameters() if name.endswith(".bias")}
            return Trainable(module, chosen)
        """,
}
YAML = {
    "loss=halved": "_target_: mine.halved\n_partial_: true\nfactor: 0.5\n",
    "loss=scaled": "_target_: mine.Scaled\nlr: 0.1\n",
    "optimizer=signs": "_target_: mine.Signs\n_partial_: true\nlr: ${native.lr}\n",
    "data=stripes": "_target_: mine.Stripes\ndir: ???\n",
    "evals=norm": "norm:\n  _target_: mine.Norm\n  every: 1\n",
    "distributed=logged": "_target_: mine.Logged\n",
    "adapter=biases": "_target_: mine.biases\n_partial_: true\n",
}
Add = Callable[..., DictConfig]


@pytest.fixture
def add(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Writes an addition into a folder of its own; a checked config of three steps that chooses it."""

    def written(choice: str, *overrides: str) -> DictConfig:
        group, option = choice.split("=")
        module = f"mine_{option}"  # Python would remember one that is called the same
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(ADDITIONS[choice]))
        folder = tmp_path / "conf" / group
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{option}.yaml").write_text(YAML[choice].replace("mine.", f"{module}."))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.chdir(tmp_path)
        chosen = f"{group}=[{option}]" if group == "evals" else choice
        replaced = {"data": ("data=",), "evals": ("evals.",)}.get(group, ())
        own = [override for override in SMALL if not (replaced and override.startswith(replaced))]
        data = [f"data.dir={tmp_path / 'stripes'}"] if group == "data" else [f"data.dir={images}"]
        cfg = config.compose(
            [f"hydra.searchpath=['file://{tmp_path / 'conf'}']", *own, *data, chosen, f"plugins=[{module}]",
             "run.max_images=6", *overrides]
        )  # fmt: skip
        config.check(cfg)
        return cfg

    return written


def trained(cfg: DictConfig) -> Path:
    folder = train(cfg, {})
    found = losses(folder)
    assert list(found) == [1, 2, 3] and torch.tensor(list(found.values())).isfinite().all()
    return folder


def newest(folder: Path, part: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step_00000003" / f"{part}.safetensors")


def test_a_weighting(add: Add, small: Callable[..., DictConfig]) -> None:
    own = losses(trained(add("loss=halved")))
    assert own != losses(train(small("run.max_images=6", "loss=uniform"), {}))
    mine = Spec.of(add("loss=halved", "loss.factor=0.25"))
    assert mine.task.objective.weighting.keywords == {"factor": 0.25}  # type: ignore[attr-defined]


def test_a_learned_weighting(add: Add) -> None:
    saved = newest(trained(add("loss=scaled")), "objective")
    assert saved["objective/weighting.log_scale"].item() != 0


def test_an_optimizer(add: Add) -> None:
    cfg = add("optimizer=signs", "optimizer.lr=0.01")
    before = {name: p.detach().clone() for name, p in Spec.of(cfg).model().unet.named_parameters()}
    after = newest(trained(cfg), "unet")
    moved = torch.cat([(after[f"unet/{name}"] - p).flatten() for name, p in before.items()])
    # three steps of 0.01 by the gradient's sign; they may cancel, and a gradient of exactly 0 moves nothing
    steps = (moved.abs() / 0.01).round()
    torch.testing.assert_close(moved.abs(), steps * 0.01, atol=1e-5, rtol=0)
    assert steps.max() == 3 and (steps > 0).float().mean() > 0.5


def test_a_data_source(add: Add) -> None:
    folder = trained(add("data=stripes"))
    assert json.loads((folder / "run.json").read_text())["images"] == 6


def test_an_evaluator(add: Add) -> None:
    folder = trained(add("evals=norm"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    norms = [row["norm/weights"] for row in rows]
    assert len(norms) == 3 and len(set(norms)) == 3 and min(norms) > 0


def test_a_distributed_strategy(add: Add, small: Callable[..., DictConfig]) -> None:
    folder = trained(add("distributed=logged"))
    import mine_logged  # type: ignore[import-not-found]

    assert {"wrap", "accumulating", "backward", "average", "keep", "stateful", "full", "wait", "gather"} <= set(
        mine_logged.CALLS
    )
    assert mine_logged.CALLS.count("backward") == 3
    assert losses(folder) == losses(train(small("run.max_images=6", "name=plain"), {}))


def test_an_adapter(add: Add) -> None:
    """Only biases move, only they are saved and averaged, and the pipeline holds all of the network."""
    cfg = add("adapter=biases", "optimizer.weight_decay=0")
    before = Spec.of(cfg).model().unet.state_dict()
    folder = trained(cfg)
    saved = {name.removeprefix("unet/") for name in newest(folder, "unet")}
    assert saved == {name for name in before if name.endswith(".bias")}
    averages = {name.removeprefix("ema/shadow/"): value for name, value in newest(folder, "ema").items()}
    assert averages.keys() == saved
    exported = load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    assert exported.keys() == before.keys()
    for name, weight in before.items():
        assert torch.equal(exported[name], averages.get(name, weight)), name
    assert any(not torch.equal(exported[name], before[name]) for name in saved)
