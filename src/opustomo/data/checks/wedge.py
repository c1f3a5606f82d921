"""Owns: whether the data's own Fourier power lies where the tilts or the CTF volume say, and not turned or mirrored."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import maximum_filter
from torch import Tensor

from opustomo.data.findings import Finding
from opustomo.data.observe import read_band
from opustomo.data.particles import Particles
from opustomo.data.readers import read_transfer_volume
from opustomo.physics.fourier import (
    band_frequencies,
    band_shell,
    both_halves,
    from_band,
    resize_spectrum,
    to_band,
)
from opustomo.physics.grid import Grid
from opustomo.physics.observation import insert_tilts

Cube = NDArray[np.float64]

LEAK = 0.1  # power outside the wedge, as a fraction of that inside, from which it is more than the box's own window
_FIRST_SHELL = 3  # below, the wedge is thinner than a Fourier voxel
_FLOOR = 0.02  # of a shell's mean power: keeps the logarithm of an empty wedge from ruling the correlation
_RELATED = 0.3  # correlation below which data and transfer function have nothing to do with each other
_ALIKE = 0.97  # correlation of a prediction with its mirror image from which the tilts count as symmetric
_CLEAR = 0.01  # difference of two correlations over thousands of voxels that is no accident
_COVERED = 0.01  # of a shell's largest value: where a CTF volume is taken to have been measured
_PLACES = {
    (0, 2, 1): "the tilt axis along x instead of y",
    (1, 0, 2): "y and z exchanged (a volume not yet rotated to have the beam along z)",
    (2, 1, 0): "x and z exchanged",
    (1, 2, 0): "all axes permuted",
    (2, 0, 1): "all axes permuted",
}


class Power(NamedTuple):
    """Mean Fourier power of a sample and what its transfer functions predict, as odd cubes (z, y, x) about k = 0."""

    measured: Cube
    predicted: Cube
    covered: NDArray[np.bool_]
    shell: NDArray[np.int64]


class Placement(NamedTuple):
    """Agreement under one placement of the axes: log-power correlation, power outside over inside (NaN: none out)."""

    correlation: float
    leak: float


def sample_power(particles: Particles, grid: Grid, mean_normalised: bool) -> Power:
    """Mean power of these particles and their predicted power; errors as ``observe.read_band``.

    The prediction is h^2 of the volume as stored (h / m for means over tilts): where a CTF squared is large, signal
    and noise are, and where nothing was measured there is nothing.
    """
    size = grid.working_box
    k = band_frequencies(size)
    measured, predicted, covered = torch.zeros(len(k)), torch.zeros(len(k)), torch.zeros(len(k))
    for i in range(len(particles)):
        measured += read_band(particles.image_files[i], grid).abs().square()
        if particles.transfer == "tilts":
            h, m = insert_tilts(size, torch.from_numpy(particles.tilts_of(i)).float(), grid.extent)
            predicted += torch.where(m > 0.05, (h / m.clamp(min=0.05)).square(), 0.0) if mean_normalised else h.square()
            covered += m
        else:
            half = torch.from_numpy(read_transfer_volume(particles.ctf_files[i], grid.box))
            transfer = to_band(resize_spectrum(half, size))
            predicted += transfer.clamp(min=0.0) if particles.premultiplied else transfer.square()
    shell = _cube(band_shell(size).double(), size).round().astype(np.int64)
    prediction = _cube(predicted, size)
    seen = _cube(covered, size) > 0 if particles.transfer == "tilts" else _neighbourhood(prediction, shell)
    return Power(_cube(measured, size), prediction, seen, shell)


def _cube(band: Tensor, size: int) -> Cube:
    """The full transform of a real, even band quantity, centred, without the Nyquist planes: (size - 1,) * 3."""
    return torch.fft.fftshift(both_halves(from_band(band, size))).numpy()[1:, 1:, 1:].astype(np.float64)


def _neighbourhood(prediction: Cube, shell: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where a CTF volume was measured: some neighbour is well above zero (Thon rings are zeros, too)."""
    largest = np.zeros(shell.max() + 1)
    np.maximum.at(largest, shell.ravel(), prediction.ravel())
    return maximum_filter(prediction, 3) > _COVERED * largest[shell]


def agreement(power: Power, axes: tuple[int, int, int] = (0, 1, 2), mirrored: bool = False) -> Placement:
    """Agreement when the prediction's axes are permuted and, if asked, x is reversed (the tilt sign inverted)."""
    placed = _placed(power, axes, mirrored)
    band = _band(power)
    # the window of the box spreads power by a voxel: next to the wedge nothing can be said
    outside = band & ~maximum_filter(placed.covered, 3)
    measured = _flattened(power.measured, power.shell)
    leak = float(measured[outside].mean() / measured[band & placed.covered].mean()) if outside.any() else float("nan")
    return Placement(_log_correlation(power.measured, placed.predicted, power), leak)


