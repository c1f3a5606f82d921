"""What is known about the codes: each particle's statistics, the distribution of all codes, the posterior of each.

Owns: the mixture of Gaussians that is the prior of the code, fitted through every particle's own uncertainty (extreme
deconvolution; Bovy, Hogg and Roweis 2011, Ann. Appl. Stat. 5, 1657).  Discrete states and curved motions are not one
Gaussian; as long as the density is linear in the code, what they are worth is known in closed form.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor

log = logging.getLogger("opustomo")

SIZES = (1, 2, 3, 4, 6, 8, 12, 16)  # numbers of Gaussians tried
EM_STEPS = 100
SAMPLE = 20_000  # particles that are enough to know the distribution
PSEUDO_COUNT, FLOOR = 3.0, 0.02  # a Gaussian has this variance for certain, as if so many particles had shown it
CHUNK = 4096  # particles whose posteriors are made at once: under every Gaussian of 16 they take 20 kB each


@dataclass(frozen=True)
class Statistics:
    """Evidence as a function of the code y: ``constant + <e, first> - 1/2 <e, second e>``, e = (1, y), in nats.

    constant (P,), first (P, 1+K), second (P, 1+K, 1+K); gains are in, pose errors are integrated out.
    """

    constant: Tensor
    first: Tensor
    second: Tensor

    def __len__(self) -> int:
        return len(self.constant)

    def at(self, index: Tensor) -> Statistics:
        """Those of the particles at ``index``."""
        return Statistics(self.constant[index], self.first[index], self.second[index])

    def to(self, device: torch.device) -> Statistics:
        """On a device."""
        return Statistics(self.constant.to(device), self.first.to(device), self.second.to(device))

    def evidence(self, code: Tensor) -> Tensor:
        """(P,) evidence for codes (P, K)."""
        e = torch.cat([torch.ones_like(code[:, :1]), code], -1)
        quadratic = torch.einsum("ba,bac,bc->b", e, self.second, e)
        return self.constant + (e * self.first).sum(-1) - 0.5 * quadratic


def reduce_statistics(linear: Tensor, quadratic: Tensor, gain: Tensor, pose_prior: Tensor) -> Statistics:
    """Integrate the pose errors out of the linear stage's statistics.

    linear (P, 1+K+6), quadratic (P, 1+K+6, 1+K+6) from ``linear.statistics``; gain (P,); pose_prior (P, 6).
    """
    linear, quadratic = with_gain(linear, quadratic, gain)
    n = linear.shape[1] - pose_prior.shape[1]
    return without(linear, quadratic, slice(0, n), slice(n, None), pose_prior)


def with_gain(linear: Tensor, quadratic: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics (b, q) and (b, q, q) of volumes times each particle's gain (b,)."""
    gain = gain.double()
    return linear * gain[:, None], quadratic * gain[:, None, None].square()


def without(linear: Tensor, quadratic: Tensor, kept: slice, gone: slice, prior: Tensor) -> Statistics:
    """Integrate variables ``gone``, N(prior, I), out of ``exp(<x, linear> - 1/2 <x, quadratic x>)``: leaves ``kept``.

    linear (b, q), quadratic (b, q, q); prior (b, number of those gone).
    """
    inner = quadratic[:, gone, gone] + torch.eye(prior.shape[1], dtype=quadratic.dtype)
    cross, pull = quadratic[:, gone, kept], linear[:, gone] + prior
    solved = torch.linalg.solve(inner, torch.cat([cross, pull[..., None]], -1))
    first = linear[:, kept] - torch.einsum("bpa,bp->ba", cross, solved[..., -1])
    second = quadratic[:, kept, kept] - cross.transpose(1, 2) @ solved[..., :-1]
    constant = 0.5 * (pull * solved[..., -1] - prior.square()).sum(-1) - 0.5 * torch.logdet(inner)
    return Statistics(constant, first, second)


@dataclass(frozen=True)
class Mixture:
    """Distribution of the codes: share (J,), mean (J, K), covariance (J, K, K), float64."""

    share: Tensor
    mean: Tensor
    covariance: Tensor

    def to(self, device: torch.device) -> Mixture:
        """On a device."""
        return Mixture(*(getattr(self, f.name).to(device) for f in fields(self)))

    def variance(self) -> Tensor:
        """(K,) of the whole distribution."""
        offset = self.mean - self.share @ self.mean
        return self.share @ (self.covariance.diagonal(dim1=-2, dim2=-1) + offset.square())

    def log_density(self, code: Tensor) -> Tensor:
        """(b,) for codes (b, K)."""
        return _log_density(self.share.log(), self.mean, torch.linalg.cholesky(self.covariance), code)


