"""``opustomo simulate``: data sets with known truth in the RELION 3.0 layout.

Owns: the noise, and the files of a set: subtomograms, CTF and STAR files, stacks, sim.json.  What is drawn is in
``plan``, what is known of it in ``truth``.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from opustomo.config import SimulateConfig
from opustomo.data import write_relion5 as relion5
from opustomo.data.atomic import LOCK, write_text
from opustomo.data.mrc import write_stack, write_volume
from opustomo.data.write_relion30 import Listed, write_ctf, write_particles
from opustomo.errors import UserError
from opustomo.monitor import duration, progress
from opustomo.simulate import tilt_series
from opustomo.simulate.plan import DEFOCUS, GOOD, TOMOGRAM_SIZE, Plan, Preset, chosen_preset, make_plan, relion_euler
from opustomo.simulate.tilt_series import TiltSeries
from opustomo.simulate.truth import write_truth

log = logging.getLogger(__name__)

BATCH, MANY = 16, 1000  # particles imaged at a time; those of more beads than this one by one


def noise_level(plan: Plan, series: TiltSeries, snr: float, matrix: sparse.csr_matrix, seed: int) -> float:
    """Standard deviation per tilt pixel that gives ``snr`` in the central sphere (radius 0.42 box); 0 for snr 0.

    The signal is that of the first well placed particles.
    """
    if snr == 0:
        return 0.0
    axis = np.arange(series.box) - series.box // 2
    sphere = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2) < 0.42 * series.box
    some = np.flatnonzero(plan.junk_kind == GOOD)[:8]
    images = tilt_series.project([plan.beads(int(i), series.pixel_size) for i in some], series)
    defocus = plan.tilt_defocus(series)[some]
    signal = tilt_series.backproject(images * tilt_series.transfer(defocus, series), matrix)
    unit = tilt_series.white_noise(4, series, 1.0, torch.Generator().manual_seed(seed))
    noise = tilt_series.backproject(unit, matrix)
    return float(np.sqrt(signal[:, sphere].var(1).mean() / snr / noise[:, sphere].var(1).mean()))


class Observation(NamedTuple):
    """One particle as the microscope sees it."""

    images: NDArray[np.float32]  # (T, N, N), (tilt, y, u), noise included
    subtomogram: NDArray[np.float32]  # (N, N, N), (z, y, x), made of those images


def observations(plan: Plan, series: TiltSeries, snr: float, seed: int) -> Iterator[Observation]:
    """The particles' tilt images and subtomograms, in order."""
    matrix = tilt_series.backprojection_matrix(series)
    std = noise_level(plan, series, snr, matrix, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    defocus = plan.tilt_defocus(series)
    some = int(np.flatnonzero(plan.junk_kind == GOOD)[0])
    batch = BATCH if len(plan.beads(some, series.pixel_size).weight) <= MANY else 1
    for start in range(0, len(plan.state), batch):
        rows = np.arange(start, min(start + batch, len(plan.state)))
        images = tilt_series.project([plan.beads(int(i), series.pixel_size) for i in rows], series)
        images = images * tilt_series.transfer(defocus[rows], series)
        if std > 0:
            images += tilt_series.white_noise(len(rows), series, std, generator)
        recorded = torch.fft.irfftn(images, s=(series.box, series.box), dim=(-2, -1)).numpy()
        yield from map(Observation, recorded, tilt_series.backproject(images, matrix))


def clear_folder(output: Path) -> None:
    """Make the folder, or empty it of an earlier simulated set; UserError if it holds anything else."""
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: is a file; give another output folder")
    present = {path.name for path in output.iterdir()} - {LOCK} if output.is_dir() else set()
    if present and "sim.json" not in present:
        raise UserError(f"{output}: is not empty and not a simulated set (no sim.json); give another output folder")
    tables = ("particles.star", "labels.npz", "bodies.star", "stacks/*.star")
    images = ("mask.mrc", "body_*.mrc", "gt/state*.mrc", "subtomo/p[0-9]*", "stacks/p[0-9]*.mrcs")
    for pattern in (*tables, *images):
        for old in output.glob(pattern):
            old.unlink()


def image_names(count: int) -> list[str]:
    """Subtomogram i is file number i; names relative to the set's folder."""
    return [f"subtomo/p{i:05d}.mrc" for i in range(count)]


def stack_name(i: int) -> str:
    """The stack of particle i, relative to stacks/."""
    return f"p{i:05d}.mrcs"


def tomogram_name(t: int) -> str:
    """Name of tomogram t, counted from 0."""
    return f"TS_{t + 1:02d}"


def write_star(output: Path, preset: Preset, plan: Plan) -> None:
    """particles.star with the poses as given, errors included."""
    tomograms = [f"{tomogram_name(t)}.mrc" for t in plan.tomogram]
    write_particles(output / "particles.star", _listed(plan, image_names(preset.n), tomograms), preset.pixel_size)


def _listed(plan: Plan, images: list[str], tomograms: list[str]) -> Listed:
    return Listed(images, tomograms, plan.coordinates, relion_euler(plan.given_rotation), plan.given_origin)


def write_stack_tables(folder: Path, preset: Preset, plan: Plan, series: TiltSeries) -> None:
    """The STAR files of the stacks, with the same poses as particles.star."""
    tomograms = {
        tomogram_name(t): relion5.Tomogram(
            size=TOMOGRAM_SIZE,
            rotation=series.rotation,
            defocus=np.full(len(series.tilts), DEFOCUS[t]),
            scale=series.scale,
            exposure=series.exposure,
            dose=series.dose,
            bfactor_per_dose=tilt_series.BFACTOR_PER_DOSE,
        )
        for t in np.unique(plan.tomogram)
    }
    stacks = [stack_name(i) for i in range(preset.n)]
    particles = _listed(plan, stacks, [tomogram_name(t) for t in plan.tomogram])
    optics = relion5.Optics(preset.box, preset.pixel_size, series.voltage, series.cs, series.amplitude)
    relion5.write_optimisation_set(folder, particles, tomograms, optics)


def simulate(output: Path, preset: Preset, seed: int, settings: dict[str, object], stacks: bool = False) -> None:
    """Write the whole set; particles.star comes last, so that an interrupted set is not taken for a complete one."""
    series = TiltSeries(preset.box, preset.pixel_size)
    plan = make_plan(preset, seed)
    names = {str(s): preset.molecule.names[s] for s in preset.states}
    stated = {name: value for name, value in vars(preset).items() if name != "molecule"}
    write_text(output / "sim.json", json.dumps(settings | stated | {"state_names": names}, indent=1) + "\n")
    write_truth(output, preset, plan, series)
    microscope = (series.voltage, series.cs, series.amplitude)
    seen = progress(observations(plan, series, preset.snr, seed), preset.n, "simulate")
    for i, (image, defocus, one) in enumerate(zip(image_names(preset.n), plan.tilt_defocus(series), seen, strict=True)):
        write_volume(output / image, one.subtomogram, preset.pixel_size)
        if stacks:
            write_stack(output / "stacks" / stack_name(i), one.images, preset.pixel_size)
        star = output / image.replace(".mrc", "_ctf.star")
        write_ctf(star, defocus, series.tilts, series.bfactor, series.scale, microscope)
    if stacks:
        write_stack_tables(output / "stacks", preset, plan, series)
    write_star(output, preset, plan)


def main(config: SimulateConfig) -> None:
    """Run the verb ``simulate``."""
    start = time.perf_counter()
    preset = chosen_preset(config)
    clear_folder(config.output)
    source = {"atoms": [str(path) for path in config.atoms]} if config.atoms else {"preset": config.preset or "demo"}
    simulate(config.output, preset, config.seed, source | {"seed": config.seed}, config.stacks)
    states = ", ".join(preset.molecule.names[s] for s in preset.states)
    log.info(
        "%d particles of %d^3 at %g A per pixel, SNR %g, states %s, in %s",
        *(preset.n, preset.box, preset.pixel_size, preset.snr, states, duration(time.perf_counter() - start)),
    )
    log.info("written: %s", config.output / "particles.star")
    if config.stacks:
        log.info("written: %s", config.output / "stacks" / "optimisation_set.star")
    star, mask = (shlex.quote(str(config.output / name)) for name in ("particles.star", "mask.mrc"))
    log.info("next: opustomo check %s --mask %s", star, mask)
