"""A selection of runs compared, and the look at the sweep recorded."""

from __future__ import annotations

from nai_xl.compare.comparison import Comparison, compare
from nai_xl.compare.judging.verdicts import declared, declared_margins, declared_scopes
from nai_xl.compare.selection import Selection
from nai_xl.errors import UserError
from nai_xl.record.looks import read_looks, write_looks


def answered(selection: Selection, *, recorded: bool) -> Comparison:
    """Compare the arms, `recorded` as a look at their sweep. Raises UserError as `compare` does, and where the record
    cannot be written.
    """
    configs = list(selection.configs.values())
    before = read_looks(selection.folder) if recorded else None
    found = compare(
        selection.runs,
        selection.question,
        declared(configs),
        declared_margins(configs),
        before,
        declared_scopes(configs),
    )
    if before is not None and len(found.looks) > len(before):
        try:
            write_looks(selection.folder, found.looks)
        except OSError as error:
            raise UserError(f"{selection.folder} cannot be written ({error.strerror}); set output_dir=DIR") from error
    return found
