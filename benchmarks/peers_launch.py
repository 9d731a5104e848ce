"""Run one trainer's own script with a clock inside: python benchmarks/peers_launch.py SPEC.json, started by peers.py.

Nothing of the project is imported here, since a trainer may live in another environment. What is changed in a script is
all in this file: its clock, no trackers, the sizes of a small model, AdamW's fused kernel where it cannot be asked for,
and names that its libraries have dropped. The loop itself is left as its authors wrote it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import platform
import runpy
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

SDXL_WIDTH = 320
LIBRARIES = ("torch", "torchvision", "accelerate", "diffusers", "transformers", "datasets")
_kept: list[torch.library.Library] = []  # definitions of operators last as long as these


class Clock:
    """Notes the time after every backward pass and ends the process when enough steps are noted.

    Every trainer calls Tensor.backward once a step, so one place fits all: a step is what lies between two of them.
    On a GPU the note is an event in the stream, which waits for nothing; only the window's two ends wait.
    """

    def __init__(self, warmup: int, steps: int, out: Path):
        self.warmup, self.steps, self.out = warmup, steps, out
        self.cuda = torch.cuda.is_available()
        self.begun = time.perf_counter()
        self.marks: list[Any] = []

    def mark(self) -> None:
        last = self.warmup + self.steps
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())
        number = len(self.marks) - 1
        if number in (0, self.warmup, last):
            self._wait()
        if number == 0:
            self.first = time.perf_counter() - self.begun
        if number == self.warmup:
            self.start = time.perf_counter()
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
        if number == last:
            self._finish(time.perf_counter() - self.start)

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _finish(self, window: float) -> None:
        measured = self.marks[self.warmup :]
        between = [
            before.elapsed_time(after) / 1000 if self.cuda else after - before
            for before, after in itertools.pairwise(measured)
        ]
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None
        record = {
            "times": between,
            "window": window,
            "until_first_step": self.first,
            "peak_memory_gib": peak,
            "versions": versions(),
        }
        self.out.write_text(json.dumps(record), encoding="utf-8")
        raise SystemExit  # what comes after is saving


class Capture:
    """Keeps what a script's first steps were given and what came of it, for the same to be computed elsewhere."""

    def __init__(self, steps: int, out: Path):
        self.steps, self.out = steps, out
        self.now: dict[str, Any] = {}
        self.model: nn.Module | None = None
        self.taken: list[dict[str, Tensor]] = []

    def keep(self, **tensors: Tensor) -> None:
        self.now |= {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def after_backward(self, loss: Tensor) -> None:
        assert self.model is not None
        norms = [p.grad.double().norm() for p in self.model.parameters() if p.grad is not None]
        self.keep(loss=loss.double(), grad_norm=torch.stack(norms).norm())
        self.taken.append(self.now)
        self.now = {}
        if len(self.taken) == self.steps:
            torch.save(self.taken, self.out)
            raise SystemExit


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def wrap(owner: Any, name: str, before: Callable[..., None]) -> None:
    """Call `before` with the arguments of every call of owner.name."""
    inner = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before(*args, **kwargs)
        return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


def after_backward(then: Callable[[Tensor], None]) -> None:
    inner = Tensor.backward

    def backward(self: Tensor, *args: Any, **kwargs: Any) -> None:
        inner(self, *args, **kwargs)
        then(self)

    Tensor.backward = backward  # type: ignore[method-assign]


# --- the scripts ------------------------------------------------------------------------------------------------------


def mend_torchvision() -> None:
    """PyPI's torchvision finds no CUDA in a CPU-only torch and then stumbles over the operators that it lacks."""
    if torch.version.cuda is None:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


def mend_transformers() -> None:
    """sd-scripts names CLIPFeatureExtractor in annotations; transformers 5 knows CLIPImageProcessor only."""
    import transformers

    if not hasattr(transformers, "CLIPFeatureExtractor"):
        processor = transformers.CLIPImageProcessor
        # asked for anew: the import above replaces the module
        sys.modules["transformers"].CLIPFeatureExtractor = processor  # type: ignore[attr-defined]


def mend_names() -> None:
    """transformers 5.6 dropped a level of the first text encoder's names, which single files have."""
    util: Any = importlib.import_module("library.sdxl_model_util")
    inner = util.save_stable_diffusion_checkpoint

    def save(file: str, encoder: nn.Module, *more: Any, **further: Any) -> Any:
        named = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in encoder.state_dict().items()}
        return inner(file, SimpleNamespace(state_dict=lambda: named), *more, **further)

    util.save_stable_diffusion_checkpoint = save


