"""From options to rows: threads and cache, the common start of ``linear`` and ``train``; the verb ``cache``."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from opustomo.config import CacheConfig, InputOptions
from opustomo.data.atomic import write_csv
from opustomo.data.cache import Cache, OnTheFly, Row, fingerprint, prepare_cache, rows_without_disk
from opustomo.data.inputs import Inputs, read_inputs
from opustomo.data.noise import estimate_noise
from opustomo.data.observe import Noise
from opustomo.data.particles import Particles
from opustomo.data.poses import moved_from, same_poses
from opustomo.errors import UserError
from opustomo.machine import usable_cores
from opustomo.monitor import progress
from opustomo.physics.grid import Grid
from opustomo.reconstruct import Rows

log = logging.getLogger("opustomo")

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def prepare_process(workers: int, deterministic: bool = False) -> None:
    """Use ``workers`` threads (0: torch's choice, the cores this process may use or OMP_NUM_THREADS).

    More threads than cores only wait for each other: they are cut to those that batch system and container leave.
    Raises UserError below 0.
    deterministic: torch takes no operation whose result depends on the order in which a GPU happens to add.
    Freed memory is kept for the next batch: fetching fresh pages took a quarter of the CPU time (docs/experiments.md).
    """
    if workers < 0:
        raise UserError(f"--workers {workers}: must be at least 0; 0 or leaving it out uses all cores")
    cores = usable_cores()
    if workers > cores:
        log.info("--workers %d: %d core(s) may be used here, so as many threads are", workers, cores)
    torch.set_num_threads(min(workers or torch.get_num_threads(), cores))
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    with suppress(OSError, AttributeError):  # another C library than glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


@dataclass
class RowMaker:
    """Makes numerators and weights of ``inputs`` at the poses that its particles have or will get.

    The rows are the cache in ``folder``, made or finished if need be; None: no disk.  At the poses of ``inputs`` it is
    the one in ``shared`` instead, where given: other runs may read it, so it never gets other poses.  The noise model
    is estimated once unless given, so that evidences at different poses can be compared.
    """

    inputs: Inputs
    folder: Path | None
    options: InputOptions
    workers: int
    shared: Path | None = None
    noise: Noise | None = None
    hold: bool = True  # keep the rows of a small set in memory: fits read them many times
    place: Path | None = None  # of the rows made last

    @property
    def noise_model(self) -> Noise:
        """Of the rows made so far."""
        assert self.noise is not None
        return self.noise

    def __call__(self, particles: Particles) -> Rows:
        """Rows of ``particles``: those of ``inputs``, perhaps at other poses."""
        grid, mask, first = self.inputs.grid, self.inputs.mask, self.noise is None
        options = self.options

        def noise() -> Noise:
            return self.noise or estimate_noise(
                particles, grid, mask, contrast=options.contrast, normalisation=options.normalisation,
                workers=self.workers,
            )  # fmt: skip

        unmoved = same_poses(particles, self.inputs.particles)
        folder = self.shared if self.shared is not None and unmoved else self.folder
        cache: Cache | OnTheFly
        if folder is None:
            cache = rows_without_disk(particles, grid, noise(), self.workers, _bar)
        else:
            mark = fingerprint(particles, grid, self.inputs.mask_mark, (options.contrast, options.normalisation))
            cache = prepare_cache(folder, particles, grid, noise, mark, self.workers, _bar)
        if self.hold and isinstance(cache, Cache):
            cache.hold()
        self.noise, self.place = cache.noise, folder
        if first:
            tell(len(cache), grid, cache.noise)
        cache.moved = moved_from(particles, self.inputs.particles, grid)
        return cache


def tell(count: int, grid: Grid, noise: Noise) -> None:
    """A line about particles, sizes and noise; a warning where the contrast is a guess."""
    log.info(
        "%d particles on a working box of %d (%.2f A), crop %d; protein is %s, tilts %s, noise calibration %.2f",
        count, grid.working_box, grid.working_pixel, grid.crop, "bright" if noise.contrast > 0 else "dark",
        "averaged" if noise.mean_normalised else "as in the file", noise.calibration,
    )  # fmt: skip
    if not noise.contrast_sure:
        log.warning(
            "contrast %s is a guess: look at `opustomo average`; where protein is dark give --contrast %s",
            *(("white", "black") if noise.contrast > 0 else ("black", "white")),
        )


def name_damaged(particles: Particles, folder: Path) -> None:
    """A warning about the particles that were found not to be usable, and ``folder``/damaged.csv with all of them."""
    bad, faults = np.flatnonzero(~particles.usable), particles.faults or {}
    path = folder / "damaged.csv"
    if len(bad) == 0:
        path.unlink(missing_ok=True)
        return
    rows = ((i + 1, particles.image_files[i], faults[particles.names[i]]) for i in bad)
    write_csv(path, ["row", "file", "reason"], rows)
    first = ", ".join(str(i + 1) for i in bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    log.warning(
        "%d of %d particles cannot be used (rows %s): left out of the fits, their codes say nothing; reasons: %s",
        len(bad), len(particles), first, path,
    )  # fmt: skip


def _bar(items: Iterable[Row], total: int) -> Iterable[Row]:
    return progress(items, total, "cache")


def main(config: CacheConfig) -> int:
    """``opustomo cache``."""
    prepare_process(config.workers)
    inputs = read_inputs(config.star, config.input, config.grid, cache=config.output)
    RowMaker(inputs, config.output, config.input, config.workers)(inputs.particles)
    name_damaged(inputs.particles, config.output)
    return 0
