"""``opustomo simulate``: data sets with known truth in the RELION 3.0 layout.

Owns: the presets, what is drawn at random for each particle, and the files of the truth (labels.npz, gt/, sim.json).
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.spatial.transform import Rotation

from opustomo.config import SimulateConfig
from opustomo.data import write_relion5 as relion5
from opustomo.data.atomic import LOCK, write_text
from opustomo.data.mrc import write_stack, write_volume
from opustomo.data.tensors import save_arrays
from opustomo.data.write_relion30 import write_ctf, write_particles
from opustomo.errors import UserError
from opustomo.monitor import duration, progress
from opustomo.simulate import tilt_series
from opustomo.simulate.atoms import read_atoms
from opustomo.simulate.bead_model import RIBOSOME, random_blob
from opustomo.simulate.molecule import Beads, Molecule, gaussian_volume, soft_edge, surface_distance
from opustomo.simulate.tilt_series import TiltSeries

log = logging.getLogger(__name__)

TOMOGRAMS = 3
TOMOGRAM_SIZE = np.array([928.0, 928.0, 320.0])  # pixels x, y, z
DEFOCUS = np.linspace(22000.0, 38000.0, TOMOGRAMS)  # Angstrom, of each tomogram's middle
BATCH, MANY = 16, 1000  # particles imaged at a time; those of more beads than this one by one
GOOD, BLOB, EMPTY, MISPLACED = range(4)  # labels "junk_kind"


@dataclass(frozen=True)
class Preset:
    """What is simulated; ``snr`` is var(signal) / var(noise) in the central sphere of the subtomograms, 0: no noise."""

    n: int = 400
    states: tuple[int, ...] = (1,)  # indices into the molecule's names, equally frequent
    rotation: tuple[float, float] = (0.0, 0.0)  # the molecule's coordinate, uniform: degrees of the 30S
    junk: float = 0.0  # fraction of particles that are no well placed molecules
    box: int = 40
    pixel_size: float = 10.0
    snr: float = 1.0
    rot_err: float = 2.0  # degrees, |N(0, .)| about a random axis
    shift_err: float = 0.3  # pixels, N(0, .) on each axis
    max_shift: float = 2.0  # pixels, origins are uniform in +- this
    molecule: Molecule = RIBOSOME


PRESETS = {
    "demo": Preset(states=(0, 1, 2, 3), rotation=(0.0, 8.0)),
    "two-state": Preset(states=(1, 2)),
    "hinge": Preset(rotation=(-10.0, 10.0), snr=0.2),
    "junk": Preset(junk=0.25, snr=0.15),
    "few": Preset(n=263, states=(1, 3), rotation=(0.0, 8.0)),
}
OF_ATOMS = Preset(states=(0,), pixel_size=4.0, snr=0.1)  # a protein of some ten kilodalton


@dataclass(frozen=True)
class Plan:
    """Everything drawn at random, P particles.  A of METHOD section 2: the bead at c lies at ``A c - origin``."""

    molecule: Molecule
    state: NDArray[np.int64]  # (P,) -1 where there is no molecule
    coordinate: NDArray[np.float64]  # (P,) of the molecule (degrees of the 30S), NaN where nothing moves
    junk_kind: NDArray[np.int64]  # (P,) 0 good, 1 blob, 2 empty, 3 molecule with a random pose in the STAR
    rotation: NDArray[np.float64]  # (P, 3, 3) true A
    origin: NDArray[np.float64]  # (P, 3) true, pixels
    given_rotation: NDArray[np.float64]  # (P, 3, 3) as written to the STAR
    given_origin: NDArray[np.float64]  # (P, 3)
    tomogram: NDArray[np.int64]  # (P,)
    coordinates: NDArray[np.float64]  # (P, 3) tomogram pixels
    defocus: NDArray[np.float64]  # (P,) Angstrom, of the untilted image
    blobs: dict[int, Beads] = field(default_factory=dict)  # by particle

    def beads(self, i: int, pixel_size: float) -> Beads:
        """Particle i in the frame of its subtomogram, Angstrom from voxel N//2."""
        if self.junk_kind[i] == EMPTY:
            return Beads(np.zeros((0, 3)), np.zeros(0), np.zeros(0))
        value = float(np.nan_to_num(self.coordinate[i]))
        model = self.blobs[i] if i in self.blobs else self.molecule.at(int(self.state[i]), value)
        return model.moved(self.rotation[i], -self.origin[i] * pixel_size)

    def tilt_defocus(self, series: TiltSeries) -> NDArray[np.float64]:
        """(P, T) Angstrom: a particle off the tilt axis goes up and down as the stage tilts."""
        from_middle = (self.coordinates - TOMOGRAM_SIZE / 2) * series.pixel_size
        return self.defocus[:, None] + from_middle @ series.rotation[:, 2].T - from_middle[:, 2:]


