"""The posterior's covariance from its mean alone, for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from study.mixtures import GaussianMixture


def covariance(mixture: GaussianMixture, x_t: Tensor, t: float) -> Tensor:
    """Cov[x | x_t] = t^2 dD/dx_t (B, d, d), Tweedie's formula of second order."""

    def denoise(row: Tensor) -> Tensor:
        return mixture.denoiser(row[None], t)[0]

    return t**2 * torch.vmap(torch.func.jacrev(denoise))(x_t)
