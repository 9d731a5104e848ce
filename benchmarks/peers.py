"""python benchmarks/peers.py --sd-scripts DIR --diffusers DIR: our training step beside other trainers' own scripts.

Each trainer runs its own, whole program on the same random-weight SDXL and the same images; peers_launch.py puts a
clock inside. First it is shown that they compute the same losses and gradients. benchmarks/README.md says what is
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

from nai_xl.engine import gpus
from nai_xl.model.flops import skeleton, training_flops

HERE = Path(__file__).parent
EDGE = {"tiny": 128, "sdxl": 1024}
WARMUP = 10
PARITY_STEPS = 3
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
        libraries: dict[str, str] = {}
        rows = [row for name in options.rows.split(",") for row in measure(options, setup, name, libraries)]
        name = f"peers_{options.size}_{options.device}_{'fp32' if options.precision == 'no' else options.precision}"
        name += "_checkpointing" * options.checkpointing
        write(name, told(options), settings(setup, agreement, libraries), rows)
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
    parser.add_argument("--checkpointing", action=argparse.BooleanOptionalAction, default=True, help="row matched only")
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


def measure(options: argparse.Namespace, setup: Setup, row: str, libraries: dict[str, str]) -> list[Row]:
    """One row of the comparison: every arm a process of its own, ours first and last. Notes each one's libraries."""
    found: list[Row] = []
    for place, make in enumerate(ARMS):
        arm = make(setup, row)
        named: Row = {"row": row, "trainer": arm.trainer + (" again" if place == len(ARMS) - 1 else "")}
        if arm.skipped:
            if arm.trainer in PEERS:
                found.append(named | {"note": arm.skipped})
            continue
        try:
            record = json.loads(run(options, setup, arm, capture=False).read_text())
        except Failed as error:
            if row == "matched" or arm.trainer not in PEERS:
                raise
            found.append(named | {"note": str(error).splitlines()[-1]})  # what others advise need not run everywhere
            continue
        libraries[arm.trainer] = " ".join(f"{name} {number}" for name, number in record["versions"].items())
        found.append(named | figures(setup, record))
        print(f"{row}: {named['trainer']}: {found[-1]['images/s']:.2f} images/s", flush=True)
    first, last = found[0]["median s"], found[-1]["median s"]
    for each in found:
        if "median s" in each:
            each["time / ours"] = each["median s"] / ((first + last) / 2)
    noise = abs(first - last) / (first + last)
    print(f"{row}: ours differs from itself by {2 * noise:.1%}: what lies within is noise", flush=True)
    return found


def figures(setup: Setup, record: dict[str, Any]) -> Row:
    """The columns of one process. FLOPs are three forward passes for everybody: recomputation is no progress."""
    step = spread(record["times"])
    pace = setup.batch / step["median"]
    row: Row = {"median s": step["median"], "p10 s": step["p10"], "p90 s": step["p90"], "images/s": pace}
    config = json.loads((setup.model / "unet" / "config.json").read_text())
    row["TFLOP/s"] = pace * training_flops(skeleton(config), setup.edge, setup.edge) / 1e12
    gpu = gpus.find(torch.cuda.get_device_name()) if setup.gpu else None
    if gpu:
        row["MFU %"] = 100 * row["TFLOP/s"] / gpu.bf16_tflops
    if setup.gpu:
        row["peak GiB"] = record["peak_memory_gib"]
    row["first step s"] = record["until_first_step"]
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
    return {**os.environ, **own, **arm.environment}


# --- words ------------------------------------------------------------------------------------------------------------


def told(options: argparse.Namespace) -> str:
    """The command line, without this machine's folders."""
    parts = ["python benchmarks/peers.py --sd-scripts SD_SCRIPTS --diffusers DIFFUSERS"]
    given = "size steps batch precision device rows workers".split()
    parts += [f"--{name} {getattr(options, name)}" for name in given]
    parts += ["--checkpointing" if options.checkpointing else "--no-checkpointing", f'--best "{options.best}"']
    return " ".join(parts)


def settings(setup: Setup, agreement: dict[str, dict[str, float]], libraries: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"warm-up steps": WARMUP, "resolution": setup.edge, "images": setup.images}
    found |= {f"parity with {name}": _said(differences) for name, differences in agreement.items()}
    checkouts = dict(zip(PEERS, (setup.sd_scripts, setup.diffusers), strict=True))
    for make in dict.fromkeys(ARMS):
        arm = make(setup, "matched")
        found[f"{arm.trainer}, matched"] = f"`{_without(setup, arm.arguments)}`"
        if arm.trainer in checkouts:
            digest = hashlib.sha256(Path(arm.script).read_bytes()).hexdigest()[:16]
            where = f"sha256 {digest}, {_commit(checkouts[arm.trainer])}"
            found[f"{arm.trainer}'s script"] = f"{Path(arm.script).name} ({where})"
    return found | {f"{name}'s libraries": numbers for name, numbers in libraries.items()}


def _said(differences: dict[str, float]) -> str:
    return "relative differences of " + ", ".join(f"{key} {value:.1e}" for key, value in differences.items())


def _without(setup: Setup, arguments: Sequence[str]) -> str:
    return " ".join(arguments).replace(str(setup.work), "WORK")


def _commit(checkout: Path) -> str:
    """Of the checkout itself: a repository around it says nothing about it."""
    found = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"],
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(checkout.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    return f"commit {found.stdout.strip()}" if found.returncode == 0 else "no git commit known"


if __name__ == "__main__":
    main()
