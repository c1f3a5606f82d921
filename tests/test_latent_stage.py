"""The latent stage: its statistics say what the volumes say, and two states are worth more than a Gaussian code."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from opustomo import latent_stage, linear, objective
from opustomo.latent_stage import Statistics, bound, reduce_statistics, train_latent
from opustomo.linear import LinearModel, Posterior
from opustomo.model.vae import Vae
from opustomo.physics.grid import Grid
from opustomo.physics.observation import model_band
from opustomo.physics.volume import spherical_mask
from small_set import MemoryRows, even_weights, gaussians, observed

SIZE, COUNT, ZDIM = 12, 240, 2
STRENGTH = 10.0
GRID = Grid(SIZE, 4.0, SIZE, SIZE, 16)
MASK = spherical_mask(SIZE, 4.0, 1.5)
TRAIN, HELD = torch.arange(180), torch.arange(180, COUNT)


class TwoStates(NamedTuple):
    model: LinearModel
    rows: MemoryRows
    post: Posterior
    statistics: Statistics
    mean: torch.Tensor
    factor: torch.Tensor
    code: torch.Tensor


@pytest.fixture(scope="module")
def two_states() -> TwoStates:
    """A part is there or not: the true code is -1 or 1, and the linear model knows the direction."""
    body = 2 * gaussians(SIZE, np.array([[0, -1.0, 0], [1.0, 0.5, 1.0]]), 1.4) * MASK
    part = 0.5 * gaussians(SIZE, np.array([[-2.0, 1.5, 0]]), 1.2) * MASK
    model = LinearModel(body + part, part[None], torch.ones(7), torch.ones(7), (0.01, 0.05))
    code = torch.sign(torch.randn(COUNT, generator=torch.Generator().manual_seed(0)))
    rows = observed(model.decode(code[:, None]), even_weights(COUNT, SIZE, 1, STRENGTH), SIZE, seed=2)
    everyone = torch.arange(COUNT)
    post = linear.infer(model, rows, everyone, GRID)
    moments = linear.statistics(linear.columns(model, GRID), rows, everyone, GRID)
    reduced = reduce_statistics(*moments, post.gain, ZDIM)
    mean = torch.nn.functional.pad(post.code, (0, 1))
    factor = torch.diag_embed(torch.ones(COUNT, ZDIM))
    factor[:, :1, :1] = torch.linalg.cholesky(post.code_covariance)
    return TwoStates(model, rows, post, reduced, mean, factor, code)


def network(model: LinearModel) -> Vae:
    torch.manual_seed(0)
    components = torch.nn.functional.pad(model.components, (0, 0) * 3 + (0, ZDIM - model.size))
    modes = linear.pose_modes(model.mean, model.pose_scale, GRID)
    return Vae(MASK, model.mean, components, modes, templateres=16, width=0.05, encoderres=4)


def pairs(count: int, particles: int) -> torch.Tensor:
    """Samples in opposite pairs: they cancel what is odd."""
    half = torch.randn((count, particles, ZDIM), generator=torch.Generator().manual_seed(1))
    return torch.cat([half, -half])


def test_statistics_are_worth_the_volumes(two_states: TwoStates) -> None:
    """Evidence from U^T B and U^T W U is that of the decoded volume against the rows, pose errors integrated out."""
    model, rows, gain = two_states.model, two_states.rows, two_states.post.gain[:20]
    code = torch.randn((20, ZDIM), generator=torch.Generator().manual_seed(4))
    volume = model.decode(code[:, :1])
    numerator, weight = rows.numerators[:20] * gain[:, None, None, None], rows.weights[:20] * gain[:, None].square()
    nuisance = objective.pose_nuisance(linear.pose_modes(model.mean, model.pose_scale, GRID), numerator, weight, SIZE)
    expected, _ = objective.evidence(volume, model_band(volume, SIZE), numerator, weight, nuisance, SIZE)
    found = two_states.statistics.evidence(torch.arange(20), code[None])[0]
    assert torch.allclose(found, expected, atol=5e-3, rtol=1e-4)


def test_untrained_bound_is_the_linear_evidence(two_states: TwoStates) -> None:
    everyone = torch.arange(COUNT)
    model = network(two_states.model)
    with torch.no_grad():
        value = bound(model, two_states.statistics, everyone, two_states.mean, two_states.factor, pairs(200, COUNT))
    assert float((value - two_states.post.evidence).mean()) == pytest.approx(0.0, abs=0.02)


def test_two_states_are_worth_more_than_a_gaussian(two_states: TwoStates, monkeypatch: pytest.MonkeyPatch) -> None:
    """On particles never trained on: the bent code explains them better, and the codes fall apart into two."""
    monkeypatch.setattr(latent_stage, "STEPS", 400)
    model, noise = network(two_states.model), pairs(50, len(HELD))
    arguments = (two_states.statistics, HELD, two_states.mean, two_states.factor, noise)
    with torch.no_grad():
        before = float(bound(model, *arguments).mean())
    train_latent(model, two_states.statistics, two_states.mean, two_states.factor, TRAIN, seed=0)
    with torch.no_grad():
        after = float(bound(model, *arguments).mean())
        refined, _ = model.refined(two_states.mean[HELD], two_states.factor[HELD])
        occupancy = model.warp(refined)[:, 0]
    assert after > before + 0.1
    error = [(x - two_states.code[HELD]).square().mean() for x in (occupancy, two_states.mean[HELD, 0])]
    assert float(error[0]) < 0.6 * float(error[1])


def test_same_seed_same_map(two_states: TwoStates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_stage, "STEPS", 5)
    states = []
    for _ in range(2):
        model = network(two_states.model)
        train_latent(model, two_states.statistics, two_states.mean, two_states.factor, TRAIN, seed=3)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