def relion_euler(rotation: NDArray[np.float64]) -> NDArray[np.float64]:
    """(P, 3) rot, tilt, psi in degrees of A (P, 3, 3): RELION's matrix is the transpose of intrinsic ZYZ."""
    return Rotation.from_matrix(rotation.swapaxes(1, 2)).as_euler("ZYZ", degrees=True)


def make_plan(preset: Preset, seed: int) -> Plan:
    """Draw states, poses, pose errors, positions and decoys; the same seed gives the same plan."""
    rng = np.random.default_rng(seed)
    n, junk = preset.n, round(preset.junk * preset.n)
    kind = np.full(n, GOOD)
    kind[rng.permutation(n)[:junk]] = 1 + np.arange(junk) % 3
    state = rng.permutation(np.resize(preset.states, n))
    state[(kind == BLOB) | (kind == EMPTY)] = -1
    mobile = np.array([s >= 0 and preset.molecule.moves[s] for s in state])
    coordinate = np.where(mobile, rng.uniform(*preset.rotation, n), np.nan)

    rotation = Rotation.random(n, rng=rng).as_matrix()
    origin = rng.uniform(-preset.max_shift, preset.max_shift, (n, 3))
    axis = rng.normal(size=(n, 3))
    angle = np.deg2rad(np.abs(rng.normal(size=n)) * preset.rot_err)
    error = Rotation.from_rotvec(axis * (angle / np.linalg.norm(axis, axis=1))[:, None]).as_matrix()
    unrelated = Rotation.random(n, rng=rng).as_matrix()
    tomogram = np.sort(rng.integers(0, TOMOGRAMS, n))
    margin = preset.box / 2
    coordinates = rng.uniform(margin, TOMOGRAM_SIZE - margin, (n, 3))
    height = (coordinates[:, 2] - TOMOGRAM_SIZE[2] / 2) * preset.pixel_size
    return Plan(
        molecule=preset.molecule,
        state=state,
        coordinate=coordinate,
        junk_kind=kind,
        rotation=rotation,
        origin=origin,
        given_rotation=np.where((kind == MISPLACED)[:, None, None], unrelated, error @ rotation),
        given_origin=origin + preset.shift_err * rng.normal(size=(n, 3)),
        tomogram=tomogram,
        coordinates=coordinates,
        defocus=DEFOCUS[tomogram] + height,
        blobs={int(i): random_blob(rng) for i in np.flatnonzero(kind == BLOB)},
    )


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


def truth_beads(preset: Preset) -> dict[str, Beads]:
    """What the true maps show, by file stem: ``state{S}_hinge{+h.h}`` or the coordinate's own name; h in five steps."""
    molecule, values = preset.molecule, np.unique(np.linspace(*preset.rotation, 5))
    return {
        f"state{s}_{molecule.coordinate}{h:+.1f}": molecule.at(s, h)
        for s in preset.states
        for h in (values if molecule.moves[s] else [0.0])
    }


def solvent_mask(
    maps: list[NDArray[np.float32]], pixel_size: float, margin: float = 10.0, edge: float = 20.0
) -> NDArray[np.float32]:
    """Soft mask around the union of the maps: Angstrom of margin, then a cosine edge."""
    union = np.max(maps, axis=0)
    distance = ndimage.distance_transform_edt(union < 0.1 * np.percentile(union, 99)) * pixel_size
    return soft_edge(distance - margin, edge)


def mask_of(preset: Preset, beads: Iterable[Beads], margin: float, edge: float) -> NDArray[np.float32]:
    """Soft mask around a molecule as it is at each of ``beads``."""
    if preset.molecule.radius is None:
        return solvent_mask(
            [gaussian_volume(b, preset.box, preset.pixel_size) for b in beads], preset.pixel_size, margin, edge
        )
    outside = np.min([surface_distance(b, preset.box, preset.pixel_size) for b in beads], axis=0)
    return soft_edge(outside - preset.molecule.radius - margin, edge)


