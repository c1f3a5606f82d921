"""The latent stage: the code's nonlinear map, trained on sufficient statistics in seconds.

Owns: the step between the linear stage and the convolutions.  As long as the density is ``mean + U f(z)``, the
statistics ``U^T B`` and ``U^T W U`` say everything the particles do, so ``f`` and the posterior that goes with it are
learned without touching a volume.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opustomo.linear import POSE
from opustomo.model.vae import Vae
from opustomo.objective import kl_divergence

STEPS, BATCH, SAMPLES, RATE = 1000, 128, 4, 3e-3


@dataclass(frozen=True)
class Statistics:
    """Evidence as a function of the coefficients y of U: ``constant + <e, first> - 1/2 <e, second e>``, e = (1, y).

    constant (P,), first (P, 1+zdim), second (P, 1+zdim, 1+zdim); gains are in, pose errors are integrated out.
    """

    constant: Tensor
    first: Tensor
    second: Tensor

    def evidence(self, index: Tensor, coefficients: Tensor) -> Tensor:
        """(s, b) evidence in nats of the particles at ``index`` for coefficients (s, b, zdim)."""
        e = torch.cat([torch.ones_like(coefficients[..., :1]), coefficients], -1)
        quadratic = torch.einsum("sba,bac,sbc->sb", e, self.second[index], e)
        return self.constant[index] + (e * self.first[index]).sum(-1) - 0.5 * quadratic


def reduce_statistics(linear: Tensor, quadratic: Tensor, gain: Tensor, zdim: int) -> Statistics:
    """Integrate the pose errors out of the linear stage's statistics and pad unused dimensions with zeros.

    linear (P, 1+K+6), quadratic (P, 1+K+6, 1+K+6) from ``linear.statistics``; gain (P,).
    """
    linear, quadratic = linear * gain.double()[:, None], quadratic * gain.double()[:, None, None].square()
    n = linear.shape[1] - POSE
    inner = quadratic[:, n:, n:] + torch.eye(POSE, dtype=quadratic.dtype)
    cross = quadratic[:, n:, :n]
    solved = torch.linalg.solve(inner, torch.cat([cross, linear[:, n:, None]], -1))
    first = linear[:, :n] - torch.einsum("bpa,bp->ba", cross, solved[..., -1])
    second = quadratic[:, :n, :n] - cross.transpose(1, 2) @ solved[..., :-1]
    constant = 0.5 * (linear[:, n:] * solved[..., -1]).sum(-1) - 0.5 * torch.logdet(inner)
    pad = (0, zdim + 1 - n)
    return Statistics(
        constant.float(),
        torch.nn.functional.pad(first, pad).float(),
        torch.nn.functional.pad(second, pad + pad).float(),
    )


def bound(model: Vae, statistics: Statistics, index: Tensor, mean: Tensor, factor: Tensor, noise: Tensor) -> Tensor:
    """Evidence lower bound (b,) of the particles at ``index``; noise: (s, b, zdim) standard normal."""
    posterior_mean, posterior_factor = model.refined(mean[index], factor[index])
    code = posterior_mean + torch.einsum("bjk,sbk->sbj", posterior_factor, noise)
    fit = statistics.evidence(index, model.warp(code * model.used)).mean(0)
    return fit - kl_divergence(posterior_mean, posterior_factor)


def train_latent(model: Vae, statistics: Statistics, mean: Tensor, factor: Tensor, train: Tensor, seed: int) -> None:
    """Train ``model.warp`` and ``model.refine`` on the particles at ``train`` (Adam, cosine rate); in place.

    mean (P, zdim), factor (P, zdim, zdim): the linear posterior.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = [*model.warp.parameters(), *model.refine.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=1e-2)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * 0.5 * (1.0 + math.cos(math.pi * step / STEPS))
        index = train[torch.randint(len(train), (min(BATCH, len(train)),), generator=generator)]
        noise = torch.randn((SAMPLES, len(index), model.zdim), generator=generator)
        loss = -bound(model, statistics, index, mean, factor, noise).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
