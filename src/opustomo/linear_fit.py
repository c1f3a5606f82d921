"""The linear stage fitted to a data set: which particles take part, how many components, which poses, which codes.

Owns: the common start of ``linear`` and ``train``.  Poses are corrected in rounds: each is a Gauss-Newton step, since
the pose modes are derivatives at the present poses and a first-order model describes large errors badly.  The prior of
the pose error stays where it was, at the poses given, so that a second look does not count the same evidence twice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opustomo.data.particles import Particles, particle_numbers
from opustomo.data.poses import move_poses
from opustomo.errors import UserError
from opustomo.linear import (
    LinearModel,
    Posterior,
    average,
    choose_components,
    columns,
    estimate_gain,
    fit,
    infer,
    maximise,
    own_pose_error,
    pose_prior,
    posterior,
    rescale,
    statistics,
    to_single,
)
from opustomo.mixture import (
    CodeMoments,
    Mixture,
    Statistics,
    choose_mixture,
    code_moments,
    reduce_statistics,
    refine_mixture,
)
from opustomo.physics.grid import Grid
from opustomo.pose_scale import likeliest_pose_scale
from opustomo.reconstruct import Rows

log = logging.getLogger("opustomo")

OUTLIER_LIMIT = 8.0  # robust standard deviations of the evidence above its median
FEW = 4  # particles: of fewer nobody can say which is the strange one
MOST_OUTLIERS = 0.1  # more than this fraction is a class, not outliers
HELD_OUT = 0.1  # fraction of particles that choose the number of components
MAX_COMPONENTS = 12
SAMPLE = 32_768  # particles that are enough to choose and fit a model, which the last EM steps refine on all
EM_STEPS = 8  # per added component: more of them overfit the components' spectrum (docs/experiments.md)
POSE_ROUNDS = 4
LAST_STEPS, MIXTURE_STEPS = 4, 5
SETTLED = 0.25  # of the standard deviation of the given poses' errors: smaller corrections are not worth a round
WORTH = 0.5  # nats per held-out particle: a round that gains less is the last


@dataclass(frozen=True)
class LinearResult:
    """The fitted linear model, the distribution of its codes, and what is known about every particle.

    ``posterior``: code and pose error under Gaussian priors of both; ``codes``: the code under the mixture.
    """

    model: LinearModel
    posterior: Posterior
    statistics: Statistics
    mixture: Mixture
    pose_error: Tensor  # (P, 6) left at the rows' poses: rotation vector (radians) and shift (working voxels)
    trail: list[tuple[int, float]]  # (K, held-out evidence in nats per particle)
    typical: Tensor  # (P,) bool: particles that take part in fits
    brightness: Tensor  # (P,) see ``change_over_average``, the largest found
    usual: tuple[Tensor, Tensor]  # (K+3,) each: median and robust spread of the fitted particles' ``features``
    codes: CodeMoments  # of every particle, under the mixture

    @property
    def features(self) -> Tensor:
        """What shows that a particle is not like the others, (P, K+3): code, gain, evidence, brightness.

        Under the Gaussian prior: a mixture may have a place for the outliers.
        """
        return features(self.posterior, self.brightness)


@dataclass(frozen=True)
class Plan:
    """How the linear stage is fitted: the particles of each part (row numbers), K and EM steps.

    components: K, or 0 to choose it by held-out evidence up to ``limit`` (0: the average alone); estpose: correct the
    poses; use_held: once K is chosen the held-out particles take part in the last steps.
    """

    train: Tensor
    held: Tensor
    estpose: bool
    seed: int
    components: int = 0
    limit: int = MAX_COMPONENTS
    iterations: int = EM_STEPS
    use_held: bool = False


def fit_linear(
    particles: Particles, make_rows: Callable[[Particles], Rows], grid: Grid, mask: Tensor, plan: Plan
) -> tuple[Particles, Rows, LinearResult]:
    """Linear model of the training particles and the posterior of all: particles at their last poses, rows, result.

    make_rows gives the rows of the particles at the poses they have.  Raises UserError with less than 2 particles.
    """
    settled = settle(particles, make_rows, grid, mask, plan)
    rows, found, probe = settled.rows, settled.fit, settled.probe
    rotation, shift = math.degrees(found.model.pose_scale[0]), found.model.pose_scale[1] * grid.working_pixel
    log.info(
        "linear stage: %d components; evidence of held-out particles %.2f nats (average alone %.2f); the data show "
        "errors of the given poses of %.2f degrees and %.2f A per axis",
        found.model.size, found.evidence(probe), found.trail[0][1], rotation, shift,
    )  # fmt: skip
    about = code_statistics(found.model, rows, found.posterior.gain, grid)
    mixture = choose_mixture(about, settled.fitted, probe, plan.seed)
    # everything is chosen now: those held out for the choice may take part, unless they judge a network later
    last = torch.nonzero(settled.typical)[:, 0] if plan.use_held else settled.train
    model, mixture = polish(found.model, mixture, rows, last, grid, mask, LAST_STEPS)
    final = judged(model, rows, grid, found.trail)
    return settled.particles, rows, linear_result(final, mixture, rows, grid, settled.typical, settled.brightness)


@dataclass(frozen=True)
class Settled:
    """Particles at their last poses, their rows and the model chosen for them; who took part in what (see ``Plan``)."""

    particles: Particles
    rows: Rows
    fit: Fit
    train: Tensor  # row numbers: those of the plan that are typical
    fitted: Tensor  # those the model was fitted to, a sample of them where there are many
    probe: Tensor  # those whose evidence decided
    typical: Tensor  # (P,) bool
    brightness: Tensor  # (P,)


def settle(
    particles: Particles, make_rows: Callable[[Particles], Rows], grid: Grid, mask: Tensor, plan: Plan
) -> Settled:
    """Which particles take part, how many components, which poses.  Arguments and errors as for ``fit_linear``."""
    if len(plan.train) < 2:
        raise _too_few(particles, plan.train)
    rows = make_rows(particles)
    usable = torch.from_numpy(particles.usable)
    able = plan.train[usable[plan.train]]
    if len(able) < 2:
        raise _too_few(particles, able)
    typical = typical_particles(rows, able, grid, mask, usable)
    brightness = torch.zeros(len(rows))
    while True:
        train, fitted, probe = _parts(plan, typical, particle_numbers(particles.names))
        found = _choose(plan, rows, fitted, probe, grid, mask)
        brightness = torch.maximum(brightness, change_over_average(found.model, found.posterior.code))
        strange = typical & (brightness > 1.0)
        if not strange.any() or strange.sum() > MOST_OUTLIERS * typical.sum():
            break
        typical = typical & ~strange
    _name_outliers(typical | ~usable)
    if plan.estpose:
        given = particles

        def refit(last: Fit, rows: Rows) -> Fit:
            return judged(fit(last.model, rows, fitted, grid, mask, EM_STEPS), rows, grid, last.trail)

        particles, rows, found = correct_poses(particles, rows, found, make_rows, grid, probe, refit)
        if particles is not given:
            # what was noise about poses that are wrong may be a component now; from the start, since many EM steps
            # overfit the spectrum of the components
            again = _choose(plan, rows, fitted, probe, grid, mask)
            found = again if again.evidence(probe) > found.evidence(probe) else replace(found, trail=again.trail)
    return Settled(particles, rows, found, train, fitted, probe, typical, brightness)


def _too_few(particles: Particles, able: Tensor) -> UserError:
    return UserError(
        f"{particles.source}: {len(able)} particle(s) to fit: at least 2 are needed; add particles or lower --valfrac"
    )


def _parts(plan: Plan, typical: Tensor, particle: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers: all training particles that are typical, those that are fitted, those whose evidence chooses.

    particle: (P,) which one each row is of: its copies (``expand``) do not choose between fits to themselves.
    """
    train, held = plan.train[typical[plan.train]], plan.held[typical[plan.held]]
    some, probe = _some(train, SAMPLE, plan.seed), _some(held, SAMPLE // 4, plan.seed)
    # without held-out particles a tenth of the training ones choose K, or it would rise to the limit
    tenth = particle_numbers(particle[some.numpy()]) % round(1 / HELD_OUT) == 0
    probe = probe if len(held) else some[torch.from_numpy(tenth)]
    fitted = some if len(held) or plan.components else some[~torch.isin(some, probe)]
    return train, fitted if len(fitted) > 1 else some, probe


def _some(rows: Tensor, count: int, seed: int) -> Tensor:
    """At most ``count`` of the row numbers, in their order."""
    if len(rows) <= count:
        return rows
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count]
    return rows[chosen.sort().values]


