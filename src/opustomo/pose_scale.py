"""How wrong the given poses are: the scale of the pose errors under which the data are likeliest.

Owns: the six pose errors of a particle (rotation about x, y, z; shift along x, y, z), and their two scales.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from opustomo.mixture import with_gain, without

POSE = 6  # rotation about x, y, z; shift along x, y, z
USUAL_POSE = math.radians(1.5), 0.25  # radians and working voxels, per axis: larger ones have to be shown by the data
LEAST, MOST = 0.01, 10.0  # times that
TOLD_BY = 4096  # particles that are enough to know two numbers


def likeliest_pose_scale(
    known: tuple[float, float], linear: Tensor, quadratic: Tensor, gain: Tensor, prior: Tensor
) -> tuple[float, float]:
    """The scale of the pose errors (radians, working voxels) under which the data are likeliest, codes N(0, I).

    known: the scale in whose units the moments and prior means are (arguments of ``linear.posterior``).  EM would need
    hundreds of steps where particles say little about their poses, and stays near its start.  An exponential prior
    takes errors that the data do not show for small: poses are then left where they are.
    """
    some = slice(None, None, -(-len(linear) // TOLD_BY))
    linear, quadratic = with_gain(linear[some], quadratic[some], gain[some])
    codes = slice(1, linear.shape[1] - POSE)
    poses = slice(codes.stop, None)
    # about the mean, whose coefficient is 1
    about = without(linear - quadratic[:, 0], quadratic, poses, codes, torch.zeros_like(linear[:, codes]))
    right, precision = about.first, about.second
    given = prior[some].double()
    unit, usual = (torch.tensor(values, dtype=torch.float64) for values in (known, USUAL_POSE))

    def minus_evidence(log_scale: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        scale = torch.from_numpy(log_scale).exp()
        inverse = (unit / scale).square().repeat_interleave(3)
        factor = torch.linalg.cholesky(precision + inverse.diag())
        pull = right + inverse * given
        mean = torch.cholesky_solve(pull[..., None], factor)[..., 0]
        fit = 0.5 * ((pull * mean).sum() - (inverse * given.square()).sum() + len(given) * inverse.log().sum())
        spread = torch.cholesky_inverse(factor).diagonal(dim1=-2, dim2=-1)
        error = inverse * ((mean - given).square() + spread).sum(0)
        slope = error.unflatten(0, (2, 3)).sum(1) - 3 * len(given) - scale / usual
        value = fit - factor.diagonal(dim1=-2, dim2=-1).log().sum() - (scale / usual).sum()
        return -float(value), -slope.numpy()

    bounds = [(math.log(LEAST * u), math.log(MOST * u)) for u in USUAL_POSE]
    found = minimize(minus_evidence, unit.log().numpy(), jac=True, method="L-BFGS-B", bounds=bounds)
    turn, move = np.exp(found.x).tolist()
    return turn, move
