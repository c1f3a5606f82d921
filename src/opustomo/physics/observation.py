"""Image formation in one form: transfer of a tilt series, numerator B and weight W (METHOD sections 3 and 4).

Owns: the insertion of tilts into Fourier space, the resampling of a numerator into the consensus frame, and the
likelihood as a function of B and W.  Everything is evaluated on the band of ``physics.fourier``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from opustomo.physics.ctf import transfer_at, transfer_coefficients
from opustomo.physics.fourier import (
    band_index,
    band_multiplicity,
    both_halves,
    frequencies,
    from_band,
    irfft3,
    rfft3,
    to_band,
)
from opustomo.physics.geometry import euler_to_matrix
from opustomo.physics.volume import (
    centre_crop,
    centre_pad,
    sample_at,
    sample_cubic,
    sample_spline,
    spline_coefficients,
    turned_coordinates,
)

# of the linear reading: a spline falls to zero between slices of a thin set, where the numerator does not
LEAST_OF_LINEAR = 0.15
MIN_COVERAGE = 1e-3  # below this multiplicity a voxel says nothing: B = W = 0


@lru_cache(maxsize=16)
def _columns(size: int, axis: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Lines of the half transform along an axis: frequency with 0 on the axis (q, 3), place (q,), reach squared (q,).

    Places are flat; reach: how far on the axis the band goes.
    """
    k = frequencies(size, device).reshape(-1, 3)
    reach = (size / 2) ** 2 - k.square().sum(1)
    place = torch.nonzero((k[:, axis] == 0) & (reach > 0))[:, 0]
    return k[place], place, reach[place]