def _choose(plan: Plan, rows: Rows, fitted: Tensor, probe: Tensor, grid: Grid, mask: Tensor) -> Fit:
    limit = plan.components or min(plan.limit, max(1, len(fitted) // 4))
    model, trail = choose_components(
        rows, fitted, probe, grid, mask, limit, plan.iterations, plan.seed, exactly=bool(plan.components)
    )
    return judged(model, rows, grid, trail)


def linear_result(
    found: Fit,
    mixture: Mixture,
    rows: Rows,
    grid: Grid,
    typical: Tensor,
    brightness: Tensor,
    usual: tuple[Tensor, Tensor] | None = None,
) -> LinearResult:
    """Everything that follows from a model with its Gaussian posteriors and their gains, and a mixture.

    usual: what is usual among the particles that the model was fitted to (None: these are those).
    """
    model, posterior = found.model, found.posterior
    about = code_statistics(model, rows, posterior.gain, grid)
    codes = code_moments(mixture, about)
    error = pose_error(model, rows, grid, codes.centre().float(), posterior.gain)
    usual = usual or usual_range(features(posterior, brightness))
    return LinearResult(model, posterior, about, mixture, error, found.trail, typical, brightness, usual, codes)


def code_statistics(model: LinearModel, rows: Rows, gain: Tensor, grid: Grid) -> Statistics:
    """Statistics of the codes of all rows; gain (P,)."""
    everyone = torch.arange(len(rows))
    moments = statistics(columns(model, grid), rows, everyone, grid)
    return reduce_statistics(*moments, gain, pose_prior(model, rows, everyone))


def polish(
    model: LinearModel, mixture: Mixture, rows: Rows, index: Tensor, grid: Grid, mask: Tensor, steps: int
) -> tuple[LinearModel, Mixture]:
    """EM steps of mean, components and mixture together on the particles at ``index``."""
    prior = pose_prior(model, rows, index).double()
    for _ in range(steps):
        moments = statistics(columns(model, grid), rows, index, grid)
        gain = estimate_gain(*moments, prior, mixture)
        mixture = refine_mixture(mixture, reduce_statistics(*moments, gain, prior), MIXTURE_STEPS)
        post = to_single(posterior(*moments, gain.double(), prior, mixture))
        scale = likeliest_pose_scale(model.pose_scale, *moments, gain, prior)
        model = maximise(model, rows, index, grid, mask, post)
        model = rescale(model, post, scale, codes=False)
        prior = pose_prior(model, rows, index).double()
    return model, mixture


@dataclass(frozen=True)
class Fit:
    """A linear model with the Gaussian posteriors of all particles."""

    model: LinearModel
    posterior: Posterior
    trail: list[tuple[int, float]]

    def evidence(self, index: Tensor) -> float:
        """Mean over the particles at ``index``."""
        return float(self.posterior.evidence[index].mean())


def judged(model: LinearModel, rows: Rows, grid: Grid, trail: list[tuple[int, float]]) -> Fit:
    """A model with the posteriors of all rows."""
    return Fit(model, infer(model, rows, torch.arange(len(rows)), grid), trail)


def features(posterior: Posterior, brightness: Tensor) -> Tensor:
    """See ``LinearResult.features``."""
    return torch.cat([posterior.code, posterior.gain[:, None], posterior.evidence[:, None], brightness[:, None]], 1)


def usual_range(values: Tensor) -> tuple[Tensor, Tensor]:
    """Median and robust standard deviation of each column of (P, q): outliers do not set the scale."""
    centre = values.median(0).values
    return centre, (1.4826 * (values - centre).abs().median(0).values).clamp(min=1e-6)


def typical_particles(rows: Rows, index: Tensor, grid: Grid, mask: Tensor, usable: Tensor | None = None) -> Tensor:
    """Which particles may take part in fits, (P,) bool: all but those that the average explains far too well.

    A bright object (gold, ice, an edge) can outweigh a hundred particles and take a component for itself.  It shows
    in the evidence under the average of the particles at ``index``: robust distance above the median.
    usable: (P,) bool, the others are left out (None: all are).
    """
    everyone = torch.arange(len(rows))
    evidence = infer(average(rows, index, grid, mask), rows, everyone, grid).evidence
    usable = torch.ones(len(rows), dtype=torch.bool) if usable is None else usable
    known = evidence[usable]
    if len(known) < FEW:
        return usable
    centre = known.median()
    spread = 1.4826 * (known - centre).abs().median().clamp(min=1.0)
    return usable & (evidence <= centre + OUTLIER_LIMIT * spread)


def change_over_average(model: LinearModel, code: Tensor) -> Tensor:
    """Norm of each particle's difference from the average over that of the average itself, (P,).

    No state of a molecule is above 1; gold, ice and other bright things that evidence under the average cannot tell
    from good particles are, and would keep a component for themselves.
    """
    components = model.components.flatten(1)
    change = torch.einsum("pk,kl,pl->p", code, components @ components.T, code)
    return (change / model.mean.square().sum()).sqrt()


def _name_outliers(typical: Tensor) -> None:
    if not typical.all():
        log.warning(
            "%d particle(s) are far brighter than the others (rows %s): left out of the fits, they still get codes; "
            "look at them, and at outlier_score in linear/particles.csv", int((~typical).sum()), first_rows(~typical),
        )  # fmt: skip


def first_rows(which: Tensor) -> str:
    """The first rows, counted from 1, at which ``which`` (P,) bool holds, for a message."""
    found = torch.nonzero(which)[:, 0]
    return ", ".join(str(int(i) + 1) for i in found[:8]) + (", ..." if len(found) > 8 else "")


# ------------------------------------------------------------------------------------------------ poses


def pose_error(model: LinearModel, rows: Rows, grid: Grid, code: Tensor, gain: Tensor) -> Tensor:
    """What is left of every particle's pose error, (P, 6): rotation vector (radians) and shift (working voxels)."""
    scale = torch.tensor(model.pose_scale).repeat_interleave(3)
    return own_pose_error(model, rows, torch.arange(len(rows)), grid, code, gain) * scale


def correct_poses(
    particles: Particles,
    rows: Rows,
    found: Fit,
    make_rows: Callable[[Particles], Rows],
    grid: Grid,
    probe: Tensor,
    refit: Callable[[Fit, Rows], Fit],
    *,
    map_held: bool = False,
) -> tuple[Particles, Rows, Fit]:
    """Rounds of moving the poses and fitting again, while the evidence of the particles at ``probe`` rises.

    refit: the fit at new rows, from the last one.  map_held: it has the same model (see ``move_poses``).
    """
    for number in range(1, POSE_ROUNDS + 1):
        error = pose_error(found.model, rows, grid, found.posterior.code, found.posterior.gain)
        scale = torch.tensor(found.model.pose_scale).repeat_interleave(3)
        if number > 1 and float((error / scale).square().mean().sqrt()) < SETTLED:
            break  # rows are the dearest part of a round
        candidate = move_poses(particles, error, grid, map_held=map_held)
        candidate_rows = make_rows(candidate)
        refined = refit(found, candidate_rows)
        gain = refined.evidence(probe) - found.evidence(probe)
        who = "particle" if map_held else "held-out particle"
        log.info("poses corrected, round %d: %+.2f nats per %s", number, gain, who)
        if not gain > 0:
            return particles, make_rows(particles), found
        particles, rows, found = candidate, candidate_rows, refined
        if gain < WORTH:
            break
    return particles, rows, found