def _placed(power: Power, axes: tuple[int, int, int], mirrored: bool) -> Power:
    def place(cube: NDArray) -> NDArray:
        return (cube[..., ::-1] if mirrored else cube).transpose(axes)

    return power._replace(predicted=place(power.predicted), covered=place(power.covered))


def _band(power: Power) -> NDArray[np.bool_]:
    return (power.shell >= _FIRST_SHELL) & (power.shell < power.shell.max())


def _log_correlation(one: Cube, other: Cube, power: Power) -> float:
    """Correlation of two power distributions after division by the mean of each shell; 0 where one is constant."""
    a, b = (np.log(_flattened(cube, power.shell)[_band(power)] + _FLOOR) for cube in (one, other))
    return 0.0 if a.std() == 0 or b.std() == 0 else float(np.corrcoef(a, b)[0, 1])


def _flattened(cube: Cube, shell: NDArray[np.int64]) -> Cube:
    """The cube over its mean on each shell: only the anisotropy is left."""
    total = np.bincount(shell.ravel(), cube.ravel())
    mean = total / np.maximum(np.bincount(shell.ravel()), 1)
    return cube / np.maximum(mean, 1e-30)[shell]


def wedge_findings(power: Power) -> list[Finding]:
    """Whether another placement fits better, else power outside the wedge, its agreement with the CTF, tilt sign."""
    if power.shell.max() <= _FIRST_SHELL + 1:
        return [Finding("note", "wedge", "the box is too small to compare power and CTF")]
    given = agreement(power)
    turned = {axes: agreement(power, axes) for axes in _PLACES}
    best = max(turned, key=lambda axes: turned[axes].correlation)
    values = {"correlation": round(given.correlation, 3), "correlation_turned": round(turned[best].correlation, 3)}
    if not np.isnan(given.leak):
        values["leak"] = round(given.leak, 4)
    better = turned[best].correlation > given.correlation + 0.2
    if better and not turned[best].leak > 0.5 * given.leak:
        scores = f"correlation {turned[best].correlation:.2f}, as read {given.correlation:.2f}"
        found = f"the data's power fits the wedge with {_PLACES[best]}: {scores}"
        action = "volumes and tilt angles are in different frames: turn one of them"
        return [Finding("error", "wedge", found, action, values)]
    sign = _tilt_sign(power, given)
    if any(finding.level == "warning" for finding in sign):
        return [*sign, _match(given, turned[best], values)]  # power outside the wedge follows from it
    return [_leak(given, values), _match(given, turned[best], values), *sign]


def _leak(given: Placement, values: dict[str, float]) -> Finding:
    if np.isnan(given.leak):
        return Finding("note", "wedge", "the tilts leave no wedge to look into", values=values)
    found = f"power outside the tilts' wedge is {given.leak:.1%} of that inside"
    if given.leak > LEAK:
        action = "use raw subtomograms: denoised or wedge-filled ones, or CTFs of another set, break the weighting"
        return Finding("warning", "wedge", found, action, values)
    return Finding("ok", "wedge", found, values=values)


def _match(given: Placement, turned: Placement, values: dict[str, float]) -> Finding:
    found = (
        f"power follows the predicted CTF^2 with correlation {given.correlation:.2f} ({turned.correlation:.2f} turned)"
    )
    if given.correlation < _RELATED:
        found = f"power does not follow the predicted CTF^2: correlation {given.correlation:.2f}"
        action = "check that these CTFs belong to these subtomograms"
        return Finding("warning", "CTF and power", found, action, values)
    return Finding("ok", "CTF and power", found, values=values)


def _tilt_sign(power: Power, given: Placement) -> list[Finding]:
    """The tilt sign shows only where the tilts are not symmetric about the beam."""
    mirrored = _placed(power, (0, 1, 2), True)
    if _log_correlation(power.predicted, mirrored.predicted, power) > _ALIKE:
        found = "the tilts are symmetric: power cannot tell the sign of the tilt angles, nor the hand"
        return [Finding("note", "tilt sign", found, "taken as written; see the hand in the average")]
    opposite = agreement(power, mirrored=True)
    if max(given.correlation, opposite.correlation) < _RELATED:
        return []
    gain = opposite.correlation - given.correlation
    values = {
        "correlation": round(given.correlation, 3),
        "correlation_inverted": round(opposite.correlation, 3),
    }
    scores = f"correlation {given.correlation:.2f} as written, {opposite.correlation:.2f} inverted"
    if gain > _CLEAR or (gain > 0 and given.leak > max(LEAK, 2 * opposite.leak)):
        found = f"the opposite sign of the tilt angles fits the power better: {scores}"
        action = "invert rlnAngleTilt of the tilts, or the volumes are mirrored along z: see the hand in the average"
        return [Finding("warning", "tilt sign", found, action, values)]
    if gain > -_CLEAR:
        found = f"the tilts are too symmetric to tell their sign from the power: {scores}"
        return [Finding("note", "tilt sign", found, "taken as written; see the hand in the average", values)]
    return [Finding("ok", "tilt sign", f"fits the power: {scores}", values=values)]
