"""Owns: what a small average says: contrast, normalisation, and whether the poses bring anything out at all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from opustomo.config import InputOptions
from opustomo.data.findings import Finding
from opustomo.data.noise import estimate_noise, sample_average
from opustomo.data.observe import Noise, observe_all
from opustomo.data.particles import Particles
from opustomo.errors import UserError
from opustomo.physics.fourier import rfft3, to_band
from opustomo.physics.grid import Grid
from opustomo.physics.volume import fourier_shell_correlation, spherical_mask

HALF_SHARE = 0.1  # of the shell's mean weight, added to the weight of half a sample
THRESHOLD = 0.143  # of the FSC between two half averages
_FEW = 16  # particles: with fewer the halves are noise
_BLOB = 4  # shells: agreement up to here is that of a blob, whatever its orientation
_CLEAR = 0.08  # mean FSC beyond the blob; with exchanged orientations it varies by 0.02 to 0.03
_FIRST_SHELL = 2  # the first shell of a masked box holds little but its mean


def half_mask(size: int) -> Tensor:
    """Soft sphere (M, M, M) in which averages of half a sample are compared."""
    return spherical_mask(size, 0.35 * size, 0.1 * size)


def noise_model(particles: Particles, grid: Grid) -> Noise | UserError:
    """Contrast, normalisation and noise of these particles as ``train`` would find them without being told."""
    size = grid.working_box
    mask = spherical_mask(size, 0.4 * size, 0.08 * size)
    try:
        return estimate_noise(particles, grid, mask, contrast="auto", normalisation="auto", sample=len(particles))
    except UserError as error:
        return error


def half_correlation(particles: Particles, grid: Grid, noise: Noise) -> Tensor:
    """FSC (M//2+1,) of the averages of every other particle, inside a soft sphere; nothing is aligned."""
    rows = range(len(particles))
    volumes = [_average(particles, rows[start::2], grid, noise) for start in (0, 1)]
    return fourier_shell_correlation(*volumes)


def _average(particles: Particles, rows: Sequence[int], grid: Grid, noise: Noise) -> Tensor:
    size = grid.working_box
    numerator, weight = torch.zeros((size,) * 3), torch.zeros_like(noise.power)
    for _, b, w in observe_all(particles, rows, grid, noise, crop=size):
        numerator, weight = numerator + b, weight + w
    return sample_average(to_band(rfft3(numerator)), weight, size, HALF_SHARE) * half_mask(size)


def signal_findings(noise: Noise, particles: Particles, grid: Grid, options: InputOptions) -> list[Finding]:
    """Contrast, normalisation, and the resolution of half averages against that with poses exchanged."""
    if len(particles) < _FEW:
        few = Finding("note", "signal", f"{len(particles)} particles are too few for half averages")
        return [_contrast(noise, len(particles), True, options), *_normalisation(noise, particles, options), few]
    found = half_correlation(particles, grid, noise)
    exchanged = replace(particles, rotation=np.roll(particles.rotation, len(particles) // 3, axis=0))
    control = half_correlation(exchanged, grid, noise)
    seen = bool((found - control)[_BLOB:-1].mean() > _CLEAR)
    signal = _signal(found, control, seen, len(particles) // 2, grid)
    return [_contrast(noise, len(particles), seen, options), *_normalisation(noise, particles, options), signal]


def _last_shell(curve: Tensor) -> int:
    """The last shell before the FSC first falls below the threshold, 0 if it never stood above it."""
    below = torch.nonzero(curve[_FIRST_SHELL:] < THRESHOLD)
    last = int(below[0, 0]) + _FIRST_SHELL - 1 if len(below) else len(curve) - 1
    return last if last >= _FIRST_SHELL else 0


def _signal(found: Tensor, control: Tensor, seen: bool, half: int, grid: Grid) -> Finding:
    """With orientations handed to the wrong particles a sphere still averages to a sphere: the bar to clear."""
    values = {
        "fsc": [round(float(value), 3) for value in found[1:]],
        "fsc_exchanged": [round(float(value), 3) for value in control[1:]],
        "shell_angstrom": round(grid.extent, 3),
    }
    words = f"averages of {half} and {half} particles agree {_reach(found, grid)}"
    if seen:
        against = f"with orientations exchanged between particles {_reach(control, grid)}"
        return Finding("ok", "signal", f"{words} (FSC {THRESHOLD}); {against}", values=values)
    words += ", hardly better than with orientations exchanged between particles"
    action = "look at `opustomo average` of all: poses, CTF or pixel size may be wrong, or these are too few"
    return Finding("warning", "signal", words, action, values)


def _reach(curve: Tensor, grid: Grid) -> str:
    shell = _last_shell(curve)
    if shell == 0:
        return "nowhere"
    beyond = ", the limit of this look" if shell >= len(curve) - 2 else ""
    return f"to {grid.extent / shell:.0f} A{beyond}"


def _contrast(noise: Noise, count: int, seen: bool, options: InputOptions) -> Finding:
    colour, looks = ("white", "bright") if noise.contrast > 0 else ("black", "dark")
    values = {"contrast": colour, "sure": seen and noise.contrast_sure}
    if options.contrast not in ("auto", colour):
        found = f"protein looks {looks}, but --contrast {options.contrast} was given"
        return Finding("warning", "contrast", found, "the option is obeyed; leave it out unless you are sure", values)
    if not (seen and noise.contrast_sure):
        found = f"protein is {looks} at a guess: the average of {count} particles does not stand out"
        return Finding("warning", "contrast", found, "look at `opustomo average`, then give --contrast", values)
    action = "used as it is" if colour == "white" else "inverted while reading"
    return Finding("ok", "contrast", f"protein is {looks} in the average of {count} particles", action, values)


def _normalisation(noise: Noise, particles: Particles, options: InputOptions) -> list[Finding]:
    if particles.stacks:
        return []
    if particles.transfer != "tilts":
        kind = "CTF volume" if particles.transfer == "ctf_volume" else "weight volume"
        action = "the noise is estimated for every Fourier voxel from the data"
        return [Finding("ok", "normalisation", f"as in the {kind}", action)]
    seen, words = ("mean", "averaged over") if noise.mean_normalised else ("sum", "summed over")
    if options.normalisation not in ("auto", seen):
        found = f"subtomograms look {words} the tilts, but --normalisation {options.normalisation} was given"
        action = "the option is obeyed; leave it out unless you are sure"
        return [Finding("warning", "normalisation", found, action)]
    found = f"{words} the tilts, as the noise across Fourier space shows"
    return [Finding("ok", "normalisation", found, "weighted accordingly", {"normalisation": seen})]
