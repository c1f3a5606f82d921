"""The contrast transfer function of a tilt image.

Owns: its value and sign (METHOD section 2): underfocus positive, white protein positive at low frequency, every
B-factor damps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor


def electron_wavelength(voltage: Tensor) -> Tensor:
    """Relativistic electron wavelength in Angstrom; voltage in kV."""
    volts = voltage * 1e3
    return 12.2643247 / torch.sqrt(volts * (1.0 + 0.978466e-6 * volts))


def transfer_coefficients(lens: Tensor) -> tuple[Tensor, ...]:
    """What ``transfer_at`` needs of tilt images: all that does not depend on the frequency, so that it is made once.

    lens: (..., 10) as for ``contrast_transfer``.  The astigmatic defocus makes the phase a quadratic form of (u, v),
    less a term of the fourth order: ``c + uu u^2 + uv u v + vv v^2 - four s^4``.  Returns c, uu, uv, vv, four, decay
    of the envelope, scale and, where an image has one, the dose; (...) each.
    """
    defocus_u, defocus_v, defocus_angle, voltage, cs, amplitude, phase_shift, bfactor, scale, dose = lens.unbind(-1)
    wavelength, angle = electron_wavelength(voltage), 2.0 * torch.deg2rad(defocus_angle)
    mean, astigmatic = defocus_u + defocus_v, defocus_u - defocus_v
    half = 0.5 * math.pi * wavelength
    form = (
        torch.deg2rad(phase_shift) + torch.asin(amplitude),
        half * (mean + astigmatic * torch.cos(angle)),
        2.0 * half * astigmatic * torch.sin(angle),
        half * (mean - astigmatic * torch.cos(angle)),
        half * cs * 1e7 * wavelength.square(),
        0.25 * bfactor.abs(),
        scale,
    )
    return (*form, dose) if bool((dose != 0).any()) else form


def transfer_at(u: Tensor, v: Tensor, coefficients: Iterable[Tensor]) -> Tensor:
    """``contrast_transfer`` at (u, v) from ``transfer_coefficients``; all broadcast."""
    constant, uu, uv, vv, four, decay, scale, *dose = coefficients
    u2, v2 = u * u, v * v
    s2 = u2 + v2
    phase = constant + uu * u2 + uv * (u * v) + vv * v2 - four * s2 * s2
    exponent = -decay * s2
    if dose:
        exponent = exponent - 0.5 * dose[0] / (0.245 * s2.clamp(min=1e-12) ** -0.8325 + 2.81)
    return torch.sin(phase) * scale * torch.exp(exponent)


def contrast_transfer(u: Tensor, v: Tensor, lens: Tensor) -> Tensor:
    """CTF times envelope times scale at in-plane frequencies (u, v).

    u, v: 1/Angstrom along x and y of the aligned tilt image; lens (..., 10), whose (...) broadcast with them: defocus u
    and v in Angstrom, their angle in degrees from x, voltage in kV, Cs in mm, amplitude contrast as a fraction, phase
    shift in degrees, B-factor in Angstrom^2 (its sign is ignored: both dialects mean damping), scale, and dose in
    electrons per square Angstrom (0: no filter), as in data.particles.TILT_COLUMNS.
    ``sin(pi df lambda s^2 - pi/2 Cs lambda^3 s^4 + phase + asin w) scale exp(-|B| s^2 / 4)``, and with a dose
    times ``exp(-dose / (2 Nc))`` of the critical dose ``Nc = 0.245 s^-1.665 + 2.81``.
    Source: Mindell & Grigorieff 2003 for the astigmatic defocus; RELION for B-factor and scale; Grant & Grigorieff 2015
    (eLife 4:e06980) for the dose at 300 kV.
    """
    return transfer_at(u, v, transfer_coefficients(lens))
