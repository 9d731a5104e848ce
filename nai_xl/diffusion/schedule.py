"""Noise schedules: immutable float64 tables of the variance-preserving pair alpha^2 + sigma^2 = 1.

They compose: ztsnr(shifted(scaled_linear(), resolution=1024)). s = sigma / alpha below.

Sources: [SDXL] Podell et al. 2307.01952; [Lin] Common Diffusion Noise Schedules and Sample Steps are Flawed,
2305.08891; [NAI] Improvements to SDXL in NovelAI Diffusion V3, 2409.15997; [SD] Hoogeboom et al. simple diffusion,
2301.11093; [ND] Nichol and Dhariwal 2102.09672.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nai_xl.interfaces import NoiseLevel, Schedule


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B,1,1,1] in the dtype of `like`, so that it multiplies images."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


class Tables(NamedTuple):
    """What `at` looks up, on one device: alpha and sigma [T] float32, log-SNR [T] float64 (-inf at zero SNR)."""

    alpha: Tensor
    sigma: Tensor
    log_snr: Tensor


@dataclass(frozen=True, eq=False)
class TableSchedule:
    """A schedule given by its table abar[t] = alpha_t^2, t = 0..T-1, float64, strictly falling.

    `config` is what a diffusers scheduler must say to have the same table. `of_canvas` makes the table of a canvas
    (height, width in pixels) if it depends on that; `abar` is then the native canvas's.
    """

    abar: Tensor
    config: dict[str, Any]
    of_canvas: Callable[[int, int], TableSchedule] | None = None
    _on_device: dict[torch.device, Tables] = field(default_factory=dict, init=False, repr=False)
    _canvases: dict[tuple[int, int], TableSchedule] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.abar) < 2:
            raise ValueError(f"timesteps={len(self.abar)}: must be at least 2")
        falling = bool((self.abar[1:] < self.abar[:-1]).all())
        if self.abar.dtype != torch.float64 or not falling or not (self.abar[0] < 1 and self.abar[-1] >= 0):
            raise ValueError("alpha^2 must be float64, strictly falling and within [0, 1); change the betas")

    def __len__(self) -> int:
        return len(self.abar)

    @property
    def zero_terminal(self) -> bool:
        return bool(self.abar[-1] == 0)

    @property
    def log_snr(self) -> Tensor:
        """[T] float64 ln(alpha^2 / sigma^2); -inf at zero SNR."""
        return self.abar.logit()

    def for_canvas(self, height: int, width: int) -> TableSchedule:
        """The schedule of a canvas of height x width pixels: itself, unless noise levels depend on resolution."""
        if self.of_canvas is None:
            return self
        if (height, width) not in self._canvases:
            self._canvases[height, width] = self.of_canvas(height, width)
        return self._canvases[height, width]

    def at(self, t: Tensor) -> NoiseLevel:
        """t [B] in 0..T-1 -> the noise level, alpha and sigma [B] float32, on t's device.

        Integer t, or a whole number as float, gives the table's entry. Between entries log-SNR is interpolated
        linearly; before a zero-SNR entry, where it falls to -inf, alpha is. Both are continuous, and log-SNR is finite
        before the last timestep. Float t must be float32 or float64: bfloat16(999) = 1000.
        """
        tables = self._tables(t.device)
        if t.is_floating_point():
            return NoiseLevel(t, *self._between(t.double(), tables), timesteps=len(self))
        return NoiseLevel(t, tables.alpha[t], tables.sigma[t], timesteps=len(self))

    def _between(self, t: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        low, high = t.floor().long(), t.ceil().long()
        part = t - low
        log_snr = tables.log_snr[low].lerp(tables.log_snr[high], part)
        alpha, sigma = log_snr.sigmoid().sqrt(), (-log_snr).sigmoid().sqrt()
        if self.zero_terminal:
            last = high == len(self) - 1
            alpha = torch.where(last, tables.alpha[low].double() * (1 - part), alpha)
            sigma = torch.where(last, (1 - alpha.square()).sqrt(), sigma)
        whole = low == high
        return torch.where(whole, tables.alpha[low], alpha.float()), torch.where(
            whole, tables.sigma[low], sigma.float()
        )

    def _tables(self, device: torch.device) -> Tables:
        # kept per device: a copy at every step would make the host wait for the device
        if device not in self._on_device:
            tables = self.abar.sqrt().float(), (1 - self.abar).sqrt().float(), self.log_snr
            self._on_device[device] = Tables(*(table.to(device) for table in tables))
        return self._on_device[device]

    def add_noise(self, x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
        """x_t = alpha x0 + sigma n, [B,C,h,w]; in float32, since bf16 loses the noise of the first timesteps."""
        x0, noise = x0.float(), noise.float()
        return per_sample(level.alpha, x0) * x0 + per_sample(level.sigma, x0) * noise

    def inference_timesteps(self, steps: int) -> Tensor:
        """`steps` falling int64 timesteps that begin at T-1: "trailing" spacing, [Lin] section 3.3 and table 2."""
        if not 1 <= steps <= len(self):
            raise ValueError(f"steps={steps}: must lie in 1..{len(self)}, the timesteps of the schedule")
        back = torch.arange(steps, dtype=torch.float64) * (len(self) / steps)
        return (len(self) - back).round().long() - 1

    def scheduler_config(self) -> dict[str, Any]:
        """Keyword arguments of a diffusers scheduler with this table, which knows no canvas: see for_canvas."""
        said = {name: list(value) if isinstance(value, tuple) else value for name, value in self.config.items()}
        return {**said, "timestep_spacing": "trailing"}


# --- curves -----------------------------------------------------------------------------------------------------------


def scaled_linear(*, beta_start: float = 0.00085, beta_end: float = 0.012, timesteps: int = 1000) -> Schedule:
    """SDXL's schedule: beta = linspace(sqrt(beta_start), sqrt(beta_end), T)^2, abar = cumprod(1 - beta).

    sigma/alpha runs from 0.0292 to 14.6. Raises ValueError unless 0 < beta_start < beta_end < 1.
    """
    if not 0 < beta_start < beta_end < 1:
        raise ValueError(f"beta_start={beta_start} and beta_end={beta_end}: needs 0 < beta_start < beta_end < 1")
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64).square()
    config = {
        "beta_schedule": "scaled_linear",
        "beta_start": beta_start,
        "beta_end": beta_end,
        "num_train_timesteps": timesteps,
        "rescale_betas_zero_snr": False,
    }
    return TableSchedule((1 - betas).cumprod(0), config)


def cosine(*, timesteps: int = 1000) -> Schedule:
    """[ND] eq. 17: abar(t) = f(t/T) / f(0), f(x) = cos^2((x + 0.008) / 1.008 * pi/2), betas at most 0.999.

    The clipping concerns the last step alone and leaves it at a tiny SNR, 2.4e-9 with T = 1000, but not at 0.
    """
    share = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = ((share + 0.008) / 1.008 * (math.pi / 2)).cos().square()
    betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    config = {
        "beta_schedule": "squaredcos_cap_v2",
        "num_train_timesteps": timesteps,
        "rescale_betas_zero_snr": False,
    }
    return TableSchedule((1 - betas).cumprod(0), config)


# --- changes of a curve -----------------------------------------------------------------------------------------------


def ztsnr(base: Schedule) -> Schedule:
    """`base` at zero terminal SNR, [Lin] algorithm 1: with r = sqrt(abar), r' = (r - r_T) r_1 / (r_1 - r_T).

    Of a base that depends on the canvas, each canvas's table is rescaled.
    """
    table = _table(base, "ztsnr")
    rescaled = _rescaled(table)
    if table.of_canvas is None:
        return rescaled
    return replace(rescaled, of_canvas=lambda height, width: _rescaled(table.for_canvas(height, width)))


def _rescaled(table: TableSchedule) -> TableSchedule:
    root = table.abar.sqrt()
    abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
    # by name only where single precision, in which diffusers subtracts r_T, loses nothing by it
    named = "beta_schedule" in table.config and root[-1] < root[0] / 10
    return TableSchedule(abar, {**table.config, "rescale_betas_zero_snr": True} if named else _explicit(abar))


def high_sigma(base: Schedule, *, sigma_max: float = 29.0) -> Schedule:
    """`base` continued to s = `sigma_max` at the last timestep; [NAI] 2.3 contrasts SDXL's 14.6 with 29.

    ln s' = ln s + ln(sigma_max / s_T) * (ln s / ln s_T)^3 where s > 1, and s' = s where the signal outweighs the noise:
    twice continuously differentiable, rising, exact at both ends. Raises ValueError unless `base` is one table with
    1 < s_T <= sigma_max < infinity.
    """
    table = _table(base, "high_sigma")
    if table.of_canvas is not None:
        raise ValueError("base: high_sigma is for one canvas; put it inside shifted, as shifted's base")
    log_s = -table.log_snr / 2
    last = log_s[-1].exp().item()
    if not 1 < last <= sigma_max < math.inf:
        raise ValueError(
            f"sigma_max={sigma_max}: must be finite and at least {last:.6g}, where base ends, which must itself lie "
            "above 1 and below infinity"
        )
    share = (log_s / log_s[-1]).clamp(min=0)
    raised = log_s + math.log(sigma_max / last) * share**3
    abar = (-2 * raised).sigmoid()
    return TableSchedule(abar, _explicit(abar))


def shifted(base: Schedule, *, resolution: float) -> Schedule:
    """`base` with more noise on larger canvases: s' = k s, log-SNR' = log-SNR - 2 ln k, k = sqrt(H W) / resolution.

    [NAI] 2.3, [SD]. `resolution` is the edge in pixels of the square on which `base` stays what it is. It is an upper
    bound: it takes the image to be redundant over its area.
    """
    if not resolution > 0:
        raise ValueError(f"resolution={resolution}: must be above 0 pixels")
    native = _table(base, "shifted")

    def of_canvas(height: int, width: int) -> TableSchedule:
        table, k_squared = native.for_canvas(height, width), height * width / resolution**2
        if k_squared == 1:
            return table
        abar = table.abar / (table.abar + k_squared * (1 - table.abar))
        return TableSchedule(abar, _explicit(abar))

    return TableSchedule(native.abar, native.config, of_canvas)


def _table(schedule: Schedule, change: str) -> TableSchedule:
    if not isinstance(schedule, TableSchedule):
        raise ValueError(f"base: {change} changes a table; {type(schedule).__name__} has none")
    return schedule


def _explicit(abar: Tensor) -> dict[str, Any]:
    """Of a table that diffusers has no name for: its betas. [Lin]'s rescaling leaves a table alone that ends at 0, and
    asking for it lets diffusers' Euler keep its first step finite."""
    before = torch.cat([abar.new_ones(1), abar[:-1]])
    return {
        "trained_betas": tuple(((before - abar) / before).tolist()),
        "num_train_timesteps": len(abar),
        "rescale_betas_zero_snr": bool(abar[-1] == 0),
    }
