"""Volumes from numerators and weights: the masked, regularised least-squares solve and its priors.

Owns: the conjugate-gradient solver shared by the average, the linear stage and class maps made from the data, and
the interface ``Rows`` through which all of them read a data set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opustomo.physics.fourier import band_index, frequencies, irfft3, radial, rfft3, shell_sum
from opustomo.physics.grid import Grid
from opustomo.physics.observation import band_volume, model_band
from opustomo.physics.volume import centre_crop, centre_pad

AMPLITUDE_BLUR = 0.7  # voxels over which local power is averaged: measured (docs/experiments.md)
AMPLITUDE_RANGE = (0.02, 100.0)  # of a^2: nowhere is density impossible


class Rows(Protocol):
    """Numerators and weights in the consensus frame, read by row number (cache or on the fly)."""

    @property
    def moved(self) -> Tensor:
        """(P, 6): how far the rows' poses are from those given: rotation vector (radians), shift (working voxels)."""
        ...

    def __len__(self) -> int: ...

    def numerator(self, index: Tensor) -> Tensor:
        """(b, C, C, C) float32."""
        ...

    def weight(self, index: Tensor) -> Tensor:
        """(b, n) float32 on the band."""
        ...


@dataclass(frozen=True)
class AtGain:
    """Rows that a map explains without a gain: numerators times g, weights times g^2; gain: (P,)."""

    base: Rows
    gain: Tensor

    @property
    def moved(self) -> Tensor:
        """(P, 6), as of ``base``."""
        return self.base.moved

    def __len__(self) -> int:
        return len(self.base)

    def numerator(self, index: Tensor) -> Tensor:
        """(b, C, C, C)."""
        return self.base.numerator(index) * self.gain[index, None, None, None]

    def weight(self, index: Tensor) -> Tensor:
        """(b, n)."""
        return self.base.weight(index) * self.gain[index, None].square()


def batches(index: Tensor, size: int) -> Iterator[Tensor]:
    """Split row numbers into runs of at most ``size``."""
    for start in range(0, len(index), size):
        yield index[start : start + size]


def batch_size(grid: Grid) -> int:
    """Rows per batch such that a batch of numerators and weights stays below about 128 MB."""
    return max(1, min(256, int(32e6 / (grid.crop**3 + grid.working_box**3 / 4))))


def upper(k: int) -> tuple[Tensor, Tensor]:
    """Row and column numbers of the upper triangle of a (k, k) matrix."""
    rows, cols = torch.triu_indices(k, k)
    return rows, cols


def unpack(flat: Tensor, k: int) -> Tensor:
    """(..., k (k + 1) / 2) upper triangles to symmetric (..., k, k)."""
    rows, cols = upper(k)
    full = flat.new_zeros((*flat.shape[:-1], k, k))
    full[..., rows, cols] = flat
    full[..., cols, rows] = flat
    return full


