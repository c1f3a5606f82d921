"""Tilt images: transforms, CTF and the back-projection that makes a numerator of them (METHOD section 3).

Owns: the 2-D half transform (..., M, M//2+1) with frequencies (u, v), v along rows, and its units: by the projection
theorem the transform of an image is a plane of the volume's, so an image is in density units of the working grid.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from opustomo.physics.ctf import contrast_transfer
from opustomo.physics.fourier import from_band
from opustomo.physics.volume import turned_coordinates

# images are enlarged by this before they are read linearly: the kernel's error that is left is below 1e-3 of the power
FINER = 4
MOST_READINGS = 1 << 21  # at once: bounds the memory


@lru_cache(maxsize=8)
def image_frequencies(size: int) -> Tensor:
    """(size, size//2+1, 2) integer frequencies (u, v) of the half transform of an image."""
    v, u = torch.meshgrid(torch.fft.fftfreq(size, 1.0 / size), torch.arange(size // 2 + 1.0), indexing="ij")
    return torch.stack([u, v], -1)


@lru_cache(maxsize=8)
def image_radius(size: int) -> Tensor:
    """(size, size//2+1) length of every frequency."""
    return image_frequencies(size).norm(dim=-1)


def inside_band(size: int) -> Tensor:
    """(size, size//2+1) whether 0 < |k| < size/2, as in the band of volumes."""
    radius = image_radius(size)
    return (radius > 0) & (radius < size / 2)


def image_spectra(images: Tensor, size: int) -> Tensor:
    """Transforms (T, size, size//2+1) of images (T, N, N), in the units in which a volume's are on a box of ``size``.

    Ortho transforms, zero outside the band.  A projection sums N voxels: its ortho transform is sqrt(N) times the
    plane of the volume's; density is kept under cropping by (size/N)^(3/2).
    """
    n, half = images.shape[-1], size // 2
    whole = torch.fft.rfft2(images, norm="ortho")
    out = whole.new_zeros((*images.shape[:-2], size, half + 1))
    out[..., :half, :half], out[..., size - half + 1 :, :half] = (
        whole[..., :half, :half],
        whole[..., n - half + 1 :, :half],
    )
    return torch.where(inside_band(size), out * ((size / n) ** 1.5 / math.sqrt(n)), 0.0)


def image_transfer(tilts: Tensor, size: int, extent: float) -> Tensor:
    """CTF of every tilt image (T, size, size//2+1), 0 outside the band.

    tilts: (T, 13) rows as in data.particles.TILT_COLUMNS; extent: box edge in Angstrom.
    """
    u, v = (image_frequencies(size) / extent).unbind(-1)
    contrast = contrast_transfer(u, v, tilts[:, None, None, 3:])
    return torch.where(inside_band(size), contrast, 0.0)


def image_shells(values: Tensor) -> Tensor:
    """Sum of a real quantity (..., M, M//2+1) over the band's shells, both halves counted: (..., M//2+1)."""
    size = values.shape[-2]
    shell = image_radius(size).round().long().flatten()
    twice = torch.where(image_frequencies(size)[..., 0] > 0, 2.0, 1.0) * inside_band(size)
    return values.new_zeros((*values.shape[:-2], size // 2 + 1)).index_add(
        -1, shell.clamp(max=size // 2), (values * twice).flatten(-2)
    )


def radial_image(band: Tensor, size: int) -> Tensor:
    """A radial quantity on the band of volumes (n,), evaluated at the frequencies of an image: (size, size//2+1)."""
    curve = from_band(band, size)[0, 0].clone()
    curve[0], curve[-1] = curve[1], curve[-2]  # neither is in the band
    radius = image_radius(size).clamp(max=size // 2)
    low = radius.floor().long()
    return torch.lerp(curve[low], curve[(low + 1).clamp(max=size // 2)], radius - low)


def backproject(spectra: Tensor, frames: Tensor, shifts: Tensor, crop: int) -> Tensor:
    """The adjoint of projection: every voxel of the volume is the sum over tilts of the image's value below it.

    spectra: (T, M, M//2+1) of images that are weighted by CTF and noise; frames: (T, 2, 3) rows u and v in the frame
    of the volume; shifts: (T, 2) of the images' content, working pixels; crop: voxels along an edge of the volume.
    Returns (crop, crop, crop), in the units of ``physics.observation``; 0 where an image ends.
    """
    size, fine = spectra.shape[-2], FINER * spectra.shape[-2]
    half = size // 2
    # linear reading multiplies by sinc^2: divided out beforehand
    damping = torch.sinc(image_frequencies(size) / fine).square().prod(-1)
    padded = spectra.new_zeros((len(spectra), fine, half))  # beyond, all columns are zero
    sharp = spectra / damping
    padded[:, :half], padded[:, fine - half + 1 :] = sharp[:, :half, :half], sharp[:, half + 1 :, :half]
    images = torch.fft.irfft(torch.fft.ifft(padded, dim=1, norm="ortho"), fine, norm="ortho") * FINER
    voxels = crop**3
    total, step = spectra.real.new_zeros(voxels), max(1, MOST_READINGS // voxels)
    # positions from -1 to 1, as grid_sample counts them
    scale = 2.0 * FINER / (fine - 1)
    axes, start = frames * scale, (half - shifts) * scale - 1.0
    for part in (slice(first, first + step) for first in range(0, len(images), step)):
        unit = turned_coordinates(crop, axes[part], start[part]).reshape(-1, 1, 2, voxels).mT
        read = functional.grid_sample(images[part, None], unit, align_corners=True, padding_mode="zeros")
        total += read.sum((0, 1, 2))
    return (total / math.sqrt(size)).reshape((crop,) * 3)
