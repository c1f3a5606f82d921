"""The CTF against the ``torch-ctf`` package, and its sign and damping against the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch_ctf import calculate_ctf_2d

from opustomo.data.particles import TILT_COLUMNS
from opustomo.physics.ctf import contrast_transfer, electron_wavelength

SIZE, PIXEL = 64, 3.0
V, U = torch.meshgrid(torch.fft.fftfreq(SIZE, PIXEL), torch.fft.rfftfreq(SIZE, PIXEL), indexing="ij")


def ours(**changes: float) -> torch.Tensor:
    values = {
        "defocus_u": 26000.0, "defocus_v": 22000.0, "defocus_angle": 20.0, "voltage": 300.0, "cs": 2.7,
        "amplitude": 0.07, "phase_shift": 0.0, "bfactor": 0.0, "scale": 1.0, "dose": 0.0,
    } | changes  # fmt: skip
    return contrast_transfer(U, V, torch.tensor([values[name] for name in TILT_COLUMNS[3:]]))


@pytest.mark.parametrize("angle", [0.0, 20.0, 70.0, 110.0])
@pytest.mark.parametrize("phase_shift", [0.0, 60.0])
@pytest.mark.parametrize(("voltage", "cs", "amplitude"), [(300.0, 2.7, 0.07), (200.0, 0.01, 0.2)])
def test_agrees_with_torch_ctf(angle: float, phase_shift: float, voltage: float, cs: float, amplitude: float) -> None:
    found = ours(defocus_angle=angle, phase_shift=phase_shift, voltage=voltage, cs=cs, amplitude=amplitude)
    # mean and half difference of the two defoci, in micrometres
    expected = calculate_ctf_2d(
        2.4, 0.2, angle, voltage, cs, amplitude, phase_shift, PIXEL, (SIZE, SIZE), rfft=True, fftshift=False
    )
    assert float((found - expected).abs().max()) < 2e-3


def test_defocus_u_lies_along_its_angle_from_x() -> None:
    """At angle 0 the first zero is nearer to the centre along x (the larger defocus) than along y."""
    ctf = ours(defocus_u=30000.0, defocus_v=20000.0, defocus_angle=0.0)
    along_x, along_y = ctf[0], ctf[: SIZE // 2, 0]
    assert int((along_x < 0).nonzero()[0]) < int((along_y < 0).nonzero()[0])


def test_protein_is_white_below_the_first_zero() -> None:
    ctf = ours(phase_shift=0.0)
    low = (U**2 + V**2).sqrt() < 1 / 40
    assert float(ctf[low].min()) > 0
    assert float(ctf[0, 0]) == pytest.approx(0.07, abs=1e-6)


@pytest.mark.parametrize("bfactor", [250.0, -250.0])
def test_bfactor_of_either_sign_damps_by_the_formula(bfactor: float) -> None:
    plain, damped = ours(), ours(bfactor=bfactor, scale=0.6)
    nyquist = (0, SIZE // 2)
    expected = 0.6 * math.exp(-250.0 / 4 * (1 / (2 * PIXEL)) ** 2)
    assert float(damped[nyquist] / plain[nyquist]) == pytest.approx(expected, rel=1e-4)
    assert float((damped.abs() - plain.abs()).max()) <= 0


def test_dose_filter_is_that_of_the_critical_dose() -> None:
    plain, damped = ours(), ours(dose=60.0)
    for index in ((0, 5), (7, 0), (3, 20)):
        s = float(torch.hypot(U[index], V[index]))
        expected = math.exp(-60.0 / (2 * (0.245 * s**-1.665 + 2.81)))
        assert float(damped[index] / plain[index]) == pytest.approx(expected, rel=1e-4)
    assert float(damped[0, 0]) == pytest.approx(float(plain[0, 0]), rel=1e-4)


def test_wavelength_at_the_usual_voltages() -> None:
    found = electron_wavelength(torch.tensor([100.0, 200.0, 300.0]))
    assert found.tolist() == pytest.approx([0.037014, 0.025079, 0.019687], rel=1e-4)
