"""Fourier resampling keeps densities and the centre; the band counts every voxel of the full transform once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opustomo.physics.fourier import (
    band_frequencies,
    band_multiplicity,
    band_shell,
    fourier_resize,
    from_band,
    irfft3,
    radial,
    resize_spectrum,
    rfft3,
    shell_sum,
    spectral_gradient,
    to_band,
)

EXTENT = 32.0
CENTRES, WIDTHS = [[2.5, -3.0, 1.0], [-4.0, 2.0, 3.5]], [2.6, 3.0]


def gaussians(box: int, derivative: int | None = None) -> torch.Tensor:
    """Two Gaussians in a box of edge EXTENT, origin at voxel box//2, sampled at ``box``; or a derivative per voxel."""
    axis = (torch.arange(box, dtype=torch.float64) - box // 2) * (EXTENT / box)
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    total = torch.zeros_like(x)
    for centre, width in zip(CENTRES, WIDTHS, strict=True):
        offsets = [c - c0 for c, c0 in zip((x, y, z), centre, strict=True)]
        value = torch.exp(-0.5 * torch.stack(offsets).square().sum(0) / width**2)
        if derivative is not None:
            value = -value * offsets[derivative] / width**2 * (EXTENT / box)
        total += value
    return total


@pytest.mark.parametrize(("size", "other"), [(32, 20), (20, 32), (32, 18), (24, 64)])
def test_resize_keeps_density_and_centre_voxel(size: int, other: int) -> None:
    resized = fourier_resize(gaussians(size), other)
    assert float((resized - gaussians(other)).abs().max()) < 2e-3  # peak 1; the sampling itself errs as much


def test_resize_up_and_down_is_the_identity() -> None:
    volume = irfft3(from_band(to_band(rfft3(torch.randn((16,) * 3, dtype=torch.float64))), 16))
    assert torch.allclose(fourier_resize(fourier_resize(volume, 26), 16), volume, atol=1e-12)


def test_resizing_drops_the_smaller_nyquist() -> None:
    """What stays is below both limits, so nothing at Nyquist stands there without its mate."""
    for size, other in ((16, 10), (10, 16)):
        spectrum = rfft3(fourier_resize(torch.randn((size,) * 3, dtype=torch.float64), other)).abs()
        limit = min(size, other) // 2
        assert float(spectrum[..., limit:].max()) < 1e-12
        assert float(spectrum[limit : other - limit + 1].max()) < 1e-12
        assert float(spectrum[..., limit - 1].max()) > 0.1


def test_transforms_are_ortho_with_zero_frequency_first() -> None:
    volume = torch.randn((2, 12, 12, 12), dtype=torch.float64)
    expected = np.fft.rfftn(volume.numpy(), axes=(1, 2, 3), norm="ortho")
    assert np.abs(rfft3(volume).numpy() - expected).max() < 1e-12
    assert torch.allclose(irfft3(rfft3(volume)), volume)


def test_band_round_trip_and_parseval() -> None:
    size = 12
    n = len(band_frequencies(size))
    band = torch.view_as_complex(torch.randn((3, n, 2), dtype=torch.float64))
    assert torch.equal(to_band(from_band(band, size)), band)
    # a real volume within the band: its power over all N^3 frequencies is the multiplicity-weighted band power
    real = irfft3(from_band(band, size))
    band = to_band(rfft3(real))
    power = (band.abs().square() * band_multiplicity(size)).sum(-1)
    assert torch.allclose(power, real.square().sum((-3, -2, -1)))


def test_band_holds_exactly_the_frequencies_below_nyquist_without_zero() -> None:
    size = 10
    k = np.fft.fftfreq(size, 1 / size)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    r2 = x**2 + y**2 + z**2
    assert int(band_multiplicity(size).sum()) == int(((r2 > 0) & (r2 < 25)).sum())
    assert int(band_frequencies(size)[:, 0].min()) == 0


def test_band_frequencies_are_xyz() -> None:
    """A plane wave along one axis must appear at the frequency vector of that axis."""
    size = 12
    index = torch.arange(size, dtype=torch.float64)
    for axis, shape in enumerate([(1, 1, size), (1, size, 1), (size, 1, 1)]):
        wave = torch.cos(2 * torch.pi * 3 * index / size).view(shape).expand(size, size, size)
        peak = to_band(rfft3(wave)).abs().argmax()
        expected = torch.zeros(3)
        expected[axis] = 3.0
        assert torch.equal(band_frequencies(size)[peak].abs(), expected)


def test_shell_sum_counts_both_halves() -> None:
    size = 12
    volume = irfft3(from_band(to_band(rfft3(torch.randn((size,) * 3, dtype=torch.float64))), size))
    power = np.abs(np.fft.fftn(volume.numpy(), norm="ortho")) ** 2
    k = np.fft.fftfreq(size, 1 / size)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    shell = np.sqrt(x**2 + y**2 + z**2).round().astype(int)
    expected = np.bincount(shell.ravel(), power.ravel())[: size // 2 + 1]
    found = shell_sum(to_band(rfft3(volume)).abs().square(), size).numpy()
    assert np.allclose(found, expected)


def test_radial_is_linear_in_frequency() -> None:
    size = 14
    slope = torch.arange(size // 2 + 1, dtype=torch.float64)
    assert torch.allclose(radial(3 * slope, size), 3 * band_frequencies(size).norm(dim=-1).double(), atol=1e-5)
    assert torch.equal(radial(slope, size).round().long(), band_shell(size))


def test_spectral_gradient_matches_the_analytic_one() -> None:
    found = spectral_gradient(gaussians(32))
    for axis in range(3):
        expected = gaussians(32, axis)
        assert float((found[axis] - expected).abs().max()) < 2e-3 * float(expected.abs().max())


@pytest.mark.parametrize(("size", "other"), [(16, 12), (12, 16), (14, 14)])
def test_resizing_axis_by_axis_is_a_crop_of_the_transform(size: int, other: int) -> None:
    volume = torch.randn((2, size, size, size), dtype=torch.float64)
    expected = irfft3(resize_spectrum(rfft3(volume), other) * (other / size) ** 1.5)
    # without the Nyquist plane, which a crop of the transform leaves out only where sizes differ
    expected = expected if size != other else volume
    assert torch.allclose(fourier_resize(volume, other), expected, atol=1e-12)
