"""Names as torch.cuda.get_device_name() gives them, and figures that must hang together."""

import pytest

from nai_xl.engine.gpus import GPUS, find


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA GeForce RTX 3090", "rtx3090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA A100-SXM4-40GB", "a100_40"),
        ("NVIDIA A100-PCIE-40GB", "a100_40"),
        ("NVIDIA A100-SXM4-80GB", "a100_80"),
        ("NVIDIA A100 80GB PCIe", "a100_80"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100_pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_a_device_is_found_by_its_name(name: str, key: str) -> None:
    assert find(name) is GPUS[key]


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4070 Ti", "Tesla T4",
     "NVIDIA L40", "NVIDIA GeForce RTX 4090 D", "NVIDIA H200 NVL", "NVIDIA H100 NVL", "NVIDIA GB200",
     "NVIDIA A100-SXM4-40GB MIG 3g.20gb", ""],
)  # fmt: skip
def test_a_namesake_with_other_figures_is_not_taken_for_it(name: str) -> None:
    assert find(name) is None


def test_the_figures_hang_together() -> None:
    for gpu in GPUS.values():
        # FLOPs that a card can do for each byte it reads: every generation since Ampere has had 60 to 420
        assert 60 < gpu.bf16_tflops * 1e3 / gpu.bandwidth_gbs < 420, gpu
        assert gpu.network_gbs <= gpu.interconnect_gbs / 2, gpu
    priced = [gpu.dollars_per_hour for gpu in GPUS.values() if gpu.dollars_per_hour]
    assert priced == sorted(priced), "the table runs from the smallest card to the largest"
