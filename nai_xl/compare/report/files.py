"""The files of a report."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from nai_xl.compare.comparison import Comparison
from nai_xl.compare.figures.draw import Figures
from nai_xl.compare.report.page import page
from nai_xl.compare.report.results import CSV_COLUMNS, as_json, tidy
from nai_xl.compare.wording import markdown
from nai_xl.errors import UserError
from nai_xl.files import write_atomically


def write(found: Comparison, folder: Path, figures: Figures) -> Sequence[Path]:
    """The report's files, the page first. Raises UserError when `folder` cannot be written."""
    html, table, data = folder / "report.html", folder / "results.csv", folder / "results.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, CSV_COLUMNS)
            writer.writeheader()
            writer.writerows(tidy(found, row) for row in found.rows)
        (folder / "report.md").write_text(markdown(found), encoding="utf-8")
        text = json.dumps(as_json(found), indent=2, default=str, allow_nan=False)
        data.write_text(text + "\n", encoding="utf-8")
        for old in {*folder.glob("*.png")} - {folder / f"{name}.png" for name in figures}:
            old.unlink()  # of an earlier report, when there was more to draw
        for name, (drawn, _) in figures.items():
            (folder / f"{name}.png").write_bytes(drawn.png)
        write_atomically(html, lambda path: path.write_text(page(found, figures), encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}); set output_dir=DIR") from error
    return [html, folder / "report.md", table, data, *(folder / f"{name}.png" for name in figures)]
