"""How the bodies of a molecule move: the covariance of their motions under which the data are likeliest.

Owns: S of ``bodies`` from what every particle tells of its motion.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

ITERATIONS = 200  # of L-BFGS at most


def likeliest_covariance(known: Tensor, motion: Tensor, precision: Tensor) -> Tensor:
    """The covariance S (n, n) of ``m_i ~ N(0, S)`` under which the particles' motions are likeliest.

    motion (P, n): the most likely ones under the covariance ``known`` (n, n); precision H (P, n, n): the data's.  With
    ``p_i = (known^-1 + H_i) m_i`` a particle's evidence is ``(p^t F (1 + F^t H F)^-1 F^t p - log det(1 + F^t H F)) / 2``
    for ``S = F F^t``.  EM, which takes one step towards this, needs hundreds where the data say little, and would
    leave motions that nobody has seen.
    """
    root = torch.linalg.cholesky(known.double())
    heavy = precision.double()
    pull = torch.cholesky_solve(motion.double().T, root).T + (heavy @ motion.double()[..., None])[..., 0]
    # in units of the known covariance, so that rotations and shifts weigh alike
    heavy, pull = root.T @ heavy @ root, pull @ root
    eye = torch.eye(len(known), dtype=torch.float64)

    def minus_evidence(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        factor = torch.from_numpy(flat).reshape(eye.shape).requires_grad_()
        lower = torch.linalg.cholesky(eye + factor.T @ heavy @ factor)
        solved = torch.linalg.solve_triangular(lower, (pull @ factor)[..., None], upper=False)
        evidence = 0.5 * solved.square().sum() - lower.diagonal(dim1=-2, dim2=-1).log().sum()
        slope = torch.autograd.grad(-evidence, factor)[0]
        return -float(evidence.detach()), slope.numpy().ravel()

    found = minimize(minus_evidence, eye.numpy().ravel(), jac=True, method="L-BFGS-B",
                     options={"maxiter": ITERATIONS})  # fmt: skip
    factor = root @ torch.from_numpy(found.x).reshape(eye.shape)
    return (factor @ factor.T).float()
