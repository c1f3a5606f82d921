"""Real space: everything turns about voxel N//2, and resampling keeps amplitudes up to high frequencies."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from torch_fourier_shell_correlation import fourier_shell_correlation as reference_fsc

from opustomo.physics.fourier import band_shell, fourier_resize, frequencies, irfft3, rfft3, to_band
from opustomo.physics.volume import (
    POINTS_AT_ONCE,
    centre_crop,
    centre_pad,
    centred_coordinates,
    cosine_edge,
    fourier_shell_correlation,
    randomise_phases,
    rotate_volume,
    sample_at,
    sample_cubic,
    sample_spline,
    shell_counts,
    shell_numbers,
    spherical_mask,
    spline_coefficients,
    substituted_fsc,
    turned_coordinates,
)

SIZE = 32
RNG = np.random.default_rng(4)
CENTRES = torch.from_numpy(RNG.uniform(-6, 6, (12, 3))).float()


def beads(turn: torch.Tensor, shift: torch.Tensor, width: float = 1.2, size: int = SIZE) -> torch.Tensor:
    """Gaussians at ``turn c + shift``, about voxel size//2."""
    centres = CENTRES @ turn.T + shift
    x = centred_coordinates(size)
    return torch.stack([torch.exp(-0.5 * (x - c).square().sum(-1) / width**2) for c in centres]).sum(0)


