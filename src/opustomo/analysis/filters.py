"""What is done to a map in Fourier space before it is written: low-pass, B-factor, weights by its class's FSC.

Owns: these gains as functions of spatial frequency, and their application to a crop.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from opustomo.physics.fourier import frequencies, irfft3, rfft3
from opustomo.physics.volume import centre_crop, centre_pad

Floats = NDArray[np.float64]
Gain = Callable[[Floats], Floats]  # of spatial frequencies in 1/Angstrom
EDGE = 0.05  # of the cut-off frequency, on either side of it
SEEN = 0.143


def gain_of(lowpass: float = 0.0, sharpen: float = 0.0, fsc: tuple[Floats, Floats] | None = None) -> Gain:
    """The product of what is asked for.

    lowpass: Angstrom, where a raised cosine has fallen to half (0: none); sharpen: B in square Angstrom,
    ``exp(+B s^2 / 4)``; fsc: frequencies and half-map FSC (S,), which weight by ``sqrt(2 FSC / (1 + FSC))``, what the
    sum of both halves keeps of the truth (Rosenthal and Henderson 2003), up to the first shell below 0.143.
    """

    def gain(frequency: Floats) -> Floats:
        value = np.exp(sharpen * frequency**2 / 4)
        if lowpass:
            place = np.clip((frequency * lowpass - 1) / (2 * EDGE) + 0.5, 0, 1)
            value = value * (0.5 + 0.5 * np.cos(np.pi * place))
        if fsc is not None:
            at, curve = fsc
            below = np.flatnonzero(curve[1:] < SEEN) + 1
            last = int(below[0]) if below.size else len(curve)
            known = np.where(np.arange(len(curve)) < last, np.clip(curve, 0, 1), 0.0)
            known[0] = 1.0  # the mean is not measured
            value = value * np.interp(frequency, at, np.sqrt(2 * known / (1 + known)), right=0.0)
        return np.asarray(value)

    return gain


def filtered(volume: NDArray[np.float32], pitch: float, gain: Gain) -> NDArray[np.float32]:
    """(C, C, C) sampled every ``pitch`` Angstrom with ``gain`` on its spectrum; density beyond the crop is zero."""
    size = volume.shape[-1]
    wide = 2 * size  # what leaves on one side does not come in on the other
    spectrum = rfft3(centre_pad(torch.from_numpy(np.asarray(volume, np.float32)), wide))
    frequency = frequencies(wide).norm(dim=-1).double().numpy() / (wide * pitch)
    return centre_crop(irfft3(spectrum * torch.from_numpy(gain(frequency)).float()), size).numpy()
