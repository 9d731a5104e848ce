"""python benchmarks/judge_trainers.py --sd-scripts DIR --diffusers DIR: do three trainers make equally good models?

Each trains the same small SDXL on the same pictures with the same settings, its own whole program, with several seeds.
Ours does so once more with one setting wrong. Then nai_xl.judge says which are equal and which is worse.
benchmarks/README.md says how the trainers are run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import write
from peers import HERE, start
from peers_arms import Arm, Setup, diffusers, images, ours, sd_scripts
from peers_inputs import HUB_TOKENIZERS, tiny_config
from torch import nn

from nai_xl import config
from nai_xl.data.source.drawing import Kind, Picture, draw_scene
from nai_xl.data.source.stored_png import stored_png
from nai_xl.diffusion.parameterization import Epsilon
from nai_xl.diffusion.schedule import scaled_linear
from nai_xl.judge.arguments import arguments
from nai_xl.judge.trial import Trial
from nai_xl.model.export import save_pipeline
from nai_xl.model.sdxl_random import sdxl_random
from nai_xl.model.tiny import tiny_sdxl
from nai_xl.rng import draws

EDGE, BATCH = 64, 8
PICTURES, NEW = 128, 64  # to train on, and to judge by
FACTOR = 0.13025  # SDXL's, which sd-scripts has as a literal
Row = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A side of the trial: one trainer with one set of settings.

    model: a pattern for the model in its output folder; "" where the folder is the model.
    """

    name: str
    arm: Callable[[Setup, str], Arm]
    settings: Callable[[int, Path], list[str]]  # seed, output folder -> flags after the bench's own
    model: str


