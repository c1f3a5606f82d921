"""Nats are counted right: with true poses and two known states, likelihood differences scatter as they promise.

For a particle of a known state and any difference D of volumes, ``E(V + D) - E(V)`` has mean Q/2 and variance Q,
``Q = <D, W D>``.  D is the states' difference, as it is and turned in several directions (one direction alone leaves
the variance uncertain by a tenth).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt
from scipy.spatial.transform import Rotation

from fourier_simulator import Microscope, random_poses, two_states
from opustomo.config import InputOptions
from opustomo.data import observe as observe_module
from opustomo.data.mrc import read_volume
from opustomo.data.noise import calibrate, estimate_noise, probe_ratio
from opustomo.data.observe import Noise, observe, read_band, sample_rows, working_mask
from opustomo.data.particles import Particles, Transfer
from opustomo.data.readers import read_particles
from opustomo.data.star import StarFile
from opustomo.physics.fourier import band_frequencies, band_multiplicity, fourier_resize, shell_sum
from opustomo.physics.geometry import matrix_to_euler
from opustomo.physics.grid import Grid, make_grid, mask_extent
from opustomo.physics.observation import insert_tilts, model_band
from opustomo.physics.volume import centre_crop, rotate_volume, spherical_mask
from small_set import even_weights, observed
from star_sets import put_volume


class Known(NamedTuple):
    """A data set with its truth: state of every particle (0, 1), densities (2, N, N, N) and mask (N, N, N)."""

    particles: Particles
    state: np.ndarray
    density: torch.Tensor
    mask: torch.Tensor

    def grid(self) -> Grid:
        return make_grid(self.particles.box, self.particles.pixel_size, 0.75, mask_extent(self.mask))

    def noise(self, sample: int) -> Noise:
        grid, mask = self.grid(), working_mask(self.mask, self.grid())
        return estimate_noise(self.particles, grid, mask, contrast="auto", normalisation="auto", sample=sample)


@pytest.fixture(scope="module")
def summed(noisy_phantom: Path) -> tuple[Known, Noise]:
    """Sums over tilts, with CTF STARs: the independent simulator as it is; and the noise estimated from it."""
    truth = np.load(noisy_phantom / "labels.npz")
    density = [torch.from_numpy(read_volume(noisy_phantom / f"gt/state{s}_hinge+0.0.mrc")[0]) for s in (0, 1)]
    mask = torch.from_numpy(read_volume(noisy_phantom / "mask.mrc")[0])
    particles = read_particles(noisy_phantom / "particles.star", InputOptions())
    known = Known(particles, truth["present"], torch.stack(density), mask)
    return known, known.noise(64)


def averaged(folder: Path, transfer: Transfer, count: int = 200, noise: float = 25.0) -> Known:
    """Means over covering tilts: with tilt parameters, or with the CTF or weight volume that belongs to them."""
    rng = np.random.default_rng(5)
    microscope = Microscope(32, 7.5, np.arange(-60.0, 61.0, 4.0))
    tilts, states = len(microscope.tilts), two_states(32, 3)
    rotation, origin = random_poses(count, rng)
    state = rng.permutation(np.arange(count) % 2)
    # one CTF volume for all, as where it is made per tomogram
    defocus = rng.uniform(20000, 40000, count) if transfer == "tilts" else np.full(count, 26000.0)
    rows = np.zeros((count, tilts, 13))
    rows[..., 1], rows[..., 3], rows[..., 4] = microscope.tilts, defocus[:, None], defocus[:, None]
    rows[..., 6:9], rows[..., 10], rows[..., 11] = (300, 2.7, 0.07), microscope.bfactor, microscope.scale
    for i in range(count):
        images = microscope.images(
            states[state[i]], rotation[i], origin[i], defocus[i], rng.normal(0, noise, (tilts, 32, 32)),
            twice=transfer == "weight_volume",
        )  # fmt: skip
        put_volume(folder / f"{i}.mrc", microscope.mean_volume(images), 7.5)
    by_tilts = transfer == "tilts"
    if not by_tilts:
        put_volume(folder / "ctf.mrc", microscope.mean_transfer(26000.0, 2 if transfer == "weight_volume" else 1), 7.5)
    particles = Particles(
        source=folder / "particles.star", dialect="made here", star=StarFile.__new__(StarFile),
        names=np.arange(count).astype(object), image_files=tuple(folder / f"{i}.mrc" for i in range(count)),
        ctf_files=() if by_tilts else (folder / "ctf.mrc",) * count,
        euler=matrix_to_euler(torch.from_numpy(rotation)).numpy(), rotation=rotation, origin=origin, coordinates=None,
        tomogram=np.full(count, "", object), half=np.zeros(count, np.int64), box=32, pixel_size=7.5,
        transfer=transfer, premultiplied=transfer == "weight_volume",
        tilts=rows.reshape(-1, 13) if by_tilts else np.zeros((0, 13)), tilt_offsets=np.arange(count + 1) * tilts,
    )  # fmt: skip
    density = np.stack([beads.density(32) for beads in states])
    outside = distance_transform_edt(density.max(0) < 0.05)
    mask = np.clip(1.5 - outside / 4, 0, 1)
    return Known(particles, state, torch.from_numpy(density).float(), torch.from_numpy(mask).float())


@pytest.fixture(scope="module")
def averaged_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Transfer], Known]:
    """``averaged``, each kind made once."""
    return cache(lambda transfer: averaged(tmp_path_factory.mktemp(transfer), transfer))


@pytest.fixture(scope="module")
def noise_of(averaged_of: Callable[[Transfer], Known]) -> Callable[[Transfer], Noise]:
    """Noise of each kind, estimated once from 48 particles."""
    return cache(lambda transfer: averaged_of(transfer).noise(48))


def calibration(known: Known, noise: Noise, directions: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Mean of ``(dE - Q/2)^2 / Q`` and of dE over that of Q/2, for the states' difference and for it turned."""
    grid, size = known.grid(), known.grid().working_box
    mask, multiplicity = working_mask(known.mask, grid), band_multiplicity(size)
    volume = centre_crop(fourier_resize(known.density, size), grid.crop) * mask
    rows = [observe(known.particles, i, grid, noise) for i in range(len(known.particles))]
    numerator, weight = torch.stack([row[0] for row in rows]).flatten(1), torch.stack([row[1] for row in rows])
    state = torch.from_numpy(known.state).long()
    bands = model_band(volume, size)
    overlap = (volume[state].flatten(1) * numerator).sum(1)
    power = (bands.abs().square() * multiplicity @ weight.T)[state, torch.arange(len(state))]
    amplitude = overlap.sum() / power.sum()
    gain = amplitude * (amplitude * overlap + 100) / (amplitude**2 * power + 100)

    turns = [np.eye(3), *Rotation.random(directions, rng=np.random.default_rng(1)).as_matrix()]
    step = volume[1] - volume[0]
    steps = torch.stack([step, *(rotate_volume(step, torch.from_numpy(turn).float()) * mask for turn in turns[1:])])
    step_bands = model_band(steps, size)
    sign = torch.where(state == 0, 1.0, -1.0)  # towards the other state
    quadratic = (step_bands.abs().square() * multiplicity @ weight.T) * gain**2
    cross = [((step_bands.conj() * band).real * multiplicity @ weight.T) * gain**2 for band in bands]
    model = torch.where(state == 0, cross[0], cross[1])
    change = 0.5 * quadratic + sign * (model - steps.flatten(1) @ numerator.T * gain)
    standardised = ((change - 0.5 * quadratic).square() / quadratic).mean(1)
    return standardised.numpy(), (change.mean(1) / (0.5 * quadratic).mean(1)).numpy()


