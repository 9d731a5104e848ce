"""Where the pages lie in a checkout, and which of them are out of date."""

from __future__ import annotations

from pathlib import Path

from nai_xl import config
from nai_xl.docs.catalogue import catalogue
from nai_xl.docs.pages import page, summary
from nai_xl.errors import UserError
from nai_xl.files import write_atomically

BEGIN, END = "<!-- options: begin -->", "<!-- options: end -->"
TABLES = {"README.md": "docs/groups", "docs/config.md": "groups"}  # file with a table -> its way to the pages


def root() -> Path:
    """The checkout that this package is run from. Raises UserError where it was installed from a wheel."""
    found = config.conf_dir().parent
    if not (found / "pyproject.toml").exists():
        raise UserError("the pages lie in a checkout: clone the project and pip install --editable it")
    return found


def stale(root: Path) -> list[str]:
    """Names of the generated files of the checkout at `root` that are not as they should be."""
    return [path.relative_to(root).as_posix() for path in _changed(wanted(root))]


def write(root: Path) -> list[str]:
    """Bring every file up to date; the names of those that were not."""
    pages = wanted(root)
    changed = _changed(pages)
    for path in changed:
        _write(path, pages[path])
    return [path.relative_to(root).as_posix() for path in changed]


def wanted(root: Path) -> dict[Path, str | None]:
    """What each generated file should hold; None for a page whose group is gone."""
    groups, folder = catalogue(root / "conf"), root / "docs" / "groups"
    pages: dict[Path, str | None] = dict.fromkeys(sorted(folder.glob("*.md")))
    pages |= {folder / f"{group.name}.md": page(group) for group in groups}
    pages |= {root / name: _with_table(root / name, summary(groups, way)) for name, way in TABLES.items()}
    return pages


def _with_table(path: Path, table: str) -> str:
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise UserError(f"{path} must have the lines {BEGIN} and {END} once each, around its table of options")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}"


def _changed(pages: dict[Path, str | None]) -> list[Path]:
    return [path for path, text in pages.items() if (path.read_text("utf-8") if path.exists() else None) != text]


def _write(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
    else:
        write_atomically(path, lambda aside: aside.write_text(text, encoding="utf-8"))
