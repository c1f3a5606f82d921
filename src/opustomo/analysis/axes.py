"""Which independent directions of the code are discrete, and which groups of particles they make.

Owns: the verdict on every independent axis and the groups along it.  Composition is discrete, motion is continuous: a
clustering in all dimensions at once follows whichever varies more, along one axis each shows what it is.  All laws are
fitted *through* each particle's own uncertainty, so that noise neither makes a gap nor hides one.
"""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit, logsumexp
from scipy.stats import norm

from opustomo.analysis import plots
from opustomo.data.atomic import write_csv, write_text
from opustomo.data.pickles import save_pickle

if TYPE_CHECKING:
    from opustomo.checkpoint import Run

log = logging.getLogger(__name__)

Floats = NDArray[np.float64]

MOST_GROUPS = 4  # along one axis
MOST_JOINT = 64  # along all axes together
SAMPLE = 5_000  # particles that are enough to know a law
POINTS = 10  # of a traversal
QUADRATURE = 33  # points of a motion
MOTIONS = ((-1.0, 0.0, -2.0), (1.5, 0.0, 1.0), (1.0, 0.7, -1.0), (1.0, -0.7, -1.0))  # starts of w, f and g
LARGEST_GAIN = 2.0
EM_STEPS = 300
SEPARATE = 6.0  # widths between neighbouring groups: states are seen at 9 and more, a bent motion at 4.6
LEAST_WIDTH = 0.02  # of the spread of the axis
FEWEST = 20  # particles
LEAST_SHARE = 0.02  # of the particles in a group


@dataclass(frozen=True)
class Likelihood:
    """What the data say about P codes y of K dimensions: ``exp(<y, pull> - 1/2 <y, information y>)``.

    information (P, K, K), pull (P, K): of the linear stage, gains in it, pose errors integrated out.
    """

    information: Floats
    pull: Floats

    def along(self, direction: Floats, centre: Floats, covariance: Floats) -> tuple[Floats, Floats]:
        """Position along ``direction`` (K,) that each particle's data prefer, and its standard error, (P,) each.

        The other directions are integrated out under a Gaussian of this ``centre`` (K,) and ``covariance`` (K, K).
        """
        precision = np.linalg.inv(covariance)
        posterior = np.linalg.inv(self.information + precision)
        mean = np.einsum("pkl,pl->pk", posterior, self.pull + precision @ centre) @ direction
        variance = np.einsum("k,pkl,l->p", direction, posterior, direction)
        prior = float(direction @ covariance @ direction)
        # dividing the posterior by the prior leaves the likelihood; a particle that says nothing gets a wide one
        known = np.maximum(1.0 / variance - 1.0 / prior, 1e-6 / prior)
        place = (mean / variance - float(direction @ centre) / prior) / known
        return place, 1.0 / np.sqrt(known)


@dataclass(frozen=True)
class Groups:
    """J Gaussians along an axis in order of their centres: share, centre, width (J,) each; evidence in nats."""

    share: Floats
    centre: Floats
    width: Floats
    evidence: float

    def probability(self, place: Floats, error: Floats) -> Floats:
        """(P, J) of belonging to each group."""
        joint = self._joint(place, error)
        probability: Floats = np.exp(joint - logsumexp(joint, 1, keepdims=True))
        return probability

    def _joint(self, place: Floats, error: Floats) -> Floats:
        spread = np.hypot(self.width, error[:, None])
        joint: Floats = np.log(self.share) + norm.logpdf(place[:, None], self.centre, spread)
        return joint

    @property
    def separation(self) -> float:
        """Distance of the two nearest neighbours in mean widths; infinite for one group."""
        mean = (self.width[1:] + self.width[:-1]) / 2
        return float((np.diff(self.centre) / mean).min()) if len(self.centre) > 1 else np.inf


@dataclass(frozen=True)
class Axis:
    """One independent axis: direction (K,) with position ``direction . code``, place and error (P,) of every particle.

    ``advantage``: nats by which the best separate groups beat the best continuous law, all particles together, less
    half the logarithm of their number for each further parameter (BIC).  Above 0 the axis is discrete.
    """

    direction: Floats
    place: Floats
    error: Floats
    groups: Groups
    advantage: float

    @property
    def discrete(self) -> bool:
        """Whether the particles form groups along this axis."""
        return self.advantage > 0

    @property
    def probability(self) -> Floats:
        """(P, J) of belonging to each group."""
        return self.groups.probability(self.place, self.error)


