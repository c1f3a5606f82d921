"""The variational autoencoder around the linear model: ``V(z) = mean + U z + reach D(z)``.

Owns: how encoder, decoder and linear model join.  An untrained network is exactly the linear stage: its decoder adds
nothing and its posterior is the linear one, so whatever training changes is the network's own doing.  Without
``encoderres`` there is no encoder: the posterior stays the linear one (docs/decisions/0009-no-encoder-unless-asked.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opustomo.model.decoder import Decoder
from opustomo.model.encoder import Encoder
from opustomo.physics.fourier import fourier_resize

MAX_LOG_SCALE = 3.0  # bound of the learned log scale, so that a bad batch cannot overflow


class Vae(nn.Module):
    """mask, mean, reach (C, C, C), components (K, C, C, C): buffers, not trained.

    reach: the mask times the local amplitude of the components' prior.  The decoder speaks where the linear stage has
    found change; in the whole mask it learns the noise of the rest (docs/experiments.md).
    The code has K dimensions, one for every component: others the encoder would fill with the wedge.
    """

    mask: Tensor
    mean: Tensor
    components: Tensor
    reach: Tensor
    scale: Tensor

    def __init__(
        self,
        mask: Tensor,
        mean: Tensor,
        components: Tensor,
        reach: Tensor,
        *,
        templateres: int,
        width: float,
        encoderres: int,
    ) -> None:
        super().__init__()
        size = components.shape[0]
        self.encoder = Encoder(size, width, encoderres) if encoderres else None
        self.decoder = Decoder(size, templateres, width)
        self.register_buffer("mask", mask)
        self.register_buffer("mean", mean)
        self.register_buffer("components", components)
        self.register_buffer("reach", reach)
        # the decoder speaks in units of the components' density, the encoder hears its input in those of the mean
        inside = mask > 0.5
        spread = components.square().sum(0)[inside].mean().sqrt()
        reference = mean[inside].square().mean().sqrt().clamp(min=1e-12)  # an empty mean is no reason for NaN
        self.register_buffer("scale", torch.stack([torch.maximum(spread, 0.02 * reference), reference]))

    def encode(self, density: Tensor, mean: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Correction of the posterior of the linear stage: shift and log scale of its codes, (b, K) each.

        density: (b, C, C, C) residual; mean, spread: (b, K), centre and standard deviations of that posterior.  Only
        of a network that has an encoder.
        """
        assert self.encoder is not None
        shift, log_scale = self.encoder(density / self.scale[1], torch.cat([mean, spread], 1))
        return shift, MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)

    def nonlinear(self, code: Tensor) -> Tensor:
        """``reach D(z)``: (b, K) to (b, C, C, C)."""
        volume = fourier_resize(self.decoder(code), self.mask.shape[-1])
        return volume * (self.scale[0] * self.reach)

    def linear(self, code: Tensor) -> Tensor:
        """``mean + U z``: (b, K) to (b, C, C, C); mean and components are masked already."""
        return self.mean + torch.einsum("bk,kzyx->bzyx", code, self.components)
