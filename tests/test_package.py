"""What is shipped."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_wheel_holds_conf_and_assets_and_runs_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
        wheel.extractall(tmp_path / "site")
    assets = {f"nai_xl/assets/{name}" for name in ("tiny_vae.safetensors", "tiny_merges.txt", "sdxl/unet/config.json")}
    templates = {"nai_xl/compare/report/page.html.j2"}
    confs = {"nai_xl/conf/train.yaml", "nai_xl/conf/schedule/ztsnr.yaml"}
    assert confs | assets | templates | {"hydra_plugins/nai_xl_sweep/__init__.py"} <= names
    assert "hydra_plugins/__init__.py" not in names  # a namespace, shared with other packages' plug-ins
    # the checkout must not be found by accident: the wheel's own folder is all that is on the path
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    command = [sys.executable, "-m", "nai_xl.train", "--cfg", "job", "loss=uniform"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "nai_xl.diffusion.loss.uniform" in done.stdout, done.stderr


def test_no_file_names_a_place_on_one_machine() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    texts = [ROOT / name for name in tracked if name.endswith((".py", ".yaml", ".md", ".toml"))]
    words = ("/" + "home/", "/" + "root/")
    assert not [path for path in texts if path.exists() and any(word in path.read_text() for word in words)]
