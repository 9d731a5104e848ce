"""The pages of options are as conf/ and the code have them, and what the pages name exists."""

import functools
import pydoc
import re
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
from omegaconf import OmegaConf
from pydantic import AfterValidator, Field

from nai_xl.docs import __main__ as command
from nai_xl.docs import pages
from nai_xl.docs.catalogue import Group, Option, catalogue
from nai_xl.docs.checkout import BEGIN, END, stale, write
from nai_xl.docs.hints import hint, in_words
from nai_xl.docs.pages import prose
from nai_xl.errors import UserError
from tests.test_imports import ROOMS

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
GENERATED = ROOT / "docs" / "groups"
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")} - {*GENERATED.glob("*")})
PRESENT = [page for page in PAGES if page.name != "CHANGELOG.md"]  # which names what is no more
LAB_PAGES = sorted(ROOT.glob("experiments/*/README.md"))


@functools.cache
def groups() -> dict[str, Group]:
    return {group.name: group for group in catalogue(CONF)}


def option(group: str, name: str) -> Option:
    return next(option for option in groups()[group].options if option.name == name)


FEW = ("captions", "schedule", "loss")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small checkout with some of the groups, its pages up to date."""
    for group in FEW:
        shutil.copytree(CONF / group, tmp_path / "conf" / group)
    entries = [line for line in (CONF / "train.yaml").read_text().splitlines() if line.startswith("  - ")]
    few = [line for line in entries if line.split()[1].rstrip(":") in FEW]
    (tmp_path / "conf" / "train.yaml").write_text("\n".join(["defaults:", *few]))
    for page in ("README.md", "docs/config.md"):
        (tmp_path / page).parent.mkdir(exist_ok=True)
        (tmp_path / page).write_text(f"before\n{BEGIN}\n{END}\nafter\n")
    write(tmp_path)
    return tmp_path


def test_no_page_is_out_of_date() -> None:
    assert not stale(ROOT), "run make docs, and commit what it writes"


def test_every_option_is_there_once_and_the_default_comes_first() -> None:
    defaults = OmegaConf.load(CONF / "train.yaml").defaults
    chosen = {str(key): value for entry in defaults if not isinstance(entry, str) for key, value in entry.items()}
    for group in groups().values():
        names = [option.name for option in group.options]
        assert sorted(names) == sorted(path.stem for path in (CONF / group.name).glob("*.yaml"))
        default = chosen[group.name]
        wanted = [] if default is None else [default] if isinstance(default, str) else [*default]
        assert names[: len(wanted)] == list(group.defaults) == wanted
    assert {*groups()} == {path.name for path in CONF.iterdir() if path.is_dir()}


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_first_comment_line_says_what_an_option_is(path: Path) -> None:
    text = path.read_text()
    assert re.match(r"(?:# @package \S+\n)?# [A-Za-z0-9]", text), "no description, or one above # @package"
    line = text.removeprefix("# @package _global_\n").splitlines()[0].removeprefix("# ")
    assert 5 < len(line) < 120 and not line.endswith(".")


def test_what_a_page_tells_comes_from_the_yaml_the_signature_and_the_docstring() -> None:
    found = option("loss", "minsnr")
    (call,) = found.calls
    (gamma,) = call.parameters
    assert (gamma.key, gamma.type, gamma.default, gamma.own) == ("loss.gamma", "float", "5.0", "")
    assert call.target.endswith(".min_snr") and call.says.startswith("w = min(SNR, gamma); Hang et al., 2303.09556")
    assert option("loss", "edm").calls[0].sources == {"EDM": "Karras et al. 2206.00364"}
    tenth = {row.key: row for row in option("ema", "every_10").calls[0].parameters}
    assert tenth["ema.every"].default == "10" and tenth["ema.every"].own == "1"
    assert tenth["ema.device"].type == "`cpu`, or null"
    base = option("schedule", "ztsnr").calls[0].parameters[0]
    assert (base.key, base.default) == ("schedule@schedule.base", "scaled_linear")
    assert option("memory", "tf32").calls[0].members["tolerance"] == 5e-3
    model, native = option("model", "sdxl").calls
    assert model.parameters[0].key == "model.path" and model.parameters[0].default == "???"
    assert [row.key for row in native.parameters][:2] == ["native.resolution", "native.bucket_step"]
    assert option("hardware", "cpu").calls == () and "override /precision: fp32" in option("hardware", "cpu").text


def test_a_changed_default_makes_its_page_stale_and_a_new_option_the_tables_too(checkout: Path) -> None:
    assert not stale(checkout)
    loss = checkout / "conf" / "loss"
    (loss / "edm.yaml").write_text((loss / "edm.yaml").read_text().replace("sigma_data: 1.0", "sigma_data: 0.5"))
    assert stale(checkout) == ["docs/groups/loss.md"]
    assert write(checkout) == ["docs/groups/loss.md"] and not stale(checkout)
    assert "| `0.5` (in Python `1.0`) |" in (checkout / "docs" / "groups" / "loss.md").read_text()
    (loss / "sharp.yaml").write_text("# A sharper corner\n_target_: nai_xl.diffusion.loss.min_snr\n_partial_: true\n")
    assert write(checkout) == ["docs/groups/loss.md", "README.md", "docs/config.md"]
    before, table, after = re.split("<!--.*-->", (checkout / "README.md").read_text())
    assert (before, after) == ("before\n", "\nafter\n")
    assert "| [loss](docs/groups/loss.md) |" in table and "**minsnr**, debiased, edm" in table and "sharp" in table
    assert "`+loss.gamma`" in (checkout / "docs" / "groups" / "loss.md").read_text()  # a setting that its yaml lacks


def test_a_choice_is_harmless_where_every_call_of_every_option_says_so() -> None:
    sentence = "The choice does not change the trained weights"
    harmless = {name for name, group in groups().items() if sentence in pages.page(group)}
    assert harmless >= {"cache", "checkpoint", "tracker"}
    assert "model" not in harmless  # its yamls name a network, which counts, and sizes, which do not


def test_a_member_is_a_column_where_an_option_declares_it() -> None:
    with_column = {name for name, group in groups().items() if "`open_ended`" in pages.page(group)}
    assert with_column == {"lr"}


def test_a_page_whose_group_is_gone_goes_too(checkout: Path) -> None:
    shutil.rmtree(checkout / "conf" / "captions")
    train = checkout / "conf" / "train.yaml"
    train.write_text(re.sub(r"  - captions:.*\n", "", train.read_text()))
    assert stale(checkout) == ["docs/groups/captions.md", "README.md", "docs/config.md"]
    write(checkout)
    assert not (checkout / "docs" / "groups" / "captions.md").exists() and not stale(checkout)


@pytest.mark.parametrize(
    ("path", "old", "new", "message"),
    [
        ("loss/edm.yaml", "# ", "", "conf/loss/edm.yaml: begin with a comment line"),
        ("train.yaml", " # the noise levels", "", "say beside '- schedule: ztsnr' what the group decides"),
        ("train.yaml", "  - captions: plain", "  # captions", "has no entry for captions"),
        ("loss/edm.yaml", "sigma_data:", "sigma_date:", "loss.sigma_date: no parameter 'sigma_date' in edm"),
        ("loss/edm.yaml", "loss.edm", "loss.edmm", "loss.edmm cannot be loaded"),
    ],
)
def test_what_is_missing_is_named(checkout: Path, path: str, old: str, new: str, message: str) -> None:
    file = checkout / "conf" / path
    text = file.read_text()
    assert old in text
    file.write_text(re.sub(r"^# .*\n", "", text) if (old, new) == ("# ", "") else text.replace(old, new))
    with pytest.raises(UserError, match=re.escape(message)):
        stale(checkout)


def test_a_page_without_markers_is_refused(checkout: Path) -> None:
    (checkout / "README.md").write_text("# nai_xl")
    with pytest.raises(UserError, match="once each, around its table of options"):
        write(checkout)


def test_check_writes_nothing_names_what_is_stale_and_exits_with_1(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "root", lambda: checkout)
    monkeypatch.setattr(sys, "argv", ["docs", "--check"])
    command.main()
    assert capsys.readouterr().out == ""
    page = checkout / "docs" / "groups" / "loss.md"
    page.write_text("by hand")
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code not in (0, None)  # a message, which is exit status 1
    assert capsys.readouterr().out == "out of date: docs/groups/loss.md\n" and page.read_text() == "by hand"
    monkeypatch.setattr(sys, "argv", ["docs"])
    command.main()
    assert capsys.readouterr().out == "written: docs/groups/loss.md\n" and not stale(checkout)


@pytest.mark.parametrize(
    ("type_", "words"),
    [
        (int, "int"),
        (str, "text"),
        (Path | None, "path, or null"),
        (Annotated[float, Field(ge=0, lt=1)], "float ≥ 0, < 1"),
        (Annotated[int, Field(ge=8, multiple_of=8)], "int ≥ 8, multiple of 8"),
        (Annotated[Path, AfterValidator(Path)], "path"),
        (Literal["all", "ff"], "`all` or `ff`"),
        (Sequence[Annotated[int, Field(ge=1)]] | None, "list of int ≥ 1, or null"),
        (tuple[float, float], "list of 2 float"),
        (float | torch.Tensor, "float"),
        (Any, "any"),
        (None, ""),
    ],
)
def test_types_in_words(type_: Any, words: str) -> None:
    assert in_words(type_) == words


def test_an_annotation_is_looked_up_where_the_base_class_was_written() -> None:
    """Subclasses in another module inherit fields whose annotations that module does not know."""
    elsewhere = type("Elsewhere", (Option,), {"__module__": "sys"})
    assert hint(elsewhere, "Call") is not None and hint(elsewhere, "Call") != "Call"
    assert hint(elsewhere, "NowhereAtAll") == "NowhereAtAll"


def test_prose_is_not_taken_for_markup() -> None:
    assert prose("a * b <x>, x_t, `a * <x>`") == "a \\* b &lt;x>, x_t, `a * <x>`"
    assert prose("Hang, 2303.09556.") == "Hang, [2303.09556](https://arxiv.org/abs/2303.09556)."


def test_the_picture_has_the_rooms_in_the_order_in_which_they_import() -> None:
    picture = runpy.run_path(str(ROOT / "docs" / "draw_rooms.py"))
    needs = picture["imports"]()
    assert {*needs} >= {"train", "config", "diffusion"}
    assert picture["rooms"]() == ROOMS
    assert {*needs} - {*ROOMS} == {*picture["COMMANDS"]}, "a command without words of its own"


@pytest.mark.parametrize("path", [*PAGES, *LAB_PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            aim = path.parent / target if target else path
            assert aim.exists(), link
            headings = re.findall(r"^#+ (.+)$", aim.read_text(), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, link


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_options_that_a_page_names_exist(path: Path) -> None:
    text = path.read_text()
    for name in re.findall(r"(?<!mine/)\b(?:nai_xl|tests|conf|docs|experiments|benchmarks)/[\w/]+\.\w+", text):
        assert (ROOT / name).exists(), name
    for found in re.finditer(r"(?<![\w./-])(\w+)=\[?([\w,]+)", text):
        values = found[2].split(",")
        if text[found.end() : found.end() + 1] in ("=", ".", "("):  # another key, a number, glob(*)
            del values[-1]
        known = {option.name for option in groups()[found[1]].options} if found[1] in groups() else set(values)
        own = re.findall(rf"mine/conf/{found[1]}/(\w+)\.yaml", text)  # of the page's own example
        assert {*values} <= known | {"", "mine", "NAME", "null", "a", "b", *own}, found[0]


@pytest.mark.parametrize("path", PRESENT, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_names_of_the_package_that_a_page_uses_exist(path: Path) -> None:
    for name in re.findall(r"(?<![.\w])nai_xl(?:\.\w+)+", path.read_text()):
        assert pydoc.locate(name) is not None, name


def test_every_fault_is_proved_by_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "faults.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith(("| fault ", "| --"))]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"([\w/]+\.py)::(test_\w+)", row)
        assert named, row
        for file, test in named:
            assert f"def {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