class Luck(NamedTuple):
    """What chance has to say about b codes: exponential numbers (b, J), one for each Gaussian, and normal ones (b, K).

    They do not depend on the particles, so that every process can draw for the whole batch and keep its own.
    """

    race: Tensor
    noise: Tensor

    def of(self, rows: slice) -> Luck:
        """That of some of the codes."""
        return Luck(self.race[rows], self.noise[rows])

    def opposite(self) -> Luck:
        """The same Gaussians, on the other side of their middles."""
        return Luck(self.race, -self.noise)


def draw(mixture: Mixture, count: int, generator: torch.Generator) -> Luck:
    """Luck of ``count`` codes, on the CPU."""
    size = count, len(mixture.share)
    race = torch.empty(size, dtype=mixture.share.dtype).exponential_(generator=generator)
    noise = torch.randn((count, mixture.mean.shape[1]), generator=generator, dtype=mixture.share.dtype)
    return Luck(race, noise)


@dataclass(frozen=True)
class CodePosterior:
    """Posterior of b codes, each a mixture: share (b, J), mean (b, J, K), lower factor (b, J, K, K), evidence (b,).

    The evidence is that of the linear model with the mixture as its prior, in nats against an empty map.
    """

    share: Tensor
    mean: Tensor
    factor: Tensor
    evidence: Tensor

    def centre(self) -> Tensor:
        """Posterior mean (b, K)."""
        return torch.einsum("bj,bjk->bk", self.share, self.mean)

    def covariance(self) -> Tensor:
        """Posterior covariance (b, K, K)."""
        offset = self.mean - self.centre()[:, None]
        each = self.factor @ self.factor.transpose(-1, -2) + offset[..., :, None] * offset[..., None, :]
        return torch.einsum("bj,bjkl->bkl", self.share, each)

    def spread(self) -> Tensor:
        """Posterior standard deviations (b, K)."""
        return self.covariance().diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()

    def moved(self, shift: Tensor, log_scale: Tensor) -> CodePosterior:
        """All parts shifted and their factors scaled alike: shift, log_scale (b, K)."""
        return CodePosterior(
            self.share, self.mean + shift[:, None], self.factor * log_scale.exp()[:, None, None, :], self.evidence
        )

    def detach(self) -> CodePosterior:
        """The same without gradients."""
        return CodePosterior(*(getattr(self, f.name).detach() for f in fields(self)))

    def sample(self, luck: Luck) -> Tensor:
        """Codes (b, K).

        The first of exponential clocks of rates ``share`` to ring is each one with probability ``share``.
        """
        race, noise = (values.to(self.share.device, non_blocking=True) for values in luck)
        part = (self.share / race).argmax(1)
        every = torch.arange(len(part), device=part.device)
        return self.mean[every, part] + (self.factor[every, part] @ noise[..., None])[..., 0]

    def log_density(self, code: Tensor) -> Tensor:
        """(b,) for codes (b, K)."""
        return _log_density(self.share.clamp(min=1e-30).log(), self.mean, self.factor, code)


@dataclass(frozen=True)
class CodeMoments:
    """What is kept of the codes of all particles: a ``CodePosterior`` without its parts' own moments.

    share (P, J), mean (P, K), second (P, K, K) the covariance, evidence (P,).
    """

    share: Tensor
    mean: Tensor
    second: Tensor
    evidence: Tensor

    def centre(self) -> Tensor:
        """Posterior mean (P, K)."""
        return self.mean

    def covariance(self) -> Tensor:
        """Posterior covariance (P, K, K)."""
        return self.second

    def spread(self) -> Tensor:
        """Posterior standard deviations (P, K)."""
        return self.second.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def code_moments(mixture: Mixture, statistics: Statistics) -> CodeMoments:
    """Moments of ``condition``, made in parts so that many particles fit."""
    parts = torch.arange(len(statistics)).split(CHUNK)
    posts = (condition(mixture, statistics.at(part)) for part in parts)
    each = [(post.share, post.centre(), post.covariance(), post.evidence) for post in posts]
    return CodeMoments(*map(torch.cat, zip(*each, strict=True)))


def _log_density(log_share: Tensor, mean: Tensor, factor: Tensor, code: Tensor) -> Tensor:
    """Mixture of Gaussians: log_share (..., J), mean (..., J, K), lower factor (..., J, K, K) at code (b, K)."""
    offset = code[:, None] - mean
    factor = factor.expand(*offset.shape, offset.shape[-1])
    unit = torch.linalg.solve_triangular(factor, offset[..., None], upper=False)[..., 0]
    log_det = factor.diagonal(dim1=-2, dim2=-1).abs().clamp(min=1e-12).log().sum(-1)
    constant = 0.5 * code.shape[-1] * math.log(2.0 * math.pi)
    return torch.logsumexp(log_share - 0.5 * unit.square().sum(-1) - log_det - constant, -1)


