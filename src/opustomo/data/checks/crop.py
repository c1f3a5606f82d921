"""Owns: what mask and sizes make of a run: the crop, the files it writes, its memory and its time, roughly."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import binary_erosion
from torch import Tensor

from opustomo.config import GridOptions, TrainConfig
from opustomo.data.cache import row_bytes
from opustomo.data.findings import Finding, megabytes
from opustomo.data.inputs import read_mask
from opustomo.data.particles import Particles
from opustomo.errors import UserError
from opustomo.machine import usable_cores
from opustomo.physics.fourier import band_index
from opustomo.physics.grid import Grid, make_grid, mask_extent

# CPU-seconds per particle and step, forward and backward, of the default CPU network (a quarter of the full width),
# by size of the decoder's volume; measured on two cores.
_STEP_SECONDS = {32: 0.015, 48: 0.04, 64: 0.09, 96: 0.2, 128: 0.4, 160: 0.75, 192: 1.3, 256: 3.0}
# CPU-seconds per particle at a working box of 32; rows are made three times: at the poses given and in two rounds
_CACHE_SECONDS, _LINEAR_SECONDS = 3 * 0.025, 0.07
_ACTIVATIONS_GB = 0.13  # per particle of a batch, decoder of 128, a quarter of the full width
_PROGRAM_GB, _LINEAR_COLUMNS = 0.8, 13


def mask_findings(options: GridOptions, box: int, pixel_size: float) -> tuple[list[Finding], Tensor]:
    """Findings about the mask and the mask (N, N, N) itself: the default sphere where there is none or it is unfit."""
    if options.mask is None:
        found = "none given: a sphere of 0.4 box with a soft edge is used"
        action = "`opustomo average` proposes one that fits: a tighter mask is faster and less noisy"
        return [Finding("note", "mask", found, action)], read_mask(None, box, pixel_size)
    try:
        mask = read_mask(options.mask, box, pixel_size)
    except UserError as error:
        return [Finding("error", "mask", str(error), "the sizes below are for a sphere")], read_mask(
            None, box, pixel_size
        )
    return _mask(mask, pixel_size), mask


def _mask(mask: Tensor, pixel_size: float) -> list[Finding]:
    box = mask.shape[-1]
    inside = mask.numpy() > 0.5
    edge = _edge_width(mask, inside)
    reach = mask_extent(mask)
    centre = np.array([axis.mean() for axis in np.nonzero(inside)])[::-1] - box // 2
    values = {
        "fraction": round(float(mask.mean()), 4),
        "edge_voxels": round(edge, 1),
        "reach_voxels": reach,
        "off_centre_voxels": [round(float(value), 1) for value in centre],
    }
    found = f"{float(mask.mean()):.0%} of the box, reaches {reach * pixel_size:.0f} A from its centre"
    findings = [Finding("ok", "mask", f"{found}; soft edge of about {edge:.0f} voxels", values=values)]
    if edge < 1.5:
        findings = [
            Finding("ok", "mask", found, values=values),
            Finding("warning", "mask edge", "hard", "used as it is; a soft edge of 3 to 6 voxels avoids ringing"),
        ]
    faces = torch.cat([mask.select(axis, index).flatten() for axis in range(3) for index in (0, box - 1)])
    if float(faces.max()) > 1e-3:
        action = "make the mask smaller or extract in a larger box: the model wraps around"
        findings.append(Finding("warning", "mask edge", "touches the edge of the box", action))
    if np.abs(centre).max() > 0.06 * box:
        found = f"its centre is {', '.join(f'{c * pixel_size:.0f}' for c in centre)} A (x, y, z) off the box centre"
        action = "the crop must be larger for it; re-centre the particles on the mask to save time"
        findings.append(Finding("note", "mask centre", found, action))
    return findings


def _edge_width(mask: Tensor, inside: np.ndarray) -> float:
    """Voxels between 0.02 and 0.98 over the voxels of the surface."""
    soft = int(((mask > 0.02) & (mask < 0.98)).sum())
    surface = int((inside & ~binary_erosion(inside)).sum())
    return soft / max(surface, 1)


def grid_findings(options: GridOptions, mask: Tensor, pixel_size: float) -> tuple[list[Finding], Grid | None]:
    """The working box and crop that follow; None where --downfrac leaves none."""
    box = mask.shape[-1]
    try:
        grid = make_grid(box, pixel_size, options.downfrac, mask_extent(mask))
    except ValueError as error:
        return [Finding("error", "working box", str(error), "change --downfrac")], None
    values = {
        "working_box": grid.working_box,
        "working_pixel": round(grid.working_pixel, 4),
        "crop": grid.crop,
        "templateres": grid.templateres,
    }
    found = (
        f"{box}^3 at {pixel_size:g} A becomes {grid.working_box}^3 at {grid.working_pixel:.4g} A "
        f"(finest detail {2 * grid.working_pixel:.3g} A, --downfrac {options.downfrac:g})"
    )
    if grid.crop < grid.working_box:
        crop = f"the mask lets it be cut to {grid.crop}^3"
    else:
        crop = "the mask reaches too far to cut any of it off"
    return [
        Finding("ok", "working box", found, values=values),
        Finding("ok", "crop", f"{crop}; decoder {grid.templateres}^3"),
    ], grid


def cost_findings(particles: Particles, grid: Grid) -> list[Finding]:
    """Disk, memory and time of a default CPU training run; rough figures."""
    defaults = TrainConfig(particles.source, particles.source)
    count, cores = len(particles), usable_cores()
    disk = count * row_bytes(grid)
    scale = (grid.working_box / 32) ** 3
    prepare = count * (_CACHE_SECONDS + _LINEAR_SECONDS) * scale
    step = float(np.interp(grid.templateres, list(_STEP_SECONDS), list(_STEP_SECONDS.values())))
    train = count * defaults.epochs * step
    # the linear stage holds a symmetric matrix per Fourier voxel, its inverse and a copy
    linear = 3 * len(band_index(grid.working_box)) * _LINEAR_COLUMNS**2 * 4 / 1e9
    memory = _PROGRAM_GB + max(linear, defaults.batch * _ACTIVATIONS_GB * (grid.templateres / 128) ** 3)
    values = {
        "cache_bytes": disk,
        "memory_gb": round(memory, 2),
        "linear_cpu_seconds": round(prepare),
        "train_cpu_seconds": round(prepare + train),
    }
    return [
        Finding("ok", "disk", f"the cache of numerators and weights takes about {megabytes(disk)}", values=values),
        Finding("ok", "memory", f"about {memory:.1f} GB for training on CPUs with batches of {defaults.batch}"),
        Finding("ok", "time, linear", f"about {_duration(prepare / cores)} on the {cores} cores here"),
        Finding(
            "ok",
            "time, train",
            f"about {_duration((prepare + train) / cores)} for {defaults.epochs} epochs on the {cores} cores here "
            f"({step:.2g} CPU-s per particle and epoch)",
        ),
    ]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
