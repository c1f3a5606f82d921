"""How well the conformation of a run with bodies tells a known hinge, and whether the codes leak into each other.

Owns: the metrics on arrays alone, as ``score_codes`` does for composition.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opustomo.analysis.dynamics import Hinge
from opustomo.analysis.score_codes import invariance

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class KnownHinge:
    """angle: (P,) degrees, NaN where nothing turns; axis: (3,) unit vector; point: (3,) on it, Angstrom from N//2."""

    angle: Floats
    axis: Floats | None = None
    point: Floats | None = None

    def at(self, rows: NDArray[np.int64]) -> KnownHinge:
        """That of some of the particles."""
        return replace(self, angle=self.angle[rows])


def score(
    conformation: Floats, composition: Floats, found: Hinge, deviation: float, known: KnownHinge, pixel: float,
    state: NDArray[np.int64] | None,
) -> dict[str, Any]:  # fmt: skip
    """angle_corr, code_corr, slope, swept, axis and point errors, and R^2 of either code about what is not its matter.

    conformation: (P, D), composition: (P, zdim), all of the same P particles; deviation: standard deviation of the
    angle in the set, degrees; pixel: Angstrom of the working grid.  ``angle_corr`` is that of the pair of bodies that
    moves most, ``code_corr`` of the one code that knows most; ``slope``: degrees found per degree, which noise shrinks;
    ``swept``: spread of the angles over the true one; ``axis_degrees``, ``axis_voxels``: direction and perpendicular
    distance.
    """
    angle = known.angle
    sign = 1.0 if np.corrcoef(found.angle, angle)[0, 1] >= 0 else -1.0
    moved = conformation[:, np.ptp(conformation, axis=0) > 0]
    scores: dict[str, Any] = {
        "angle_corr": abs(float(np.corrcoef(found.angle, angle)[0, 1])),
        "code_corr": float(max((abs(np.corrcoef(code, angle)[0, 1]) for code in moved.T), default=0.0)),
        "slope": float(np.polyfit(angle, sign * found.angle, 1)[0]),
        "swept": deviation / float(angle.std()),
        "coherence": found.coherence,
    }
    if known.axis is not None:
        direction = sign * found.axis @ known.axis
        scores["slope"] *= float(np.sign(direction))  # right-handed about the known axis
        scores["axis_degrees"] = float(np.rad2deg(np.arccos(min(1.0, abs(float(direction))))))
        if known.point is not None:
            scores["axis_voxels"] = _distance(found.point, found.axis, known.point / pixel, known.axis)
    used = composition[:, np.ptp(composition, axis=0) > 0]
    if used.shape[1]:
        scores["angle_from_composition_r2"] = invariance(used, {"angle": angle})["max_r2"]
    if state is not None and len(np.unique(state)) > 1 and moved.shape[1]:
        of = {f"state{value}": (state == value).astype(np.float64) for value in np.unique(state)}
        scores["state_from_conformation_r2"] = invariance(moved, of)["max_r2"]
    return scores


def _distance(point: Floats, axis: Floats, other: Floats, direction: Floats) -> float:
    """Perpendicular distance of ``point`` from the line through ``other`` along ``direction``."""
    away = point - other
    return float(np.linalg.norm(away - (away @ direction) * direction))
