"""The sizes of a run: subtomogram, working box, crop and template, computed in one place.

Owns: METHOD section 4, grid geometry.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

INSIDE = 1e-3  # of a mask: voxels below do not count


class Grid(NamedTuple):
    """Sizes in voxels; all boxes are even cubes whose centre is voxel ``size // 2``."""

    box: int  # N, the subtomogram
    pixel_size: float  # a0, Angstrom
    working_box: int  # M, Fourier working box: band |k| < M/2
    crop: int  # C, model volume on the working pitch
    templateres: int  # T, the decoder's volume over the same extent as the crop

    @property
    def working_pixel(self) -> float:
        """Pitch of the working grid in Angstrom, a = a0 N / M."""
        return self.pixel_size * self.box / self.working_box

    @property
    def extent(self) -> float:
        """Edge of the subtomogram in Angstrom: one Fourier voxel is 1 / extent."""
        return self.pixel_size * self.box

    def start(self, pixel: float, size: int) -> tuple[float, float, float]:
        """Where voxel 0 of a map lies, in Angstrom (x, y, z), when voxel 0 of the consensus map is at 0.

        Centre voxels lie on each other; the map has ``size`` voxels of ``pixel`` Angstrom.
        """
        place = (self.box // 2) * self.pixel_size - (size // 2) * pixel
        return place, place, place


def working_size(box: int, downfrac: float) -> int:
    """M = 2 floor(N downfrac / 2); raises ValueError if downfrac is outside (0, 1] or M < 8."""
    if not 0.0 < downfrac <= 1.0:
        raise ValueError(f"downfrac {downfrac:g} is outside (0, 1]")
    size = 2 * math.floor(box * downfrac / 2 + 1e-9)
    if size < 8:
        raise ValueError(f"downfrac {downfrac:g} leaves a working box of {size} voxels; at least 8 are needed")
    return size


def mask_extent(mask: Tensor) -> int:
    """Largest distance in voxels, along an axis, of a voxel above ``INSIDE`` from voxel N//2.

    mask: (N, N, N).  Raises ValueError if there is none.
    """
    inside = torch.nonzero(mask > INSIDE)
    if inside.numel() == 0:
        raise ValueError("the mask is empty")
    return int((inside - mask.shape[-1] // 2).abs().max())


def crop_size(extent: float, margin: float, limit: int) -> int:
    """Smallest even size >= 2 (extent + margin), at most ``limit``; lengths in working voxels."""
    return min(2 * math.ceil(extent + margin - 1e-6), limit)


def template_size(crop: int) -> int:
    """The multiple of 16 at or above the crop."""
    return 16 * math.ceil(crop / 16)


def make_grid(box: int, pixel_size: float, downfrac: float, extent: float, templateres: int = 0) -> Grid:
    """Grid for a mask that reaches ``extent`` input voxels from the centre (see ``mask_extent``).

    The margin is 2 voxels for interpolation and 2 for pose corrections (about 1 voxel of shift and a few degrees
    at the rim).
    """
    size = working_size(box, downfrac)
    crop = crop_size(extent * size / box, 4.0, size)
    return Grid(box, pixel_size, size, crop, templateres or template_size(crop))
