"""From options to rows: threads, cache and split, the common start of ``linear`` and ``train``; the verb ``cache``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.config import CacheConfig, InputOptions
from opustomo.data.cache import Cache, OnTheFly, Row, prepare_cache, rows_without_disk
from opustomo.data.inputs import Inputs, read_inputs
from opustomo.data.noise import estimate_noise
from opustomo.monitor import progress
from opustomo.reconstruct import Rows

log = logging.getLogger("opustomo")


def set_threads(workers: int) -> None:
    """Use ``workers`` threads (0: torch's choice, the cores this process may use or OMP_NUM_THREADS)."""
    if workers:
        torch.set_num_threads(workers)


def make_split(count: int, seed: int) -> NDArray[np.int64]:
    """A permutation of the rows; its first part trains."""
    return np.random.default_rng(seed).permutation(count).astype(np.int64)


def rows_of(inputs: Inputs, folder: Path | None, options: InputOptions, workers: int) -> Rows:
    """Numerators and weights of a data set: the cache in ``folder``, made or finished if need be; None: no disk."""
    particles, grid, mask = inputs.particles, inputs.grid, inputs.mask
    contrast, normalisation = options.contrast, options.normalisation

    def bar(items: Iterable[Row], total: int) -> Iterable[Row]:
        return progress(items, total, "cache")

    cache: Cache | OnTheFly
    if folder is None:
        found = estimate_noise(particles, grid, mask, contrast=contrast, normalisation=normalisation, workers=workers)
        cache = rows_without_disk(particles, grid, found, workers, bar)
    else:
        cache = prepare_cache(
            folder,
            particles,
            grid,
            mask,
            contrast=contrast,
            normalisation=normalisation,
            workers=workers,
            progress=bar,
        )
    noise = cache.noise
    log.info(
        "%d particles on a working box of %d (%.2f A), crop %d; protein is %s, tilts %s, noise calibration %.2f",
        len(cache), grid.working_box, grid.working_pixel, grid.crop, "bright" if noise.contrast > 0 else "dark",
        "averaged" if noise.mean_normalised else "as in the file", noise.calibration,
    )  # fmt: skip
    return cache


def main(config: CacheConfig) -> int:
    """``opustomo cache``."""
    set_threads(config.workers)
    inputs = read_inputs(config.star, config.input, config.grid)
    rows_of(inputs, config.output, config.input, config.workers)
    return 0