def find_axes(likelihood: Likelihood, directions: Floats, codes: Floats, typical: NDArray[np.bool_]) -> list[Axis]:
    """The axes along ``directions`` (K, K; one row each), the most discrete first.

    codes: (P, K), whose moments are the prior of what is integrated out; typical: (P,) particles that are fitted.
    """
    centre, within = codes[typical].mean(0), np.linalg.inv(likelihood.information + np.eye(codes.shape[1]))
    covariance = np.atleast_2d(np.cov(codes[typical].T)) + within[typical].mean(0)
    axes = [_axis(likelihood, row, centre, covariance, typical) for row in directions]
    return sorted(axes, key=lambda axis: -axis.advantage)


def _axis(
    likelihood: Likelihood, direction: Floats, centre: Floats, covariance: Floats, typical: NDArray[np.bool_]
) -> Axis:
    place, error = likelihood.along(direction, centre, covariance)
    some = np.random.default_rng(0).permutation(np.flatnonzero(typical))[:SAMPLE]
    seen = (place[some], error[some])
    price = 0.5 * np.log(max(2, len(some)))
    one, skewed = fit_groups(*seen, 1), fit_groups(*seen, 2, alike=False)
    # of a motion only place, reach and one number of its shape are charged: the others forgive what is not known of it
    continuous = max(one.evidence - 2 * price, motion_evidence(*seen) - 3 * price)
    if skewed.separation < SEPARATE:  # a long tail or a sharp peak
        continuous = max(continuous, skewed.evidence - 5 * price)
    best, advantage = one, -np.inf
    for count in range(2, MOST_GROUPS + 1):
        found = fit_groups(*seen, count)
        score = found.evidence - 2 * count * price - continuous
        if found.separation > SEPARATE and found.share.min() > LEAST_SHARE and score > advantage:
            best, advantage = found, float(score)
    return Axis(direction, place, error, best if advantage > 0 else one, advantage)


