"""What is simulated: the presets, and everything about each particle that is drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from opustomo.config import SimulateConfig
from opustomo.errors import UserError
from opustomo.simulate.atoms import read_atoms
from opustomo.simulate.bead_model import RIBOSOME, random_blob
from opustomo.simulate.molecule import Beads, Molecule
from opustomo.simulate.tilt_series import TiltSeries

TOMOGRAMS = 3
TOMOGRAM_SIZE = np.array([928.0, 928.0, 320.0])  # pixels x, y, z
DEFOCUS = np.linspace(22000.0, 38000.0, TOMOGRAMS)  # Angstrom, of each tomogram's middle
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

    @property
    def moves(self) -> bool:
        """Whether something in some particles moves."""
        return self.rotation[0] < self.rotation[1] and any(self.molecule.moves[s] for s in self.states)


PRESETS = {
    "demo": Preset(states=(0, 1, 2, 3), rotation=(0.0, 8.0)),
    "two-state": Preset(states=(1, 2)),
    "hinge": Preset(rotation=(-10.0, 10.0), snr=0.2),
    "junk": Preset(junk=0.25, snr=0.15),
    "few": Preset(n=263, states=(1, 3), rotation=(0.0, 8.0)),
}
OF_ATOMS = Preset(states=(0,), pixel_size=4.0, snr=0.1)  # a protein of some ten kilodalton


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
