"""From files to numerator and weight: what one particle says about any volume.

Owns: the reading of a subtomogram onto the working band, and its transfer function in either frame
(METHOD section 3).  The physics itself is in ``physics.observation``, the noise estimate in ``data.noise``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opustomo.data.mrc import LARGEST, read_volume
from opustomo.data.particles import Particles, refuse_most
from opustomo.data.readers import read_transfer_volume
from opustomo.data.stacks import observe_stack, read_stack
from opustomo.errors import UserError
from opustomo.machine import usable_cores
from opustomo.physics.fourier import (
    band_frequencies,
    fourier_resize,
    resize_spectrum,
    rfft3,
    to_band,
)
from opustomo.physics.grid import Grid
from opustomo.physics.observation import (
    MIN_COVERAGE,
    information,
    insert_tilts,
    matched_filter,
    resample_numerator,
    rotate_weight,
)
from opustomo.physics.volume import centre_crop


@dataclass(frozen=True)
class Noise:
    """Noise power of a data set on the working band, and what was found on the way.

    ``power`` is (n,) on the band, in the particle's frame: with tilt parameters the power per slice s (radial);
    with a transfer volume that of a voxel of the data (CTF volume) or of the data over the weight (weight volume);
    for tilt images the curve (radial) that multiplies the level of each image.
    """

    power: Tensor
    contrast: float  # factor on the grey values; +1: protein is bright in the files, -1: dark
    mean_normalised: bool  # r = 1/m: the file holds means over covering tilts
    explained: Tensor  # (M//2+1,) fraction of each shell's power that the consensus explains
    calibration: float = 1.0  # var of probe residuals over their expectation; 1 when nats are counted right
    contrast_sure: bool = True  # False: the sign is a guess, the user has to look at the average


def working_mask(mask: Tensor, grid: Grid) -> Tensor:
    """Solvent mask (N, N, N) on the working grid's crop: (C, C, C), clamped to [0, 1]."""
    return centre_crop(fourier_resize(mask, grid.working_box), grid.crop).clamp(0.0, 1.0)


def read_band(path: Path, grid: Grid) -> Tensor:
    """Transform of a subtomogram on the working band, (n,) complex, in density units of the working grid.

    Raises UserError for a box of another size, values that are not finite, or an empty box.
    """
    data, _ = read_volume(path)
    if data.shape != (grid.box,) * 3:
        raise UserError(f"{path}: box {'x'.join(map(str, data.shape))} where {grid.box} is expected; re-extract it")
    if not (np.abs(data) < LARGEST).all():
        raise UserError(
            f"{path}: NaN, infinite or absurdly large voxels; re-extract this subtomogram or remove its row"
        )
    if data.min() == data.max():
        raise UserError(f"{path}: empty box (every voxel is {data.flat[0]:g}); re-extract it or remove its row")
    spectrum = resize_spectrum(rfft3(torch.from_numpy(data)), grid.working_box)
    return to_band(spectrum) * (grid.working_box / grid.box) ** 1.5


@lru_cache(maxsize=64)
def transfer_band(path: Path, grid: Grid) -> Tensor:
    """A CTF or weight volume on the working band, (n,); few distinct files are shared by many particles."""
    half = torch.from_numpy(read_transfer_volume(path, grid.box))
    return to_band(resize_spectrum(half, grid.working_box))


def is_covered(transfer: Tensor) -> Tensor:
    """Where a transfer volume says anything at all."""
    return transfer.abs() > MIN_COVERAGE * transfer.abs().max()


def tilt_rows(particles: Particles, i: int) -> Tensor:
    """(T, 13) rows of the tilts of particle i that are not excluded; UserError if none is left."""
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
        h, m = insert_tilts(grid.working_box, tilt_rows(particles, i), grid.extent)
        if noise.mean_normalised:
            y = y * m
        return y * matched_filter(h, m, noise.power)
    transfer = transfer_band(particles.ctf_files[i], grid)
    gain = 1.0 / noise.power if particles.transfer == "weight_volume" else transfer / noise.power
    return y * torch.where(is_covered(transfer), gain, 0.0)