def assert_calibrated(known: Known, noise: Noise) -> None:
    standardised, ratio = calibration(known, noise)
    message = f"variance {standardised.round(3)}, pooled {standardised.mean():.3f}; mean {ratio.round(3)}"
    assert 0.85 < standardised.mean() < 1.15, message
    assert 0.85 < ratio[0] < 1.15, message
    assert 0.85 < ratio.mean() < 1.15, message


@pytest.mark.slow
def test_nats_of_summed_tilts(summed: tuple[Known, Noise]) -> None:
    known, noise = summed
    assert not noise.mean_normalised
    assert noise.contrast == 1.0
    assert_calibrated(known, noise)


@pytest.mark.slow
def test_noise_power_is_that_of_one_tilt_image(summed: tuple[Known, Noise], noisy_phantom: Path) -> None:
    """White noise of known size in every image: its power per slice, whatever the number of tilts that overlap."""
    known, noise = summed
    grid, truth = known.grid(), json.loads((noisy_phantom / "sim.json").read_text())
    # the simulator divides by T; an ortho transform of N^2 pixels spread over N slices; a band of M from N voxels
    slice_power = grid.box * (truth["noise_std_tilt"] / truth["n_tilts"]) ** 2
    expected = slice_power * (grid.working_box / grid.box) ** 3
    curve = shell_sum(noise.power, grid.working_box) / shell_sum(torch.ones_like(noise.power), grid.working_box)
    assert float((curve[2:] / expected).max()) < 1.15
    assert float((curve[2:] / expected).min()) > 0.75


@pytest.mark.slow
def test_nats_of_averaged_tilts(
    averaged_of: Callable[[Transfer], Known], noise_of: Callable[[Transfer], Noise]
) -> None:
    known, noise = averaged_of("tilts"), noise_of("tilts")
    assert noise.mean_normalised
    assert noise.contrast == 1.0
    assert_calibrated(known, noise)


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["ctf_volume", "weight_volume"])
def test_nats_with_transfer_volumes(
    averaged_of: Callable[[Transfer], Known], noise_of: Callable[[Transfer], Noise], transfer: Transfer
) -> None:
    """Measured over 1,300 particles, variance and mean: CTF volumes 1.03 and 0.95, weight volumes 0.99 and 0.96."""
    known, noise = averaged_of(transfer), noise_of(transfer)
    assert noise.contrast == 1.0
    assert_calibrated(known, noise)


