"""The distribution of the codes: statistics worth the volumes, exact posteriors, planted states found through noise."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from scipy.integrate import trapezoid
from scipy.stats import norm

from opustomo import linear, objective
from opustomo.linear import LinearModel, Posterior
from opustomo.linear_fit import code_statistics
from opustomo.mixture import (
    CodePosterior,
    Mixture,
    Statistics,
    choose_mixture,
    condition,
    draw,
    fit_mixture,
    mean_evidence,
    single,
)
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band
from opustomo.physics.volume import spherical_mask
from small_set import MemoryRows, even_weights, gaussians, observed

SIZE, COUNT = 12, 240
GRID = Grid(SIZE, 4.0, SIZE, SIZE, 16)
MASK = spherical_mask(SIZE, 4.0, 1.5)
EVERYONE = torch.arange(COUNT)


class TwoStates(NamedTuple):
    model: LinearModel
    rows: MemoryRows
    post: Posterior
    statistics: Statistics
    code: torch.Tensor


@pytest.fixture(scope="module")
def two_states() -> TwoStates:
    """A part is there or not: the true code is -1 or 1, and the linear model knows the direction."""
    body = 2 * gaussians(SIZE, np.array([[0, -1.0, 0], [1.0, 0.5, 1.0]]), 1.4) * MASK
    part = 0.5 * gaussians(SIZE, np.array([[-2.0, 1.5, 0]]), 1.2) * MASK
    model = LinearModel(body + part, part[None], torch.ones(7), torch.ones(7), (0.01, 0.05))
    generator = torch.Generator().manual_seed(0)
    code = torch.sign(torch.randn(COUNT, generator=generator))
    rows = observed(model.decode(code[:, None]), even_weights(COUNT, SIZE, 1, 10.0), SIZE, seed=2)
    rows.moved = torch.randn((COUNT, 6), generator=generator) * torch.tensor([0.005] * 3 + [0.02] * 3)
    post = linear.infer(model, rows, EVERYONE, GRID)
    return TwoStates(model, rows, post, code_statistics(model, rows, post.gain, GRID), code)


class Planted(NamedTuple):
    """Statistics without volumes: every particle sees its code (P, K) through a precision matrix of its own."""

    statistics: Statistics
    code: torch.Tensor
    label: torch.Tensor


def seen(code: torch.Tensor, label: torch.Tensor, strength: float, seed: int) -> Planted:
    """``log p(x | y) = <y, L y_true + noise> - 1/2 <y, L y>`` with L = F F^T, of size ``strength``."""
    generator = torch.Generator().manual_seed(seed)
    count, k = code.shape
    factor = torch.randn((count, k, k), generator=generator, dtype=torch.float64) * math.sqrt(strength / k)
    precision = factor @ factor.mT
    noise = (factor @ torch.randn((count, k, 1), generator=generator, dtype=torch.float64))[..., 0]
    first = torch.zeros(count, 1 + k, dtype=torch.float64)
    second = torch.zeros(count, 1 + k, 1 + k, dtype=torch.float64)
    first[:, 1:] = (precision @ code[..., None])[..., 0] + noise
    second[:, 1:, 1:] = precision
    return Planted(Statistics(torch.zeros(count, dtype=torch.float64), first, second), code, label)


STATES = Mixture(
    torch.tensor([0.7, 0.3], dtype=torch.float64),
    torch.tensor([[0.8, -0.5], [-1.6, 1.0]], dtype=torch.float64),
    torch.stack([0.05 * torch.eye(2), torch.tensor([[0.4, 0.1], [0.1, 0.06]])]).double(),
)


def drawn(mixture: Mixture, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.multinomial(mixture.share, count, replacement=True, generator=generator)
    noise = torch.randn((count, mixture.mean.shape[1], 1), generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(mixture.covariance)[label]
    return mixture.mean[label] + (factor @ noise)[..., 0], label


@pytest.fixture(scope="module")
def planted() -> Planted:
    """4,000 particles of two states; a single particle's code is known to about 0.7 standard deviations."""
    return seen(*drawn(STATES, 4000, 1), strength=2.0, seed=2)


# ------------------------------------------------------------------------------------------------ statistics


