"""Numerator and weight of tilt images: adjoint of projection, B = W V, and nats counted right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from opustomo.config import InputOptions
from opustomo.data.checks.premultiplied import premultiplied_findings
from opustomo.data.checks.signal import noise_model
from opustomo.data.mrc import read_volume
from opustomo.data.noise import estimate_noise
from opustomo.data.observe import Noise, observe, observe_all, working_mask
from opustomo.data.particles import Particles
from opustomo.data.readers import read_particles
from opustomo.data.stacks import read_stack
from opustomo.errors import UserError
from opustomo.physics.fourier import band_frequencies, band_multiplicity, fourier_resize
from opustomo.physics.grid import make_grid
from opustomo.physics.images import backproject, image_shells, image_spectra
from opustomo.physics.observation import (
    insert_squares,
    insert_tilts,
    model_band,
    negative_log_likelihood,
    quadratic_form,
)
from opustomo.physics.volume import centre_crop, spherical_mask
from opustomo.simulate.dataset import simulate
from opustomo.simulate.plan import Preset
from stack_writers import Set, native_turns, put_stack, two_states_set
from test_noise import Known, assert_calibrated
from test_observation import residuals, tilt_rows


def projected_gaussian(place: np.ndarray, sigma: float, size: int) -> np.ndarray:
    """Projection (y, u) of a 3-D Gaussian of height 1 at (u, y) pixels from size//2."""
    grid = np.arange(size) - size // 2
    u, v = (np.exp(-0.5 * ((grid - centre) / sigma) ** 2) for centre in place)
    return np.sqrt(2 * np.pi) * sigma * np.outer(v, u)


def test_backprojection_is_the_adjoint_of_projection() -> None:
    """``<B, V> = sum_t <y_t, P_t V>`` for images of noise and a Gaussian blob V, up to the units of either space."""
    size, sigma = 32, 2.2
    rng = np.random.default_rng(3)
    turns = Rotation.random(7, rng=rng).as_matrix()
    shifts = rng.uniform(-1, 1, (7, 2))
    images = torch.from_numpy(rng.normal(size=(7, size, size))).float()
    grid = np.arange(size) - size // 2
    z, y, x = np.meshgrid(grid, grid, grid, indexing="ij")
    points = np.stack([x, y, z], -1)
    spectra = image_spectra(images, size)
    found = backproject(spectra, torch.from_numpy(turns[:, :2]).float(), torch.from_numpy(shifts).float(), size)
    for centre in rng.uniform(-4, 4, (5, 3)):
        blob = np.exp(-0.5 * ((points - centre) ** 2).sum(-1) / sigma**2)
        left = float((found.numpy() * blob).sum())
        each = [
            ((image - image.mean()) * projected_gaussian((turn @ centre)[:2] - shift, sigma, size)).sum()
            for image, turn, shift in zip(images.numpy(), turns, shifts, strict=True)
        ]
        # B is in units of the volume's ortho transform, where an image is 1 / sqrt(N) of its own
        assert left * size == pytest.approx(float(np.sum(each)), abs=0.02 * float(np.linalg.norm(each)))


def test_spectra_of_a_projection_are_the_plane_of_the_volume() -> None:
    """Cropping keeps density: the image of a blob on a smaller box is the blob's on that box."""
    big = torch.from_numpy(projected_gaussian(np.array([3.0, -2.0]), 4.0, 48))[None].float()
    small = torch.from_numpy(projected_gaussian(np.array([2.0, -4 / 3]), 4.0 / 1.5, 32))[None].float()
    assert torch.allclose(image_spectra(big, 32), image_spectra(small, 32), atol=1e-4)
    power = image_spectra(big, 32).abs().square()
    assert float(image_shells(power).sum()) == pytest.approx(float(image_shells(power[0]).sum()))


def test_squares_of_one_tilt_are_its_transfer_squared_over_the_noise() -> None:
    rows = torch.from_numpy(tilt_rows([20.0]))
    h, m = insert_tilts(16, rows, 120.0)
    found = insert_squares(16, rows, 120.0, torch.tensor([3.0]))
    seen = m > 1e-3
    assert torch.allclose(found[seen], (h.square() / m)[seen] / 3.0)
    both = insert_squares(16, torch.cat([rows, rows]), 120.0, torch.tensor([3.0, 1.5]))
    assert torch.allclose(both, 3 * found)


