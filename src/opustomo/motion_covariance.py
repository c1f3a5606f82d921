"""How the bodies of a molecule move: the covariance of their motions under which the data are likeliest.

Owns: what data tell of a motion near where it is, and S of ``bodies`` from that of all particles.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

log = logging.getLogger("opustomo")

ITERATIONS = 200  # of L-BFGS at most
WIDEST = 16.0  # times the variance of the motions that are expected; twenty degrees either way are 4 times


@dataclass(frozen=True)
class Told:
    """The log-likelihood of P motions, codes integrated out: ``<pull, m> - <m, precision m> / 2``.

    pull: (P, n); precision: (P, n, n).
    """

    pull: Tensor
    precision: Tensor

    @classmethod
    def of(cls, slope: Tensor, curvature: Tensor, place: Tensor, count: int) -> Told:
        """From slope (P, n + K) and curvature at ``place``, motions (``count`` numbers) and codes of unit variance."""
        pull = slope + (curvature @ place[..., None])[..., 0]
        inner = curvature[:, count:, count:] + torch.eye(place.shape[1] - count).to(curvature)
        cross = curvature[:, :count, count:]
        taken = cross @ torch.linalg.solve(inner, torch.cat([cross.transpose(1, 2), pull[:, count:, None]], -1))
        return cls(pull[:, :count] - taken[..., -1], curvature[:, :count, :count] - taken[..., :-1])

    @classmethod
    def joined(cls, parts: Sequence[Told]) -> Told:
        """Of all particles, from those of some after the others."""
        return cls(torch.cat([part.pull for part in parts]), torch.cat([part.precision for part in parts]))


def likeliest_covariance(first: Tensor, told: Told) -> Tensor:
    """The covariance S (n, n) of ``m_i ~ N(0, S)`` under which the data are likeliest; ``first``: where to begin.

    With ``S = F F^t``, pull p and precision H a particle's evidence is
    ``(<p, F (1 + F^t H F)^-1 F^t p> - log det(1 + F^t H F)) / 2``.  EM, which takes one step towards its maximum, needs
    hundreds where the data say little, and would leave motions that nobody has seen.  The search begins at ``first``
    every time: motions that an earlier one has taken for none would not come back.  S is at most ``WIDEST`` times
    ``first`` in any direction: p and H are known near where particles are, and of a body that data hardly show they
    promise more the farther it goes.
    """
    root = torch.linalg.cholesky(first.double())
    # in units of the first covariance, so that rotations and shifts weigh alike
    heavy, pull = root.T @ told.precision.double() @ root, told.pull.double() @ root
    eye = torch.eye(len(root), dtype=torch.float64)

    def minus_evidence(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        factor = torch.from_numpy(flat).reshape(eye.shape).requires_grad_()
        lower, failed = torch.linalg.cholesky_ex(eye + factor.T @ heavy @ factor)
        if failed.any():  # a step so long that single precision of H does not carry it: a shorter one is tried
            return np.inf, np.zeros_like(flat)
        solved = torch.linalg.solve_triangular(lower, (pull @ factor)[..., None], upper=False)
        evidence = 0.5 * solved.square().sum() - lower.diagonal(dim1=-2, dim2=-1).log().sum()
        slope = torch.autograd.grad(-evidence, factor)[0]
        return -float(evidence.detach()), slope.numpy().ravel()

    found = minimize(minus_evidence, eye.numpy().ravel(), jac=True, method="L-BFGS-B",
                     options={"maxiter": ITERATIONS})  # fmt: skip
    factor = torch.from_numpy(found.x).reshape(eye.shape)
    size, direction = torch.linalg.eigh(factor @ factor.T)
    if size[-1] > WIDEST:
        said = "the data do not tell how far some bodies move: held to %.0f times what is expected; give larger ones"
        log.warning(said, WIDEST**0.5)
    factor = root @ direction * size.clamp(0.0, WIDEST).sqrt()
    return factor @ factor.T