def test_statistics_are_worth_the_volumes(two_states: TwoStates) -> None:
    """Evidence from U^T B and U^T W U is that of the decoded volume against the rows, pose errors integrated out."""
    model, rows, gain = two_states.model, two_states.rows, two_states.post.gain[:20]
    code = torch.randn((20, 1), generator=torch.Generator().manual_seed(4))
    volume = model.decode(code)
    numerator, weight = rows.numerators[:20] * gain[:, None, None, None], rows.weights[:20] * gain[:, None].square()
    modes, prior = linear.pose_modes(model.mean, model.pose_scale, GRID), linear.pose_prior(model, rows, EVERYONE[:20])
    nuisance = objective.pose_nuisance(objective.on_the_band(modes, SIZE), numerator, weight, prior)
    expected, _ = objective.evidence(volume, model_band(volume, SIZE), numerator, weight, nuisance, SIZE)
    found = two_states.statistics.at(EVERYONE[:20]).evidence(code.double()).float()
    assert float(prior.abs().max()) > 0.5
    assert torch.allclose(found, expected, atol=5e-3, rtol=1e-4)


def test_one_unit_gaussian_is_the_linear_stage(two_states: TwoStates) -> None:
    post, found = two_states.post, condition(single(1), two_states.statistics)
    assert torch.allclose(found.evidence.float(), post.evidence, atol=1e-3)
    assert torch.allclose(found.centre().float(), post.code, atol=1e-5)
    assert torch.allclose(found.covariance().float(), post.covariance[:, :-6, :-6], atol=1e-5)
    assert torch.allclose(found.share, torch.ones(COUNT, 1, dtype=torch.float64))


def test_two_states_are_worth_more_than_a_gaussian(two_states: TwoStates) -> None:
    """On particles the mixture never saw: they are explained better, and their codes fall apart into two."""
    held = EVERYONE[180:]
    mixture = choose_mixture(two_states.statistics, EVERYONE[:180], held, 0)
    assert len(mixture.share) >= 2
    found, gaussian = (condition(m, two_states.statistics.at(held)) for m in (mixture, single(1)))
    assert float((found.evidence - gaussian.evidence).mean()) > 0.1
    error = [(p.centre()[:, 0] - two_states.code[held]).square().mean() for p in (found, gaussian)]
    assert float(error[0]) < 0.7 * float(error[1])


# ------------------------------------------------------------------------------------------------ posteriors


def test_posterior_is_the_integral() -> None:
    """One dimension, three Gaussians: evidence, mean, variance and shares by the trapezoidal rule."""
    mixture = Mixture(
        torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        torch.tensor([[-1.0], [0.4], [2.0]], dtype=torch.float64),
        torch.tensor([0.3, 0.05, 1.2], dtype=torch.float64)[:, None, None],
    )
    particles = Statistics(
        torch.tensor([3.0, -1.0, 0.0], dtype=torch.float64),
        torch.tensor([[1.0, 2.0], [0.3, -0.4], [0.0, 9.0]], dtype=torch.float64),
        torch.tensor([[[0.5, 0.2], [0.2, 1.5]], [[0.1, -0.1], [-0.1, 0.3]], [[2.0, 1.0], [1.0, 20.0]]]).double(),
    )
    found = condition(mixture, particles)
    y = np.linspace(-12, 12, 40001)
    share, mean, variance = (t.flatten().numpy()[:, None] for t in vars(mixture).values())
    prior = share * norm.pdf(y, mean, variance**0.5)  # (3, n)
    for i in range(3):
        value = particles.at(torch.full((len(y),), i)).evidence(torch.from_numpy(y)[:, None]).numpy()
        parts = trapezoid(np.exp(value) * prior, y)
        assert float(found.evidence[i]) == pytest.approx(np.log(parts.sum()), abs=1e-7)
        assert found.share[i].numpy() == pytest.approx(parts / parts.sum(), abs=1e-7)
        density = np.exp(value) * prior.sum(0) / parts.sum()
        centre = trapezoid(density * y, y)
        assert float(found.centre()[i, 0]) == pytest.approx(centre, abs=1e-6)
        assert float(found.spread()[i, 0]) == pytest.approx(trapezoid(density * (y - centre) ** 2, y) ** 0.5, abs=1e-6)
        at = found.log_density(torch.full((3, 1), 0.6, dtype=torch.float64))[i]
        assert float(at.exp()) == pytest.approx(np.interp(0.6, y, density), rel=1e-5)