def main() -> None:
    options = parse()
    work = (options.work or Path(tempfile.mkdtemp(prefix="nai_xl_judge_"))).resolve()
    setup = prepare(options, work)
    entries = sides(options, setup)
    standins: dict[str, list[str]] = {}
    for seed in range(options.seeds):
        for entry in entries:
            began = time.perf_counter()
            standins[entry.name] = train(options, setup, entry, seed)
            print(f"{entry.name}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
    rows, command = judge(options, setup, entries)
    told = {
        "trained images": options.steps * BATCH,
        "seeds": options.seeds,
        "judged by": command.replace(str(work), "WORK"),
        "scripts": {arm.trainer: fingerprint(arm) for arm in (e.arm(setup, "matched") for e in entries[1:3])},
        "libraries that small stand-ins replaced": {name: sorted(some) for name, some in standins.items() if some},
    }
    write("judge_three_trainers", f"python benchmarks/judge_trainers.py {said(options)}", told, rows)
    if options.work is None:
        shutil.rmtree(work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="judge_trainers.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sd-scripts", type=Path, required=True, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of huggingface/diffusers")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the peers' requirements")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rate", default="1e-3")
    parser.add_argument("--equivalence", default="5%", help="the largest difference in loss that nobody minds")
    parser.add_argument(
        "--work", type=Path, help="a folder to keep models, images and logs in; models there are reused"
    )
    return parser.parse_args()


def said(options: argparse.Namespace) -> str:
    given = " ".join(f"--{name} {getattr(options, name)}" for name in ("steps", "seeds", "rate", "equivalence"))
    return f"--sd-scripts SD_SCRIPTS --diffusers DIFFUSERS {given}"


# --- what all are given -----------------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace, work: Path) -> Setup:
    setup = Setup(
        model=work / "model",
        work=work,
        edge=EDGE,
        batch=BATCH,
        images=BATCH * options.steps,
        precision="no",
        workers=0,
        checkpointing=False,
        gpu=False,
        sd_scripts=options.sd_scripts.resolve(),
        diffusers=options.diffusers.resolve(),
        best=(),
    )
    if not setup.model.is_dir():
        write_model(setup.model)
    for trainer in ("nai_xl", "sd-scripts", "diffusers"):
        write_pictures(images(setup, trainer), range(PICTURES), ["shapes", "colors"])
    # a single colour is the same picture in both parts
    write_pictures(work / "new", range(PICTURES, PICTURES + NEW), ["shapes"])
    (work / "out").mkdir(exist_ok=True)
    return setup


def write_model(folder: Path) -> None:
    """SDXL's build in small: a random UNet, model=tiny's trained autoencoder, text encoders that tell words apart."""
    components = sdxl_random(seed=0, config=tiny_config(folder.parent / "config"))
    components.vae = tiny_sdxl(seed=0).vae
    rescale(components.vae)
    for encoder in components.text_encoders:
        spread_words(encoder)
    mean, std = torch.zeros(4, 1, 1), torch.full((4, 1, 1), 1 / FACTOR)
    weights = components.unet.state_dict()
    save_pipeline(components, weights, scaled_linear(), Epsilon(), mean=mean, std=std, resolution=EDGE, path=folder)
    for name, part in HUB_TOKENIZERS.items():
        shutil.copytree(folder / part, folder.parent / "tokenizers" / name, dirs_exist_ok=True)


@torch.no_grad()
def rescale(vae: Any) -> None:
    """Give the autoencoder SDXL's scaling factor, and no variance: diffusers and sd-scripts draw from its posterior."""
    times = vae.config.scaling_factor / FACTOR
    vae.quant_conv.weight[:4] *= times
    vae.quant_conv.bias[:4] *= times
    vae.quant_conv.weight[4:] = 0
    vae.quant_conv.bias[4:] = -30
    vae.post_quant_conv.weight /= times
    vae.register_to_config(scaling_factor=FACTOR)


@torch.no_grad()
def spread_words(encoder: nn.Module) -> None:
    """Word vectors of unit variance, as trained encoders have; with CLIP's first 0.02 all captions would be alike."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in encoder.named_parameters():
        if name.endswith("token_embedding.weight"):
            parameter.normal_(generator=generator)
        elif parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)


def write_pictures(folder: Path, numbers: range, include: Sequence[Kind]) -> None:
    """Square pictures of data=shapes with captions in .txt files, and in diffusers' metadata.jsonl."""
    if folder.is_dir():  # sd-scripts keeps its latents there
        return
    folder.mkdir(parents=True)
    lines = []
    for number in numbers:
        draw = draws(0, number)
        drawn = Picture(draw_scene(draw, include), EDGE, EDGE, draw)
        name, caption = f"{number:05}.png", drawn.scene.caption
        (folder / name).write_bytes(stored_png(drawn.places(), drawn.palette()))
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
        lines.append(json.dumps({"file_name": name, "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- training ---------------------------------------------------------------------------------------------------------


def sides(options: argparse.Namespace, setup: Setup) -> list[Entry]:
    """The same settings by each trainer's flags: what peers_arms.py says, at this rate, which falls along a cosine."""

    def own(rate: str, seed: int, out: Path) -> list[str]:
        return f"optimizer.lr={rate} lr=cosine lr.warmup=0 run.seed={seed} output_dir={out} name=run".split()

    def theirs(seed: int, out: Path) -> list[str]:
        return f"--learning_rate {options.rate} --lr_scheduler cosine --seed {seed} --output_dir {out}".split()

    def as_one_file(seed: int, out: Path) -> list[str]:
        return [*theirs(seed, out), "--save_model_as", "safetensors"]

    wrong = f"{float(options.rate) * 10:g}"
    return [
        Entry("ours", ours, partial(own, options.rate), "run-*"),
        Entry("diffusers", diffusers, theirs, ""),
        Entry("sd_scripts", sd_scripts, as_one_file, "model.safetensors"),
        Entry("ours_rate_x10", ours, partial(own, wrong), "run-*"),
    ]


def train(options: argparse.Namespace, setup: Setup, entry: Entry, seed: int) -> list[str]:
    """One model, unless it is there already. Returns the libraries that stand-ins replaced."""
    out = folder_of(setup, entry, seed)
    done = out.with_suffix(".json")
    if not done.is_file():
        shutil.rmtree(out, ignore_errors=True)
        arm = entry.arm(setup, "matched")
        spec = {
            "trainer": arm.trainer,
            "script": arm.script,
            "root": str(arm.root),
            "arguments": [*arm.arguments, *entry.settings(seed, out)],
            "fused_adamw": arm.fused_adamw,
            "unet_config": str(setup.model / "unet" / "config.json"),
            "capture": False,
            "warmup": 0,
            "steps": 0,  # no clock
            "out": str(done),
        }
        file = out.with_suffix(".spec.json")
        file.write_text(json.dumps(spec), encoding="utf-8")
        python = sys.executable if arm.trainer == "nai_xl" else options.python
        start(setup, arm, [python, str(HERE / "peers_launch.py"), str(file)], done)
    return list(json.loads(done.read_text())["standins"])


def fingerprint(arm: Arm) -> str:
    return f"{Path(arm.script).name}, sha256 {hashlib.sha256(Path(arm.script).read_bytes()).hexdigest()[:16]}"


def folder_of(setup: Setup, entry: Entry, seed: int) -> Path:
    return setup.work / "out" / f"{entry.name}-{seed}"


# --- judging ----------------------------------------------------------------------------------------------------------


def judge(options: argparse.Namespace, setup: Setup, entries: Sequence[Entry]) -> tuple[list[Row], str]:
    """The verdicts as rows, and the command line that gives them."""
    words = []
    for entry in entries:
        folders = (folder_of(setup, entry, seed) for seed in range(options.seeds))
        paths = [next(folder.glob(entry.model)) if entry.model else folder for folder in folders]
        words.append(f"{entry.name}={','.join(map(str, paths))}")
    words += [
        f"sd_scripts.model.config={setup.model}",
        f"data.dir={setup.work / 'new'}",
        "bucketing=square",
        "evals=[val_loss]",
        "evals.val_loss.timesteps=1",  # beside the log-SNR levels
        f"evals.val_loss.count={NEW}",
        f"equivalence={options.equivalence}",
        f"output_dir={setup.work}",
        "name=trainers",
    ]
    with config.mistakes_told():
        trial = Trial.of(arguments(words, description=""))
        print(*trial.introduced(), sep="\n", flush=True)
        trial.run()
    found = json.loads((setup.work / "judge-trainers" / "results.json").read_text())
    kept = "metric arm verdict mean baseline_mean percent low high p_holm p_equal margin seeds items".split()
    rows = [{**{key: row[key] for key in kept}, "arm": row["arm"].removeprefix("model=")} for row in found["results"]]
    return rows, "python -m nai_xl.judge " + " ".join(words)


if __name__ == "__main__":
    main()