def test_signal_is_not_counted_as_noise(phantom: Path) -> None:
    """Without noise in the images, what is called noise is a small part of the power per slice."""
    particles = read_particles(phantom / "particles.star", InputOptions())
    mask = torch.from_numpy(read_volume(phantom / "mask.mrc")[0])
    grid = make_grid(particles.box, particles.pixel_size, 0.5, mask_extent(mask))
    size = grid.working_box
    noise = estimate_noise(particles, grid, working_mask(mask, grid), contrast="auto", normalisation="sum")
    power, covered = torch.zeros(2, size // 2 + 1)
    for i, path in enumerate(particles.image_files):
        _, m = insert_tilts(size, torch.from_numpy(particles.tilts_of(i)).float(), grid.extent)
        power += shell_sum(read_band(path, grid).abs().square() * (m > 1e-3), size)
        covered += shell_sum(m, size)
    level = shell_sum(noise.power, size) / shell_sum(torch.ones_like(noise.power), size)
    assert float((level * covered / power)[3:10].max()) < 0.35


@pytest.mark.slow
def test_wrong_noise_of_transfer_volumes_is_put_right_by_the_data(
    averaged_of: Callable[[Transfer], Known], noise_of: Callable[[Transfer], Noise]
) -> None:
    known, noise = averaged_of("ctf_volume"), noise_of("ctf_volume")
    grid, mask = known.grid(), working_mask(known.mask, known.grid())
    wrong = replace(noise, power=3 * noise.power)
    mended = calibrate(known.particles, grid, mask, wrong, sample_rows(200, 48).tolist())
    assert mended.calibration == pytest.approx(1 / 3, rel=0.1)
    assert torch.allclose(mended.power, noise.power, rtol=0.2)  # every band has its own ratio, from 48 particles
    assert float((mended.power / noise.power).mean()) == pytest.approx(1.0, abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["ctf_volume", "tilts"])
def test_scale_and_sign_of_the_files_do_not_matter(
    averaged_of: Callable[[Transfer], Known],
    noise_of: Callable[[Transfer], Noise],
    transfer: Transfer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Data times -2: protein is found to be dark, the noise four times as strong, and B = h y / s is half as large."""
    known = averaged_of(transfer)
    plain = noise_of(transfer)
    numerator, weight = observe(known.particles, 3, known.grid(), plain)
    monkeypatch.setattr(observe_module, "read_volume", lambda path: (-2 * read_volume(path)[0], 7.5))
    scaled = known.noise(48)
    assert (plain.contrast, scaled.contrast) == (1.0, -1.0)
    assert torch.allclose(scaled.power, 4 * plain.power, rtol=1e-3)
    other_numerator, other_weight = observe(known.particles, 3, known.grid(), scaled)
    assert float((2 * other_numerator - numerator).norm() / numerator.norm()) < 1e-3
    assert float((4 * other_weight - weight).norm() / weight.norm()) < 1e-3


def test_probes_measure_the_noise_of_their_own_shells() -> None:
    """White residuals whose weights promise a third of the noise at low resolution and the right one beyond."""
    size = 16
    mask = spherical_mask(size, 5.0, 2.0)
    k = band_frequencies(size).norm(dim=-1)
    weights = even_weights(300, size, 0, 4.0)
    empty = torch.zeros(300, size, size, size)
    rows = observed(empty, weights, size, seed=1)
    claimed = torch.where(k < 0.25 * size, 1 / 3, 1.0) * weights
    low, high, both = (
        probe_ratio(rows.numerators, claimed, mask, size, shells) for shells in ((0, 3.0), (5.0, 7.2), (0, 7.2))
    )
    assert low == pytest.approx(3.0, rel=0.2)
    assert high == pytest.approx(1.0, rel=0.1)
    assert high < both < low


def test_stated_contrast_and_normalisation_are_taken(averaged_of: Callable[[Transfer], Known]) -> None:
    known = averaged_of("tilts")
    grid = known.grid()
    noise = estimate_noise(
        known.particles, grid, working_mask(known.mask, grid), contrast="black", normalisation="sum", sample=8
    )
    assert noise.contrast == -1.0
    assert not noise.mean_normalised


def test_sample_spreads_over_the_whole_file() -> None:
    rows = sample_rows(1000, 50)
    assert len(rows) == 50
    assert (rows[0], rows[-1]) == (0, 999)
    assert int(np.diff(rows).max()) <= 21
    assert sample_rows(7, 50).tolist() == list(range(7))
