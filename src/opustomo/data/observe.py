"""From files to numerator and weight: what one particle says about any volume.

Owns: the reading of a subtomogram onto the working band, its transfer function in either frame, and the noise
model of a data set (METHOD section 3).  The physics itself is in ``physics.observation``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opustomo.data.mrc import read_volume
from opustomo.data.particles import Particles
from opustomo.data.readers import read_transfer_volume
from opustomo.errors import UserError
from opustomo.physics.fourier import (
    band_frequencies,
    band_multiplicity,
    from_band,
    radial,
    resize_spectrum,
    rfft3,
    shell_sum,
    to_band,
)
from opustomo.physics.grid import Grid
from opustomo.physics.observation import (
    MIN_COVERAGE,
    information,
    insert_tilts,
    matched_filter,
    model_band,
    quadratic_form,
    resample_numerator,
    rotate_transfer,
)


@dataclass(frozen=True)
class Noise:
    """Noise power of a data set on the working band, and what was found on the way.

    ``power`` is (n,) on the band, in the particle's frame: with tilt parameters the power per slice s (radial);
    with a transfer volume that of a voxel of the data (CTF volume) or of the data over the weight (weight volume).
    """

    power: Tensor
    contrast: float  # +1: protein is bright in the files, -1: dark
    mean_normalised: bool  # r = 1/m: the file holds means over covering tilts
    explained: Tensor  # (M//2+1,) fraction of each shell's power that the consensus explains
    calibration: float = 1.0  # var of probe residuals over their expectation; 1 when nats are counted right


def working_mask(mask: Tensor, grid: Grid) -> Tensor:
    """Solvent mask (N, N, N) on the working grid's crop: (C, C, C), clamped to [0, 1]."""
    from opustomo.physics.fourier import fourier_resize
    from opustomo.physics.volume import centre_crop

    return centre_crop(fourier_resize(mask, grid.working_box), grid.crop).clamp(0.0, 1.0)


def read_band(path: Path, grid: Grid) -> Tensor:
    """Transform of a subtomogram on the working band, (n,) complex, in density units of the working grid.

    Raises UserError for a box of another size, values that are not finite, or an empty box.
    """
    data, _ = read_volume(path)
    if data.shape != (grid.box,) * 3:
        raise UserError(f"{path}: box {'x'.join(map(str, data.shape))} where {grid.box} is expected; re-extract it")
    if not np.isfinite(data).all():
        raise UserError(f"{path}: NaN or infinite voxels; re-extract this subtomogram or remove its row")
    if data.min() == data.max():
        raise UserError(f"{path}: empty box (every voxel is {data.flat[0]:g}); re-extract it or remove its row")
    spectrum = resize_spectrum(rfft3(torch.from_numpy(data)), grid.working_box)
    return to_band(spectrum) * (grid.working_box / grid.box) ** 1.5


@lru_cache(maxsize=64)
def _transfer_band(path: Path, grid: Grid) -> Tensor:
    """A CTF or weight volume on the working band, (n,); few distinct files are shared by many particles."""
    half = torch.from_numpy(read_transfer_volume(path, grid.box))
    return to_band(resize_spectrum(half, grid.working_box))


def _tilt_rows(particles: Particles, i: int) -> Tensor:
    rows = particles.tilts_of(i)
    if len(rows) == 0:
        raise UserError(
            f"{particles.source}: particle {i + 1} ({particles.names[i]}): all tilts are excluded; remove it"
        )
    return torch.from_numpy(rows).float()


def _pose(particles: Particles, i: int, grid: Grid) -> tuple[Tensor, Tensor]:
    """A and the origin in working voxels."""
    matrix = torch.from_numpy(particles.rotation[i]).float()
    origin = torch.from_numpy(particles.origin[i]).float() * (grid.working_box / grid.box)
    return matrix, origin