def test_evidence_is_bayes_theorem_at_any_code(planted: Planted) -> None:
    """``log p(x|y) + log p(y) - log p(y|x)`` does not depend on y."""
    few = planted.statistics.at(torch.arange(50))
    post = condition(STATES, few)
    for seed in range(3):
        code, _ = drawn(STATES, 50, seed)
        found = few.evidence(code) + STATES.log_density(code) - post.log_density(code)
        assert torch.allclose(found, post.evidence, atol=1e-8)


def samples(posterior: CodePosterior, count: int) -> torch.Tensor:
    """(count, K) of a posterior of one particle repeated."""
    generator = torch.Generator().manual_seed(3)
    repeated = CodePosterior(*(t.expand(count, *t.shape[1:]) for t in vars(posterior).values()))
    return repeated.sample(draw(STATES, count, generator))


@pytest.mark.parametrize("moved", [False, True])
def test_samples_have_the_density(planted: Planted, moved: bool) -> None:
    """Moments, and E_q[f / q] = 1 for a density f inside of q; also where an encoder has moved the posterior."""
    row = int(condition(STATES, planted.statistics).share.amax(1).argmin())  # torn between the states
    post = condition(STATES, planted.statistics.at(torch.tensor([row])))
    shift, log_scale = torch.tensor([[0.4, -0.7]]).double(), torch.tensor([[0.3, -0.2]]).double()
    if moved:
        before, post = post, post.moved(shift, log_scale)
        assert torch.allclose(post.centre(), before.centre() + shift)
        each = before.factor @ torch.diag_embed((2 * log_scale).exp())[:, None] @ before.factor.mT
        assert torch.allclose(post.factor @ post.factor.mT, each)
    count = 40_000
    code = samples(post, count)
    assert torch.allclose(code.mean(0), post.centre()[0], atol=0.03)
    assert torch.allclose(code.std(0), post.spread()[0], rtol=0.02)
    assert torch.allclose(torch.cov(code.T), post.covariance()[0], atol=0.03)
    wide = CodePosterior(*(t.expand(count, *t.shape[1:]) for t in vars(post).values()))
    narrow = torch.distributions.MultivariateNormal(post.mean[0, 0], 0.6 * post.factor[0, 0] @ post.factor[0, 0].T)
    ratio = (narrow.log_prob(code) - wide.log_density(code)).exp()
    assert float(ratio.mean()) == pytest.approx(1.0, abs=4 * float(ratio.std()) / math.sqrt(count))


# ------------------------------------------------------------------------------------------------ fits


def test_states_are_found_through_the_noise(planted: Planted) -> None:
    """Shares, means and covariances of the codes, not of their noisy estimates."""
    mixture = fit_mixture(planted.statistics, 2, 0)
    order = mixture.share.argsort(descending=True)
    assert mixture.share[order].numpy() == pytest.approx(STATES.share.numpy(), abs=0.03)
    assert torch.allclose(mixture.mean[order], STATES.mean, atol=0.12)
    assert torch.allclose(mixture.covariance[order], STATES.covariance, atol=0.12)
    estimates = condition(single(2), planted.statistics).centre()
    naive = torch.linalg.lstsq(planted.statistics.second[:, 1:, 1:], planted.statistics.first[:, 1:, None]).solution
    for noisy in (estimates, naive[..., 0]):
        assert float(torch.cov(noisy[planted.label == 0].T).diagonal().min()) > 0.15  # where 0.05 is true


def test_shares_are_calibrated(planted: Planted) -> None:
    """Of the particles that are a state with probability p, a fraction p is; on other particles than were fitted."""
    half = torch.arange(2000)
    mixture = fit_mixture(planted.statistics.at(half), 2, 0)
    first = int(mixture.share.argmax())
    probability = condition(mixture, planted.statistics.at(half + 2000)).share[:, first]
    hit = (planted.label[half + 2000] == 0).double()
    expected = (probability * (1 - probability)).sum()
    assert float((hit - probability).square().sum() / expected) == pytest.approx(1.0, abs=0.12)
    edges = torch.tensor([0.0, 0.1, 0.35, 0.65, 0.9, 1.0])
    number = torch.bucketize(probability.contiguous(), edges[1:-1].double())
    for j in range(5):
        inside = number == j
        p = probability[inside]
        assert inside.sum() > 30
        error = max(0.02, 3.5 * float((p * (1 - p)).sum().sqrt() / inside.sum()))
        assert float(hit[inside].mean()) == pytest.approx(float(p.mean()), abs=error)