def random_turn(seed: int) -> torch.Tensor:
    return torch.from_numpy(Rotation.random(rng=np.random.default_rng(seed)).as_matrix()).float()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rotation_leaves_voxel_half_n_where_it_is(seed: int) -> None:
    volume = torch.exp(-0.5 * centred_coordinates(SIZE).square().sum(-1) / 2.5**2)
    turned = rotate_volume(volume, random_turn(seed))
    assert np.unravel_index(int(turned.argmax()), turned.shape) == (SIZE // 2,) * 3
    assert float((turned - volume).abs().max()) < 0.02  # half a voxel off costs 0.1 and more


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_rotated_beads_are_where_their_centres_turned(seed: int) -> None:
    """``V'(x) = V(R x + s)``: a bead at c appears at ``R^T (c - s)``, in every shell that has power."""
    turn, shift = random_turn(seed), torch.tensor([1.3, -0.6, 0.8])
    found = rotate_volume(beads(torch.eye(3), torch.zeros(3)), turn, shift)
    expected = beads(turn.T, -turn.T @ shift)
    assert float((found - expected).norm() / expected.norm()) < 0.01
    shell = band_shell(SIZE)
    error = to_band(rfft3(found - expected)).abs().square()
    power = to_band(rfft3(expected)).abs().square()
    high = (shell >= 10) & (shell < 14)  # up to 0.44 cycles per voxel
    assert float(error[high].sum() / power[high].sum()) < 0.01


def test_rotation_keeps_double_precision() -> None:
    """float64 in, float64 out: a sum turned is the sum of the turned to twelve digits, and float32 agrees."""
    volume, turn = beads(torch.eye(3), torch.zeros(3)).double(), random_turn(6)
    other = torch.randn((SIZE,) * 3, dtype=torch.float64)
    rest = rotate_volume(volume + other, turn) - rotate_volume(volume, turn) - rotate_volume(other, turn)
    assert rest.dtype == torch.float64
    assert float(rest.abs().max()) < 1e-12
    turned = rotate_volume(volume, turn.double(), torch.tensor([0.5, -1.0, 0.25], dtype=torch.float64))
    expected = rotate_volume(volume.float(), turn, torch.tensor([0.5, -1.0, 0.25]))
    assert turned.dtype == torch.float64 and expected.dtype == torch.float32
    assert torch.allclose(turned.float(), expected, atol=1e-4)


def test_spline_is_that_of_scipy() -> None:
    """Coefficients and readings, at the faces too, where the spline is periodic; float32 to 1e-5 of the largest."""
    spectrum = torch.where(frequencies(10).abs().amax(-1) < 5, rfft3(torch.randn((10,) * 3)), 0)  # no Nyquist
    volume = irfft3(spectrum)
    fine = fourier_resize(volume.double(), 20)
    expected = ndimage.spline_filter(fine.numpy(), mode="grid-wrap", output=np.float64)
    found = spline_coefficients(spectrum)
    assert np.abs(found.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    faces = torch.cartesian_prod(*[torch.tensor([-5.0, -4.9, 0.3, 4.45, 4.5])] * 3)
    points = torch.cat([torch.from_numpy(RNG.uniform(-5, 4.5, (POINTS_AT_ONCE, 3))).float(), faces])
    places = (points.double().numpy()[:, ::-1] * 2 + 10).T
    read = ndimage.map_coordinates(expected, places, order=3, mode="grid-wrap", prefilter=False)
    assert np.abs(sample_spline(found, points).numpy() - read).max() < 1e-5 * np.abs(read).max()
    outside = torch.tensor([[-5.01, 0.0, 0.0], [0.0, 4.51, 0.0], [0.0, 0.0, torch.nan]])
    assert not sample_spline(found, outside).any()


def test_turned_coordinates_are_the_product_with_every_voxel() -> None:
    matrix, shift = torch.randn((2, 2, 3)), torch.randn((2, 2))
    expected = torch.einsum("bdi,zyxi->bdzyx", matrix, centred_coordinates(7)) + shift[..., None, None, None]
    assert torch.allclose(turned_coordinates(7, matrix, shift), expected, atol=1e-5)


def test_trilinear_reading_at_voxels_returns_them() -> None:
    volume = torch.randn((8, 8, 8))
    assert torch.allclose(sample_at(volume, centred_coordinates(8)), volume, atol=1e-5)
    assert float(sample_at(volume, torch.tensor([[9.0, 0.0, 0.0]])).abs().max()) == 0


def test_cubic_reading_is_scipys_and_passes_through_the_voxels() -> None:
    volume = torch.randn((8, 8, 8))
    assert torch.allclose(sample_cubic(volume, centred_coordinates(8)), volume, atol=1e-5)
    points = torch.from_numpy(np.random.default_rng(4).uniform(-3.5, 2.5, (40, 3))).float()
    at = points.numpy()[:, ::-1].T + 4
    expected = ndimage.map_coordinates(volume.numpy(), at, order=3, mode="grid-wrap")
    assert np.abs(sample_cubic(volume, points).numpy() - expected).max() < 1e-5


def test_points_are_xyz() -> None:
    volume = torch.zeros((8, 8, 8))
    volume[4 + 2, 4 - 1, 4 + 3] = 1.0  # z = 2, y = -1, x = 3
    assert float(sample_at(volume, torch.tensor([3.0, -1.0, 2.0]))) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(("big", "small"), [(16, 10), (16, 16), (15, 8), (12, 7)])
def test_crop_and_pad_keep_the_centre_voxel(big: int, small: int) -> None:
    volume = torch.randn((2, big, big, big))
    cropped = centre_crop(volume, small)
    assert cropped.shape == (2, small, small, small)
    assert torch.equal(cropped[:, small // 2, small // 2, small // 2], volume[:, big // 2, big // 2, big // 2])
    padded = centre_pad(cropped, big)
    assert padded.shape == volume.shape
    assert torch.equal(centre_crop(padded, small), cropped)
    assert float(padded.abs().sum()) == pytest.approx(float(cropped.abs().sum()), rel=1e-6)


def test_spherical_mask_is_centred_and_has_its_radius() -> None:
    mask = spherical_mask(32, 9, 4)
    row = mask[16, 16]
    assert row[16 - 9 : 16 + 10].min() == 1
    assert row[16 + 13] == pytest.approx(0, abs=1e-6)
    assert row[16 + 11] == pytest.approx(0.5, abs=1e-3)  # raised cosine: a half in the middle of the edge
    assert torch.allclose(row[1:], row[1:].flip(0))  # symmetric about voxel 16
    hard = spherical_mask(32, 9, 0)
    assert float(hard.sum()) == pytest.approx(4 / 3 * np.pi * 9**3, rel=0.02)
    assert set(hard.unique().tolist()) == {0.0, 1.0}


def test_cosine_edge_falls_monotonically() -> None:
    values = cosine_edge(torch.linspace(-2, 6, 50), 4.0)
    assert bool((values.diff() <= 0).all())
    assert float(values[0]) == 1
    assert float(values[-1]) == 0


def test_fsc_is_one_and_minus_one() -> None:
    volume = torch.randn((16,) * 3, dtype=torch.float64)
    one = torch.ones(9, dtype=torch.float64)
    assert torch.allclose(fourier_shell_correlation(volume, 2 * volume), one)
    assert torch.allclose(fourier_shell_correlation(volume, -volume), -one)


def test_fsc_against_the_full_transform() -> None:
    """Integer shells of the full complex transform, summed by numpy."""
    a, b = torch.randn((2, 12, 12, 12), dtype=torch.float64)
    b = b + 0.7 * a
    fa, fb = np.fft.fftn(a.numpy()), np.fft.fftn(b.numpy())
    k = np.fft.fftfreq(12, 1 / 12)
    z, y, x = np.meshgrid(k, k, k, indexing="ij")
    shell = np.sqrt(x**2 + y**2 + z**2).round().astype(int).ravel()

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(shell, values.ravel())[:7]

    expected = total((fa * fb.conj()).real) / np.sqrt(total(np.abs(fa) ** 2) * total(np.abs(fb) ** 2))
    assert np.allclose(fourier_shell_correlation(a, b).numpy(), expected)


def test_fsc_follows_the_independent_package() -> None:
    """Its shells overlap linearly, ours do not: a curve that falls smoothly must come out alike."""
    k = frequencies(48).norm(dim=-1)
    generator = torch.Generator().manual_seed(3)
    signal, first, second = torch.randn((3, 48, 48, 48), generator=generator)
    smooth = irfft3(rfft3(signal) * torch.exp(-((k / 12) ** 2)))
    a, b = smooth + 0.3 * first, smooth + 0.3 * second
    found, expected = fourier_shell_correlation(a, b), reference_fsc(a, b)
    assert float(found[4]) > 0.85
    assert abs(float(found[22])) < 0.1
    assert float((found - expected)[4:24].abs().max()) < 0.03


def test_rotation_after_resizing_has_the_same_centre() -> None:
    """Rotating then resizing equals resizing then rotating only if both keep the same centre."""
    turn = random_turn(5)
    volume = beads(torch.eye(3), torch.zeros(3), width=2.2)
    one = fourier_resize(rotate_volume(volume, turn), 20)
    two = rotate_volume(fourier_resize(volume, 20), turn)
    assert float((one - two).norm() / one.norm()) < 0.01


def test_random_phases_keep_amplitudes_and_the_shells_below() -> None:
    volume = torch.randn((SIZE, SIZE, SIZE), generator=torch.Generator().manual_seed(1))
    changed = randomise_phases(volume, 5, torch.Generator().manual_seed(2))
    before, after = rfft3(volume), rfft3(changed)
    torch.testing.assert_close(after.abs(), before.abs(), atol=1e-4, rtol=1e-4)
    below = shell_numbers(SIZE) < 5
    torch.testing.assert_close(after[below], before[below], atol=1e-4, rtol=1e-4)
    assert fourier_shell_correlation(volume, changed)[6:].abs().max() < 0.1


def test_shells_hold_every_voxel_once() -> None:
    full = torch.fft.fftfreq(8, 1 / 8)
    radius = torch.stack(torch.meshgrid(full, full, full, indexing="ij"), -1).norm(dim=-1).round()
    assert shell_counts(8).tolist() == [float((radius == shell).sum()) for shell in range(5)]


def test_what_noise_has_is_taken_from_the_fsc_beyond_the_first_shell() -> None:
    total, noise = torch.tensor([1.0, 0.9, 0.7, 0.4, 0.3]), torch.tensor([1.0, 0.9, 0.6, 0.4, 0.0])
    expected = torch.tensor([1.0, 0.9, 0.25, 0.0, 0.3])
    torch.testing.assert_close(substituted_fsc(total, noise, 1), expected)
    assert substituted_fsc(total, noise, 2)[2] == total[2]
