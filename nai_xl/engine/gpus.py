"""GPUs that people train SDXL on, by their datasheets: what MFU, `plan` and the profiler divide by.

bf16_tflops is the peak of dense bf16 tensor-core products that accumulate in float32, as torch's do: GeForce cards do
these at half the rate that they are advertised with, and every figure with sparsity is halved here.
memory_gib is what torch.cuda finds on the card (total_memory): less than the box says, where ECC or the driver take
some. interconnect_gbs sums both directions, as datasheets do: NVLink, else PCIe x16.
dollars_per_hour is the lowest list price of one GPU at RunPod, March 2026 (deploybase.ai/articles/runpod-gpu-pricing);
None where the list has none. Prices move: `plan --dollars-per-hour` takes yours.

Sources: NVIDIA's architecture whitepapers of the GA102, the AD102 and the RTX Blackwell (GeForce cards); datasheets of
the A100, L40S, H100, H200 and HGX B200.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class Gpu:
    """One model of graphics card. GB/s and TFLOP/s are decimal, memory is in GiB."""

    name: str
    memory_gib: float
    bf16_tflops: float
    bandwidth_gbs: float
    interconnect_gbs: float
    network_gbs: float  # per GPU between machines, one direction: 400 Gbit/s where clouds build clusters, else 100 by 8
    dollars_per_hour: float | None


GPUS: dict[str, Gpu] = {
    "rtx3060": Gpu("RTX 3060", 11.7, 25.5, 360, 32, 1.5, None),
    "rtx4070": Gpu("RTX 4070", 11.6, 58.3, 504, 64, 1.5, None),
    "rtx4080": Gpu("RTX 4080", 15.6, 97.5, 717, 64, 1.5, None),
    "rtx3090": Gpu("RTX 3090", 23.6, 71, 936, 64, 1.5, 0.22),
    "rtx4090": Gpu("RTX 4090", 23.6, 165.2, 1008, 64, 1.5, 0.34),
    "rtx5090": Gpu("RTX 5090", 31.3, 209.5, 1792, 128, 1.5, 0.69),
    "l40s": Gpu("L40S", 44.4, 362, 864, 64, 12.5, 0.79),
    "a100_40": Gpu("A100 40 GB", 39.4, 312, 1555, 600, 25, None),
    "a100_80": Gpu("A100 80 GB", 79.1, 312, 2039, 600, 25, 1.39),
    "h100_pcie": Gpu("H100 PCIe", 79.1, 756, 2000, 128, 50, 1.99),
    "h100": Gpu("H100 SXM", 79.1, 989, 3350, 900, 50, 2.69),
    "h200": Gpu("H200", 139.7, 989, 4800, 900, 50, 3.59),
    "b200": Gpu("B200", 178.3, 2250, 8000, 1800, 50, 5.98),
}
"""By the key that `plan --gpu` takes, from the smallest."""

_NAMES = (
    (r"RTX 3060(?! Ti)", "rtx3060"),
    (r"RTX 4070(?! (Ti|SUPER))", "rtx4070"),
    (r"RTX 4080(?! SUPER)", "rtx4080"),
    (r"RTX 3090(?! Ti)", "rtx3090"),
    (r"RTX 4090(?! D)", "rtx4090"),
    (r"RTX 5090(?! D)", "rtx5090"),
    (r"L40S", "l40s"),
    (r"A100.*40GB", "a100_40"),
    (r"A100.*80GB", "a100_80"),
    (r"H100 PCIe", "h100_pcie"),
    (r"H100( 80GB HBM3)?$", "h100"),
    (r"H200$", "h200"),
    (r"B200$", "b200"),
)


def find(device_name: str) -> Gpu | None:
    """The card that torch.cuda.get_device_name() calls so; None for one that is not in the table, its laptop and other
    namesakes among them.
    """
    if re.search(r"Laptop|Max-Q|MIG", device_name):
        return None
    return next((GPUS[key] for pattern, key in _NAMES if re.search(rf"\b{pattern}", device_name)), None)
