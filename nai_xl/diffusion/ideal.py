"""The ideal denoiser of stationary Gaussian fields, and what samplers make of it, in closed form.

A field x0 [C,h,w] has a constant mean in each channel and a periodic covariance. Its orthonormal Fourier modes are then
independent Gaussians, one variance S(k) each (`spectrum` [h,w], or [C,h,w]; white noise of deviation 1 has S = 1
everywhere). The mean over a channel is the mode k = 0 divided by sqrt(n), n = h w, so its variance is S(0) / n.

For x_t = alpha x0 + sigma n everything is a scalar for each mode. Wiener, Extrapolation, Interpolation and Smoothing of
Stationary Time Series, 1949; Karras et al. 2206.00364, appendix B.3 (the ideal denoiser), eq. 4 (the flow).
All in float64 on the CPU. alpha and sigma may be numbers or tensors that broadcast with the spectrum.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nai_xl.diffusion.sampling import SOLVERS, Estimate, Method, path
from nai_xl.diffusion.schedule import per_sample
from nai_xl.interfaces import NoiseLevel, Schedule


@functools.lru_cache(maxsize=64)
def power_spectrum(height: int, width: int, power: float) -> Tensor:
    """[h,w]: S proportional to |k|^-power, with mean 1, so that a latent value has variance 1.

    |k| is in cycles per canvas edge, the edge being sqrt(h w). At k = 0, where the law diverges, |k| counts as 1: the
    mean varies as much as the longest wave.
    """
    edge = (height * width) ** 0.5
    y = torch.fft.fftfreq(height, dtype=torch.float64)[:, None] * edge
    x = torch.fft.fftfreq(width, dtype=torch.float64)[None, :] * edge
    k = (y.square() + x.square()).sqrt()
    k[0, 0] = 1
    shape = k.pow(-power)
    return shape / shape.mean()


# --- one noise level --------------------------------------------------------------------------------------------------


def gain(spectrum: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """What the ideal denoiser multiplies each mode of x_t - alpha mean by: alpha S / (alpha^2 S + sigma^2)."""
    return alpha * spectrum / (alpha**2 * spectrum + sigma**2)


def unknown(spectrum: Tensor, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """The variance of each mode that x_t leaves open, S sigma^2 / (alpha^2 S + sigma^2).

    Its mean over modes is the smallest possible mean squared error of x0. Divided by S it is 1 / (1 + q), q the SNR of
    the mode; for k = 0, q = n alpha^2 / sigma^2 times the variance of the field's mean.
    """
    return sigma**2 * spectrum / (alpha**2 * spectrum + sigma**2)


@dataclass(frozen=True, eq=False)
class Law:
    """The distribution of a field: mean [C,1,1] and spectrum [C,h,w], float64."""

    mean: Tensor
    spectrum: Tensor

    def normalised(self, mean: Tensor, std: Tensor) -> Law:
        """The law of (x0 - mean) / std; both [C,1,1]."""
        return Law((self.mean - mean) / std, self.spectrum / std.double().square())

    def draw(self, white: Tensor) -> Tensor:
        """A field [C,h,w] float64 out of white noise of that shape."""
        return self.mean + _filtered(self.spectrum.sqrt(), white)

    def denoise(self, xt: Tensor, level: NoiseLevel) -> Tensor:
        """E[x0 | x_t], [B,C,h,w] float64; xt [B,C,h,w], level of [B]. The mean alone at zero SNR."""
        xt = xt.double().cpu()
        alpha, sigma = (per_sample(values.cpu(), xt) for values in (level.alpha, level.sigma))
        return self.mean + _filtered(gain(self.spectrum, alpha, sigma), xt - alpha * self.mean)

    def optimum(self, level: NoiseLevel) -> Tensor:
        """[B] the mean squared error of `denoise` for each latent value."""
        alpha, sigma = (values.double().cpu().view(-1, 1, 1, 1) for values in (level.alpha, level.sigma))
        return unknown(self.spectrum, alpha, sigma).mean((1, 2, 3))


def _filtered(factors: Tensor, field: Tensor) -> Tensor:
    """`field` [...,h,w] with its modes multiplied by real factors that are equal at k and -k."""
    return torch.fft.ifft2(factors * torch.fft.fft2(field.double())).real


# --- a whole sampling run ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Sampled:
    """What comes of pure noise n with the ideal denoiser: each mode of the sample is mean + P (n - alpha mean).

    alpha is that of the first noise level: the denoiser takes the noise for x_t and misses alpha mean in it. So samples
    are Gaussian with variances P^2 and, at k = 0, another mean. factors: P; spectrum: the true S; both [...,h,w].
    """

    factors: Tensor
    spectrum: Tensor
    alpha: float

    @property
    def mean_kept(self) -> Tensor:
        """[...] the mean of the samples' mean over the data's: 1 - alpha P(0)."""
        return 1 - self.alpha * self.factors[..., 0, 0]

    @property
    def variance_kept(self) -> Tensor:
        """P^2 / S for each mode; at [...,0,0] the variance of the samples' mean over the data's."""
        return self.factors.square() / self.spectrum

    def distance(self, mean: float = 0.0) -> float:
        """The squared Wasserstein-2 distance to the data for each latent value; `mean` is the field's, in each channel.

        The modes are independent Gaussians, so it is the mean of (P - sqrt S)^2, and the mean's own error squared.
        """
        modes = (self.factors - self.spectrum.sqrt()).square().mean()
        return float(modes + (mean * (1 - self.mean_kept)).square().mean())


def sampled(spectrum: Tensor, schedule: Schedule, *, steps: int, method: Method = "ddim") -> Sampled:
    """A run of one of the project's samplers from pure noise; `schedule` is the canvas's, spectrum [...,h,w].

    A solver is linear in x and x0, and the ideal x0 is a multiple of x for each mode. So a mode is multiplied by a
    number at each step, and its samples' variance needs no Monte Carlo.
    """
    first, *rest = (replace(at, alpha=at.alpha.double(), sigma=at.sigma.double()) for at in path(schedule, steps))
    x, before, level = torch.ones_like(spectrum), None, first
    for following in rest:
        now = Estimate(gain(spectrum, level.alpha, level.sigma) * x, level)
        x, before, level = SOLVERS[method](x, now, following, before), now, following
    return Sampled(x, spectrum, float(first.alpha))


def flow(spectrum: Tensor, alpha: float, sigma: float) -> Sampled:
    """A run of infinitely many steps from the level (alpha, sigma): P = sqrt(S / (alpha^2 S + sigma^2)).

    The flow keeps each mode's place within its distribution, whose variance is alpha^2 S + sigma^2 at that level. So
    with q as in `unknown` it keeps 1 - sqrt(q / (1 + q)) of the mean, and 1 / (sigma^2 (1 + q)) of its variance.
    """
    return Sampled((spectrum / (alpha**2 * spectrum + sigma**2)).sqrt(), spectrum, alpha)


def sigma_max(variance: float, kept: float) -> float:
    """sigma / alpha from which the flow keeps a share `kept` < 1 of a mode's variance, S = `variance` > 1.

    Solves (1 + s^2) / (S + s^2) = kept. 0 where pure noise at any level would do.
    """
    return max(0.0, (kept * variance - 1) / (1 - kept)) ** 0.5