def solve_masked(
    system: Tensor,
    right: Tensor,
    precision: Tensor,
    mask: Tensor,
    grid: Grid,
    start: Tensor,
    iterations: int,
    amplitude: Tensor | None = None,
) -> Tensor:
    """Volumes V = a U, U = mask x, that minimise ``1/2 <V, S V> - <V, right> + 1/2 <U, precision U>``.

    By conjugate gradients.  system: (n, k, k) symmetric matrix S at each band voxel; precision: (k, n), the prior;
    right, start: (k, C, C, C); amplitude: (k, C, C, C) local amplitude a that the prior gives each volume (None: 1).
    Masking makes a cropped right side exact: only its part inside the mask matters.  Beyond the band, where no data
    are, each volume has the precision of its weakest shell: the mask would carry noise there.
    """
    size = grid.working_box
    inside = band_index(size)
    matrix = system + torch.diag_embed(precision.T)
    inverse = torch.linalg.inv(matrix)
    beyond = precision.amax(1)

    def through(kernel: Tensor, outside: Tensor, x: Tensor) -> Tensor:
        spectrum = rfft3(centre_pad(x, size))
        flat = spectrum.flatten(-3)
        mixed = torch.einsum("nab,bn->an", kernel.to(flat.dtype), flat[:, inside])
        flat = flat * outside[:, None]
        flat[:, inside] = mixed
        flat[:, 0] = 0.0  # k = 0 is neither observed nor penalised
        return centre_crop(irfft3(flat.unflatten(-1, spectrum.shape[-3:])), grid.crop)

    def normal(x: Tensor) -> Tensor:
        if amplitude is None:
            return mask * through(matrix, beyond, mask * x)
        prior = through(torch.diag_embed(precision.T), beyond, mask * x)
        return mask * (amplitude * through(system, torch.zeros_like(beyond), amplitude * mask * x) + prior)

    def conditioned(x: Tensor) -> Tensor:
        return mask * through(inverse, 1.0 / beyond, mask * x)

    reach = mask if amplitude is None else mask * amplitude
    x = torch.where(reach > 1e-3, start / reach.clamp(min=1e-3), 0.0)
    return reach * conjugate_gradients(normal, conditioned, reach * right, x, iterations)


def conjugate_gradients(
    normal: Callable[[Tensor], Tensor],
    conditioned: Callable[[Tensor], Tensor],
    right: Tensor,
    x: Tensor | None,
    iterations: int,
) -> Tensor:
    """``normal(x) = right`` solved from x (None: 0); ``conditioned`` is about the inverse of ``normal``."""
    residual, x = (right, torch.zeros_like(right)) if x is None else (right - normal(x), x)
    direction = conditioned(residual)
    rho = (residual * direction).sum()
    tolerance = 1e-8 * right.square().sum()
    for _ in range(iterations):
        image = normal(direction)
        step = rho / (direction * image).sum().clamp(min=1e-30)
        x = x + step * direction
        residual = residual - step * image
        if residual.square().sum() <= tolerance:
            break
        smooth = conditioned(residual)
        rho, previous = (residual * smooth).sum(), rho
        direction = smooth + (rho / previous.clamp(min=1e-30)) * direction
    return x


def wiener(numerator: Tensor, weight: Tensor, size: int, precision: Tensor) -> Tensor:
    """``IFFT[B / (W + precision)]`` without a mask, (C, C, C); weight, precision: (n,) on the band of ``size``."""
    return band_volume(model_band(numerator, size) / (weight + precision), size, numerator.shape[-1])


def shell_power(
    volumes: Tensor, diagonal: Tensor, precision: Tensor, mask: Tensor, grid: Grid, variance: float = 1.0
) -> Tensor:
    """Empirical-Bayes spectrum of masked volumes: shell means of |V|^2 and of the posterior variance.

    volumes: (k, C, C, C); diagonal, precision: (k, n).  A field of unit spectrum keeps the mask's share of its
    power once it is masked, hence the division.  variance: weight of the posterior variance; below 1 the prior is
    tighter than maximum likelihood.  Returns (k, M//2+1).
    """
    size = grid.working_box
    share = float(mask.square().sum()) / size**3
    second = model_band(volumes, size).abs().square() / share + variance / (diagonal + precision)
    return shell_sum(second, size) / shell_sum(torch.ones_like(second[0]), size).clamp(min=1)


def local_amplitude(volumes: Tensor, mask: Tensor, grid: Grid) -> Tensor:
    """Local amplitude ``a`` that the ``volumes`` (k, C, C, C) share, from their local power: (C, C, C).

    In the prior V = a U, U is stationary: it has its spectrum and no preferred place.  ``a`` says where density, or
    change, has been found, so that it is looked for there and noise elsewhere is held back (empirical Bayes in real
    space, as ``shell_power`` is in Fourier space).  The mean of a^2 over the mask is 1; the spectrum has the scale.
    """
    size = grid.working_box
    kernel = torch.exp(-2.0 * (math.pi * AMPLITUDE_BLUR / size) ** 2 * frequencies(size).square().sum(-1))
    both = torch.stack([volumes.square().sum(0), mask.square()])
    power, inside = centre_crop(irfft3(rfft3(centre_pad(both, size)) * kernel), grid.crop)
    square = power / inside.clamp(min=1e-3)  # both blurred, so that the edge of the mask is no loss of power
    mean = (square * mask.square()).sum() / mask.square().sum()
    return (square / mean.clamp(min=1e-30)).clamp(*AMPLITUDE_RANGE).sqrt()


