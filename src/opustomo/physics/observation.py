"""Image formation in one form: transfer of a tilt series, numerator B and weight W (METHOD sections 3 and 4).

Owns: the insertion of tilts into Fourier space, the resampling of a numerator into the consensus frame, and the
likelihood as a function of B and W.  Everything is evaluated on the band of ``physics.fourier``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opustomo.physics.ctf import contrast_transfer
from opustomo.physics.fourier import band_multiplicity, from_band, irfft3, rfft3, to_band
from opustomo.physics.geometry import euler_to_matrix
from opustomo.physics.volume import (
    centre_crop,
    centre_pad,
    centred_coordinates,
    sample_at,
    sample_spline,
    spline_coefficients,
)

MIN_COVERAGE = 1e-3  # below this multiplicity a voxel says nothing: B = W = 0


def _near_planes(k: Tensor, tilts: Tensor, extent: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Every pair of a voxel and a tilt whose plane is within one voxel: voxel, tilt, linear kernel, CTF; (pairs,)."""
    frames = euler_to_matrix(tilts[:, :3]).to(k.dtype)  # (u, v, distance) = R_t k
    distance = k @ frames[:, 2].T
    near = torch.nonzero(distance.abs() < 1.0)  # only the voxels close to a plane: a few percent
    voxel, tilt = near[:, 0], near[:, 1]
    points = k[voxel]
    u = (points * frames[tilt, 0]).sum(-1) / extent
    v = (points * frames[tilt, 1]).sum(-1) / extent
    rows = tilts[:, 3:].to(k.dtype)[tilt]
    return voxel, tilt, 1.0 - distance[voxel, tilt].abs(), contrast_transfer(u, v, *rows.unbind(-1))


def insert_tilts(k: Tensor, tilts: Tensor, extent: float) -> tuple[Tensor, Tensor]:
    """Transfer h and multiplicity m of a tilt series at frequencies of the particle's frame.

    k: (n, 3) frequency vectors (x, y, z) in units of 1/extent (real numbers: rotated grids are welcome);
    tilts: (T, 13) rows as in data.particles.TILT_COLUMNS; extent: box edge in Angstrom.
    Returns h = sum_t w_t c_t and m = sum_t w_t, (n,) each, with the linear kernel ``w_t = 1 - |distance|`` to
    the tilt's plane and the CTF evaluated at each voxel's own in-plane coordinates.
    """
    voxel, _, kernel, contrast = _near_planes(k, tilts, extent)
    h = k.new_zeros(k.shape[0]).index_add(0, voxel, kernel * contrast)
    m = k.new_zeros(k.shape[0]).index_add(0, voxel, kernel)
    return h, m


def insert_squares(k: Tensor, tilts: Tensor, extent: float, noise: Tensor) -> Tensor:
    """``sum_t w_t c_t^2 / s_t`` of tilt images that are kept apart, arguments as ``insert_tilts``: (n,).

    noise: (T,) noise power s_t of every image; a part that depends on |k| alone is for the caller.
    """
    voxel, tilt, kernel, contrast = _near_planes(k, tilts, extent)
    return k.new_zeros(k.shape[0]).index_add(0, voxel, kernel * contrast.square() / noise.to(k.dtype)[tilt])


def information(h: Tensor, m: Tensor, noise: Tensor) -> Tensor:
    """Weight ``W = h^2 / (s m)`` of a summed tilt series with noise power s per slice; 0 where m is too small."""
    return torch.where(m > MIN_COVERAGE, h.square() / (noise * m.clamp(min=MIN_COVERAGE)), 0.0)


def matched_filter(h: Tensor, m: Tensor, noise: Tensor) -> Tensor:
    """The factor ``h / (s m)`` that turns a summed, not premultiplied volume's transform into the numerator."""
    return torch.where(m > MIN_COVERAGE, h / (noise * m.clamp(min=MIN_COVERAGE)), 0.0)


def resample_numerator(band: Tensor, matrix: Tensor, origin: Tensor, size: int, crop: int) -> Tensor:
    """``B_c(x) = B_p(A x - origin)``: shifted, rotated and cropped in one resampling.

    band: (n,) complex numerator in the particle's frame on the band of an M = size box; matrix: (3, 3) A;
    origin: (3,) working voxels (x, y, z).  Returns (crop, crop, crop) in the consensus frame.
    """
    points = centred_coordinates(crop, band.device) @ matrix.T.to(torch.float32) - origin.to(torch.float32)
    return sample_spline(spline_coefficients(from_band(band, size)), points)


def rotate_transfer(band: Tensor, matrix: Tensor, size: int, k: Tensor) -> Tensor:
    """Real, even transfer or weight on the band, read at ``A k`` by trilinear interpolation: (n,).

    For data sets that come with a CTF or weight volume; tilt series are evaluated directly by ``insert_tilts``.
    band: (n,) real; matrix: (3, 3); k: (n, 3) frequencies of the consensus frame.
    """
    half = from_band(band, size)
    # k = 0 is outside the band, but its neighbours are read by interpolation
    half[0, 0, 0] = (half[1, 0, 0] + half[0, 1, 0] + half[0, 0, 1]) / 3.0
    # full centred volume from the even half transform: F(-k) = F(k)
    full = torch.zeros((size, size, size), dtype=band.dtype, device=band.device)
    full[..., : size // 2 + 1] = half
    mirrored = torch.roll(half.flip(0, 1), (1, 1), (0, 1))
    full[..., size // 2 + 1 :] = mirrored[..., 1 : size // 2].flip(-1)
    return sample_at(torch.fft.fftshift(full), k @ matrix.T.to(k))


def model_band(volume: Tensor, size: int) -> Tensor:
    """Transform of a cropped model volume on the band of the working box: (..., C, C, C) to (..., n) complex."""
    padded = centre_pad(volume, size)
    # volumes are centred on voxel size//2; the band's phases refer to voxel 0, as those of B do
    return to_band(rfft3(padded))


def model_band_adjoint(band: Tensor, size: int, crop: int) -> Tensor:
    """Gradient of a function of ``model_band(V)`` from that with respect to its result: (..., n) to (..., C, C, C)."""
    # the inverse counts a voxel and its mirror image, the band has one of them
    return centre_crop(irfft3(from_band(band / band_multiplicity(size, band.device), size)), crop)


def quadratic_form(band: Tensor, weight: Tensor, size: int) -> Tensor:
    """``<V, W V>`` in the full transform: (..., n) complex, (..., n) real to (...)."""
    multiplicity = band_multiplicity(size, band.device)
    return (band.abs().square() * weight * multiplicity).sum(-1)


def negative_log_likelihood(volume: Tensor, numerator: Tensor, weight: Tensor, size: int) -> Tensor:
    """``E(V) = 1/2 <V, W V> - <V, B>`` in nats, up to a constant of the data.

    volume, numerator: (..., C, C, C); weight: (..., n) on the band of the working box.  Returns (...).
    """
    quadratic = quadratic_form(model_band(volume, size), weight, size)
    return 0.5 * quadratic - (volume * numerator).sum((-3, -2, -1))
