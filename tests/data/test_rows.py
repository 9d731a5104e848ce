"""Images in an Arrow table, in one piece or several, all of them or some: like a list of Items."""

import hashlib
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nai_xl.data import index as index_module
from nai_xl.data import rows as rows_module
from nai_xl.data.index import Index
from nai_xl.data.rows import SCHEMA, Item, Rows

contents = st.one_of(
    st.binary(min_size=32, max_size=32),
    st.sampled_from([bytes(32), b"\xff" * 32, bytes(31) + b"\x01"]),  # copies, and those that differ at their end
)
captions = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), min_size=1, max_size=3)
items = st.lists(
    st.builds(
        lambda number, content, words, size: Item(
            Path(f"{number}.png"), words[0], size, content.hex(), others=tuple(words[1:])
        ),
        st.integers(0, 99),
        contents,
        captions,
        st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
    ),
    max_size=12,
)


def in_pieces(given: Sequence[Item], cut: int) -> Rows:
    """The same items in a table of two chunks, and without the items themselves."""
    whole = Rows.of(given).table
    return Rows(pa.concat_tables([whole.slice(0, cut), whole.slice(cut)]))


def fingerprint(given: Sequence[Item]) -> str:
    """By the definition."""
    words = sorted(f"{item.content} {chr(30).join(item.captions)}" for item in given)
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:16]


@given(items, st.data())
def test_rows_are_like_a_list_of_items(given: list[Item], data: st.DataObject) -> None:
    rows = in_pieces(given, data.draw(st.integers(0, len(given))))
    chosen = data.draw(st.lists(st.sampled_from(range(len(given))), max_size=12) if given else st.just([]))
    some = rows.take(np.array(chosen, np.int64))
    expected = [given[number] for number in chosen]
    for found, items in ((rows, given), (some, expected), (some[1:-1], expected[1:-1]), (some[::-2], expected[::-2])):
        assert [*found] == items
        assert [found.size(n) for n in range(len(found))] == [item.size for item in items]
        assert found.sizes.tolist() == [[*item.size] for item in items]
        assert [row.tobytes().hex() for row in found.contents] == [item.content for item in items]
        assert [tuple(words) for words in found.column("captions").to_pylist()] == [item.captions for item in items]
        assert [tuple(found.value("captions", -n)) for n in range(1, 1 + len(items))] == [
            item.captions for item in reversed(items)
        ]


@given(items, st.data())
def test_the_order_is_by_content_and_then_by_captions(given: list[Item], data: st.DataObject) -> None:
    rows = in_pieces(given, data.draw(st.integers(0, len(given))))
    found = [*rows.take(rows.order())]
    assert found == sorted(given, key=lambda item: (item.content, chr(30).join(item.captions)))


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
@given(given=items, data=st.data())
def test_the_fingerprint_is_that_of_the_sorted_lines(at_once: int, given: list[Item], data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for module in (rows_module, index_module):
            patch.setattr(module, "AT_ONCE", at_once)
        assert Index(in_pieces(given, data.draw(st.integers(0, len(given))))).fingerprint() == fingerprint(given)
        assert Index(data.draw(st.permutations(given))).fingerprint() == fingerprint(given)


def test_a_mapped_table_is_mapped_again_where_it_is_sent_to(tmp_path: Path) -> None:
    given = [Item(Path(f"{n}.png"), str(n), (n + 1, 2), f"{n:064x}") for n in range(100)]
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        writer.write_table(Rows.of(given).table, max_chunksize=7)
    rows = Rows.mapped(tmp_path / "a.arrow")
    for sent in (rows, rows[10:90:3]):
        written = pickle.dumps(sent)
        assert len(written) < 1000 and [*pickle.loads(written)] == [*sent]  # noqa: S301


def test_numbers_outside_are_refused_as_a_list_does() -> None:
    rows = Rows.of([Item(Path("a.png"), "a", (8, 8), "0" * 64)])
    for number in (1, -2):
        with pytest.raises(IndexError):
            rows[number]
        with pytest.raises(IndexError):
            rows.value("width", number)
