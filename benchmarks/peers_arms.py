"""How each trainer of peers.py is started: its script and its own flags, for every row of the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROWS = ("matched", "documented", "best")
RATE = "1e-5"


@dataclass(frozen=True)
class Setup:
    """What all arms of one call share."""

    model: Path  # a diffusers folder
    work: Path  # where everything is written
    edge: int  # pixels of the square images
    batch: int
    images: int  # more than all steps see, so that nobody pays for an epoch's end
    precision: str
    workers: int
    checkpointing: bool
    gpu: bool
    sd_scripts: Path
    diffusers: Path
    best: tuple[str, ...]  # our overrides of the row "best"


@dataclass(frozen=True)
class Arm:
    """One process. `skipped` says why it cannot be run here."""

    trainer: str
    script: str
    root: Path
    arguments: list[str]
    fused_adamw: bool = False
    environment: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None


def ours(setup: Setup, row: str) -> Arm:
    """python -m nai_xl.train: SDXL's original method, everything off that the others have not."""
    checkpointing = row == "documented" or (row == "matched" and setup.checkpointing)
    memory = {True: "memory=[sdpa,gradient_checkpointing]", False: "memory=[sdpa]"}[checkpointing]
    arguments = [
        *"schedule=scaled_linear parameterization=epsilon loss=uniform bucketing=square".split(),
        *"ema=none evals=[] tracker=jsonl lr.warmup=0 text.chunks=1".split(),
        *f"model=sdxl model.path={setup.model} data=folder data.dir={images(setup, 'nai_xl')}".split(),
        *f"native.resolution={setup.edge} optimizer.lr={RATE} output_dir={setup.work}/out/nai_xl".split(),
        *f"run.max_images={setup.images} run.batch_size={setup.batch} run.workers={setup.workers}".split(),
        *f"precision={'fp32' if setup.precision == 'no' else setup.precision} run.checkpoint_every=1000000".split(),
        *(setup.best if row == "best" else (memory,)),
    ]
    return Arm("nai_xl", "nai_xl.train", Path(__file__).parents[1], arguments)


def bare(setup: Setup, row: str) -> Arm:
    """The same step with no trainer around it and its batches in memory; what the other arms add is overhead."""
    arguments = [str(setup.model), str(setup.batch), str(setup.edge), setup.precision, str(setup.checkpointing)]
    root = Path(__file__).parent
    skipped = None if row == "matched" else "only for the matched row"
    return Arm("bare loop", str(root / "peers_bare.py"), root, arguments, skipped=skipped)


# https://github.com/kohya-ss/sd-scripts; documented: docs/train_SDXL-en.md, "Tips for SDXL training" and its Adafactor
SD_SCRIPTS = {
    "matched": "--optimizer_type AdamW --optimizer_args fused=True --lr_scheduler constant",
    "documented": "--gradient_checkpointing --optimizer_type Adafactor --optimizer_args scale_parameter=False "
    "relative_step=False warmup_init=False --lr_scheduler constant_with_warmup --lr_warmup_steps 100",
    "best": "--optimizer_type AdamW --optimizer_args fused=True --lr_scheduler constant "
    "--torch_compile --dynamo_backend inductor",
}


def sd_scripts(setup: Setup, row: str) -> Arm:
    flags = [
        *f"--pretrained_model_name_or_path {setup.model} --output_dir {setup.work}/out/sd-scripts".split(),
        *f"--tokenizer_cache_dir {setup.model.parent}/tokenizers --output_name model".split(),
        *f"--dataset_config {dataset_config(setup)}".split(),
        *"--sdpa --cache_latents --cache_latents_to_disk --cache_text_encoder_outputs --no_half_vae --seed 0".split(),
        *f"--mixed_precision {setup.precision} --learning_rate {RATE} --max_grad_norm 1.0".split(),
        *f"--max_train_steps {setup.images // setup.batch} --max_data_loader_n_workers {setup.workers}".split(),
        *SD_SCRIPTS[row].split(),
    ]
    if setup.workers:
        flags.append("--persistent_data_loader_workers")
    if row == "matched" and setup.checkpointing:
        flags.append("--gradient_checkpointing")
    return Arm("sd-scripts", str(setup.sd_scripts / "sdxl_train.py"), setup.sd_scripts, flags)


def dataset_config(setup: Setup) -> Path:
    """sd-scripts' description of the images, in its TOML."""
    file = setup.work / "sd_scripts.toml"
    file.write_text(
        f"[[datasets]]\nresolution = [{setup.edge}, {setup.edge}]\nbatch_size = {setup.batch}\n"
        "enable_bucket = false\n\n[[datasets.subsets]]\nnum_repeats = 1\n"
        f'image_dir = "{images(setup, "sd-scripts")}"\ncaption_extension = ".txt"\n',
        encoding="utf-8",
    )
    return file


# https://github.com/huggingface/diffusers; documented: examples/text_to_image/README_sdxl.md, but xformers, batch and
# resolution
DIFFUSERS = {
    "matched": "",
    "documented": "--gradient_checkpointing --use_8bit_adam --center_crop --random_flip --proportion_empty_prompts 0.2",
    "best": "--allow_tf32",
}


def diffusers(setup: Setup, row: str) -> Arm:
    root = setup.diffusers / "examples" / "text_to_image"
    workers = 0 if row == "documented" else setup.workers
    flags = [
        *f"--pretrained_model_name_or_path {setup.model} --train_data_dir {images(setup, 'diffusers')}".split(),
        *f"--output_dir {setup.work}/out/diffusers --caption_column text --resolution {setup.edge} --seed 0".split(),
        *f"--train_batch_size {setup.batch} --max_train_steps {setup.images // setup.batch}".split(),
        *f"--mixed_precision {setup.precision} --learning_rate {RATE} --max_grad_norm 1.0".split(),
        *f"--lr_scheduler constant --lr_warmup_steps 0 --dataloader_num_workers {workers}".split(),
        *DIFFUSERS[row].split(),
    ]
    if row == "matched" and setup.checkpointing:
        flags.append("--gradient_checkpointing")
    return Arm(
        "diffusers",
        str(root / "train_text_to_image_sdxl.py"),
        root,
        flags,
        fused_adamw=row != "documented",
        environment={"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"} if row == "best" else {},
        skipped="8-bit Adam needs a GPU" if row == "documented" and not setup.gpu else None,
    )


def images(setup: Setup, trainer: str) -> Path:
    """A copy for each trainer: some write their caches beside the images."""
    return setup.work / "images" / trainer


# in the order they are run in: A-B-C-D-A
ARMS: tuple[Callable[[Setup, str], Arm], ...] = (ours, sd_scripts, diffusers, bare, ours)
