"""From options to particles, mask and grid: the same first step of every verb that reads a data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opustomo.config import GridOptions, InputOptions
from opustomo.data.cache import CTF_PACK, hash_mask, is_free
from opustomo.data.mrc import read_volume
from opustomo.data.observe import working_mask
from opustomo.data.particles import Particles
from opustomo.data.pickles import load_poses
from opustomo.data.poses import with_poses
from opustomo.data.readers import particles_of
from opustomo.data.readers.source import read_source
from opustomo.data.species import with_species
from opustomo.errors import UserError
from opustomo.physics.grid import Grid, make_grid, mask_extent
from opustomo.physics.volume import spherical_mask

LEAST_MASK = 100  # voxels: fewer hold no molecule


@dataclass(frozen=True)
class Inputs:
    """A data set ready for work: particles, the sizes of the run and the mask on the working grid (C, C, C)."""

    particles: Particles
    grid: Grid
    mask: Tensor
    mask_mark: str  # of the voxels it was made of: see data.cache.hash_mask


def read_mask(path: Path | None, box: int, pixel_size: float) -> Tensor:
    """Solvent mask (N, N, N) in [0, 1]; without a path a sphere of 0.4 box with a soft edge.

    Raises UserError for another box or pixel size, values outside [0, 1] and a mask that is empty or a speck.
    """
    if path is None:
        return spherical_mask(box, 0.4 * box, 0.08 * box)
    if not path.exists():
        raise UserError(f"{path}: no such mask; check the name after -r (--mask)")
    data, pixel = read_volume(path)
    if data.shape != (box,) * 3:
        shape = "x".join(map(str, data.shape))
        raise UserError(f"{path}: mask of {shape} voxels where the subtomograms have {box}; make it from their average")
    # headers of masks are often left at 1 or 0, which says nothing
    if pixel > 0 and abs(pixel - 1.0) > 1e-3 and abs(pixel / pixel_size - 1.0) > 0.01:
        raise UserError(
            f"{path}: mask pixel size {pixel:g} A where the subtomograms have {pixel_size:g} A; resample it"
        )
    if bad := int((~np.isfinite(data)).sum()):
        raise UserError(f"{path}: the mask has NaN or infinite values ({bad} voxels); make it again")
    if data.min() < -0.01 or data.max() > 1.01:
        raise UserError(
            f"{path}: mask values span {data.min():.3g} to {data.max():.3g}, expected 0 to 1; make a mask, not a map"
        )
    if data.max() < 0.1:
        raise UserError(f"{path}: the mask is empty (largest value {data.max():.3g}); `opustomo average` proposes one")
    if (covered := int((data > 0.5).sum())) < LEAST_MASK:
        raise UserError(
            f"{path}: the mask covers only {covered} voxels (values above 0.5), which hold no molecule; "
            "`opustomo average` proposes one"
        )
    return torch.from_numpy(data).clamp(0.0, 1.0)


def read_inputs(
    star: Path,
    options: InputOptions,
    sizes: GridOptions,
    templateres: int = 0,
    cache: Path | None = None,
    poses: Path | None = None,
) -> Inputs:
    """Particles of ``star`` with mask and grid.  Raises UserError for anything a user can mend.

    cache: folder of the cache, which also keeps the CTF STARs packed (None: they are parsed every time); poses: a pose
    pickle, or a species of M, instead of the poses in ``star``.
    """
    source = read_source(star, options.format, options.datadir)
    pack = cache / CTF_PACK if cache is not None and is_free(cache) else None
    particles = particles_of(source, star, options, pack)
    if poses is not None and poses.suffix.lower() == ".star":
        particles = with_species(particles, source, poses, options.datadir)
    elif poses is not None:
        particles = with_poses(particles, *load_poses(poses))
    mask = read_mask(sizes.mask, particles.box, particles.pixel_size)
    try:
        grid = make_grid(particles.box, particles.pixel_size, sizes.downfrac, mask_extent(mask), templateres)
    except ValueError as error:
        raise UserError(f"{error}; change --downfrac") from None
    # the sphere that stands in for a mask follows from the sizes
    mark = "sphere" if sizes.mask is None else hash_mask(mask)
    return Inputs(particles, grid, working_mask(mask, grid), mark)
