"""The variational autoencoder around the linear model: ``V(z) = mask (mean + U w(z) + D(z))``.

Owns: how encoder, decoder and linear model join.  An untrained network is exactly the linear stage: its decoder adds
nothing and its posterior is the linear one, so whatever training changes is the network's own doing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opustomo.model.decoder import Decoder
from opustomo.model.encoder import Encoder
from opustomo.model.warp import Refine, Warp
from opustomo.physics.fourier import fourier_resize

MAX_LOG_SCALE = 3.0  # bound of the learned log scale, so that a bad batch cannot overflow


class Vae(nn.Module):
    """mask (C, C, C), mean (C, C, C), components (zdim, C, C, C), pose_modes (6, C, C, C): buffers, not trained.

    Unused code dimensions have zero components.
    """

    mask: Tensor
    mean: Tensor
    components: Tensor
    pose_modes: Tensor
    scale: Tensor
    used: Tensor

    def __init__(
        self,
        mask: Tensor,
        mean: Tensor,
        components: Tensor,
        pose_modes: Tensor,
        *,
        templateres: int,
        width: float,
        encoderres: int,
    ) -> None:
        super().__init__()
        zdim = components.shape[0]
        self.encoder = Encoder(zdim, width, encoderres)
        self.decoder = Decoder(zdim, templateres, width)
        self.warp = Warp(zdim)
        self.refine = Refine(zdim)
        for name, tensor in (("mask", mask), ("mean", mean), ("components", components), ("pose_modes", pose_modes)):
            self.register_buffer(name, tensor)
        # a dimension without a component is not used: the encoder would fill it with the wedge, the decoder hear noise
        self.register_buffer("used", (components.flatten(1).abs().amax(1) > 0).to(mask.dtype))
        # the decoder speaks in units of the components' density, the encoder hears its input in those of the mean
        inside = mask > 0.5
        spread = components.square().sum(0)[inside].mean().sqrt()
        reference = mean[inside].square().mean().sqrt()
        self.register_buffer("scale", torch.stack([torch.maximum(spread, 0.02 * reference), reference]))

    @property
    def zdim(self) -> int:
        """Dimension of the code."""
        return self.components.shape[0]

    def refined(self, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """The linear posterior, mean (b, zdim) and lower factor (b, zdim, zdim), corrected for the warp."""
        return self._corrected(mean, factor, self.refine(mean, factor.square().sum(-1).sqrt()))

    def encode(self, density: Tensor, mean: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of the code: mean (b, zdim) and lower factor L (b, zdim, zdim) with covariance ``L L^T``.

        density: (b, C, C, C) residual; mean, factor: the linear posterior, which the network corrects.
        """
        spread = factor.square().sum(-1).sqrt()
        seen = self.encoder(density / self.scale[1], torch.cat([mean, spread], 1))
        return self._corrected(*self.refined(mean, factor), seen)

    def _corrected(self, mean: Tensor, factor: Tensor, correction: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        shift, log_scale = (part * self.used for part in correction)
        widen = (MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)).exp()
        return mean + shift, factor * widen[:, None, :]

    def nonlinear(self, code: Tensor) -> Tensor:
        """``mask D(z)``: (b, zdim) to (b, C, C, C)."""
        volume = fourier_resize(self.decoder(code * self.used), self.mask.shape[-1])
        return volume * (self.scale[0] * self.mask)

    def linear(self, code: Tensor) -> Tensor:
        """``mean + U w(z)``: (b, zdim) to (b, C, C, C); mean and components are masked already."""
        return self.mean + torch.einsum("bk,kzyx->bzyx", self.warp(code * self.used), self.components)