def shell_snr(volumes: Tensor, weight: Tensor, mask: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Signal over noise of masked volumes in each shell, (k, M//2+1), and the number of independent values, (M//2+1,).

    volumes: (k, C, C, C); weight: (n,), W of one particle (or its mean over particles).  ``W |V|^2`` summed over the
    shell of the full transform, over the real values that a volume inside the mask can hold there: the shell's voxels
    times the mask's share of the box (see ``shell_power``).  Half of signal over noise times values, summed over all
    shells, are the nats that V is worth in one particle.
    """
    size = grid.working_box
    share = float(mask.square().sum()) / size**3
    values = shell_sum(torch.ones_like(weight), size) * share
    power = shell_sum(model_band(volumes, size).abs().square() * weight, size)
    return power / values.clamp(min=1e-9), values


def precision_of(power: Tensor, grid: Grid, floor: float) -> Tensor:
    """(k, M//2+1) spectra to (k, n) prior precisions; powers are kept above ``floor``."""
    return torch.stack([1.0 / radial(p.clamp(min=floor), grid.working_box) for p in power])


def mean_volume(
    total_weight: Tensor, total_numerator: Tensor, mask: Tensor, grid: Grid, variance: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Masked average (C, C, C) of summed rows and the spectrum (M//2+1,) of its own prior.

    variance: as in ``shell_power``.
    """
    size = grid.working_box
    system, right = total_weight[:, None, None], total_numerator[None]
    shells = shell_sum(total_weight, size) / shell_sum(torch.ones_like(total_weight), size).clamp(min=1)
    precision = (0.02 * radial(shells, size)).clamp(min=1e-12)[None]
    volume, power = torch.zeros_like(right), shells
    for _ in range(3):
        volume = solve_masked(system, right, precision, mask, grid, volume, 8)
        power = shell_power(volume, total_weight[None], precision, mask, grid, variance)[0]
        precision = own_precision(power, grid)
    return volume[0], power


def own_precision(power: Tensor, grid: Grid) -> Tensor:
    """The prior (1, n) that ``mean_volume`` has found, from its spectrum (M//2+1,)."""
    return precision_of(power[None], grid, 1e-8 * float(power.max()))


def totals(rows: Rows, index: Tensor, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Weighted sums of the rows at ``index``: weight (n,) and numerator (C, C, C).

    weight: (len(index),), or (g, len(index)) for g sums in one pass over the rows, (g, n) and (g, C, C, C).
    """
    summed_w: Tensor | None = None
    summed_b = torch.zeros((*weight.shape[:-1], grid.crop**3))
    position = 0
    for part in batches(index, batch_size(grid)):
        here = weight[..., position : position + len(part)]
        position += len(part)
        w = here @ rows.weight(part)
        summed_w = w if summed_w is None else summed_w + w
        summed_b += here @ rows.numerator(part).flatten(1)
    assert summed_w is not None
    return summed_w, summed_b.unflatten(-1, (grid.crop,) * 3)


def reconstruct(rows: Rows, weight: Tensor, grid: Grid, mask: Tensor) -> Tensor:
    """What the data, not a decoder, say: the masked average (C, C, C) with a weight per particle (P,)."""
    index = torch.nonzero(weight > 1e-6)[:, 0]
    total_weight, total_numerator = totals(rows, index, weight[index].float(), grid)
    return mean_volume(total_weight, total_numerator, mask, grid)[0]
