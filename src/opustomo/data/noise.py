"""The noise model of a data set: how much a Fourier voxel is worth, the contrast sign and the normalisation.

Owns: METHOD section 3's ``s`` and ``r``, estimated from a sample of the particles, and the check that nats are counted
right (``probe_ratio``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from opustomo.data.observe import (
    Noise,
    is_covered,
    observe_all,
    read_band,
    sample_rows,
    sound,
    tilt_rows,
    transfer_band,
)
from opustomo.data.particles import Particles
from opustomo.data.stacks import read_stack, stack_power
from opustomo.physics.fourier import (
    band_frequencies,
    band_multiplicity,
    both_halves,
    from_band,
    irfft3,
    radial,
    rfft3,
    shell_mean,
    shell_sum,
    to_band,
)
from opustomo.physics.grid import Grid
from opustomo.physics.observation import MIN_COVERAGE, insert_tilts, model_band
from opustomo.physics.volume import centre_crop, centre_pad, centred_coordinates

SAMPLE = 192  # particles looked at
# a shell is never taken to be free of noise: one that holds almost no power would get an enormous weight
MOST_EXPLAINED = 0.95
LEAST_NOISE = 1e-6  # of the largest noise power
CONTRAST_DEVIATIONS = 4.0
RADIAL_BANDS = 5  # of the calibration of transfer volumes


def _prefers_mean(particles: Particles, rows: Iterable[int], grid: Grid) -> bool:
    """Whether the noise power falls (means over tilts) or rises (sums) with the multiplicity, by likelihood."""
    size = grid.working_box
    count = torch.zeros(size // 2 + 1)
    power = torch.zeros(2, size // 2 + 1)
    log_level = torch.zeros(2)
    for i in rows:
        with particles.looking_at(i):
            y2 = read_band(particles.image_files[i], grid).abs().square()
        _, m = insert_tilts(size, tilt_rows(particles, i), grid.extent)
        seen = (m > 0.05).float()
        m = m.clamp(min=0.05)
        # a lone slice at a distance adds its noise with the square of the kernel, and a mean takes the kernel out again
        single = m.clamp(max=1.0)
        levels = torch.stack([m * single, single / m])
        count += shell_sum(seen, size)
        power += shell_sum(y2 / levels * seen, size)
        log_level += (levels.log() * seen * band_multiplicity(size)).sum(-1)
    used = count > 0
    # -log likelihood of noise s levels, with s profiled out per shell
    summed, mean = (count * (power / count.clamp(min=1)).clamp(min=1e-30).log())[:, used].sum(-1) + log_level
    return bool(mean < summed)


def _smooth(band: Tensor, size: int) -> Tensor:
    """Gaussian average over neighbouring Fourier voxels (sigma 1), respecting the edge of the band."""

    def blur(values: Tensor) -> np.ndarray:
        full = torch.fft.fftshift(both_halves(from_band(values, size)))
        return np.fft.ifftshift(gaussian_filter(full.numpy(), 1.0, mode="constant"))[..., : size // 2 + 1]

    ratio = torch.from_numpy(blur(band) / np.maximum(blur(torch.ones_like(band)), 1e-6))
    return to_band(ratio)


def _power(particles: Particles, i: int, grid: Grid, mean: bool) -> Tensor:
    """What one particle adds to the noise estimate: (3, n) on the band, its own frame; shells where s is radial.

    Its power (as a sum over tilts), the coverage that this power is proportional to, and the power over coverage.
    """
    size = grid.working_box
    if particles.stacks:
        power, coverage, pixels = stack_power(read_stack(particles, i, grid))
        return torch.stack([power, coverage, pixels * power / coverage.clamp(min=1e-12)])
    y2 = read_band(particles.image_files[i], grid).abs().square()
    if particles.transfer == "tilts":
        _, coverage = insert_tilts(size, tilt_rows(particles, i), grid.extent)
        covered = coverage > MIN_COVERAGE
        y2 = y2 * coverage.square() if mean else y2
    else:
        transfer = transfer_band(particles.ctf_files[i], grid)
        covered = is_covered(transfer)
        weighted = particles.transfer == "weight_volume"
        coverage = transfer.clamp(min=MIN_COVERAGE) if weighted else torch.ones_like(transfer)
    found = torch.stack([y2, coverage, y2 / coverage.clamp(min=MIN_COVERAGE)])
    found = torch.where(covered, found, torch.zeros(()))
    return shell_sum(found, size) if particles.transfer == "tilts" else found


def estimate_noise(
    particles: Particles,
    grid: Grid,
    mask: Tensor,
    *,
    contrast: str,
    normalisation: str,
    sample: int = SAMPLE,
    workers: int = 0,
) -> Noise:
    """Noise power, contrast sign and normalisation of a data set, from a sample of its particles.

    mask: (C, C, C) on the working grid.  The consensus that the sample itself supports is subtracted, so that
    signal is not counted as noise.  contrast: auto, white or black; normalisation: auto, sum or mean.
    """
    size, rows = grid.working_box, sound(particles, sample_rows(len(particles), sample).tolist(), grid)
    by_tilts = particles.transfer == "tilts"
    few = rows[:: max(1, len(rows) // 32)]
    volumes = by_tilts and not particles.stacks
    mean = volumes and (normalisation == "mean" or (normalisation == "auto" and _prefers_mean(particles, few, grid)))
    numerator, weight, (power, coverage, ratio) = _sums(particles, rows, grid, mean, workers)
    total = ratio if by_tilts else shell_sum(ratio, size)
    volume, explained = _consensus_share(numerator, weight, total, mask, grid)
    if by_tilts:
        curve = power / coverage.clamp(min=1e-6) * (1.0 - explained)
        curve[0] = curve[1]
        level = radial(curve, size)
    else:
        level = _smooth(power, size) / _smooth(coverage, size).clamp(min=1e-6) * radial(1.0 - explained, size)
    # noise-free data (tests, simulations) must not divide by zero, and rows are kept at half precision: weights that
    # differ by more than it holds would lose those of the strongest noise
    level = level.clamp(min=max(LEAST_NOISE * float(level.max()), 1e-30))
    if contrast == "auto":
        sign, sure = _contrast_sign(volume, weight, level, mask, grid)
    else:
        sign, sure = 1.0 if contrast == "white" else -1.0, True
    noise = Noise(level, sign, mean, explained, contrast_sure=sure)
    return calibrate(particles, grid, mask, noise, rows, workers)


def _sums(particles: Particles, rows: Sequence[int], grid: Grid, mean: bool, workers: int) -> tuple[Tensor, ...]:
    """Over particles: numerators (M, M, M), weights (n,) where all noise is one, and ``_power``."""
    size = grid.working_box
    unit = Noise(torch.ones(len(band_frequencies(size))), 1.0, mean, torch.zeros(size // 2 + 1))
    sums: list[Tensor] | None = None
    for i, b, w in observe_all(particles, rows, grid, unit, workers, crop=size):
        one = (b, w, _power(particles, i, grid, mean))
        sums = list(one) if sums is None else [total + new for total, new in zip(sums, one, strict=True)]
    assert sums is not None
    return tuple(sums)


def _consensus_share(
    numerator: Tensor, weight: Tensor, power: Tensor, mask: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The masked average (C, C, C) and the fraction of each shell's power it explains, (M//2+1,), in [0, 0.95]."""
    size = grid.working_box
    band = to_band(rfft3(numerator))
    volume = centre_crop(sample_average(band, weight, size), grid.crop) * mask
    v = model_band(volume, size)
    gain = 2.0 * shell_sum((v * band.conj()).real, size) - shell_sum(v.abs().square() * weight, size)
    return volume, (gain / power.clamp(min=1e-30)).clamp(0.0, MOST_EXPLAINED)


