"""Owns: whether the particles fit their average better with the tilt sign or the hand of the defocus turned round."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.data.checks.signal import HALF_SHARE, half_mask
from opustomo.data.findings import Finding
from opustomo.data.noise import sample_average
from opustomo.data.observe import Noise, observe_all
from opustomo.data.particles import TILT_COLUMNS, Particles
from opustomo.physics.ctf import electron_wavelength
from opustomo.physics.fourier import rfft3, shell_sum, to_band
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band

SURE = 4.0  # standard errors by which one hypothesis must be the better one
_FEW = 16  # particles: with fewer the halves are noise
_LEAST_PHASE = 0.2  # radians at the working Nyquist by which the depth must turn the CTF's phase
_TILT, _VOLTAGE = TILT_COLUMNS.index("tilt"), TILT_COLUMNS.index("voltage")
_DEFOCUS = [TILT_COLUMNS.index(name) for name in ("defocus_u", "defocus_v")]


class Margin(NamedTuple):
    """By how many nats a particle fits better as written than turned round: mean and its standard error."""

    nats: float
    error: float

    @property
    def deviations(self) -> float:
        return self.nats / max(self.error, 1e-12)


def inverted_tilts(particles: Particles) -> Particles:
    """The same poses with every tilt angle negated."""
    tilts = particles.tilts.copy()
    tilts[:, _TILT] *= -1
    return replace(particles, tilts=tilts)


def mirrored_defocus(particles: Particles) -> tuple[Particles, float]:
    """The other hand: every defocus mirrored about its image's mean over the particles of the tilt series.

    Also the root mean square of what particles of one image differ by, Angstrom (0: nothing to mirror).  Images are
    told apart by the number in the stack, of subtomograms by their place in the table of tilts.
    """
    counts = np.diff(particles.tilt_offsets)
    place = particles.slices if particles.stacks else np.concatenate([np.arange(n) for n in counts])
    series = np.unique(particles.tomogram.astype(str), return_inverse=True)[1]
    key = np.repeat(series, counts) * (place.max() + 1) + place
    group, size = np.unique(key, return_inverse=True, return_counts=True)[1:]
    defocus = particles.tilts[:, _DEFOCUS]
    middle = np.stack([np.bincount(group, column) / size for column in defocus.T], 1)[group]
    tilts = particles.tilts.copy()
    tilts[:, _DEFOCUS] = 2 * middle - defocus
    return replace(particles, tilts=tilts), float(np.sqrt(np.square(defocus - middle).mean()))


def compare(particles: Particles, other: Particles, grid: Grid, noise: Noise) -> Margin:
    """Margin of ``particles`` over ``other``, each scored against the average of the half that it is not in."""
    difference = _scores(particles, grid, noise) - _scores(other, grid, noise)
    return Margin(float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(len(difference))))


def _scores(particles: Particles, grid: Grid, noise: Noise) -> NDArray[np.float64]:
    """(P,) log-likelihood gain in nats of each particle by the average of the other half."""
    size = grid.working_box
    mask = half_mask(size)
    _, b, w = zip(*observe_all(particles, range(len(particles)), grid, noise, crop=size), strict=True)
    bands, weights = to_band(rfft3(torch.stack(b))), torch.stack(w)
    overlap, energy = torch.zeros(len(b), size // 2 + 1), torch.zeros(len(b), size // 2 + 1)
    for half in (0, 1):
        average = sample_average(bands[1 - half :: 2].sum(0), weights[1 - half :: 2].sum(0), size, HALF_SHARE)
        v = model_band(average * mask, size)
        overlap[half::2] = torch.stack([shell_sum((v.conj() * one).real, size) for one in bands[half::2]])
        energy[half::2] = torch.stack([shell_sum(v.abs().square() * one, size) for one in weights[half::2]])
    # what the average is worth in each shell: where it is noise, nothing
    gain = (overlap.sum(0) / energy.sum(0).clamp(min=1e-30)).clamp(0.0, 1.0)
    return (gain * overlap - 0.5 * gain.square() * energy).sum(-1).double().numpy()


def hand_findings(particles: Particles, grid: Grid, noise: Noise) -> list[Finding]:
    """Tilt sign of tilt images (of subtomograms ``wedge`` tells it) and hand of the defocus, each with its margin."""
    if particles.transfer != "tilts" or len(particles) < _FEW:
        return []
    found = []
    if particles.stacks:
        margin = compare(particles, inverted_tilts(particles), grid, noise)
        action = (
            "invert the tilt angles (rlnTomoYTilt; of rlnTomoProj the third number of X, the first of Z), or the poses"
        )
        found.append(_finding("tilt sign", "the opposite sign of the tilt angles", margin, action))
    other, spread = mirrored_defocus(particles)
    nyquist = 2 * grid.extent / grid.working_box
    length = float(electron_wavelength(torch.tensor(np.median(particles.tilts[:, _VOLTAGE]))))
    phase = np.pi * length * spread / nyquist**2
    if phase < _LEAST_PHASE:
        words = f"particles of a tilt series differ by {spread:.0f} A in defocus: too little at {nyquist:.0f} A"
        return [*found, Finding("note", "defocus hand", words, "taken as written", {"spread": round(spread, 1)})]
    margin = compare(particles, other, grid, noise)
    action = "invert rlnTomoHand, or export the set again with the other hand"
    return [*found, _finding("defocus hand", "a defocus that falls where it now rises", margin, action)]


def _finding(topic: str, turned: str, margin: Margin, action: str) -> Finding:
    values = {"nats": round(margin.nats, 3), "error": round(margin.error, 3)}
    score = f"{abs(margin.nats):.2g} +- {margin.error:.1g} nats a particle"
    if margin.deviations > SURE:
        return Finding("ok", topic, f"as written particles fit their average better, by {score}", values=values)
    if margin.deviations < -SURE:
        return Finding("warning", topic, f"{turned} fits the average better, by {score}", action, values)
    words = f"not decidable from this sample: as written fits by {margin.nats:.2g} +- {margin.error:.1g} nats better"
    return Finding("note", topic, words, "taken as written", values)