def test_numerator_is_weight_times_volume_of_tilt_images(tmp_path: Path) -> None:
    """The criterion of METHOD section 3 on the images of the simulator that comes with the program."""
    exact = Preset(n=3, states=(0, 1), box=64, pixel_size=8.0, snr=0.0, rot_err=0.0, shift_err=0.0)
    simulate(tmp_path / "set", exact, 5, {}, stacks=True)
    volumes = read_particles(tmp_path / "set/particles.star", InputOptions())
    stacks = read_particles(tmp_path / "set/stacks/optimisation_set.star", InputOptions())
    assert np.array_equal(stacks.rotation, volumes.rotation)
    assert np.allclose(stacks.origin, volumes.origin, atol=1e-4)
    assert np.array_equal(stacks.tilt_offsets, volumes.tilt_offsets)
    # the CTF files have the depth of the coordinate, RELION that of the particle, up to 2 pixels away
    tolerance = np.where(np.isin(np.arange(13), (3, 4)), 30.0, 1e-4)
    assert (np.abs(stacks.tilts - volumes.tilts) < tolerance).all()
    found = residuals(tmp_path / "set", stacks)
    assert found.max() < 0.01, f"residual power {found}"
    for wrong in (
        replace(stacks, tilts=stacks.tilts * np.where(np.arange(13) == 1, -1.0, 1.0)),
        replace(stacks, origin=-stacks.origin),
        replace(stacks, tilt_shifts=stacks.tilt_shifts + 1.0),
    ):
        assert residuals(tmp_path / "set", wrong).min() > 0.05


def test_weight_is_what_the_images_of_a_volume_hold(tmp_path: Path) -> None:
    """Absolute units: with noise-free images of V, E is least at V: ``<V, B> = <V, W V>``, premultiplied or not."""
    for twice in (False, True):
        made = two_states_set(2, 0.0, turns=native_turns(np.arange(-60.0, 61.0, 4.0)), twice=twice)
        particles = read_particles(made.write_set(tmp_path / f"{twice}"), InputOptions())
        grid = make_grid(32, made.microscope.pixel, 0.75, 12)
        noise = Noise(torch.ones(len(band_frequencies(24))), 1.0, False, torch.zeros(13))
        for i in range(2):
            density = torch.from_numpy(made.states[made.state[i]].density(32)).float()
            volume = centre_crop(fourier_resize(density, 24), grid.crop)
            numerator, weight = observe(particles, i, grid, noise)
            gains = [negative_log_likelihood(g * volume, numerator, weight, 24) for g in (0.96, 1.0, 1.04)]
            assert gains[1] < min(gains[0], gains[2]), f"premultiplied {twice}: {gains}"


def test_images_tell_as_much_of_the_state_as_the_subtomograms_made_of_them(tmp_path: Path) -> None:
    """Information ``<d, W d>`` on the difference of two states, in units of the density, and each particle's score."""
    simulate(
        tmp_path, Preset(n=24, states=(1, 2), box=32, pixel_size=12.0, snr=0.3, rot_err=0, shift_err=0), 3, {}, True
    )
    one, other = (
        fourier_resize(torch.from_numpy(read_volume(tmp_path / f"gt/state{i}_hinge+0.0.mrc")[0]), 24) for i in (1, 2)
    )
    apart, middle = other - one, (one + other) / 2
    grid = make_grid(32, 12.0, 0.75, 16)
    mask = working_mask(torch.from_numpy(read_volume(tmp_path / "mask.mrc")[0]), grid)
    scores, worth = [], []
    for star in ("particles.star", "stacks/optimisation_set.star"):
        particles = read_particles(tmp_path / star, InputOptions())
        noise = estimate_noise(particles, grid, mask, contrast="white", normalisation="auto", workers=1)
        rows = list(observe_all(particles, range(24), grid, noise, 1))
        bands = model_band(torch.stack([apart, middle]), 24)
        of_model, of_data, information = (torch.tensor(column) for column in zip(*(
            (float(quadratic_form(bands[1], w, 24)), float((b * middle).sum()), float(quadratic_form(bands[0], w, 24)))
            for _, b, w in rows
        ), strict=True))  # fmt: skip
        scale = float(of_data.sum() / of_model.sum())  # units of the files
        worth.append(scale**2 * float(information.mean()))
        cross = (bands[0].conj() * bands[1]).real * band_multiplicity(24)
        scores.append([float((b * apart).sum() - scale * (cross * w).sum()) for _, b, w in rows])
    assert 0.9 < worth[1] / worth[0] < 1.2, worth
    assert np.corrcoef(scores)[0, 1] > 0.97


