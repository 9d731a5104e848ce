"""Our reader of safetensors files against the library's own."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nai_xl.data import tensor_file
from nai_xl.data.tensor_file import DTYPES, is_whole, measured, read_tensors, write_checked, write_tensors

reads_files = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
SHAPES = st.lists(st.integers(0, 5), max_size=4)
TENSORS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES),
    max_size=4,
)


def random_bytes(dtype: torch.dtype, shape: list[int], seed: int) -> Tensor:
    """Any bits, so NaN and infinities too."""
    count = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    drawn = torch.randint(0, high, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return drawn.view(dtype).view(shape)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def told_apart(path: Path) -> dict[str, object] | None:
    """What the library reads, or None for what it refuses."""
    try:
        return {name: bits(tensor) for name, tensor in load_file(path).items()}
    except SafetensorError:
        return None


def sample(path: Path) -> bytes:
    save_file({"a": torch.arange(6, dtype=torch.float32).view(2, 3), "b": torch.ones(3, dtype=torch.int16)}, path)
    return path.read_bytes()


@reads_files
@given(described=TENSORS, metadata=st.booleans())
def test_every_dtype_and_shape_is_read_like_the_library_reads_it(
    tmp_path: Path, described: dict[str, tuple[torch.dtype, list[int]]], metadata: bool
) -> None:
    path = tmp_path / "x.safetensors"
    written = {n: random_bytes(dtype, shape, i) for i, (n, (dtype, shape)) in enumerate(described.items())}
    save_file(written, path, {"made": "here"} if metadata else None)
    found = read_tensors(str(path))
    assert found is not None and is_whole(str(path))
    read = {name: bits(tensor) for name, tensor in found.items()}
    assert read == told_apart(path) == {name: bits(tensor) for name, tensor in written.items()}


@reads_files
@given(described=TENSORS)
def test_what_is_written_here_is_read_like_by_the_library_with_or_without_a_checksum(
    tmp_path: Path, described: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path / "x.safetensors"
    written = {n: random_bytes(dtype, shape, i) for i, (n, (dtype, shape)) in enumerate(described.items())}
    size, crc = write_tensors(path, written)
    expected = {name: bits(tensor) for name, tensor in written.items()}
    assert (size, crc) == (path.stat().st_size, zlib.crc32(path.read_bytes())) == measured(path)
    assert told_apart(path) == expected
    write_checked(path, written)
    found = read_tensors(str(path))
    assert found is not None and is_whole(str(path))
    assert {name: bits(tensor) for name, tensor in found.items()} == told_apart(path) == expected


def test_no_bit_of_a_file_with_a_checksum_can_change_what_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_checked(path, {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int16)})
    whole = path.read_bytes()
    expected = told_apart(path)
    for place in range(8 * len(whole)):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        found = read_tensors(str(path))
        assert found is None or {name: bits(tensor) for name, tensor in found.items()} == expected


def test_headers_of_one_shape_are_parsed_once_although_their_checksums_differ(tmp_path: Path) -> None:
    tensor_file._layout.cache_clear()
    for number in range(5):
        path = tmp_path / f"{number}.safetensors"
        write_checked(path, {"a": torch.full((2, 3), float(number))})
        found = read_tensors(str(path))
        assert found is not None and found["a"][0, 0] == number
    assert tensor_file._layout.cache_info().misses == 1


def test_tensors_may_be_written_to_and_leave_the_file_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    before = sample(path)
    found = read_tensors(str(path))
    assert found is not None
    found["a"].add_(1)
    assert found["b"].tolist() == [1, 1, 1]
    assert path.read_bytes() == before


def test_a_file_cut_at_any_length_or_with_bytes_too_many_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = sample(path)
    for wrong in (*(whole[:length] for length in range(len(whole))), whole + b"\0"):
        path.write_bytes(wrong)
        assert read_tensors(str(path)) is None
        assert not is_whole(str(path))
        assert told_apart(path) is None
    path.write_bytes(whole)
    assert read_tensors(str(path)) is not None


@settings(reads_files, max_examples=300)
@given(place=st.integers(0, 170), value=st.integers(0, 255))
def test_a_file_with_one_wrong_byte_is_refused_exactly_when_the_library_refuses_it(
    tmp_path: Path, place: int, value: int
) -> None:
    path = tmp_path / "x.safetensors"
    data = bytearray(sample(path))
    data[place % len(data)] = value
    path.write_bytes(data)
    found = read_tensors(str(path))
    assert (found and {name: bits(tensor) for name, tensor in found.items()}) == told_apart(path)
    assert is_whole(str(path)) == (found is not None)


@reads_files
@given(st.binary(max_size=300))
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    for content in (data, len(data).to_bytes(8, "little") + data):
        path.write_bytes(content)
        assert read_tensors(str(path)) is None or told_apart(path) == {}
        assert is_whole(str(path)) == (read_tensors(str(path)) is not None)


GOOD = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"a": 3},
        {"a": {**GOOD, "dtype": "F31"}},
        {"a": {**GOOD, "shape": [3]}},
        {"a": {**GOOD, "shape": [-1, -2]}},
        {"a": {**GOOD, "shape": [2.0]}},
        {"a": {**GOOD, "shape": [True, 2]}},
        {"a": {**GOOD, "data_offsets": [0]}},
        {"a": {**GOOD, "data_offsets": [-8, 0]}},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": GOOD, "b": GOOD},
        {"a": {**GOOD, "shape": [1], "data_offsets": [0, 4]}, "b": {**GOOD, "shape": [1], "data_offsets": [0, 4]}},
        {"a": {**GOOD, "shape": [1], "data_offsets": [4, 8]}},
        {"a": {**GOOD, "data_offsets": [8, 16]}},
        {"a": {**GOOD, "dtype": ["F32"]}},
    ],
    ids=str,
)
def test_headers_that_contradict_themselves_are_refused(tmp_path: Path, header: object) -> None:
    path = tmp_path / "x.safetensors"

    def write(header: object) -> None:
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))

    write({"a": GOOD})
    assert read_tensors(str(path)) is not None
    write(header)
    assert read_tensors(str(path)) is None
    assert told_apart(path) is None


def test_a_missing_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    for look in (read_tensors, is_whole):
        with pytest.raises(FileNotFoundError):
            look(str(tmp_path / "none"))
