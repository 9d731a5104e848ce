"""Adafactor against transformers' on matrices and vectors, and on kernels folded to matrices."""

import pytest
import torch
import transformers
from torch import nn

from nai_xl.optimizer.adafactor import Adafactor


def trained(make: type[torch.optim.Optimizer], shapes: list[tuple[int, ...]], **changes: object) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=random)) for shape in shapes]
    optimizer = make(params, **changes)
    for _ in range(25):
        for p in params:
            g = torch.randn(p.shape, generator=random)
            p.grad = g * torch.linspace(0.01, 3, p.numel()).view(p.shape)  # rows and columns of unequal size
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_it_is_transformers_adafactor_on_matrices_and_vectors(clip: float) -> None:
    shapes = [(12,), (10, 6), (1, 5)]
    ours = trained(Adafactor, shapes, lr=1e-2, clip=clip, weight_decay=0.1)
    theirs = trained(
        transformers.Adafactor, shapes, lr=1e-2, clip_threshold=clip, weight_decay=0.1,
        relative_step=False, scale_parameter=False,
    )  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_a_kernel_is_trained_as_the_matrix_of_its_patches_in_any_layout(format: torch.memory_format) -> None:
    random = torch.Generator().manual_seed(0)
    start = torch.randn(8, 5, 3, 3, generator=random)
    kernel, matrix = nn.Parameter(start.clone().to(memory_format=format)), nn.Parameter(start.flatten(1).clone())
    optimizers = [Adafactor([kernel], lr=1e-2), Adafactor([matrix], lr=1e-2)]
    for _ in range(5):
        g = torch.randn(8, 5, 3, 3, generator=random)
        kernel.grad, matrix.grad = g.to(memory_format=format), g.flatten(1)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach())
    assert [optimizers[0].state[kernel][name].numel() for name in ("row", "column")] == [8, 45]


def test_bfloat16_weights_move_where_the_nearest_would_not() -> None:
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Adafactor([p], lr=1e-4)
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step()
    assert p.double().mean().item() == pytest.approx(0.99, abs=5e-4)
    assert optimizer.state[p]["row"].dtype == torch.float32
