"""The masked least-squares solve against dense algebra, spectra of masked fields, class maps made from the data."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from opustomo.physics.fourier import band_frequencies, band_shell, from_band, irfft3, rfft3, to_band
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band, quadratic_form
from opustomo.physics.volume import centre_crop, centre_pad, spherical_mask
from opustomo.reconstruct import (
    AMPLITUDE_RANGE,
    batches,
    local_amplitude,
    precision_of,
    reconstruct,
    shell_power,
    shell_snr,
    solve_masked,
    totals,
    unpack,
    upper,
)
from small_set import even_weights, gaussians, observed

GRID = Grid(8, 4.0, 8, 6, 16)


def operator(kernel: torch.Tensor, beyond: float) -> np.ndarray:
    """(C^3, C^3): pad, transform, multiply by ``kernel`` (n,) on the band and ``beyond`` outside, back, crop."""
    unit = torch.eye(GRID.crop**3).view(-1, *(GRID.crop,) * 3)
    full = from_band(kernel, GRID.working_box)
    outside = from_band(torch.ones_like(kernel), GRID.working_box) == 0
    outside[0, 0, 0] = False
    image = irfft3(rfft3(centre_pad(unit, GRID.working_box)) * torch.where(outside, beyond, full))
    return centre_crop(image, GRID.crop).flatten(1).T.double().numpy()


def band_limited(count: int) -> torch.Tensor:
    """(count, C, C, C) crops of noise on the band, as numerators are."""
    noise = torch.randn((count, *(GRID.working_box,) * 3), generator=torch.Generator().manual_seed(3))
    return centre_crop(irfft3(from_band(to_band(rfft3(noise)), GRID.working_box)), GRID.crop)


class Problem:
    """Two volumes at once, coupled by a symmetric positive system, in a soft mask; and the same as dense matrices."""

    def __init__(self, radius: float, edge: float) -> None:
        n, self.k = len(band_frequencies(8)), 2
        factors = even_weights(6, 8, 1).T.reshape(n, 3, self.k)
        self.system = torch.einsum("nja,njb->nab", factors, factors) * 30
        self.precision = torch.stack([torch.full((n,), 0.5), 0.1 + band_shell(8) / 4.0])
        self.mask = spherical_mask(6, radius, edge)
        self.right = band_limited(self.k)
        # no data beyond the band: the precision of the weakest shell, and nothing between volumes
        self.data = self.blocks(self.system, torch.zeros(self.k, self.k))
        self.prior = self.blocks(torch.diag_embed(self.precision.T), torch.diag(self.precision.amax(1)))
        self.dense = self.data + self.prior

    def blocks(self, kernel: torch.Tensor, beyond: torch.Tensor) -> np.ndarray:
        every = range(self.k)
        return np.block([[operator(kernel[:, a, b], float(beyond[a, b])) for b in every] for a in every])

    def solve(
        self, iterations: int, start: torch.Tensor | None = None, amplitude: torch.Tensor | None = None
    ) -> torch.Tensor:
        start = torch.zeros_like(self.right) if start is None else start
        return solve_masked(self.system, self.right, self.precision, self.mask, GRID, start, iterations, amplitude)

    def energy(self, volumes: torch.Tensor) -> float:
        v, right = volumes.double().flatten().numpy(), self.right.double().flatten().numpy()
        return float(0.5 * v @ self.dense @ v - v @ right)


def test_solve_agrees_with_dense_algebra() -> None:
    problem = Problem(radius=1.5, edge=0.0)
    inside = np.flatnonzero(np.tile(problem.mask.flatten().numpy(), problem.k))
    expected = np.zeros(problem.k * GRID.crop**3)
    right = problem.right.double().flatten().numpy()
    expected[inside] = np.linalg.solve(problem.dense[np.ix_(inside, inside)], right[inside])
    found = problem.solve(200).flatten().numpy()
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()
    assert not found[np.setdiff1d(np.arange(len(found)), inside)].any()


def test_local_amplitude_of_the_prior_agrees_with_dense_algebra() -> None:
    """V = a U with the prior on U: ``a S a + P`` in real space, for two volumes of different amplitudes."""
    problem = Problem(radius=1.5, edge=0.0)
    amplitude = 0.3 + torch.rand(2, *problem.mask.shape, generator=torch.Generator().manual_seed(2))
    inside = np.flatnonzero(np.tile(problem.mask.flatten().numpy(), problem.k))
    a = amplitude.double().flatten().numpy()[inside]
    block = np.ix_(inside, inside)
    matrix = a[:, None] * problem.data[block] * a + problem.prior[block]
    expected = a * np.linalg.solve(matrix, a * problem.right.double().flatten().numpy()[inside])
    found = problem.solve(200, amplitude=amplitude).flatten().numpy()
    assert np.abs(found[inside] - expected).max() < 1e-3 * np.abs(expected).max()
    same = problem.solve(200, amplitude=torch.ones_like(amplitude))
    assert torch.allclose(same, problem.solve(200), atol=1e-4 * float(same.abs().max()))


def test_amplitude_is_where_the_density_is() -> None:
    """High inside a blob, at its least far away, of mean square 1 over the mask, and the same for any scale."""
    grid, mask = Grid(24, 4.0, 24, 24, 32), spherical_mask(24, 9.0, 2.0)
    blob = gaussians(24, np.array([[4.0, 0, 0]]), 1.5)
    amplitude = local_amplitude(torch.stack([blob, -0.5 * blob]), mask, grid)
    least = AMPLITUDE_RANGE[0] ** 0.5
    assert float(amplitude[12, 12, 16]) > 3.0 and float(amplitude[12, 12, 6]) == pytest.approx(least)
    assert float((amplitude.square() * mask.square()).sum() / mask.square().sum()) == pytest.approx(1.0, abs=0.1)
    smaller = local_amplitude(1e-3 * torch.stack([blob, -0.5 * blob]), mask, grid)
    assert torch.allclose(amplitude, smaller, atol=0.05)
    assert torch.isfinite(local_amplitude(torch.zeros(1, 24, 24, 24), mask, grid)).all()


def test_a_local_change_is_found_better_with_a_local_prior() -> None:
    """A small blob in a large mask, at a signal below the noise: the error halves, at equal data and spectrum."""
    size = 16
    grid, mask = Grid(size, 4.0, size, size, 16), spherical_mask(size, 6.0, 1.5)
    blob = gaussians(size, np.array([[2.0, -1.0, 0]]), 1.2)[None]
    n = len(band_frequencies(size))
    noise = irfft3(from_band(to_band(rfft3(torch.randn(1, size, size, size, generator=torch.manual_seed(1)))), size))
    weight = 40.0
    data = to_band(rfft3(blob)) * weight + to_band(rfft3(noise)) * weight**0.5
    system, right = torch.full((n, 1, 1), weight), irfft3(from_band(data, size))
    precision = precision_of(shell_power(blob, torch.full((1, n), 1e9), torch.ones(1, n), mask, grid), grid, 1e-6)
    volume, amplitude = torch.zeros_like(blob), torch.ones_like(blob)
    plain = solve_masked(system, right, precision, mask, grid, volume, 30)
    for _ in range(6):
        volume = solve_masked(system, right, precision, mask, grid, volume, 30, amplitude)
        amplitude = local_amplitude(volume, mask, grid)[None]
    truth = irfft3(from_band(to_band(rfft3(blob)), size)) * mask
    errors = [float((found - truth).square().sum()) for found in (plain, volume)]
    assert errors[1] < 0.5 * errors[0]


def test_every_iteration_in_a_soft_mask_improves_the_fit() -> None:
    problem = Problem(radius=1.5, edge=1.5)
    energies = [problem.energy(problem.solve(count)) for count in range(6)]
    assert energies[0] == 0.0 and energies == sorted(energies, reverse=True)
    halfway = problem.solve(3)
    assert problem.energy(problem.solve(3, start=halfway)) < problem.energy(halfway)


def test_unpacked_triangles_are_symmetric_matrices() -> None:
    matrix = torch.randn(4, 3, 3)
    matrix = matrix + matrix.mT
    rows, cols = upper(3)
    assert torch.equal(unpack(matrix[:, rows, cols], 3), matrix)


def test_batches_cover_every_row_once() -> None:
    parts = list(batches(torch.arange(10), 4))
    assert [len(part) for part in parts] == [4, 4, 2] and torch.equal(torch.cat(parts), torch.arange(10))


def test_spectrum_of_a_masked_field_is_that_of_the_field() -> None:
    """White fields of variance 4 have spectrum 4 in every shell, whatever share of the box the mask keeps."""
    size = 16
    grid = Grid(size, 4.0, size, size, 16)
    mask = spherical_mask(size, 4.0, 2.0)
    field = 2.0 * torch.randn((40, size, size, size), generator=torch.Generator().manual_seed(0)) * mask
    n = len(band_frequencies(size))
    power = shell_power(field, torch.full((40, n), 1e9), torch.ones(40, n), mask, grid).mean(0)
    assert power[1:-1].numpy() == pytest.approx(4.0, rel=0.25)
    known = shell_power(torch.zeros_like(field[:1]), torch.full((1, n), 3.0), torch.ones(1, n), mask, grid)
    assert known[0, 1:].numpy() == pytest.approx(0.25, rel=1e-4)  # only the posterior variance 1 / (3 + 1)


def two_states() -> tuple[torch.Tensor, torch.Tensor]:
    size = 12
    body = gaussians(size, np.array([[0.0, 0, 0], [1.5, 1, 0]]), 1.3)
    return body, body + gaussians(size, np.array([[-2.0, 0, 1.5]]), 1.1)


def test_class_map_comes_from_the_particles_of_the_class_alone() -> None:
    size = 12
    grid, mask = Grid(size, 4.0, size, size, 16), spherical_mask(size, 4.5, 1.5)
    states = torch.stack(two_states())
    label = torch.arange(80) % 2
    rows = observed(states[label], even_weights(80, size, 1, 400.0), size, seed=2)
    maps = [reconstruct(rows, (label == s).float(), grid, mask) for s in (0, 1)]

    extra = (maps[1] - maps[0])[mask > 0.5]
    truth = (states[1] - states[0])[mask > 0.5]
    assert float(torch.corrcoef(torch.stack([extra, truth]))[0, 1]) > 0.95
    assert float((extra * truth).sum() / truth.square().sum()) == pytest.approx(1.0, abs=0.15)
    assert float(maps[0][mask == 0].abs().max()) == 0.0

    class Blind:
        """Rows of which those outside the class cannot be read."""

        moved = torch.zeros(80, 6)

        def __len__(self) -> int:
            return 80

        def numerator(self, index: torch.Tensor) -> torch.Tensor:
            assert bool((label[index] == 1).all())
            return rows.numerator(index)

        def weight(self, index: torch.Tensor) -> torch.Tensor:
            return rows.weight(index)

    assert torch.equal(reconstruct(Blind(), label.float(), grid, mask), maps[1])


def test_totals_are_weighted_sums() -> None:
    size = 12
    grid = Grid(size, 4.0, size, size, 16)
    rows = observed(two_states()[0].expand(5, -1, -1, -1), even_weights(5, size, 1), size, seed=2)
    index, share = torch.tensor([3, 0, 4]), torch.tensor([0.5, 2.0, 1.0])
    weight, numerator = totals(rows, index, share, grid)
    assert torch.allclose(weight, share @ rows.weights[index], atol=1e-6)
    assert torch.allclose(numerator, (share[:, None, None, None] * rows.numerators[index]).sum(0), atol=1e-5)


@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e4])
def test_average_does_not_depend_on_the_units_of_the_files(unit: float) -> None:
    """Densities u times larger: B / u, W / u^2, so the map is u times larger and nothing else changes."""
    size = 12
    grid, mask = Grid(size, 4.0, size, size, 16), spherical_mask(size, 4.5, 1.5)
    rows = observed(two_states()[1].expand(20, -1, -1, -1), even_weights(20, size, 1, 4.0), size, seed=2)
    plain = reconstruct(rows, torch.ones(20), grid, mask)
    rows.numerators, rows.weights = rows.numerators / unit, rows.weights / unit**2
    scaled = reconstruct(rows, torch.ones(20), grid, mask)
    assert torch.allclose(scaled / unit, plain, atol=1e-3 * float(plain.abs().max()))


def test_numerator_is_cropped_without_loss_where_the_mask_is_zero() -> None:
    """Only what lies inside the mask of B matters: a crop that holds the mask gives the map of the whole box."""
    size, crop = 16, 12
    mask = spherical_mask(size, 3.0, 2.0)
    body = gaussians(size, np.array([[0.5, 0, 1.0]]), 1.3)
    rows = observed(body.expand(20, -1, -1, -1), even_weights(20, size, 1, 4.0), size, seed=2)
    whole = reconstruct(rows, torch.ones(20), Grid(size, 4.0, size, size, 16), mask)
    rows.numerators = centre_crop(rows.numerators, crop)
    cropped = reconstruct(rows, torch.ones(20), Grid(size, 4.0, size, crop, 16), centre_crop(mask, crop))
    assert torch.allclose(centre_pad(cropped, size), whole, atol=1e-4 * float(whole.abs().max()))


def test_one_particle_alone_has_a_map() -> None:
    """A class of one: its missing wedge is filled by nothing but what the mask spreads, and never amplified."""
    size = 12
    grid, mask = Grid(size, 4.0, size, size, 16), spherical_mask(size, 4.5, 1.5)
    weights = even_weights(1, size, 1, 4.0)
    rows = observed(two_states()[1][None], weights, size, seed=2)
    volume = reconstruct(rows, torch.ones(1), grid, mask)
    power = to_band(rfft3(volume)).abs().square()
    assert torch.isfinite(volume).all()
    assert float(power[weights[0] == 0].mean()) < float(power[weights[0] > 0].mean())


@pytest.mark.parametrize("radius", [50.0, 9.0])
def test_signal_over_noise_is_that_of_the_voxels(radius: float) -> None:
    """White density of variance 3 in noise of variance 1.5: 2 in every shell, with or without a mask."""
    grid = Grid(24, 4.0, 24, 24, 32)
    mask = spherical_mask(24, radius, 2.0)
    volumes = 3.0**0.5 * torch.randn((40, 24, 24, 24)) * mask
    snr, values = shell_snr(volumes, torch.full((len(band_shell(24)),), 1 / 1.5), mask, grid)
    assert torch.allclose(snr.mean(0)[3:12], torch.tensor(2.0), atol=0.1)
    inside = float(mask.square().mean())
    k = torch.stack(torch.meshgrid(*[torch.fft.fftfreq(24, 1 / 24)] * 3, indexing="ij"), -1).norm(dim=-1)
    assert float(values[5]) == pytest.approx(inside * int((k.round() == 5).sum()), rel=1e-5)


def test_nats_of_a_volume_are_half_its_signal_over_noise_times_its_values() -> None:
    volume, weight = band_limited(1), even_weights(1, 8, 4)[0]
    snr, values = shell_snr(volume, weight, spherical_mask(6, 2.0, 1.0), GRID)
    nats = 0.5 * float((snr[0] * values).sum())
    assert nats == pytest.approx(0.5 * float(quadratic_form(model_band(volume[0], 8), weight, 8)), rel=1e-5)