def _regularised(weight: Tensor, size: int, share: float = 0.05) -> Tensor:
    """The weight plus a share of its shell's mean: what an average of a sample is divided by."""
    return (weight + share * radial(shell_mean(weight, size), size)).clamp(min=1e-12)


def sample_average(band: Tensor, weight: Tensor, size: int, share: float = 0.05) -> Tensor:
    """(M, M, M) average of a sample, from sums of its numerators (n,) complex and weights (n,) on the band."""
    return irfft3(from_band(band / _regularised(weight, size, share), size))


def _contrast_sign(volume: Tensor, weight: Tensor, level: Tensor, mask: Tensor, grid: Grid) -> tuple[float, bool]:
    """+1 if the middle of the masked average is brighter than its surroundings, and whether that is beyond doubt.

    k = 0 is absent, so a density has mean zero over the box, and only its shape tells.  Beyond doubt: four standard
    deviations of the noise, and the histogram agrees (protein is sparse: the longer tail is on its side).
    """
    size = grid.working_box
    distance = centred_coordinates(grid.crop).square().sum(-1)
    extent = (distance * mask).sum() / mask.sum()  # mean square radius of the mask
    core = mask * torch.exp(-distance / extent)
    score = float((volume * core).sum())
    seen = model_band(core * mask, size).abs().square() * band_multiplicity(size)
    spread = float((seen * weight * level / _regularised(weight, size).square()).sum().sqrt())
    inside = volume[mask > 0.5]
    tail = float((inside - inside.mean()).pow(3).sum())
    sign = 1.0 if score >= 0.0 else -1.0
    return sign, abs(score) > CONTRAST_DEVIATIONS * spread and score * tail > 0