def chosen_preset(config: SimulateConfig) -> Preset:
    """The preset, or that of atoms, with the options that were given; UserError for what makes no sense."""
    given = {
        "n": config.n or None,
        "box": config.box or None,
        "pixel_size": config.angpix or None,
        "snr": None if config.snr == -1 else config.snr,
        "rot_err": None if config.rot_err == -1 else config.rot_err,
        "shift_err": None if config.shift_err == -1 else config.shift_err,
    }
    if config.atoms and config.preset:
        raise UserError(f"--preset {config.preset}: presets are ribosomes; leave it out with --atoms")
    if not (config.align or config.atoms):
        raise UserError("--no-align: is about the conformations of --atoms; leave it out without them")
    usual = OF_ATOMS if config.atoms else PRESETS[config.preset or "demo"]
    preset = replace(usual, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]
    for option, value in (("snr", preset.snr), ("rot-err", preset.rot_err), ("shift-err", preset.shift_err)):
        if value < 0:
            raise UserError(f"--{option} {value:g}: is negative; give 0 or more")
    if preset.n < 1 or preset.pixel_size <= 0:
        raise UserError(f"-n {preset.n}, --angpix {preset.pixel_size:g}: both must be above 0")
    if preset.box % 2 or preset.box < 16:
        raise UserError(f"--box {preset.box}: boxes are even and at least 16 voxels; give {max(16, preset.box + 1)}")
    if config.atoms:
        molecule, length = read_atoms(config.atoms, preset.pixel_size, preset.max_shift, config.align)
        preset = replace(preset, molecule=molecule, rotation=(0.0, length))
    if preset.box * preset.pixel_size < preset.molecule.width:
        raise UserError(
            f"--box {preset.box} at {preset.pixel_size:g} A per pixel is {preset.box * preset.pixel_size:.0f} A wide: "
            f"the molecule with its shifts needs {preset.molecule.width:.0f} A; raise --box or --angpix"
        )
    return preset


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


def write_truth(output: Path, preset: Preset, plan: Plan, series: TiltSeries) -> None:
    """labels.npz, gt/, mask.mrc, and bodies.star where rigid parts turn."""
    labels = {
        "state": plan.state,
        preset.molecule.coordinate: plan.coordinate,
        "true_pose": np.column_stack([relion_euler(plan.rotation), plan.origin, plan.defocus]),
        "tilts": series.tilts,
        "bfac": series.bfactor,
        "scale": series.scale,
    }
    if len(preset.states) == 2:
        labels["present"] = (plan.state == preset.states[1]).astype(np.int64)
    if moves_of(preset):
        labels |= preset.molecule.known(plan.coordinate)
        write_bodies(output, preset)
    if preset.junk > 0:
        labels |= {"junk": (plan.junk_kind != GOOD).astype(np.int64), "junk_kind": plan.junk_kind}
    save_arrays(output / "labels.npz", **labels)
    maps = truth_beads(preset)
    for stem, beads in maps.items():
        volume = gaussian_volume(beads, preset.box, preset.pixel_size)
        write_volume(output / "gt" / f"{stem}.mrc", volume, preset.pixel_size)
    write_volume(output / "mask.mrc", mask_of(preset, maps.values(), 10.0, 20.0), preset.pixel_size)


def moves_of(preset: Preset) -> bool:
    """Whether something in some particles moves."""
    return preset.rotation[0] < preset.rotation[1] and any(preset.molecule.moves[s] for s in preset.states)


def write_bodies(output: Path, preset: Preset) -> None:
    """Masks of the rigid parts, and the STAR file of bodies that RELION's multi-body refinement takes.

    Every body turns against the first, and that one against the second.  Nothing is written where there is only one.
    """
    names, bodies = [], preset.molecule.bodies()
    if len(bodies) < 2:
        return
    for body, beads in bodies.items():
        mask = mask_of(preset, [beads], 0.0, min(20.0, 2 * preset.pixel_size))
        names.append(f"body_{body}.mrc")
        write_volume(output / names[-1], mask, preset.pixel_size)
    rows = "".join(f"{name} {1 if number else 2} 10 2\n" for number, name in enumerate(names))
    columns = ("MaskName", "RotateRelativeTo", "SigmaAngles", "SigmaOffset")
    head = "data_\n\nloop_\n" + "".join(f"_rlnBody{column} #{i}\n" for i, column in enumerate(columns, 1))
    write_text(output / "bodies.star", head + rows)


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
    poses = (relion_euler(plan.given_rotation), plan.given_origin)
    images = image_names(preset.n)
    write_particles(output / "particles.star", images, tomograms, plan.coordinates, *poses, preset.pixel_size)


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
    particles = relion5.Particles(
        tomogram=[tomogram_name(t) for t in plan.tomogram],
        images=[stack_name(i) for i in range(preset.n)],
        coordinates=plan.coordinates,
        euler=relion_euler(plan.given_rotation),
        origin=plan.given_origin,
        visible=[np.ones(len(series.tilts), bool)] * preset.n,
    )
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
