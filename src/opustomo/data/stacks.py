"""Stacks of tilt images: what the images of one particle say about any volume, and how noisy they are.

Owns: the noise of an image, its own level times a curve that all share (METHOD section 3's ``s_t``).  The level comes
from the image itself, above half of the working Nyquist where there is hardly any signal: thick and thin places,
doses and the scales of tilt series differ.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opustomo.data.mrc import read_slices
from opustomo.data.particles import Particles
from opustomo.errors import UserError
from opustomo.physics.geometry import euler_to_matrix
from opustomo.physics.grid import Grid
from opustomo.physics.images import (
    backproject,
    image_radius,
    image_shells,
    image_spectra,
    image_transfer,
    inside_band,
    radial_image,
)
from opustomo.physics.observation import insert_squares

LEVEL_FROM = 0.25  # of the working box: half of Nyquist


class Stack(NamedTuple):
    """The tilt images of one particle on the working band."""

    tilts: Tensor  # (T, 13)
    shifts: Tensor  # (T, 2) working pixels
    spectra: Tensor  # (T, M, M//2+1) complex, in density units of the working grid
    transfer: Tensor  # (T, M, M//2+1) CTF c
    coverage: Tensor  # (T, M, M//2+1) what the noise power is proportional to: c^2 of premultiplied images, else 1
    level: Tensor  # (T,) noise power of each image


def read_stack(particles: Particles, i: int, grid: Grid) -> Stack:
    """The images of particle i; an image of one grey value says nothing and is left out.

    UserError: another size, values that are not finite, no image left.
    """
    rows, path = particles.tilt_index(i), particles.image_files[i]
    images = read_slices(path, particles.slices[rows]) if len(rows) else np.zeros((0, grid.box, grid.box), np.float32)
    if images.shape[1:] != (grid.box,) * 2:
        size = f"{images.shape[2]} x {images.shape[1]}"
        raise UserError(f"{path}: images of {size} pixels where {grid.box} are expected; extract the particle again")
    finite = np.isfinite(images).all((1, 2))
    if not finite.all():
        number = particles.slices[rows][~finite][0] + 1
        raise UserError(f"{path}: image {number} has NaN or infinite pixels; extract this particle again or remove it")
    shown = np.ptp(images, (1, 2)) > 0
    images, rows = images[shown], rows[shown]
    if len(rows) == 0:
        raise UserError(
            f"{path}: particle {particles.names[i]} ({particles.source}): every image is empty or excluded; remove it"
        )
    tilts = torch.from_numpy(particles.tilts[rows]).float()
    spectra = image_spectra(torch.from_numpy(images), grid.working_box)
    transfer = image_transfer(tilts, grid.working_box, grid.extent)
    coverage = (
        transfer.square() if particles.premultiplied else inside_band(grid.working_box).float().expand_as(transfer)
    )
    outer = image_radius(grid.working_box) > LEVEL_FROM * grid.working_box
    level = (spectra.abs().square() * outer).sum((1, 2)) / (coverage * outer).sum((1, 2)).clamp(min=1e-12)
    shifts = torch.from_numpy(particles.tilt_shifts[rows]).float() * (grid.working_box / grid.box)
    return Stack(tilts, shifts, spectra, transfer, coverage, level.clamp(min=1e-30))


def observe_stack(
    stack: Stack, premultiplied: bool, matrix: Tensor, origin: Tensor, grid: Grid, power: Tensor, crop: int
) -> tuple[Tensor, Tensor]:
    """Numerator (crop,) * 3 and weight (n,) in the consensus frame.

    matrix: (3, 3) A; origin: (3,) working voxels; power: (n,) the common noise curve on the band, over the levels.
    """
    filtered = stack.spectra if premultiplied else stack.spectra * stack.transfer
    filtered = filtered / (stack.level[:, None, None] * radial_image(power, grid.working_box))
    frames = euler_to_matrix(stack.tilts[:, :3])[:, :2]
    numerator = backproject(filtered, frames @ matrix, stack.shifts + frames @ origin, crop)
    return numerator, insert_squares(grid.working_box, stack.tilts, grid.extent, stack.level, matrix) / power


def stack_power(stack: Stack) -> tuple[Tensor, Tensor, Tensor]:
    """Over shells (M//2+1,): power of the images over their levels, the coverage it is proportional to, the pixels."""
    power = image_shells(stack.spectra.abs().square() / stack.level[:, None, None]).sum(0)
    return power, image_shells(stack.coverage).sum(0), image_shells(torch.ones_like(stack.coverage)).sum(0)
