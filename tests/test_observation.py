"""Image formation: tilt insertion against brute force, B and W against an independent simulator and the likelihood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from atom_files import written
from opustomo.config import InputOptions, SimulateConfig
from opustomo.data.mrc import read_volume
from opustomo.data.observe import Noise, observe, working_mask
from opustomo.data.particles import Particles
from opustomo.data.readers import read_particles
from opustomo.physics.fourier import (
    band_frequencies,
    band_multiplicity,
    fourier_resize,
    from_band,
    irfft3,
    rfft3,
    to_band,
)
from opustomo.physics.geometry import euler_to_matrix
from opustomo.physics.grid import make_grid, mask_extent
from opustomo.physics.observation import (
    information,
    insert_tilts,
    matched_filter,
    model_band,
    negative_log_likelihood,
    quadratic_form,
    resample_numerator,
    rotate_weight,
)
from opustomo.physics.volume import centre_crop, centre_pad, centred_coordinates, rotate_volume, spherical_mask
from opustomo.simulate.dataset import main as simulate_main
from opustomo.simulate.dataset import simulate
from opustomo.simulate.plan import Preset

SIZE, EXTENT = 16, 120.0
RNG = np.random.default_rng(11)


def tilt_rows(angles: list[float]) -> np.ndarray:
    """Tilts without any symmetry: full Euler angles, astigmatism, phase shift, B-factor and scale of their own."""
    n = len(angles)
    columns = [
        RNG.uniform(-20, 20, n), np.array(angles), RNG.uniform(-90, 90, n),
        RNG.uniform(25000, 30000, n), RNG.uniform(18000, 24000, n), RNG.uniform(0, 180, n),
        np.full(n, 300.0), np.full(n, 2.7), np.full(n, 0.07),
        RNG.uniform(0, 30, n), RNG.uniform(50, 300, n), RNG.uniform(0.4, 1, n), np.zeros(n),
    ]  # fmt: skip
    return np.stack(columns, 1)


def brute_force(k: np.ndarray, rows: np.ndarray, extent: float) -> tuple[np.ndarray, np.ndarray]:
    """One voxel and one tilt at a time, from the formulas of METHOD sections 2 and 3."""
    h, m = np.zeros(len(k)), np.zeros(len(k))
    for rot, tilt, psi, df_u, df_v, angle, kv, cs, amplitude, phase, bfactor, scale, _ in rows:
        frame = Rotation.from_euler("ZYZ", [rot, tilt, psi], degrees=True).as_matrix().T
        volts = kv * 1e3
        wavelength = 12.2643 / np.sqrt(volts + 0.978476e-6 * volts**2)
        for j, vector in enumerate(k):
            u, v, distance = frame @ vector
            if abs(distance) >= 1:
                continue
            s2 = (u * u + v * v) / extent**2
            around = np.arctan2(v, u) - np.deg2rad(angle)
            df = 0.5 * (df_u + df_v + (df_u - df_v) * np.cos(2 * around))
            chi = np.pi * wavelength * df * s2 - np.pi / 2 * cs * 1e7 * wavelength**3 * s2**2
            ctf = np.sin(chi + np.deg2rad(phase) + np.arcsin(amplitude)) * scale * np.exp(-bfactor * s2 / 4)
            h[j] += (1 - abs(distance)) * ctf
            m[j] += 1 - abs(distance)
    return h, m


def test_insertion_matches_a_brute_force_loop() -> None:
    """Planes in every direction: each axis is the steepest to some."""
    rows = tilt_rows([-50.0, -20.0, 0.0, 35.0, 60.0])
    normals = euler_to_matrix(torch.from_numpy(rows[:, :3]))[:, 2].numpy()
    steepest: set[int] = set()
    for turn in Rotation.random(3, rng=RNG).as_matrix():
        steepest |= set(np.abs(normals @ turn).argmax(1).tolist())
        h, m = insert_tilts(SIZE, torch.from_numpy(rows), EXTENT, torch.from_numpy(turn))
        expected_h, expected_m = brute_force((band_frequencies(SIZE).numpy() @ turn.T)[::3], rows, EXTENT)
        assert np.abs(m.numpy()[::3] - expected_m).max() < 1e-12
        assert np.abs(h.numpy()[::3] - expected_h).max() < 5e-4
        assert np.abs(expected_h).max() > 0.5
    assert steepest == {0, 1, 2}


def test_transfer_is_hermitian() -> None:
    rows = torch.from_numpy(tilt_rows([-40.0, 0.0, 20.0, 55.0]))
    h, m = insert_tilts(SIZE, rows, EXTENT)
    mirrored_h, mirrored_m = insert_tilts(SIZE, rows, EXTENT, -torch.eye(3))
    assert torch.allclose(h, mirrored_h, atol=1e-12)
    assert torch.allclose(m, mirrored_m, atol=1e-12)


def test_multiplicity_counts_planes() -> None:
    """On the tilt axis all T planes meet; far from it a plane's own voxels have one and the rest none."""
    angles = [-60.0, -30.0, 0.0, 30.0, 60.0]
    rows = np.zeros((5, 13))
    rows[:, 1], rows[:, 6:9], rows[:, 3:5], rows[:, 11] = angles, (300, 2.7, 0.07), 20000, 1
    k = band_frequencies(SIZE).double()

    def found(point: tuple[int, int, int], about_y: float = 0.0) -> float:
        turn = torch.from_numpy(Rotation.from_euler("y", about_y, degrees=True).as_matrix())
        m = insert_tilts(SIZE, torch.from_numpy(rows), EXTENT, turn)[1]
        return float(m[(k == torch.tensor(point)).all(1)])

    assert found((0, 5, 0)) == found((0, 1, 0)) == 5
    assert found((0, 3, 7)) == 0  # along the beam
    # voxels of a plane at 30 degrees to the axes: the frequencies are turned onto it
    assert found((7, 3, 0), 30.0) == pytest.approx(1, abs=1e-9)
    assert found((7, 3, 0), -30.0) == pytest.approx(1, abs=1e-9)
    assert found((7, 3, 0), 15.0) == 0
    # the untilted plane is there in full, also where kx = 0: no half is lost
    _, flat = insert_tilts(SIZE, torch.from_numpy(rows[2:3]), EXTENT)
    assert bool((flat == (k[:, 2] == 0)).all())