def fit_groups(place: Floats, error: Floats, count: int, alike: bool = True) -> Groups:
    """``count`` groups by EM (extreme deconvolution; Bovy, Hogg and Roweis 2011) from the best of several starts.

    place, error: (P,) measured positions and their standard errors; alike: all groups have one width.
    """
    weight = 1.0 / (error**2 + np.median(error) ** 2)
    mean = float((weight * place).sum() / weight.sum())
    spread = float(np.sqrt(max(0.0, (weight * ((place - mean) ** 2 - error**2)).sum() / weight.sum())))
    spread = max(spread, 0.1 * float(np.median(error)))
    reach = np.linspace(-1, 1, count) if count > 1 else np.zeros(1)
    stretches, shifts = ((0.7, 1.2, 2.0), (-0.5, 0.0, 0.5)) if count > 1 else ((1.0,), (0.0,))
    width = np.full(count, spread if count == 1 else spread / 3)
    fits = [
        _refine(Groups(np.full(count, 1 / count), mean + spread * (stretch * reach + shift), width, -np.inf),
                place, error, LEAST_WIDTH * spread, EM_STEPS // 6, alike)
        for stretch in stretches for shift in shifts
    ]  # fmt: skip
    best = max(fits, key=lambda fit: fit.evidence)
    return _refine(best, place, error, LEAST_WIDTH * spread, EM_STEPS, alike)


def _refine(groups: Groups, place: Floats, error: Floats, floor: float, steps: int, alike: bool) -> Groups:
    for _ in range(steps):
        member = groups.probability(place, error)
        shrink = groups.width**2 / (groups.width**2 + error[:, None] ** 2)
        own = groups.centre + shrink * (place[:, None] - groups.centre)  # posterior position in each group
        count = member.sum(0) + 1e-9
        moved = (member * own).sum(0) / count
        square = (member * ((own - moved) ** 2 + shrink * error[:, None] ** 2)).sum(0)
        mean_square = np.full_like(count, square.sum() / len(place)) if alike else square / count
        groups = Groups(count / count.sum(), moved, np.maximum(np.sqrt(mean_square), floor), -np.inf)
    order = np.argsort(groups.centre)
    groups = Groups(groups.share[order], groups.centre[order], groups.width[order], -np.inf)
    return replace(groups, evidence=float(logsumexp(groups._joint(place, error), 1).sum()))


def motion_evidence(place: Floats, error: Floats) -> float:
    """Evidence in nats of a motion without preferred states: ``c + h tanh(g sin(w u + f))``, u uniform in +-1.

    A motion moves density by more than it is wide, so a linear axis sees it turn (w) and saturate (g): its law lies
    between uniform and piled up at one or both ends, with a sixth of the particles at least in the middle half.
    Six parameters are fitted, one of them the softness of the whole, which forgives errors of the noise model.
    """
    u = np.linspace(-1, 1, QUADRATURE)
    centre, half = float(np.average(place, weights=1 / error**2)), float(np.sqrt(3.0) * place.std())

    def cost(law: Floats) -> float:
        turn, phase = 0.05 + 1.5 * expit(law[3]), 1.6 * np.tanh(law[4])
        gain = 0.05 + LARGEST_GAIN * expit(law[5])
        at = law[0] + np.exp(law[1]) * np.tanh(gain * np.sin(turn * u + phase) / np.sin(turn)) / np.tanh(gain)
        spread = np.hypot(error, np.exp(law[2]))[:, None]
        density = np.exp(-0.5 * np.minimum(((place[:, None] - at) / spread) ** 2, 1400)).mean(1)
        return float((np.log(spread[:, 0]) - np.log(density)).sum())

    start = [centre, np.log(0.8 * half), np.log(0.3 * float(np.median(error)))]
    fits = [minimize(cost, [*start, *motion], method="Nelder-Mead", options={"maxiter": 400}) for motion in MOTIONS]
    return -float(min(fit.fun for fit in fits)) - 0.5 * np.log(2 * np.pi) * len(place)


def joint_groups(axes: list[Axis]) -> NDArray[np.int64]:
    """Label (P,) of every particle by its groups along all discrete axes together, 0-based.

    Two factors that come and go independently are two axes of two groups and four labels.  A combination that hardly
    any particle has is none: its particles go to the likeliest of the others.  Axes that would make more than
    ``MOST_JOINT`` combinations are left out, the least discrete first; without a discrete axis every label is 0.
    """
    count = len(axes[0].place)
    joint = np.zeros((count, 1))
    for axis in axes:
        groups = len(axis.groups.share)
        if axis.discrete and joint.shape[1] * groups <= MOST_JOINT:
            known = np.log(np.maximum(axis.probability, 1e-300))
            joint = (joint[:, :, None] + known[:, None, :]).reshape(count, -1)
    share = np.bincount(joint.argmax(1), minlength=joint.shape[1]) / count
    label: NDArray[np.int64] = joint[:, share >= min(LEAST_SHARE, share.max())].argmax(1)
    return np.unique(label, return_inverse=True)[1].astype(np.int64)


def axes_of(run: Run) -> list[Axis]:
    """The axes of a run, the most discrete first; empty where it has no linear results or its codes stand still.

    The directions are those that the linear stage found independent (FastICA), the likelihoods its own.
    """
    stored = run.linear_results()
    if stored is None or "information" not in stored or stored["code"].shape[1] == 0 or len(stored["code"]) < FEWEST:
        return []
    likelihood = Likelihood(stored["information"].astype(float), stored["pull"].astype(float))
    directions = np.linalg.inv(stored["mixing"].astype(float))
    return find_axes(likelihood, directions, stored["code"].astype(float), run.typical)


def group_codes(labels: NDArray[np.int64], codes: Floats, typical: NDArray[np.bool_]) -> Floats:
    """(J, zdim) mean code of every group: what its particles share, without the conformation of any one of them."""
    every = range(labels.max() + 1)
    members = [typical & (labels == j) if (typical & (labels == j)).any() else labels == j for j in every]
    return np.stack([codes[member].mean(0) for member in members])


def write_axes(run: Run, folder: Path) -> list[Axis]:
    """``axes.csv``, ``axes.png``, ``axisJ/`` (J from 1) and, where an axis is discrete, ``groups/``.

    axisJ/ has z_axis.txt and labels.pkl (P,), groups/ labels.pkl and centers.txt, the mean code of every group.
    Files and columns: docs/outputs.
    """
    axes = axes_of(run)
    if not axes:
        return axes
    codes = np.asarray(run.codes, np.float64)
    rows = []
    for number, axis in enumerate(axes, 1):
        name = folder / f"axis{number}" / "z_axis.txt"
        along, labels = _traversal(axis, codes, run.typical)
        write_text(name, as_text(along))
        save_pickle(name.with_name("labels.pkl"), labels)
        certain = float((axis.probability.max(1) > 0.9).mean())
        rows.append([
            number, "groups" if axis.discrete else "continuous", len(axis.groups.share), f"{axis.advantage:.1f}",
            _words(axis.groups.share), _words(axis.groups.centre), _words(axis.groups.width),
            f"{np.median(axis.error):.3f}", f"{certain:.3f}",
        ])  # fmt: skip
    write_csv(folder / "axes.csv", COLUMNS, rows)
    plots.save(
        plots.independent_axes([_panel(number, axis) for number, axis in enumerate(axes, 1)]), folder / "axes.png"
    )
    discrete = sum(axis.discrete for axis in axes)
    if discrete:
        labels = joint_groups(axes)
        save_pickle(folder / "groups" / "labels.pkl", labels)
        write_text(folder / "groups" / "centers.txt", as_text(group_codes(labels, codes, run.typical)))
        sizes = ", ".join(f"{j}: {n}" for j, n in enumerate(np.bincount(labels)))
        log.info("%d of %d independent axes show separate groups; sizes: %s", discrete, len(axes), sizes)
        if _rejected(run):
            log.warning(
                "but held-out particles are explained best by the average alone: these may be better and worse "
                "particles, not structures; `opustomo quality %s --labels %s` tells", run.path,
                folder / "groups" / "labels.pkl",
            )  # fmt: skip
    else:
        for stale in ("labels.pkl", "centers.txt"):  # of an earlier analysis
            (folder / "groups" / stale).unlink(missing_ok=True)
        log.info("none of the %d independent axes shows separate groups: what varies, varies continuously", len(axes))
    return axes


def _rejected(run: Run) -> bool:
    """Whether held-out evidence was best without any component (one is kept all the same)."""
    trail = (run.linear_results() or {}).get("trail")
    return trail is not None and len(trail) > 1 and int(trail[np.argmax(trail[:, 1]), 0]) == 0


COLUMNS = ["axis", "kind", "groups", "advantage_nats", "share", "centre", "width", "median_error", "certain"]


def _traversal(axis: Axis, codes: Floats, typical: NDArray[np.bool_]) -> tuple[Floats, NDArray[np.int64]]:
    """Codes along an axis, and (P,) which of them each particle is nearest to.

    The groups' mean codes, or ten from the 5th to the 95th percentile, others at their mean.
    """
    if axis.discrete:
        labels = axis.probability.argmax(1)
        return group_codes(labels, codes, typical), labels
    used = codes[:, : len(axis.direction)]  # further dimensions of the code stand still
    centred = used - used[typical].mean(0)
    score = centred @ axis.direction
    along = (centred * score[:, None])[typical].mean(0) / max(float((score[typical] ** 2).mean()), 1e-30)
    low, high = np.percentile(score[typical], [5, 95])
    steps = np.linspace(low, high, POINTS)
    moved = np.tile(codes[typical].mean(0), (POINTS, 1))
    moved[:, : len(axis.direction)] += steps[:, None] * along
    return moved, nearest(score, steps)


def nearest(score: Floats, steps: Floats) -> NDArray[np.int64]:
    """(P,) which of ``steps`` (n,), 0-based, each ``score`` (P,) is nearest to."""
    return np.abs(score[:, None] - steps).argmin(1)


def _panel(number: int, axis: Axis) -> tuple[Floats, NDArray[np.int64], Floats, str]:
    low, high = np.percentile(axis.place, [0.5, 99.5])
    groups, reach = axis.groups, np.linspace(low, high, 400)
    seen = np.hypot(groups.width, np.median(axis.error))
    density = (groups.share * norm.pdf(reach[:, None], groups.centre, seen)).sum(1)
    title = f"axis {number}: " + (f"{len(groups.share)} groups" if axis.discrete else "continuous")
    return axis.place, axis.probability.argmax(1), np.stack([reach, density], 1), title


def _words(values: Floats) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def as_text(array: NDArray[Any], fmt: str = "%.6e") -> str:
    """One line for each row of an array."""
    buffer = io.StringIO()
    np.savetxt(buffer, array, fmt=fmt)
    return buffer.getvalue()
