"""Members of tar files, beside Python's own tarfile; and files that are none, in whole or in part."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nai_xl.data.source.tar import Damaged, Member, members

NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=300).filter(
    lambda name: name.strip("/") == name
)
FORMATS = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


def packed(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=kind) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return made.getvalue()


def found(tar: bytes) -> list[Member]:
    return list(members(io.BytesIO(tar), len(tar)))


def sound(tar: bytes) -> tuple[list[Member], str]:
    """The members before the damage, and what it is."""
    kept: list[Member] = []
    try:
        for member in members(io.BytesIO(tar), len(tar)):
            kept.append(member)
    except Damaged as error:
        return kept, str(error)
    return kept, ""


@given(st.dictionaries(NAMES, st.binary(max_size=1200), max_size=6), FORMATS)
def test_names_and_contents_are_those_of_tarfile(files: dict[str, bytes], kind: int) -> None:
    try:
        tar = packed(files, kind)
    except ValueError:  # ustar has no room for long names
        return
    assert [(m.name.decode(), tar[m.offset : m.offset + m.length], m.wrong) for m in found(tar)] == [
        (name, content, "") for name, content in files.items()
    ]


def signed(tar: bytearray, at: int) -> None:
    """Write the checksum of the header there."""
    tar[at + 148 : at + 156] = b" " * 8
    tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])


@settings(max_examples=200)
@given(st.data())
def test_whatever_the_bytes_are_members_lie_within_the_file_and_reading_ends(data: st.DataObject) -> None:
    tar = bytearray(packed({"a.jpg": b"x" * 700, "n/" * 60 + "n": b"y"}, data.draw(FORMATS)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 5)) * 512 + data.draw(
            st.sampled_from([0, 124, 125, 135, 156, 257, 345, 482, 504])
        )
        tar[at] = data.draw(st.integers(0, 255) | st.sampled_from(b"01257LKxgS\x80\xff"))
    for at in range(0, len(tar), 512):
        if tar[at + 257 : at + 262] == b"ustar":
            signed(tar, at)
    del tar[data.draw(st.integers(0, len(tar)) | st.just(len(tar))) :]
    for member in sound(bytes(tar))[0]:
        assert 0 <= member.offset <= member.offset + member.length <= len(tar)


def test_what_is_no_file_says_so_and_what_follows_is_found() -> None:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE),
                           ("c", tarfile.CHRTYPE), ("b", tarfile.BLKTYPE), ("p", tarfile.FIFOTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("s.png")
        info.size, info.pax_headers = 3, {"GNU.sparse.major": "1", "GNU.sparse.name": "s.png"}
        tar.addfile(info, io.BytesIO(b"abc"))
        info = tarfile.TarInfo("x.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    wrong = {member.name: member.wrong for member in found(made.getvalue())}
    assert [wrong[key] for key in (b"d/", b"l", b"h", b"c", b"b", b"p")] == [
        "a folder", "a link", "a link", "a device", "a device", "a pipe",
    ]  # fmt: skip
    assert "sparse" in wrong[b"s.png"] and wrong[b"x.png"] == ""


def test_archives_that_were_strung_together_are_read_to_the_end() -> None:
    one, two = packed({"a": b"1"}), packed({"b": b"2"})
    assert [member.name for member in found(one + two)] == [b"a", b"b"]


def test_a_size_beyond_the_octal_digits_is_read() -> None:
    tar = bytearray(packed({"a": b"x"}, tarfile.GNU_FORMAT))
    tar[124:136] = b"\x80" + (1).to_bytes(11, "big")
    signed(tar, 0)
    assert found(bytes(tar))[0].length == 1


@pytest.mark.parametrize("length", [-1, 1 << 62])
def test_no_length_leads_backwards_or_out_of_the_file(length: int) -> None:
    tar = bytearray(packed({"a": b"x", "b": b"y"}, tarfile.GNU_FORMAT))
    tar[124:136] = (length & ((1 << 96) - 1) | (1 << 95)).to_bytes(12, "big")
    signed(tar, 0)
    kept, damage = sound(bytes(tar))
    assert (
        "negative" in damage
        if length < 0
        else [member.wrong for member in kept] == ["cut off at the end of the tar file"]
    )


def test_a_cut_file_keeps_what_came_before() -> None:
    tar = packed({"a": b"x" * 600, "b": b"y" * 600})
    assert [member.wrong for member in sound(tar[: 512 + 1024 + 512 + 100])[0]] == [
        "",
        "cut off at the end of the tar file",
    ]
    kept, damage = sound(tar[: 512 + 1024 + 100])
    assert [member.name for member in kept] == [b"a"] and "100 bytes" in damage


def test_what_is_no_tar_file_is_damaged_at_its_first_byte() -> None:
    assert sound(b"\x2f\x8b" * 5000) == ([], "no header at byte 0")
    assert "compressed" in sound(b"\x1f\x8b" * 5000)[1]
