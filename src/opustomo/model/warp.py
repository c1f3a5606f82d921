"""A nonlinear map of the code: what makes many shapes of a distribution out of a Gaussian prior.

Owns: the small perceptrons that act on codes alone.  ``Warp`` bends the code before the linear decoder (discrete
states, curved motions cost no new volumes), ``Refine`` corrects the linear posterior accordingly.  Both start at zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

HIDDEN = 64


def _perceptron(inside: int, outside: int) -> nn.Sequential:
    last = nn.Linear(HIDDEN, outside)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inside, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, HIDDEN), nn.SiLU(), last)


class Warp(nn.Module):
    """(..., zdim) codes to (..., zdim) coefficients of the linear components: ``z + w(z)``."""

    def __init__(self, zdim: int) -> None:
        super().__init__()
        self.bend = _perceptron(zdim, zdim)

    def forward(self, code: Tensor) -> Tensor:
        """Coefficients of the components."""
        bent: Tensor = self.bend(code)
        return code + bent


class Refine(nn.Module):
    """Linear posterior, mean (b, zdim) and spread (b, zdim), to corrections of its mean and log scale."""

    def __init__(self, zdim: int) -> None:
        super().__init__()
        self.correct = _perceptron(2 * zdim, 2 * zdim)

    def forward(self, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Corrections (b, zdim) each."""
        shift, log_scale = self.correct(torch.cat([mean, spread], 1)).chunk(2, 1)
        return shift, log_scale