def _weight_band(particles: Particles, i: int, grid: Grid, noise: Noise, matrix: Tensor) -> Tensor:
    """W in the consensus frame on the band, (n,)."""
    if particles.transfer == "tilts":
        h, m = insert_tilts(grid.working_box, tilt_rows(particles, i), grid.extent, matrix)
        return information(h, m, noise.power)  # s is radial: the same in both frames
    transfer = transfer_band(particles.ctf_files[i], grid)
    top = transfer.clamp(min=0.0) if particles.transfer == "weight_volume" else transfer.square()
    weight = torch.where(is_covered(transfer), top / noise.power, 0.0)
    return rotate_weight(weight, matrix, grid.working_box, band_frequencies(grid.working_box))


def observe(particles: Particles, i: int, grid: Grid, noise: Noise, crop: int | None = None) -> tuple[Tensor, Tensor]:
    """Numerator (C, C, C) and weight (n,) of particle i in the consensus frame (METHOD section 4).

    Zeros, which say nothing, for a particle that cannot be used, with ``--damaged skip``.
    """
    with particles.looking_at(i):
        return _observe(particles, i, grid, noise, crop)
    return torch.zeros((crop or grid.crop,) * 3), torch.zeros(len(noise.power))


def sound(particles: Particles, rows: Sequence[int], grid: Grid) -> list[int]:
    """Those of ``rows`` that can be used, which are read for it; all with ``--damaged stop``.

    UserError where most cannot.
    """
    if particles.faults is None:
        return list(rows)
    good = []
    for i in rows:
        with particles.looking_at(i):
            if particles.stacks:
                read_stack(particles, i, grid)
            else:
                read_band(particles.image_files[i], grid)
                _ = (
                    tilt_rows(particles, i)
                    if particles.transfer == "tilts"
                    else transfer_band(particles.ctf_files[i], grid)
                )
            good.append(i)
    refuse_most(len(rows) - len(good), len(rows), particles.source, particles.faults)
    return good


def _observe(particles: Particles, i: int, grid: Grid, noise: Noise, crop: int | None) -> tuple[Tensor, Tensor]:
    matrix, origin = _pose(particles, i, grid)
    if particles.stacks:
        stack = read_stack(particles, i, grid)
        numerator, weight = observe_stack(
            stack, particles.premultiplied, matrix, origin, grid, noise.power, crop or grid.crop
        )
        return numerator * noise.contrast, weight
    band = _numerator_band(particles, i, grid, noise)
    numerator = resample_numerator(band, matrix, origin, grid.working_box, crop or grid.crop)
    return numerator, _weight_band(particles, i, grid, noise, matrix)


def sample_rows(count: int, size: int) -> np.ndarray:
    """At most ``size`` row numbers spread evenly over the file (every tomogram takes part)."""
    return np.unique(np.linspace(0, count - 1, min(count, size)).round().astype(np.int64))


@contextmanager
def one_thread_each() -> Iterator[None]:
    """One torch thread per caller: a particle's own transforms are too small to be worth splitting."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def observe_all(
    particles: Particles,
    rows: Sequence[int],
    grid: Grid,
    noise: Noise,
    workers: int = 0,
    crop: int | None = None,
    then: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(row, numerator, weight) of many particles in order, made by ``workers`` threads (0: all cores).

    then: what to do with a row, in the thread that made it.
    """

    def make(i: int) -> tuple[int, Tensor, Tensor]:
        numerator, weight = observe(particles, i, grid, noise, crop)
        if then is not None:
            then(i, numerator, weight)
        return i, numerator, weight

    cores = usable_cores()
    count = min(workers or cores, cores)
    # torch keeps the number of threads per thread: every worker is told, so that bits do not depend on the machine
    with one_thread_each(), ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for start in range(0, len(rows), 64):  # bounded, so that a slow consumer does not fill the memory
            yield from pool.map(make, rows[start : start + 64])