def probe_ratio(numerators: Tensor, weights: Tensor, mask: Tensor, size: int, shells: tuple[float, float]) -> float:
    """Variance of what random volumes score against residuals, over what their weights promise.

    Random masked volumes v of the given shells (low < |k| <= high, in Fourier voxels), residuals B_i - W_i mean:
    ``<v, residual>`` has variance ``<v, W v>`` where noise is counted right.  numerators (b, C, C, C), weights (b, n).
    """
    generator = torch.Generator().manual_seed(0)
    crop = numerators.shape[-1]
    k = band_frequencies(size).norm(dim=-1)
    shaped = torch.randn((32, size, size, size), generator=generator)
    passed = to_band(rfft3(shaped)) * ((k > shells[0]) & (k <= shells[1]))
    probes = centre_crop(irfft3(from_band(passed, size)), crop) * mask
    bands = model_band(probes, size)
    mean_b, mean_w = numerators.mean(0), weights.mean(0)
    raw = to_band(rfft3(centre_pad(mean_b, size))) / (mean_w + 0.05 * mean_w.mean())
    mean = centre_crop(irfft3(from_band(raw, size)), crop) * mask
    multiplicity = band_multiplicity(size)
    expected = (bands.abs().square() * multiplicity) @ weights.T
    model = ((bands.conj() * model_band(mean, size)).real * multiplicity) @ weights.T
    scores = probes.flatten(1) @ numerators.flatten(1).T - model
    return float(scores.square().sum() / expected.sum())


def calibrate(
    particles: Particles, grid: Grid, mask: Tensor, noise: Noise, rows: Sequence[int], workers: int = 0
) -> Noise:
    """Measure ``probe_ratio``; where the multiplicity is unknown (transfer volumes) scale the noise by it.

    Neighbouring Fourier voxels share a slice's noise, and how many do is not in the file: the data tell.  They share
    more of it near k = 0, where the slices meet, so every radial band has its own ratio.
    """
    size = grid.working_box
    few = rows[:: max(1, len(rows) // 96)]
    _, b, w = zip(*observe_all(particles, few, grid, noise, workers), strict=True)
    numerators, weights, top = torch.stack(b), torch.stack(w), 0.45 * size
    # signal that the average does not explain is strong at low resolution: the upper half tells about the noise
    ratio = probe_ratio(numerators, weights, mask, size, (0.25 * size, top))
    if particles.transfer == "tilts":
        return replace(noise, calibration=ratio)
    edges = np.linspace(0.0, top, RADIAL_BANDS + 1)
    ratios = [probe_ratio(numerators, weights, mask, size, (low, high)) for low, high in pairwise(edges.tolist())]
    curve = np.interp(np.arange(size // 2 + 1), (edges[1:] + edges[:-1]) / 2, ratios)
    return replace(noise, power=noise.power * radial(torch.from_numpy(curve).float(), size), calibration=ratio)
