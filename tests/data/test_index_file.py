"""Index files: sorted, whole or made anew, and made together by all processes that want them."""

import hashlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nai_xl.data import index_file
from nai_xl.data.index import Index
from nai_xl.data.rows import BETWEEN, SCHEMA, Item, Rows

Image = tuple[bytes | None, list[str]]


def content(number: int) -> bytes:
    """Many share their first bytes."""
    return bytes([number % 3]) * 8 + hashlib.sha256(str(number).encode()).digest()[:24]


def table(images: list[Image]) -> pa.Table:
    columns = [
        [digest for digest, _ in images],
        [10] * len(images),
        [20] * len(images),
        [captions for _, captions in images],
        [b"%d.png" % number for number in range(len(images))],
    ]
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)


CONTENTS = st.one_of(st.none(), st.integers(0, 20).map(content))
IMAGES = st.lists(st.tuples(CONTENTS, st.lists(st.text(max_size=3), min_size=1, max_size=3)))


@given(st.lists(IMAGES, min_size=1, max_size=4), st.integers(1, 5))
def test_rows_lie_by_content_and_captions_and_unusable_ones_come_last(
    tmp_path_factory: pytest.TempPathFactory, parts: list[list[Image]], together: int
) -> None:
    path = tmp_path_factory.mktemp("index") / "a.arrow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_file, "TOGETHER", together)
        index_file.write(path, [table(part) for part in parts], {"why": "a test"})
    usable = [image for part in parts for image in part if image[0] is not None]
    rows = Rows.mapped(path)
    found = [(item.content, BETWEEN.join(item.captions)) for item in rows]
    assert found == sorted((digest.hex(), BETWEEN.join(texts)) for digest, texts in usable if digest)
    assert index_file.is_whole(path) and len(index_file.mapped(path)) == sum(map(len, parts))
    assert index_file.mapped(path).schema.metadata[b"why"] == b"a test"
    assert pickle.loads(pickle.dumps(rows)) == rows  # noqa: S301


@given(IMAGES)
def test_the_fingerprint_is_that_of_earlier_versions(images: list[Image]) -> None:
    usable = [(digest, captions[0]) for digest, captions in images if digest]
    items = [Item(Path(str(n)), text, (1, 1), digest.hex()) for n, (digest, text) in enumerate(usable)]
    lines = sorted(f"{digest.hex()} {text}".encode() for digest, text in usable)
    assert Index(items).fingerprint() == hashlib.sha256(b"\n".join(lines)).hexdigest()[:16]


def test_a_fingerprint_is_kept_for_each_choice_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index_file.write(tmp_path / "a.arrow", [table([(content(n), [str(n)]) for n in range(9)])])
    rows = Rows.mapped(tmp_path / "a.arrow")
    some = rows.take(np.array([1, 4, 5]))
    expected = [Index([*rows]).fingerprint(), Index([*some]).fingerprint()]
    assert [Index(rows).fingerprint(), Index(some).fingerprint()] == expected
    monkeypatch.setattr("nai_xl.data.index._lines", lambda rows: pytest.fail("made again"))
    assert [Index(rows).fingerprint(), Index(some).fingerprint()] == expected


def parts(
    made: list[str], count: int = 6, before: Callable[[str], None] = lambda name: None
) -> dict[str, index_file.Make]:
    def make(number: int) -> pa.Table:
        before(f"p{number}")
        made.append(f"p{number}")
        return table([(content(number), [f"caption {number}"])])

    return {f"p{number}": (lambda number=number: make(number)) for number in range(count)}


def test_all_that_want_an_index_make_it_together_and_each_part_once(tmp_path: Path) -> None:
    made: list[str] = []
    wanted = parts(made, before=lambda name: time.sleep(0.01))
    threads = [threading.Thread(target=lambda: index_file.built(tmp_path / "i.arrow", wanted)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == sorted(wanted)
    assert len(Rows.mapped(tmp_path / "i.arrow")) == 6
    assert not [*(tmp_path / "parts").iterdir()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_what_a_killed_process_has_made_is_found_and_its_claim_is_free(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:  # in the third part, whose lock it holds

        def die(name: str) -> None:
            if name == "p2":
                os.kill(os.getpid(), signal.SIGKILL)

        index_file.built(tmp_path / "i.arrow", parts([], before=die))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "i.arrow").exists()
    made: list[str] = []
    index_file.built(tmp_path / "i.arrow", parts(made))
    assert made == ["p2", "p3", "p4", "p5"]
    undisturbed = index_file.built(tmp_path / "other" / "i.arrow", parts([]))
    assert (tmp_path / "i.arrow").read_bytes() == undisturbed.read_bytes()


def test_files_that_nobody_can_be_reading_are_removed(tmp_path: Path) -> None:
    for number in range(index_file.KEPT + 3):
        path = index_file.built(tmp_path / f"{number}.arrow", parts([], count=number + 1))
        os.utime(path, (number, number))
    left = sorted(path.name for path in tmp_path.glob("*.arrow"))
    assert left == [f"{number}.arrow" for number in range(3, 7)]
    assert {path.stem for path in tmp_path.glob("*.sum")} == {name.partition(".")[0] for name in left}