# ------------------------------------------------------------------------------- resampling into the consensus frame

BEADS = torch.from_numpy(RNG.uniform(-5, 5, (10, 3))).float()


def gaussians(centres: torch.Tensor, size: int, width: float = 1.3) -> torch.Tensor:
    x = centred_coordinates(size)
    return torch.stack([torch.exp(-0.5 * (x - c).square().sum(-1) / width**2) for c in centres]).sum(0)


def random_pose(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(Rotation.random(rng=rng).as_matrix()).float(), torch.from_numpy(
        rng.uniform(-2, 2, 3)
    ).float()


@pytest.mark.parametrize("seed", [1, 2])
def test_numerator_is_read_at_a_x_minus_origin(seed: int) -> None:
    """A particle with pose (A, o) holds the template's bead c at ``A c - o``; in the consensus frame it is at c."""
    size, crop = 32, 22
    matrix, origin = random_pose(seed)
    particle = to_band(rfft3(gaussians(BEADS @ matrix.T - origin, size)))
    found = resample_numerator(particle, matrix, origin, size, crop)
    template = irfft3(from_band(to_band(rfft3(gaussians(BEADS, size))), size))
    expected = centre_crop(template, crop)
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_particle_outside_its_box_is_empty() -> None:
    band = to_band(rfft3(torch.randn((16,) * 3)))
    found = resample_numerator(band, torch.eye(3), torch.tensor([0.0, 40.0, 0.0]), 16, 12)
    assert found.shape == (12,) * 3 and not found.any()


def test_resampling_is_the_adjoint_of_turning_the_model() -> None:
    """``<B resampled, V> = <B, V turned into the particle>`` for B of noise and V any masked volume."""
    size, crop = 32, 22
    matrix, origin = random_pose(3)
    noise = irfft3(from_band(to_band(rfft3(torch.randn((size,) * 3))), size))
    model = gaussians(BEADS * 0.8, size)
    # at particle voxel x the template is seen at A^T (x + o)
    turned = rotate_volume(model, matrix.T, matrix.T @ origin)
    left = (resample_numerator(to_band(rfft3(noise)), matrix, origin, size, crop) * centre_crop(model, crop)).sum()
    right = (noise * turned).sum()
    assert float((left - right).abs()) < 0.02 * float(noise.std() * model.norm())


def test_weight_volume_is_read_at_a_k() -> None:
    size = 24
    matrix, _ = random_pose(4)
    k = band_frequencies(size)
    shape = torch.tensor([[0.02, 0.006, -0.004], [0.006, 0.03, 0.005], [-0.004, 0.005, 0.01]])

    def value(q: torch.Tensor) -> torch.Tensor:
        return torch.exp(-torch.einsum("ni,ij,nj->n", q, shape, q))

    # next to k = 0 and to the rim, where W = 0 by definition, the reading is lower than the function
    inside = (k.norm(dim=-1) >= 2) & (k.norm(dim=-1) < 9)
    found, expected = rotate_weight(value(k), matrix, size, k), value(k @ matrix.T)
    assert float((found - expected)[inside].abs().max()) < 0.005
    assert float((expected - value(k))[inside].abs().max()) > 0.3  # the rotation matters


# ---------------------------------------------------------------------------------------------------- the likelihood


def toy_observation() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A particle y in its own frame with h, m <= 1 (planes that do not overlap) and noise power s; all on the band."""
    rows = torch.from_numpy(tilt_rows([-45.0, 0.0, 45.0]))
    rows[:, 0] = rows[:, 2] = 0
    k = band_frequencies(SIZE).double()
    h, m = insert_tilts(SIZE, rows, EXTENT)
    alone = m <= 1
    y = to_band(rfft3(torch.randn((SIZE,) * 3, dtype=torch.float64)))
    return y, torch.where(alone, h, 0), torch.where(alone, m, 0), 0.5 + 0.1 * k.norm(dim=-1)


def full(band: torch.Tensor) -> np.ndarray:
    """Band values in the full complex transform, by numpy from the real volume they belong to."""
    return np.fft.fftn(irfft3(from_band(band.to(torch.complex128), SIZE)).numpy(), norm="ortho")


@pytest.mark.parametrize("crop", [SIZE, 10])
def test_likelihood_differences_are_those_of_the_squared_residual(crop: int) -> None:
    """``E(V) - E(V')`` equals 1/2 sum over the whole transform of |y - h V|^2 / (s m), V zero outside the crop."""
    y, h, m, s = toy_observation()
    weight = information(h, m, s)
    numerator = centre_crop(irfft3(from_band(y * matched_filter(h, m, s), SIZE)), crop)
    one, two = torch.randn((2, crop, crop, crop), dtype=torch.float64)
    found = negative_log_likelihood(one, numerator, weight, SIZE) - negative_log_likelihood(
        two, numerator, weight, SIZE
    )
    seen = full(m).real > 1e-3
    variance = np.where(seen, full(s).real * full(m).real, 1.0)

    def half_squared_residual(volume: torch.Tensor) -> float:
        model = np.fft.fftn(centre_pad(volume, SIZE).numpy(), norm="ortho")
        return 0.5 * float((np.abs(full(y) - full(h) * model) ** 2 / variance)[seen].sum())

    expected = half_squared_residual(one) - half_squared_residual(two)
    assert float(found) == pytest.approx(expected, rel=1e-9)


def test_inner_product_in_real_space_is_that_of_the_band() -> None:
    crop = 12
    volume = torch.randn((crop,) * 3, dtype=torch.float64)
    band = to_band(rfft3(torch.randn((SIZE,) * 3, dtype=torch.float64)))
    real = (volume * centre_crop(irfft3(from_band(band, SIZE)), crop)).sum()
    fourier = ((model_band(volume, SIZE).conj() * band).real * band_multiplicity(SIZE)).sum()
    assert float(real) == pytest.approx(float(fourier), rel=1e-10)


def test_quadratic_form_is_the_power_of_the_weighted_volume() -> None:
    volume = torch.randn((SIZE,) * 3, dtype=torch.float64)
    weight = to_band(rfft3(torch.randn((SIZE,) * 3, dtype=torch.float64)).abs())  # even, as every weight is
    filtered = irfft3(from_band(model_band(volume, SIZE) * weight.sqrt(), SIZE))
    found = quadratic_form(model_band(volume, SIZE), weight, SIZE)
    assert float(found) == pytest.approx(float(filtered.square().sum()), rel=1e-10)


def test_uncovered_voxels_say_nothing() -> None:
    h, noise = torch.ones(3), torch.full((3,), 2.0)
    m = torch.tensor([1e-4, 0.5, 2.0])
    assert information(h, m, noise).tolist() == pytest.approx([0.0, 1.0, 0.25])
    assert matched_filter(h, m, noise).tolist() == pytest.approx([0.0, 1.0, 0.25])


# ------------------------------------------------------------------------- B = a W V on data that others simulated


def residuals(folder: Path, particles: Particles, truth_name: str = "state{}_hinge+0.0.mrc") -> np.ndarray:
    """``|B - a W V|^2 / |B|^2`` inside the mask, a >= 0: the criterion of METHOD section 3, for every particle."""
    mask = torch.from_numpy(read_volume(folder / "mask.mrc")[0])
    grid = make_grid(particles.box, particles.pixel_size, 0.75, mask_extent(mask))
    size, inside = grid.working_box, working_mask(mask, grid)
    noise = Noise(torch.ones(len(band_frequencies(size))), 1.0, False, torch.zeros(size // 2 + 1))
    labels = np.load(folder / "labels.npz")
    present = labels.get("present", labels.get("state"))
    result = []
    for i in range(len(particles)):
        truth = torch.from_numpy(read_volume(folder / "gt" / truth_name.format(present[i]))[0])
        volume = centre_crop(fourier_resize(truth, size), grid.crop)
        numerator, weight = observe(particles, i, grid, noise)
        model = centre_crop(irfft3(from_band(model_band(volume, size) * weight, size)), grid.crop) * inside
        data = numerator * inside
        scale = ((data * model).sum() / model.square().sum()).clamp(min=0)
        result.append(float((data - scale * model).square().sum() / data.square().sum()))
    assert grid.crop < size
    return np.array(result)


def read(folder: Path) -> Particles:
    particles = read_particles(folder / "particles.star", InputOptions())
    assert np.abs(particles.origin).max(1).min() > 0.5
    return particles


def test_numerator_is_weight_times_volume(phantom: Path) -> None:
    found = residuals(phantom, read(phantom))
    assert found.max() < 0.01, f"residual power {found}"


def test_numerator_is_weight_times_volume_of_the_ribosome(tmp_path: Path) -> None:
    """The same with the simulator that comes with the program, whose geometry and CTF are its own."""
    exact = Preset(n=3, states=(0, 1), box=64, pixel_size=8.0, snr=0.0, rot_err=0.0, shift_err=0.0)
    simulate(tmp_path / "set", exact, 5, {})
    found = residuals(tmp_path / "set", read(tmp_path / "set"))
    assert found.max() < 0.01, f"residual power {found}"


def test_numerator_is_weight_times_volume_of_atoms(tmp_path: Path) -> None:
    """Of a small protein, whose density is sharper than its voxels."""
    atoms = (written(tmp_path / "a.pdb"),)
    simulate_main(SimulateConfig(tmp_path / "set", atoms=atoms, box=48, n=2, snr=0.0, rot_err=0.0, shift_err=0.0))
    found = residuals(tmp_path / "set", read(tmp_path / "set"), "state{}_path+0.0.mrc")
    assert found.max() < 0.01, f"residual power {found}"


def test_numerator_is_weight_times_volume_with_few_tilts(lopsided_phantom: Path) -> None:
    """Where planes stand alone the linear kernel is a coarser picture of the box's window (sinc): up to 3 %."""
    found = residuals(lopsided_phantom, read(lopsided_phantom))
    assert found.max() < 0.03, f"residual power {found}"


def transposed(particles: Particles) -> Particles:
    return replace(particles, rotation=particles.rotation.transpose(0, 2, 1))


def negated_origin(particles: Particles) -> Particles:
    return replace(particles, origin=-particles.origin)


def negated_tilt(particles: Particles) -> Particles:
    return replace(particles, tilts=particles.tilts * np.where(np.arange(13) == 1, -1.0, 1.0))


def overfocus(particles: Particles) -> Particles:
    return replace(particles, tilts=particles.tilts * np.where(np.isin(np.arange(13), (3, 4)), -1.0, 1.0))


@pytest.mark.parametrize("mistake", [transposed, negated_origin, negated_tilt, overfocus])
def test_every_wrong_convention_shows(lopsided_phantom: Path, mistake: Callable[[Particles], Particles]) -> None:
    found = residuals(lopsided_phantom, mistake(read(lopsided_phantom)))
    assert found.min() > 0.05, f"residual power {found}"


def test_mask_of_the_phantom_is_where_its_density_is(phantom: Path) -> None:
    """The criterion would mean nothing if the mask cut the object off."""
    mask = torch.from_numpy(read_volume(phantom / "mask.mrc")[0])
    truth = torch.from_numpy(read_volume(phantom / "gt/state1_hinge+0.0.mrc")[0])
    assert float((truth * mask).square().sum() / truth.square().sum()) > 0.99
    assert float(mask.mean()) < 0.3
    assert float((truth * spherical_mask(64, 24, 2)).sum() / truth.sum()) > 0.9