def known(folder: Path, made: Set) -> Known:
    particles = read_particles(made.write_set(folder), InputOptions())
    density = np.stack([beads.density(32) for beads in made.states])
    mask = spherical_mask(32, 12.0, 3.0)
    return Known(particles, made.state, torch.from_numpy(density).float(), mask)


@pytest.mark.slow
@pytest.mark.parametrize("twice", [False, True])
def test_nats_of_tilt_images(tmp_path: Path, twice: bool) -> None:
    """Noise that differs from image to image by a factor of four; see test_noise."""
    found = known(tmp_path, two_states_set(160, np.where(np.arange(31) % 2, 25.0, 12.5), twice=twice))
    noise = found.noise(96)
    assert noise.contrast == 1.0
    assert_calibrated(found, noise)
    level = [read_stack(found.particles, i, found.grid()).level for i in range(8)]
    ratio = torch.stack(level).mean(0)
    assert float(ratio[1::2].mean() / ratio[::2].mean()) == pytest.approx(4.0, rel=0.1)


def image_set(folder: Path, images: np.ndarray) -> Particles:
    made = replace(two_states_set(1, 1.0, step=20.0), images=images)
    return read_particles(made.write_set(folder), InputOptions())


def test_empty_images_are_left_out_and_broken_ones_named(tmp_path: Path) -> None:
    images = two_states_set(1, 1.0, step=20.0).images
    grid = make_grid(32, 7.5, 0.75, 12)
    images[0, 2] = 0.0
    assert len(read_stack(image_set(tmp_path / "empty", images), 0, grid).tilts) == 6
    images[0, 3, 5, 5] = np.nan
    with pytest.warns(RuntimeWarning, match="NaN"):
        particles = image_set(tmp_path / "nan", images)
    with pytest.raises(UserError, match=r"stacks/0.mrcs: image 4 has NaN"):
        read_stack(particles, 0, grid)
    with pytest.raises(UserError, match="every image is empty or excluded"):
        read_stack(image_set(tmp_path / "nothing", np.zeros_like(images)), 0, grid)
    particles = image_set(tmp_path / "short", np.ones_like(images))
    put_stack(particles.image_files[0], np.ones((3, 32, 32)), 7.5)
    with pytest.raises(UserError, match=r"has 3 images, number 7 is asked for"):
        read_stack(particles, 0, grid)


def test_mask_of_the_calibration_holds_the_states(tmp_path: Path) -> None:
    made = two_states_set(2, 1.0)
    found = known(tmp_path, made)
    inside = working_mask(found.mask, found.grid())
    assert float(inside.mean()) < 0.6
    assert float((found.density * found.mask).square().sum() / found.density.square().sum()) > 0.98


@pytest.mark.parametrize("twice", [False, True])
def test_noise_tells_whether_images_are_premultiplied(tmp_path: Path, twice: bool) -> None:
    """Whether the file says so, says the contrary or says nothing."""
    star = two_states_set(8, 12.0, step=12.0, twice=twice, scattered=6000.0).write_set(tmp_path)
    table = star.with_name("particles.star")
    text = table.read_text()
    for said, level in ((twice, "ok"), (not twice, "warning"), (None, "warning" if twice else "ok")):
        table.write_text(flagged(text, said))
        particles = read_particles(star, InputOptions())
        assert particles.premultiplied == bool(said)
        assert ("the file has no rln" in particles.notes[-1]) == (said is None)
        grid = make_grid(32, 7.5, 1.0, 16)
        noise = noise_model(particles, grid)
        assert isinstance(noise, Noise)
        [found] = premultiplied_findings(particles, grid, noise)
        assert found.level == level, (said, found)
        assert (f"correct it to {int(twice)}" in found.action) == (level == "warning")


def flagged(text: str, premultiplied: bool | None) -> str:
    """The particle table with another flag, the last column of its optics, or without one."""
    if premultiplied is None:
        return text.replace("_rlnCtfDataAreCtfPremultiplied", "_rlnOther")
    lines = text.splitlines()
    row = next(i for i, line in enumerate(lines) if line.startswith("1 a "))
    lines[row] = " ".join([*lines[row].split()[:-1], str(int(premultiplied))])
    return "\n".join(lines) + "\n"