def ready_sd_scripts(spec: dict[str, Any], capture: Capture | None) -> None:
    mend_transformers()
    mend_names()
    unet = importlib.import_module("library.sdxl_original_unet")
    config = json.loads(Path(spec["unet_config"]).read_text())
    if config["block_out_channels"][0] != SDXL_WIDTH:
        shrink(unet, config)
    if capture is None:
        return
    util: Any = importlib.import_module("library.sdxl_train_util")

    def forward(self: nn.Module, x: Tensor, t: Tensor, context: Tensor, vector: Tensor) -> None:
        capture.model = self
        capture.keep(noisy=x, context=context, pooled=vector[:, : vector.shape[1] - 6 * 256])

    def sizes(original: Tensor, crop: Tensor, target: Tensor, device: Any) -> None:
        capture.keep(time_ids=torch.cat([original, crop, target], dim=1))

    wrap(unet.SdxlUNet2DConditionModel, "forward", forward)
    wrap(util, "get_size_embeddings", sizes)
    capture_noise(capture)


def shrink(module: Any, config: dict[str, Any]) -> None:
    """Bring sd-scripts' UNet, whose sizes are literals for SDXL, to those of a diffusers config of the same build."""
    widths = config["block_out_channels"]
    module.MODEL_CHANNELS, module.TIME_EMBED_DIM = widths[0], 4 * widths[0]
    module.ADM_IN_CHANNELS = config["projection_class_embeddings_input_dim"]
    module.CONTEXT_DIM = config["cross_attention_dim"]
    sizes = {
        width: {
            "num_attention_heads": heads,
            "attention_head_dim": width // heads,
            "num_transformer_layers": layers,
            "cross_attention_dim": config["cross_attention_dim"],
        }
        for width, heads, layers in zip(
            widths, config["attention_head_dim"], config["transformer_layers_per_block"], strict=True
        )
    }

    class Transformer2DModel(module.Transformer2DModel):
        def __init__(self, **settings: Any):
            super().__init__(**settings | sizes[settings["in_channels"]])

    module.Transformer2DModel = Transformer2DModel


def ready_diffusers(spec: dict[str, Any], capture: Capture | None) -> None:
    if capture is None:
        return
    from diffusers import UNet2DConditionModel

    def forward(self: nn.Module, x: Tensor, t: Tensor, context: Tensor, **more: Any) -> None:
        capture.model = self
        condition = more["added_cond_kwargs"]
        capture.keep(noisy=x, context=context, pooled=condition["text_embeds"], time_ids=condition["time_ids"])

    wrap(UNet2DConditionModel, "forward", forward)
    capture_noise(capture)


def capture_noise(capture: Capture) -> None:
    from diffusers import DDPMScheduler

    def add_noise(self: Any, latents: Tensor, noise: Tensor, timesteps: Tensor) -> None:
        capture.keep(latents=latents, noise=noise, t=timesteps)

    wrap(DDPMScheduler, "add_noise", add_noise)


def fuse_adamw() -> None:
    """diffusers' script has no option for AdamW's fused kernel, which the others use."""
    plain = torch.optim.AdamW

    class AdamW(plain):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **settings: Any):
            super().__init__(*args, **{"fused": True} | settings)

    torch.optim.AdamW = AdamW  # type: ignore[misc]


READY = {"sd-scripts": ready_sd_scripts, "diffusers": ready_diffusers}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    capture = Capture(spec["steps"], Path(spec["out"])) if spec["capture"] else None
    if capture:
        after_backward(capture.after_backward)
    elif spec["steps"]:
        clock = Clock(spec["warmup"], spec["steps"], Path(spec["out"]))
        after_backward(lambda loss: clock.mark())
    Accelerator.init_trackers = lambda *_, **__: None
    replaced: list[str] = []
    if spec["fused_adamw"]:
        fuse_adamw()
    if spec["trainer"] in READY:
        from peers_standins import stand_in  # beside this file; what is missing in the trainer's environment

        replaced = stand_in()
    sys.path[0] = spec["root"]
    sys.argv = [spec["script"], *spec["arguments"]]
    if spec["trainer"] in READY:
        mend_torchvision()
        READY[spec["trainer"]](spec, capture)
    if spec["script"].endswith(".py"):
        runpy.run_path(spec["script"], run_name="__main__")
    else:
        runpy.run_module(spec["script"], run_name="__main__", alter_sys=True)
    if spec["steps"]:
        sys.exit(f"the run ended before {spec['warmup']} + {spec['steps']} steps")
    Path(spec["out"]).write_text(json.dumps({"versions": versions(), "standins": replaced}), encoding="utf-8")


if __name__ == "__main__":
    main()