def _numerator_band(particles: Particles, i: int, grid: Grid, noise: Noise) -> Tensor:
    """B in the particle's frame on the band, (n,) complex."""
    y = read_band(particles.image_files[i], grid) * noise.contrast
    if particles.transfer == "tilts":
        h, m = insert_tilts(band_frequencies(grid.working_box), _tilt_rows(particles, i), grid.extent)
        if noise.mean_normalised:
            y = y * m
        return y * matched_filter(h, m, noise.power)
    transfer = _transfer_band(particles.ctf_files[i], grid)
    gain = 1.0 / noise.power if particles.transfer == "weight_volume" else transfer / noise.power
    return y * torch.where(transfer.abs() > MIN_COVERAGE * transfer.abs().max(), gain, 0.0)


def _weight_band(particles: Particles, i: int, grid: Grid, noise: Noise, matrix: Tensor) -> Tensor:
    """W in the consensus frame on the band, (n,)."""
    k = band_frequencies(grid.working_box)
    if particles.transfer == "tilts":
        h, m = insert_tilts(k @ matrix.T, _tilt_rows(particles, i), grid.extent)
        return information(h, m, noise.power)  # s is radial: the same in both frames
    transfer = _transfer_band(particles.ctf_files[i], grid)
    covered = transfer.abs() > MIN_COVERAGE * transfer.abs().max()
    top = transfer.clamp(min=0.0) if particles.transfer == "weight_volume" else transfer.square()
    weight = torch.where(covered, top / noise.power, 0.0)
    return rotate_transfer(weight, matrix, grid.working_box, k).clamp(min=0.0)


def observe(particles: Particles, i: int, grid: Grid, noise: Noise, crop: int | None = None) -> tuple[Tensor, Tensor]:
    """Numerator (C, C, C) and weight (n,) of particle i in the consensus frame (METHOD section 4)."""
    matrix, origin = _pose(particles, i, grid)
    band = _numerator_band(particles, i, grid, noise)
    numerator = resample_numerator(band, matrix, origin, grid.working_box, crop or grid.crop)
    return numerator, _weight_band(particles, i, grid, noise, matrix)


# ------------------------------------------------------------------------------------------------ noise model


def sample_rows(count: int, size: int) -> np.ndarray:
    """At most ``size`` row numbers spread evenly over the file (every tomogram takes part)."""
    return np.unique(np.linspace(0, count - 1, min(count, size)).round().astype(np.int64))


