"""The decoder: a code to the part of the density that is not linear in it.

Owns: the transposed convolutions from a code to a volume.  Layer sizes follow OPUS-DSD/OPUS-TOMO for a template of
128 voxels or more at ``width`` 1; smaller templates start from a 4^3 grid and double three times instead of four.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from opustomo.model.encoder import SLOPE, channels

LARGE_TEMPLATE = 128


class Decoder(nn.Module):
    """(b, zdim) codes to (b, T, T, T) densities of either sign; the last layer starts at zero."""

    def __init__(self, zdim: int, templateres: int, width: float) -> None:
        super().__init__()
        large = templateres >= LARGE_TEMPLATE
        trunk = [channels(c, width) for c in ((2048, 1024, 512, 256, 128) if large else (512, 256))]
        rise = [trunk[-1], *(channels(c, width) for c in ((64, 32, 16) if large else (64, 32))), 1]
        self.grid = 1 if large else 2  # size of the first grid; every trunk layer doubles it
        self.resized = templateres // 2 ** (len(rise) - 1)
        hidden = channels(512, width)
        self.first = nn.Linear(zdim, hidden)
        self.second = nn.Linear(hidden, trunk[0] * self.grid**3)
        sizes = (self.grid * 2**i for i in range(len(trunk) - 1))
        self.trunk = nn.ModuleList(_double(a, b, size) for (a, b), size in zip(pairwise(trunk), sizes, strict=True))
        self.rise = nn.ModuleList(_double(a, b) for a, b in pairwise(rise))
        last = self.rise[-1]
        assert isinstance(last, nn.ConvTranspose3d) and last.bias is not None
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, code: Tensor) -> Tensor:
        """Densities (b, T, T, T)."""
        x = functional.leaky_relu(self.first(code), SLOPE)
        x = functional.leaky_relu(self.second(x), SLOPE)
        x = x.unflatten(1, (-1, self.grid, self.grid, self.grid))
        for layer in self.trunk:
            x = functional.leaky_relu(layer(x), SLOPE)
        x = functional.interpolate(x, size=(self.resized,) * 3, mode="trilinear", align_corners=False)
        for layer in self.rise[:-1]:
            x = functional.leaky_relu(layer(x), SLOPE)
        return self.rise[-1](x)[:, 0]


def _double(inside: int, outside: int, size: int = 2) -> nn.ConvTranspose3d:
    """Doubles a grid of ``size``.  From a single voxel only the inner 2^3 of a kernel of 4^3 ever meets data."""
    return nn.ConvTranspose3d(inside, outside, 2, 2) if size == 1 else nn.ConvTranspose3d(inside, outside, 4, 2, 1)
