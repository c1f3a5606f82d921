"""What can be simulated: isotropic Gaussian beads whose places depend on a state and on a continuous coordinate.

Owns: beads and their density, and what a data set has to know of a molecule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

Floats = NDArray[np.float64]

AT_ONCE = 4096  # beads summed at a time


class Beads(NamedTuple):
    """J isotropic Gaussians; the density of bead j is ``weight / (2 pi sigma^2)^(3/2) exp(-r^2 / (2 sigma^2))``."""

    centre: NDArray[np.float64]  # (J, 3) x, y, z in Angstrom from the origin of the molecule
    sigma: NDArray[np.float64]  # (J,) Angstrom
    weight: NDArray[np.float64]  # (J,) electrons; of atoms the scattering length in Angstrom, which is proportional to
    # the integral of the potential

    def moved(self, rotation: NDArray[np.float64], shift: NDArray[np.float64]) -> Beads:
        """The beads at ``rotation @ centre + shift`` (shift in Angstrom, x, y, z)."""
        return self._replace(centre=self.centre @ rotation.T + shift)


def together(parts: list[Beads]) -> Beads:
    """All beads of the parts."""
    return Beads(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Molecule:
    """A molecule in its own frame, whose origin is what a particle's pose turns it about.

    names: of the states; moves: in which of them the coordinate moves something; at: the beads in a state (index into
    names) at a value of the coordinate; bodies: its rigid parts by name, the one that stands still first; known: more
    labels of the truth for values (P,) of the coordinate, as ``analysis.truth`` reads them; width: Angstrom that the
    box must have, shifts included; coordinate: its name in the labels and in the names of the true maps;
    radius: Angstrom from a bead's centre to the molecule's surface, None where the density tells it.
    """

    names: tuple[str, ...]
    moves: tuple[bool, ...]
    at: Callable[[int, float], Beads]
    bodies: Callable[[], dict[str, Beads]]
    known: Callable[[Floats], dict[str, Floats]]
    width: float
    coordinate: str = "hinge"
    radius: float | None = None


def gaussian_volume(beads: Beads, box: int, pixel_size: float) -> NDArray[np.float32]:
    """Density in units of the weight per cubic Angstrom, (z, y, x) with voxel ``box // 2`` at the origin; periodic.

    Band-limited: beads are narrower than a voxel of 10 Angstrom, and values at voxel centres would alias.
    """
    frequency = np.fft.rfftfreq(box, pixel_size)
    middle = box // 2 * pixel_size

    def profile(centre: NDArray[np.float64]) -> NDArray[np.float64]:
        spectrum = np.exp(-2 * (np.pi * beads.sigma[:, None] * frequency) ** 2) / pixel_size
        phase = np.exp(-2j * np.pi * frequency * (centre[:, None] + middle))
        phase[:, -1] = 0  # Nyquist: its phase cannot be represented
        return np.fft.irfft(spectrum * phase, box)

    x, y, z = (profile(centre) for centre in beads.centre.T)
    total = np.zeros((box, box * box))
    for some in np.split(np.arange(len(x)), range(AT_ONCE, len(x), AT_ONCE)):
        sheets = (y[some, :, None] * x[some, None, :]).reshape(len(some), -1)
        total += (beads.weight[some] * z[some].T) @ sheets
    return total.reshape(box, box, box).astype(np.float32)


def surface_distance(beads: Beads, box: int, pixel_size: float) -> NDArray[np.float64]:
    """Angstrom of every voxel (N, N, N), (z, y, x), from the nearest bead's centre."""
    axis = (np.arange(box) - box // 2) * pixel_size
    z, y, x = np.meshgrid(axis, axis, axis, indexing="ij")
    return np.asarray(KDTree(beads.centre).query(np.stack([x, y, z], -1))[0])


def soft_edge(outside: NDArray[np.float64], width: float) -> NDArray[np.float32]:
    """1 where ``outside`` (Angstrom beyond a surface) is 0 or less, then half a cosine of this width down to 0."""
    return (0.5 + 0.5 * np.cos(np.pi * np.clip(outside / width, 0, 1))).astype(np.float32)
