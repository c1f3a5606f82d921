"""The verb ``average``: consensus map, half maps, FSC and a proposed mask, from the data alone.

Owns: the sanity check before training.  If this map is not the molecule, nothing later will be.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from opustomo.analysis import plots
from opustomo.config import AverageConfig, GridOptions
from opustomo.data.atomic import write_csv
from opustomo.data.inputs import read_inputs
from opustomo.data.mrc import write_volume
from opustomo.data.noise import estimate_noise
from opustomo.data.observe import Noise, observe_all
from opustomo.data.particles import Particles, particle_numbers
from opustomo.errors import UserError
from opustomo.mask import automatic, solvent_mask
from opustomo.monitor import progress, setup_log
from opustomo.physics.fourier import band_frequencies, fourier_resize, radial, shell_sum
from opustomo.physics.grid import Grid
from opustomo.physics.volume import centre_pad, fourier_shell_correlation
from opustomo.preparation import name_damaged, prepare_process
from opustomo.reconstruct import wiener

log = logging.getLogger("opustomo")

FEW = 10  # particles, below which half maps of noise can agree


def half_sets(particles: Particles) -> np.ndarray:
    """0 or 1 per particle: the file's random subsets, or alternate particles where it has none."""
    if set(np.unique(particles.half)) >= {1, 2}:
        return np.where(particles.half == 2, 1, 0)
    return particle_numbers(particles.names) % 2


def half_totals(
    particles: Particles, grid: Grid, noise: Noise, share: Tensor, half: np.ndarray, workers: int
) -> tuple[Tensor, Tensor]:
    """Sums over particles with shares (c, P): numerators (c, 2, M, M, M) and weights (c, 2, n) of two half sets.

    half: (P,) 0 or 1.  On the whole working box; one pass over the subtomograms that take part.
    """
    size, used = grid.working_box, torch.nonzero(share.amax(0) > 0)[:, 0].tolist()
    numerator = torch.zeros(len(share), 2, size, size, size)
    weight = torch.zeros(len(share), 2, len(band_frequencies(size)))
    made = observe_all(particles, used, grid, noise, workers, crop=size)
    for i, b, w in progress(made, len(used), "average"):
        for c in torch.nonzero(share[:, i])[:, 0].tolist():
            numerator[c, half[i]] += share[c, i] * b
            weight[c, half[i]] += share[c, i] * w
    return numerator, weight


def half_maps(numerator: Tensor, weight: Tensor, size: int, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half maps (2, M, M, M), the full map filtered by their FSC, and the masked FSC (M//2+1,)."""
    ones = torch.ones_like(weight[0])
    shells = shell_sum(weight, size) / shell_sum(ones, size).clamp(min=1)
    # a light, equal regularisation: half maps must not know the FSC
    floor = torch.stack([radial(0.02 * s, size).clamp(min=1e-12) for s in shells])
    halves = torch.stack([wiener(numerator[h], weight[h], size, floor[h]) for h in (0, 1)])
    fsc = fourier_shell_correlation(halves[0] * mask, halves[1] * mask)
    snr = (fsc / (1.0 - fsc).clamp(min=1e-3)).clamp(min=1e-3)
    total = weight.sum(0)
    precision = radial(shells.sum(0) / (2.0 * snr), size)
    return halves, wiener(numerator.sum(0), total, size, precision.clamp(min=1e-12)), fsc


def resolution(fsc: Tensor, threshold: float, extent: float) -> float:
    """Resolution in Angstrom where the FSC first falls below ``threshold`` (Nyquist if it never does)."""
    shells = torch.arange(len(fsc))
    below = torch.nonzero((fsc < threshold) & (shells > 1))
    last = int(below[0]) if len(below) else len(fsc) - 1
    return extent / max(last, 1)


def main(config: AverageConfig) -> int:
    """``opustomo average``.  Raises UserError rather than replace a map or a mask, which may be the user's own."""
    for name in ("average.mrc", *(["mask.mrc"] if config.mask is None else [])):
        if (config.output / name).exists():
            raise UserError(f"-o {config.output}: holds {name} already; choose another folder")
    setup_log(config.output, False)
    prepare_process(config.workers)
    inputs = read_inputs(config.star, config.input, GridOptions(mask=config.mask, downfrac=config.downfrac))
    particles, size = inputs.particles, inputs.grid.working_box
    grid = inputs.grid._replace(crop=size)
    mask = centre_pad(inputs.mask, size)
    noise = estimate_noise(
        particles, grid, mask, contrast=config.input.contrast, normalisation=config.input.normalisation
    )
    log.info("contrast: protein is %s; normalisation: %s; noise calibration %.2f",
             "bright" if noise.contrast > 0 else "dark", "mean over tilts" if noise.mean_normalised else "as stored",
             noise.calibration)  # fmt: skip
    if not noise.contrast_sure:
        log.warning("the contrast is a guess: if protein is dark in average.png, give --contrast with the other colour")
    everyone = torch.ones(1, len(particles))
    [numerator], [weight] = half_totals(particles, grid, noise, everyone, half_sets(particles), config.workers)
    name_damaged(particles, config.output)
    halves, full, fsc = half_maps(numerator, weight, size, mask)
    if config.mask is None:
        mask = solvent_mask(full, automatic(grid.working_pixel, size))
        halves, full, fsc = half_maps(numerator, weight, size, mask)
        write_volume(config.output / "mask.mrc", fourier_resize(mask, grid.box).clamp(0, 1).numpy(), grid.pixel_size)
        log.info("proposed mask: mask.mrc, %.1f %% of the box; look at it before training", 100 * float(mask.mean()))
    write_maps(config.output, halves, full, fsc, mask, grid, len(particles))
    return 0


def write_maps(
    folder: Path, halves: Tensor, full: Tensor, fsc: Tensor, mask: Tensor, grid: Grid, particles: int
) -> None:
    """average.mrc, half1.mrc, half2.mrc, fsc.csv, fsc.png and average.png of ``half_maps``, and a line of the log."""
    for name, volume in (("average", full), ("half1", halves[0]), ("half2", halves[1])):
        write_volume(folder / f"{name}.mrc", volume.numpy(), grid.working_pixel)
    _write_fsc(folder, fsc, grid)
    figure = plots.montage(np.stack([full.numpy(), (full * mask).numpy()]), ["average", "masked average"])
    plots.save(figure, folder / "average.png")
    log.info(
        "average of %d particles: FSC 0.5 at %.1f A, 0.143 at %.1f A (Nyquist %.1f A); %s",
        particles, resolution(fsc, 0.5, grid.extent), resolution(fsc, 0.143, grid.extent),
        2 * grid.working_pixel, folder / "average.png",
    )  # fmt: skip
    if particles < FEW:
        log.warning("%d particles are too few: resolution figures mean nothing below %d", particles, FEW)


def _write_fsc(folder: Path, fsc: Tensor, grid: Grid) -> None:
    resolutions = [grid.extent / max(shell, 1e-9) if shell else float("inf") for shell in range(len(fsc))]
    rows = [(i, f"{r:.3f}", f"{float(f):.5f}") for i, (r, f) in enumerate(zip(resolutions, fsc, strict=True))]
    write_csv(folder / "fsc.csv", ["shell", "resolution_angstrom", "fsc"], rows)
    frequency = np.arange(len(fsc)) / grid.extent
    plots.save(plots.fsc_curves(frequency, {"half maps": fsc.numpy()}), folder / "fsc.png")
