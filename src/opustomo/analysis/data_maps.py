"""Maps that the data, not the decoder, make at a code (METHOD section 8), and how far two halves of them agree.

Owns: the weights of the particles around a code, maps from the run's rows at its working resolution, and maps from the
subtomograms at their full size, with half maps for RELION.
"""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.analysis import plots
from opustomo.analysis.filters import Gain, filtered
from opustomo.analysis.made_from import open_rows, particle_of_rows
from opustomo.analysis.volumes import MapFiles, resample
from opustomo.average import half_maps, half_sets, half_totals
from opustomo.config import GridOptions, InputOptions
from opustomo.data.atomic import write_csv
from opustomo.data.inputs import read_inputs
from opustomo.data.mrc import write_volume
from opustomo.data.noise import estimate_noise
from opustomo.data.pickles import load_indices
from opustomo.errors import UserError, reading
from opustomo.monitor import progress
from opustomo.physics.volume import centre_pad, fourier_shell_correlation
from opustomo.reconstruct import Rows, reconstruct

if TYPE_CHECKING:
    from opustomo.checkpoint import Run
    from opustomo.data.inputs import Inputs

Floats = NDArray[np.float64]
MEMORY = 2e9  # bytes of sums held at a time; more codes than fit need another pass over the subtomograms


def write_data_volumes(run: Run, codes: NDArray[np.floating], files: MapFiles, gain: Gain | None = None) -> list[Path]:
    """What the data say at each code: PREFIXi_data.mrc, averages of the particles around it, no decoder involved.

    Particles are weighted by a Gaussian of their distance in code space that covers ``usual_neighbours`` of them.  Two
    random, disjoint halves of them give fsc_data.csv and fsc_data.png; the column ``random`` is the same for randomly
    chosen particles: what every subset shares.  ``gain``: of the maps' spectra.  UserError: the run has no cache.
    """
    rows = open_rows(run)
    grid, n, particle = run.grid, len(run.codes), particle_of_rows(run)
    files.sampling(grid)  # wrong sizes are told before the first map is made
    rng = np.random.default_rng(0)
    half = (rng.permutation(int(particle.max()) + 1) % 2 == 0)[particle]
    curves: dict[str, Floats] = {}
    counts: dict[str, int] = {}
    paths = []
    for i, code in enumerate(progress(codes, len(codes), "volumes from data", "volumes")):
        name, weight = f"{files.prefix}{i}", kernel(run.codes, code, usual_neighbours(n))
        volume = reconstruct(rows, torch.from_numpy(weight), grid, run.mask).numpy()
        volume = volume if gain is None else filtered(volume, grid.working_pixel, gain)
        paths.append(files.write(f"{name}_data", volume, grid))
        curves[name], counts[name] = _half_map_fsc(run, rows, weight, half), int(np.count_nonzero(weight))
        if i == 0:
            control, counted = _half_map_fsc(run, rows, rng.permutation(weight), half), counts[name]
    curves["random"], counts["random"] = control, counted
    _write_fsc(curves, counts, grid.crop * grid.working_pixel, files.folder)
    return paths


def write_full_volumes(run: Run, codes: NDArray[np.floating], files: MapFiles, gain: Gain | None = None) -> list[Path]:
    """Maps from the subtomograms at their own box and pixel size: PREFIXi_data.mrc, _half1.mrc and _half2.mrc.

    Poses are the run's last ones; particles are weighted as in ``write_data_volumes``; halves are the file's random
    subsets, or alternate particles.  The half maps are neither masked nor filtered (for ``relion_postprocess``), the
    map is filtered by their FSC, and by ``gain``.  fsc_data.csv and fsc_data.png are at full resolution then,
    ``random`` being the control.  What ``files`` say of box and pixel size is for decoded maps alone.
    """
    inputs = _full_inputs(run)
    particles, size = inputs.particles, inputs.grid.working_box
    grid, mask = inputs.grid._replace(crop=size), centre_pad(inputs.mask, size)
    stated: dict[str, Any] = {name: run.config.get(name) or "auto" for name in ("contrast", "normalisation")}
    noise = estimate_noise(particles, grid, mask, **stated)
    around = [kernel(run.codes, code, usual_neighbours(len(particles))) for code in codes]
    weights = torch.from_numpy(np.stack([*around, np.random.default_rng(0).permutation(around[0])])).float()
    names = [*(f"{files.prefix}{i}" for i in range(len(codes))), "random"]
    at_once = max(1, int(MEMORY / (2 * 4 * 1.5 * size**3)))
    curves: dict[str, Floats] = {}
    paths = []
    for start in range(0, len(weights), at_once):
        part = weights[start : start + at_once]
        sums = half_totals(particles, grid, noise, part, half_sets(particles), 0)
        for name, numerator, weight in zip(names[start:], *sums, strict=False):
            halves, volume, fsc = half_maps(numerator, weight, size, mask)
            curves[name] = fsc.numpy().astype(np.float64)
            if name == "random":
                continue
            ready = volume.numpy() if gain is None else filtered(volume.numpy(), grid.pixel_size, gain)
            for kind, values in (("data", ready), ("half1", halves[0].numpy()), ("half2", halves[1].numpy())):
                paths.append(files.folder / f"{name}_{kind}.mrc")
                written = resample(values, grid.pixel_size, grid.pixel_size, size, files.flip)
                write_volume(paths[-1], written, grid.pixel_size)
    counts = {name: int(weight.count_nonzero()) for name, weight in zip(names, weights, strict=True)}
    _write_fsc(curves, counts, grid.extent, files.folder)
    return paths