def test_posterior_errors_are_calibrated(planted: Planted) -> None:
    """``(code - mean)^2`` over the posterior's covariance averages to the number of dimensions."""
    post = condition(fit_mixture(planted.statistics, 2, 0), planted.statistics)
    error = planted.code - post.centre()
    squared = torch.einsum("bi,bij,bj->b", error, torch.linalg.inv(post.covariance()), error)
    assert float(squared.mean()) == pytest.approx(2.0, abs=0.15)


def test_every_step_explains_the_particles_better(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    few = planted.statistics.at(torch.arange(400))
    trail = []
    for steps in (0, 1, 3, 10, 40):
        monkeypatch.setattr("opustomo.mixture.EM_STEPS", steps)
        trail.append(mean_evidence(fit_mixture(few, 2, 0), few))
    assert trail == sorted(trail) and trail[-1] > trail[0] + 0.02


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_gaussian_codes_stay_one_gaussian(seed: int) -> None:
    """N(0, 1) codes: hardly any Gaussians, and held-out particles of a third set lose next to nothing."""
    generator = torch.Generator().manual_seed(seed)
    code = torch.randn((900, 3), generator=generator, dtype=torch.float64)
    particles = seen(code, torch.zeros(900), 6.0, seed).statistics
    mixture = choose_mixture(particles, torch.arange(300), torch.arange(300, 400), seed)
    assert len(mixture.share) <= 2
    fresh = particles.at(torch.arange(400, 900))
    assert mean_evidence(mixture, fresh) > mean_evidence(single(3), fresh) - 0.03


@pytest.mark.parametrize("count", [3, 12, 60, 300])
@pytest.mark.parametrize("kind", ["states", "gaussian"])
def test_choice_is_never_worse_than_one_gaussian(kind: str, count: int) -> None:
    """On the particles that choose, whatever their number; from three particles on."""
    code = drawn(STATES, count, 5)[0] if kind == "states" else torch.randn(count, 2).double()
    particles = seen(code, torch.zeros(count), 4.0, 6).statistics
    train, held = torch.arange(0, count * 2 // 3), torch.arange(count * 2 // 3, count)
    mixture = choose_mixture(particles, train, held, 0)
    unseen = particles.at(held)
    assert mean_evidence(mixture, unseen) >= mean_evidence(single(2), unseen)
    assert len(mixture.share) <= max(1, len(train) // 20)
    assert float(mixture.share.sum()) == pytest.approx(1.0)
    assert float(torch.linalg.eigvalsh(mixture.covariance).min()) > 0


def test_curved_motion_is_covered() -> None:
    """Codes on a half circle: several Gaussians are worth more than the best two."""
    angle = torch.linspace(0, math.pi, 1500, dtype=torch.float64)
    code = 1.5 * torch.stack([angle.cos(), angle.sin() - 0.6], 1)
    particles = seen(code, torch.zeros(1500), 30.0, 3).statistics
    mixed = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    mixture = choose_mixture(particles, mixed[:1200], mixed[1200:], 0)
    unseen = particles.at(mixed[1200:])
    assert len(mixture.share) > 2
    assert mean_evidence(mixture, unseen) > mean_evidence(fit_mixture(particles.at(mixed[:1200]), 2, 0), unseen) + 0.1


def test_same_seed_same_mixture(planted: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opustomo.mixture.SAMPLE", 500)
    few = planted.statistics.at(torch.arange(1000))
    one, two, other = (fit_mixture(few, 3, seed) for seed in (4, 4, 5))
    assert torch.equal(one.mean, two.mean) and torch.equal(one.covariance, two.covariance)
    assert not torch.allclose(one.mean, other.mean)  # another sample of the particles


def test_variance_is_that_of_draws_from_the_whole_distribution() -> None:
    share, mean = torch.tensor([0.3, 0.7]).double(), torch.tensor([[1.0, -2.0], [0.0, 1.0]]).double()
    covariance = torch.tensor([[[0.5, 0.2], [0.2, 1.0]], [[0.1, 0.0], [0.0, 0.3]]]).double()
    part = torch.multinomial(share, 200_000, replacement=True)
    noise = torch.linalg.cholesky(covariance)[part] @ torch.randn((200_000, 2, 1)).double()
    drawn = mean[part] + noise[..., 0]
    assert torch.allclose(Mixture(share, mean, covariance).variance(), drawn.var(0), rtol=0.02)
