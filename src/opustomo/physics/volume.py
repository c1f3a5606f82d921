"""Volumes in real space: crop and pad about the centre, masks, rotation, Fourier shell correlation.

Owns: the centre voxel N//2.  Arrays are (..., z, y, x).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from opustomo.physics.fourier import frequencies, irfft3, rfft3

POINTS_AT_ONCE = 4096  # of a spline: what they read and write stays in a core's own cache


def centre_crop(volume: Tensor, size: int) -> Tensor:
    """Cut (..., N, N, N) to (..., size, size, size); voxel N//2 becomes voxel size//2.  size <= N."""
    start = volume.shape[-1] // 2 - size // 2
    part = slice(start, start + size)
    return volume[..., part, part, part]


def centre_pad(volume: Tensor, size: int) -> Tensor:
    """Zero-pad (..., N, N, N) to (..., size, size, size); voxel N//2 becomes voxel size//2.  size >= N."""
    n = volume.shape[-1]
    before = size // 2 - n // 2
    return functional.pad(volume, (before, size - n - before) * 3)


def centred_coordinates(size: int, device: torch.device | str = "cpu") -> Tensor:
    """(size, size, size, 3) coordinates (x, y, z) of every voxel relative to voxel size//2."""
    axis = torch.arange(size, device=device, dtype=torch.float32) - size // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    return torch.stack([x, y, z], -1)


def turned_coordinates(size: int, matrix: Tensor, shift: Tensor) -> Tensor:
    """``matrix x + shift`` at the coordinates x of ``centred_coordinates``: (..., d, size, size, size).

    matrix: (..., d, 3); shift: (..., d).  Axis after axis, which costs a fraction of a product with every voxel.
    """
    axis = torch.arange(size, device=matrix.device, dtype=matrix.dtype) - size // 2
    along_x, along_y, along_z = (matrix[..., None] * axis).unbind(-2)
    planes = (along_z + shift[..., None])[..., None] + along_y[..., None, :]
    return planes[..., None] + along_x[..., None, None, :]


