"""The decoder: a code to the part of the density that is not linear in it.

Owns: the transposed convolutions from a code to a volume.  Layer sizes follow OPUS-DSD/OPUS-TOMO for a template of
128 voxels or more at ``width`` 1; smaller templates start from a 4^3 grid and double three times instead of four.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from opustomo.model.encoder import SLOPE, channels

LARGE_TEMPLATE = 128


class Decoder(nn.Module):
    """(b, zdim) codes to (b, T, T, T) densities of either sign; the last layer starts at zero.

    recomputed: save memory: the layers on large grids keep nothing and run again, particle by particle, backward.
    """

    recomputed: bool = False
    _compiled: Callable[[Tensor], Tensor] | None = None

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
        last = LastDoubling(rise[-2], 1, 4, 2, 1)
        self.rise = nn.ModuleList([*(_double(a, b) for a, b in pairwise(rise[:-1])), last])
        assert last.bias is not None
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
        # few channels on large grids: half the time of these layers (docs/experiments.md, cost of a step)
        x = x.contiguous(memory_format=torch.channels_last_3d)
        grow = self._compiled or self._grow
        if not torch.is_grad_enabled():  # evaluation comes in other batches, each of which would be compiled anew
            return self._grow(x)
        if self.recomputed:
            return torch.cat([checkpoint(grow, one, use_reentrant=False) for one in x.split(1)])
        return grow(x)

    def compile_large(self) -> None:
        """Have the layers on large grids compiled (torch.compile) at the first step; others are products already."""
        self._compiled = torch.compile(self._grow)

    def _grow(self, x: Tensor) -> Tensor:
        for layer in self.rise[:-1]:
            x = functional.leaky_relu(layer(x), SLOPE)
        grown: Tensor = self.rise[-1](x)[:, 0]
        return grown


def _double(inside: int, outside: int, size: int = 2) -> nn.ConvTranspose3d:
    """Doubles a grid of ``size``.  From a single voxel only the inner 2^3 of a kernel of 4^3 ever meets data."""
    return nn.ConvTranspose3d(inside, outside, 2, 2) if size == 1 else nn.ConvTranspose3d(inside, outside, 4, 2, 1)


class LastDoubling(nn.ConvTranspose3d):
    """A transposed convolution (kernel 4, stride 2, padding 1) to one channel, forwards as a plain one.

    Libraries make a transposed convolution of what is meant for gradients, which is slow for a single channel.
    """

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """(b, c, n, n, n) to (b, 1, 2n, 2n, 2n)."""
        made: Tensor = _Phases.apply(x, self.weight.to(x.dtype))
        assert self.bias is not None
        return made + self.bias.to(x.dtype)


class _Phases(torch.autograd.Function):
    """Even and odd voxels of the doubled grid are eight channels of a convolution on the small one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        # along an axis out[2i] = w1 x[i] + w3 x[i-1] and out[2i+1] = w2 x[i] + w0 x[i+1]: (neighbour, phase, tap)
        taps = weight.new_zeros(3, 2, 4)
        taps[1, 0, 1] = taps[0, 0, 3] = taps[1, 1, 2] = taps[2, 1, 0] = 1.0
        kernel = torch.einsum("ioabc,xpa,yqb,zrc->pqroixyz", weight, taps, taps, taps).reshape(8, -1, 3, 3, 3)
        b, n = x.shape[0], x.shape[-1]
        phases = functional.conv3d(x, kernel, padding=1).view(b, 2, 2, 2, n, n, n)
        return phases.permute(0, 4, 1, 5, 2, 6, 3).reshape(b, 1, 2 * n, 2 * n, 2 * n)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        gradient = gradients[0].to(x.dtype).contiguous()
        wanted = [True, True, False]
        inner, own, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, [2, 2, 2], [1, 1, 1], [1, 1, 1], True, [0, 0, 0], 1, wanted
        )
        return inner, own
