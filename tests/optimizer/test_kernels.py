"""The Triton kernels against plain torch: on a GPU if there is one, else in Triton's interpreter if it is installed."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

COMPARE = """
import sys, torch
from torch import nn
from nai_xl.optimizer import multi_tensor
from nai_xl.optimizer.adafactor import Adafactor
from nai_xl.optimizer.adamw8bit import AdamW8bit
from nai_xl.optimizer.adamw_bf16 import AdamWBf16

device = sys.argv[1]
SHAPES = ((5,), (64, 68), (64, 64), (9, 3, 3, 3), (32, 16, 3, 3), (16,))

def trained(make, dtype, kernel):
    multi_tensor.available = lambda p: kernel
    multi_tensor.CHUNK = 1024  # several programs for a tensor; and little to interpret
    random = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=random).to(device, dtype) for shape in SHAPES]
    tensors[4] = tensors[4].to(memory_format=torch.channels_last)
    params = [nn.Parameter(x) for x in tensors]
    optimizer = make(params, lr=1e-3, seed=3, weight_decay=0.1)
    for step in range(3):
        for p in params:
            p.grad = torch.randn(p.shape, generator=random).to(device, dtype)  # not in the kernel's NHWC order
        optimizer.grad_scale = torch.tensor(3.0, device=device)
        optimizer.found_inf = torch.tensor(float(step == 1), device=device)
        optimizer.step()
    return [*map(torch.Tensor.detach, params), *(x for p in params for x in optimizer.state[p].values())]

for make in (AdamWBf16, AdamW8bit, Adafactor):
    for dtype in (torch.bfloat16, torch.float32):
        for a, b in zip(trained(make, dtype, True), trained(make, dtype, False), strict=True):
            assert a.dtype == b.dtype and a.stride() == b.stride()
            if dtype == torch.bfloat16 and device == "cpu":
                assert a.equal(b), (make, a, b)  # bit for bit
            else:  # a division or root may end on another last bit, and tip a rounding or a code
                differing = (a.float() - b.float()).abs() > 1e-6 * b.float().abs() + 1e-7
                assert differing.float().mean() < 1e-3, (make, dtype, differing.float().mean())
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed: CPU build of torch")
def test_kernels_and_plain_torch_are_the_same_optimizer() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = {**os.environ, **({} if device == "cuda" else {"TRITON_INTERPRET": "1"})}
    done = subprocess.run([sys.executable, "-c", COMPARE, device], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_imports_triton_until_a_kernel_is_needed() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; import nai_xl.optimizer.adamw8bit, "
        "nai_xl.optimizer.adafactor as a, torch; p = torch.nn.Parameter(torch.ones(2, 2)); "
        "p.grad = torch.ones(2, 2); a.Adafactor([p]).step()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