def condition(mixture: Mixture, statistics: Statistics) -> CodePosterior:
    """Posterior of every particle of ``statistics`` under the mixture, in closed form."""
    precision = torch.linalg.inv(mixture.covariance)  # (J, K, K)
    pull = (precision @ mixture.mean[..., None])[..., 0]
    offset = 0.5 * (mixture.mean * pull).sum(-1) + 0.5 * torch.logdet(mixture.covariance) - mixture.share.log()
    second = statistics.second.to(precision)
    flat = statistics.constant + statistics.first[:, 0] - 0.5 * second[:, 0, 0]
    right = (statistics.first.to(precision)[:, 1:] - second[:, 0, 1:])[:, None] + pull
    factor = torch.linalg.cholesky(second[:, None, 1:, 1:] + precision)
    mean = torch.cholesky_solve(right[..., None], factor)[..., 0]
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    joint = flat[:, None] + 0.5 * (right * mean).sum(-1) - log_det - offset
    evidence = torch.logsumexp(joint, 1)
    covariance = torch.cholesky_inverse(factor)
    return CodePosterior((joint - evidence[:, None]).exp(), mean, torch.linalg.cholesky(covariance), evidence)


def single(size: int) -> Mixture:
    """The prior of the linear stage, N(0, I), as a mixture of one."""
    eye = torch.eye(size, dtype=torch.float64)
    return Mixture(eye.new_ones(1), eye.new_zeros(1, size), eye[None])


def mean_evidence(mixture: Mixture, statistics: Statistics) -> float:
    """Nats per particle."""
    parts = torch.arange(len(statistics)).split(CHUNK)
    return sum(float(condition(mixture, statistics.at(part)).evidence.sum()) for part in parts) / len(statistics)


def fit_mixture(statistics: Statistics, count: int, seed: int) -> Mixture:
    """EM for ``count`` Gaussians from k-means starts, on at most 20,000 of the particles."""
    from sklearn.mixture import GaussianMixture  # a second to import: a continuation does without

    some = statistics.at(_some(len(statistics), seed))
    codes = condition(single(some.first.shape[1] - 1), some).centre()
    start = GaussianMixture(count, n_init=5, reg_covar=FLOOR, random_state=seed).fit(codes.numpy())
    mixture = Mixture(*(torch.from_numpy(a) for a in (start.weights_, start.means_, start.covariances_)))
    return refine_mixture(mixture, some, EM_STEPS)


def refine_mixture(mixture: Mixture, statistics: Statistics, steps: int) -> Mixture:
    """EM from ``mixture`` on all particles of ``statistics``."""
    sure = PSEUDO_COUNT * FLOOR * torch.eye(mixture.mean.shape[1], dtype=torch.float64)
    for _ in range(steps):
        particles = total = torch.zeros(())
        square: Tensor = torch.zeros(())
        for part in torch.arange(len(statistics)).split(CHUNK):
            post = condition(mixture, statistics.at(part))
            offset = post.mean - mixture.mean  # near the new means: no digits are lost in the difference below
            second = post.factor @ post.factor.transpose(-1, -2) + offset[..., :, None] * offset[..., None, :]
            particles = particles + post.share.sum(0)
            total = total + torch.einsum("bj,bjk->jk", post.share, offset)
            square = square + torch.einsum("bj,bjkl->jkl", post.share, second)
        step = total / particles.clamp(min=1e-9)[:, None]
        mean = mixture.mean + step
        scatter = square - particles[:, None, None] * step[..., :, None] * step[..., None, :]
        covariance = (scatter + sure) / (particles + PSEUDO_COUNT)[:, None, None]
        mixture = Mixture((particles + 1e-9) / (particles + 1e-9).sum(), mean, covariance)
    return mixture


def choose_mixture(statistics: Statistics, train: Tensor, held: Tensor, seed: int) -> Mixture:
    """The mixture with as many Gaussians as the evidence of held-out particles supports; never worse than one."""
    seen, unseen = statistics.at(train), statistics.at(held)
    best = single(statistics.first.shape[1] - 1)
    top, failures = mean_evidence(best, unseen), 0
    start = top
    for count in SIZES:
        if count > max(1, len(train) // 20):
            break
        mixture = fit_mixture(seen, count, seed)
        value = mean_evidence(mixture, unseen)
        if value > top:
            best, top, failures = mixture, value, 0
        else:
            failures += 1
        if failures == 2:
            break
    log.info(
        "codes: a mixture of %d Gaussian(s), %+.2f nats per held-out particle over one of unit variance",
        len(best.share), top - start,
    )  # fmt: skip
    return best


def _some(count: int, seed: int) -> Tensor:
    if count <= SAMPLE:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:SAMPLE]
