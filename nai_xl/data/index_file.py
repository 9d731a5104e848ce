"""Index files: Arrow tables in the user's cache directory, made by all processes that want them, mapped by each.

What a source has to read is cut into parts, each an Arrow file of its own that appears whole. A process claims a part
by a lock, which dies with it: a killed scan loses the parts in work and no more, and the next one finds the rest. When
all are there, one process joins them and the others map what it has written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from tqdm import tqdm

from nai_xl.data.rows import ordered
from nai_xl.files import write_atomically

TOGETHER = 1 << 20  # rows that are sorted and written at a time, the most that lie in one piece
KEPT = 4  # files of one place: a run may still be reading what an earlier one has written
STALE = 7 * 86400.0  # seconds after which the parts of a scan that nobody has finished are removed
POLL = 0.2  # seconds

Make = Callable[[], pa.Table]


def write(path: Path, tables: Sequence[pa.Table], notes: Mapping[str, str] | None = None) -> None:
    """The rows of `tables`, which have the same columns, as an index file. They may come in any order.

    notes: what is to be kept with them, as the schema's metadata. Raises OSError.
    """
    whole = pa.concat_tables(tables)
    order = ordered(whole)
    usable = len(whole) - whole["content"].null_count
    schema = whole.schema.with_metadata({"usable": str(usable), **(notes or {})})
    place = np.empty_like(order)
    place[order] = np.arange(len(order))

    def save(aside: Path) -> None:
        with pa.OSFile(str(aside), "wb") as file, pa.ipc.new_file(file, schema) as writer:
            for piece in _pieces(whole, place):
                writer.write_batch(piece)
        total = _sum(aside)
        write_atomically(path.with_suffix(".sum"), lambda note: note.write_text(total))

    write_atomically(path, save)


def _sum(path: Path) -> str:
    """Tells a file from one with any flipped bit or block of zeros, as fast as it can be read."""
    length, total = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            length += len(block)
            total += int(np.frombuffer(block.ljust(-(-len(block) // 8) * 8, b"\0"), np.uint64).sum(dtype=np.uint64))
    return f"{length} {total % 2**64:016x}"


def is_whole(path: Path) -> bool:
    """Whether an index file is there, and as it was written."""
    try:
        return path.with_suffix(".sum").read_text() == _sum(path)
    except OSError:
        return False


def newest(folder: Path) -> Path | None:
    """The index file that was written last in `folder` and is whole."""
    with suppress(OSError):
        for path in sorted(folder.glob("*.arrow"), key=lambda path: -path.stat().st_mtime):
            if is_whole(path):
                return path
    return None


def _pieces(whole: pa.Table, place: NDArray[np.int64]) -> Iterator[pa.RecordBatch]:
    """The rows where `place` says, TOGETHER at a time: never all of them in memory at once."""
    for start in range(0, len(whole), TOGETHER):
        here = (place >= start) & (place < start + TOGETHER)
        some = (whole if here.all() else whole.filter(pa.array(here))).combine_chunks()
        yield from some.take(pa.array(np.argsort(place[here]))).combine_chunks().to_batches()


def mapped(path: Path) -> pa.Table:
    """The table of an index file. Raises OSError, and pyarrow.ArrowInvalid for a file that is none."""
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()


def built(
    file: Path,
    parts: Mapping[str, Make],
    kept: Callable[[], Sequence[pa.Table]] = tuple,
    *,
    notes: Mapping[str, str] | None = None,
    what: str = "reading the images",
    unit: str = "images",
    sizes: Sequence[int] | None = None,
) -> Path:
    """`file`, made where it is not there yet, together with every other process that wants it.

    Its name must tell all that its content depends on: it is never written twice. parts: the name of a part, which must
    tell as much, -> what makes it; sizes: how many images each has, for the progress bar. kept: tables whose rows are
    taken over as they are. Older files of the same folder are removed. Raises OSError.
    """
    if is_whole(file):
        return file
    folder = file.parent / "parts"
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: folder / f"{name}.arrow" for name in parts}
    with bar(what, unit, sizes or [1] * len(parts)) as shown:
        _make_all(parts, made, shown, sizes or [1] * len(parts), enough=file)
    with FileLock(str(file.parent / ".joining.lock")):
        if not is_whole(file):
            write(file, [*kept(), *(mapped(path) for path in made.values())], notes)
            _tidy(file, made.values())
    return file


def _make_all(
    parts: Mapping[str, Make], made: Mapping[str, Path], bar: tqdm[Any], sizes: Sequence[int], *, enough: Path
) -> None:
    """Return when every part is there, or the whole, `enough`, is."""
    left = dict(zip(parts, sizes, strict=True))
    damaged = enough.exists()  # and not whole
    while left and (damaged or not enough.exists()):
        before = len(left)
        for name in list(left):
            if made[name].exists() or _claimed(parts[name], made[name]):
                bar.update(left.pop(name))
        if len(left) == before:
            time.sleep(POLL)  # others are making what is left


def _claimed(make: Make, path: Path) -> bool:
    """Make the part, unless another process is at it."""
    lock = FileLock(str(path.with_suffix(".lock")))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    try:
        if not path.exists():
            table = make()
            write_atomically(path, lambda aside: _save(aside, table))
        return True
    finally:
        lock.release()


def _save(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _tidy(file: Path, made: Iterable[Path]) -> None:
    """Remove the parts that are joined, what was left by scans that nobody has finished, and files that are too old."""
    with suppress(OSError):
        for path in made:
            path.unlink(missing_ok=True)
            path.with_suffix(".lock").unlink(missing_ok=True)
        for path in (file.parent / "parts").iterdir():
            if path.stat().st_mtime < time.time() - STALE:
                path.unlink(missing_ok=True)
        by_age = sorted(file.parent.glob("*.arrow"), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-KEPT]:
            for path in file.parent.glob(f"{old.stem}.*"):
                path.unlink(missing_ok=True)


def bar(what: str, unit: str, sizes: Sequence[int]) -> tqdm[Any]:
    """A progress bar on the first of the processes that a launcher has started; none where all is there."""
    silent = not sizes or os.environ.get("RANK", "0") != "0"
    return tqdm(total=sum(sizes), desc=what, unit=f" {unit}", delay=1, disable=silent)
