"""A second simulator, for data that come as means over tilts with a CTF or weight volume (numpy only, none of ours).

Tilt images with white noise are inserted slice by slice into a Fourier grid padded twice across the tilt axis, divided
by the multiplicity there and cropped, as the programs that write such volumes do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.spatial.transform import Rotation

Array = NDArray[Any]


@dataclass(frozen=True)
class Beads:
    """Isotropic Gaussians: centre (J, 3) as (x, y, z) in voxels from N//2, sigma (J,) in voxels, height (J,)."""

    centre: Array
    sigma: Array
    height: Array

    def density(self, box: int) -> Array:
        """(N, N, N) in (z, y, x)."""
        grid = np.arange(box) - box // 2
        ex, ey, ez = (
            np.exp(-0.5 * ((grid - self.centre[:, axis, None]) / self.sigma[:, None]) ** 2) for axis in range(3)
        )
        return np.einsum("j,jz,jy,jx->zyx", self.height, ez, ey, ex)


def two_states(box: int, seed: int) -> tuple[Beads, Beads]:
    """An object of 30 beads within 0.3 box, and the same without five of them."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(size=(30, 3))
    centre *= 0.3 * box * rng.uniform(0.2, 1, (30, 1)) ** (1 / 3) / np.linalg.norm(centre, axis=1, keepdims=True)
    centre[25:] = 0.3 * box * np.array([0.8, 0.5, 0.2]) + rng.normal(0, 0.05 * box, (5, 3))
    whole = Beads(centre, rng.uniform(1.0, 1.5, 30), rng.uniform(0.7, 1.3, 30))
    return whole, Beads(whole.centre[:25], whole.sigma[:25], whole.height[:25])


@dataclass(frozen=True)
class Microscope:
    """T tilts about y (degrees), box N, pixel in Angstrom; 300 kV, Cs 2.7 mm, amplitude contrast 0.07."""

    box: int
    pixel: float
    tilts: Array
    dose: float = 3.0

    @cached_property
    def bfactor(self) -> Array:
        return 4 * self.dose * (np.argsort(np.argsort(np.abs(self.tilts))) + 0.5)

    @cached_property
    def scale(self) -> Array:
        return np.cos(np.deg2rad(self.tilts))

    def contrast(self, u: Array, v: Array, defocus: float | Array) -> Array:
        """CTF, envelope and scale of every tilt at image frequencies in cycles per box: (T, ...) like u."""
        s2 = (u**2 + v**2) / (self.box * self.pixel) ** 2
        wavelength = 0.019687
        phase = np.pi * wavelength * s2 * (defocus - 0.5 * 2.7e7 * wavelength**2 * s2) + np.arcsin(0.07)
        shape = (-1,) + (1,) * (u.ndim - 1)
        return np.sin(phase) * self.scale.reshape(shape) * np.exp(-self.bfactor.reshape(shape) / 4 * s2)

    def images(self, beads: Beads, turn: Array, origin: Array, defocus: float, noise: Array, twice: bool) -> Array:
        """Tilt images (T, N, N) as (y, u): CTF times projection plus noise; ``twice`` multiplies by the CTF again."""
        angle = np.deg2rad(self.tilts)
        zero, one = np.zeros_like(angle), np.ones_like(angle)
        rows = [[np.cos(angle), zero, -np.sin(angle)], [zero, one, zero], [np.sin(angle), zero, np.cos(angle)]]
        turns: Array = np.moveaxis(np.array(rows), 2, 0)
        return self.images_at(beads, turns @ turn, turns @ origin, np.full(len(angle), defocus), noise, twice)

    def images_at(self, beads: Beads, turns: Array, origins: Array, defocus: Array, noise: Array, twice: bool) -> Array:
        """The same of any turns (T, 3, 3) into the image's frame, origins (T, 3) there, voxels, and defocus (T,)."""
        n = self.box
        fy, fu = np.fft.fftfreq(n), np.fft.rfftfreq(n)
        u, v, _ = np.moveaxis(np.einsum("tij,pj->tpi", turns, beads.centre) - origins[:, None], 2, 0)

        def wave(position: Array, frequency: Array) -> Array:
            damping = np.exp(-2 * (np.pi * beads.sigma[:, None] * frequency) ** 2)
            return damping * np.exp(-2j * np.pi * frequency * (position[..., None] + n // 2))

        mass = beads.height * (2 * np.pi) ** 1.5 * beads.sigma**3
        projections = (mass[:, None] * wave(v, fy)).swapaxes(1, 2) @ wave(u, fu)
        frequency_u, frequency_v = np.meshgrid(fu * n, fy * n)
        contrast = self.contrast(frequency_u[None], frequency_v[None], defocus[:, None, None])
        spectra = projections * contrast + np.fft.rfft2(noise)
        return np.fft.irfft2(spectra * contrast if twice else spectra, s=(n, n))

    @cached_property
    def _padded(self) -> tuple[Array, csr_matrix, Array]:
        """Multiplicity on the padded (kz, kx) half grid, the insertion matrix onto it, and the phase of its centre."""
        n = self.box
        kz, kx = np.meshgrid(np.fft.fftfreq(2 * n, 1 / (2 * n)), np.arange(n + 1.0), indexing="ij")
        angle = np.deg2rad(self.tilts)[:, None, None]
        weight = np.clip(1 - np.abs(kx * np.sin(angle) + kz * np.cos(angle)), 0, None)
        u = (kx * np.cos(angle) - kz * np.sin(angle)) / (2 * n)
        wave = np.exp(-2j * np.pi * u[..., None] * (np.arange(n) - n // 2))
        matrix = (weight[..., None] * wave).transpose(1, 2, 0, 3).reshape(kz.size, -1)
        return weight.sum(0), csr_matrix(matrix.astype(np.complex64)), np.exp(1j * np.pi * (kx + kz))

    def mean_volume(self, images: Array, mean: bool = True) -> NDArray[np.float32]:
        """Subtomogram (N, N, N): mean of the tilts that cover a frequency, or their sum, made on the padded grid."""
        n = self.box
        multiplicity, matrix, phase = self._padded
        columns = images.transpose(0, 2, 1).reshape(-1, n).astype(np.complex64)
        spectrum = (matrix @ columns).reshape(2 * n, n + 1, n)
        share = np.where(multiplicity > 1e-3, 1 / np.maximum(multiplicity, 1e-3), 0) if mean else 1.0
        spectrum *= (phase * share)[..., None]
        padded = np.fft.irfftn(spectrum, s=(2 * n, 2 * n), axes=(0, 1))
        middle = slice(n // 2, n // 2 + n)
        return np.ascontiguousarray(padded[middle, middle].transpose(0, 2, 1), np.float32)

    def mean_transfer(self, defocus: float, power: int, mean: bool = True) -> NDArray[np.float32]:
        """Mean over covering tilts of CTF^power, or the sum, (N, N, N) with its origin at voxel N//2."""
        k = np.arange(self.box) - self.box // 2
        kz, ky, kx = (a[None] for a in np.meshgrid(k, k, k, indexing="ij"))
        angle = np.deg2rad(self.tilts)[:, None, None, None]
        weight = np.clip(1 - np.abs(kx * np.sin(angle) + kz * np.cos(angle)), 0, None)
        contrast = self.contrast(kx * np.cos(angle) - kz * np.sin(angle), ky + 0 * angle, defocus)
        total = weight.sum(0)
        summed = (weight * contrast**power).sum(0)
        return np.where(total > 1e-3, summed / np.maximum(total, 1e-3) if mean else summed, 0).astype(np.float32)


def random_poses(count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """Uniform rotations A (P, 3, 3) with x_particle = A x_consensus, and origins (P, 3) within 1.5 voxels."""
    return Rotation.random(count, rng=rng).as_matrix(), rng.uniform(-1.5, 1.5, (count, 3))
