"""python benchmarks/peers.py --sd-scripts DIR --diffusers DIR: our training step beside two other trainers' own scripts.

Each trainer runs its own, whole program on the same random-weight SDXL and the same images; benchmarks/peers_launch.py
puts a clock inside. First it is shown that they compute the same losses and gradients. benchmarks/README.md says what is
held equal and what cannot be.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import spread, write
from peers_arms import ARMS, RATE, ROWS, Arm, Setup, diffusers, images, ours, sd_scripts
from peers_inputs import write_images, write_model
from peers_parity import TOLERANCE, passed

HERE = Path(__file__).parent
EDGE = {"tiny": 128, "sdxl": 1024}
WARMUP = 10
PARITY_STEPS = 3
# SDXL's UNet at 1024 x 1024: three times the forward pass, multiply-add = 2, counted; recomputation is no progress
TFLOP_PER_IMAGE = {("sdxl", 1024): 20.28}
PEERS = ("sd-scripts", "diffusers")
Row = dict[str, Any]


class Failed(Exception):
    """A trainer's process ended otherwise than by its clock."""


def main() -> None:
    options = parse()
    work = options.work or Path(tempfile.mkdtemp(prefix="nai_xl_peers_"))
    setup = prepare(options, work)
    try:
        agreement = parity(options, setup)
        rows = [row for name in options.rows.split(",") for row in measure(options, setup, name)]
        name = f"peers_{options.size}_{options.device}_{'fp32' if options.precision == 'no' else options.precision}"
        write(name, told(options), settings(options, setup, agreement), rows)
    except Failed as error:
        sys.exit(f"error: {error}")
    finally:
        if options.work is None:
            shutil.rmtree(work)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="peers.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--sd-scripts", type=Path, required=True, help="a checkout of kohya-ss/sd-scripts")
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of huggingface/diffusers")
    parser.add_argument("--python", default=sys.executable, help="the interpreter that has the peers' requirements")
    parser.add_argument("--size", choices=EDGE, default="tiny")
    parser.add_argument("--steps", type=int, default=30, help=f"measured steps, after {WARMUP} others")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--precision", choices=TOLERANCE, default="no")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", default="matched", help=f"any of {','.join(ROWS)}")
    parser.add_argument("--workers", type=int, default=0, help="of everybody's loader")
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="in the row matched")
    parser.add_argument("--best", default="memory=[sdpa]", help="our overrides in the row best")
    parser.add_argument("--work", type=Path, help="a folder to keep model, images, caches and logs in")
    options = parser.parse_args()
    unknown = set(options.rows.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"--rows: no {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    for folder in (options.sd_scripts / "sdxl_train.py", options.diffusers / "examples/text_to_image"):
        if not folder.exists():
            parser.error(f"{folder} does not exist")
    return options


def prepare(options: argparse.Namespace, work: Path) -> Setup:
    """Write what all arms share, unless an earlier call has left it in --work."""
    work = work.resolve()
    setup = Setup(
        model=work / options.size / "model",
        work=work,
        edge=EDGE[options.size],
        batch=options.batch,
        images=options.batch * (WARMUP + options.steps + 2),
        precision=options.precision,
        workers=options.workers,
        checkpointing=options.checkpointing,
        gpu=options.device == "cuda",
        sd_scripts=options.sd_scripts.resolve(),
        diffusers=options.diffusers.resolve(),
        best=tuple(options.best.split()),
    )
    write_model(options.size, setup.model)
    shutil.rmtree(work / "images", ignore_errors=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    for trainer in ("nai_xl", *PEERS):
        write_images(images(setup, trainer), setup.images, setup.edge)
    return setup


def parity(options: argparse.Namespace, setup: Setup) -> dict[str, dict[str, float]]:
    """The largest relative differences over the first steps, by trainer. Raises Failed when one is too large."""
    worst = {}
    for make in (sd_scripts, diffusers):
        arm = make(setup, "matched")
        captured = run(options, setup, arm, capture=True)
        out = captured.with_suffix(".json")
        arguments = [str(setup.model), str(captured), setup.precision, RATE, str(out)]
        start(setup, ours(setup, "matched"), [sys.executable, str(HERE / "peers_parity.py"), *arguments], out)
        rows = json.loads(out.read_text())
        worst[arm.trainer] = {key: max(row[key] for row in rows) for key in rows[0]}
        said = ", ".join(f"{key} {value:.1e}" for key, value in worst[arm.trainer].items())
        print(f"parity with {arm.trainer} over {len(rows)} steps, relative: {said}", flush=True)
        if not passed(rows, setup.precision):
            raise Failed(f"{arm.trainer} computes something else: limit {TOLERANCE[setup.precision]:.0e}")
    return worst


def measure(options: argparse.Namespace, setup: Setup, row: str) -> list[Row]:
    """One row of the comparison: every arm a process of its own, ours first and last."""
    found: list[Row] = []
    for place, make in enumerate(ARMS):
        arm = make(setup, row)
        first: Row = {"row": row, "trainer": arm.trainer + (" again" if place == len(ARMS) - 1 else "")}
        if arm.skipped:
            if arm.trainer in PEERS:
                found.append(first | {"note": arm.skipped})
            continue
        record = json.loads(run(options, setup, arm, capture=False).read_text())
        found.append(first | figures(options, record))
        print(f"{row}: {first['trainer']}: {found[-1]['images/s']:.2f} images/s", flush=True)
    pace = [r["median s"] for r in found if r["trainer"].startswith("nai_xl")]
    for each in found:
        if "median s" in each:
            each["time / ours"] = each["median s"] / (sum(pace) / len(pace))
    return found


def figures(options: argparse.Namespace, record: dict[str, Any]) -> Row:
    step = spread(record["times"])
    pace = options.batch / step["median"]
    row: Row = {"median s": step["median"], "p10 s": step["p10"], "p90 s": step["p90"], "images/s": pace}
    tflop = TFLOP_PER_IMAGE.get((options.size, EDGE[options.size]))
    if tflop:
        row["TFLOP/s"] = tflop * pace
    if record["peak_memory_gib"] is not None:
        row["peak GiB"] = record["peak_memory_gib"]
    row["start s"] = record["until_first_step"]
    row["versions"] = " ".join(f"{name} {number}" for name, number in record["versions"].items())
    return row


def run(options: argparse.Namespace, setup: Setup, arm: Arm, *, capture: bool) -> Path:
    """Start one trainer and wait for its clock: the path of what it wrote."""
    shutil.rmtree(setup.work / "out" / arm.trainer, ignore_errors=True)
    logs = setup.work / "logs"
    logs.mkdir(exist_ok=True)
    name = f"{arm.trainer}{'-parity' if capture else ''}".replace(" ", "_")
    spec, out = logs / f"{name}.spec.json", logs / f"{name}.out"
    content = {
        "trainer": arm.trainer,
        "script": arm.script,
        "root": str(arm.root),
        "arguments": arm.arguments,
        "fused_adamw": arm.fused_adamw,
        "unet_config": str(setup.model / "unet" / "config.json"),
        "capture": capture,
        "warmup": WARMUP,
        "steps": PARITY_STEPS if capture else options.steps,
        "out": str(out),
    }
    spec.write_text(json.dumps(content), encoding="utf-8")
    python = options.python if arm.trainer in PEERS else sys.executable
    start(setup, arm, [python, str(HERE / "peers_launch.py"), str(spec)], out)
    return out


def start(setup: Setup, arm: Arm, command: Sequence[str], out: Path) -> None:
    """Run a process that writes `out`. Raises Failed with the end of its log when it has not."""
    out.unlink(missing_ok=True)
    log = out.with_name(f"{out.name}.log")
    with log.open("w") as stream:
        subprocess.run(
            command,
            env=environment(setup, arm),
            cwd=setup.work,
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if not out.is_file():
        end = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise Failed(f"{arm.trainer} did not reach its last step:\n{end}")


def environment(setup: Setup, arm: Arm) -> dict[str, str]:
    own = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(setup.work / "hf"),
        "NAI_XL_CACHE": str(setup.work / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": "" if arm.trainer in PEERS else str(HERE.parent),
    }
    if not setup.gpu:
        own["CUDA_VISIBLE_DEVICES"] = ""
    if setup.precision == "bf16":
        own["TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"] = "1"  # for everybody: only one script has a flag for it
    return {**os.environ, **own, **arm.environment}


# --- words ------------------------------------------------------------------------------------------------------------


def told(options: argparse.Namespace) -> str:
    """The command line, without this machine's folders."""
    parts = ["python benchmarks/peers.py --sd-scripts SD_SCRIPTS --diffusers DIFFUSERS"]
    parts += [f"--{name} {getattr(options, name)}" for name in ("size", "steps", "batch", "precision", "device", "rows")]
    parts += [f"--workers {options.workers}", "--checkpointing" if options.checkpointing else "--no-checkpointing"]
    return " ".join([*parts, f'--best "{options.best}"'])


def settings(options: argparse.Namespace, setup: Setup, agreement: dict[str, dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {"warm-up steps": WARMUP, "resolution": setup.edge, "images": setup.images}
    found |= {f"parity with {name}": _said(differences) for name, differences in agreement.items()}
    for make in dict.fromkeys(ARMS):
        arm = make(setup, "matched")
        found[f"{arm.trainer}, matched"] = f"`{_without(setup, arm.arguments)}`"
        if arm.trainer in PEERS:
            digest = hashlib.sha256(Path(arm.script).read_bytes()).hexdigest()[:16]
            found[f"{arm.trainer}'s script"] = f"{Path(arm.script).name} (sha256 {digest}, {_commit(arm.root)})"
    return found


def _said(differences: dict[str, float]) -> str:
    return "relative differences of " + ", ".join(f"{key} {value:.1e}" for key, value in differences.items())


def _without(setup: Setup, arguments: Sequence[str]) -> str:
    return " ".join(arguments).replace(str(setup.work), "WORK")


def _commit(folder: Path) -> str:
    found = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return f"commit {found.stdout.strip()}" if found.returncode == 0 else "no git commit known"


if __name__ == "__main__":
    main()
