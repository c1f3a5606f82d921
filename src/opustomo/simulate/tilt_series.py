"""Image formation: beads -> analytic tilt projections with CTF, dose and noise -> back-projected subtomograms.

Owns: the simulator's own geometry and CTF.  They are written independently of ``opustomo.physics`` on purpose, so that
an error of the model's transfer function shows as a disagreement with simulated data instead of cancelling out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse

from opustomo.simulate.molecule import Beads

BFACTOR_PER_DOSE = 4.0  # Angstrom^2 for each electron per square Angstrom
OVERSAMPLING = 2  # of the images across the tilt axis, before linear interpolation in the back-projection


@dataclass(frozen=True)
class TiltSeries:
    """One tilting scheme and microscope: T tilts about y, box N, pixel size in Angstrom.

    RELION's tilt angle t: the image plane is spanned by ``u = x cos t - z sin t`` and ``y``.
    """

    box: int
    pixel_size: float
    tilt_range: float = 60.0  # degrees, symmetric
    tilt_step: float = 3.0  # degrees
    dose: float = 3.0  # electrons per square Angstrom and tilt
    voltage: float = 300.0  # kV
    cs: float = 2.7  # mm
    amplitude: float = 0.07

    @cached_property
    def tilts(self) -> NDArray[np.float64]:
        """(T,) degrees, ascending."""
        return np.arange(-self.tilt_range, self.tilt_range + 1e-6, self.tilt_step)

    @cached_property
    def rotation(self) -> NDArray[np.float64]:
        """(T, 3, 3) from the subtomogram to the image: rows u, y and the depth along the beam."""
        t = np.deg2rad(self.tilts)
        rows = [[np.cos(t), 0 * t, -np.sin(t)], [0 * t, 1 + 0 * t, 0 * t], [np.sin(t), 0 * t, np.cos(t)]]
        return np.moveaxis(np.array(rows), 2, 0)

    @cached_property
    def exposure(self) -> NDArray[np.float64]:
        """(T,) electrons per square Angstrom before each image, acquired from 0 degrees outwards, signs in turn."""
        order = np.argsort(np.argsort(np.abs(self.tilts) + 0.1 * (self.tilts < 0)))
        return self.dose * order.astype(np.float64)

    @cached_property
    def bfactor(self) -> NDArray[np.float64]:
        """(T,) Angstrom^2: BFACTOR_PER_DOSE times the mean dose of each image."""
        return BFACTOR_PER_DOSE * (self.exposure + self.dose / 2)

    @cached_property
    def scale(self) -> NDArray[np.float64]:
        """(T,) amplitude scale cos(tilt): thicker ice at high tilt."""
        return np.cos(np.deg2rad(self.tilts))

    @cached_property
    def frequencies(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(N,) along y and (N//2 + 1,) along u, in 1/Angstrom."""
        y, u = np.fft.fftfreq(self.box, self.pixel_size), np.fft.rfftfreq(self.box, self.pixel_size)
        return y.astype(np.float64), u.astype(np.float64)


def ctf(s2: NDArray[np.float64], defocus: NDArray[np.float64] | float, series: TiltSeries) -> NDArray[np.float64]:
    """CTF at squared frequency ``s2`` (1/Angstrom^2), defocus in Angstrom (underfocus positive); they broadcast.

    ``sin(pi df lambda s^2 - pi/2 Cs lambda^3 s^4 + asin w)``: positive at low frequency, so protein is bright.
    """
    volts = series.voltage * 1e3
    wavelength = 12.2643 / np.sqrt(volts * (1 + 0.978476e-6 * volts))  # Angstrom, relativistic
    cs = series.cs * 1e7
    phase = np.pi * wavelength * s2 * (defocus - 0.5 * cs * wavelength**2 * s2)
    return np.sin(phase + np.arcsin(series.amplitude))


def transfer(defocus: NDArray[np.float64], series: TiltSeries) -> torch.Tensor:
    """(P, T, N, N//2 + 1): CTF x exp(-B s^2 / 4) x scale for each particle's defocus in each tilt, (P, T)."""
    fy, fu = series.frequencies
    s2 = fy[:, None] ** 2 + fu**2
    envelope = np.exp(-series.bfactor[:, None, None] / 4 * s2) * series.scale[:, None, None]
    return torch.from_numpy((ctf(s2, defocus[..., None, None], series) * envelope).astype(np.float32))


