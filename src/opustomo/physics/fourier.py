"""Fourier transforms of volumes, resizing in Fourier space, shells and the packed band.

Owns: ``norm="ortho"``, real FFTs of (..., z, y, x), zero frequency at index 0, and the order of the *band*: the
half-Fourier voxels with 0 < |k| < M/2, flattened.  Everything elementwise (weights, CTFs, noise) lives on the band.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_AXES = (-3, -2, -1)


def rfft3(volume: Tensor) -> Tensor:
    """(..., N, N, N) real to (..., N, N, N//2+1) complex, ortho."""
    return torch.fft.rfftn(volume, dim=_AXES, norm="ortho")


def irfft3(spectrum: Tensor) -> Tensor:
    """(..., N, N, N//2+1) complex to (..., N, N, N) real, ortho; N even."""
    n = spectrum.shape[-2]
    return torch.fft.irfftn(spectrum, s=(n, n, n), dim=_AXES, norm="ortho")


def resize_spectrum(spectrum: Tensor, size: int) -> Tensor:
    """Crop or zero-pad (..., N, N, N//2+1) to (..., size, size, size//2+1); values are not rescaled.

    Only frequencies below both Nyquist limits are kept, so the result is Hermitian for any even sizes.
    """
    n = spectrum.shape[-2]
    if n == size:
        return spectrum
    h = min(n, size) // 2
    out = spectrum.new_zeros((*spectrum.shape[:-3], size, size, size // 2 + 1))
    for zs, zd in ((slice(0, h), slice(0, h)), (slice(n - h + 1, n), slice(size - h + 1, size))):
        for ys, yd in ((slice(0, h), slice(0, h)), (slice(n - h + 1, n), slice(size - h + 1, size))):
            out[..., zd, yd, :h] = spectrum[..., zs, ys, :h]
    return out


def fourier_resize(volume: Tensor, size: int) -> Tensor:
    """Resample (..., N, N, N) to (..., size, size, size) by cropping or padding its transform.

    Density values are kept: ``V_M = (M/N)^(3/2) crop(V_N)`` under ortho transforms.  Voxel N//2 lands on size//2.
    Axis by axis with a matrix, which costs less than the transforms, above all backwards.
    """
    n = volume.shape[-1]
    if n == size:
        return volume
    matrix = _resize_matrix(n, size, str(volume.device)).to(volume.dtype)
    along_x = volume @ matrix.T
    along_y = matrix @ along_x
    return (matrix @ along_y.flatten(-2)).unflatten(-1, (size, size))


@lru_cache(maxsize=8)
def _resize_matrix(n: int, size: int, device: str) -> Tensor:
    """(size, n): ``fourier_resize`` of one axis, float64."""
    spectrum = torch.fft.rfft(torch.eye(n, dtype=torch.float64, device=device), dim=0)
    kept = spectrum.new_zeros(size // 2 + 1, n)
    h = min(n, size) // 2
    kept[:h] = spectrum[:h]
    return torch.fft.irfft(kept, n=size, dim=0) * (size / n)


@lru_cache(maxsize=8)
def _frequencies(size: int, device: str) -> Tensor:
    full = torch.fft.fftfreq(size, 1.0 / size, device=device)
    half = torch.arange(size // 2 + 1, device=device, dtype=full.dtype)
    z, y, x = torch.meshgrid(full, full, half, indexing="ij")
    return torch.stack([x, y, z], -1)


def frequencies(size: int, device: torch.device | str = "cpu") -> Tensor:
    """(size, size, size//2+1, 3) integer frequency vectors (kx, ky, kz) of the half transform."""
    return _frequencies(size, str(device))


def spectral_gradient(volume: Tensor) -> Tensor:
    """Derivatives of (..., N, N, N) per voxel along x, y, z, exact for a band-limited volume: (3, ..., N, N, N)."""
    n = volume.shape[-1]
    k = frequencies(n, volume.device)
    spectrum = torch.where(k.abs().amax(-1) < n // 2, rfft3(volume), 0.0)
    return irfft3(torch.stack([spectrum * (2j * torch.pi / n) * k[..., axis] for axis in range(3)]))


@lru_cache(maxsize=8)
def _band_index(size: int, device: str) -> Tensor:
    r2 = _frequencies(size, device).square().sum(-1).flatten()
    return torch.nonzero((r2 > 0) & (r2 < (size / 2) ** 2))[:, 0]


def band_index(size: int, device: torch.device | str = "cpu") -> Tensor:
    """(n,) flat positions, in the half transform, of the voxels with 0 < |k| < size/2."""
    return _band_index(size, str(device))


@lru_cache(maxsize=8)
def _band_frequencies(size: int, device: str) -> Tensor:
    return _frequencies(size, device).reshape(-1, 3)[_band_index(size, device)]


def band_frequencies(size: int, device: torch.device | str = "cpu") -> Tensor:
    """(n, 3) frequency vectors (kx, ky, kz) of the band."""
    return _band_frequencies(size, str(device))


@lru_cache(maxsize=8)
def _band_multiplicity(size: int, device: str) -> Tensor:
    return torch.where(_band_frequencies(size, device)[:, 0] == 0, 1.0, 2.0)


def band_multiplicity(size: int, device: torch.device | str = "cpu") -> Tensor:
    """(n,) how often each band voxel occurs in the full transform: 1 in the plane kx = 0, else 2."""
    return _band_multiplicity(size, str(device))


@lru_cache(maxsize=8)
def _band_shell(size: int, device: str) -> Tensor:
    return _band_frequencies(size, device).norm(dim=-1).round().long()


def band_shell(size: int, device: torch.device | str = "cpu") -> Tensor:
    """(n,) integer shell of each band voxel, round(|k|) in 1 .. size//2."""
    return _band_shell(size, str(device))


def to_band(spectrum: Tensor) -> Tensor:
    """(..., M, M, M//2+1) to (..., n): the band voxels in order."""
    size = spectrum.shape[-2]
    return spectrum.flatten(-3)[..., band_index(size, spectrum.device)]


def from_band(band: Tensor, size: int) -> Tensor:
    """(..., n) to (..., M, M, M//2+1), zero outside the band."""
    out = band.new_zeros((*band.shape[:-1], size * size * (size // 2 + 1)))
    out[..., band_index(size, band.device)] = band
    return out.unflatten(-1, (size, size, size // 2 + 1))


def both_halves(half: Tensor) -> Tensor:
    """The whole of a real, even transform from its half (N, N, N//2+1), ``F(-k) = F(k)``: (N, N, N)."""
    mates = torch.roll(half.flip(0, 1), (1, 1), (0, 1))
    return torch.cat([half, mates[..., 1 : half.shape[0] // 2].flip(-1)], -1)


def shell_sum(values: Tensor, size: int) -> Tensor:
    """Sum of a real band quantity (..., n) over shells, counting both halves: (..., size//2+1)."""
    out = values.new_zeros((*values.shape[:-1], size // 2 + 1))
    weighted = values * band_multiplicity(size, values.device).to(values.dtype)
    return out.index_add(-1, band_shell(size, values.device), weighted)


def radial(curve: Tensor, size: int) -> Tensor:
    """Evaluate a per-shell curve (size//2+1,) at every band voxel by linear interpolation in |k|: (n,)."""
    r = band_frequencies(size, curve.device).norm(dim=-1)
    low = r.floor().long()
    high = (low + 1).clamp(max=curve.shape[-1] - 1)
    return torch.lerp(curve[low], curve[high], (r - low).to(curve.dtype))


def shell_mean(values: Tensor, size: int) -> Tensor:
    """Mean of a real band quantity (..., n) over shells; shell 0, which is empty, repeats shell 1."""
    mean = shell_sum(values, size) / shell_sum(torch.ones_like(values), size).clamp(min=1)
    mean[..., 0] = mean[..., 1]
    return mean
