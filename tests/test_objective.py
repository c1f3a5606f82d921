"""The objective against brute force: dense Gaussians, torch.distributions, closed forms; schedules and the prior."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from torch.distributions import MultivariateNormal, kl_divergence

from opustomo import linear, objective
from opustomo.linear import LinearModel
from opustomo.physics.fourier import band_frequencies, from_band, irfft3, rfft3
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band
from opustomo.physics.volume import centre_crop, centre_pad, spherical_mask
from small_set import MemoryRows, even_weights, gaussians, observed

SIZE, CROP = 8, 6
GRID = Grid(SIZE, 4.0, SIZE, CROP, 16)


def blobs(count: int, seed: int, size: int = CROP) -> torch.Tensor:
    """(count, size, size, size) smooth random volumes."""
    rng = np.random.default_rng(seed)
    made = [gaussians(size, rng.normal(0, 1.2, (3, 3)), 1.1) * float(rng.normal()) for _ in range(count)]
    return torch.stack(made)


def evidence_of(
    volume: torch.Tensor, modes: torch.Tensor, rows: MemoryRows, prior: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    numerator, weight = rows.numerators, rows.weights
    prior = torch.zeros(len(rows), 6) if prior is None else prior
    nuisance = objective.pose_nuisance(objective.on_the_band(modes, SIZE), numerator, weight, prior)
    return objective.evidence(volume, model_band(volume, SIZE), numerator, weight, nuisance, SIZE)


@pytest.mark.parametrize("prior", [0.0, 0.7])
def test_evidence_is_the_marginal_likelihood_of_the_voxels(prior: float) -> None:
    """Images y = H (V + D p) + noise, p ~ N(prior, I): log N(y) with the dense covariance of p and noise."""
    noise = 0.7
    weight = even_weights(1, SIZE, 3, 40.0)
    transfer = (weight * noise**2).sqrt()

    def seen(volumes: torch.Tensor) -> torch.Tensor:
        padded = rfft3(centre_pad(volumes.double(), SIZE))
        return irfft3(padded * from_band(transfer.double(), SIZE)).flatten(1)

    volume, modes = blobs(1, 1), 0.4 * blobs(6, 2)
    generator = torch.Generator().manual_seed(5)
    y = seen(volume + 0.6 * blobs(1, 9)) + noise * torch.randn((1, SIZE**3), generator=generator).double()
    numerator = centre_crop(irfft3(rfft3(y.view(1, SIZE, SIZE, SIZE)) * from_band(transfer.double(), SIZE)), CROP)
    rows = MemoryRows(numerator.float() / noise**2, weight)

    centre = prior * torch.tensor([[1.0, -1.0, 0.5, 2.0, 0.0, -1.5]])
    found, _ = evidence_of(volume, modes, rows, centre)
    moved = seen(modes).numpy()
    covariance = noise**2 * np.eye(SIZE**3)
    expected = seen(volume).numpy()[0] + centre[0].double().numpy() @ moved
    with_model = multivariate_normal.logpdf(y.numpy(), expected, covariance + moved.T @ moved)
    empty = multivariate_normal.logpdf(y.numpy(), np.zeros(SIZE**3), covariance)
    assert abs(with_model - empty) > 20
    assert float(found) == pytest.approx(with_model - empty, abs=0.02)


def test_pose_error_is_the_one_that_made_the_data() -> None:
    modes, error = 6 * blobs(6, 2), torch.tensor([[0.5, -1.0, 0.8, 1.5, -0.3, 0.1]])
    volume = blobs(1, 1)
    data = volume + torch.einsum("bj,jzyx->bzyx", error, modes)
    rows = observed(data, even_weights(1, SIZE, 0, 1e4), SIZE, seed=None)
    assert torch.allclose(evidence_of(volume, modes, rows)[1], error, atol=2e-3)


def test_pose_error_of_a_particle_that_says_nothing_is_the_prior() -> None:
    modes, volume = blobs(6, 2), blobs(1, 1)
    silent = MemoryRows(torch.zeros(1, CROP, CROP, CROP), torch.zeros_like(even_weights(1, SIZE, 0)))
    prior = torch.tensor([[0.5, -1.0, 0.8, 1.5, -0.3, 0.1]])
    found, error = evidence_of(volume, modes, silent, prior)
    assert torch.allclose(error, prior, atol=1e-5)
    assert float(found) == pytest.approx(0.0, abs=1e-5)


def test_bound_of_the_exact_posterior_is_the_evidence_of_the_linear_stage() -> None:
    """E_q[log p(data | z)] - KL(q | prior) = log p(data): the objective and the linear stage mean the same."""
    particles, k = 5, 2
    modes_scale = (0.05, 0.3)
    model = LinearModel(3 * blobs(1, 1)[0], blobs(k, 4), torch.ones(5), torch.ones(5), modes_scale)
    z = torch.randn((particles, k), generator=torch.Generator().manual_seed(2))
    rows = observed(model.decode(z), even_weights(particles, SIZE, 1, 9.0), SIZE, seed=3)
    rows.moved = 0.05 * torch.randn((particles, 6), generator=torch.Generator().manual_seed(7))
    gain = torch.tensor([0.8, 0.9, 1.0, 1.1, 1.2])
    post = linear.infer(model, rows, torch.arange(particles), GRID, gain)

    scaled = MemoryRows(rows.numerators * gain[:, None, None, None], rows.weights * gain[:, None].square())
    modes = linear.pose_modes(model.mean, model.pose_scale, GRID)
    factor = torch.linalg.cholesky(post.covariance[:, :-6, :-6])

    pose = linear.pose_prior(model, rows, torch.arange(particles))

    def fit(code: torch.Tensor) -> torch.Tensor:
        return evidence_of(model.decode(code), modes, scaled, pose)[0]

    # log p(data | z) is quadratic in z: its mean is exact from the centre and one pair of points an axis
    prior = MultivariateNormal(torch.zeros(k), torch.eye(k))
    centre = fit(post.code)
    curvature = sum(fit(post.code + factor[:, :, j]) + fit(post.code - factor[:, :, j]) - 2 * centre for j in range(k))
    bound = centre + 0.5 * curvature - kl_divergence(MultivariateNormal(post.code, scale_tril=factor), prior)
    assert post.evidence.abs().min() > 5
    assert torch.allclose(bound, post.evidence, atol=1e-3)


def test_spectral_prior_is_a_gaussian_of_the_whole_transform() -> None:
    """``1/2 sum |D(k)|^2 / tau^2`` over every voxel of the full transform, both halves."""
    volumes = blobs(3, 1, SIZE) - blobs(3, 1, SIZE).mean((1, 2, 3), keepdim=True)
    band = model_band(volumes, SIZE)
    flat = objective.spectral_prior(band, torch.full((band.shape[1],), 0.25), SIZE)
    inside = irfft3(from_band(band, SIZE))  # Parseval: ortho transforms
    assert torch.allclose(flat, 0.125 * inside.square().sum((1, 2, 3)), rtol=1e-4)


def test_encoder_sees_nothing_of_the_consensus() -> None:
    mean = 5 * blobs(1, 1, SIZE)[0]
    weights = even_weights(3, SIZE, 0, 20.0)
    rows = observed(mean.expand(3, -1, -1, -1), weights, SIZE, seed=None)
    seen = objective.residual_density(
        rows.numerators, weights, mean, torch.ones(weights.shape[1]), torch.ones_like(mean), SIZE
    )
    assert float(seen.abs().max()) < 1e-5 * float(mean.abs().max())


def test_encoder_sees_what_differs_from_the_consensus() -> None:
    """With full and strong coverage the Wiener filter returns the difference itself, inside the mask alone."""
    size = 16
    mean, extra = gaussians(size, np.zeros((1, 3)), 2.0), gaussians(size, np.array([[3.0, 0, -2.0]]), 1.5)
    weight = torch.full((1, len(band_frequencies(size))), 1e3)
    rows = observed((mean + extra)[None], weight, size, seed=None)
    mask = spherical_mask(size, 5.0, 2.0)
    seen = objective.residual_density(rows.numerators, weight, mean, torch.ones(weight.shape[1]), mask, size)[0]
    inside = mask > 0.99
    assert float(torch.corrcoef(torch.stack([seen[inside], extra[inside]]))[0, 1]) > 0.999
    assert float(seen[mask == 0].abs().max()) == 0.0


def test_envelope_is_that_of_the_bfactor() -> None:
    """B0 = 4 is B = 158 A^2; early epochs are damped a little more (B0 1.083 at first), late ones by B0."""
    size, extent = 16, 160.0
    s2 = band_frequencies(size).square().sum(-1) / extent**2
    late = objective.envelope(4.0, 1000, size, extent)
    assert torch.allclose(late, torch.exp(-(4 * math.pi**2 * 4.0) * s2 / 4), rtol=1e-5)
    first = objective.envelope(4.0, 0, size, extent)
    assert torch.allclose(-first.log() / -late.log(), torch.tensor(0.975 / 0.9), rtol=1e-4)
    by_epoch = [float(objective.envelope(4.0, epoch, size, extent)[-1]) for epoch in range(30)]
    assert by_epoch == sorted(by_epoch)


def test_kl_weight_goes_through_four_cycles() -> None:
    weights = [objective.beta_weight("cos", i / 400) for i in range(400)]
    assert [i for i in range(400) if weights[i] == pytest.approx(0.1)] == [0, 100, 200, 300]
    assert all(weights[i] == 1.0 for cycle in range(4) for i in range(100 * cycle + 76, 100 * cycle + 100))
    assert weights[37] == pytest.approx(0.1 + 0.9 * 0.37 / 0.75)
    assert objective.beta_weight("constant", 0.01) == 1.0


def test_learning_rate_warms_up_and_decays_to_a_twentieth() -> None:
    rates = [objective.learning_rate(1e-3, i / 1000) for i in range(1001)]
    assert rates[0] == pytest.approx(5e-5) and rates[10] == pytest.approx(5e-4)
    assert max(rates) == rates[20] == pytest.approx(1e-3)
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] == pytest.approx(5e-5)


# ------------------------------------------------------------------------------------------------ prior on the codes


def test_near_codes_of_other_orientations_attract_and_far_ones_repel() -> None:
    code = torch.zeros((1, 2), requires_grad=True)
    near = torch.tensor([1.0, 0.0]).repeat(128, 1)
    far = torch.tensor([0.0, 30.0]).repeat(128, 1)
    objective.disentanglement(code, torch.cat([near, far])).sum().backward()
    assert code.grad is not None
    down = -code.grad[0]
    assert float(down[0]) > 0  # towards the near ones
    assert float(down[1]) < 0  # away from the far ones


def test_codes_of_one_batch_keep_apart() -> None:
    codes = torch.tensor([[0.0, 0.0], [0.1, 0.0]], requires_grad=True)
    objective.disentanglement(codes, torch.full((200, 2), 5.0)).sum().backward()
    assert codes.grad is not None
    assert float(codes.grad[0, 0]) > float(codes.grad[1, 0])  # descent pushes the first left, the second right


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("others", [1, 3, 700])
def test_prior_is_finite_where_codes_coincide(others: int, batch: int) -> None:
    """Hardly any other orientation, and unused dimensions start at zero for everyone: no NaN in value or gradient."""
    codes = torch.zeros((batch, 2), requires_grad=True)
    value = objective.disentanglement(codes, torch.zeros((others, 2)))
    value.sum().backward()
    assert value.shape == (batch,) and torch.isfinite(value).all()
    assert codes.grad is not None and torch.isfinite(codes.grad).all()


def test_half_of_a_small_bank_is_near_and_half_is_far() -> None:
    """By hand for a bank of six: no code is near and far at once."""
    bank = torch.tensor([[1.0], [2.0], [-3.0], [4.0], [-5.0], [6.0]])
    d = bank[:, 0].square() + 1e-3
    far, random = (3 * torch.log1p(1 / each).mean() for each in (d[3:], d))
    expected = torch.log1p(d[:3]).mean() + 0.8 * far + 0.2 * random
    assert float(objective.disentanglement(torch.zeros((1, 1)), bank)) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("variance", "expected"), [(1.0, 0.0), (1e-9, 1.0), (0.25, 0.75), (1.3, 0.0)])
def test_gate_is_closed_where_the_posterior_is_the_prior(variance: float, expected: float) -> None:
    prior = torch.tensor([1.0, 4.0])
    found = objective.resolved(variance * prior.expand(5, 2), prior)
    assert found.tolist() == pytest.approx([expected] * 5, abs=1e-6)


def test_one_orientation_alone_has_no_prior() -> None:
    assert objective.disentanglement(torch.randn(3, 2), torch.zeros((0, 2))).tolist() == [0.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------ regularisers


def test_total_variation_of_a_ramp_a_box_and_nothing() -> None:
    ramp = torch.arange(CROP).float().expand(1, CROP, CROP, CROP)
    assert float(objective.total_variation(2 * ramp)) == pytest.approx(2 * CROP**2 * (CROP - 1), rel=2e-3)
    box = torch.zeros((2, CROP, CROP, CROP))
    box[1, 2, 2, 2] = 1.0  # three edges of size 1 before the voxel, one of sqrt 3 at it
    assert objective.total_variation(box).tolist() == pytest.approx([0.0, 3 + 3**0.5], rel=2e-3)


def test_total_variation_counts_noise_more_than_a_smooth_map_of_the_same_magnitude() -> None:
    smooth = gaussians(16, np.zeros((1, 3)), 3.0)[None]
    noise = smooth.flatten()[torch.randperm(16**3)].view_as(smooth)
    assert float(objective.magnitude(noise)) == pytest.approx(float(objective.magnitude(smooth)), rel=1e-5)
    assert float(objective.total_variation(noise)) > 3 * float(objective.total_variation(smooth))


def test_regularisers_have_a_gradient_of_zero_at_zero() -> None:
    """Where the decoder starts: the untrained network stays the linear stage."""
    density = torch.zeros((1, CROP, CROP, CROP), requires_grad=True)
    (objective.total_variation(density) + objective.magnitude(density)).sum().backward()
    assert density.grad is not None and float(density.grad.abs().max()) == 0.0


@pytest.mark.parametrize(("crop", "size"), [(6, 8), (8, 8)])
def test_gradient_of_the_band_is_that_of_the_transform(crop: int, size: int) -> None:
    """Of any function of real and imaginary parts, also in the plane kx = 0, which is its own mirror image."""
    volume = torch.randn((2, crop, crop, crop), dtype=torch.float64, requires_grad=True)
    weights = torch.randn((2, len(band_frequencies(size)), 2), dtype=torch.float64)

    def score(band: torch.Tensor) -> torch.Tensor:
        return (torch.view_as_real(band) * weights).sum() + (band.abs() ** 4).sum()

    (found,) = torch.autograd.grad(score(objective.differentiable_band(volume, size)), volume)
    (expected,) = torch.autograd.grad(score(model_band(volume, size)), volume)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda v: objective.differentiable_band(v, size), volume[:1, :, :, :])