def _full_inputs(run: Run) -> Inputs:
    """The run's particles at its last poses and its mask, at the subtomograms' own sampling."""
    mask, datadir, ind = (run.config.get(name) for name in ("mask", "datadir", "ind"))
    options = InputOptions(
        Path(datadir) if datadir else None,
        format=run.config.get("format") or "auto",
        damaged=run.config.get("damaged") or "stop",
        tilt_limit=run.config.get("tilt_limit"),
    )
    inputs = read_inputs(run.star, options, GridOptions(Path(mask) if mask else None, downfrac=1.0))
    particles = inputs.particles
    if ind:
        particles = particles.subset(load_indices(Path(ind), len(particles)))
    if len(particles) != len(run.codes):
        raise UserError(
            f"{run.star}: {len(particles)} particles where {run.path} has {len(run.codes)}; give back the STAR file "
            "that the run was made with"
        )
    particles = replace(particles, rotation=run.rotation, origin=run.origin, euler=run.euler)
    return replace(inputs, particles=particles)


def usual_neighbours(particles: int) -> int:
    """How many particles around a code make its map, unless stated."""
    return max(32, particles // 10)


def contributing(codes: NDArray[np.floating], at: NDArray[np.floating], names: list[str]) -> dict[str, int]:
    """Particles that make each curve of fsc_data.csv, by its name, for maps at the codes ``at`` (n, zdim)."""
    counts = [int(np.count_nonzero(kernel(codes, code, usual_neighbours(len(codes))))) for code in at]
    return dict(zip(names, [*counts, counts[0]], strict=False))


def kernel(codes: NDArray[np.floating], code: NDArray[np.floating], neighbours: int) -> Floats:
    """(P,) weights exp(-d^2 / 2 s^2) of the particles around ``code``, zero beyond 2 s = the distance of the
    ``neighbours``-th nearest particle."""
    distance = np.linalg.norm(np.asarray(codes, np.float64) - code, axis=1)
    reach = float(np.partition(distance, min(neighbours, len(codes)) - 1)[min(neighbours, len(codes)) - 1])
    return np.where(distance <= reach, np.exp(-2 * (distance / max(reach, 1e-12)) ** 2), 0.0)


def _half_map_fsc(run: Run, rows: Rows, weight: Floats, half: NDArray[np.bool_]) -> Floats:
    """FSC per shell of the two halves' reconstructions; zeros where a half has no particle."""
    if not (weight[half].any() and weight[~half].any()):
        return np.zeros(run.grid.crop // 2 + 1)
    sides = (torch.from_numpy(np.where(side, weight, 0.0)) for side in (half, ~half))
    first, second = (reconstruct(rows, side, run.grid, run.mask) for side in sides)
    return np.asarray(fourier_shell_correlation(first, second), np.float64)


def _write_fsc(curves: dict[str, Floats], counts: dict[str, int], extent: float, folder: Path) -> None:
    """fsc_data.csv and fsc_data.png; extent: edge of the boxes in Angstrom."""
    frequency = np.arange(len(next(iter(curves.values())))) / extent
    rows = ([f"{v:.6f}" for v in row] for row in zip(frequency, *curves.values(), strict=True))
    write_csv(folder / "fsc_data.csv", ["frequency", *curves], rows)
    figure = plots.fsc_curves(frequency, curves, "Half maps of the data at each code", counts)
    plots.save(figure, folder / "fsc_data.png")


def read_fsc(path: Path) -> tuple[Floats, dict[str, Floats]]:
    """(frequency in 1/Angstrom, name to FSC) of fsc_data.csv."""
    with reading(path, "make it again with `opustomo volumes --from-data`"), path.open(newline="") as file:
        rows = list(csv.reader(file))
        table = np.array(rows[1:], np.float64)
        return table[:, 0], {name: table[:, i + 1] for i, name in enumerate(rows[0][1:])}
