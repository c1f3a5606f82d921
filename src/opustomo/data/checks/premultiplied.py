"""Owns: whether tilt images look multiplied by their CTF, which the noise tells: it vanishes where the CTF does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opustomo.data.checks.signal import noise_model
from opustomo.data.findings import Finding
from opustomo.data.observe import Noise
from opustomo.data.particles import Particles
from opustomo.data.readers import relion
from opustomo.data.stacks import LEVEL_FROM, read_stack
from opustomo.errors import UserError
from opustomo.physics.grid import Grid
from opustomo.physics.images import image_frequencies, image_radius, inside_band

_DEVIATIONS = 4.0  # standard errors, as everywhere in ``check``
_LEAST = 3  # particles
_MOST_SIGNAL = 0.1  # of a shell's power: in raw images signal goes with CTF^2, too
_FLOOR = 0.4  # of the mean CTF^2: what a box that ends, and a defocus that is not exact, leave at the zeros


def premultiplied_findings(particles: Particles, grid: Grid, noise: Noise) -> list[Finding]:
    """Whether the noise of tilt images is that of what the file says of them, or of the contrary."""
    column, flag = relion.PREMULTIPLIED, int(particles.premultiplied)
    stated = relion.constant(particles.star, column) is not None
    says = f"{column} {flag}" if stated else f"no {column}, which counts as 0"
    quiet = noise.explained < _MOST_SIGNAL
    if not quiet[_beyond(grid)].any():  # wrong weights explain anything: look with the others
        other = noise_model(replace(particles, premultiplied=not flag), grid)
        quiet = quiet if isinstance(other, UserError) else other.explained < _MOST_SIGNAL
    gains = _gains(particles, grid, quiet) * (1 if flag else -1)
    values, figures = {}, "too few quiet shells or particles"
    if len(gains) >= _LEAST:
        values = {"nats": float(gains.mean()), "standard_error": float(gains.std(ddof=1) / np.sqrt(len(gains)))}
        figures = f"{abs(values['nats']):.2g} +- {values['standard_error']:.2g} nats a particle"
        if values["nats"] > _DEVIATIONS * values["standard_error"]:
            found = f"{says}; as the noise of the images has it, by {figures}"
            return [Finding("ok", "premultiplied", found, values=values)]
        if values["nats"] < -_DEVIATIONS * values["standard_error"]:
            found = (
                f"{says}, but the noise is that of images {'not ' if flag else ''}multiplied by the CTF, by {figures}"
            )
            action = f"weights would be wrong: correct it to {1 - flag}, unless you know how the images were made"
            return [Finding("warning", "premultiplied", found, action, values)]
    found = f"{says}; the noise of the images does not tell ({figures})"
    return [Finding("ok" if stated else "note", "premultiplied", found, "taken as the file says", values)]


def _beyond(grid: Grid) -> slice:
    """Shells beyond half of Nyquist and within the band."""
    return slice(int(LEVEL_FROM * grid.working_box) + 1, grid.working_box // 2)


def _gains(particles: Particles, grid: Grid, quiet: Tensor) -> NDArray[np.float64]:
    """By how much the log likelihood of each particle's noise is higher if it goes with CTF^2 than if it is even.

    (P,) nats, from the shells beyond half of Nyquist that are quiet (M//2+1,), which hold hardly any signal; empty
    where there are none.  Under either hypothesis every image has a level of its own, and all share a curve.
    """
    size = grid.working_box
    shell = image_radius(size).round().long().clamp(max=size // 2)
    taken = torch.zeros_like(quiet)
    taken[_beyond(grid)] = quiet[_beyond(grid)]
    used = inside_band(size) & taken[shell]
    if not used.any():
        return np.zeros(0)
    once = torch.where(image_frequencies(size)[..., 0] > 0, 1.0, 0.5)[used]  # v and -v are one number where u is 0
    powers, squares = [], []
    for i in range(len(particles)):
        stack = read_stack(particles, i, grid)
        powers.append(stack.spectra.abs().square()[:, used])
        square = stack.transfer.square()[:, used]
        squares.append(square + _FLOOR * square.mean(1, keepdim=True))
    multiplied = _log_likelihoods(powers, squares, once, shell[used])
    return multiplied - _log_likelihoods(powers, [torch.ones_like(one) for one in squares], once, shell[used])


def _log_likelihoods(powers: list[Tensor], shapes: list[Tensor], once: Tensor, shell: Tensor) -> NDArray[np.float64]:
    """(P,) of powers (T, n) of complex numbers whose variance is shape x level of the image x curve of the shells."""
    variances = [
        shape * ((power * once).sum(1) / (shape * once).sum(1)).clamp(min=1e-30)[:, None]
        for power, shape in zip(powers, shapes, strict=True)
    ]
    sums, counts = torch.zeros(2, int(shell.max()) + 1)
    for power, variance in zip(powers, variances, strict=True):
        sums.index_add_(0, shell, (power / variance * once).sum(0))
        counts.index_add_(0, shell, once * len(power))
    curve = (sums / counts.clamp(min=1.0)).clamp(min=1e-30)[shell]
    found = [
        -((power / (variance * curve) + (variance * curve).log()) * once).sum()
        for power, variance in zip(powers, variances, strict=True)
    ]
    return torch.stack(found).double().numpy()
