"""Our writer of safetensors files against the library's reader."""

import zlib
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from nai_xl.data.tensor_file import DTYPES, measured, write_tensors

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


@reads_files
@given(described=TENSORS)
def test_what_is_written_here_is_read_by_the_library_and_measured_as_it_was_told(
    tmp_path: Path, described: dict[str, tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path / "x.safetensors"
    written = {n: random_bytes(dtype, shape, i) for i, (n, (dtype, shape)) in enumerate(described.items())}
    size, crc = write_tensors(path, written)
    assert (size, crc) == (path.stat().st_size, zlib.crc32(path.read_bytes())) == measured(path)
    found = {name: bits(tensor) for name, tensor in load_file(path).items()}
    assert found == {name: bits(tensor) for name, tensor in written.items()}