def sample_at(volume: Tensor, points: Tensor) -> Tensor:
    """Trilinear values of (N, N, N) at points (..., 3), (x, y, z) relative to voxel N//2; zero outside."""
    n = volume.shape[-1]
    unit = (points + n // 2) * (2.0 / (n - 1)) - 1.0
    flat = unit.reshape(1, 1, 1, -1, 3).to(volume.dtype)
    values = functional.grid_sample(volume[None, None], flat, align_corners=True, padding_mode="zeros")
    return values.reshape(points.shape[:-1])


def spline_coefficients(spectrum: Tensor) -> Tensor:
    """Cubic B-spline coefficients (2M, 2M, 2M), on a grid twice as fine, of a half transform (M, M, M//2+1).

    For ``sample_spline``.  Divided by the kernel's own transform (Unser et al. 1993), so that the spline passes through
    the band-limited volume exactly on the grid, and within half a percent between its points.  Axis by axis: most of
    the lines of the finer grid's transform are zero.
    """
    m = spectrum.shape[-2]
    half = m // 2
    line = torch.fft.fftfreq(m, 1.0 / m, device=spectrum.device, dtype=spectrum.real.dtype)
    inverse = 3.0 / (2.0 + torch.cos(line * (torch.pi / m)))
    finer = spectrum[..., :half] * (inverse[:half] * 2.0**1.5 * inverse[:, None] * inverse[:, None, None])
    for axis in (-3, -2):
        low, high = finer.narrow(axis, 0, half), finer.narrow(axis, half + 1, half - 1)
        between = [m + 1 if n == axis + 3 else size for n, size in enumerate(finer.shape)]
        finer = torch.fft.ifft(torch.cat([low, finer.new_zeros(between), high], axis), dim=axis, norm="ortho")
    return torch.fft.irfft(finer, 2 * m, norm="ortho")


def sample_spline(coefficients: Tensor, points: Tensor) -> Tensor:
    """Values at points (..., 3), (x, y, z) voxels of an M box relative to voxel M//2; zero outside the box.

    coefficients: (2M, 2M, 2M) of ``spline_coefficients``.  Each value is the sum of 4 x 4 x 4 coefficients about it.
    """
    return _read_spline(coefficients, points * 2.0)


def sample_cubic(volume: Tensor, points: Tensor) -> Tensor:
    """Cubic spline through the voxels of (N, N, N) at points (..., 3), (x, y, z) relative to voxel N//2; zero outside.

    For what has no band limit, so that a finer grid would only add ringing; periodic like the transform.
    """
    n = volume.shape[-1]
    line = 3.0 / (2.0 + torch.cos(frequencies(n, volume.device) * (2.0 * torch.pi / n)))
    return _read_spline(irfft3(rfft3(volume) * line.prod(-1).to(volume)), points)


def _read_spline(coefficients: Tensor, points: Tensor) -> Tensor:
    """Values at points (..., 3), (x, y, z) voxels of the coefficients' own grid (n, n, n) relative to voxel n//2."""
    n = coefficients.shape[-1]
    wide = n + 4  # two more on either side: the volume is periodic
    at = points.reshape(-1, 3).T.to(coefficients) + (n // 2 + 2)
    inside = torch.nonzero(((at >= 2) & (at <= n + 1)).all(0))[:, 0]
    flat = functional.pad(coefficients[None, None], (2,) * 6, mode="circular").flatten()
    # places are half as long as torch's default: reading them is most of the work
    whole = torch.int32 if len(flat) < 2**31 else torch.int64
    strides = torch.tensor([[1], [wide], [wide * wide]], dtype=whole, device=flat.device)
    near = torch.arange(-1, 3, dtype=whole, device=flat.device)
    around = (near[:, None, None] * strides[2] + near[:, None] * strides[1] + near).view(64, 1)  # z, y, x
    parts = []
    for part in at[:, inside].split(POINTS_AT_ONCE, 1):
        base = part.floor()
        weights = _spline_weights(part - base)
        first = (base.to(whole) * strides).sum(0, dtype=whole)
        values = flat.index_select(0, (first + around).flatten()).view(4, 4, 4, len(first))
        along_x = (values * weights[:, 0]).sum(2)
        parts.append(((along_x * weights[:, 1]).sum(1) * weights[:, 2]).sum(0))
    out = flat.new_zeros(at.shape[1])
    out[inside] = torch.cat(parts)
    return out.reshape(points.shape[:-1])


def _spline_weights(f: Tensor) -> Tensor:
    """Cubic B-spline at distances 1 + f, f, 1 - f, 2 - f: (4, ...), for f in [0, 1)."""
    g = 1.0 - f
    f2, g2 = f * f, g * g
    return torch.stack([g2 * g, 4.0 - f2 * (6.0 - 3.0 * f), 4.0 - g2 * (6.0 - 3.0 * g), f2 * f]) / 6.0


def rotate_volume(volume: Tensor, matrix: Tensor, shift: Tensor | None = None) -> Tensor:
    """``V'(x) = V(matrix x + shift)`` about voxel N//2, band-limited: (N, N, N) to (N, N, N).

    matrix: (3, 3); shift: (3,) voxels (x, y, z).  To turn a consensus volume into a particle's frame pass ``A^T``.
    """
    shift = volume.new_zeros(3) if shift is None else shift.to(volume)
    points = turned_coordinates(volume.shape[-1], matrix.to(volume), shift).movedim(0, -1)
    return sample_spline(spline_coefficients(rfft3(volume)), points)


def spherical_mask(size: int, radius: float, edge: float) -> Tensor:
    """Sphere about voxel size//2 with a cosine edge from radius to radius + edge (voxels)."""
    return cosine_edge(centred_coordinates(size).norm(dim=-1) - radius, edge)


def cosine_edge(distance: Tensor, edge: float) -> Tensor:
    """1 where distance <= 0, 0 beyond edge, raised cosine between."""
    if edge <= 0:
        return (distance <= 0).float()
    return 0.5 + 0.5 * torch.cos(torch.pi * (distance / edge).clamp(0.0, 1.0))


def shell_numbers(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Integer shell round(|k|) of every voxel of the half transform, (size, size, size//2+1)."""
    return frequencies(size, device).norm(dim=-1).round().long()


def shell_counts(size: int) -> Tensor:
    """Voxels of the full transform in every shell 0 .. size//2, (size//2+1,)."""
    shell, count = shell_numbers(size).flatten(), _multiplicity(size, "cpu")
    keep = shell <= size // 2
    return torch.zeros(size // 2 + 1).index_add(0, shell[keep], count[keep])


def _multiplicity(size: int, device: torch.device | str) -> Tensor:
    """(n,) 2 for voxels of the half transform that stand for themselves and their conjugates, kx in (0, N/2)."""
    kx = frequencies(size, device)[..., 0].flatten()
    return torch.where((kx > 0) & (kx < size // 2), 2.0, 1.0)


def fourier_shell_correlation(a: Tensor, b: Tensor) -> Tensor:
    """FSC of two volumes (N, N, N) per integer shell 0 .. N//2: (N//2+1,).  Source: van Heel & Schatz 2005."""
    n = a.shape[-1]
    fa, fb = rfft3(a), rfft3(b)
    shell, count = shell_numbers(n, a.device).flatten(), _multiplicity(n, a.device).to(a)
    keep = shell <= n // 2

    def total(values: Tensor) -> Tensor:
        return a.new_zeros(n // 2 + 1).index_add(0, shell[keep], (values.flatten() * count)[keep])

    cross = total((fa * fb.conj()).real)
    power = total(fa.abs().square()) * total(fb.abs().square())
    return cross / power.clamp(min=torch.finfo(a.dtype).tiny).sqrt()


def randomise_phases(volume: Tensor, first: int, generator: torch.Generator) -> Tensor:
    """(N, N, N) with the same amplitudes and random phases in the shells from ``first`` on.

    The phases are those of white noise, so that the volume stays real.
    """
    spectrum, noise = rfft3(volume), rfft3(torch.randn(volume.shape, generator=generator).to(volume))
    phases = noise / noise.abs().clamp(min=torch.finfo(volume.dtype).tiny)
    beyond = shell_numbers(volume.shape[-1], volume.device) >= first
    return irfft3(torch.where(beyond, spectrum.abs() * phases, spectrum))


def substituted_fsc(total: Tensor, substituted: Tensor, first: int) -> Tensor:
    """FSC without what a mask adds: ``(total - substituted) / (1 - substituted)`` in the shells beyond ``first``.

    total: FSC (S,) of two maps; substituted: the same when the phases of the data are random from shell ``first`` on.
    Shell ``first`` itself is left: there the kept shells reach in whatever the data say.
    Source: Chen et al. 2013 (Ultramicroscopy 135:24), high-resolution noise substitution.
    """
    corrected = (total - substituted) / (1.0 - substituted).clamp(min=1e-3)
    return torch.where(torch.arange(len(total), device=total.device) > first, corrected, total).clamp(min=-1.0)
