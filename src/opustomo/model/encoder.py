"""The encoder: a particle's residual density to a correction of its linear posterior.

Owns: the convolutions that look at one particle.  Layer sizes follow OPUS-DSD/OPUS-TOMO at ``width`` 1.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

SLOPE = 0.2  # of the leaky ReLUs


def channels(base: int, width: float) -> int:
    """``base`` channels scaled by ``width``, a multiple of 4."""
    return max(4, 4 * round(base * width / 4))


class Encoder(nn.Module):
    """(b, C, C, C) residual density and (b, 2 zdim) linear posterior to corrections of mean and log sigma.

    The last layer starts at zero: an untrained encoder returns the linear posterior.
    """

    def __init__(self, zdim: int, width: float, encoderres: int) -> None:
        super().__init__()
        stem = [1, *(channels(c, width) for c in (32, 64, 128))]
        self.stem = nn.ModuleList(nn.Conv3d(a, b, 4, 2, 1) for a, b in pairwise(stem))
        self.encoderres = encoderres
        body, size = [stem[-1]], encoderres
        for base in (256, 512, 512):
            if size < 2:
                break
            body.append(channels(base, width))
            size //= 2
        self.body = nn.ModuleList(nn.Conv3d(a, b, 4, 2, 1) for a, b in pairwise(body))
        hidden = channels(512, width)
        self.hidden = nn.Linear(body[-1] + 2 * zdim, hidden)
        self.head = nn.Linear(hidden, 2 * zdim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, density: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
        """Corrections (b, zdim) to the posterior mean and to the logarithm of its scale."""
        x = density[:, None]
        for layer in self.stem:
            x = functional.leaky_relu(layer(x), SLOPE)
        x = functional.interpolate(x, size=(self.encoderres,) * 3, mode="trilinear", align_corners=False)
        for layer in self.body:
            x = functional.leaky_relu(layer(x), SLOPE)
        pooled = torch.cat([x.amax((-3, -2, -1)), linear], 1)
        mean, log_scale = self.head(functional.leaky_relu(self.hidden(pooled), SLOPE)).chunk(2, 1)
        return mean, log_scale