def _prefers_mean(particles: Particles, rows: Iterable[int], grid: Grid) -> bool:
    """Whether the noise power falls (means over tilts) or rises (sums) with the multiplicity, by likelihood."""
    k, size = band_frequencies(grid.working_box), grid.working_box
    count = torch.zeros(size // 2 + 1)
    power = torch.zeros(2, size // 2 + 1)
    log_m = 0.0
    for i in rows:
        y2 = read_band(particles.image_files[i], grid).abs().square()
        _, m = insert_tilts(k, _tilt_rows(particles, i), grid.extent)
        seen = (m > 0.05).float()
        count += shell_sum(seen, size)
        power += shell_sum(torch.stack([y2 / m.clamp(min=0.05), y2 * m]) * seen, size)
        log_m += float((m.clamp(min=0.05).log() * seen * band_multiplicity(size)).sum())
    used = count > 0
    profile = (count * (power / count.clamp(min=1)).clamp(min=1e-30).log())[:, used].sum(-1)
    # -log likelihood of noise s m (sum) and s / m (mean), with s profiled out per shell
    return bool(profile[1] - log_m < profile[0] + log_m)


def _unit_noise(grid: Grid, contrast: float, mean_normalised: bool) -> Noise:
    ones = torch.ones(len(band_frequencies(grid.working_box)))
    return Noise(ones, contrast, mean_normalised, torch.zeros(grid.working_box // 2 + 1))


def _smooth(band: Tensor, size: int) -> Tensor:
    """Gaussian average over neighbouring Fourier voxels (sigma 1), respecting the edge of the band."""
    from scipy.ndimage import gaussian_filter

    def blur(values: Tensor) -> np.ndarray:
        half = from_band(values, size)
        mirrored = torch.roll(half.flip(0, 1), (1, 1), (0, 1))[..., 1 : size // 2].flip(-1)
        full = torch.fft.fftshift(torch.cat([half, mirrored], -1))
        return np.fft.ifftshift(gaussian_filter(full.numpy(), 1.0, mode="constant"))[..., : size // 2 + 1]

    ratio = torch.from_numpy(blur(band) / np.maximum(blur(torch.ones_like(band)), 1e-6))
    return to_band(ratio)


def estimate_noise(
    particles: Particles, grid: Grid, mask: Tensor, *, contrast: str, normalisation: str, sample: int = 256
) -> Noise:
    """Noise power, contrast sign and normalisation of a data set, from a sample of its particles.

    mask: (C, C, C) on the working grid.  The consensus that the sample itself supports is subtracted, so that
    signal is not counted as noise.  contrast: auto, white or black; normalisation: auto, sum or mean.
    """
    size = grid.working_box
    # the sums below need no storage per particle; the sample is bounded by time alone
    rows = sample_rows(len(particles), sample)
    by_tilts = particles.transfer == "tilts"
    mean = normalisation == "mean" or (
        by_tilts and normalisation == "auto" and _prefers_mean(particles, rows[:: max(1, len(rows) // 32)], grid)
    )
    unit = _unit_noise(grid, 1.0, mean and by_tilts)
    n = len(unit.power)
    k = band_frequencies(size)
    power, coverage, explainable = torch.zeros(n), torch.zeros(n), torch.zeros(size // 2 + 1)
    numerator, weight = torch.zeros((size,) * 3), torch.zeros(n)
    for i in map(int, rows):
        y2 = read_band(particles.image_files[i], grid).abs().square()
        if by_tilts:
            _, m = insert_tilts(k, _tilt_rows(particles, i), grid.extent)
            y2 = torch.where(m > MIN_COVERAGE, y2 * (m * m if unit.mean_normalised else 1.0), 0.0)
            covered = torch.where(m > MIN_COVERAGE, m, 0.0)
            explainable += shell_sum(y2 / m.clamp(min=MIN_COVERAGE), size)
        else:
            transfer = _transfer_band(particles.ctf_files[i], grid)
            covered = transfer.clamp(min=0.0) if particles.transfer == "weight_volume" else torch.ones(n)
            inside = transfer.abs() > MIN_COVERAGE * transfer.abs().max()
            covered = torch.where(inside, covered, 0.0)
            y2 = torch.where(inside, y2, 0.0)
            scale = transfer.clamp(min=1e-6) if particles.transfer == "weight_volume" else torch.ones(n)
            explainable += shell_sum(y2 / scale, size)
        power, coverage = power + y2, coverage + covered
        b, w = observe(particles, i, grid, unit, crop=size)
        numerator, weight = numerator + b, weight + w
    volume, explained = _consensus_share(numerator, weight, explainable, mask, grid)
    sign = 1.0 if contrast == "white" else -1.0 if contrast == "black" else _contrast_sign(volume)
    if by_tilts:
        total = shell_sum(power, size) / shell_sum(coverage, size).clamp(min=1e-6)
        curve = total * (1.0 - explained)
        curve[0] = curve[1]
        noise = radial(curve, size)
    else:
        noise = _smooth(power, size) / _smooth(coverage, size).clamp(min=1e-6)
        noise = noise * radial(1.0 - explained, size)
    floor = 1e-12 * float(noise.max()) if float(noise.max()) > 0 else 1.0
    result = Noise(noise.clamp(min=floor), sign, unit.mean_normalised, explained)
    return calibrate(particles, grid, mask, result, rows)


def _consensus_share(
    numerator: Tensor, weight: Tensor, power: Tensor, mask: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """The masked average (C, C, C) and the fraction of each shell's power it explains, in [0, 0.999]."""
    from opustomo.physics.volume import centre_crop

    size = grid.working_box
    shells = shell_sum(weight, size) / shell_sum(torch.ones_like(weight), size).clamp(min=1)
    b = to_band(rfft3(numerator))
    raw = b / (weight + 0.05 * radial(shells, size)).clamp(min=1e-12)
    volume = centre_crop(torch.fft.irfftn(from_band(raw, size), s=(size,) * 3, norm="ortho"), grid.crop) * mask
    v = model_band(volume, size)
    gain = 2.0 * shell_sum((v * b.conj()).real, size) - shell_sum(v.abs().square() * weight, size)
    return volume, (gain / power.clamp(min=1e-30)).clamp(0.0, 0.999)


def _contrast_sign(volume: Tensor) -> float:
    """+1 if the particle is brighter than its surroundings: k = 0 is absent, so the masked sum tells."""
    return 1.0 if float(volume.sum()) >= 0.0 else -1.0


def probe_ratio(numerators: Tensor, weights: Tensor, mask: Tensor, size: int, seed: int = 0) -> float:
    """Variance of what random volumes score against residuals, over what their weights promise.

    Random masked volumes v of the upper half of the band, residuals B_i - W_i mean: ``<v, residual>`` has
    variance ``<v, W v>`` where noise is counted right.  numerators (b, C, C, C), weights (b, n).
    """
    generator = torch.Generator().manual_seed(seed)
    crop = numerators.shape[-1]
    k = band_frequencies(size).norm(dim=-1)
    shaped = torch.randn((32, size, size, size), generator=generator)
    passed = to_band(rfft3(shaped)) * ((k > size / 4) & (k < 0.9 * size / 2))
    from opustomo.physics.volume import centre_crop

    probes = centre_crop(torch.fft.irfftn(from_band(passed, size), s=(size,) * 3, norm="ortho"), crop) * mask
    bands = model_band(probes, size)
    mean_b, mean_w = numerators.mean(0), weights.mean(0)
    raw = to_band(rfft3(_pad(mean_b, size))) / (mean_w + 0.05 * mean_w.mean())
    mean = centre_crop(torch.fft.irfftn(from_band(raw, size), s=(size,) * 3, norm="ortho"), crop) * mask
    multiplicity = band_multiplicity(size)
    expected = (bands.abs().square() * multiplicity) @ weights.T
    model = ((bands.conj() * model_band(mean, size)).real * multiplicity) @ weights.T
    scores = probes.flatten(1) @ numerators.flatten(1).T - model
    return float(scores.square().sum() / expected.sum())


def _pad(volume: Tensor, size: int) -> Tensor:
    from opustomo.physics.volume import centre_pad

    return centre_pad(volume, size)


def calibrate(particles: Particles, grid: Grid, mask: Tensor, noise: Noise, rows: np.ndarray) -> Noise:
    """Measure ``probe_ratio``; where the multiplicity is unknown (transfer volumes) scale the noise by it.

    Neighbouring Fourier voxels share a slice's noise, and how many do is not in the file: the data tell.
    """
    few = rows[:: max(1, len(rows) // 96)]
    pairs = [observe(particles, int(i), grid, noise) for i in few]
    ratio = probe_ratio(torch.stack([p[0] for p in pairs]), torch.stack([p[1] for p in pairs]), mask, grid.working_box)
    if particles.transfer == "tilts":
        return replace(noise, calibration=ratio)
    return replace(noise, power=noise.power * ratio, calibration=ratio)


def expected_gain(volume: Tensor, weight: Tensor, size: int) -> Tensor:
    """``<V, W V>`` of a volume against weights (b, n): the squared signal-to-noise ratio it would be seen with."""
    return quadratic_form(model_band(volume, size), weight, size)