def project(particles: list[Beads], series: TiltSeries) -> torch.Tensor:
    """Fourier transforms (P, T, N, N//2 + 1) complex64 of the tilt projections; image centre at pixel N//2.

    Exact for Gaussians but for aliasing.  Bead centres are in the subtomogram's frame, Angstrom from voxel N//2.
    Pixel values are line integrals in electrons per Angstrom^3 times pixels.  ``numpy.fft`` forward normalisation.
    """
    centre, sigma, weight = _stack(particles)
    fy, fu = (torch.from_numpy(f.astype(np.float32)) for f in series.frequencies)
    angle = torch.from_numpy(np.deg2rad(series.tilts).astype(np.float32))[:, None]
    middle = series.box // 2 * series.pixel_size
    u = centre[:, None, :, 0] * angle.cos() - centre[:, None, :, 2] * angle.sin()  # P, T, J
    along_u = _gaussian(u, sigma[:, None], fu, middle)  # P, T, J, F
    along_y = _gaussian(centre[..., 1], sigma, fy, middle) * (weight / series.pixel_size**3)[..., None]  # P, J, N
    return along_y.transpose(1, 2)[:, None] @ along_u


def _stack(particles: list[Beads]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pad to one number of beads: centre (P, J, 3), sigma (P, J), weight (P, J; 0 where padded)."""
    count = max(1, *(len(beads.weight) for beads in particles))
    rows = np.zeros((len(particles), count, 5), np.float32)
    for row, beads in zip(rows, particles, strict=True):
        row[: len(beads.weight)] = np.column_stack([beads.centre, beads.sigma, beads.weight])
    table = torch.from_numpy(rows)
    return table[..., :3], table[..., 3], table[..., 4]


def _gaussian(position: torch.Tensor, sigma: torch.Tensor, frequency: torch.Tensor, middle: float) -> torch.Tensor:
    """Transform of a 1-D Gaussian of unit integral at ``position + middle``: a new last axis of frequencies."""
    damping = torch.exp(-2 * (torch.pi * sigma[..., None] * frequency) ** 2)
    return torch.polar(damping.expand(*position.shape, -1), -2 * torch.pi * frequency * (position + middle)[..., None])


def backprojection_matrix(series: TiltSeries) -> sparse.csr_matrix:
    """(N*N, T*N*OVERSAMPLING): section (z, x) of the mean over tilts from image rows (tilt, u), linear in u."""
    box, tilts = series.box, np.deg2rad(series.tilts)
    z, x = np.meshgrid(*[np.arange(box) - box // 2] * 2, indexing="ij")
    width = box * OVERSAMPLING
    rows, columns, values = [], [], []
    for t, angle in enumerate(tilts):
        u = ((x * np.cos(angle) - z * np.sin(angle)).ravel() + box // 2) * OVERSAMPLING
        left = np.floor(u).astype(int)
        for pixel, part in ((left, 1 - (u - left)), (left + 1, u - left)):
            inside = (pixel >= 0) & (pixel < width)
            rows.append(np.flatnonzero(inside))
            columns.append(t * width + pixel[inside])
            values.append(part[inside] / len(tilts))
    entries = (np.concatenate(values).astype(np.float32), (np.concatenate(rows), np.concatenate(columns)))
    return sparse.csr_matrix(entries, shape=(box * box, len(tilts) * width))


def backproject(images: torch.Tensor, matrix: sparse.csr_matrix) -> NDArray[np.float32]:
    """Subtomograms (P, N, N, N) in (z, y, x) from Fourier images (P, T, N, N//2 + 1): linear, in real space.

    The mean over all tilts (1/T), not over those that cover a frequency: low frequencies weigh more, as in plain
    back-projection, and the noise power follows the multiplicity of the tilts.
    """
    particles, _, box, half = images.shape
    padded = torch.nn.functional.pad(images, (0, box * OVERSAMPLING // 2 + 1 - half))
    padded[..., half - 1] *= 0.5  # the Nyquist term stands for both signs; on the finer grid each has its own
    rows = torch.fft.irfftn(padded, s=(box, box * OVERSAMPLING), dim=(-2, -1)) * OVERSAMPLING  # P, T, y, u
    columns = rows.permute(1, 3, 0, 2).reshape(matrix.shape[1], particles * box).numpy()
    sections = matrix @ columns  # (z, x), (P, y)
    return np.ascontiguousarray(sections.reshape(box, box, particles, box).transpose(2, 0, 3, 1))


def white_noise(count: int, series: TiltSeries, std: float, generator: torch.Generator) -> torch.Tensor:
    """Fourier images (count, T, N, N//2 + 1) of white noise with standard deviation ``std`` per pixel."""
    shape = (count, len(series.tilts), series.box, series.box)
    return torch.fft.rfftn(std * torch.randn(shape, generator=generator), dim=(-2, -1))