def _near_planes(
    size: int, tilts: Tensor, extent: float, matrix: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Every pair of a voxel and a tilt whose plane is within one voxel: voxel, tilt, linear kernel, CTF; (pairs,).

    Voxels are numbered in the half transform.  Along the axis that a plane is steepest to, no more than four voxels of
    a line are that near to it, so that lines are looked at and not voxels.
    """
    frames = euler_to_matrix(tilts[:, :3])  # (u, v, distance) = R_t k
    if matrix is not None:
        frames = frames @ matrix.to(frames)
    frames[:, :2] /= extent
    steepest, coefficients = frames[:, 2].abs().argmax(1), transfer_coefficients(tilts[:, 3:])
    strides = 1, size // 2 + 1, size * (size // 2 + 1)
    four = torch.arange(4, device=tilts.device, dtype=tilts.dtype)[:, None, None]
    for axis in range(3):
        chosen = torch.nonzero(steepest == axis)[:, 0]
        if len(chosen) == 0:
            continue
        columns, place, reach = _columns(size, axis, str(tilts.device))
        base, slope = frames[chosen] @ columns.T.to(frames), frames[chosen, :, axis]  # (T, 3, q), (T, 3)
        normal = slope[:, 2, None]
        height = (-base[:, 2] / normal).floor() - 1.0 + four  # (4, T, q)
        distance = (base[:, 2] + height * normal).abs()
        near = (distance < 1.0) & (height * height < reach)
        if axis == 0:
            near &= height >= 0  # the other half
        found = torch.nonzero(near.flatten())[:, 0]
        line = found % near[0].numel()
        which = line // len(place)
        tilt, h = chosen.index_select(0, which), height.flatten().index_select(0, found)
        u, v = (base[:, i].flatten().index_select(0, line) + h * slope[:, i].index_select(0, which) for i in (0, 1))
        contrast = transfer_at(u, v, (values.index_select(0, tilt) for values in coefficients))
        turns = h + size * (h < 0)  # of frequencies below zero
        voxel = place.index_select(0, line - which * len(place)) + turns.long() * strides[axis]
        yield voxel, tilt, 1.0 - distance.flatten().index_select(0, found), contrast


def insert_tilts(size: int, tilts: Tensor, extent: float, matrix: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Transfer h and multiplicity m of a tilt series on the band of a box of ``size``, read at ``matrix k``.

    tilts: (T, 13) rows as in data.particles.TILT_COLUMNS; extent: box edge in Angstrom, so that one Fourier voxel is
    1/extent; matrix: (3, 3) A for the consensus frame, None for the particle's own.
    Returns h = sum_t w_t c_t and m = sum_t w_t, (n,) each in the precision of the tilts, with the linear kernel
    ``w_t = 1 - |distance|`` to the tilt's plane and the CTF evaluated at each voxel's own in-plane coordinates.
    """
    sums = tilts.new_zeros(2, size * size * (size // 2 + 1))
    for voxel, _, kernel, contrast in _near_planes(size, tilts, extent, matrix):
        sums[0].index_add_(0, voxel, kernel * contrast)
        sums[1].index_add_(0, voxel, kernel)
    h, m = sums.index_select(1, band_index(size, tilts.device))
    return h, m


def insert_squares(size: int, tilts: Tensor, extent: float, noise: Tensor, matrix: Tensor | None = None) -> Tensor:
    """``sum_t w_t c_t^2 / s_t`` of tilt images that are kept apart, arguments as ``insert_tilts``: (n,).

    noise: (T,) noise power s_t of every image; a part that depends on |k| alone is for the caller.
    """
    total = tilts.new_zeros(size * size * (size // 2 + 1))
    for voxel, tilt, kernel, contrast in _near_planes(size, tilts, extent, matrix):
        total.index_add_(0, voxel, kernel * contrast.square() / noise.to(tilts).index_select(0, tilt))
    return total.index_select(0, band_index(size, tilts.device))


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
    points = turned_coordinates(crop, matrix, -origin).movedim(0, -1)
    return sample_spline(spline_coefficients(from_band(band, size)), points)


def rotate_weight(band: Tensor, matrix: Tensor, size: int, k: Tensor) -> Tensor:
    """Real, even weight (0 or more) on the band, read at ``A k`` by a cubic spline: (n,).

    For data sets that come with a CTF or weight volume; tilt series are evaluated directly by ``insert_tilts``.  Read
    linearly, the image that W makes of a density would fall off towards the box's edge once more: the slices in it have
    a linear kernel already.  Not below a part of what linear reading gives.
    band: (n,) real; matrix: (3, 3); k: (n, 3) frequencies of the consensus frame.
    """
    half = from_band(band, size)
    # k = 0 is outside the band, but its neighbours are read by interpolation
    half[0, 0, 0] = (half[1, 0, 0] + half[0, 1, 0] + half[0, 0, 1]) / 3.0
    centred, points = torch.fft.fftshift(both_halves(half)), k @ matrix.T.to(k)
    return torch.maximum(sample_cubic(centred, points), LEAST_OF_LINEAR * sample_at(centred, points))


def model_band(volume: Tensor, size: int) -> Tensor:
    """Transform of a cropped model volume on the band of the working box: (..., C, C, C) to (..., n) complex."""
    padded = centre_pad(volume, size)
    # volumes are centred on voxel size//2; the band's phases refer to voxel 0, as those of B do
    return to_band(rfft3(padded))


def band_volume(band: Tensor, size: int, crop: int) -> Tensor:
    """The inverse of ``model_band`` for what the band holds, cropped: (..., n) complex to (..., C, C, C)."""
    return centre_crop(irfft3(from_band(band, size)), crop)


def seen_through(volume: Tensor, weight: Tensor, size: int) -> Tensor:
    """``W V``, what the data show of a model volume: (..., C, C, C) and weights (..., n) to (..., C, C, C)."""
    return band_volume(model_band(volume, size) * weight, size, volume.shape[-1])


def model_band_adjoint(band: Tensor, size: int, crop: int) -> Tensor:
    """Gradient of a function of ``model_band(V)`` from that with respect to its result: (..., n) to (..., C, C, C)."""
    # the inverse counts a voxel and its mirror image, the band has one of them
    return band_volume(band / band_multiplicity(size, band.device), size, crop)


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
