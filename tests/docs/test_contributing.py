"""CONTRIBUTING.md's examples, written into a folder of their own, are found, checked and built."""

import importlib
import re
import sys
from pathlib import Path

import pytest

from nai_xl import config
from nai_xl.config.groups import of_several
from nai_xl.config.spec import Spec

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
FILES = dict(re.findall(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
YAMLS = [name for name in FILES if name.endswith(".yaml")]


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The examples' folder, which Python finds; with a table of no images for the data source."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "mine" / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:  # from another test's folder
        monkeypatch.delitem(sys.modules, name)
    return tmp_path / "mine"


def test_there_is_an_example_for_each_kind_of_addition() -> None:
    groups = [name.split("/")[2] for name in YAMLS]
    assert groups == ["loss", "loss", "optimizer", "data", "evals", "hooks", "distributed", "adapter"]
    assert len(FILES) == 2 * len(YAMLS)


@pytest.mark.parametrize("name", YAMLS)
def test_an_example_is_found_checked_and_built(mine: Path, name: str) -> None:
    group, option = Path(name).parent.name, Path(name).stem
    choice = f"{group}=[{option}]" if group in of_several() else f"{group}={option}"
    where = f"hydra.searchpath=['file://{mine / 'conf'}']"
    cfg = config.compose([where, "plugins=[mine]", choice, *(["data.file=list.csv"] if group == "data" else [])])
    config.check(cfg)
    spec = Spec.of(cfg)
    assert getattr(spec, group) if group in of_several() else (group == "loss" or getattr(spec, group) is not None)
    described = re.search(r"^# (.+)$", (mine / "conf" / group / f"{option}.yaml").read_text(), re.MULTILINE)
    assert described and re.match("[A-Za-z0-9]", described[1])
